"""User states read back: what a request says of a user, known or not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tensorflow as tf
from tfx_bsl.coders import example_coder

from schema.contract import DatasetSpec
from schema.errors import DataError
from tfx_pipeline.examples import example_batch
from tfx_pipeline.user_states import (
    UserState,
    find_user_states,
    padded,
    query_arrays,
    ranking_arrays,
    read_user_states,
    unknown_user_state,
)
from trainer import features, raw_inputs

TIME = 1_700_000_000
SPEC = DatasetSpec.model_validate(
    {
        "name": "states",
        "interactions": {
            "files": ["a.csv"],
            "columns": {name: name for name in ("user_id", "item_id", "event_time_unix_s", "surface")},
            "labels": {"click": "click"},
        },
        "users": {
            "files": ["u.csv"],
            "columns": {"user_id": "user_id"},
            "features": [
                {"name": "age", "kind": "continuous"},
                {"name": "clubs", "kind": "multi_categorical"},
            ],
        },
        "items": {"files": ["i.csv"], "columns": {"item_id": "item_id"}},
        "positive": "click",
        "tasks": [{"name": "click", "label": "click", "kind": "binary"}],
        "split": {"fractions": [0.8, 0.1, 0.1]},
    }
)
STATES = pl.DataFrame(
    {
        "user_id": ["ann", "bo", "çem"],
        "age": [30.5, None, 7.0],
        "clubs": [["x"], None, []],
        "history_item_ids": [["a", "b", "a"], None, ["c"]],
        "surface": ["home", "home", "watch"],
        "event_time_unix_s": [TIME] * 3,
        "seen_item_ids": [["a", "b"], None, ["c"]],
        "eval_item_ids": [None, ["d"], None],
        "test_item_ids": [None, None, ["e", "f"]],
        "impression_item_ids": [["a", "z"], None, ["c"]],
        "impression_event_time_unix_s": [[TIME - 9, TIME - 1], None, [TIME - 5]],
        "impression_surfaces": [["home", ""], None, ["watch"]],
        "impression_click": [[1.0, float("nan")], None, [0.0]],
    },
    schema_overrides={"age": pl.Float32, "impression_click": pl.List(pl.Float32)},
)
DTYPES = {name: "string" for name in STATES.columns} | {
    "age": "float32",
    "event_time_unix_s": "int64",
    "impression_event_time_unix_s": "int64",
    "impression_click": "float32",
}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """STATES in two files."""
    for name, part in (("a.gz", STATES[:2]), ("b.gz", STATES[2:])):
        with tf.io.TFRecordWriter(str(tmp_path / name), "GZIP") as writer:
            for example in example_coder.RecordBatchToExamplesEncoder().encode(example_batch(part, DTYPES)):
                writer.write(example)
    return [f"{tmp_path}/*.gz"]


def test_every_state_is_read_without_what_is_absent(files: list[str]) -> None:
    ann, bo, cem = read_user_states(files, SPEC)
    assert ann.query == {
        "user_id": "ann",
        "age": 30.5,
        "clubs": ["x"],
        "history_item_ids": ["a", "b", "a"],
        "surface": "home",
        "event_time_unix_s": TIME,
    }
    assert (ann.user_id, ann.seen_item_ids) == ("ann", ("a", "b"))
    click = ann.impressions["impression_click"]
    assert click[0] == 1 and math.isnan(click[1])
    assert ann.impressions == {
        "impression_item_ids": ["a", "z"],
        "impression_event_time_unix_s": [TIME - 9, TIME - 1],
        "impression_surfaces": ["home", ""],
        "impression_click": click,
    }
    assert ann.request == {**ann.query, **ann.impressions}
    assert bo.query == {"user_id": "bo", "surface": "home", "event_time_unix_s": TIME}
    assert (bo.seen_item_ids, bo.impressions) == ((), {})
    assert cem.user_id == "çem"


def test_only_users_that_have_a_state_are_found(files: list[str]) -> None:
    found = find_user_states(files, SPEC, ["çem", "nobody", "bo"])
    assert sorted(found) == ["bo", "çem"]
    assert found["çem"].seen_item_ids == ("c",)


def test_absent_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no example files match"):
        list(read_user_states([f"{tmp_path}/none*"], SPEC))


def _both_ways(states: list[UserState]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The inputs of a request, and what the batch signature parses out of the same states."""
    parsed = raw_inputs.parse_user_state_examples(tf.constant([s.serialized for s in states]), SPEC)
    return query_arrays(states, SPEC), {name: value.numpy() for name, value in parsed.items()}


@pytest.mark.parametrize("chosen", [[0, 1, 2], [1]], ids=["several", "one without lists"])
def test_a_request_says_the_same_as_the_serialized_state(files: list[str], chosen: list[int]) -> None:
    states = list(read_user_states(files, SPEC))
    states = [states[index] for index in chosen]
    arrays, parsed = _both_ways([*states, unknown_user_state("new", like=states[0])])
    assert sorted(arrays) == sorted(raw_inputs.query_signature(SPEC))
    for name, array in arrays.items():
        if array.dtype == object:
            texts = np.vectorize(lambda text: text.decode(), otypes=[object])(parsed[name])
            assert array.tolist() == texts.tolist()
        else:
            np.testing.assert_array_equal(array, parsed[name])


def test_an_unknown_user_has_only_a_name_a_moment_and_a_surface(files: list[str]) -> None:
    like = next(read_user_states(files, SPEC))
    state = unknown_user_state("new", like)
    assert state.query == {"user_id": "new", "event_time_unix_s": TIME, "surface": "home"}
    assert (state.seen_item_ids, state.impressions) == ((), {})


@pytest.mark.parametrize("chosen", [[0, 1, 2], [1]], ids=["several", "one without lists"])
def test_a_request_to_the_ranker_says_the_same_as_the_serialized_example(
    files: list[str], chosen: list[int]
) -> None:
    states = list(read_user_states(files, SPEC))
    states = [states[index] for index in chosen]
    # An interaction example has the same query and impressions; what it says of the item is left out here.
    parsed = raw_inputs.parse_interaction_examples(tf.constant([s.serialized for s in states]), SPEC)
    arrays = ranking_arrays(states, SPEC)
    assert list(arrays) == list(raw_inputs.ranking_signature(SPEC))
    for name, spec in raw_inputs.ranking_signature(SPEC).items():
        array = tf.constant(arrays[name], spec.dtype)
        assert spec.shape.is_compatible_with(array.shape)
        np.testing.assert_array_equal(array.numpy(), parsed[name].numpy())
    lengths = {arrays[r.name].shape for r in features.raw_impression_inputs(SPEC)}
    assert lengths == {(len(chosen), 2 if 0 in chosen else 0)}


def test_lists_are_padded_on_the_right() -> None:
    assert padded([["a"], [], ["b", "c"]]).tolist() == [["a", ""], ["", ""], ["b", "c"]]
    assert padded([[], []]).shape == (2, 0)
    assert padded([]).shape == (0, 0)
    assert padded([[], [7, 8]], "int64").tolist() == [[-1, -1], [7, 8]]
    numbers = padded([[0.5], []], "float32")
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, [[0.5], [np.nan]])
