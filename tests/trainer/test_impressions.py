"""The user's impressions against loops over them: who shares what with a candidate, and how it went."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.impression_world import (
    ATTRIBUTES,
    DAY_S,
    PAST,
    SPEC,
    STATISTICS,
    SURFACE,
    attributes,
    candidates,
    means_of,
    oracle,
    outcomes,
    transformed,
    with_durations,
)
from trainer.body_config import PastConfig
from trainer.impressions import Impressions, PastOutcomes, read_impressions
from trainer.label_statistics import LabelStatistics


@pytest.mark.parametrize("key", ["creator_id", "tags"])
def test_attributes_are_by_item_id_and_those_of_unknown_items_are_unknown(key: str) -> None:
    table = attributes().tables[key]
    assert table.numpy().tolist() == ATTRIBUTES[key]
    assert not table.trainable
    assert set(attributes().tables) == {"creator_id", "tags"}


def test_impressions_hold_what_the_items_shown_have() -> None:
    columns = transformed(seed=1)
    found = read_impressions({n: tf.constant(c) for n, c in columns.items()}, attributes(), SPEC)
    ids = columns["impression_item_ids_ids"]
    np.testing.assert_array_equal(found.is_shown, ids != 0)
    np.testing.assert_allclose(found.age_days, columns["impression_ages_s"] / DAY_S, rtol=1e-6)
    # In the order of the tasks.
    np.testing.assert_array_equal(found.labels[..., 0], columns["impression_watch_time_s"])
    np.testing.assert_array_equal(found.labels[..., 1], columns["impression_click"])
    np.testing.assert_array_equal(found.surface, columns["impression_surfaces_ids"])
    assert list(found.keys) == ["item_id", "creator_id", "tags"]
    np.testing.assert_array_equal(found.keys["item_id"], ids[..., np.newaxis])
    for key, table in ATTRIBUTES.items():
        np.testing.assert_array_equal(found.keys[key], np.array(table)[ids])


def test_ages_grow_from_0_to_1_and_padding_is_the_oldest() -> None:
    age_days = tf.constant([[0.0, 1 / 24, 1.0, 59.0, 60.0, 400.0, 0.0]])
    shown = tf.constant([[True] * 6 + [False]])
    nothing = tf.zeros([1, 7, 2])
    ages = Impressions(shown, age_days, nothing, None, {}).log_age.numpy()[0]
    assert ages[0] == 0
    assert ages[1] == pytest.approx(math.log(2) / math.log(1441), rel=1e-5)
    assert np.all(np.diff(ages[:5]) > 0)
    assert ages[4:].tolist() == [1, 1, 1]


def test_the_latest_impressions_of_each_user_are_taken_wherever_they_stand() -> None:
    shown = np.array([[2, 3, 4, 0], [0, 5, 0, 6], [0, 0, 0, 7]])
    columns = {name: np.zeros((3, 4), column.dtype) for name, column in transformed(0).items()}
    columns["impression_item_ids_ids"] = shown
    columns["impression_click"] = np.where(shown, shown, -1.0).astype(np.float32)
    impressions = read_impressions({n: tf.constant(c) for n, c in columns.items()}, attributes(), SPEC)
    latest = impressions.latest(2)
    assert latest.is_shown.numpy().tolist() == [[True, True], [True, True], [False, True]]
    assert latest.keys["item_id"].numpy()[..., 0].tolist() == [[3, 4], [5, 6], [0, 7]]
    assert latest.labels.numpy()[..., 1].tolist() == [[3, 4], [5, 6], [-1, 7]]
    assert impressions.latest(9).is_shown.shape == (3, 4)


@pytest.mark.parametrize("seed", range(5))
def test_outcomes_equal_those_of_a_loop_over_the_impressions(seed: int) -> None:
    columns, keys, means = transformed(seed), candidates(seed), means_of(seed)
    found = outcomes(columns, SURFACE, keys, means)
    # Three windows of the user, the surface, three keys; number, age and two labels each.
    assert found.shape == (5, 4, 7 * 4)
    np.testing.assert_allclose(found, oracle(columns, SURFACE, keys, means), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("config", "width"),
    [(PastConfig(key_windows=True), 4 * 4 + 3 * 10), (PastConfig(churn=True), 7 * 4 + 1)],
    ids=["windows", "churn"],
)
def test_windows_of_keys_and_churn_equal_those_of_a_loop(config: PastConfig, width: int, seed: int) -> None:
    # Three items only, so that many impressions are of one.
    columns, keys, means = transformed(seed), candidates(seed), means_of(seed)
    columns["impression_item_ids_ids"] = np.minimum(columns["impression_item_ids_ids"], 3)
    keys["item_id"] = np.minimum(keys["item_id"], 3)
    found = outcomes(columns, SURFACE, keys, means, config)
    assert found.shape == (5, 4, width)
    np.testing.assert_allclose(found, oracle(columns, SURFACE, keys, means, config), rtol=1e-4, atol=1e-5)


def test_what_was_passed_over_is_counted_since_the_last_click_of_the_item() -> None:
    columns = {name: np.zeros((1, 6), column.dtype) for name, column in transformed(0).items()}
    columns["impression_item_ids_ids"][0] = [2, 2, 3, 2, 2, 0]
    columns["impression_ages_s"][0] = [500, 400, 300, 200, 100, 0]
    columns["impression_click"][0] = [0, 1, 0, 0, 0, 0]
    keys = {key: np.zeros((1, 4, 1), np.int64) for key in SPEC.counters.keys}
    keys["item_id"] = np.array([[[2], [3], [4], [1]]])
    means = np.zeros((1, 4, 2), np.float32)
    found = outcomes(columns, np.array([0]), keys, means, PastConfig(churn=True))
    # Twice since the click; once, and never clicked; never shown; unknown.
    np.testing.assert_allclose(np.expm1(found[0, :, -1]), [2, 1, 0, 0], atol=1e-6)


def test_outcomes_of_a_dataset_without_surfaces_have_a_group_less() -> None:
    columns, keys, means = transformed(3), candidates(3), means_of(3)
    del columns["impression_surfaces_ids"]
    found = outcomes(columns, None, keys, means)
    assert found.shape == (5, 4, 6 * 4)
    np.testing.assert_allclose(found, oracle(columns, None, keys, means), rtol=1e-4, atol=1e-5)


def test_a_rate_far_above_the_usual_one_is_drawn_towards_it() -> None:
    columns = {name: np.zeros((1, 2), column.dtype) for name, column in transformed(0).items()}
    columns["impression_item_ids_ids"][0] = [2, 3]
    columns["impression_click"][0] = [1.0, 1.0]
    keys = {key: np.zeros((1, 1, 1), np.int64) for key in SPEC.counters.keys} | {"item_id": np.array([[[2]]])}
    row = outcomes(columns, np.array([0]), keys, np.array([[[0.0, 0.2]]], np.float32))[0, 0]
    number, age, watched, clicked = row.reshape(7, 4).T
    # Both impressions are of the user, one is of the item; no surface, creator or tag is given.
    np.testing.assert_allclose(np.expm1(number), [2, 2, 2, 0, 1, 0, 0], rtol=1e-6)
    assert age.tolist() == [0, 0, 0, 1, 0, 1, 1]
    assert not watched.any()
    # (1 - 0.2) twice, as two of four: 0.4, in units of 0.5; once, as one of three.
    np.testing.assert_allclose(clicked, [0.8, 0.8, 0.8, 0, 0.8 / 3 / 0.5, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("key", ["item_id", "creator_id", "tags"])
@pytest.mark.parametrize("value", [0, 1], ids=["none", "unknown"])
def test_what_two_items_do_not_have_or_nobody_knows_is_nothing_in_common(key: str, value: int) -> None:
    impressions = Impressions(
        is_shown=tf.constant([[True]]),
        age_days=tf.zeros([1, 1]),
        labels=tf.ones([1, 1, 2]),
        surface=tf.constant([[value]]),
        keys={name: tf.constant([[[value if name == key else 0, 0]]]) for name in SPEC.counters.keys},
    )
    keys = {name: tf.constant([[[value if name == key else 0]]]) for name in SPEC.counters.keys}
    found = PastOutcomes(SPEC, STATISTICS, PAST)(impressions, tf.constant([value]), keys, tf.zeros([1, 1, 2]))
    numbers = found.numpy().reshape(7, 4)[:, 0]
    np.testing.assert_allclose(np.expm1(numbers), [1, 1, 1, 0, 0, 0, 0], rtol=1e-6)


def test_candidates_of_one_user_are_judged_as_rows_of_their_own() -> None:
    columns, keys, means = transformed(4), candidates(4), means_of(4)
    together = outcomes(columns, SURFACE, keys, means)
    rows = {name: np.repeat(column, 4, axis=0) for name, column in columns.items()}
    one_by_one = outcomes(
        rows,
        np.repeat(SURFACE, 4),
        {key: values.reshape(20, 1, -1) for key, values in keys.items()},
        means.reshape(20, 1, 2),
    )
    np.testing.assert_allclose(one_by_one.reshape(together.shape), together, rtol=1e-5, atol=1e-6)
    # The agreement says something only if candidates differ.
    assert np.std(together[1:], axis=1).max(axis=(0, 1)) > 0.1


def test_a_label_that_is_always_the_same_does_not_blow_up() -> None:
    constant = {**STATISTICS, "click": LabelStatistics(9, 1.0, 0.0, 1.0, 1.0)}
    columns = transformed(1)
    impressions = read_impressions({n: tf.constant(c) for n, c in columns.items()}, attributes(), SPEC)
    tensors = {key: tf.constant(values) for key, values in candidates(1).items()}
    found = PastOutcomes(SPEC, constant, PAST)(impressions, tf.constant(SURFACE), tensors, tf.ones([5, 4, 2]))
    assert np.all(np.isfinite(found))


def test_labels_are_compared_with_those_usual_on_the_surface_for_the_duration() -> None:
    spec, items = with_durations()
    # By item id; unknown items have no group, item 5 has a duration that is not known.
    assert items.tables["duration_s"].numpy()[:, 0].tolist() == [0, 0, 2, 2, 3, 1, 3, 0]
    columns = {name: np.zeros((1, 3), column.dtype) for name, column in transformed(0).items()}
    columns["impression_item_ids_ids"][0] = [2, 4, 0]
    columns["impression_surfaces_ids"][0] = [3, 2, 0]
    columns["impression_click"][0] = [1.0, 0.0, 0.0]
    excess = np.zeros((4, 10))
    excess[3, 2], excess[2, 3] = 0.4, -0.3
    statistics = {
        "click": LabelStatistics(9, 0.5, 0.5, 0.0, 1.0, context_excess=excess),
        "watch": LabelStatistics(9, 10.0, 20.0, 0.0, 99.0, context_excess=0 * excess),
    }
    impressions = read_impressions({n: tf.constant(c) for n, c in columns.items()}, items, spec)
    keys = {key: tf.zeros([1, 1, 1], tf.int64) for key in spec.counters.keys}
    keys["duration_s"] = tf.constant([[[3]]])
    layer = PastOutcomes(spec, statistics, PastConfig(contexts=True))
    found = layer(impressions, tf.constant([0], tf.int64), keys, tf.constant([[[0.0, 0.2]]]))
    number, _, watched, clicked = found.numpy().reshape(8, 4).T
    # Both are of the user, in every window; one is as long as the candidate.
    np.testing.assert_allclose(np.expm1(number), [2, 2, 2, 0, 0, 0, 0, 1], rtol=1e-6)
    assert not watched.any()
    # 1 - 0.4 and 0 + 0.3, each beside 0.2, as two of four; 0.3 alone as one of three; in units of 0.5.
    of_user, of_duration = (0.4 + 0.1) / 4 / 0.5, 0.1 / 3 / 0.5
    np.testing.assert_allclose(clicked, [of_user] * 3 + [0] * 4 + [of_duration], rtol=1e-5)
