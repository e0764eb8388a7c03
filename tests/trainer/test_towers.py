"""The towers: shapes, the item bias, and what becomes of unknown users and new items."""

import numpy as np
import tensorflow as tf

from tests.trainer import retrieval_world as world
from trainer import features
from trainer.encoder import EmbeddingTables
from trainer.towers import CandidateTower, QueryTower, hide_ids

_WIDTHS = {space: 4 for space in world.VOCABULARY_SIZES}
_BIAS = np.linspace(-3, 3, world.VOCABULARY_SIZES["item_id"])


def _towers(id_dropout_fraction: float = 0.0) -> tuple[QueryTower, CandidateTower]:
    tf.keras.utils.set_random_seed(0)
    tables = EmbeddingTables(world.VOCABULARY_SIZES, _WIDTHS)
    query = QueryTower(world.SPACE.query, tables, (8,), 6, id_dropout_fraction)
    candidate = CandidateTower(world.SPACE.candidate, tables, (8,), 6, id_dropout_fraction, _BIAS)
    return query, candidate


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
    _, candidate_tower = _towers(id_dropout_fraction=0.5)
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
