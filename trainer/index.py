"""The candidate index: ScaNN for serving, exact search for checks, one interface for both.

Letters: B = queries, D = width of a vector, I = items, K = results per query.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import scann
import tensorflow as tf

from schema.errors import IndexBuildError
from trainer.config import IndexConfig

# Below this many items scoring all of them costs less than partitioning and loses nothing.
_MIN_ITEMS_TO_PARTITION = 1_000
# Padding among catalogue rows: no item found, or nothing to exclude.
NO_ROW = -1

logger = logging.getLogger(__name__)


class Index(Protocol):
    """What both indexes can do."""

    def search(self, queries: tf.Tensor, num_neighbors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds the items with the largest dot products.

        Args:
          queries: float32 [B, D].
          num_neighbors: int32 scalar, at least 1; more than there are items means all items.

        Returns:
          Catalogue rows int32 [B, N] (NO_ROW where fewer were found) and scores float32 [B, N], best
          first, N <= num_neighbors.
        """
        ...


class ExactIndex(tf.Module):
    """Scores every item with a matrix product."""

    def __init__(self, vectors: np.ndarray) -> None:
        """Makes the index.

        Args:
          vectors: float32 [I, D], one row per item.
        """
        super().__init__()
        self.vectors = tf.Variable(vectors, trainable=False, dtype=tf.float32)

    def search(self, queries: tf.Tensor, num_neighbors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Index.search`."""
        scores = tf.matmul(queries, self.vectors, transpose_b=True)
        best, rows = tf.math.top_k(scores, tf.minimum(num_neighbors, tf.shape(scores)[1]))
        return rows, best


@dataclasses.dataclass(frozen=True)
class ScannSettings:
    """How hard ScaNN searches for max_k neighbours; names are those of the library.

    With `num_leaves` 0 there is no partition: every item is scored exactly.
    """

    num_leaves: int
    num_leaves_to_search: int
    num_reordering_candidates: int


class ScannIndex(tf.Module):
    """Approximate search by ScaNN's TensorFlow operations, which run on the CPU only."""

    def __init__(self, vectors: np.ndarray, settings: ScannSettings, max_k: int) -> None:
        """Builds the index.

        Args:
          vectors: float32 [I, D], one row per item.
          settings: search effort; may be replaced after the build, except for `num_leaves`.
          max_k: number of neighbours that the settings are meant for.
        """
        super().__init__()
        builder = scann.scann_ops.builder(vectors, max_k, "dot_product")
        if settings.num_leaves == 0:
            builder = builder.score_brute_force()
        else:
            builder = (
                builder.tree(settings.num_leaves, settings.num_leaves_to_search)
                # At the same budget 0.2 finds more of the best than the library's default (off).
                .score_ah(2, anisotropic_quantization_threshold=0.2)
                .reorder(settings.num_reordering_candidates)
            )
        self.state = builder.build().serialize_to_module()
        self.settings = settings
        self.max_k = max_k

    def search(self, queries: tf.Tensor, num_neighbors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Index.search`. Beyond max_k neighbours the effort grows in proportion."""
        effort = tf.maximum(1.0, tf.cast(num_neighbors, tf.float32) / self.max_k)

        def scaled(base: int) -> tf.Tensor:
            return tf.cast(tf.math.ceil(base * effort), tf.int32)

        rows, scores = scann.scann_ops.searcher_from_module(self.state).search_batched(
            queries,
            final_num_neighbors=num_neighbors,
            pre_reorder_num_neighbors=scaled(self.settings.num_reordering_candidates),
            leaves_to_search=scaled(self.settings.num_leaves_to_search),
        )
        # ScaNN fills the rest of a short result with row 0 and score NaN.
        return tf.where(tf.math.is_nan(scores), NO_ROW, rows), scores


def search_excluding(
    index: Index, queries: tf.Tensor, k: tf.Tensor, excluded_rows: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds each query's best items outside its exclusion list.

    Args:
      index: where to search.
      queries: float32 [B, D], at least one.
      k: int32 [B], items wanted per query, at least 1.
      excluded_rows: int32 [B, E], catalogue rows, NO_ROW as padding; repeats count once.

    Returns:
      Rows int32 [B, K] and scores float32 [B, K], best first, K = max(k). Beyond a query's own k, and where
      fewer items are left or found, row NO_ROW and score 0.
    """
    width = tf.reduce_max(k)
    # The extra column makes an empty list searchable, and lets NO_ROW results count as excluded.
    excluded = tf.sort(tf.pad(excluded_rows, [[0, 0], [1, 0]], constant_values=NO_ROW), axis=1)
    rows, scores = index.search(queries, width + tf.reduce_max(_num_excluded(excluded_rows)))
    place = tf.minimum(tf.searchsorted(excluded, rows), tf.shape(excluded)[1] - 1)
    is_excluded = tf.equal(tf.gather(excluded, place, batch_dims=1), rows)
    # top_k is stable, so the order of equal scores stays that of the index.
    best, order = tf.math.top_k(
        tf.where(is_excluded, -math.inf, scores), tf.minimum(width, tf.shape(rows)[1])
    )
    rows = tf.gather(rows, order, batch_dims=1)
    missing = [[0, 0], [0, width - tf.shape(rows)[1]]]
    rows, best = tf.pad(rows, missing), tf.pad(best, missing, constant_values=-math.inf)
    is_result = tf.math.is_finite(best) & (tf.range(width)[tf.newaxis, :] < k[:, tf.newaxis])
    return tf.where(is_result, rows, NO_ROW), tf.where(is_result, best, 0.0)


def _num_excluded(excluded_rows: tf.Tensor) -> tf.Tensor:
    """Distinct rows of each exclusion list: int32 [B]."""
    ordered = tf.sort(tf.pad(excluded_rows, [[0, 0], [1, 0]], constant_values=NO_ROW), axis=1)
    return tf.math.count_nonzero(ordered[:, 1:] != ordered[:, :-1], axis=1, dtype=tf.int32)


class CandidateIndex(tf.Module):
    """ScaNN and its exact twin over the same vectors; what the exported model asks."""

    def __init__(self, exact: ExactIndex, approximate: ScannIndex) -> None:
        """Joins the two.

        Args:
          exact: exact index.
          approximate: ScaNN over the same vectors in the same order.
        """
        super().__init__()
        self.exact = exact
        self.approximate = approximate

    def search_exact(
        self, queries: tf.Tensor, k: tf.Tensor, excluded_rows: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """As `search_excluding`, by exact search."""
        return search_excluding(self.exact, queries, k, excluded_rows)

    def search(
        self, queries: tf.Tensor, k: tf.Tensor, excluded_rows: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """As `search_excluding`, by ScaNN.

        When the searched leaves hold too few items for some query, which happens with long exclusion lists in
        small catalogues, the batch is searched exactly: a request gets k items whenever k are left.
        """
        rows, scores = search_excluding(self.approximate, queries, k, excluded_rows)
        found = tf.math.count_nonzero(rows != NO_ROW, axis=1, dtype=tf.int32)
        left = tf.shape(self.exact.vectors)[0] - _num_excluded(excluded_rows)
        return tf.cond(
            tf.reduce_any(found < tf.minimum(k, left)),
            lambda: self.search_exact(queries, k, excluded_rows),
            lambda: (rows, scores),
        )


@dataclasses.dataclass(frozen=True)
class IndexFacts:
    """What was built, for reports.

    Attributes:
      num_items: catalogue rows, all of which are indexed.
      vector_width: width of a vector, the item bias included.
      settings: ScaNN settings; num_leaves 0 = no partition.
      k: neighbours per query in the comparison with exact search.
      recall: share of the exact top k that ScaNN found, mean over the sample queries, 0 to 1.
      build_s: seconds for building and tuning.
    """

    num_items: int
    vector_width: int
    settings: ScannSettings
    k: int
    recall: float
    build_s: float


def build_index(
    item_ids: Sequence[str] | np.ndarray,
    vectors: np.ndarray,
    sample_queries: np.ndarray,
    config: IndexConfig,
    max_k: int,
) -> tuple[CandidateIndex, IndexFacts]:
    """Builds ScaNN over the catalogue and raises its effort until it finds enough of the exact results.

    Args:
      item_ids: [I] str, the id of each row.
      vectors: float32 [I, D].
      sample_queries: float32 [S, D], real query vectors to measure recall on.
      config: required recall.
      max_k: the largest k of a request.

    Raises:
      IndexBuildError: ids are repeated, empty or not one per vector; a vector is not finite; there is no
        sample query; the required recall is not reached although everything is searched.
    """
    started = time.monotonic()
    _check_catalogue(item_ids, vectors)
    if len(sample_queries) == 0:
        raise IndexBuildError("no sample query to measure recall on; pass query vectors of some users.")
    num_items = len(vectors)
    k = min(max_k, num_items)
    queries = tf.constant(sample_queries, tf.float32)
    exact = ExactIndex(vectors)
    exact_rows = exact.search(queries, tf.constant(k))[0].numpy()

    efforts = _efforts(num_items, k)
    approximate = ScannIndex(np.asarray(vectors, np.float32), efforts[0], k)
    for settings in efforts:
        approximate.settings = settings
        found = approximate.search(queries, tf.constant(k))[0].numpy()
        recall = float(
            np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, exact_rows, strict=True)])
        )
        logger.info("index num_items=%d recall_at_%d=%.4f %s", num_items, k, recall, settings)
        if recall >= config.min_recall:
            break
    else:
        raise IndexBuildError(
            f"ScaNN finds {recall:.4f} of the exact top {k} of {num_items:,} items with {settings}, less "
            f"than min_recall {config.min_recall}; check the item vectors for duplicates, or lower "
            "index.min_recall."
        )
    facts = IndexFacts(num_items, vectors.shape[1], settings, k, recall, time.monotonic() - started)
    return CandidateIndex(exact, approximate), facts


