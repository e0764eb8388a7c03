"""What a list of watched items says about the user: mean, attention pooling, or a causal transformer.

Letters: B = users, L = events, oldest first, W = width of an item's embedding.
"""

from __future__ import annotations

import math

import tensorflow as tf

from schema.errors import ConfigError
from trainer.config import HistoryConfig

_EPSILON = 1e-6


class MeanHistory(tf.keras.layers.Layer):
    """The mean of the watched items (Covington et al. 2016, section 3.2)."""

    def call(self, vectors: tf.Tensor, mask: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Item embeddings float32 [B, L, W] and mask bool [B, L] to float32 [B, W], zeros without history."""
        weights = tf.cast(mask, tf.float32)[..., tf.newaxis]
        return tf.reduce_sum(vectors * weights, axis=1) / tf.maximum(tf.reduce_sum(weights, axis=1), 1.0)


class AttentionHistory(tf.keras.layers.Layer):
    """A weighted mean; the weight depends on the item and on how many events ago it was watched.

    It starts as the plain mean. Source: self-attentive pooling, Lin et al., ICLR 2017, section 2.1.
    """

    def __init__(self, config: HistoryConfig, num_heads: int = 1, **kwargs: object) -> None:
        """Makes the layer.

        Args:
          config: `max_events`, the number of distinct positions.
          num_heads: weighted means per user; above 1, the result is [B, num_heads, W].
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.max_events = config.max_events
        self.hidden = tf.keras.layers.Dense(config.attention_width, activation="tanh")
        # Heads that start alike would stay alike.
        start = "zeros" if num_heads == 1 else "glorot_uniform"
        self.score = tf.keras.layers.Dense(num_heads, use_bias=False, kernel_initializer=start)
        self.recency = self.add_weight("recency", [config.max_events, num_heads], initializer="zeros")

    def call(self, vectors: tf.Tensor, mask: tf.Tensor, training: bool = False) -> tf.Tensor:
        """As `MeanHistory.call`; float32 [B, num_heads, W] with several heads."""
        events_ago = tf.cumsum(tf.cast(mask, tf.int32), axis=1, reverse=True, exclusive=True)
        events_ago = tf.minimum(events_ago, self.max_events - 1)
        logits = self.score(self.hidden(vectors)) + tf.gather(self.recency, events_ago)
        weights = tf.nn.softmax(tf.where(mask[..., tf.newaxis], logits, -1e9), axis=1)
        # Without any event the softmax is over padding.
        weights *= tf.cast(mask, tf.float32)[..., tf.newaxis]
        pooled = tf.einsum("blh,blw->bhw", weights, vectors)
        return pooled if self.num_heads > 1 else pooled[:, 0]


class CausalTransformer(tf.keras.layers.Layer):
    """A transformer in which an event sees itself and what came before it.

    Pre-normalised blocks with a learnt attention bias by distance in events and, where times are given, by
    the log of the distance in seconds. Sources: Kang and McAuley, ICDM 2018, section III (SASRec); the biases
    as in Zhai et al., ICML 2024, section 3 (HSTU).
    """

    def __init__(self, config: HistoryConfig, width: int, has_times: bool = False, **kwargs: object) -> None:
        """Makes the layer.

        Args:
          config: blocks, heads, dropout, and the number of distinct distances.
          width: W, a multiple of the number of heads.
          has_times: whether the layer is called with the times of the events.
          **kwargs: passed to the Keras layer.

        Raises:
          ConfigError: the width is no multiple of the number of heads.
        """
        super().__init__(**kwargs)
        if width % config.num_heads:
            raise ConfigError(
                f"retrieval.history.num_heads is {config.num_heads}, but the embeddings of items are {width} "
                "wide, which is no multiple of it; change num_heads, max_embedding_width or embedding_dim"
            )
        self.dropout = tf.keras.layers.Dropout(config.dropout_fraction)
        self.blocks = [_Block(config, width, has_times) for _ in range(config.num_blocks)]
        self.norm = tf.keras.layers.LayerNormalization(epsilon=_EPSILON)

    def call(self, vectors: tf.Tensor, times_s: tf.Tensor | None = None, training: bool = False) -> tf.Tensor:
        """Item embeddings float32 [B, L, W], padded on the right, to one vector per event, float32 [B, L, W].

        Args:
          vectors: item embeddings.
          times_s: int [B, L], event times in seconds, not decreasing, of a layer made for them; None where
            they are not known.
          training: whether dropout acts.
        """
        hidden = self.dropout(vectors * math.sqrt(vectors.shape[-1]), training=training)
        buckets = None if times_s is None else _time_buckets(times_s)
        for block in self.blocks:
            hidden = block(hidden, buckets, training=training)
        return self.norm(hidden)


# exp(64 / 3) seconds are decades.
_NUM_TIME_BUCKETS = 64
_TIME_BUCKETS_PER_E_FOLD = 3.0


def _time_buckets(times_s: tf.Tensor) -> tf.Tensor:
    """Bucket of the log of the distance in time of every two events: int32 [B, L, L]."""
    distance = tf.maximum(times_s[:, :, tf.newaxis] - times_s[:, tf.newaxis, :], 0)
    bucket = tf.math.log1p(tf.cast(distance, tf.float32)) * _TIME_BUCKETS_PER_E_FOLD
    return tf.minimum(tf.cast(bucket, tf.int32), _NUM_TIME_BUCKETS - 1)


class _Block(tf.keras.layers.Layer):
    """Self-attention and a two-layer network, each added to its input."""

    def __init__(self, config: HistoryConfig, width: int, has_times: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.max_events = config.max_events
        self.attention_norm = tf.keras.layers.LayerNormalization(epsilon=_EPSILON)
        self.network_norm = tf.keras.layers.LayerNormalization(epsilon=_EPSILON)
        self.projection = tf.keras.layers.Dense(3 * width, use_bias=False)
        self.merge = tf.keras.layers.Dense(width)
        self.network = tf.keras.Sequential(
            [tf.keras.layers.Dense(4 * width, activation="gelu"), tf.keras.layers.Dense(width)]
        )
        self.dropout = tf.keras.layers.Dropout(config.dropout_fraction)
        self.by_distance = self.add_weight(
            "by_distance", [config.max_events, self.num_heads], initializer="zeros"
        )
        if has_times:
            self.by_time = self.add_weight(
                "by_time", [_NUM_TIME_BUCKETS, self.num_heads], initializer="zeros"
            )

    def call(self, hidden: tf.Tensor, time_buckets: tf.Tensor | None, training: bool = False) -> tf.Tensor:
        attended = self._attend(self.attention_norm(hidden), time_buckets, training)
        hidden += self.dropout(attended, training=training)
        return hidden + self.dropout(self.network(self.network_norm(hidden)), training=training)

    def _attend(self, hidden: tf.Tensor, time_buckets: tf.Tensor | None, training: bool) -> tf.Tensor:
        batch, length, width = tf.shape(hidden)[0], tf.shape(hidden)[1], hidden.shape[-1]
        head_width = width // self.num_heads
        split = tf.reshape(self.projection(hidden), [batch, length, 3, self.num_heads, head_width])
        query, key, value = tf.unstack(tf.transpose(split, [2, 0, 3, 1, 4]), num=3)
        logits = tf.matmul(query, key, transpose_b=True) / math.sqrt(head_width)
        place = tf.range(length)
        distance = place[:, tf.newaxis] - place[tf.newaxis, :]
        bucket = tf.clip_by_value(distance, 0, self.max_events - 1)
        logits += tf.transpose(tf.gather(self.by_distance, bucket), [2, 0, 1])
        if time_buckets is not None:
            logits += tf.transpose(tf.gather(self.by_time, time_buckets), [0, 3, 1, 2])
        weights = tf.nn.softmax(tf.where(distance >= 0, logits, -1e9))
        attended = tf.matmul(self.dropout(weights, training=training), value)
        return self.merge(tf.reshape(tf.transpose(attended, [0, 2, 1, 3]), [batch, length, width]))


class TransformerHistory(tf.keras.layers.Layer):
    """A gate between what the user likes in the long run, the mean, and the latest events, a transformer."""

    def __init__(self, config: HistoryConfig, width: int, **kwargs: object) -> None:
        """Makes the layer; see `CausalTransformer`."""
        super().__init__(**kwargs)
        self.mean = MeanHistory()
        self.transformer = CausalTransformer(config, width)
        self.gate = tf.keras.layers.Dense(width, activation="sigmoid")

    def call(self, vectors: tf.Tensor, mask: tf.Tensor, training: bool = False) -> tf.Tensor:
        """As `MeanHistory.call`."""
        # Hidden events and padding leave gaps; the transformer wants the events side by side.
        order = tf.argsort(tf.cast(~mask, tf.int32), axis=1, stable=True)
        encoded = self.transformer(tf.gather(vectors, order, batch_dims=1), training=training)
        last = tf.reduce_sum(tf.cast(mask, tf.int32), axis=1) - 1
        # Zeros without history: the one-hot of -1 has no 1.
        latest = tf.einsum("bl,blw->bw", tf.one_hot(last, tf.shape(mask)[1]), encoded)
        mean = self.mean(vectors, mask)
        gate = self.gate(tf.concat([mean, latest], axis=1))
        return gate * latest + (1.0 - gate) * mean


def history_layer(config: HistoryConfig, width: int) -> tf.keras.layers.Layer:
    """The layer that the settings name: call(vectors [B, L, W], mask [B, L], training) to [B, W].

    With several interests, to [B, interests, W].
    """
    if config.interests > 1:
        return AttentionHistory(config, config.interests)
    if config.encoder == "mean":
        return MeanHistory()
    if config.encoder == "attention":
        return AttentionHistory(config)
    return TransformerHistory(config, width)
