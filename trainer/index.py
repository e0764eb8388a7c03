"""Search for the best items: ScaNN and exact search behind one interface, with restrictions per request.

Letters: B = queries, M = vectors of a query, D = width of a vector, I = items, N = items found per query.

A query is one vector, [B, D], or several, [B, M, D] (Cen et al., KDD 2020, ComiRec): an item's score is its
largest dot product with any of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import scann
import tensorflow as tf
from scann.scann_ops.py import scann_ops

from trainer.allow_lists import AllowLists

# Padding among catalogue rows: no item found, or nothing to exclude.
NO_ROW = -1
# How many scores of a batch may exist at a time in exact search.
_MAX_SCORES = 1 << 24
# Where they are more, items are scored in chunks. The vectors of a chunk are copied unless they are a
# multiple of 64 bytes wide, which 128 dimensions and a bias are not; and memory of more than 32 MB is asked
# of the kernel anew each time, page by page, which takes longer than scoring does.
_MAX_CHUNK_BYTES = 1 << 24
_MIN_CHUNK_ITEMS = 4_096
# At the same budget 0.2 finds more of the best than the library's default (off); Guo et al., ICML 2020.
_ANISOTROPIC_THRESHOLD = 0.2
# How much more an error along an item's vector, which changes its scores, weighs than one across it where
# leaves get their centroids. At one effort 1.5 finds .9426 instead of .9271 of the top 100 among 200,000
# clustered vectors of width 128. 4 finds .9543, but up to .02 less among KuaiRand's items.
PARTITION_AVQ = 1.5
# For the same recall 1 compares twice as many codes, and 4 reorders over twice as many candidates: 2 cost
# least at recall 0.95 to 0.98 of the top 100 among 200,000 vectors of width 128.
DIMENSIONS_PER_BLOCK = 2
# How much more than the wanted items ScaNN is asked for, at most, before a restricted request is searched
# exactly.
_MAX_OVERFETCH = 16
# By so many standard deviations fewer items may pass an allow-list than are expected to.
_SPREAD = 3.0
# Attributes of ScaNN's state, in the order in which it is made of them.
_STATE_TENSORS = (
    "scann_config", "serialized_partitioner", "datapoint_to_token", "ah_codebook", "hashed_dataset",
    "int8_dataset", "int8_multipliers", "dp_norms", "dataset",
)  # fmt: skip


class Index(Protocol):
    """What both indexes can do."""

    @property
    def num_items(self) -> int:
        """Items that are indexed."""
        ...

    def search(self, queries: tf.Tensor, num_neighbors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds the items with the largest scores.

        Args:
          queries: float32 [B, D] or [B, M, D].
          num_neighbors: int32 scalar, at least 1; more than there are items means all items.

        Returns:
          Distinct catalogue rows int32 [B, N] (NO_ROW where fewer were found) and scores float32 [B, N], best
          first, NO_ROW last; N <= num_neighbors.
        """
        ...


