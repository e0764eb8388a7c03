"""What the ranking baselines are told about an impression: everything earlier, nothing else."""

import dataclasses
import math
from typing import Any

import numpy as np
import polars as pl
import pytest

from schema.point_in_time import count_names, item_counts
from tests.trainer.ranking_tables import DAY, SPEC, START, log
from trainer import ranking_features as module
from trainer.ranking_features import (
    USER_SMOOTHING,
    FeatureMatrix,
    History,
    Kind,
    RankingTables,
    ranking_features,
)

LABELS = ("click", "watch_time_s")
WINDOWS = {"1d": DAY, "3d": 3 * DAY, "all": None}


@pytest.fixture(scope="module")
def tables() -> RankingTables:
    return log(1_500, seed=1)


@pytest.fixture(scope="module")
def matrices(tables: RankingTables) -> dict[History, FeatureMatrix]:
    return {history: ranking_features(tables, history) for history in History}


def slow_counted(tables: RankingTables, row: int, history: History) -> dict[str, float]:
    """The counted features of one row, by loops over the events that are strictly earlier."""
    events = tables.interactions.to_dicts()
    items = {item["item_id"]: item for item in tables.items.to_dicts()}
    mine = events[row]
    moment = mine["event_time_unix_s"]
    if history is History.FROZEN:
        moment = min(moment, tables.train_end_unix_s)
    earlier = [event for event in events if event["event_time_unix_s"] < moment]

    def sums(counted: list[tuple[dict[str, Any], int]], length: int | None) -> tuple[float, list[float]]:
        inside = [(e, n) for e, n in counted if length is None or e["event_time_unix_s"] >= moment - length]
        return sum(n for _, n in inside), [sum(n * (e[name] or 0.0) for e, n in inside) for name in LABELS]

    def values_of(event: dict[str, Any], key: str) -> set[str]:
        value = event["item_id"] if key == "item_id" else items[event["item_id"]][key]
        return set(value) if isinstance(value, list) else {value} - {None}

    count, totals = sums([(event, 1) for event in earlier], None)
    everybody = [total / count if count else 0.0 for total in totals]
    found: dict[str, float] = {}

    def describe(
        name: str,
        counted: list[tuple[dict[str, Any], int]],
        windows: dict[str, int | None],
        prior: list[float],
        smoothing: float,
    ) -> None:
        for window, length in windows.items():
            number, totals = sums(counted, length)
            found[f"{name}_{window}_impressions"] = math.log1p(number)
            for label, total, start in zip(LABELS, totals, prior, strict=True):
                found[f"{name}_{window}_{label}"] = (total + smoothing * start) / (number + smoothing)
        times = [event["event_time_unix_s"] for event, _ in counted]
        age_s = mine["event_time_unix_s"] - max(times) if times else math.nan
        found[f"{name}_age"] = math.log1p(age_s / 3600)

    of_user = [event for event in earlier if event["user_id"] == mine["user_id"]]
    all_time = {"all": None}
    describe("user", [(e, 1) for e in of_user], WINDOWS, everybody, USER_SMOOTHING)
    own = [found[f"user_all_{label}"] for label in LABELS]
    here = [(e, 1) for e in of_user if e["surface"] == mine["surface"]]
    describe("user_surface", here, all_time, own, USER_SMOOTHING)
    for key in ("item_id", "creator_id", "tag"):
        shared = [(e, len(values_of(e, key) & values_of(mine, key))) for e in earlier]
        shared = [(e, number) for e, number in shared if number]
        describe(key, shared, WINDOWS, everybody, 4.0)
        on_surface = [(e, n) for e, n in shared if e["surface"] == mine["surface"]]
        describe(f"{key}_surface", on_surface, all_time, everybody, 4.0)
        of_both = [(e, n) for e, n in shared if e["user_id"] == mine["user_id"]]
        describe(f"user_{key}", of_both, all_time, own, USER_SMOOTHING)
    return found


@pytest.mark.parametrize("history", History)
def test_counted_features_equal_slow_loops_over_strictly_earlier_events(
    tables: RankingTables, matrices: dict[History, FeatureMatrix], history: History
) -> None:
    matrix = matrices[history]
    rng = np.random.default_rng(0)
    last = len(tables.interactions) - 1
    for row in (0, 1, last, *rng.integers(len(tables.interactions), size=40).tolist()):
        expected = slow_counted(tables, row, history)
        found = {name: float(matrix.column(name)[row]) for name in expected}
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True), (row, history)
    static = {"user_id", "item_id", "creator_id", "country", "friends", "duration_s", "tag", "surface"}
    assert set(matrix.names) - set(expected) == static | {"hour_of_day", "day_of_week", "item_age_days"}


def test_what_happens_at_or_after_an_event_does_not_reach_its_row(tables: RankingTables) -> None:
    row = 700
    moment = tables.interactions["event_time_unix_s"][row]
    is_later = pl.col("event_time_unix_s") >= moment
    changed = tables.interactions.with_columns(
        pl.when(is_later).then(1 - pl.col("click")).otherwise("click").alias("click"),
        pl.when(is_later).then(99.0).otherwise("watch_time_s").alias("watch_time_s"),
    )
    before = ranking_features(tables, History.ONLINE).values[: row + 1]
    after = ranking_features(dataclasses.replace(tables, interactions=changed), History.ONLINE)
    np.testing.assert_array_equal(after.values[: row + 1], before)
    assert (after.values[row + 1 :] != ranking_features(tables, History.ONLINE).values[row + 1 :]).any()


