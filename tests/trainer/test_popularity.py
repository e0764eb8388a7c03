"""Recency-weighted popularity by day, against a slow version, and how it gets into the dot product."""

import math

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import ConfigError
from tests import oracles
from trainer import features
from trainer.popularity import append_popularity, daily_popularity

NUM_IDS = 12
NUM_DAYS = 9
HALF_LIVES_DAYS = (0.5, 3.0)


def window(num_examples: int, first_day: int, seed: int, sessions: bool) -> dict[str, tf.Tensor]:
    """Transformed examples of days `first_day` and later, that is, earlier ones."""
    rng = np.random.default_rng(seed)
    prior = rng.integers(2, 9, (num_examples, 3)) * (rng.random((num_examples, 1)) < 0.5)
    columns = {
        "item_id_id": rng.integers(1, NUM_IDS - 1, num_examples),  # the last item is never chosen
        "days_to_train_end": rng.integers(first_day, NUM_DAYS, num_examples),
        "click": rng.choice([0.0, 1.0, np.nan], num_examples),
        **({"prior_sessions_item_ids_ids": prior} if sessions else {}),
    }
    return {
        name: tf.constant(column, tf.float32 if name == "click" else tf.int32)
        for name, column in columns.items()
    }


@pytest.mark.parametrize("sessions", [False, True], ids=["all", "all and returning"])
def test_popularity_against_a_slow_version(sessions: bool) -> None:
    # In two windows, of which one does not reach as far back as the other.
    parts = [window(150, 3, seed=1, sessions=sessions), window(150, 1, seed=2, sessions=sessions)]
    parts[1]["days_to_train_end"] = tf.minimum(parts[1]["days_to_train_end"], 5)
    popularity = daily_popularity(parts, NUM_IDS, "click", HALF_LIVES_DAYS)
    chosen = [
        (int(item), int(day), bool(sessions and prior.any()))
        for part in parts
        for item, day, click, prior in zip(
            part["item_id_id"].numpy(),
            part["days_to_train_end"].numpy(),
            part["click"].numpy(),
            part.get("prior_sessions_item_ids_ids", tf.zeros([150, 1])).numpy(),
            strict=True,
        )
        if click == 1
    ]
    kinds = [[(item, day) for item, day, _ in chosen]]
    if sessions:
        kinds.append([(item, day) for item, day, returns in chosen if returns])
    expected = [
        oracles.daily_popularity(kind, NUM_IDS, NUM_DAYS, half_life)
        for half_life in HALF_LIVES_DAYS
        for kind in kinds
    ]
    assert popularity.dtype == np.float32
    np.testing.assert_allclose(popularity, np.stack(expected, axis=-1), rtol=1e-3, atol=1e-4)


def one_choice(day: int) -> dict[str, tf.Tensor]:
    """Item 2 chosen on a day, and an impression without a choice on the first of five days."""
    return {
        "item_id_id": tf.constant([2, 3]),
        "days_to_train_end": tf.constant([day, 4]),
        "click": tf.constant([1.0, 0.0]),
    }


@pytest.mark.parametrize("day", [1, 2, 4])
def test_a_choice_counts_on_later_days_only(day: int) -> None:
    popularity = daily_popularity([one_choice(day)], 5, "click", (7.0,))[:, :, 0]
    assert popularity.shape == (5, 5)
    for asked in range(5):  # days before the end: a smaller number is later
        if asked >= day:
            # Nobody is above another.
            np.testing.assert_allclose(popularity[:, asked], 0.0, atol=1e-6)
        else:
            assert popularity[2, asked] > popularity[3, asked] == popularity[4, asked]


def test_an_old_choice_loses_half_per_half_life() -> None:
    # Item 2 was chosen four times, two half-lives before item 3 was chosen once: they are even at the end.
    examples = {
        "item_id_id": tf.constant([2, 2, 2, 2, 3]),
        "days_to_train_end": tf.constant([7, 7, 7, 7, 1]),
        "click": tf.ones([5]),
    }
    popularity = daily_popularity([examples], 6, "click", (3.0,))[:, :, 0]
    assert popularity[2, 0] == pytest.approx(popularity[3, 0], abs=1e-5)
    assert popularity[2, 1] > popularity[3, 1] == popularity[4, 1]


def test_missing_and_unknown_items_are_average_ones() -> None:
    examples = window(200, 1, seed=3, sessions=False)
    popularity = daily_popularity([examples], NUM_IDS, "click", HALF_LIVES_DAYS)
    assert (examples["item_id_id"].numpy() == features.OOV_ID).any()
    np.testing.assert_array_equal(popularity[: features.FIRST_VOCABULARY_ID], 0.0)
    np.testing.assert_allclose(popularity[features.FIRST_VOCABULARY_ID :].mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(popularity[features.FIRST_VOCABULARY_ID :].std(axis=(0, 1)), 1.0, rtol=1e-3)


def test_without_half_lives_there_is_no_popularity() -> None:
    assert daily_popularity([one_choice(1)], 5, "click", ()).shape == (5, 1, 0)


def test_a_table_beyond_memory_is_refused_before_it_is_made() -> None:
    with pytest.raises(ConfigError, match=r"1,000,000,000 items on 5 days with 2 half-lives"):
        daily_popularity([one_choice(1)], 10**9, "click", (1.0, 7.0))


def test_appended_popularity_is_that_of_the_day_of_the_query() -> None:
    rng = np.random.default_rng(0)
    queries, candidates = (rng.normal(size=(n, 4)).astype(np.float32) for n in (6, 5))
    days, table = np.array([3, 0, 3, 6, 1, 0]), rng.normal(size=(5, 7, 2)).astype(np.float32)
    weights = np.array([0.5, -2.0], np.float32)
    longer_queries, longer_candidates = append_popularity(
        *(tf.constant(x) for x in (queries, candidates, days, table, weights))
    )
    assert longer_queries.shape == (6, 8) and longer_candidates.shape == (5, 8)  # four distinct days
    scores = (longer_queries @ tf.transpose(longer_candidates)).numpy()
    for query in range(6):
        for candidate in range(5):
            popularity = math.fsum(table[candidate, days[query], kind] * weights[kind] for kind in range(2))
            expected = queries[query] @ candidates[candidate] + popularity
            assert scores[query, candidate] == pytest.approx(expected, abs=1e-5)


def test_the_weights_of_popularity_are_trained() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, 3, 2)).astype(np.float32)
    weights = tf.Variable([0.0, 0.0])
    with tf.GradientTape() as tape:
        queries, candidates = append_popularity(
            tf.zeros([1, 4]), tf.zeros([5, 4]), tf.constant([2]), tf.constant(table), weights
        )
        score = (queries @ tf.transpose(candidates))[0, 3]
    np.testing.assert_allclose(tape.gradient(score, weights), table[3, 2], rtol=1e-6)
