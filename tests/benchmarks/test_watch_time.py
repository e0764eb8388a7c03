"""The comparison of methods for watch time: features without the future, and methods told apart."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from benchmarks import watch_time
from benchmarks.protocols import Tables
from benchmarks.watch_time import (
    CONSTANTS,
    WatchLog,
    build_logs,
    compare,
    earlier_means,
    error_by_duration,
    judge,
    main,
    predict,
    quantile_buckets,
    to_markdown,
)
from schema.contract import DatasetSpec
from trainer.features import SPLITS

DAY = 86_400
SPEC = DatasetSpec.model_validate(
    {
        "name": "tiny",
        "interactions": {
            "files": ["log.csv"],
            "columns": {
                "user_id": "user",
                "item_id": "video",
                "event_time_unix_s": "time",
                "watch_time_s": "watched",
                "item_duration_s": "length",
            },
            "labels": {"click": "click"},
        },
        "users": {"files": ["users.csv"], "columns": {"user_id": "user"}},
        "items": {
            "files": ["items.csv"],
            "columns": {"item_id": "video"},
            "features": [{"name": "duration_s", "kind": "continuous"}],
        },
        "positive": "click",
        "tasks": [{"name": "watch", "label": "watch_time_s", "kind": "watch_time"}],
        "split": {"fractions": [0.6, 0.2, 0.2]},
    }
)
# Item, mean watch time in s; the two are shown equally often and last equally long.
MEAN_WATCH_S = {"dull": 4.0, "gripping": 40.0}


def planted(rows: int, seed: int) -> Tables:
    """A log of ten days, eight for training; watch times depend on the item, most rows are clicked."""
    rng = np.random.default_rng(seed)
    item = rng.choice(list(MEAN_WATCH_S), rows)
    watched = rng.exponential([MEAN_WATCH_S[name] for name in item])
    day = np.sort(rng.choice(10, rows))
    split = np.maximum(day - 7, 0)
    interactions = pl.DataFrame(
        {
            "user_id": rng.choice(["u", "v", "w"], rows),
            "item_id": item,
            "event_time_unix_s": day * DAY + rng.integers(0, DAY, rows),
            "split": np.array(SPLITS)[split],
            "watch_time_s": watched.astype(np.float32),
            "completion": (watched / 100).clip(max=1).astype(np.float32),
            "click": (watched > 3).astype(np.float32),
        }
    ).sort("event_time_unix_s")
    items = pl.DataFrame({"item_id": list(MEAN_WATCH_S), "duration_s": [100.0, 100.0]})
    return Tables(SPEC, interactions, items)


@pytest.fixture(scope="module")
def logs() -> dict[str, WatchLog]:
    return build_logs(planted(6000, seed=1), None)


def history(rows: list[tuple[str, int, str, float, float, float]]) -> pl.DataFrame:
    return pl.DataFrame(
        rows, ["item_id", "day", "split", "click", "watch_time_s", "completion"], orient="row"
    )


def test_means_are_those_of_earlier_days_of_the_train_split() -> None:
    rows = [
        ("a", 1, "train", 1.0, math.e - 1, 0.5),
        ("b", 1, "train", 0.0, 0.0, 0.0),
        ("a", 2, "train", 1.0, math.e**3 - 1, 1.0),
        ("a", 2, "train", 0.0, 0.0, 0.0),
        ("a", 3, "eval", 1.0, 99.0, 1.0),
        ("a", 4, "test", 0.0, 0.0, 0.0),
    ]
    found = earlier_means(history(rows), "item_id")
    # Means of click, log(1 + s) and share over the four train rows; each item starts with 20 such rows.
    prior = np.array([0.5, 1.0, 0.375])
    unseen = [0.0, *prior]
    one_row = [math.log(2), *((np.array([1.0, 1.0, 0.5]) + 20 * prior) / 21)]
    three_rows = [math.log(4), *((np.array([2.0, 4.0, 1.5]) + 20 * prior) / 23)]
    np.testing.assert_allclose(found, [unseen, unseen, one_row, one_row, three_rows, three_rows])


def test_labels_of_the_same_day_or_later_do_not_reach_a_row() -> None:
    rows = [("a", day, "train" if day < 5 else "test", day % 2, 3.0 * day, 0.1 * day) for day in range(8)]
    found = earlier_means(history(rows), "item_id")
    for day in range(3, 8):
        changed = [(*row[:3], 1.0, 77.0, 0.9) if row[1] >= day and row[1] > 4 else row for row in rows]
        np.testing.assert_array_equal(earlier_means(history(changed), "item_id")[: day + 1], found[: day + 1])


def test_buckets_hold_equal_shares_of_the_train_rows_and_zero_is_unknown() -> None:
    values = np.concatenate([np.arange(3200.0), [np.nan, -5.0, 1e9]])
    in_train = np.arange(len(values)) < 3200
    buckets = quantile_buckets(values, in_train)
    assert np.bincount(buckets[:3200]).tolist() == [0, *[100] * 32]
    assert buckets[3200:].tolist() == [0, 1, 32]


def hand_log(**changes: Any) -> WatchLog:
    columns = {
        "watch_time_s": np.array([0.0, 2.0, 4.0, 8.0], np.float32),
        "click": np.array([0, 1, 0, 1], np.float32),
    }
    fields = {
        "columns": columns,
        "dense": np.zeros((4, 1), np.float32),
        "user_ids": np.array(["u", "u", "v", "v"]),
        "duration_s": np.array([10.0, 20.0, np.nan, 30.0]),
        "truth_s": None,
    }
    return WatchLog(**{**fields, **changes})


def test_metrics_of_hand_made_predictions() -> None:
    predictions = np.array([1.0, 2.0, 6.0, 5.0])
    values = judge(hand_log(), predictions)
    # Five of six pairs in order; the 8 s of user v are below the unclicked row, the 2 s of user u above.
    assert values == pytest.approx(
        {"mae": 6 / 4, "xauc": 5 / 6, "calibration": 1.0, "weighted_pairwise_loss": 0.8}
    )
    values = judge(hand_log(truth_s=np.array([1.0, 2.0, 3.0, 5.0])), predictions)
    assert (values["truth_mae"], values["truth_rmse"]) == pytest.approx((3 / 4, 3 / 2))
    assert values["truth_xauc"] == pytest.approx(5 / 6)


def test_error_by_duration_goes_from_short_to_long_and_leaves_out_unknown_durations() -> None:
    duration = np.append(np.arange(20.0, 0.0, -1.0), np.nan)
    watched = np.append(duration[:20] / 2, 9.0).astype(np.float32)
    log = hand_log(columns={"watch_time_s": watched}, duration_s=duration)
    found = error_by_duration(log, np.full(21, 4.0))
    assert [tenth["duration_s"] for tenth in found] == [1.5 + 2 * i for i in range(10)]
    assert [tenth["error_s"] for tenth in found] == pytest.approx([4 - (1.5 + 2 * i) / 2 for i in range(10)])


@pytest.mark.parametrize("method", ["weighted logistic", "Covington, corrected", "ordinal, median"])
def test_method_finds_the_planted_signal_and_serves_what_it_says(
    logs: dict[str, WatchLog], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_time, "HIDDEN_LAYERS", (16,))
    monkeypatch.setattr(watch_time, "BATCH_SIZE", 128)
    test = logs["test"]
    is_gripping = test.columns["item_id"] == test.columns["item_id"][test.watch_time_s.argmax()]
    # The median of an exponential is ln 2 of its mean. Clicks leave out less than 3 s.
    share = math.log(2) if "median" in method else 1.0
    predictions = predict(logs, method, seed=1)
    assert predictions[is_gripping].mean() == pytest.approx(40 * share, rel=0.25)
    if method == "Covington, corrected":
        # In most rows a click is sure to come, so that the odds of the paper are much too high.
        uncorrected = predict(logs, watch_time.UNCORRECTED, seed=1)
        assert uncorrected[is_gripping].mean() > 5 * predictions[is_gripping].mean()
    else:
        assert predictions[~is_gripping].mean() == pytest.approx(4 * share, rel=0.3)


def test_constants_are_compared_with_a_method_and_listed(
    logs: dict[str, WatchLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_time, "MAX_EPOCHS", 1)
    results = compare(logs, [*CONSTANTS, "weighted logistic"], seeds=(0, 1))
    mean = results["global mean"]["metrics"]
    watched = logs["train"].watch_time_s
    assert mean["calibration"]["mean"] == pytest.approx(watched.mean() / logs["test"].watch_time_s.mean())
    assert mean["mae"]["std"] is None
    assert results["weighted logistic"]["metrics"]["mae"]["std"] >= 0
    table = to_markdown({name: result["metrics"] for name, result in results.items()}, "method")
    assert table.splitlines()[0] == "| method | mae | xauc | calibration | weighted_pairwise_loss |"
    assert len(table.splitlines()) == 2 + 3
    assert f"| global mean | {mean['mae']['mean']:.4f} | 0.5000 |" in table


def test_command_writes_figures_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = planted(800, seed=2)
    monkeypatch.setattr(watch_time, "load", lambda *_: (tables, np.full(800, 10.0)))
    monkeypatch.setattr(watch_time, "MAX_EPOCHS", 1)
    monkeypatch.setattr(watch_time, "TABLE_2_LAYERS", ((), (4,)))
    options = ["--method", "weighted logistic", "--json", f"{tmp_path}/out/f.json"]
    outcome = CliRunner().invoke(main, [*options, "--figure", f"{tmp_path}/out/f.png"])
    assert outcome.exit_code == 0, outcome.output
    results = json.loads((tmp_path / "out" / "f.json").read_text(encoding="utf-8"))
    assert set(results["methods"]["weighted logistic"]["metrics"]) >= {"mae", "truth_rmse"}
    assert len(results["methods"]["weighted logistic"]["error_by_duration"]) == 10
    assert set(results["table_2"]) == {"none", "4"}
    assert set(results["table_2"]["4"]) == {"watch-time weighting", "equal weighting"}
    assert (tmp_path / "out" / "f.png").read_bytes().startswith(b"\x89PNG")


def test_help_tells_how_to_run_it() -> None:
    outcome = CliRunner().invoke(main, ["--help"])
    assert outcome.exit_code == 0
    assert "python -m benchmarks.watch_time --dataset kuairand-pure" in " ".join(outcome.output.split())
