"""The pre-ranker: a small network on user and item vectors that stands between retrieval and the ranker.

It knows of a user and of an item what the ranker knows, but of the two together only their vectors. Those of
items are precomputed, that of the user is made once per request; what is left per pair is a few small matrix
products. It learns to order candidates as the ranker does, see `trainer.distillation`.

Letters: U = requests, N = candidates per request, I = items of the catalogue and one for unknown items; Q and
F = widths of what is known of a request and of an item; D = width of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer import raw_inputs
from trainer.bundle import Signature
from trainer.encoder import with_powers
from trainer.preranker_config import PrerankerConfig
from trainer.ranking import EncodedQuery, RankingModel
from trainer.ranking_export import CANDIDATES, IS_KNOWN, CatalogueRanker, ServedRanker
from trainer.served_index import K

# Impressions that stand for what a user without any would do, as in `trainer.impressions`.
_SMOOTHING = 2.0
# Standard deviations from the mean beyond which inputs are cut: what few requests had would rule all others.
_LARGEST_INPUT = 10.0


def describe_query(ranker: RankingModel, query: EncodedQuery) -> tf.Tensor:
    """What the ranker knows of a request, as one row.

    The ranker compares a candidate with every impression. Here the latest are summed up before any candidate
    is known: the sum of their embeddings, and the sums weighted by each label and by age, over their number.
    Since the product of such a sum with an item's vector is the sum of the products, it still tells whether
    the user liked what resembles the item.

    Args:
      ranker: trained; is not changed.
      query: from `ranker.encode_query`.

    Returns:
      float32 [U, Q].
    """
    shown = tf.cast(query.is_event, tf.float32)[..., tf.newaxis]
    number = tf.reduce_sum(shown, axis=1)
    weights = shown * tf.concat([tf.ones_like(shown), query.event_features], axis=-1)
    sums = tf.einsum("ulf,ulw->ufw", weights, query.events) / (number + _SMOOTHING)[..., tf.newaxis]
    means = tf.reduce_sum(weights[..., 1:], axis=1) / (number + _SMOOTHING)
    flat = tf.reshape(sums, [-1, sums.shape[1] * sums.shape[2]])
    return tf.concat([*query.parts, query.history, flat, means, tf.math.log1p(number)], axis=-1)


def describe_items(ranker: RankingModel, items: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """What the ranker knows of items, whoever asks: their encoded features, embedded keys, and counters.

    Args:
      ranker: trained; is not changed.
      items: transformed features of M items, see `catalogue_features`.

    Returns:
      float32 [M, F].
    """
    parts = ranker.item_encoder.encode(items)
    for feature in ranker.keys.values():
        ids = items[feature.id_name]
        parts.append(ranker.tables.mean(feature.space, ids if feature.is_list else ids[:, tf.newaxis]))
    return tf.concat([*parts, with_powers(items[ft.COUNTERS])], axis=-1)


def catalogue_features(
    ranker: CatalogueRanker, layer: Any, spec: DatasetSpec, event_time_unix_s: int
) -> dict[str, tf.Tensor]:
    """All that the ranker reads of a candidate, for every item at one moment.

    Args:
      ranker: holds the catalogue.
      layer: `trainer.transform_graph.TransformGraph`.
      spec: the declaration of the dataset.
      event_time_unix_s: the moment that the age of items is as of; that of the counters is the end of
        training.

    Returns:
      [I, ...] by transformed name, the last row for any item outside the catalogue.
    """
    items = ranker.features
    if ft.feature_space(spec).cross:
        upload_time = tf.convert_to_tensor(ranker.upload_time_unix_s)
        moment = tf.fill(tf.shape(upload_time), tf.constant(event_time_unix_s, tf.int64))
        items = items | raw_inputs.transform_cross(layer, moment, upload_time, spec)
    return items


class Standardisation(tf.keras.layers.Layer):
    """Inputs less their mean, over their standard deviation; an input that never varied is left out."""

    def __init__(self, width: int, **kwargs: object) -> None:
        """Makes the layer, which leaves all inputs out until it is fitted.

        Args:
          width: of the inputs.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self.mean = self.add_weight("mean", [width], initializer="zeros", trainable=False)
        self.factor = self.add_weight("factor", [width], initializer="zeros", trainable=False)

    def fit(self, rows: tf.Tensor) -> None:
        """Sets mean and standard deviation to those of float32 [M, width]."""
        mean, variance = tf.nn.moments(tf.cast(rows, tf.float64), axes=[0])
        # Rounding makes a constant column vary a little.
        varies = variance > tf.maximum(1e-10, 1e-10 * tf.square(mean))
        self.mean.assign(tf.cast(mean, tf.float32))
        factor = tf.where(varies, tf.math.rsqrt(tf.where(varies, variance, 1.0)), 0.0)
        self.factor.assign(tf.cast(factor, tf.float32))

    def call(self, rows: tf.Tensor) -> tf.Tensor:
        """Standardised rows, float32 [..., width]."""
        return tf.clip_by_value((rows - self.mean) * self.factor, -_LARGEST_INPUT, _LARGEST_INPUT)


