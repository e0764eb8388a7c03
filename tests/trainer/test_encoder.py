"""How wide embeddings are, and what the tables make of lists."""

import numpy as np
import pytest
import tensorflow as tf

from schema.contract import FeatureKind
from trainer.encoder import EmbeddingTables, FeatureEncoder, embedding_width, with_powers
from trainer.features import Feature


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


def test_powers_stand_behind_one_another_column_by_column() -> None:
    powers = with_powers(tf.constant([[0.0, 0.25], [1.0, 0.04]]))
    # x of both columns, then x², then √x.
    expected = [[0.0, 0.25, 0.0, 0.0625, 0.0, 0.5], [1.0, 0.04, 1.0, 0.0016, 1.0, 0.2]]
    np.testing.assert_allclose(powers, expected, rtol=1e-6)


def test_a_continuous_feature_is_its_share_the_powers_of_it_and_the_embedding_of_its_bucket() -> None:
    encoder = FeatureEncoder([Feature("age", FeatureKind.CONTINUOUS, "age")], EmbeddingTables({}, {}))
    rows = {"age_cdf": tf.constant([0.36, 0.0]), "age_bucket": tf.constant([12, 0])}
    encoded = encoder(rows).numpy()
    np.testing.assert_allclose(encoded[:, :3], [[0.36, 0.1296, 0.6], [0.0, 0.0, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(encoded[0, 3:], encoder.buckets["age"].embeddings[12])
    # A missing value is the smallest one but for its bucket, whose embedding starts from zeros.
    assert not encoded[1, 3:].any()