def test_frozen_history_knows_no_outcome_after_training(tables: RankingTables) -> None:
    is_later = pl.col("split") != "train"
    changed = tables.interactions.with_columns(
        pl.when(is_later).then(1 - pl.col("click")).otherwise("click").alias("click")
    )
    before, after = (
        ranking_features(t, History.FROZEN).values
        for t in (tables, dataclasses.replace(tables, interactions=changed))
    )
    np.testing.assert_array_equal(after, before)


def test_histories_differ_after_training_alone(
    tables: RankingTables, matrices: dict[History, FeatureMatrix]
) -> None:
    online, frozen = matrices[History.ONLINE].values, matrices[History.FROZEN].values
    in_train = tables.of_split("train")
    np.testing.assert_array_equal(online[in_train], frozen[in_train])
    assert (online[~in_train] != frozen[~in_train]).any()


def test_counts_of_items_are_those_that_the_ranker_reads(
    tables: RankingTables, matrices: dict[History, FeatureMatrix]
) -> None:
    counts = item_counts(tables.interactions, tables.interactions, tables.items, SPEC)
    names = count_names(SPEC)
    table = counts.list.to_array(len(names)).to_numpy()
    for key in SPEC.counters.keys:
        for window in WINDOWS:
            number = table[:, names.index(f"{key}_{window}_impressions")]
            found = matrices[History.ONLINE].column(f"{key}_{window}_impressions")
            np.testing.assert_allclose(found, np.log1p(number), rtol=1e-5)


def test_request_and_declared_features() -> None:
    events = pl.DataFrame(
        {
            "user_id": ["u3", "u0", "u3", "u9"],
            "item_id": ["i1", "i0", "i1", "i3"],
            # 1,650,000,000 is Friday 2022-04-15, 05:20 UTC; local time is 8 hours ahead.
            "event_time_unix_s": [START + 40_200, START + 40_200, START + 40_200, START + 144_000],
            "surface": ["b", "a", "b", "new"],
            "click": [1.0, 0.0, 1.0, 1.0],
            "watch_time_s": [1.0, 0.0, 1.0, 1.0],
            "row_number": [0, 1, 2, 3],
            "split": ["train", "train", "train", "test"],
        }
    )
    tables = dataclasses.replace(log(10, seed=0), interactions=events)
    matrix = ranking_features(tables, History.ONLINE)
    expected = {
        "user_id": [0, 1, 0, np.nan],
        "item_id": [0, 1, 0, np.nan],
        "creator_id": [0, np.nan, 0, np.nan],
        # u3 has the country de, u9 too; u0 is not in the users table.
        "country": [0, np.nan, 0, 0],
        "friends": [3, np.nan, 3, 9],
        "duration_s": [10, 0, 10, 30],
        "tag": [0, 0, 0, np.nan],
        "surface": [0, 1, 0, np.nan],
        "hour_of_day": [0, 0, 0, 5],
        "day_of_week": [5, 5, 5, 6],
        "item_age_days": [
            (40_200 + DAY) / DAY,
            40_200 / DAY,
            (40_200 + DAY) / DAY,
            (144_000 + 3 * DAY) / DAY,
        ],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(matrix.column(name), values, rtol=1e-6, err_msg=name)


def test_columns_say_what_they_hold(matrices: dict[History, FeatureMatrix]) -> None:
    matrix = matrices[History.ONLINE]
    kinds = dict(zip(matrix.names, matrix.kinds, strict=True))
    assert kinds["item_id"] is Kind.ID
    assert kinds["tag"] is kinds["hour_of_day"] is Kind.CATEGORY
    assert kinds["friends"] is kinds["user_age"] is kinds["item_id_1d_impressions"] is Kind.NUMBER
    assert kinds["tag_3d_click"] is Kind.RATE
    assert kinds["user_surface_all_watch_time_s"] is Kind.MEAN
    assert {"user_all_click", "user_age", "user_tag_all_click", "user_surface_age"} <= set(matrix.of_user)
    assert not {"user_id", "tag_all_click", "item_id_surface_age"} & set(matrix.of_user)


def test_a_feature_of_many_values_counts_as_an_id(
    tables: RankingTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CATEGORIES", 1)
    matrix = ranking_features(tables, History.ONLINE)
    kinds = dict(zip(matrix.names, matrix.kinds, strict=True))
    # Two countries and two first tags; the surface is no declared feature.
    assert kinds["country"] is kinds["tag"] is Kind.ID
    assert kinds["surface"] is Kind.CATEGORY


def test_columns_can_be_taken_from_another_matrix(matrices: dict[History, FeatureMatrix]) -> None:
    online, frozen = matrices[History.ONLINE], matrices[History.FROZEN]
    mixed = online.with_columns_of(frozen, ["user_all_click"])
    np.testing.assert_array_equal(mixed.column("user_all_click"), frozen.column("user_all_click"))
    np.testing.assert_array_equal(mixed.column("user_age"), online.column("user_age"))


def test_some_rows_are_described_as_among_all(
    tables: RankingTables, matrices: dict[History, FeatureMatrix]
) -> None:
    rows = np.array([1_400, 3, 900])
    some = ranking_features(tables, History.FROZEN, rows)
    np.testing.assert_array_equal(some.values, matrices[History.FROZEN].take(rows).values)
