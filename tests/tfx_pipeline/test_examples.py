"""Histories, joins and labels against slow loops over rows, and what the encoder makes of the columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import tensorflow as tf
from tfx_bsl.coders import example_coder

from schema.contract import DatasetSpec
from tfx_pipeline.examples import (
    ExampleSettings,
    catalogue_columns,
    example_batch,
    interaction_columns,
    user_state_columns,
)

START = 1_700_000_000
Row = dict[str, Any]


def declaration(valid_from: bool, **settings: Any) -> DatasetSpec:
    """A dataset with surfaces and searches, its users and items with or without successive values."""
    since = {"valid_from_unix_s": "since"} if valid_from else {}
    return DatasetSpec.model_validate(
        {
            "name": "random",
            "interactions": {
                "files": ["log.parquet"],
                "columns": {
                    name: name
                    for name in ("user_id", "item_id", "event_time_unix_s", "surface", "search_tokens")
                },
                "labels": {"click": "click"},
            },
            "users": {
                "files": ["users.parquet"],
                "columns": {"user_id": "user_id", **since},
                "features": [{"name": "age", "kind": "continuous"}],
            },
            "items": {
                "files": ["items.parquet"],
                "columns": {"item_id": "item_id", **since},
                "features": [{"name": "tags", "kind": "multi_categorical"}],
            },
            "positive": "click",
            "tasks": [{"name": "click", "label": "click", "kind": "binary"}],
            "split": {"fractions": [0.8, 0.1, 0.1]},
            **settings,
        }
    )


def random_events(rows: int, num_users: int, num_moments: int, seed: int) -> list[Row]:
    """Events in file order, many of them at equal times; a search repeats its tokens over several rows."""
    rng = np.random.default_rng(seed)
    searches = [None, None, [], ["jazz"], ["jazz", "piano"], ["cats"]]
    return [
        {
            "user_id": f"u{rng.integers(num_users)}",
            "item_id": f"i{rng.integers(30)}",
            "event_time_unix_s": START + (moment := int(rng.integers(num_moments))),
            "surface": [None, "home", "watch"][rng.integers(3)],
            "search_tokens": searches[rng.integers(len(searches))],
            "click": [None, 0.0, 1.0, 1.0][rng.integers(4)],
            "item_counts": [float(row)],
            "row_number": row,
            "split": "train"
            if moment < 0.6 * num_moments
            else "eval"
            if moment < 0.8 * num_moments
            else "test",
        }
        for row in range(rows)
    ]


def frame(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(
        rows,
        schema_overrides={
            "search_tokens": pl.List(pl.String),
            "click": pl.Float32,
            "item_counts": pl.List(pl.Float32),
        },
        infer_schema_length=None,
    )


def entity(key: str, ids: list[str], column: str, values: list[Any]) -> pl.DataFrame:
    return pl.DataFrame({key: ids, column: values})


NUM_USERS = 6
USERS = entity(
    "user_id", [f"u{i}" for i in range(NUM_USERS - 1)] + ["quiet"], "age", [20.0, 30.0, None, 50.0, 60.0, 9.0]
)
ITEMS = entity(
    "item_id", [f"i{i}" for i in range(30)], "tags", [[f"t{i}", "all"] if i % 3 else None for i in range(30)]
).with_columns(item_counts=pl.Series([[-1.0]] * 30, dtype=pl.List(pl.Float32)))
SPEC = declaration(valid_from=False)


def in_time_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["event_time_unix_s"], row["row_number"]))


def is_positive(row: Row) -> bool:
    return bool(row["click"])


def searches_of(rows: list[Row], user_id: str) -> list[Row]:
    """The first row of each run of equal searches of a user."""
    found: list[Row] = []
    last = None
    for row in in_time_order(rows):
        if row["user_id"] == user_id and row["search_tokens"]:
            if row["search_tokens"] != last:
                found.append(row)
            last = row["search_tokens"]
    return found


def history_oracle(rows: list[Row], at: Row) -> list[str]:
    """What a user watched strictly before a row, oldest first, the latest 50."""
    watched = [
        row["item_id"]
        for row in in_time_order(rows)
        if row["user_id"] == at["user_id"]
        and is_positive(row)
        and row["event_time_unix_s"] < at["event_time_unix_s"]
    ]
    return watched[-50:]


def search_oracle(rows: list[Row], at: Row) -> list[str]:
    """What a user searched for strictly before a row, oldest first, the latest 50 words."""
    words = [
        word
        for row in searches_of(rows, at["user_id"])
        if row["event_time_unix_s"] < at["event_time_unix_s"]
        for word in row["search_tokens"]
    ]
    return words[-50:]


def build_frame(rows: list[Row], cap: int = 1_000, spec: DatasetSpec = SPEC) -> pl.DataFrame:
    shuffled = frame(rows).sample(fraction=1, shuffle=True, seed=3)
    return interaction_columns(shuffled, USERS, ITEMS, spec, ExampleSettings(START + 60, cap))


def build(rows: list[Row], cap: int = 1_000, spec: DatasetSpec = SPEC) -> list[Row]:
    return build_frame(rows, cap, spec).to_dicts()


@pytest.mark.parametrize(
    ("rows", "moments"), [(400, 100), (600, 12), (900, 5_000)], ids=["some ties", "mostly ties", "long"]
)
def test_histories_hold_what_was_strictly_earlier(rows: int, moments: int) -> None:
    # Two users and 900 rows give histories beyond the cap of 50.
    events = random_events(rows, NUM_USERS if rows < 900 else 2, moments, seed=rows)
    built = build(events)
    expected = in_time_order(events)
    assert [row["row_number"] for row in built] == [row["row_number"] for row in expected]
    for row, at in zip(built, expected, strict=True):
        assert row["history_item_ids"] == history_oracle(events, at)
        assert row["search_tokens"] == search_oracle(events, at)
    longest = max(len(row["history_item_ids"]) for row in built)
    assert longest == 50 if rows == 900 else longest > 10


def test_no_row_and_no_value_is_lost_or_changed() -> None:
    events = random_events(300, NUM_USERS, 50, seed=1)
    ages = dict(USERS.iter_rows())
    tags = dict(ITEMS.select("item_id", "tags").iter_rows())
    built = {row["row_number"]: row for row in build(events)}
    assert len(built) == len(events)
    for row in events:
        example = built[row["row_number"]]
        for name in ("user_id", "item_id", "event_time_unix_s", "surface", "click", "split"):
            assert example[name] == row[name]
        assert example["age"] == ages.get(row["user_id"])
        assert example["tags"] == tags[row["item_id"]]
        assert example["item_counts"] == row["item_counts"]  # not those at the end of training


def impressions_oracle(
    rows: list[Row], user_id: str, before: int, max_impressions: int = 50
) -> list[tuple[Any, ...]]:
    """What a user was shown strictly before a moment, whatever came of it; oldest first, the latest ones."""
    shown = [
        (row["item_id"], row["event_time_unix_s"], row["surface"] or "", row["click"])
        for row in in_time_order(rows)
        if row["user_id"] == user_id and row["event_time_unix_s"] < before
    ]
    return shown[-max_impressions:]


def impressions_of(row: Row) -> list[tuple[Any, ...]]:
    """The impressions of a built row, whose lists are equally long; a missing label back to None."""
    names = ("impression_item_ids", "impression_event_time_unix_s", "impression_surfaces", "impression_click")
    return [
        (item, time, surface, None if np.isnan(click) else click)
        for item, time, surface, click in zip(*(row[name] or [] for name in names), strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "users", "moments", "most"),
    [(400, NUM_USERS, 100, 50), (600, NUM_USERS, 12, 50), (300, 2, 5_000, 7)],
    ids=["some ties", "mostly ties", "at most 7"],
)
def test_impressions_are_all_that_was_shown_strictly_earlier(
    rows: int, users: int, moments: int, most: int
) -> None:
    events = random_events(rows, users, moments, seed=rows)
    built = build(events, spec=declaration(valid_from=False, max_impressions=most))
    for row, at in zip(built, in_time_order(events), strict=True):
        assert impressions_of(row) == impressions_oracle(events, at["user_id"], at["event_time_unix_s"], most)
    assert max(len(row["impression_item_ids"]) for row in built) == most
    assert {click for row in built for *_, click in impressions_of(row)} == {None, 0.0, 1.0}


def test_a_dataset_without_surfaces_has_impressions_without_them() -> None:
    spec = declaration(valid_from=False).model_dump()
    del spec["interactions"]["columns"]["surface"]
    events = frame(random_events(20, 2, 9, seed=3)).drop("surface")
    built = interaction_columns(
        events, USERS, ITEMS, DatasetSpec.model_validate(spec), ExampleSettings(START, 1)
    )
    assert [name for name in built.columns if name.startswith("impression")] == [
        "impression_item_ids",
        "impression_event_time_unix_s",
        "impression_click",
    ]


@pytest.mark.parametrize("until", [0, 30, 1_000])
def test_what_is_known_of_a_user_can_end_before_the_events(until: int) -> None:
    events = random_events(300, NUM_USERS, 60, seed=9)
    settings = ExampleSettings(START + 60, 1_000, history_until_unix_s=START + until)
    built = interaction_columns(frame(events), USERS, ITEMS, SPEC, settings).to_dicts()
    for row, at in zip(built, in_time_order(events), strict=True):
        known = {**at, "event_time_unix_s": min(at["event_time_unix_s"], START + until)}
        assert row["event_time_unix_s"] == at["event_time_unix_s"]
        assert row["history_item_ids"] == history_oracle(events, known)
        assert row["search_tokens"] == search_oracle(events, known)
        seen = impressions_oracle(events, at["user_id"], known["event_time_unix_s"])
        since = at["event_time_unix_s"] - known["event_time_unix_s"]
        # As long before the event as they were before the moment.
        assert impressions_of(row) == [(item, time + since, *outcome) for item, time, *outcome in seen]
    assert any(row["history_item_ids"] for row in built) == (until > 0)


def test_rows_to_predict_know_the_log_and_not_each_other() -> None:
    events = random_events(400, NUM_USERS, 60, seed=10)
    log = [row for row in events if row["split"] == "train"]
    # Of the rows to predict a label may be known, but it must not matter; u99 is not in the log.
    wanted = [row for row in events if row["split"] != "train"][::3]
    wanted.append({**wanted[0], "user_id": "u99", "row_number": 999})
    settings = ExampleSettings(START + 36, 1_000)
    built = interaction_columns(frame(wanted), USERS, ITEMS, SPEC, settings, frame(log)).to_dicts()
    assert [row["row_number"] for row in built] == [row["row_number"] for row in in_time_order(wanted)]
    for row, at in zip(built, in_time_order(wanted), strict=True):
        assert row["history_item_ids"] == history_oracle(log, at)
        assert row["search_tokens"] == search_oracle(log, at)
        assert impressions_of(row) == impressions_oracle(log, at["user_id"], at["event_time_unix_s"])
        assert (row["user_id"], row["item_id"], row["click"]) == (at["user_id"], at["item_id"], at["click"])


@pytest.mark.parametrize("cap", [1, 3, 1_000])
def test_retrieval_learns_from_the_latest_positives_of_a_user(cap: int) -> None:
    events = random_events(300, NUM_USERS, 40, seed=2)
    weights = {row["row_number"]: row["retrieval_weight"] for row in build(events, cap)}
    for user in {row["user_id"] for row in events}:
        mine = [row for row in in_time_order(events) if row["user_id"] == user]
        train = [row["row_number"] for row in mine if is_positive(row) and row["split"] == "train"]
        for row in mine:
            held_out = is_positive(row) and row["split"] != "train"
            expected = float(held_out or row["row_number"] in train[-cap:])
            assert weights[row["row_number"]] == expected


def session_start_oracle(rows: list[Row], at: Row, gap_s: float) -> int:
    """The time of the first event of a row's session; events of any kind make a session."""
    start = None
    last = -1
    for row in in_time_order(rows):
        if row["user_id"] == at["user_id"]:
            time = row["event_time_unix_s"]
            if start is None or time - last > gap_s:
                start = time
            last = time
            if row["row_number"] == at["row_number"]:
                return start
    raise AssertionError("the row is one of the rows")


