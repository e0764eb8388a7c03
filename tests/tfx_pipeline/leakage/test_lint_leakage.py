"""The command: findings on the screen and in the file, and the exit code."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from tfx_pipeline.cli import main
from tfx_pipeline.leakage import lint, run_data
from tfx_pipeline.leakage.findings import Association, Check, LeakageReport, Protocol

CLEAN = Check("temporal splits", True, "all examples: train 8")
LEAK = Check("features recomputed", False, "3 examples", ("train: u1 [x] history is [i1], expected []",))


def report(*checks: Check) -> LeakageReport:
    return LeakageReport(
        "tiny",
        checks,
        (Association("click", "user_id", 0.95, 40), Association("click", "item_id", 0.61, 40)),
        0.9,
        (
            Protocol("temporal split", True, {"lightgbm/auc": 0.7}),
            Protocol("random split", False, {"lightgbm/auc": 0.75}),
        ),
    )


@pytest.mark.parametrize(("checks", "exit_code"), [((CLEAN,), 0), ((CLEAN, LEAK), 1)], ids=["clean", "leak"])
def test_findings_are_shown_written_and_decide_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checks: tuple[Check, ...], exit_code: int
) -> None:
    found = report(*checks)
    config = SimpleNamespace(dataset=None, examples=SimpleNamespace(max_positives_per_user=1))
    monkeypatch.setattr("tfx_pipeline.run_result.read_run", lambda _: SimpleNamespace(config=config))
    monkeypatch.setattr(run_data, "run_data", lambda *_: None)
    monkeypatch.setattr(lint, "lint", lambda *_: found)
    result = CliRunner().invoke(main, ["lint-leakage", "--output-dir", str(tmp_path)])
    assert result.exit_code == exit_code, result.output
    assert "not added to a report: there is no report at" in result.output
    assert "+0.050" in result.output and "0.950" in result.output
    assert ("u1 [x] history is [i1], expected []" in result.output) == (not found.passed)
    written = json.loads((tmp_path / "leakage.json").read_text())
    assert written["passed"] is found.passed
    assert written["checks"][0]["name"] == "temporal splits"
    assert written["inflation"][1] == {
        "name": "random split", "is_honest": False, "metrics": {"lightgbm/auc": 0.75}
    }  # fmt: skip


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["lint-leakage", "--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "no finished run" in result.output
