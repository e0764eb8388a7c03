"""Hard negatives are what the model ranks high and the user is not known to like, by hand on eight items."""

import numpy as np
import pytest
import tensorflow as tf

from trainer import hard_negatives
from trainer.catalogue import Catalogue
from trainer.config import LossConfig
from trainer.hard_negatives import (
    HardNegativeMiner,
    RefreshHardNegatives,
    known_positives,
    mining_index,
    pair_keys,
)
from trainer.index import ScannIndex

# Rows 0 to 7 have scores 8 to 1 for the query (1,); row 2 is an item outside the vocabulary.
IDS = np.array([2, 3, 1, 4, 5, 6, 7, 8])
CATALOGUE = Catalogue(np.array([f"i{row}" for row in range(8)], object), {"item_id_id": IDS}, None)
VECTORS = np.arange(8, 0, -1, dtype=np.float32)[:, np.newaxis]
USER = 5


def mine(
    known: list[int], history: list[int], positive: int, queries: int = 1, **settings: int
) -> list[list[int]]:
    settings = {"hard_negatives": 2, "hard_negative_skip": 0, "hard_negative_search": 8} | settings
    keys = np.sort(pair_keys(np.full(len(known), USER), np.array(known)))
    miner = HardNegativeMiner(LossConfig(**settings), CATALOGUE, keys)
    miner.refresh(VECTORS)
    inputs = {
        "user_id_id": tf.fill([queries], USER),
        "item_id_id": tf.fill([queries], positive),
        "history_item_ids_ids": tf.tile([history], [queries, 1]),
    }
    return tf.function(miner.mine, autograph=False)(tf.ones([queries, 1]), inputs).numpy().tolist()


def test_best_ranked_items_of_the_vocabulary_but_the_positive() -> None:
    assert mine(known=[0], history=[0], positive=2) == [[3, 4]]


def test_a_new_item_takes_no_place_among_the_neighbours_however_high_it_ranks() -> None:
    """Row 2 has the third best score, and does not push row 3 out of the three that are looked at."""
    assert mine(known=[0], history=[0], positive=2, hard_negative_search=3) == [[3, 4]]


def test_known_positives_of_the_user_and_the_history_are_left_out() -> None:
    assert mine(known=[3, 6], history=[5, 0], positive=2) == [[4, 7]]


def test_known_positives_of_other_users_count() -> None:
    keys = pair_keys(np.array([USER + 1]), np.array([3]))
    miner = HardNegativeMiner(LossConfig(hard_negatives=1, hard_negative_skip=0), CATALOGUE, keys)
    miner.refresh(VECTORS)
    inputs = {"user_id_id": [USER], "item_id_id": [2], "history_item_ids_ids": [[0]]}
    assert miner.mine(tf.ones([1, 1]), {n: tf.constant(v) for n, v in inputs.items()}).numpy() == [[3]]


def test_skipped_ranks_are_those_beyond_the_known_positives() -> None:
    assert mine(known=[2, 3], history=[0], positive=8, hard_negative_skip=1) == [[5, 6]]


def test_positive_fills_the_row_where_fewer_are_found() -> None:
    assert mine(known=[2, 3, 4, 5, 6], history=[0], positive=8, queries=2) == [[7, 8], [7, 8]]
    assert mine(known=[0], history=[0], positive=8, hard_negative_search=2) == [[2, 3]]
    assert mine(known=[2, 3], history=[0], positive=8, hard_negative_search=2) == [[8, 8]]


def test_search_uses_the_latest_vectors_and_is_refreshed_every_so_many_steps() -> None:
    config = LossConfig(hard_negatives=1, hard_negative_skip=0, hard_negative_refresh_steps=2)
    miner = HardNegativeMiner(config, CATALOGUE, np.zeros(1, np.int64))
    vectors = VECTORS
    callback = RefreshHardNegatives(miner, lambda: vectors)
    inputs = {"user_id_id": [USER], "item_id_id": [2], "history_item_ids_ids": [[0]]}
    mined_in_graph = tf.function(miner.mine, autograph=False)
    found = []
    for step in range(4):
        # The second epoch counts on from the first.
        callback.on_train_batch_begin(step % 3)
        mined = mined_in_graph(tf.ones([1, 1]), {n: tf.constant(v) for n, v in inputs.items()})
        found.append(mined.numpy().item())
        vectors = VECTORS[::-1]
    # Steps 0 and 2 refresh; from step 2 on the last item is the first.
    assert found == [3, 3, 8, 8]


def test_large_catalogue_is_searched_with_scann(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hard_negatives, "_MIN_ITEMS_FOR_SCANN", 2_000)
    vectors = np.random.default_rng(0).normal(size=(2_000, 8)).astype(np.float32)
    index = mining_index(vectors, 20)
    assert isinstance(index, ScannIndex)
    rows = index.search(tf.constant(vectors[:50]), tf.constant(20))[0].numpy()
    exact = np.argsort(-vectors[:50] @ vectors.T, axis=1)[:, :20]
    # Points of one normal distribution have no clusters, the worst case for a partition; by chance 1 %.
    assert np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(rows, exact, strict=True)]) > 0.3


def test_known_positives_are_the_distinct_pairs_inside_and_outside_the_cap() -> None:
    window = {
        "user_id_id": tf.constant([5, 5, 5, 5, 4]),
        "item_id_id": tf.constant([3, 3, 2, 8, 9]),
        "click": tf.constant([1.0, 1.0, 0.0, 1.0, 1.0]),
        "retrieval_weight": tf.constant([1.0, 1.0, 0.0, 0.0, 1.0]),
    }
    other = {name: column[:1] for name, column in window.items()}
    pairs = known_positives([window, other], "click").tolist()
    assert pairs == [4 * 2**31 + 9, 5 * 2**31 + 3, 5 * 2**31 + 8]


def test_more_hard_negatives_than_searched_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="hard_negative_search is 10, fewer than"):
        LossConfig(hard_negatives=6, hard_negative_skip=5, hard_negative_search=10)
