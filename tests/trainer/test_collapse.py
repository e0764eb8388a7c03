"""A model that recommends the same to everybody is told from a narrow one, and refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import CollapsedModelError
from tests.trainer import retrieval_world as world
from trainer.collapse import (
    CANDIDATE_RANK,
    DISTINCT_ITEMS,
    QUERY_RANK,
    check_not_collapsed,
    collapse_metrics,
    effective_rank,
)
from trainer.config import RetrievalConfig
from trainer.retrieval import RetrievalModel, count_positives, item_log_q
from trainer.retrieval_validation import validate

CONFIG = RetrievalConfig(embedding_dim=8, hidden_layers=(16,), batch_size=256)


def test_effective_rank_by_hand() -> None:
    # Singular values 3 and 1 around the mean (5, 5): shares 3/4 and 1/4.
    vectors = [
        [5 + 3 / math.sqrt(2), 5],
        [5 - 3 / math.sqrt(2), 5],
        [5, 5 + 1 / math.sqrt(2)],
        [5, 5 - 1 / math.sqrt(2)],
    ]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(vectors) == pytest.approx(math.exp(entropy))


def test_effective_rank_agrees_with_the_singular_values() -> None:
    vectors = np.random.default_rng(0).normal(2, 1, (200, 12)).astype(np.float32) * np.arange(1, 13)
    values = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False)
    shares = values / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(vectors) == pytest.approx(expected, rel=1e-4)  # float32 input


@pytest.mark.parametrize(
    ("vectors", "rank"),
    [
        pytest.param(np.zeros((0, 3)), 0.0, id="no vector"),
        pytest.param(np.zeros((5, 3)), 0.0, id="zeros"),
        pytest.param(np.full((5, 3), 7.0), 0.0, id="all equal"),
        pytest.param(
            np.full((50, 3), 0.1, np.float32) + 1e-8 * np.eye(50, 3), 0.0, id="equal but for rounding"
        ),
        pytest.param(np.outer(np.arange(5.0), [1, 2, 3]) + 4, 1.0, id="on a line"),
    ],
)
def test_effective_rank_of_degenerate_vectors(vectors: np.ndarray, rank: float) -> None:
    assert effective_rank(vectors) == pytest.approx(rank, abs=1e-9)


@pytest.fixture(scope="module")
def window() -> dict[str, tf.Tensor]:
    return world.training_window(2_000)


@pytest.fixture
def model(window: dict[str, tf.Tensor]) -> RetrievalModel:
    """An untrained model: what it recommends is popularity, a little different for each user."""
    tf.keras.utils.set_random_seed(0)
    log_q = item_log_q(count_positives([window], world.VOCABULARY_SIZES["item_id"]), world.catalogue())
    model = RetrievalModel(CONFIG, world.SPACE, world.VOCABULARY_SIZES, log_q)
    model.compute_loss(window)  # makes the weights
    return model


def _measured(model: RetrievalModel) -> dict[str, float]:
    users = world.validation_users()
    return validate(model.encode_users(users.query), model.encode_catalogue(world.catalogue()), users)


def _silence(layer: tf.keras.layers.Layer) -> None:
    """Sabotage: whatever goes in, the same comes out."""
    for weight in layer.trainable_weights:
        weight.assign(tf.zeros_like(weight) if weight.shape.rank > 1 else tf.ones_like(weight))


def test_a_ranking_by_popularity_less_what_each_user_has_seen_is_no_collapse(model: RetrievalModel) -> None:
    users = world.validation_users()
    seen = np.random.default_rng(0).integers(20, size=(len(users), 3)).astype(np.int32)
    users = dataclasses.replace(users, seen_rows=seen)
    measured = validate(model.encode_users(users.query), model.encode_catalogue(world.catalogue()), users)
    assert 10 < measured[DISTINCT_ITEMS] < 20
    check_not_collapsed(measured, world.NUM_USERS, world.NUM_ITEMS)


def test_a_constant_query_tower_is_refused(model: RetrievalModel) -> None:
    _silence(model.query_tower.mlp)
    measured = _measured(model)
    assert measured[QUERY_RANK] == 0.0
    assert measured[DISTINCT_ITEMS] == 10
    with pytest.raises(
        CollapsedModelError, match=r"300 query vectors differ in 0\.00 directions.*hold 10 of 600"
    ):
        check_not_collapsed(measured, world.NUM_USERS, world.NUM_ITEMS)


def test_equal_item_vectors_are_refused_whatever_their_biases(model: RetrievalModel) -> None:
    _silence(model.candidate_tower.mlp)
    assert len(np.unique(model.encode_catalogue(world.catalogue())[:, -1])) > 10
    measured = _measured(model)
    assert measured[CANDIDATE_RANK] == pytest.approx(1.0)
    with pytest.raises(CollapsedModelError, match=r"600 candidate vectors differ in 1\.00 directions"):
        check_not_collapsed(measured, world.NUM_USERS, world.NUM_ITEMS)


def test_the_same_ten_items_for_everybody_are_refused_although_the_vectors_differ() -> None:
    rng = np.random.default_rng(0)
    measured = collapse_metrics(
        rng.normal(size=(50, 4)), rng.normal(size=(90, 4)), np.tile(np.arange(20), (50, 1))
    )
    with pytest.raises(CollapsedModelError, match="the top 10 of 50 users hold 10 of 90 items"):
        check_not_collapsed(measured, 50, 90)


def test_few_users_or_items_are_not_judged() -> None:
    ranked = np.tile(np.arange(10), (9, 1))
    same = np.ones((9, 4))
    check_not_collapsed(collapse_metrics(same, same, ranked), 9, 9)


def test_the_same_interests_for_every_user_are_a_collapse() -> None:
    rng = np.random.default_rng(0)
    interests = np.tile(rng.normal(size=(1, 4, 8)), (50, 1, 1))
    lists = np.tile(np.arange(10), (50, 1)) + np.arange(50)[:, np.newaxis]
    measured = collapse_metrics(interests, rng.normal(size=(200, 8)), lists)
    assert measured[QUERY_RANK] == 0.0
    with pytest.raises(CollapsedModelError, match=r"query vectors differ in 0\.00 directions"):
        check_not_collapsed(measured, 50, 200)
