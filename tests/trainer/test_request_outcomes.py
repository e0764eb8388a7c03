"""Outcomes of many candidates of a request against a loop, in a graph that does not know any sizes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import impression_world
from tests.trainer.impression_world import (
    PAST,
    SPEC,
    STATISTICS,
    SURFACE,
    Array,
    attributes,
    candidates,
    means_of,
    oracle,
    transformed,
    with_durations,
)
from trainer.body_config import PastConfig
from trainer.impressions import PastOutcomes, read_impressions
from trainer.label_statistics import LabelStatistics
from trainer.request_outcomes import request_outcomes


def graph(config: PastConfig, *example: Any) -> Any:
    """What the exported model runs, for any number of users, candidates and impressions."""
    table, layer = attributes(), PastOutcomes(SPEC, STATISTICS, config)

    def run(columns: Any, surface: tf.Tensor | None, keys: Any, means: tf.Tensor) -> tf.Tensor:
        impressions = read_impressions(columns, table, SPEC)
        return request_outcomes(layer, impressions, surface, keys, means)

    def spec(array: Array | None) -> tf.TensorSpec | None:
        if array is None:
            return None
        return tf.TensorSpec([*[None, None][: array.ndim], *array.shape[2:]], array.dtype)

    specs = tf.nest.map_structure(spec, example)
    return tf.function(run, autograph=False).get_concrete_function(*specs)


def outcomes(*given: Any, config: PastConfig = PAST) -> Array:
    arrays = [array for array in tf.nest.flatten(given) if array is not None]
    found: Array = graph(config, *given)(*map(tf.constant, arrays)).numpy()
    return found


@pytest.mark.parametrize("config", [PAST, PastConfig(key_windows=True, churn=True)], ids=["default", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_outcomes_equal_those_of_a_loop_over_the_impressions(config: PastConfig, seed: int) -> None:
    # More impressions and candidates than values: each value comes up several times on both sides.
    columns = transformed(seed, num_users=4, length=30)
    keys, means = candidates(seed, 4, 20), means_of(seed, 4, 20)
    expected = oracle(columns, SURFACE[:4], keys, means, config)
    found = outcomes(columns, SURFACE[:4], keys, means, config=config)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_impressions_are_compared_by_context_in_the_order_of_a_request_too() -> None:
    spec, items = with_durations()
    excess = np.random.default_rng(4).normal(size=(2, 4, 10))
    statistics = {
        "click": LabelStatistics(9, 0.5, 0.5, 0.0, 1.0, context_excess=excess[0]),
        "watch": LabelStatistics(9, 10.0, 20.0, 0.0, 99.0, context_excess=excess[1]),
    }
    layer = PastOutcomes(spec, statistics, PastConfig(contexts=True))
    columns = {name: tf.constant(column) for name, column in transformed(1, num_users=5, length=30).items()}
    durations = np.random.default_rng(5).integers(0, 4, (5, 20, 1))
    keys = {**candidates(1, 5, 20), "duration_s": durations}
    given = ({key: tf.constant(values) for key, values in keys.items()}, tf.constant(means_of(1, 5, 20)))

    def run() -> tf.Tensor:
        return request_outcomes(layer, read_impressions(columns, items, spec), tf.constant(SURFACE), *given)

    # Run eagerly it is the layer itself.
    np.testing.assert_allclose(tf.function(run, autograph=False)(), run(), rtol=1e-4, atol=1e-5)


def test_outcomes_of_a_dataset_without_surfaces_have_a_group_less() -> None:
    columns, keys, means = transformed(3), candidates(3), means_of(3)
    del columns["impression_surfaces_ids"]
    expected = oracle(columns, None, keys, means)
    assert expected.shape == (5, 4, 6 * 4)
    np.testing.assert_allclose(outcomes(columns, None, keys, means), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outcomes_of", [impression_world.outcomes, outcomes], ids=["layer", "request"])
def test_padding_and_its_place_do_not_matter(outcomes_of: Callable[..., Array]) -> None:
    columns, keys, means = transformed(2), candidates(2), means_of(2)
    order = np.random.default_rng(0).permutation(9)
    wider = {name: np.pad(column[:, order], ((0, 0), (2, 3))) for name, column in columns.items()}
    # Whatever else stands where there is no item.
    wider["impression_click"][wider["impression_item_ids_ids"] == 0] = 1.0
    wider["impression_surfaces_ids"][wider["impression_item_ids_ids"] == 0] = 2
    found = outcomes_of(wider, SURFACE, keys, means)
    np.testing.assert_allclose(found, outcomes_of(columns, SURFACE, keys, means), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, oracle(columns, SURFACE, keys, means), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [0, 6], ids=["no lists", "padding only"])
@pytest.mark.parametrize("outcomes_of", [impression_world.outcomes, outcomes], ids=["layer", "request"])
def test_a_user_without_impressions_is_all_zeros_and_long_ago(
    outcomes_of: Callable[..., Array], length: int
) -> None:
    columns = {name: np.zeros((5, length), column.dtype) for name, column in transformed(1).items()}
    found = outcomes_of(columns, SURFACE, candidates(1), means_of(1)).reshape(5, 4, 7, 4)
    assert np.all(found[..., 1] == 1)
    assert not found[..., [0, 2, 3]].any()


def test_a_request_without_candidates_gets_no_outcomes() -> None:
    columns, keys, means = transformed(1), candidates(1, num_candidates=0), means_of(1, num_candidates=0)
    assert outcomes(columns, SURFACE, keys, means).shape == (5, 0, 7 * 4)


def test_no_candidate_is_compared_with_every_impression() -> None:
    given = transformed(1), SURFACE, candidates(1), means_of(1)
    # Left are the product of the user's own groups and that of the tags, of which an item has several.
    assert len([op for op in graph(PAST, *given).graph.get_operations() if op.type == "BatchMatMulV2"]) == 2