@pytest.mark.parametrize("cap", [4, 1_000])
@pytest.mark.parametrize("gap_s", [18, 36])
def test_prior_sessions_end_before_the_session_of_the_positive(gap_s: int, cap: int) -> None:
    events = random_events(120, NUM_USERS, 1_000, seed=6)
    spec = declaration(valid_from=False, session_gap_hours=gap_s / 3_600)
    built = build_frame(events, cap, spec)
    # Nothing else changes.
    assert built.drop("prior_sessions_item_ids").equals(build_frame(events, cap))
    lengths = []
    for row, at in zip(built.to_dicts(), in_time_order(events), strict=True):
        learnt = row["split"] == "train" and row["retrieval_weight"] > 0
        start = session_start_oracle(events, at, gap_s)
        expected = history_oracle(events, {**at, "event_time_unix_s": start}) if learnt else []
        assert row["prior_sessions_item_ids"] == expected
        lengths += [(len(expected), len(row["history_item_ids"]))] if learnt else []
    assert any(prior == 0 for prior, _ in lengths) and any(0 < prior < full for prior, full in lengths)


def test_a_pause_as_long_as_the_gap_stays_in_the_session() -> None:
    times = [0, 3_600, 7_201, 10_800]  # pauses of 3600, 3601 and 3599 s
    row = random_events(1, 1, 1, seed=0)[0] | {"click": 1.0, "split": "train"}
    rows = [
        {**row, "item_id": f"i{n}", "event_time_unix_s": START + time, "row_number": n}
        for n, time in enumerate(times)
    ]
    built = build(rows, spec=declaration(valid_from=False, session_gap_hours=1))
    assert [r["prior_sessions_item_ids"] for r in built] == [[], [], ["i0", "i1"], ["i0", "i1"]]
    assert [r["history_item_ids"] for r in built][3] == ["i0", "i1", "i2"]


