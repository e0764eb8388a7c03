"""The towers: shapes, the item bias, and what becomes of unknown users and new items."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import ConfigError
from tests.trainer import retrieval_world as world
from trainer import features
from trainer.config import FactorsConfig, HistoryConfig, RetrievalConfig
from trainer.encoder import EmbeddingTables
from trainer.item_factors import ItemFactors
from trainer.towers import CandidateTower, QueryTower, hide_ids, tower_features

_NUM_IDS = world.VOCABULARY_SIZES["item_id"]
_BIAS = np.linspace(-3, 3, _NUM_IDS)
_NO_POPULARITY = np.zeros((_NUM_IDS, 0))


def _towers(
    popularity: np.ndarray = _NO_POPULARITY, ignored: tuple[str, ...] = (), **settings: Any
) -> tuple[QueryTower, CandidateTower]:
    config = RetrievalConfig(
        **{
            "embedding_dim": 6,
            "hidden_layers": (8,),
            "query_dropout_fraction": 0.0,
            "item_id_dropout_fraction": 0.0,
        }
        | settings
    )
    tf.keras.utils.set_random_seed(0)
    widths = {space: 6 if space == "item_id" else 4 for space in world.VOCABULARY_SIZES}
    tables = EmbeddingTables(world.VOCABULARY_SIZES, widths)
    query = QueryTower(tower_features(world.SPACE.query, ignored), tables, config)
    candidates = tower_features(world.SPACE.candidate, ignored)
    return query, CandidateTower(candidates, tables, config, _BIAS, popularity)


def _item(item_id: int, genre: int) -> dict[str, tf.Tensor]:
    return {"item_id_id": tf.constant([item_id]), "genres_ids": tf.constant([[genre]])}


def test_score_is_similarity_plus_initial_bias() -> None:
    query_tower, candidate_tower = _towers()
    query = query_tower(world.query_columns(np.arange(3), np.full((3, 2), -1)))
    candidates = candidate_tower({n: tf.constant(c[:5]) for n, c in world.catalogue().transformed.items()})
    assert query.shape == (3, 7) and candidates.shape == (5, 7)
    similarity = query[:, :6] @ tf.transpose(candidates[:, :6])
    np.testing.assert_allclose(query @ tf.transpose(candidates), similarity + _BIAS[2:7], rtol=1e-5)


def test_new_items_differ_by_content_and_share_the_bias_of_the_unknown_item() -> None:
    _, candidate_tower = _towers()
    new_a, new_b = candidate_tower(_item(features.OOV_ID, 2)), candidate_tower(_item(features.OOV_ID, 3))
    assert np.abs(new_a - new_b)[0, :6].max() > 1e-3
    assert new_a[0, 6] == new_b[0, 6] == np.float32(_BIAS[features.OOV_ID])


def test_history_reads_the_embeddings_of_the_candidates() -> None:
    query_tower, candidate_tower = _towers()
    watched, nothing = (world.query_columns(np.arange(1), np.array([[row]])) for row in (3, -1))
    before = query_tower(watched).numpy(), query_tower(nothing).numpy()
    candidate_tower(_item(5, 2))
    items = candidate_tower.encoder.tables.tables["item_id"].embeddings
    items.assign(items + 1)
    assert np.abs(query_tower(watched) - before[0]).max() > 0.01
    np.testing.assert_array_equal(query_tower(nothing), before[1])


def test_empty_history_is_finite_and_padding_is_ignored() -> None:
    query_tower, _ = _towers()
    short = query_tower(world.query_columns(np.arange(1), np.array([[5, -1, -1]])))
    np.testing.assert_allclose(
        short, query_tower(world.query_columns(np.arange(1), np.array([[5]]))), rtol=1e-6
    )
    assert np.isfinite(query_tower(world.query_columns(np.arange(1), np.array([[-1]])))).all()


def test_item_ids_are_hidden_in_training_only() -> None:
    _, candidate_tower = _towers(item_id_dropout_fraction=0.5)
    items = {"item_id_id": tf.fill([400], 7), "genres_ids": tf.fill([400, 1], 2)}
    hidden = candidate_tower(items, training=True)[:, 6] == np.float32(_BIAS[features.OOV_ID])
    assert 150 < np.count_nonzero(hidden) < 250  # five standard deviations around the half
    assert (candidate_tower(items)[:, 6] == np.float32(_BIAS[7])).numpy().all()


def test_hidden_list_entries_become_padding_and_other_features_stay() -> None:
    tf.keras.utils.set_random_seed(0)
    inputs = {
        "history_item_ids_ids": tf.fill([100, 5], 9),
        "segment_id": tf.fill([500], 4),
        "hour_of_day_id": tf.fill([500], 4),
    }
    among = [world.SPACE.find("history_item_ids"), world.SPACE.find("segment")]
    hidden = hide_ids(inputs, among, 0.5)
    assert set(np.unique(hidden["history_item_ids_ids"])) == {features.PADDING_ID, 9}
    assert set(np.unique(hidden["segment_id"])) == {features.OOV_ID, 4}
    assert (hidden["hour_of_day_id"].numpy() == 4).all()


def test_user_id_is_not_read() -> None:
    query_tower, _ = _towers()
    query = query_tower(world.query_columns(np.array([0, 6]), np.array([[3], [3]])))
    np.testing.assert_array_equal(query[0], query[1])  # users 0 and 6 share the segment


@pytest.mark.parametrize(
    "history",
    [HistoryConfig(encoder="attention"), HistoryConfig(encoder="transformer"), HistoryConfig(interests=3)],
    ids=["attention", "transformer", "interests"],
)
def test_every_way_to_read_the_history_gives_finite_queries_with_the_factor_of_the_bias(
    history: HistoryConfig,
) -> None:
    query_tower, _ = _towers(history=history)
    rows = np.array([[5, 9, -1], [-1, -1, -1], [3, 4, 5]])
    query = query_tower(world.query_columns(np.arange(3), rows)).numpy()
    assert query.shape == ((3, 3, 7) if history.interests == 3 else (3, 7))
    assert np.isfinite(query).all() and (query[..., -1] == 1).all()
    nothing = query_tower(world.query_columns(np.arange(3), np.zeros((3, 0), np.int64))).numpy()
    np.testing.assert_allclose(nothing[1], query[1], rtol=1e-5)


def test_interests_without_history_are_alike_and_with_one_they_differ() -> None:
    query_tower, _ = _towers(history=HistoryConfig(interests=2))
    query = query_tower(world.query_columns(np.arange(2), np.array([[5, 9, 40], [-1, -1, -1]]))).numpy()
    assert np.abs(query[0, 0] - query[0, 1]).max() > 1e-5
    np.testing.assert_allclose(query[1, 0], query[1, 1], rtol=1e-6)


def test_a_start_from_cooccurrence_adds_history_and_item_vectors_to_the_output() -> None:
    plain_query, plain_candidate = _towers()
    query_tower, candidate_tower = _towers(item_vectors="cooccurrence")
    columns = world.query_columns(np.arange(2), np.array([[5, 9], [-1, -1]]))
    items = {n: tf.constant(c[:3]) for n, c in world.catalogue().transformed.items()}
    for tower, plain, inputs in (
        (query_tower, plain_query, columns),
        (candidate_tower, plain_candidate, items),
    ):
        plain(inputs), tower(inputs)
        for variable, other in zip(tower.mlp.weights, plain.mlp.weights, strict=True):
            variable.assign(other)
    table = query_tower.encoder.tables.tables["item_id"].embeddings
    table.assign(plain_query.encoder.tables.tables["item_id"].embeddings)
    for tower, plain in ((query_tower, plain_query), (candidate_tower, plain_candidate)):
        for variable, other in zip(tower.encoder.weights, plain.encoder.weights, strict=True):
            variable.assign(other)
    rows = table.numpy()
    extra = (query_tower(columns) - plain_query(columns)).numpy()
    np.testing.assert_allclose(extra[0, :6], 2.0 * (rows[7] + rows[11]) / 2, atol=1e-6)
    np.testing.assert_allclose(extra[1], 0.0, atol=1e-6)
    query_tower.history_weight.assign(0.5)
    np.testing.assert_allclose(
        (query_tower(columns) - plain_query(columns))[0, :6], 0.5 * (rows[7] + rows[11]) / 2, atol=1e-6
    )
    extra = (candidate_tower(items) - plain_candidate(items)).numpy()
    np.testing.assert_allclose(extra[:, :6], rows[2:5], atol=1e-6)
    np.testing.assert_array_equal(extra[:, 6], 0.0)


def test_the_bias_counts_popularity_when_serving_and_leaves_it_to_the_loss_in_training() -> None:
    popularity = np.random.default_rng(0).normal(size=(_NUM_IDS, 2))
    popularity[: features.FIRST_VOCABULARY_ID] = 0.0
    _, candidate_tower = _towers(popularity)
    ids = np.array([1, 4, 9])
    items = {"item_id_id": tf.constant(ids), "genres_ids": tf.constant([[2], [2], [3]])}
    np.testing.assert_allclose(candidate_tower(items)[:, 6], _BIAS[ids], rtol=1e-6)  # not learnt yet
    candidate_tower.popularity_weights.assign([0.5, -2.0])
    expected = _BIAS[ids] + 0.5 * popularity[ids, 0] - 2.0 * popularity[ids, 1]
    np.testing.assert_allclose(candidate_tower(items)[:, 6], expected, rtol=1e-5)
    without = candidate_tower(items, with_popularity=False)
    np.testing.assert_allclose(without[:, 6], _BIAS[ids], rtol=1e-6)
    np.testing.assert_array_equal(without[:, :6], candidate_tower(items)[:, :6])


def test_weights_of_no_popularity_are_not_trained() -> None:
    _, with_one = _towers(np.zeros((_NUM_IDS, 1)))
    _, with_none = _towers()
    assert with_one.popularity_weights.trainable and not with_none.popularity_weights.trainable


@pytest.mark.parametrize("interests", [1, 2])
def test_a_query_can_be_the_history_alone(interests: int) -> None:
    ignored = ("segment", "hour_of_day", "day_of_week", "example_age_days")
    query_tower, _ = _towers(ignored=ignored, history=HistoryConfig(interests=interests))
    columns = world.query_columns(np.array([0, 1]), np.array([[3, 4], [3, 4]]))
    query = query_tower({"history_item_ids_ids": columns["history_item_ids_ids"]})
    np.testing.assert_array_equal(query[0], query[1])
    with pytest.raises(ConfigError, match="leaves the query tower nothing to read"):
        _towers(ignored=(*ignored, "history_item_ids"))


def test_an_ignored_feature_is_not_read() -> None:
    query_tower, candidate_tower = _towers(ignored=("history_item_ids", "genres"))
    columns = world.query_columns(np.array([0, 6]), np.array([[3], [9]]))
    query = query_tower({name: c for name, c in columns.items() if name != "history_item_ids_ids"})
    assert query.shape == (2, 7)
    np.testing.assert_array_equal(query[0], query[1])
    assert candidate_tower({"item_id_id": tf.constant([5])}).shape == (1, 7)


@pytest.mark.parametrize("interests", [1, 2])
def test_factors_add_their_own_products_to_the_scores(interests: int) -> None:
    factors = np.random.default_rng(0).normal(size=(_NUM_IDS, 3)).astype(np.float32)
    factors[: features.FIRST_VOCABULARY_ID] = 0.0
    layer = ItemFactors(_NUM_IDS, FactorsConfig(weight=40.0, alpha=5.0, ridge=4.0, num_factors=3), factors)
    query_tower, candidate_tower = _towers(history=HistoryConfig(interests=interests))
    query_tower.factors = candidate_tower.factors = layer
    columns = world.query_columns(np.arange(2), np.array([[5, 9], [-1, -1]]))
    items = {name: tf.constant(column[:4]) for name, column in world.catalogue().transformed.items()}
    query, candidates = query_tower(columns).numpy(), candidate_tower(items).numpy()
    learnt_query = query_tower(columns, with_factors=False).numpy()
    learnt_candidates = candidate_tower(items, with_factors=False).numpy()
    assert query.shape[-1] == candidates.shape[-1] == 3 + 7
    expected = learnt_query @ learnt_candidates.T
    of_history = layer.of_history(columns["history_item_ids_ids"]).numpy()
    added = of_history @ factors[items["item_id_id"].numpy()].T
    expected += added[:, np.newaxis] if interests > 1 else added
    np.testing.assert_allclose(query @ candidates.T, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(added[0]).max() > 0.1 and not added[1].any()


def test_only_new_items_are_boosted_and_only_when_serving() -> None:
    items = _item(features.OOV_ID, 2), _item(5, 2)
    _, tower = _towers(new_item_boost=1.5)
    new, known = (tower(item).numpy() for item in items)
    trained_on = tower(items[0], with_popularity=False).numpy()
    np.testing.assert_allclose(new - trained_on, [[0.0] * 6 + [1.5]], atol=1e-6)
    np.testing.assert_array_equal(known, tower(items[1], with_popularity=False))
