"""The query tower and the candidate tower of the retrieval model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from trainer import features
from trainer.encoder import EmbeddingTables, FeatureEncoder


class QueryTower(tf.keras.layers.Layer):
    """Transformed query features -> query vector; its last dimension is 1, the factor of the item bias."""

    def __init__(
        self,
        query_features: Sequence[features.Feature],
        tables: EmbeddingTables,
        hidden_layers: Sequence[int],
        embedding_dim: int,
        id_dropout_fraction: float,
        **kwargs: object,
    ) -> None:
        """Makes the tower.

        Args:
          query_features: what it reads.
          tables: embedding tables; the history shares the table of the candidates' item ids.
          hidden_layers: widths of the hidden layers.
          embedding_dim: width of the vector without the constant.
          id_dropout_fraction: share of user ids replaced by the out-of-vocabulary id in training.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.encoder = FeatureEncoder(query_features, tables)
        self.mlp = _mlp(hidden_layers, embedding_dim)
        self.drop_id = _IdDropout(_id_name(query_features, features.USER_ID), id_dropout_fraction)

    def call(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Encodes transformed query features [B] into float32 [B, embedding_dim + 1]."""
        vectors = self.mlp(self.encoder(self.drop_id(inputs, training=training)))
        return tf.concat([vectors, tf.ones_like(vectors[:, :1])], axis=-1)


class CandidateTower(tf.keras.layers.Layer):
    """Transformed candidate features -> candidate vector; its last dimension is the bias of the item.

    A new item has the out-of-vocabulary id: its vector comes from its content, and its bias is that of an average item.
    """

    def __init__(
        self,
        candidate_features: Sequence[features.Feature],
        tables: EmbeddingTables,
        hidden_layers: Sequence[int],
        embedding_dim: int,
        id_dropout_fraction: float,
        initial_bias: np.ndarray,
        **kwargs: object,
    ) -> None:
        """Makes the tower.

        Args:
          candidate_features: what it reads.
          tables: embedding tables, shared with the query tower.
          hidden_layers: widths of the hidden layers.
          embedding_dim: width of the vector without the bias.
          id_dropout_fraction: share of item ids replaced by the out-of-vocabulary id in training.
          initial_bias: float [ids of the item vocabulary, padding and OOV included].
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.encoder = FeatureEncoder(candidate_features, tables)
        self.mlp = _mlp(hidden_layers, embedding_dim)
        self.item_id = _id_name(candidate_features, features.ITEM_ID)
        self.drop_id = _IdDropout(self.item_id, id_dropout_fraction)
        self.bias = tf.keras.layers.Embedding(
            len(initial_bias),
            1,
            embeddings_initializer=tf.keras.initializers.Constant(np.reshape(initial_bias, [-1, 1])),
            name="item_bias",
        )

    def call(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Encodes transformed candidate features [B] into float32 [B, embedding_dim + 1]."""
        inputs = self.drop_id(inputs, training=training)
        return tf.concat([self.mlp(self.encoder(inputs)), self.bias(inputs[self.item_id])], axis=-1)


class _IdDropout(tf.keras.layers.Layer):
    """Replaces a share of one feature's ids by the out-of-vocabulary id in training, which trains that id's embedding."""

    def __init__(self, name_of_ids: str, fraction: float) -> None:
        super().__init__()
        self.name_of_ids = name_of_ids
        self.fraction = fraction

    def call(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> dict[str, tf.Tensor]:
        inputs = dict(inputs)
        if training and self.fraction > 0:
            ids = inputs[self.name_of_ids]
            dropped = tf.random.uniform(tf.shape(ids)) < self.fraction
            inputs[self.name_of_ids] = tf.where(dropped, tf.constant(features.OOV_ID, ids.dtype), ids)
        return inputs


def _id_name(among: Sequence[features.Feature], name: str) -> str:
    return next(f.id_name for f in among if f.name == name)


def _mlp(hidden_layers: Sequence[int], output_dim: int) -> tf.keras.Sequential:
    layers = [tf.keras.layers.Dense(width, activation="relu") for width in hidden_layers]
    return tf.keras.Sequential([*layers, tf.keras.layers.Dense(output_dim)])
