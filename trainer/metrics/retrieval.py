"""Metrics of ranked lists against held-out positives, per query.

Letters: Q = queries, K = length of the lists, T_u = distinct held-out positives of query u.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from schema.errors import ShapeError
from trainer.metrics.arrays import BoolArray, FloatArray, IntArray, as_ids, first_columns, is_padding
from trainer.metrics.keys import RETRIEVAL_METRICS


def match_positives(
    ranked: npt.ArrayLike, positives: Sequence[Sequence[str | bytes | int]]
) -> tuple[BoolArray, IntArray]:
    """Finds the positives in ranked lists; the input of all retrieval metrics below.

    An item that stands in a list more than once counts at its first place only. Padding ("" in lists of
    strings, any negative number in lists of integers) is never a hit and never a positive.

    Args:
      ranked: str, bytes or integer [Q, K], best first, short lists padded on the right.
      positives: Q sequences of ids of the same kind, any length and order; repeated ids count once.

    Returns:
      hits: bool [Q, K], True where a positive stands; num_positives: int64 [Q], |T_u|.

    Raises:
      ShapeError: `ranked` is not [Q, K], there are not Q sequences of positives, or the kinds of id differ.

    >>> hits, num_positives = match_positives([["a", "b", "a", ""]], [["a", "z", "z", ""]])
    >>> hits.tolist(), num_positives.tolist()
    ([[True, False, False, False]], [2])
    """
    table = as_ids(ranked)
    if table.ndim != 2 or len(table) != len(positives):
        raise ShapeError(
            f"ranked lists of shape {table.shape} for {len(positives)} queries; "
            f"expected [{len(positives)}, K]: pass one row of K ids per query, padded on the right."
        )
    query_of_positive = np.repeat(np.arange(len(positives)), [len(ids) for ids in positives])
    flat_positives = as_ids([item_id for ids in positives for item_id in ids], like=table)
    ids, codes = np.unique(np.concatenate([table.ravel(), flat_positives]), return_inverse=True)
    padded = is_padding(ids)[codes]

    # One integer per (query, item) pair turns matching over all queries into one lookup in a sorted array.
    query = np.concatenate([np.repeat(np.arange(len(table)), table.shape[1]), query_of_positive])
    pair = query * len(ids) + codes
    ranked_pair, positive_pair = pair[: table.size], np.unique(pair[table.size :][~padded[table.size :]])
    is_hit = np.isin(ranked_pair, positive_pair)
    places = np.flatnonzero(is_hit)
    _, first = np.unique(ranked_pair[places], return_index=True)
    hits = np.zeros(table.size, dtype=np.bool_)
    hits[places[first]] = True
    num_positives = np.bincount(positive_pair // max(len(ids), 1), minlength=len(table))
    return hits.reshape(table.shape), num_positives.astype(np.int64)


def recall_at_k(hits: BoolArray, num_positives: IntArray, k: int) -> FloatArray:
    """Share of a query's positives that stand among the first k.

    Formula: hits in the first k / |T_u|. Range 0 to min(k, |T_u|) / |T_u|; 1 = all positives found.
    Ties: none, the order of the list is taken as it is. Query without positives: NaN (`macro_mean` skips it).
    Source: Manning, Raghavan and Schütze, Introduction to Information Retrieval, 2008, section 8.3.

    Args:
      hits, num_positives: from `match_positives`.
      k: 1 to K.

    Returns:
      float64 [Q].

    Raises:
      ShapeError: k is not in 1..K.

    >>> recall_at_k(*match_positives([["a", "b", "c", "d"]], [["b", "d", "x"]]), k=2).round(4).tolist()
    [0.3333]
    """
    return _per_query(first_columns(hits, k).sum(axis=1), num_positives, divide_by=num_positives)


def precision_at_k(hits: BoolArray, num_positives: IntArray, k: int) -> FloatArray:
    """Share of the first k places that are positives.

    Formula: hits in the first k / k; the empty places of a short list are misses.
    Range 0 to min(k, |T_u|) / k. Ties: none, the order of the list is taken as it is. Query without
    positives: NaN, for there is nothing to be precise about.
    Source: Manning, Raghavan and Schütze, Introduction to Information Retrieval, 2008, section 8.4.

    Args, Returns, Raises: as `recall_at_k`.

    >>> precision_at_k(*match_positives([["a", "b", "c", "d"]], [["b", "d", "x"]]), k=4).tolist()
    [0.5]
    """
    return _per_query(first_columns(hits, k).sum(axis=1), num_positives, divide_by=k)


def ndcg_at_k(hits: BoolArray, num_positives: IntArray, k: int) -> FloatArray:
    """Normalised discounted cumulative gain with binary gains.

    Formula: DCG / ideal DCG; DCG = Σ over the ranks r <= k that are hits of 1 / log2(r + 1), the ideal has
    min(k, |T_u|) hits on top.
    Range 0 to 1; 1 = the first min(k, |T_u|) places are all positives. Ties: none, the order of the list is
    taken as it is. Query without positives: NaN.
    Source: Järvelin and Kekäläinen, TOIS 2002, doi:10.1145/582415.582418.

    Args, Returns, Raises: as `recall_at_k`.

    >>> # (1/log2(3) + 1/log2(5)) / (1 + 1/log2(3) + 1/log2(4)) = 1.0616 / 2.1309
    >>> ndcg_at_k(*match_positives([["a", "b", "c", "d"]], [["b", "d", "x"]]), k=4).round(4).tolist()
    [0.4982]
    """
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(num_positives, k)]
    return _per_query(first_columns(hits, k) @ discounts, num_positives, divide_by=ideal)


def hit_rate_at_k(hits: BoolArray, num_positives: IntArray, k: int) -> FloatArray:
    """1 where at least one positive stands among the first k, else 0; NaN without positives.

    Range 0 to 1. Ties: none. Source: Deshpande and Karypis, TOIS 2004, doi:10.1145/963770.963776.

    Args, Returns, Raises: as `recall_at_k`.

    >>> hit_rate_at_k(*match_positives([["a", "b", "c", "d"]], [["b", "d", "x"]]), k=1).tolist()
    [0.0]
    """
    return _per_query(first_columns(hits, k).any(axis=1), num_positives)


def mrr_at_k(hits: BoolArray, num_positives: IntArray, k: int) -> FloatArray:
    """Reciprocal rank of the first positive, 0 when none stands among the first k; NaN without positives.

    Formula: 1 / rank. Range 0 to 1; 1 = the first place is a positive. Ties: none.
    Source: Voorhees, TREC-8 question answering track, 1999.

    Args, Returns, Raises: as `recall_at_k`.

    >>> mrr_at_k(*match_positives([["a", "b", "c", "d"]], [["b", "d", "x"]]), k=4).tolist()
    [0.5]
    """
    top = first_columns(hits, k)
    return _per_query(np.where(top.any(axis=1), 1.0 / (top.argmax(axis=1) + 1.0), 0.0), num_positives)


def map_at_k(hits: BoolArray, num_positives: IntArray, k: int) -> FloatArray:
    """Average precision among the first k; its mean over queries is MAP.

    Formula: Σ over the ranks r <= k that are hits of precision@r / min(k, |T_u|).
    Range 0 to 1; 1 = the first min(k, |T_u|) places are all positives. Ties: none. Query without positives:
    NaN. Source: Manning, Raghavan and Schütze, Introduction to Information Retrieval, 2008, section 8.4; the
    cut-off at k in the divisor, too, so that a perfect list has 1.

    Args, Returns, Raises: as `recall_at_k`.

    >>> # (1/2 + 2/4) / 3
    >>> map_at_k(*match_positives([["a", "b", "c", "d"]], [["b", "d", "x"]]), k=4).round(4).tolist()
    [0.3333]
    """
    top = first_columns(hits, k)
    precision = np.cumsum(top, axis=1) / np.arange(1, k + 1)
    return _per_query((precision * top).sum(axis=1), num_positives, divide_by=np.minimum(num_positives, k))


def retrieval_metrics(
    hits: BoolArray, num_positives: IntArray, ks: Sequence[int], metrics: Sequence[str] = RETRIEVAL_METRICS
) -> dict[str, FloatArray]:
    """All retrieval metrics at all k, per query.

    Args:
      hits, num_positives: from `match_positives`.
      ks: cut-offs, each 1 to K.
      metrics: a choice out of `RETRIEVAL_METRICS`.

    Returns:
      `<metric>_at_<k>` -> float64 [Q]; NaN for queries without positives.
    """
    functions = {
        "recall": recall_at_k,
        "precision": precision_at_k,
        "ndcg": ndcg_at_k,
        "hit_rate": hit_rate_at_k,
        "mrr": mrr_at_k,
        "map": map_at_k,
    }
    return {f"{name}_at_{k}": functions[name](hits, num_positives, k) for k in ks for name in metrics}


def macro_mean(values: FloatArray) -> float:
    """Mean over the queries with at least one positive, which all weigh the same; NaN when there is none.

    >>> macro_mean(np.array([1.0, np.nan, 0.5]))
    0.75
    """
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _per_query(
    values: npt.NDArray[Any], num_positives: IntArray, divide_by: npt.NDArray[Any] | float = 1.0
) -> FloatArray:
    """values / divide_by where there are positives, NaN elsewhere."""
    result = np.full(len(values), np.nan)
    np.divide(values, divide_by, out=result, where=num_positives > 0)
    return result