def test_max_history_bounds_every_history() -> None:
    events = random_events(300, 2, 5_000, seed=7)
    spec = declaration(valid_from=False, session_gap_hours=0.01, max_history=7)
    built = build(events, spec=spec)
    for row, at in zip(built, in_time_order(events), strict=True):
        assert row["history_item_ids"] == history_oracle(events, at)[-7:]
    assert max(len(row["history_item_ids"]) for row in built) == 7
    assert max(len(row["prior_sessions_item_ids"]) for row in built) == 7
    states = user_state_columns(
        frame(events), USERS, spec, ExampleSettings(START + 3_000, 1), "home", pl.Series(["i0"])
    ).to_dicts()
    for state in states:
        watched = [
            row["item_id"]
            for row in in_time_order(events)
            if row["user_id"] == state["user_id"] and row["split"] == "train" and is_positive(row)
        ]
        assert (state["history_item_ids"] or []) == watched[-7:]


def test_a_user_without_positives_has_an_empty_history() -> None:
    row = {**random_events(1, 1, 1, seed=0)[0], "click": 0.0, "search_tokens": None}
    later = {**row, "event_time_unix_s": row["event_time_unix_s"] + 5, "row_number": 1}
    assert [r["history_item_ids"] for r in build([row, later])] == [[], []]
    assert [r["search_tokens"] for r in build([row, later])] == [[], []]