def _efforts(num_items: int, k: int) -> list[ScannSettings]:
    """Settings from cheap to complete, over one partition into about the square root of num_items leaves."""
    if num_items < _MIN_ITEMS_TO_PARTITION:
        return [ScannSettings(0, 0, num_items)]
    num_leaves = round(math.sqrt(num_items))
    efforts = [
        ScannSettings(num_leaves, math.ceil(share * num_leaves), min(num_items, multiple * k))
        for share, multiple in ((0.05, 2), (0.1, 2), (0.2, 3), (0.3, 4), (0.5, 4), (0.7, 6))
    ]
    return [*efforts, ScannSettings(num_leaves, num_leaves, num_items)]


def _check_catalogue(item_ids: Sequence[str] | np.ndarray, vectors: np.ndarray) -> None:
    if len(item_ids) == 0 or vectors.ndim != 2 or len(item_ids) != len(vectors):
        raise IndexBuildError(
            f"{len(item_ids):,} item ids for item vectors of shape {vectors.shape}; expected at least one id "
            "and one row per id. Check the catalogue."
        )
    values, counts = np.unique(np.asarray(item_ids, dtype=str), return_counts=True)
    if "" in values or counts.max() > 1:
        culprit = "" if "" in values else values[counts.argmax()]
        raise IndexBuildError(
            f"item id {culprit!r} stands in {counts[values == culprit][0]} catalogue rows; ids must be "
            "unique and not empty. Check the items table."
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise IndexBuildError(
            f"{np.sum(~finite):,} of {len(vectors):,} item vectors are not finite, the first is that of item "
            f"{item_ids[int(np.argmin(finite))]!r}; the training diverged: lower learning_rate."
        )
