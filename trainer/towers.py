"""The query tower and the candidate tower of the retrieval model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from schema.contract import FeatureKind
from schema.errors import ConfigError
from trainer import features
from trainer.config import RetrievalConfig
from trainer.encoder import EmbeddingTables, FeatureEncoder
from trainer.history import history_layer
from trainer.item_factors import ItemFactors

_ITEM_ID = features.Feature(features.ITEM_ID, FeatureKind.CATEGORICAL, features.ITEM_SPACE)
_HISTORY = features.Feature(features.HISTORY, FeatureKind.MULTI_CATEGORICAL, features.ITEM_SPACE)
# Of the history in the query vector, when item vectors start from co-occurrence: likeness to the history
# and popularity then weigh about the same before the first step.
_HISTORY_WEIGHT = 2.0


class QueryTower(tf.keras.layers.Layer):
    """Transformed query features -> query vector; its last dimension is 1, the factor of the item bias.

    The user id is not read: a user is what is known of them and what they watched (Covington et al. 2016,
    section 3). An embedding per user learns little from a few dozen watches, and nothing for new users.
    """

    def __init__(
        self,
        query_features: Sequence[features.Feature],
        tables: EmbeddingTables,
        config: RetrievalConfig,
        factors: ItemFactors | None = None,
        **kwargs: object,
    ) -> None:
        """Makes the tower.

        Args:
          query_features: what the tower reads, see `tower_features`.
          tables: embedding tables; the history shares the table of the candidates' item ids.
          config: of the model.
          factors: shared with the candidate tower; F of them, 0 when absent.
          **kwargs: passed to the Keras layer.

        Raises:
          ConfigError: there is no feature to read, or the width of the items' embeddings does not fit the
            settings of the history.
        """
        super().__init__(**kwargs)
        if not query_features:
            raise ConfigError("retrieval.ignored_features leaves the query tower nothing to read; name fewer")
        self.encoded = tuple(query_features)
        self.factors = factors
        self.dropout_fraction = config.query_dropout_fraction
        self.encoder = FeatureEncoder([f for f in self.encoded if f != _HISTORY], tables)
        self.history: tf.keras.layers.Layer | None = None
        self.history_weight: tf.Variable | None = None
        if _HISTORY in self.encoded:
            self.history = history_layer(config.history, tables.widths[features.ITEM_SPACE])
            if config.item_vectors == "cooccurrence":
                self.history_weight = self.add_weight(
                    "history_weight", [], initializer=tf.keras.initializers.Constant(_HISTORY_WEIGHT)
                )
        self.mlp = _mlp(config.hidden_layers, config.embedding_dim)

    def call(
        self, inputs: Mapping[str, tf.Tensor], training: bool = False, with_factors: bool = True
    ) -> tf.Tensor:
        """Encodes transformed query features [B] into float32 [B, F + embedding_dim + 1].

        With several interests, [B, interests, F + embedding_dim + 1].

        Args:
          inputs: transformed query features.
          training: whether ids are hidden.
          with_factors: whether the factors are among the dimensions; the loss leaves them out.
        """
        if training:
            inputs = hide_ids(inputs, self.encoded, self.dropout_fraction)
        parts = [self.encoder(inputs)] if self.encoder.encoded else []
        if self.history is None:
            vectors = self.mlp(parts[0])
        else:
            ids = inputs[_HISTORY.id_name]
            watched = self.encoder.tables(features.ITEM_SPACE, ids)
            history = self.history(watched, tf.not_equal(ids, features.PADDING_ID), training=training)
            if history.shape.rank == 3:
                parts = [tf.repeat(part[:, tf.newaxis, :], history.shape[1], axis=1) for part in parts]
            vectors = self.mlp(tf.concat([*parts, history], axis=-1))
            if self.history_weight is not None:
                vectors += self.history_weight * history
        ones = tf.ones_like(vectors[..., :1])
        if self.factors is None or not with_factors:
            return tf.concat([vectors, ones], axis=-1)
        factors = self.factors.of_history(inputs[_HISTORY.id_name])
        if vectors.shape.rank == 3:
            factors = tf.repeat(factors[:, tf.newaxis, :], vectors.shape[1], axis=1)
        return tf.concat([factors, vectors, ones], axis=-1)


class CandidateTower(tf.keras.layers.Layer):
    """Transformed candidate features -> candidate vector; its last dimension is the bias of the item.

    A new item has the out-of-vocabulary id: its vector comes from its content, its bias starts as that of an
    item that nobody chose, and both are trained on items whose id is hidden; `new_item_boost` is added when
    serving.
    """

    def __init__(
        self,
        candidate_features: Sequence[features.Feature],
        tables: EmbeddingTables,
        config: RetrievalConfig,
        initial_bias: np.ndarray,
        popularity: np.ndarray,
        factors: ItemFactors | None = None,
        **kwargs: object,
    ) -> None:
        """Makes the tower.

        Args:
          candidate_features: what the tower reads, see `tower_features`.
          tables: embedding tables, shared with the query tower.
          config: of the model.
          initial_bias: float [ids of the item vocabulary, padding and OOV included].
          popularity: float [ids, P], recency-weighted popularities at serving time; P may be 0.
          factors: shared with the query tower; F of them, 0 when absent.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.encoder = FeatureEncoder(candidate_features, tables)
        self.mlp = _mlp(config.hidden_layers, config.embedding_dim)
        self.factors = factors
        self.item_id = _ITEM_ID
        self.adds_item_vector = config.item_vectors == "cooccurrence"
        self.id_dropout_fraction = config.item_id_dropout_fraction
        self.new_item_boost = config.new_item_boost
        self.bias = tf.keras.layers.Embedding(
            len(initial_bias),
            1,
            embeddings_initializer=tf.keras.initializers.Constant(np.reshape(initial_bias, [-1, 1])),
            name="item_bias",
        )
        # A constant, as it comes from the data: training finds out how much each popularity counts.
        self.popularity = tf.constant(popularity, tf.float32)
        self.popularity_weights = self.add_weight(
            "popularity_weights",
            [popularity.shape[1]],
            initializer="zeros",
            trainable=popularity.shape[1] > 0,  # Keras warns of trained weights that no loss depends on
        )

    def call(
        self,
        inputs: Mapping[str, tf.Tensor],
        training: bool = False,
        with_popularity: bool = True,
        with_factors: bool = True,
    ) -> tf.Tensor:
        """Encodes transformed candidate features [B] into float32 [B, F + embedding_dim + 1].

        Args:
          inputs: transformed candidate features.
          training: whether ids are hidden.
          with_popularity: whether the bias counts the popularity at serving time, and the boost of new items;
            the loss counts the popularity of the example's day instead.
          with_factors: whether the factors are among the dimensions; the loss leaves them out.
        """
        if training:
            inputs = hide_ids(inputs, [self.item_id], self.id_dropout_fraction)
        ids = inputs[self.item_id.id_name]
        vectors = self.mlp(self.encoder(inputs))
        if self.adds_item_vector:
            vectors += self.encoder.tables(features.ITEM_SPACE, ids)
        bias = self.bias(ids)
        if with_popularity:
            bias += tf.linalg.matvec(tf.gather(self.popularity, ids), self.popularity_weights)[:, tf.newaxis]
            is_new = tf.cast(ids == features.OOV_ID, tf.float32)
            bias += self.new_item_boost * is_new[:, tf.newaxis]
        if self.factors is None or not with_factors:
            return tf.concat([vectors, bias], axis=-1)
        return tf.concat([self.factors.of_items(ids), vectors, bias], axis=-1)


def tower_features(
    candidates: Iterable[features.Feature], ignored: Iterable[str] = ()
) -> list[features.Feature]:
    """What a tower reads of the query or candidate features: all but the user id and those ignored."""
    unread = {features.USER_ID, *ignored}
    return [f for f in candidates if f.name not in unread]


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
