"""Finds the cheapest ScaNN index that finds enough of the exact results.

Letters: S = sample queries, K = neighbours per query.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from trainer.index import DIMENSIONS_PER_BLOCK, Effort, ExactIndex, ExactItems, ScannIndex

# Efforts are tuned for max_k, and for half of each k down to about this one: a request pays for no more than
# twice the k that it asks for.
_SMALLEST_K = 10
# Below this many items the parts of a partition are too small to be learnt.
_MIN_ITEMS_TO_PARTITION = 2_000
# Numbers of leaves that are tried, in square roots of the number of items.
_LEAVES = (1.0, 2.0, 4.0)
# Numbers of leaves to search that are tried: each about a sixteenth above the last.
_LEAF_STEP = 1.06
# Numbers of candidates whose scores are computed exactly, in neighbours.
_REORDERING = (2.0, 1.5, 1.0, 2.5, 3.0, 4.0, 6.0, 8.0)
# Tried where none of those is enough: a few neighbours among very many close items need tens of candidates.
_MORE_REORDERING = (13.0, 21.0, 34.0)
# With fewer exact results of a slice of items, the share that is found says little: one of them is 3 %.
_ENOUGH_RESULTS = 30
_CACHE_BYTES = 16e6

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WorkModel:
    """Processor time of a query, in ns, in batches of 256: fitted to measurements on a core with AVX-512.

    The model stands in for a clock so that one catalogue gets one index on every machine, busy or not. Only
    ratios matter: at 61 efforts on catalogues of 3,000 to 500,000 items it is off by a tenth on average.

    Attributes:
      num_items: of the catalogue.
      vector_width: of an item vector.
    """

    num_items: int
    vector_width: int

    def work(self, num_leaves: int, effort: Effort) -> float:
        """Work of one query: centroids, then the codes of the leaves searched, then true dot products."""
        if num_leaves == 0:
            return 1_000 + self.num_items * (0.58 + 0.0132 * self.vector_width) + 78 * effort.k
        blocks = math.ceil(self.vector_width / DIMENSIONS_PER_BLOCK)
        leaf = 60 + 0.0175 * blocks * self.num_items / num_leaves
        # The vector of a candidate is somewhere in a table that is in the cache or is not.
        missed = max(0.0, 1 - _CACHE_BYTES / (4 * self.num_items * self.vector_width))
        candidate = 25 + 0.2 * self.vector_width + 80 * missed
        scored = effort.num_leaves_to_search * leaf + effort.num_reordering_candidates * candidate
        return 5_000 + 0.053 * num_leaves * self.vector_width + scored

    def exact_work(self, num_exact_items: int, k: int) -> float:
        """What `ExactItems` add to it: dot products, and the choice of the best k."""
        return num_exact_items * (12 + 0.0132 * self.vector_width) + 60 * k if num_exact_items else 0.0


@dataclasses.dataclass(frozen=True)
class ExactResults:
    """What exact search finds for the sample queries.

    Attributes:
      queries: float32 [S, D] or [S, M, D].
      rows: int32 [S, K], best first.
      scores: float32 [S, K].
    """

    queries: tf.Tensor
    rows: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, index: ExactIndex, queries: np.ndarray, k: int) -> ExactResults:
        """Searches for the k best."""
        rows, scores = index.search(tf.constant(queries, tf.float32), tf.constant(k))
        return cls(tf.constant(queries, tf.float32), rows.numpy(), scores.numpy())

    def found_by(self, rows: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
        """Which of the exact top k another search found.

        Args:
          rows: int32 [S, N], what it found; N < k where few leaves hold fewer than k items.
          scores: float32 [S, N].
          k: at most K.

        Returns:
          bool [S, k]. Items that tie for the last place stand in for each other: when every result is as good
          as the k-th best, the ones that tie with it count as found.
        """
        exact_rows, exact_scores = self.rows[:, :k], self.scores[:, :k]
        last = exact_scores[:, -1:]
        rounding = 1e-5 * np.abs(last)
        as_good = np.sum(scores >= last - rounding, axis=1, keepdims=True) == k
        hits = [np.isin(exact, found) for exact, found in zip(exact_rows, rows, strict=True)]
        return np.asarray(hits) | (as_good & (exact_scores <= last + rounding))


def recall_by_slice(
    found: np.ndarray, rows: np.ndarray, slices: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    """Of the exact results that belong to each slice of items, the share that was found.

    None where they are too few to tell, less than 30.

    Args:
      found: bool [S, k], which of the exact results were found.
      rows: int32 [S, k], the exact results.
      slices: bool [I] by name.
    """
    of_slice = {name: mask[rows] for name, mask in slices.items()}
    return {
        name: float(found[mask].mean()) if mask.sum() >= _ENOUGH_RESULTS else None
        for name, mask in of_slice.items()
    }


@dataclasses.dataclass(frozen=True)
class RequiredRecall:
    """What share of the exact results an effort has to find.

    Attributes:
      overall: of the exact top k, 0 to 1. It is to hold for other queries than the sampled ones too: the
        sampling error is kept as a margin.
      in_slice: of those of each slice of items, where `recall_by_slice` can tell.
      slices: bool [I] by name.
    """

    overall: float
    in_slice: float = 0.0
    slices: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def is_met(self, found: np.ndarray, rows: np.ndarray) -> bool:
        """Whether a search finds enough.

        Queries differ much in recall; the mean of a sample alone would pick, of many efforts, lucky ones. So
        the least mean is taken that the sample makes likely: the mean less 1.64 standard errors.

        Args:
          found: bool [S, k], which of the exact results were found.
          rows: int32 [S, k], the exact results.
        """
        by_query = found.mean(axis=1)
        if by_query.mean() - 1.64 * by_query.std() / math.sqrt(len(by_query)) < self.overall:
            return False
        shares = recall_by_slice(found, rows, self.slices).values()
        return all(share is None or share >= self.in_slice for share in shares)


def levels(max_k: int) -> list[int]:
    """The k that efforts are tuned for, ascending: max_k, its half, and so on."""
    ks = [max_k]
    while ks[-1] // 2 >= _SMALLEST_K:
        ks.append(ks[-1] // 2)
    return ks[::-1]


def tuned_index(vectors: np.ndarray, exact: ExactResults, required: RequiredRecall) -> ScannIndex:
    """Builds ScaNN with the number of leaves and the efforts that reach the recall with the least work.

    Small slices of items are scored exactly beside the rest where that is less work than to find them.

    Args:
      vectors: float32 [I, D].
      exact: results to compare with; their K is the largest k that efforts are tuned for.
      required: recall to reach at every level of k.

    Returns:
      The index with its efforts set. Where scoring every item is the least work there is no partition.
    """
    num_items, max_k = len(vectors), exact.rows.shape[1]
    model = WorkModel(*vectors.shape)
    ks = levels(max_k)
    best: ScannIndex | None = None
    least = _mean_work(model, 0, 0, [Effort(k, 0, num_items) for k in ks])
    for share in _LEAVES if num_items >= _MIN_ITEMS_TO_PARTITION else ():
        index = ScannIndex.build(vectors, round(share * math.sqrt(num_items)))
        at_max_k = _choose_exact_items(index, model, exact, required)
        index.efforts = [*(_cheapest(index, model, exact, k, required) for k in ks[:-1]), at_max_k]
        num_exact_items = index.exact_items.num_items if index.exact_items else 0
        work = _mean_work(model, index.num_leaves, num_exact_items, index.efforts)
        logger.info(
            "index num_leaves=%d num_exact_items=%d work=%.1f us efforts=%s",
            *(index.num_leaves, num_exact_items, work / 1e3, index.efforts),
        )
        if work < least:
            best, least = index, work
    if best is None:
        best = ScannIndex.build(vectors, 0)
        best.efforts = [Effort(max_k, 0, num_items)]
    return best


def _mean_work(model: WorkModel, num_leaves: int, num_exact_items: int, efforts: Sequence[Effort]) -> float:
    """Geometric mean: every level of k counts the same, however much its work is."""
    works = [model.work(num_leaves, e) + model.exact_work(num_exact_items, e.k) for e in efforts]
    return math.exp(np.mean([math.log(work) for work in works]))


def _choose_exact_items(
    index: ScannIndex, model: WorkModel, exact: ExactResults, required: RequiredRecall
) -> Effort:
    """Gives the index the exact items with the least work at max_k, and returns the effort at that k.

    Tried are the items of no slice, of the smallest one, of the two smallest and so on.
    """
    k = exact.rows.shape[1]
    best, effort = None, _cheapest(index, model, exact, k, required)
    least = min(model.work(0, Effort(k, 0, index.num_items)), model.work(index.num_leaves, effort))
    is_among = np.zeros(index.num_items, bool)
    for of_slice in sorted(required.slices.values(), key=np.sum):
        is_among = is_among | of_slice
        exact_work = model.exact_work(is_among.sum(), k)
        if exact_work + model.work(index.num_leaves, Effort(k, 1, k)) >= least:
            break
        index.exact_items = ExactItems(np.flatnonzero(is_among), index.vectors.numpy())
        with_them = _cheapest(index, model, exact, k, required)
        work = exact_work + model.work(index.num_leaves, with_them)
        if work < least:
            best, effort, least = index.exact_items, with_them, work
    index.exact_items = best
    return effort


def _cheapest(
    index: ScannIndex, model: WorkModel, exact: ExactResults, k: int, required: RequiredRecall
) -> Effort:
    """The least work that finds enough of the top k; everything there is when nothing less does."""
    everything = best = Effort(k, index.num_leaves, index.num_items)
    ladder = _leaf_ladder(index.num_leaves)
    for multiple in (*_REORDERING, *_MORE_REORDERING):
        if multiple in _MORE_REORDERING and best is not everything:
            break
        candidates = min(index.num_items, math.ceil(multiple * k))
        efforts = [Effort(k, leaves, candidates) for leaves in ladder]
        least = model.work(index.num_leaves, best)
        cheaper = [effort for effort in efforts if model.work(index.num_leaves, effort) < least]
        # Recall grows with the leaves: bisect for the first rung that reaches it, if any cheaper one does.
        low, high = 0, len(cheaper)
        while low < high:
            middle = (low + high) // 2
            if required.is_met(_found(index, cheaper[middle], exact), exact.rows[:, :k]):
                high = middle
            else:
                low = middle + 1
        if low < len(cheaper):
            best = cheaper[low]
    return best


def _leaf_ladder(num_leaves: int) -> Sequence[int]:
    rungs = [1]
    while rungs[-1] < num_leaves:
        rungs.append(min(num_leaves, max(rungs[-1] + 1, round(rungs[-1] * _LEAF_STEP))))
    return rungs


def _found(index: ScannIndex, effort: Effort, exact: ExactResults) -> np.ndarray:
    """Which of the exact top k the index finds with an effort: bool [S, k]."""
    rows, scores = index.search_with(
        exact.queries,
        tf.constant(effort.k),
        tf.constant(effort.num_leaves_to_search),
        tf.constant(effort.num_reordering_candidates),
    )
    return exact.found_by(rows.numpy(), scores.numpy(), effort.k)