class PreRanker(tf.keras.Model):
    """A user vector u, an item vector v, and a network on [u, v, u ⊙ v]; its output only orders candidates.

    The vectors are made by a tower each, of one hidden layer. The first layer of the network, with kernel
    [K1, K2, K3] and bias b, is taken apart: [u, v, u ⊙ v] K + b = (u K1 + b) + v (K2 + diag(u) K3). The two
    brackets are the same for all candidates of a request, so that a pair costs one product with v instead of
    one with three vectors, and nothing but v is kept of an item.

    Wang et al. (COLD, arXiv:2007.16122) argue for a network that crosses features at this stage, where an
    inner product of two vectors had been usual.
    """

    def __init__(self, query_width: int, item_width: int, config: PrerankerConfig) -> None:
        """Makes an untrained pre-ranker.

        Args:
          query_width: Q, of `describe_query`.
          item_width: F, of `describe_items`.
          config: sizes.
        """
        super().__init__()
        self.query_inputs = Standardisation(query_width)
        self.item_inputs = Standardisation(item_width)
        self.user_tower = _network(query_width, [config.tower_width], config.vector_width)
        self.item_tower = _network(item_width, [config.tower_width], config.vector_width)
        first, *further = config.hidden_layers
        self.kernel = self.add_weight("kernel", [3 * config.vector_width, first])
        self.bias = self.add_weight("bias", [first], initializer="zeros")
        self.network = _network(first, further, 1)

    def user_vectors(self, queries: tf.Tensor) -> tf.Tensor:
        """The vectors of requests, float32 [U, Q] to [U, D]; see `describe_query`."""
        return self.user_tower(self.query_inputs(queries))

    def item_vectors(self, items: tf.Tensor) -> tf.Tensor:
        """The vectors of items, float32 [M, F] to [M, D]; see `describe_items`."""
        return self.item_tower(self.item_inputs(items))

    def score_pairs(self, users: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """The scores of each request's candidates: users float32 [U, D], items [U, N, D] to [U, N]."""
        by_user, by_item, by_product = tf.split(self.kernel, 3)
        of_user = tf.matmul(users, by_user) + self.bias
        of_pair = tf.matmul(items, by_item + users[..., tf.newaxis] * by_product)
        hidden = tf.nn.relu(of_user[:, tf.newaxis] + of_pair)
        scores = self.network(tf.reshape(hidden, [-1, self.kernel.shape[1]]))
        return tf.reshape(scores, tf.shape(items)[:2])

    def precompute(self, items: tf.Tensor, batch_size: int = 65_536) -> tf.Tensor:
        """The vectors of a whole catalogue, piece by piece: float32 [I, F] to [I, D]."""
        pieces = [items[start : start + batch_size] for start in range(0, items.shape[0], batch_size)]
        return tf.concat([self.item_vectors(piece) for piece in pieces], axis=0)

    def score(self, users: tf.Tensor, item_vectors: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """The scores of candidates by their rows.

        Args:
          users: float32 [U, D], from `user_vectors`.
          item_vectors: float32 [I, D], from `precompute`.
          rows: int [U, N].

        Returns:
          float32 [U, N]; the higher, the better. The unit has no meaning.
        """
        return self.score_pairs(users, tf.gather(item_vectors, rows))


def _network(input_width: int, hidden_layers: Sequence[int], output_width: int) -> tf.keras.Sequential:
    layers = [tf.keras.layers.Dense(width, activation="relu") for width in hidden_layers]
    network = tf.keras.Sequential([*layers, tf.keras.layers.Dense(output_width)])
    network.build([None, input_width])
    return network


class PreRanking(NamedTuple):
    """What cuts the candidates before the ranker.

    Attributes:
      student: distilled from the ranker.
      event_time_unix_s: the moment that the age of items is as of, see `catalogue_features`.
      num_kept: see `PrerankerConfig`.
    """

    student: PreRanker
    event_time_unix_s: int
    num_kept: int


class CataloguePreRanker(tf.Module):
    """The pre-ranker over the items of a catalogue, which it knows by their rows."""

    def __init__(
        self, preranking: PreRanking, ranker: CatalogueRanker, layer: Any, spec: DatasetSpec
    ) -> None:
        """Computes the vectors of the catalogue.

        Args:
          preranking: the pre-ranker.
          ranker: over the catalogue.
          layer: `trainer.transform_graph.TransformGraph`.
          spec: the declaration of the dataset.
        """
        super().__init__()
        student = preranking.student
        self.ranker = ranker
        # A closure keeps the Keras model out of the object graph that is saved; its weights are in it.
        self._student: Callable[[], PreRanker] = lambda: student
        self.weights = student.weights
        items = catalogue_features(ranker, layer, spec, preranking.event_time_unix_s)
        vectors = student.precompute(describe_items(ranker.model, items))
        self.item_vectors = tf.Variable(vectors, trainable=False, name="preranker_item_vectors")

    def score(self, query: EncodedQuery, rows: tf.Tensor) -> tf.Tensor:
        """Scores of items by their rows, int [U, N]: float32 [U, N]; the higher, the better."""
        student = self._student()
        users = student.user_vectors(describe_query(self.ranker.model, query))
        return student.score(users, self.item_vectors, rows)


class ServedPreRanker(tf.Module):
    """The signature of the pre-ranker inside the exported ranker, and the variables that it reads."""

    def __init__(self, preranking: PreRanking, served: ServedRanker, layer: Any, spec: DatasetSpec) -> None:
        """Computes the vectors of the catalogue; arguments as of `CataloguePreRanker`."""
        super().__init__()
        self._num_kept = preranking.num_kept
        self._spec = spec
        self._layer: Callable[[], Any] = lambda: layer
        self.preranker = CataloguePreRanker(preranking, served.ranker, layer, spec)
        self.ranker = served.ranker
        self.rows = served.rows

    def pre_rank(
        self, raw: Mapping[str, tf.Tensor], candidate_item_ids: tf.Tensor, k: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """The best k of the candidates of each of B requests.

        Args:
          raw: raw query features and impressions, see `raw_inputs.ranking_signature`.
          candidate_item_ids: string [B, N]; "" is padding. An id that stands there several times is
            returned once; one outside the catalogue is judged by what unknown items have in common.
          k: int32 [B], items wanted.

        Returns:
          `item_ids` string, `scores` float32 and `item_is_known` int64 (0 or 1), [B, min(max k, N)]: the best
          first; "", 0 and 0 where a request asked for less or has less. `num_kept` int64 [B]: how many
          the ranker should score, whatever k is.

        Raises:
          InvalidArgumentError: a k is below 1.
        """
        check = tf.debugging.assert_positive(k, "k, the number of items wanted, must be at least 1")
        with tf.control_dependencies([check]):
            longest = tf.minimum(tf.maximum(tf.reduce_max(k), 0), tf.shape(candidate_item_ids)[1])
        features = raw_inputs.transform_request(self._layer(), raw, self._spec)
        rows = self.rows.lookup(candidate_item_ids)
        scores = self.preranker.score(self.ranker.model.encode_query(features), rows)
        eligible = tf.not_equal(candidate_item_ids, "") & _is_first(candidate_item_ids)
        best, places = tf.math.top_k(tf.where(eligible, scores, -np.inf), longest)
        chosen = (best > -np.inf) & (tf.range(longest) < k[:, tf.newaxis])
        is_known = tf.cast(tf.gather(rows, places, batch_dims=1) < self.ranker.num_items, tf.int64)
        return {
            "item_ids": tf.where(chosen, tf.gather(candidate_item_ids, places, batch_dims=1), ""),
            "scores": tf.where(chosen, best, 0.0),
            IS_KNOWN: tf.where(chosen, is_known, 0),
            "num_kept": tf.fill(tf.shape(k), tf.constant(self._num_kept, tf.int64)),
        }

    def signature(self) -> Signature:
        """`pre_rank`, as documented in docs/pre-ranking.md."""
        request = raw_inputs.ranking_signature(self._spec)
        request[CANDIDATES] = tf.TensorSpec([None, None], tf.string, name=CANDIDATES)
        request[K] = tf.TensorSpec([None], tf.int32, name=K)
        return Signature(lambda raw: self.pre_rank(raw, raw[CANDIDATES], raw[K]), request)


def _is_first(ids: tf.Tensor) -> tf.Tensor:
    """Whether no earlier place of the same row holds the same id: string [B, N] to bool [B, N]."""
    number = tf.size(ids)
    codes = tf.reshape(tf.unique(tf.reshape(ids, [-1])).idx, tf.shape(ids))
    # The same id in two rows is two groups.
    offsets = tf.range(tf.shape(ids)[0], dtype=tf.int64)[:, tf.newaxis] * tf.cast(number, tf.int64)
    groups = tf.unique(tf.reshape(tf.cast(codes, tf.int64) + offsets, [-1])).idx
    places = tf.range(number)
    first = tf.math.unsorted_segment_min(places, groups, number)
    return tf.reshape(tf.equal(tf.gather(first, groups), places), tf.shape(ids))