class ExactIndex(tf.Module):
    """Scores every item, with stock TensorFlow operations on any device.

    Where a batch has too many scores to keep, a chunk of the items is scored at a time and only its best are
    kept, so that memory does not grow with the catalogue.
    """

    def __init__(self, vectors: np.ndarray | tf.Variable) -> None:
        """Makes the index.

        Args:
          vectors: float32 [I, D], one row per item; a variable is shared, not copied.
        """
        super().__init__()
        shared = isinstance(vectors, tf.Variable)
        self.vectors = vectors if shared else tf.Variable(vectors, trainable=False, dtype=tf.float32)

    @property
    def num_items(self) -> int:
        """See `Index.num_items`."""
        return int(self.vectors.shape[0])

    def search(
        self,
        queries: tf.Tensor,
        num_neighbors: tf.Tensor,
        restrict: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None,
        values_per_score: tf.Tensor | int = 1,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Index.search`.

        Args:
          queries: float32 [B, D] or [B, M, D].
          num_neighbors: int32 scalar.
          restrict: scores float32 [B, C] and the catalogue rows int32 [C] that they are of -> scores, -inf
            where an item must not be found.
          values_per_score: how many values `restrict` keeps for each score while it works.
        """
        num_queries = tf.shape(queries)[0]
        wanted = tf.minimum(num_neighbors, self.num_items)
        width = self.vectors.shape[1]
        affordable = _MAX_SCORES // tf.maximum(1, tf.size(queries) // width * values_per_score)
        most = max(_MIN_CHUNK_ITEMS, _MAX_CHUNK_BYTES // (4 * width))
        # All items or none of them, by operations whose small integers stay on the CPU beside a GPU.
        whole = tf.minimum(affordable, self.num_items) // self.num_items * self.num_items
        chunk_items = tf.maximum(whole, tf.clip_by_value(affordable, _MIN_CHUNK_ITEMS, most))

        def merge_chunk(
            start: tf.Tensor, rows: tf.Tensor, best: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            stop = tf.minimum(start + chunk_items, self.num_items)
            scores = _score(queries, self.vectors[start:stop])
            if restrict is not None:
                scores = restrict(scores, tf.range(start, stop))
            chunk_best, chunk_rows = tf.math.top_k(scores, tf.minimum(wanted, stop - start))
            best = tf.concat([best, chunk_best], axis=1)
            rows = tf.concat([rows, chunk_rows + start], axis=1)
            # top_k is stable: of equal scores the item that comes first in the catalogue stays first.
            best, order = tf.math.top_k(best, tf.minimum(wanted, tf.shape(best)[1]))
            return stop, tf.gather(rows, order, batch_dims=1), best

        nothing = (tf.constant(0), tf.zeros([num_queries, 0], tf.int32), tf.zeros([num_queries, 0]))
        _, rows, best = tf.while_loop(
            lambda start, rows, best: start < self.num_items,
            merge_chunk,
            nothing,
            shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None]), tf.TensorShape([None, None])),
            parallel_iterations=1,
        )
        return tf.where(tf.math.is_finite(best), rows, NO_ROW), best


def _score(queries: tf.Tensor, vectors: tf.Tensor) -> tf.Tensor:
    """Largest dot product of each query, [B, D] or [B, M, D], with each of the vectors [C, D]: [B, C]."""
    if len(queries.shape) == 2:
        return tf.matmul(queries, vectors, transpose_b=True)
    return tf.reduce_max(tf.einsum("bmd,cd->bmc", queries, vectors), axis=1)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How hard ScaNN searches for up to k neighbours; names are those of the library."""

    k: int
    num_leaves_to_search: int
    num_reordering_candidates: int


class ExactItems(tf.Module):
    """Items that a search scores exactly beside those that ScaNN finds.

    ScaNN's codes fit most items. A few that are unlike the others, as known ones among very many new ones, it
    may not find however hard it searches.

    Letters: R = these items.
    """

    def __init__(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Copies their vectors.

        Args:
          rows: int32 [R], catalogue rows, each once.
          vectors: float32 [I, D], of all items.
        """
        super().__init__()
        self.rows = tf.Variable(rows, trainable=False, dtype=tf.int32)
        self.vectors = tf.Variable(vectors[rows], trainable=False, dtype=tf.float32)
        self.is_among = tf.Variable(np.isin(np.arange(len(vectors)), rows), trainable=False)

    @property
    def num_items(self) -> int:
        """R."""
        return int(self.rows.shape[0])

    def join(
        self, queries: tf.Tensor, rows: tf.Tensor, scores: tf.Tensor, num_neighbors: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The best of these items and of what ScaNN found.

        Args:
          queries: float32 [B, D].
          rows: int32 [B, N], found by ScaNN; NO_ROW for nothing.
          scores: float32 [B, N].
          num_neighbors: int32 scalar.

        Returns:
          As `Index.search`.
        """
        is_repeated = tf.gather(tf.convert_to_tensor(self.is_among), tf.maximum(rows, 0))
        scores = tf.where(is_repeated, -math.inf, scores)
        scores = tf.concat([scores, tf.matmul(queries, self.vectors, transpose_b=True)], axis=1)
        own = tf.broadcast_to(self.rows, [tf.shape(queries)[0], self.num_items])
        best, order = tf.math.top_k(scores, tf.minimum(num_neighbors, tf.shape(scores)[1]))
        rows = tf.gather(tf.concat([rows, own], axis=1), order, batch_dims=1)
        return tf.where(tf.math.is_finite(best), rows, NO_ROW), best


class ScannIndex(tf.Module):
    """Approximate search by ScaNN's TensorFlow operations, which run on the CPU only.

    Attributes:
      num_leaves: parts that the items are divided into; 0 = none: every item is scored exactly.
      efforts: by ascending k. A search takes the first whose k is enough; beyond the last k the effort grows
        in proportion.
      exact_items: items that every search scores exactly beside those that ScaNN finds; None = none.
    """

    def __init__(self, state: Any, num_leaves: int, efforts: Sequence[Effort] = ()) -> None:
        """Takes a built index; `build` and `restore` make one.

        Args:
          state: ScaNN's own module of its tensors.
          num_leaves: see above.
          efforts: see above; must be set before `search`.
        """
        super().__init__()
        self.state = state
        self.num_leaves = num_leaves
        self.efforts = efforts
        self.exact_items: ExactItems | None = None

    @classmethod
    def build(cls, vectors: np.ndarray, num_leaves: int) -> ScannIndex:
        """Trains the index on the vectors, float32 [I, D], one row per item; without efforts."""
        # The ones stand for defaults that are never used: every search passes its own numbers.
        builder = scann.scann_ops.builder(vectors, 1, "dot_product")
        if num_leaves == 0:
            builder = builder.score_brute_force()
        else:
            builder = (
                builder.tree(num_leaves, 1, avq=PARTITION_AVQ)
                .score_ah(DIMENSIONS_PER_BLOCK, anisotropic_quantization_threshold=_ANISOTROPIC_THRESHOLD)
                .reorder(1)
            )
        return cls(builder.build().serialize_to_module(), num_leaves)

    @classmethod
    def restore(cls, saved: Any, num_leaves: int, efforts: Sequence[Effort]) -> ScannIndex:
        """An index from the state that a loaded SavedModel holds: the same index, not one trained anew."""
        tensors = [getattr(saved, name).read_value() for name in _STATE_TENSORS]
        return cls(scann_ops.ScannState(tensors), num_leaves, efforts)

    @property
    def vectors(self) -> tf.Variable:
        """The item vectors float32 [I, D] that reordering reads."""
        return self.state.dataset

    @property
    def num_items(self) -> int:
        """See `Index.num_items`."""
        return int(self.vectors.shape[0])

    def search(self, queries: tf.Tensor, num_neighbors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Index.search`."""
        ks, leaves, candidates = (
            tf.constant(column) for column in zip(*map(dataclasses.astuple, self.efforts), strict=True)
        )
        level = tf.reduce_sum(tf.cast(ks[:-1] < num_neighbors, tf.int32))
        growth = tf.maximum(1.0, tf.cast(num_neighbors, tf.float32) / tf.cast(ks[-1], tf.float32))

        def grown(values: tf.Tensor, largest: int) -> tf.Tensor:
            effort = tf.math.ceil(tf.cast(values[level], tf.float32) * growth)
            return tf.minimum(tf.cast(effort, tf.int32), largest)

        return self.search_with(
            queries, num_neighbors, grown(leaves, self.num_leaves), grown(candidates, self.num_items)
        )

    def search_with(
        self,
        queries: tf.Tensor,
        num_neighbors: tf.Tensor,
        num_leaves_to_search: tf.Tensor,
        num_reordering_candidates: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """`search` with an effort given in int32 scalars."""
        # One thread per batch: a server fills its cores with requests, and spreading one costs more in all.
        vectors = tf.reshape(queries, [-1, self.vectors.shape[1]])
        rows, scores = scann.scann_ops.searcher_from_module(self.state).search_batched(
            vectors,
            final_num_neighbors=num_neighbors,
            pre_reorder_num_neighbors=num_reordering_candidates,
            leaves_to_search=num_leaves_to_search,
        )
        # ScaNN fills the rest of a short result with row 0 and score NaN.
        found = ~tf.math.is_nan(scores)
        rows, scores = tf.where(found, rows, NO_ROW), tf.where(found, scores, -math.inf)
        if self.exact_items is not None:
            rows, scores = self.exact_items.join(vectors, rows, scores, num_neighbors)
        if len(queries.shape) == 2:
            return rows, scores
        return _merge_interests(rows, scores, tf.shape(queries)[0], num_neighbors)


def _merge_interests(
    rows: tf.Tensor, scores: tf.Tensor, num_queries: tf.Tensor, num_neighbors: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Joins the results of each query's vectors, [B * M, N] each, to at most num_neighbors distinct items."""
    rows, scores = tf.reshape(rows, [num_queries, -1]), tf.reshape(scores, [num_queries, -1])
    # By item, and each item's best score first, since the second sort is stable.
    by_score = tf.argsort(scores, axis=1, direction="DESCENDING", stable=True)
    by_item = tf.argsort(tf.gather(rows, by_score, batch_dims=1), axis=1, stable=True)
    order = tf.gather(by_score, by_item, batch_dims=1)
    rows, scores = tf.gather(rows, order, batch_dims=1), tf.gather(scores, order, batch_dims=1)
    repeats = tf.pad(rows[:, 1:] == rows[:, :-1], [[0, 0], [1, 0]])
    best, order = tf.math.top_k(
        tf.where(repeats, -math.inf, scores), tf.minimum(num_neighbors, tf.shape(scores)[1])
    )
    return tf.where(tf.math.is_finite(best), tf.gather(rows, order, batch_dims=1), NO_ROW), best


@dataclasses.dataclass(frozen=True)
class Restriction:
    """What requests may not get.

    Attributes:
      excluded_rows: int32 [B, E], catalogue rows, NO_ROW as padding; repeats count once.
      allowed_values: of each attribute with an allow-list, see `AllowLists.allowed_values`.
    """

    excluded_rows: tf.Tensor
    allowed_values: tuple[tf.Tensor, ...] = ()

    def of(self, requests: tf.Tensor) -> Restriction:
        """The restriction of some requests, int32 [R], of the batch."""
        return Restriction(
            tf.gather(self.excluded_rows, requests),
            tuple(tf.gather(values, requests) for values in self.allowed_values),
        )

    def has_allow_lists(self) -> tf.Tensor:
        """Whether any request of the batch has an allow-list that not every value is on: bool []."""
        has = tf.constant(False)
        for values in self.allowed_values:
            has |= ~tf.reduce_all(values)
        return has

    def excludes(self, rows: tf.Tensor) -> tf.Tensor:
        """Whether each result, int32 [B, N], is NO_ROW or on its query's exclusion list: bool [B, N]."""
        # The extra column makes an empty list searchable, and NO_ROW excluded.
        excluded = _sorted_with_no_row(self.excluded_rows)
        place = tf.minimum(tf.searchsorted(excluded, rows), tf.shape(excluded)[1] - 1)
        return tf.equal(tf.gather(excluded, place, batch_dims=1), rows)

    def num_excluded(self) -> tf.Tensor:
        """Distinct rows of each exclusion list: int32 [B]."""
        ordered = _sorted_with_no_row(self.excluded_rows)
        return tf.math.count_nonzero(ordered[:, 1:] != ordered[:, :-1], axis=1, dtype=tf.int32)


def _sorted_with_no_row(rows: tf.Tensor) -> tf.Tensor:
    return tf.sort(tf.pad(rows, [[0, 0], [1, 0]], constant_values=NO_ROW), axis=1)


def _best(
    rows: tf.Tensor, scores: tf.Tensor, is_refused: tf.Tensor, width: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The best `width` results that are not refused; refused ones come last, with score -inf."""
    # top_k is stable, so the order of equal scores stays that of the index.
    best, order = tf.math.top_k(tf.where(is_refused, -math.inf, scores), tf.minimum(width, tf.shape(rows)[1]))
    return tf.gather(rows, order, batch_dims=1), best


def _enough_to_pass(k: tf.Tensor, shares: tf.Tensor) -> tf.Tensor:
    """How many items to find so that k of them pass an allow-list, but for one request in a thousand.

    Of n items about m = n * share pass, with a standard deviation of √(m (1 - share)); n is the least for
    which m - 3 √(m (1 - share)) is k. Items with an allowed value need not be spread evenly: there may be
    more or fewer of them near the query.

    Args:
      k: int32 [B], items wanted.
      shares: float32 [B], share of the items that passes, 0 to 1.

    Returns:
      int32 [B], k where everything passes, and at most k * _MAX_OVERFETCH.
    """
    wanted = tf.cast(k, tf.float32)
    margin = _SPREAD * tf.sqrt(1.0 - shares)
    passing = wanted + margin * (margin + tf.sqrt(tf.square(margin) + 4.0 * wanted)) / 2.0
    return tf.cast(tf.math.ceil(tf.minimum(passing / shares, _MAX_OVERFETCH * wanted)), tf.int32)


def _cut(rows: tf.Tensor, scores: tf.Tensor, k: tf.Tensor, width: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Cuts each list at its own k and pads all to `width`, with NO_ROW and 0."""
    missing = [[0, 0], [0, width - tf.shape(rows)[1]]]
    rows, scores = tf.pad(rows, missing), tf.pad(scores, missing, constant_values=-math.inf)
    is_result = tf.math.is_finite(scores) & (tf.range(width)[tf.newaxis, :] < k[:, tf.newaxis])
    return tf.where(is_result, rows, NO_ROW), tf.where(is_result, scores, 0.0)


@dataclasses.dataclass(frozen=True)
class Found:
    """Results of a search.

    Attributes:
      rows: int32 [B, K], catalogue rows, best first, K = max(k); NO_ROW beyond a query's own k and where
        fewer items are left.
      scores: float32 [B, K], 0 for NO_ROW.
      exact_fallback: bool [B], whether approximate search found too few, so that exact search answered.
    """

    rows: tf.Tensor
    scores: tf.Tensor
    exact_fallback: tf.Tensor


class CandidateIndex(tf.Module):
    """ScaNN and its exact twin over the same vectors; what the exported model asks."""

    def __init__(
        self, exact: ExactIndex, approximate: ScannIndex | None, allow_lists: AllowLists | None = None
    ) -> None:
        """Joins the two.

        Args:
          exact: exact index.
          approximate: ScaNN over the same vectors in the same order; None = every search is exact, and the
            exported model needs stock operations only.
          allow_lists: attributes that requests may filter by; none by default.
        """
        super().__init__()
        self.exact = exact
        self.approximate = approximate
        self.allow_lists = allow_lists or AllowLists({})

    def search_exact(self, queries: tf.Tensor, k: tf.Tensor, restriction: Restriction) -> Found:
        """As `search`, by exact search."""
        rows, scores = self._search_exact(queries, k, restriction, tf.reduce_max(k))
        return Found(rows, scores, tf.zeros_like(k, tf.bool))

    def search(self, queries: tf.Tensor, k: tf.Tensor, restriction: Restriction) -> Found:
        """Finds each query's best items that its request may get, by ScaNN.

        A query for which ScaNN finds too few items, which happens with allow-lists that few items pass and
        with long exclusion lists in small catalogues, is searched exactly: a request gets k items whenever k
        are left.

        Args:
          queries: float32 [B, D] or [B, M, D], at least one.
          k: int32 [B], items wanted per query, at least 1.
          restriction: what the requests may not get.
        """
        approximate = self.approximate
        if approximate is None:
            return self.search_exact(queries, k, restriction)
        width = tf.reduce_max(k)

        def unrestricted() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            rows, scores = _cut(*approximate.search(queries, width), k, width)
            return rows, scores, tf.minimum(k, self.exact.num_items)

        def restricted() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            num_excluded = restriction.num_excluded()
            shares = self.allow_lists.shares(restriction.allowed_values, tf.shape(k)[0])
            enough = _enough_to_pass(k, shares) + num_excluded
            rows, scores = approximate.search(queries, tf.reduce_max(enough))
            passes = self.allow_lists.passes(restriction.allowed_values, tf.maximum(rows, 0))
            refused = restriction.excludes(rows) | ~passes
            rows, scores = _cut(*_best(rows, scores, refused, width), k, width)
            # How many items pass an allow-list is not known: whoever gets less than k is searched exactly.
            left = tf.where(shares < 1.0, k, self.exact.num_items - num_excluded)
            return rows, scores, tf.minimum(k, left)

        is_restricted = tf.reduce_any(restriction.excluded_rows != NO_ROW) | restriction.has_allow_lists()
        rows, scores, wanted = tf.cond(is_restricted, restricted, unrestricted)
        # What is missing stands last, so one look at the last result wanted will do.
        last = tf.gather(rows, tf.maximum(wanted - 1, 0), batch_dims=1)
        is_short = (wanted > 0) & (last == NO_ROW)

        def fill() -> tuple[tf.Tensor, tf.Tensor]:
            short = tf.cast(tf.where(is_short), tf.int32)
            requests = short[:, 0]
            exact_rows, exact_scores = self._search_exact(
                tf.gather(queries, requests), tf.gather(k, requests), restriction.of(requests), width
            )
            return (
                tf.tensor_scatter_nd_update(rows, short, exact_rows),
                tf.tensor_scatter_nd_update(scores, short, exact_scores),
            )

        rows, scores = tf.cond(tf.reduce_any(is_short), fill, lambda: (rows, scores))
        return Found(rows, scores, is_short)

    def _search_exact(
        self, queries: tf.Tensor, k: tf.Tensor, restriction: Restriction, width: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        has_allow_lists = restriction.has_allow_lists()
        num_values = 1 + (self.allow_lists.max_values - 1) * tf.cast(has_allow_lists, tf.int32)

        def restrict(scores: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
            # Looking up the values of all items costs several times what scoring them does.

            def restricted() -> tf.Tensor:
                passes = self.allow_lists.passes(restriction.allowed_values, rows)
                return tf.where(passes, scores, -math.inf)

            return tf.cond(has_allow_lists, restricted, lambda: scores)

        rows, scores = self.exact.search(
            queries,
            width + tf.reduce_max(restriction.num_excluded()),
            restrict if restriction.allowed_values else None,
            num_values,
        )
        return _cut(*_best(rows, scores, restriction.excludes(rows), width), k, width)
