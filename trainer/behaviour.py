"""What the user's history says about a candidate: mean, target attention (DIN), or a transformer.

Every layer has two forms of the same function:

- `layer(candidate, events, mask, event_features, training)` for rows: one candidate and one history each;
- `layer.match(candidates, events, mask, event_features, training)` for requests: N candidates of one history
  each. What depends on the history alone is computed once per user, and events are not repeated in memory.

Letters: B = rows, U = users, N = candidates per user, L = events, oldest first, W = width of an item's
embedding, F = width of what else is known of an event, for instance embeddings of its label and its age.
"""

from __future__ import annotations

import math

import tensorflow as tf

from schema.errors import ConfigError
from trainer.body_config import BehaviourConfig
from trainer.history import MeanHistory

_EPSILON = 1e-6


class _Behaviour(tf.keras.layers.Layer):
    """A layer over the latest `max_events` events.

    Attributes:
      reads_candidates: whether what it says depends on the candidate.
    """

    reads_candidates = True

    def __init__(self, config: BehaviourConfig, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.max_events = config.max_events

    def call(
        self,
        candidate: tf.Tensor,
        events: tf.Tensor,
        mask: tf.Tensor,
        event_features: tf.Tensor | None = None,
        training: bool = False,
    ) -> tf.Tensor:
        """Matches every row's candidate with its history.

        Args:
          candidate: float32 [B, W], item embeddings.
          events: float32 [B, L, W], embeddings of the items watched.
          mask: bool [B, L], where there is an event; gaps and padding on either side are fine.
          event_features: float32 [B, L, F], or None; always given or never.
          training: whether dropout acts.

        Returns:
          float32 [B, W]; zeros without history.
        """
        candidates = candidate[:, tf.newaxis]
        return tf.squeeze(self.match(candidates, events, mask, event_features, training), axis=1)

    def match(
        self,
        candidates: tf.Tensor,
        events: tf.Tensor,
        mask: tf.Tensor,
        event_features: tf.Tensor | None = None,
        training: bool = False,
    ) -> tf.Tensor:
        """As `call`, for N candidates per history.

        Args:
          candidates: float32 [U, N, W].
          events: float32 [U, L, W].
          mask: bool [U, L].
          event_features: float32 [U, L, F], or None.
          training: whether dropout acts.

        Returns:
          float32 [U, N, W]; zeros for users without history. [U, 1, W] where candidates are not read.
        """
        events, mask, event_features = self._latest(events, mask, event_features)
        return self._match(candidates, events, mask, event_features, training)

    def _match(
        self,
        candidates: tf.Tensor,
        events: tf.Tensor,
        mask: tf.Tensor,
        event_features: tf.Tensor | None,
        training: bool,
    ) -> tf.Tensor:
        raise NotImplementedError

    def _latest(
        self, events: tf.Tensor, mask: tf.Tensor, event_features: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
        if mask.shape[1] is not None and mask.shape[1] <= self.max_events:
            return events, mask, event_features
        # Padding first, then events in their order: the latest stand at the end.
        order = tf.argsort(tf.cast(mask, tf.int32), axis=1, stable=True)[:, -self.max_events :]
        events, mask = tf.gather(events, order, batch_dims=1), tf.gather(mask, order, batch_dims=1)
        if event_features is not None:
            event_features = tf.gather(event_features, order, batch_dims=1)
        return events, mask, event_features


class MeanBehaviour(_Behaviour):
    """The mean of the events; reads neither candidates nor `event_features`."""

    reads_candidates = False

    def __init__(self, config: BehaviourConfig, **kwargs: object) -> None:
        """Makes the layer; see `BehaviourConfig`."""
        super().__init__(config, **kwargs)
        self.mean = MeanHistory()

    def _match(
        self,
        candidates: tf.Tensor,
        events: tf.Tensor,
        mask: tf.Tensor,
        event_features: tf.Tensor | None,
        training: bool,
    ) -> tf.Tensor:
        return self.mean(events, mask)[:, tf.newaxis]


class TargetAttention(_Behaviour):
    """A sum of the events h, each weighted by a network over [h, c, h - c, h ⊙ c] for the candidate c.

    The weights are not normalised, so that the length of the result tells how much of the history goes with
    the candidate; it starts close to the plain sum. With `softmax` it is a weighted mean. The network also
    reads `event_features`.

    Source: Zhou et al., KDD 2018 (DIN), section 4.3; the inputs of the network as in the authors' code.
    """

    def __init__(self, config: BehaviourConfig, width: int, **kwargs: object) -> None:
        """Makes the layer.

        Args:
          config: `attention_layers`, `softmax`, `max_events`.
          width: W.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(config, **kwargs)
        self.softmax = config.softmax
        first, *further = config.attention_layers
        self.kernel = self.add_weight("kernel", [4 * width, first], initializer="glorot_uniform")
        self.bias = self.add_weight("bias", [first], initializer="zeros")
        self.feature_layer = tf.keras.layers.Dense(first, use_bias=False)
        self.further_layers = [tf.keras.layers.Dense(units, activation="relu") for units in further]
        # A softmax does not feel a bias.
        self.score = tf.keras.layers.Dense(1, use_bias=not config.softmax, bias_initializer="ones")

    def _match(
        self,
        candidates: tf.Tensor,
        events: tf.Tensor,
        mask: tf.Tensor,
        event_features: tf.Tensor | None,
        training: bool,
    ) -> tf.Tensor:
        # The first layer taken apart: [h, c, h - c, h ⊙ c] K = h (K1 + K3) + c (K2 - K3) + h (diag(c) K4).
        # Only the last product is over pairs, and it needs no copy of h for each candidate.
        by_event, by_candidate, by_difference, by_product = tf.split(self.kernel, 4)
        of_event = tf.tensordot(events, by_event + by_difference, 1) + self.bias
        if event_features is not None:
            of_event += self.feature_layer(event_features)
        of_candidate = tf.tensordot(candidates, by_candidate - by_difference, 1)
        of_pair = tf.matmul(events[:, tf.newaxis], candidates[..., tf.newaxis] * by_product)
        hidden = tf.nn.relu(of_event[:, tf.newaxis] + of_candidate[:, :, tf.newaxis] + of_pair)
        for layer in self.further_layers:
            hidden = layer(hidden)
        weights = tf.squeeze(self.score(hidden), axis=-1)
        is_event = mask[:, tf.newaxis]
        if self.softmax:
            weights = tf.nn.softmax(tf.where(is_event, weights, -1e9))
        # Also after the softmax: without any event it is over padding.
        return tf.matmul(tf.where(is_event, weights, 0.0), events)


class SessionTransformer(_Behaviour):
    """The state of the candidate at the end of the user's sequence, after blocks of self-attention.

    Item embeddings, embeddings of the place counted back from the candidate, and `event_features` are summed.
    The candidate attends to the events and to itself; an event attends to itself and those before it, or to
    all events, never to the candidate: so the events' states are the same for all candidates of a user.

    Source: Chen et al., DLP-KDD 2019 (BST), section 2. There events attend to the candidate too, and the
    states of all places are read, not only the candidate's.
    """

    def __init__(self, config: BehaviourConfig, width: int, **kwargs: object) -> None:
        """Makes the layer.

        Args:
          config: `causal`, `num_blocks`, `num_heads`, `dropout_fraction`, `max_events`.
          width: W, a multiple of the number of heads.
          **kwargs: passed to the Keras layer.

        Raises:
          ConfigError: the width is no multiple of the number of heads.
        """
        super().__init__(config, **kwargs)
        if width % config.num_heads:
            raise ConfigError(
                f"behaviour.num_heads is {config.num_heads}, but the embeddings of items are {width} wide, "
                "which is no multiple of it; change num_heads or max_embedding_width"
            )
        self.causal = config.causal
        # Row 0 is the candidate's.
        self.places = self.add_weight("places", [config.max_events + 1, width], initializer="uniform")
        self.feature_layer = tf.keras.layers.Dense(width, use_bias=False)
        self.dropout = tf.keras.layers.Dropout(config.dropout_fraction)
        self.input_norm = tf.keras.layers.LayerNormalization(epsilon=_EPSILON)
        self.blocks = [_Block(config, width) for _ in range(config.num_blocks)]
        self.output_norm = tf.keras.layers.LayerNormalization(epsilon=_EPSILON)

    def _match(
        self,
        candidates: tf.Tensor,
        events: tf.Tensor,
        mask: tf.Tensor,
        event_features: tf.Tensor | None,
        training: bool,
    ) -> tf.Tensor:
        events_ago = tf.cumsum(tf.cast(mask, tf.int32), axis=1, reverse=True)
        placed = events + tf.gather(self.places, events_ago)
        if event_features is not None:
            placed += self.feature_layer(event_features)
        events = self.dropout(self.input_norm(placed), training=training)
        states = self.dropout(self.input_norm(candidates + self.places[0]), training=training)

        visible = mask[:, tf.newaxis, :]
        if self.causal:
            place = tf.range(tf.shape(mask)[1])
            visible = tf.logical_and(visible, place[:, tf.newaxis] >= place)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            states, events = block(states, events, mask, visible, is_last=number == last, training=training)
        has_history = tf.reduce_any(mask, axis=1)[:, tf.newaxis, tf.newaxis]
        return tf.where(has_history, self.output_norm(states), 0.0)


class _Block(tf.keras.layers.Layer):
    """Pre-normalised attention and a two-layer network, for events and candidates with the same weights."""

    def __init__(self, config: BehaviourConfig, width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_width = width // config.num_heads
        self.attention_norm = tf.keras.layers.LayerNormalization(epsilon=_EPSILON)
        self.network_norm = tf.keras.layers.LayerNormalization(epsilon=_EPSILON)
        self.projection = tf.keras.layers.Dense(3 * width, use_bias=False)
        self.merge = tf.keras.layers.Dense(width)
        self.network = tf.keras.Sequential(
            [tf.keras.layers.Dense(4 * width, activation="gelu"), tf.keras.layers.Dense(width)]
        )
        self.dropout = tf.keras.layers.Dropout(config.dropout_fraction)

    def call(
        self,
        candidates: tf.Tensor,
        events: tf.Tensor,
        mask: tf.Tensor,
        visible: tf.Tensor,
        is_last: bool,
        training: bool = False,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """States of candidates [U, N, W] and events [U, L, W] to the next ones.

        Args:
          candidates: float32.
          events: float32.
          mask: bool [U, L], the events that candidates see.
          visible: bool [U, 1 or L, L], the events (last axis) that an event sees.
          is_last: whether nobody reads the events after this block; they are then left as they are.
          training: whether dropout acts.
        """
        query, own_key, own_value = self._heads(candidates)
        event_query, key, value = self._heads(events)
        scale = 1.0 / math.sqrt(self.head_width)
        logits = tf.where(mask[:, tf.newaxis, tf.newaxis], tf.matmul(query, key, transpose_b=True), -1e9)
        own_logit = tf.reduce_sum(query * own_key, axis=-1, keepdims=True)
        weights = tf.nn.softmax(tf.concat([logits, own_logit], axis=-1) * scale)
        weights = self.dropout(weights, training=training)
        attended = tf.matmul(weights[..., :-1], value) + weights[..., -1:] * own_value
        candidates = self._add(candidates, attended, training)
        if is_last:
            return candidates, events
        logits = tf.matmul(event_query, key, transpose_b=True) * scale
        weights = tf.nn.softmax(tf.where(visible[:, tf.newaxis], logits, -1e9))
        attended = tf.matmul(self.dropout(weights, training=training), value)
        return candidates, self._add(events, attended, training)

    def _heads(self, states: tf.Tensor) -> list[tf.Tensor]:
        """Query, key and value of each state: [U, S, W] to three [U, heads, S, W / heads]."""
        projected = self.projection(self.attention_norm(states))
        shape = [tf.shape(states)[0], tf.shape(states)[1], 3, self.num_heads, self.head_width]
        return tf.unstack(tf.transpose(tf.reshape(projected, shape), [2, 0, 3, 1, 4]), num=3)

    def _add(self, states: tf.Tensor, attended: tf.Tensor, training: bool) -> tf.Tensor:
        merged = self.merge(tf.reshape(tf.transpose(attended, [0, 2, 1, 3]), tf.shape(states)))
        states += self.dropout(merged, training=training)
        return states + self.dropout(self.network(self.network_norm(states)), training=training)


def behaviour(config: BehaviourConfig, width: int) -> tf.keras.layers.Layer:
    """The layer that the settings name, with `call` and `match`, for item embeddings `width` wide.

    Raises:
      ConfigError: a transformer's width is no multiple of its number of heads.
    """
    if config.kind == "mean":
        return MeanBehaviour(config)
    return TargetAttention(config, width) if config.kind == "din" else SessionTransformer(config, width)
