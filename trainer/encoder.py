"""Turns transformed features into dense vectors; shared by the towers and the ranker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from trainer import features


def embedding_width(num_ids: int, largest: int) -> int:
    """Embedding width that grows with the log of the cardinality (Covington et al. 2016, section 4.1).

    Args:
      num_ids: number of ids of the space, padding and OOV included.
      largest: upper bound of the width.

    Returns:
      A multiple of 4 between 4 and `largest`.
    """
    return min(largest, 4 * math.ceil(math.log2(max(2, num_ids)) / 2))


class _ZeroPadding(tf.keras.initializers.RandomUniform):
    """Uniform, with zeros in the row of a missing value, which columns without gaps never train."""

    def __call__(self, shape: Sequence[int], dtype: tf.DType | None = None, **kwargs: object) -> tf.Tensor:
        """Makes the initial table."""
        table = super().__call__(shape, dtype=dtype, **kwargs)
        return tf.concat([tf.zeros_like(table[:1]), table[1:]], axis=0)


def _table(
    num_ids: int, width: int, name: str, initial: np.ndarray | None = None
) -> tf.keras.layers.Embedding:
    initializer = _ZeroPadding(-0.05, 0.05) if initial is None else tf.keras.initializers.Constant(initial)
    return tf.keras.layers.Embedding(num_ids, width, embeddings_initializer=initializer, name=name)


class EmbeddingTables(tf.keras.layers.Layer):
    """One embedding table per vocabulary space; `mean` leaves row 0 (padding) out."""

    def __init__(
        self,
        vocabulary_sizes: Mapping[str, int],
        widths: Mapping[str, int],
        initial: Mapping[str, np.ndarray] | None = None,
        **kwargs: object,
    ) -> None:
        """Makes the tables.

        Args:
          vocabulary_sizes: ids per space, padding and OOV included.
          widths: embedding width per space; only these spaces get a table.
          initial: tables to start from, by space; random where absent.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.widths = dict(widths)
        initial = initial or {}
        self.tables = {
            space: _table(vocabulary_sizes[space], width, f"embedding_{space}", initial.get(space))
            for space, width in sorted(widths.items())
        }

    def call(self, space: str, ids: tf.Tensor) -> tf.Tensor:
        """Embeds int ids of any shape; the result has one more dimension, the width of the space."""
        return self.tables[space](ids)

    def mean(self, space: str, ids: tf.Tensor) -> tf.Tensor:
        """Mean of the embeddings of each row's ids, padding ignored; zeros for an empty row.

        Args:
          space: vocabulary space.
          ids: int [B, L].

        Returns:
          float32 [B, width].
        """
        mask = tf.cast(tf.not_equal(ids, features.PADDING_ID), tf.float32)[..., tf.newaxis]
        total = tf.reduce_sum(self(space, ids) * mask, axis=-2)
        return total / tf.maximum(tf.reduce_sum(mask, axis=-2), 1.0)


class FeatureEncoder(tf.keras.layers.Layer):
    """Concatenates the encodings of a list of features.

    A categorical feature is its embedding, a list is the mean of its embeddings, a continuous feature is x, x
    squared and the square root of x of its quantile-normalised value (Covington et al. 2016, section 4.1) and
    the embedding of its quantile bucket, which also tells a missing value apart.
    """

    def __init__(
        self,
        encoded: Sequence[features.Feature],
        tables: EmbeddingTables,
        bucket_width: int = 4,
        **kwargs: object,
    ) -> None:
        """Makes an encoder over shared tables.

        Args:
          encoded: the features, in the order of the output.
          tables: shared embedding tables; must hold the space of every categorical feature here.
          bucket_width: embedding width of quantile buckets.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.encoded = tuple(encoded)
        self.tables = tables
        self.buckets = {
            f.name: _table(features.NUM_BUCKETS + 1, bucket_width, f"bucket_{f.name}")
            for f in self.encoded
            if not f.is_categorical
        }

    def call(self, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Encodes a batch; see `encode`.

        Returns:
          float32 [..., D], the encodings side by side.
        """
        return tf.concat(self.encode(inputs), axis=-1)

    def encode(
        self, inputs: Mapping[str, tf.Tensor], encoded: Sequence[features.Feature] | None = None
    ) -> list[tf.Tensor]:
        """Encodes a batch, feature by feature.

        Args:
          inputs: transformed features by name; ids int [...], lists of ids int [..., L], cdf float32 [...].
          encoded: some of the features; None for all.

        Returns:
          float32 [..., W] of each feature, in their order.
        """
        parts = []
        for feature in self.encoded if encoded is None else encoded:
            if feature.is_list:
                parts.append(self.tables.mean(feature.space, inputs[feature.id_name]))
            elif feature.is_categorical:
                parts.append(self.tables(feature.space, inputs[feature.id_name]))
            else:
                powers = with_powers(inputs[feature.cdf_name][..., tf.newaxis])
                bucket = self.buckets[feature.name](inputs[feature.bucket_name])
                parts.append(tf.concat([powers, bucket], axis=-1))
        return parts


class CrossEncoder(tf.keras.layers.Layer):
    """Embeddings of the combinations of a query and a candidate feature, such as surface and duration.

    A continuous feature counts by its quantile bucket; of a list, the combinations are averaged.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[features.Feature, features.Feature]],
        vocabulary_sizes: Mapping[str, int],
        width: int = 8,
        **kwargs: object,
    ) -> None:
        """Makes one table per pair.

        Args:
          pairs: query feature, single-valued, and candidate feature.
          vocabulary_sizes: ids per vocabulary space, padding and OOV included.
          width: of each embedding.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.pairs = tuple(pairs)

        def size(feature: features.Feature) -> int:
            return vocabulary_sizes[feature.space] if feature.is_categorical else features.NUM_BUCKETS + 1

        self.sizes = [size(right) for _, right in self.pairs]
        self.tables = [
            _table(size(left) * size(right), width, f"cross_{left.name}_{right.name}")
            for left, right in self.pairs
        ]

    def call(self, query: Mapping[str, tf.Tensor], candidate: Mapping[str, tf.Tensor]) -> list[tf.Tensor]:
        """Encodes B rows.

        Args:
          query: transformed query features, int [...].
          candidate: transformed candidate features, int [...], lists [..., L]; the dimensions before
            L broadcast to those of the query.

        Returns:
          float32 [..., width] of each pair.
        """
        parts = []
        for (left, right), size, table in zip(self.pairs, self.sizes, self.tables, strict=True):
            first = tf.cast(query[category_name(left)], tf.int64) * size
            second = tf.cast(candidate[category_name(right)], tf.int64)
            if right.is_list:
                mask = tf.cast(tf.not_equal(second, features.PADDING_ID), tf.float32)[..., tf.newaxis]
                total = tf.reduce_sum(table(first[..., tf.newaxis] + second) * mask, axis=-2)
                parts.append(total / tf.maximum(tf.reduce_sum(mask, axis=-2), 1.0))
            else:
                parts.append(table(first + second))
        return parts


def category_name(feature: features.Feature) -> str:
    """Transformed name of the feature as ids: its own, or its quantile bucket."""
    return feature.id_name if feature.is_categorical else feature.bucket_name


def with_powers(x: tf.Tensor) -> tf.Tensor:
    """x, its square and its root, float32 [..., C] to [..., 3C] (Covington et al. 2016, section 4.1)."""
    return tf.concat([x, tf.square(x), tf.sqrt(x)], axis=-1)
