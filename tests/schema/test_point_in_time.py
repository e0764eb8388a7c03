"""Counts of the log against loops over its rows, and that nothing of the future is in them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.contract import DatasetSpec
from schema.point_in_time import (
    EarlierEvents,
    count_names,
    item_counts,
    join_as_of,
    key_codes,
    log_count_names,
)

START = 1_700_000_000
DAY = 86_400
KEYS = ("item_id", "creator_id", "genre", "tags")
WINDOWS_S = (3, 10)
Row = dict[str, Any]


def declaration(
    valid_from: bool = False,
    keys: tuple[str, ...] = KEYS,
    windows_days: tuple[float, ...] = tuple(seconds / DAY for seconds in WINDOWS_S),
) -> DatasetSpec:
    """Two tasks on labels, and a third on the same label as the first; windows of 3 and 10 seconds."""
    since = {"valid_from_unix_s": "since"} if valid_from else {}
    return DatasetSpec.model_validate(
        {
            "name": "counted",
            "interactions": {
                "files": ["log.csv"],
                "columns": {
                    name: name for name in ("user_id", "item_id", "event_time_unix_s", "watch_time_s")
                },
                "labels": {"click": "click", "unused": "unused"},
            },
            "users": {"files": ["users.csv"], "columns": {"user_id": "user_id"}},
            "items": {
                "files": ["items.csv"],
                "columns": {"item_id": "item_id", "creator_id": "creator", **since},
                "features": [
                    {"name": "genre", "kind": "categorical"},
                    {"name": "tags", "kind": "multi_categorical"},
                ],
            },
            "positive": "click",
            "tasks": [
                {"name": "click", "label": "click", "kind": "binary"},
                {"name": "watch", "label": "watch_time_s", "kind": "watch_time"},
                {"name": "rank", "label": "click", "kind": "regression"},
            ],
            "split": {"fractions": [0.8, 0.1, 0.1]},
            "counters": {"keys": keys, "windows_days": windows_days},
        }
    )


SPEC = declaration()
NUM_ITEMS = 6
# An item without any attribute, one with a tag twice, one that shares both tags with another.
ITEMS: list[Row] = [
    {"item_id": "i0", "creator_id": "c0", "genre": "g0", "tags": ["a", "b"]},
    {"item_id": "i1", "creator_id": "c0", "genre": "g1", "tags": ["b", "a"]},
    {"item_id": "i2", "creator_id": "c1", "genre": None, "tags": ["b"]},
    {"item_id": "i3", "creator_id": None, "genre": None, "tags": None},
    {"item_id": "i4", "creator_id": "c1", "genre": "g1", "tags": ["c", "c", "a"]},
    {"item_id": "i5", "creator_id": "c2", "genre": "g0", "tags": []},
]
ITEM_DTYPES = {"creator_id": pl.String, "genre": pl.String, "tags": pl.List(pl.String)}

# Few moments, so that many events share one; whole seconds watched, so that sums are exact.
EVENTS = st.tuples(
    st.integers(0, NUM_ITEMS - 1),
    st.integers(0, 14),
    st.sampled_from([None, 0.0, 1.0]),
    st.sampled_from([None, float("nan"), 0.0, 2.0, 9.0]),
)
LOGS = st.lists(EVENTS, max_size=25)


def log_of(events: list[tuple[int, int, float | None, float | None]]) -> pl.DataFrame:
    """Events in file order: item, second, click, seconds watched."""
    return pl.DataFrame(
        [
            {"item_id": f"i{i}", "event_time_unix_s": START + t, "click": click, "watch_time_s": watched}
            for i, t, click, watched in events
        ],
        schema={
            "item_id": pl.String,
            "event_time_unix_s": pl.Int64,
            "click": pl.Float32,
            "watch_time_s": pl.Float32,
        },
    )


def items_frame(items: list[Row] = ITEMS) -> pl.DataFrame:
    return pl.DataFrame(items, schema_overrides=ITEM_DTYPES, infer_schema_length=None)


def values_of(items: list[Row], key: str, item_id: str, time: int) -> set[str]:
    """Values of an attribute that an item had at a moment."""
    if key == "item_id":
        return {item_id}
    begun = [r for r in items if r["item_id"] == item_id and r.get("valid_from_unix_s", 0) <= time]
    if not begun:
        return set()
    value = max(begun, key=lambda row: row.get("valid_from_unix_s", 0))[key]
    values = value if isinstance(value, list) else [value]
    return {value for value in values if value is not None}


def oracle(log: list[Row], item_id: str, time: int, items: list[Row], spec: DatasetSpec) -> list[float]:
    """What the log says of an item at a moment, event by event."""

    def numbers(event: Row) -> list[float]:
        labels = [event["click"], event["watch_time_s"]]
        return [1.0, *(0.0 if label is None or np.isnan(label) else label for label in labels)]

    earlier = [event for event in log if event["event_time_unix_s"] < time]
    counts = [sum(numbers(event)[place] for event in earlier) for place in range(3)]
    for key, window_s in itertools.product(spec.counters.keys, [*WINDOWS_S, None]):
        mine = values_of(items, key, item_id, time)
        totals = [0.0] * 3
        for event in earlier:
            when = event["event_time_unix_s"]
            if window_s is None or when >= time - window_s:
                shared = mine & values_of(items, key, event["item_id"], when)
                # Once for every value that both have.
                totals = [t + len(shared) * n for t, n in zip(totals, numbers(event), strict=True)]
        counts += totals
    return counts


def assert_counts(log: pl.DataFrame, at: pl.DataFrame, items: list[Row], spec: DatasetSpec) -> None:
    rows = log.to_dicts()
    counted = item_counts(log, at, items_frame(items), spec)
    assert (counted.name, counted.dtype, len(counted)) == ("item_counts", pl.List(pl.Float32), len(at))
    for found, asked in zip(counted.to_list(), at.to_dicts(), strict=True):
        assert found == oracle(rows, asked["item_id"], asked["event_time_unix_s"], items, spec)


def test_names_stand_for_the_numbers_in_their_order() -> None:
    spec = declaration(keys=("item_id", "tags"), windows_days=(0.5, 7))
    assert log_count_names(spec) == ("log_all_impressions", "log_all_click", "log_all_watch_time_s")
    assert count_names(spec) == (
        "log_all_impressions",
        "log_all_click",
        "log_all_watch_time_s",
        *(
            f"{key}_{window}_{what}"
            for key in ("item_id", "tags")
            for window in ("0.5d", "7d", "all")
            for what in ("impressions", "click", "watch_time_s")
        ),
    )


def test_counts_of_a_log_that_can_be_counted_by_hand() -> None:
    # i0 and i1 share the creator and the tags a and b; i2 has the tag b.
    log = log_of([(0, 0, 1.0, 9.0), (2, 1, 0.0, 2.0), (1, 5, 1.0, None), (0, 5, None, 9.0), (0, 7, 0.0, 0.0)])
    last = item_counts(log, log, items_frame(), declaration(keys=("item_id", "tags"))).to_list()[-1]
    assert last[:3] == [4, 2, 20]
    # Of i0 itself: within 3 s the event at 5, whose click is missing; within 10 s and in all that at 0 too.
    assert last[3:12] == [1, 0, 9, 2, 1, 18, 2, 1, 18]
    # Of its tags a and b: events of i0 and i1 count once for each of the two, that of i2 once.
    assert last[12:] == [4, 2, 18, 7, 4, 38, 7, 4, 38]


@settings(max_examples=50)
@given(events=LOGS)
def test_every_event_is_told_what_came_strictly_before_it(events: list[tuple[Any, ...]]) -> None:
    log = log_of(events)
    assert_counts(log, log, ITEMS, SPEC)


@settings(max_examples=50)
@given(
    events=LOGS,
    asked=st.lists(st.tuples(st.integers(0, NUM_ITEMS), st.integers(-5, 40)), max_size=8),
)
def test_any_item_can_be_asked_for_at_any_moment(
    events: list[tuple[Any, ...]], asked: list[tuple[int, int]]
) -> None:
    # i6 is in no table and has no events.
    at = log_of([(item, second, None, None) for item, second in asked]).select("item_id", "event_time_unix_s")
    assert_counts(log_of(events), at, ITEMS, SPEC)


VERSIONS = st.lists(
    st.tuples(
        st.integers(0, NUM_ITEMS - 1),
        st.sampled_from([None, "c0", "c1"]),
        st.sampled_from([None, [], ["a"], ["a", "b"], ["b"]]),
        st.integers(-3, 12),
    ),
    unique_by=lambda version: (version[0], version[3]),
    max_size=12,
)


@settings(max_examples=50)
@given(events=LOGS, versions=VERSIONS)
def test_events_belong_to_the_attributes_of_their_time_and_items_are_asked_with_theirs(
    events: list[tuple[Any, ...]], versions: list[tuple[Any, ...]]
) -> None:
    items: list[Row] = [
        {"item_id": f"i{i}", "creator_id": c, "genre": None, "tags": tags, "valid_from_unix_s": START + since}
        for i, c, tags, since in versions
    ]
    if not items:
        items = [{**ITEMS[0], "valid_from_unix_s": START + 4}]
    log = log_of(events)
    assert_counts(log, log, items, declaration(valid_from=True))


@settings(max_examples=50)
@given(events=LOGS, moment=st.integers(0, 14), instead=LOGS)
def test_whatever_happens_from_a_moment_on_changes_nothing_up_to_it(
    events: list[tuple[Any, ...]], moment: int, instead: list[tuple[Any, ...]]
) -> None:
    past = [event for event in events if event[1] < moment]
    known = [event for event in events if event[1] <= moment]
    other = past + [event for event in instead if event[1] >= moment]
    at = log_of(known).select("item_id", "event_time_unix_s")
    items = items_frame()
    before = item_counts(log_of(events), at, items, SPEC)
    assert before.to_list() == item_counts(log_of(other), at, items, SPEC).to_list()
    assert before.to_list() == item_counts(log_of(past), at, items, SPEC).to_list()


@settings(max_examples=20)
@given(events=LOGS, seed=st.integers(0, 9))
def test_the_order_of_the_rows_does_not_matter(events: list[tuple[Any, ...]], seed: int) -> None:
    log = log_of(events).with_row_index("row")
    shuffled = log.sample(fraction=1, shuffle=True, seed=seed)
    counts = [
        table.with_columns(item_counts(table, table, items_frame(), SPEC)).sort("row")["item_counts"]
        for table in (log, shuffled)
    ]
    assert counts[0].to_list() == counts[1].to_list()


def test_long_watch_times_do_not_wear_windows_down() -> None:
    # 200,000 events of 1e6 s each: running sums in float32 would lose the last event of 0.25 s.
    num = 200_000
    log = pl.DataFrame(
        {
            "item_id": ["i0"] * num + ["i0"],
            "event_time_unix_s": [START] * num + [START + 100],
            "click": [1.0] * (num + 1),
            "watch_time_s": [1e6] * num + [0.25],
        },
        schema_overrides={"click": pl.Float32, "watch_time_s": pl.Float32},
    )
    at = pl.DataFrame({"item_id": ["i0"], "event_time_unix_s": [START + 101]})
    spec = declaration(keys=("item_id",))
    assert item_counts(log, at, items_frame(), spec)[0].to_list()[3:6] == [1, 1, 0.25]


@given(
    events=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 5), st.integers(0, 5)), max_size=20
    ),
    asked=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 15)), max_size=10),
    window=st.sampled_from([None, 1, 4, 100]),
)
def test_sums_and_the_latest_event_of_a_code(
    events: list[tuple[int, ...]], asked: list[tuple[int, int]], window: int | None
) -> None:
    table = np.array(events, np.int64).reshape(-1, 4)
    earlier = EarlierEvents(table[:, 0], table[:, 1], table[:, 2:].astype(np.float64))
    codes, moments = np.array(asked, np.int64).reshape(-1, 2).T
    sums, latest = earlier.sums(codes, moments, window), earlier.latest(codes, moments)
    assert sums.shape == (len(asked), 2)
    for row, (code, moment) in enumerate(asked):
        mine = [e for e in events if e[0] == code and e[1] < moment]
        assert latest[row] == max((e[1] for e in mine), default=-1)
        inside = [e for e in mine if window is None or e[1] >= moment - window]
        assert sums[row].tolist() == [sum(e[2] for e in inside), sum(e[3] for e in inside)]


@pytest.mark.parametrize("key", KEYS)
def test_rows_share_a_code_where_their_items_share_a_value(key: str) -> None:
    table = log_of([(i, 0, None, None) for i in (5, 4, 0, 3, 1, 2, 0)])
    rows, codes = key_codes(table, items_frame(), key)
    assert codes.min() == 1 and list(rows) == sorted(rows)
    found: dict[int, set[int]] = {}
    for row, code in zip(rows.tolist(), codes.tolist(), strict=True):
        assert code not in found.setdefault(row, set())  # a value that is there twice counts once
        found[row].add(code)
    wanted = [values_of(ITEMS, key, item, START) for item in table["item_id"]]
    for left, right in itertools.product(range(len(wanted)), repeat=2):
        shared = found.get(left, set()) & found.get(right, set())
        assert len(shared) == len(wanted[left] & wanted[right])


@pytest.mark.parametrize("valid_from", [False, True])
def test_a_join_keeps_the_order_and_the_rows_without_a_partner(valid_from: bool) -> None:
    left = log_of([(2, 9, 1.0, None), (0, 1, 0.0, None), (7, 4, 0.0, None), (0, 5, 1.0, None)])
    right = pl.DataFrame({"item_id": ["i0", "i0", "i2"], "genre": ["old", "new", "x"]})
    if valid_from:
        right = right.with_columns(valid_from_unix_s=pl.Series([START, START + 5, START + 10]))
    else:
        right = right[1:]
    joined = join_as_of(left, right, "item_id")
    assert joined.columns == [*left.columns, "genre"]
    assert joined.drop("genre").equals(left)
    # Valid from START + 10 is too late for the first row; at START + 5 the new value has just begun.
    expected = [None, "old", None, "new"] if valid_from else ["x", "new", None, "new"]
    assert joined["genre"].to_list() == expected
