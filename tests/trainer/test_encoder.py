"""How wide embeddings are, and what the tables make of lists."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.encoder import EmbeddingTables, embedding_width


@pytest.mark.parametrize(
    ("num_ids", "width"),
    # 4 × ⌈log2(ids) / 2⌉, at most 64: one bit of ids is worth two dimensions.
    [(1, 4), (2, 4), (4, 4), (5, 8), (16, 8), (17, 12), (1_000_000, 40), (10**12, 64)],
)
def test_width_grows_with_the_log_of_the_number_of_ids_up_to_the_largest(num_ids: int, width: int) -> None:
    assert embedding_width(num_ids, 64) == width


def test_a_list_is_the_mean_of_its_values_and_an_empty_one_zeros() -> None:
    rows = np.array([[9, 9], [1, 2], [3, 6]], np.float32)
    tables = EmbeddingTables({"tag": 3}, {"tag": 2}, {"tag": rows})
    mean = tables.mean("tag", tf.constant([[1, 2, 0], [2, 0, 0], [0, 0, 0]]))
    assert mean.numpy().tolist() == [[2, 4], [3, 6], [0, 0]]
