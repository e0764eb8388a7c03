"""How much training rows count: propensities and down-sampling on the way from the log into the batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from schema.contract import DatasetSpec
from tests.trainer import ranking_world as world
from trainer.config import RankingConfig
from trainer.row_weights import training_batches, weighted_windows

NAN = float("nan")
_DECLARED = world.spec().model_dump()
SPEC = DatasetSpec.model_validate(
    _DECLARED
    | {
        "interactions": _DECLARED["interactions"]
        | {
            "columns": _DECLARED["interactions"]["columns"]
            | {"propensity": "propensity", "exploration": "exploration"}
        },
        "tasks": [
            {"name": "click", "label": "click", "kind": "binary"},
            {"name": "save", "label": "rating", "kind": "binary"},
        ],
    }
)
NUM_ROWS = 4_000

Columns = dict[str, npt.NDArray[Any]]


def log(**changes: Any) -> Columns:
    """Rows of which three in four are negative in both tasks."""
    rng = np.random.default_rng(0)
    columns: Columns = {
        "user_id_id": np.arange(NUM_ROWS, dtype=np.int32) // 10 + 2,
        "item_id_id": rng.permutation(NUM_ROWS).astype(np.int32) + 2,
        "days_to_train_end": rng.integers(1, 9, NUM_ROWS).astype(np.int32),
        "click": np.tile(np.float32([1, 0, 0, 0, 0, 0, 0, 0]), NUM_ROWS // 8),
        "rating": np.tile(np.float32([0, 1, 0, 0, 0, 0, 0, 0]), NUM_ROWS // 8),
        "propensity": np.full(NUM_ROWS, 0.5, np.float32),
        "exploration": np.zeros(NUM_ROWS, np.float32),
    }
    return columns | {name: np.asarray(column, np.float32) for name, column in changes.items()}


def weights(columns: Columns, config: Mapping[str, Any]) -> npt.NDArray[Any]:
    data = tf.data.Dataset.from_tensors(columns)
    (window,) = weighted_windows(data, SPEC, RankingConfig(**config)).as_numpy_iterator()
    for name, column in columns.items():
        np.testing.assert_array_equal(window[name], column)
    return np.asarray(window["row_weight"])


def test_rows_of_no_setting_come_back_without_weights() -> None:
    data = tf.data.Dataset.from_tensors(log())
    assert weighted_windows(data, SPEC, RankingConfig()) is data


def test_rows_weigh_their_inverse_propensity_up_to_the_clip_within_their_bucket() -> None:
    propensity, exploration = [0.5, 0.25, 0.01, NAN, 0.1, 0.1], [0, 0, 0, 0, 1, 1]
    columns = {name: column[:6] for name, column in log().items()}
    columns |= {"propensity": np.float32(propensity), "exploration": np.float32(exploration)}
    # 2, 4 and 100 cut to 6 have the mean 4; no propensity is a weight of 1; equal ones of a bucket are 1.
    expected = [0.5, 1.0, 1.5, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(weights(columns, {"propensity_clip": 6}), expected, rtol=1e-6)


def test_dropped_negatives_are_stood_for_by_those_that_are_kept() -> None:
    columns = log()
    found = weights(columns, {"negative_rate": 0.25})
    is_negative = (columns["click"] == 0) & (columns["rating"] == 0)
    assert set(found[~is_negative]) == {1.0}
    assert set(found[is_negative]) == {0.0, 4.0}
    # Four standard deviations of the mean of 3,000 rows that weigh 0 or 4.
    assert found[is_negative].mean() == pytest.approx(1, abs=4 * np.sqrt(3 / 3_000))


def test_a_row_is_kept_or_dropped_wherever_it_stands() -> None:
    columns = log()
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    moved = {name: column[order] for name, column in columns.items()}
    config = {"negative_rate": 0.5}
    np.testing.assert_array_equal(weights(moved, config), weights(columns, config)[order])
    assert (weights(columns, config) != weights(columns, {**config, "seed": 1})).any()


def test_both_weights_multiply() -> None:
    columns = log(propensity=np.tile([0.5, 0.25], NUM_ROWS // 2))
    alone = (weights(columns, config) for config in ({"propensity_clip": 9}, {"negative_rate": 0.5}))
    both = weights(columns, {"propensity_clip": 9, "negative_rate": 0.5})
    np.testing.assert_allclose(both, np.prod(list(alone), axis=0), rtol=1e-6)


def test_batches_hold_the_rows_that_weigh_something() -> None:
    columns = log()
    data = tf.data.Dataset.from_tensors(columns)
    config = RankingConfig(negative_rate=0.25, batch_size=100)
    found = weights(columns, {"negative_rate": 0.25})
    batches = list(training_batches(data, SPEC, config).as_numpy_iterator())
    assert len(batches) == (found > 0).sum() // 100
    kept = set(columns["item_id_id"][found > 0])
    assert all(set(batch["item_id_id"]) <= kept and (batch["row_weight"] > 0).all() for batch in batches)
    assert "row_weight" not in training_batches(data, SPEC, RankingConfig()).element_spec