def _valid_at(rows: list[Row], key: str, wanted: str, time: int, column: str) -> Any:
    """The value of the latest row that had begun at `time`."""
    begun = [row for row in rows if row[key] == wanted and row["valid_from_unix_s"] <= time]
    return max(begun, key=lambda row: row["valid_from_unix_s"])[column] if begun else None


def test_features_are_those_valid_at_the_event_time() -> None:
    rng = np.random.default_rng(5)

    def successive(key: str, prefix: str, count: int, column: str) -> list[Row]:
        return [
            {key: f"{prefix}{who}", column: value, "valid_from_unix_s": START + int(since)}
            for who in range(count)
            for value, since in enumerate(rng.choice(60, size=3, replace=False))
        ]

    events = random_events(200, 4, 60, seed=5)
    users, items = successive("user_id", "u", 4, "age"), successive("item_id", "i", 30, "tags")
    for row in items:
        row["tags"] = [f"t{row['tags']}"]
        row["item_counts"] = [-1.0]
    spec, settings = declaration(valid_from=True), ExampleSettings(START + 36, 100)
    users_frame = pl.DataFrame(users).with_columns(pl.col("age").cast(pl.Float32))
    items_frame = pl.DataFrame(items).sample(fraction=1, shuffle=True, seed=1)
    built = interaction_columns(frame(events), users_frame, items_frame, spec, settings).to_dicts()
    assert len(built) == len(events)
    for row in built:
        time = row["event_time_unix_s"]
        assert row["age"] == _valid_at(users, "user_id", row["user_id"], time, "age")
        assert row["tags"] == _valid_at(items, "item_id", row["item_id"], time, "tags")

    catalogue = catalogue_columns(items_frame, settings.train_end_unix_s).to_dicts()
    assert sorted(row["item_id"] for row in catalogue) == sorted({row["item_id"] for row in items})
    for row in catalogue:
        assert row["tags"] == _valid_at(items, "item_id", row["item_id"], START + 36, "tags")
    everything = pl.Series([row["item_id"] for row in events])
    states = user_state_columns(frame(events), users_frame, spec, settings, "home", everything).to_dicts()
    assert len(states) == 4
    for row in states:
        assert row["age"] == _valid_at(users, "user_id", row["user_id"], START + 36, "age")


