"""The query tower and the candidate tower of the retrieval model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from trainer import features
from trainer.encoder import EmbeddingTables, FeatureEncoder


class QueryTower(tf.keras.layers.Layer):
    """Transformed query features -> query vector; its last dimension is 1, the factor of the item bias.

    The user id is not read: a user is what is known of them and what they watched (Covington et al. 2016,
    section 3). An embedding per user learns little from a few dozen watches, and nothing for new users.
    """

    def __init__(
        self,
        query_features: Sequence[features.Feature],
        tables: EmbeddingTables,
        hidden_layers: Sequence[int],
        embedding_dim: int,
        dropout_fraction: float,
        **kwargs: object,
    ) -> None:
        """Makes the tower.

        Args:
          query_features: the dataset's query features.
          tables: embedding tables; the history shares the table of the candidates' item ids.
          hidden_layers: widths of the hidden layers.
          embedding_dim: width of the vector without the constant.
          dropout_fraction: share of ids that are hidden in training.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.encoder = FeatureEncoder(tower_features(query_features), tables)
        self.mlp = _mlp(hidden_layers, embedding_dim)
        self.dropout_fraction = dropout_fraction

    def call(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Encodes transformed query features [B] into float32 [B, embedding_dim + 1]."""
        if training:
            inputs = hide_ids(inputs, self.encoder.encoded, self.dropout_fraction)
        vectors = self.mlp(self.encoder(inputs))
        return tf.concat([vectors, tf.ones_like(vectors[:, :1])], axis=-1)


class CandidateTower(tf.keras.layers.Layer):
    """Transformed candidate features -> candidate vector; its last dimension is the bias of the item.

    A new item has the out-of-vocabulary id: its vector comes from its content, its bias is that of an average
    item, and both are trained on items whose id is hidden.
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
          candidate_features: the dataset's candidate features.
          tables: embedding tables, shared with the query tower.
          hidden_layers: widths of the hidden layers.
          embedding_dim: width of the vector without the bias.
          id_dropout_fraction: share of item ids that are hidden in training.
          initial_bias: float [ids of the item vocabulary, padding and OOV included].
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.encoder = FeatureEncoder(candidate_features, tables)
        self.mlp = _mlp(hidden_layers, embedding_dim)
        self.item_id = next(f for f in candidate_features if f.name == features.ITEM_ID)
        self.id_dropout_fraction = id_dropout_fraction
        self.bias = tf.keras.layers.Embedding(
            len(initial_bias),
            1,
            embeddings_initializer=tf.keras.initializers.Constant(np.reshape(initial_bias, [-1, 1])),
            name="item_bias",
        )

    def call(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Encodes transformed candidate features [B] into float32 [B, embedding_dim + 1]."""
        if training:
            inputs = hide_ids(inputs, [self.item_id], self.id_dropout_fraction)
        vectors = self.mlp(self.encoder(inputs))
        return tf.concat([vectors, self.bias(inputs[self.item_id.id_name])], axis=-1)


def tower_features(query_features: Iterable[features.Feature]) -> list[features.Feature]:
    """The query features that the query tower reads: all but the user id."""
    return [f for f in query_features if f.name != features.USER_ID]


def hide_ids(
    inputs: Mapping[str, tf.Tensor], among: Iterable[features.Feature], fraction: float
) -> dict[str, tf.Tensor]:
    """Hides a random share of the ids of categorical features, so that unseen values are trained too.

    Args:
      inputs: transformed features by name.
      among: features to hide from; continuous ones are left alone.
      fraction: chance of each id, 0 to 1.

    Returns:
      A copy in which hidden ids are OOV_ID, and hidden entries of lists are padding.
    """
    outputs = dict(inputs)
    for feature in among:
        if feature.is_categorical and fraction > 0:
            ids = inputs[feature.id_name]
            hidden = tf.random.uniform(tf.shape(ids)) < fraction
            replacement = features.PADDING_ID if feature.is_list else features.OOV_ID
            outputs[feature.id_name] = tf.where(hidden, tf.constant(replacement, ids.dtype), ids)
    return outputs


def _mlp(hidden_layers: Sequence[int], output_dim: int) -> tf.keras.Sequential:
    layers = [tf.keras.layers.Dense(width, activation="relu") for width in hidden_layers]
    return tf.keras.Sequential([*layers, tf.keras.layers.Dense(output_dim)])
