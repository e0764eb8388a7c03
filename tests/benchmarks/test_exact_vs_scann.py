"""The comparison of exact search and ScaNN runs, and finds what there is to find."""

import pytest

from benchmarks import exact_vs_scann


def test_every_combination_gets_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorFlow is in use by now, and keeps its threads.
    for kind in ("intra", "inter"):
        monkeypatch.setattr(f"tensorflow.config.threading.set_{kind}_op_parallelism_threads", lambda _: None)
    exact_vs_scann.main(
        ["--items", "300", "--width", "8", "--batch", "1", "4", "--k", "10", "--seconds", "0.01"]
    )
    rows = [
        line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| 300")
    ]
    assert [row[2].strip() for row in rows] == ["1", "4"]
    for row in rows:
        assert float(row[3].replace(",", "")) > 0 and float(row[5].replace(",", "")) > 0
        # So few items are not partitioned: every one is scored.
        assert float(row[6]) == 1.0