def _distinct(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


def test_user_states_are_what_is_known_at_the_end_of_training() -> None:
    events = random_events(500, NUM_USERS, 400, seed=8)
    events = [row for row in events if not (row["user_id"] == "u0" and row["split"] == "train")]  # a new user
    settings = ExampleSettings(START + 240, 1)
    # Half of the items: what anybody met in training is known to the caller alone.
    trained = {f"i{n}" for n in range(15)}
    states = user_state_columns(
        frame(events), USERS, SPEC, settings, "home", pl.Series(sorted(trained))
    ).to_dicts()
    assert sorted(s["user_id"] for s in states) == sorted({r["user_id"] for r in events} | {"quiet"})
    ages = dict(USERS.iter_rows())
    for state in states:
        mine = [row for row in in_time_order(events) if row["user_id"] == state["user_id"]]
        train = [row for row in mine if row["split"] == "train"]
        watched = [row["item_id"] for row in train if is_positive(row)]
        words = [w for row in searches_of(train, state["user_id"]) for w in row["search_tokens"]]
        surfaces = [row["surface"] for row in train if row["surface"] is not None]
        assert (state["history_item_ids"] or []) == watched[-50:]
        assert (state["seen_item_ids"] or []) == _distinct(watched)
        assert (state["search_tokens"] or []) == words[-50:]
        assert impressions_of(state) == impressions_oracle(train, state["user_id"], START + 240)
        assert state["surface"] == (surfaces[-1] if surfaces else "home")
        assert state["age"] == ages.get(state["user_id"])
        assert state["event_time_unix_s"] == START + 240
        for split in ("eval", "test"):
            held_out = [r["item_id"] for r in mine if r["split"] == split and is_positive(r)]
            expected = _distinct([item for item in held_out if item not in watched])
            assert (state[f"{split}_item_ids"] or []) == expected
        new = [item for item in state["test_item_ids"] or [] if item not in trained]
        assert (state["cold_test_item_ids"] or []) == new
        assert state["user_type"] == ("warm" if watched else "cold")
    assert any(state["cold_test_item_ids"] for state in states)
    assert {state["user_type"] for state in states} == {"cold", "warm"}
    assert any(state["eval_item_ids"] for state in states)
    assert any(len(state["seen_item_ids"] or []) < len(state["history_item_ids"] or []) for state in states)


def test_a_user_with_one_event_keeps_everything_of_the_row() -> None:
    row = random_events(1, 1, 1, seed=4)[0]
    (state,) = user_state_columns(
        frame([row]), USERS.head(0), SPEC, ExampleSettings(START + 9, 5), None, pl.Series([row["item_id"]])
    ).to_dicts()
    assert state["user_id"] == "u0"
    assert state["age"] is None


COLUMNS = {
    "word": pl.Series(["a", None, "é", ""], dtype=pl.String),
    "whole": pl.Series([1, None, -(2**40), 0], dtype=pl.Int64),
    "real": pl.Series([0.5, None, -1e30, 0.0], dtype=pl.Float32),
    "words": pl.Series([["a", "b"], None, [], ["c"]], dtype=pl.List(pl.String)),
    "nothing": pl.Series([None] * 4, dtype=pl.String),
    "no_words": pl.Series([None, [], None, []], dtype=pl.List(pl.String)),
}
DTYPES = {
    "word": "string",
    "whole": "int64",
    "real": "float32",
    "words": "string",
    "nothing": "string",
    "no_words": "string",
}


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1], [2, 3], []], ids=str)
def test_encoded_examples_hold_the_values_and_nothing_for_a_missing_one(chosen: list[int]) -> None:
    whole = pl.DataFrame(COLUMNS)[chosen]
    table = pl.concat([whole[:1], whole[1:]], rechunk=False)  # in two chunks
    serialized = example_coder.RecordBatchToExamplesEncoder().encode(example_batch(table, DTYPES))
    kinds = {"string": tf.string, "int64": tf.int64, "float32": tf.float32}
    parsed = tf.io.parse_example(
        tf.constant(serialized, tf.string), {n: tf.io.RaggedFeature(kinds[d]) for n, d in DTYPES.items()}
    )
    for name in DTYPES:
        values = [COLUMNS[name].to_list()[row] for row in chosen]
        values = [v if isinstance(v, list) else [] if v is None else [v] for v in values]
        if DTYPES[name] == "string":
            values = [[word.encode() for word in value] for value in values]
        elif DTYPES[name] == "float32":
            values = [[float(np.float32(x)) for x in value] for value in values]
        assert parsed[name].to_list() == values


def test_slices_of_a_table_encode_as_their_own_rows() -> None:
    table = pl.DataFrame({"words": [[f"w{i}"] * (i % 3) for i in range(10)]})
    encoder = example_coder.RecordBatchToExamplesEncoder()
    sliced = [
        e for part in table.iter_slices(3) for e in encoder.encode(example_batch(part, {"words": "string"}))
    ]
    assert sliced == list(encoder.encode(example_batch(table, {"words": "string"})))
