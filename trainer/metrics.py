"""Offline metrics of retrieval and ranking, exact and vectorised; the same code judges models and baselines.

Letters: Q = queries, K = length of the lists, T_u = distinct held-out positives of query u, n = examples.

Metric keys are `retrieval/<metric>_at_<k>` and `ranking/<task>/<metric>`, for instance
`retrieval/recall_at_100` and `ranking/click/auc`. A value that the data cannot define is NaN, never zero.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from schema.contract import TaskKind
from schema.errors import ConfigError, DataError, ShapeError

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

RETRIEVAL_METRICS = ("recall", "ndcg", "hit_rate", "mrr")
RANKING_METRICS = {
    TaskKind.BINARY: ("auc", "gauc", "log_loss", "ece"),
    TaskKind.WATCH_TIME: ("mae", "xauc"),
    TaskKind.REGRESSION: ("mae", "xauc"),
    TaskKind.COMPLETION: ("mae", "xauc"),
}
LOWER_IS_BETTER = frozenset({"log_loss", "ece", "mae"})

# Probabilities are kept this far from 0 and 1: one sure and wrong prediction costs 16, not infinity.
_PROBABILITY_MARGIN = 1e-7

# 97.5 % of a normal distribution lie below it.
_NORMAL_QUANTILE = 1.96


def metric_key(stage: str, metric: str, *, task: str | None = None, k: int | None = None) -> str:
    """Name of a metric in reports and gates.

    >>> metric_key("retrieval", "recall", k=100), metric_key("ranking", "auc", task="click")
    ('retrieval/recall_at_100', 'ranking/click/auc')
    """
    return "/".join([stage, *([task] if task else []), metric if k is None else f"{metric}_at_{k}"])


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
    table = _as_ids(ranked)
    if table.ndim != 2 or len(table) != len(positives):
        raise ShapeError(
            f"ranked lists of shape {table.shape} for {len(positives)} queries; "
            f"expected [{len(positives)}, K]: pass one row of K ids per query, padded on the right."
        )
    query_of_positive = np.repeat(np.arange(len(positives)), [len(ids) for ids in positives])
    flat_positives = _as_ids([item_id for ids in positives for item_id in ids], like=table)
    ids, codes = np.unique(np.concatenate([table.ravel(), flat_positives]), return_inverse=True)
    is_padding = _is_padding(ids)[codes]

    # One integer per (query, item) pair turns matching over all queries into one lookup in a sorted array.
    query = np.concatenate([np.repeat(np.arange(len(table)), table.shape[1]), query_of_positive])
    pair = query * len(ids) + codes
    ranked_pair, positive_pair = pair[: table.size], np.unique(pair[table.size :][~is_padding[table.size :]])
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
    return _per_query(_first(hits, k).sum(axis=1), num_positives, divide_by=num_positives)


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
    return _per_query(_first(hits, k) @ discounts, num_positives, divide_by=ideal)


def hit_rate_at_k(hits: BoolArray, num_positives: IntArray, k: int) -> FloatArray:
    """1 where at least one positive stands among the first k, else 0; NaN without positives.

    Range 0 to 1. Ties: none. Source: Deshpande and Karypis, TOIS 2004, doi:10.1145/963770.963776.

    Args, Returns, Raises: as `recall_at_k`.

    >>> hit_rate_at_k(*match_positives([["a", "b", "c", "d"]], [["b", "d", "x"]]), k=1).tolist()
    [0.0]
    """
    return _per_query(_first(hits, k).any(axis=1), num_positives)


def mrr_at_k(hits: BoolArray, num_positives: IntArray, k: int) -> FloatArray:
    """Reciprocal rank of the first positive, 0 when none stands among the first k; NaN without positives.

    Formula: 1 / rank. Range 0 to 1; 1 = the first place is a positive. Ties: none.
    Source: Voorhees, TREC-8 question answering track, 1999.

    Args, Returns, Raises: as `recall_at_k`.

    >>> mrr_at_k(*match_positives([["a", "b", "c", "d"]], [["b", "d", "x"]]), k=4).tolist()
    [0.5]
    """
    top = _first(hits, k)
    return _per_query(np.where(top.any(axis=1), 1.0 / (top.argmax(axis=1) + 1.0), 0.0), num_positives)


def distinct_items_at_k(ranked: npt.ArrayLike, k: int) -> int:
    """Number of items that are recommended to somebody among the first k.

    Range 0 (no query, or only padding) to min(Q k, size of the catalogue); k = the same k items to everybody.
    Its share of the catalogue is the coverage of Ge, Delgado-Battenfeld and Jannach, RecSys 2010,
    doi:10.1145/1864708.1864761.

    Args:
      ranked: as in `match_positives`.
      k: 1 to K.

    Raises:
      ShapeError: k is not in 1..K.

    >>> distinct_items_at_k([["a", "b", "x"], ["a", "c", "y"], ["d", "", ""]], k=2)
    4
    """
    ids = np.unique(_first(_as_ids(ranked), k))
    return int(np.count_nonzero(~_is_padding(ids)))


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
    functions = {"recall": recall_at_k, "ndcg": ndcg_at_k, "hit_rate": hit_rate_at_k, "mrr": mrr_at_k}
    return {f"{name}_at_{k}": functions[name](hits, num_positives, k) for k in ks for name in metrics}


def macro_mean(values: FloatArray) -> float:
    """Mean over the queries with at least one positive, which all weigh the same; NaN when there is none.

    >>> macro_mean(np.array([1.0, np.nan, 0.5]))
    0.75
    """
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def auc(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Chance that a positive is scored above a negative.

    Formula: (Σ ranks of positives − P(P+1)/2) / (P·N), exact. Range 0 to 1; .5 = no better than chance.
    Ties: average ranks, so that a tied pair counts half. Empty input, or one class only: NaN.
    Source: Fawcett, Pattern Recognition Letters 2006, doi:10.1016/j.patrec.2005.10.010.

    Args:
      labels: [n], 0 or 1.
      predictions: [n], any increasing score.

    Raises:
      ShapeError: the arrays are not one-dimensional or differ in length.
      DataError: a label is not 0 or 1, or a prediction is not finite.

    >>> # positive-negative pairs: (.9, .4) right, (.9, .2) right, (.4, .4) tied, (.4, .2) right
    >>> auc([1, 0, 1, 0], [0.9, 0.4, 0.4, 0.2])
    0.875
    """
    y, p = _binary_pairs(labels, predictions)
    return float(auc_by_group(y, p, np.zeros(len(y), dtype=np.int64))[0][0])


def gauc(labels: npt.ArrayLike, predictions: npt.ArrayLike, user_ids: npt.ArrayLike) -> float:
    """AUC within each user, averaged over users by their number of impressions.

    Formula: Σ_u n_u · AUC_u / Σ_u n_u over the users with both classes; the others carry no weight.
    Range 0 to 1; .5 = the order within users is no better than chance. Ties: as `auc`. No such user: NaN.
    Source: Zhu et al., KDD 2017, arXiv:1703.02091.

    Args:
      labels, predictions: as `auc`.
      user_ids: [n], any type that sorts.

    Raises:
      ShapeError, DataError: as `auc`.

    >>> # u: AUC 1 over 2 rows, v: AUC 0 over 2 rows, w: one class, left out
    >>> gauc([1, 0, 1, 0, 1], [0.9, 0.4, 0.2, 0.3, 0.5], ["u", "u", "v", "v", "w"])
    0.5
    """
    y, p = _binary_pairs(labels, predictions)
    users = np.asarray(user_ids)
    if users.shape != y.shape:
        raise ShapeError(f"user_ids has shape {users.shape}; expected {y.shape}, one user per label.")
    auc_of_user, num_rows = auc_by_group(y, p, np.unique(users, return_inverse=True)[1])
    defined = ~np.isnan(auc_of_user)
    if not defined.any():
        return float("nan")
    return float(np.average(auc_of_user[defined], weights=num_rows[defined]))


def auc_by_group(
    labels: FloatArray, predictions: FloatArray, groups: IntArray
) -> tuple[FloatArray, IntArray]:
    """AUC within each group, for instance each user.

    Args:
      labels: float64 [n], 0 or 1.
      predictions: float64 [n], finite.
      groups: int64 [n], 0 to G - 1; without rows there is one group.

    Returns:
      float64 [G], AUC, NaN where a class is missing; int64 [G], number of rows.
    """
    size = int(groups.max()) + 1 if len(groups) else 1
    num_rows = np.bincount(groups, minlength=size)
    num_positive = np.bincount(groups, weights=labels, minlength=size)
    num_pairs = num_positive * (num_rows - num_positive)
    rank_sum = np.bincount(groups, weights=labels * _mid_ranks(predictions, groups), minlength=size)
    result = np.full(size, np.nan)
    np.divide(rank_sum - num_positive * (num_positive + 1) / 2, num_pairs, out=result, where=num_pairs > 0)
    return result, num_rows


def log_loss(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Mean negative log likelihood of binary labels, in nats.

    Formula: −mean(y ln p + (1 − y) ln(1 − p)), p kept within [1e-7, 1 − 1e-7]. Range 0 (sure and right) to
    16.1.
    Ties: do not matter. Empty input: NaN. Source: Bishop, Pattern Recognition and Machine Learning, eq. 4.90.

    Args:
      labels: [n], 0 or 1.
      predictions: [n], probabilities.

    Raises:
      ShapeError, DataError: as `auc`; DataError also when a prediction lies outside [0, 1].

    >>> round(log_loss([1, 0, 1, 0], [0.5, 0.5, 0.5, 0.5]), 4)
    0.6931
    """
    y, p = _binary_pairs(labels, predictions)
    _check_probabilities(p)
    p = np.clip(p, _PROBABILITY_MARGIN, 1.0 - _PROBABILITY_MARGIN)
    return _mean(-(y * np.log(p) + (1.0 - y) * np.log1p(-p)))


def ece(labels: npt.ArrayLike, predictions: npt.ArrayLike, num_bins: int = 20) -> float:
    """Expected calibration error over bins of equal mass.

    Formula: Σ_b n_b / n · |mean label of b − mean prediction of b|; the bin of an example is its mid-rank /
    n.
    Range 0 (calibrated, at this resolution) to 1. Ties share a bin, so that the order of the rows does not
    matter and bins of few distinct predictions can be uneven or empty. Empty input: NaN.
    Source: Nixon et al., CVPR workshops 2019, arXiv:1904.01685.

    Args:
      labels: [n], 0 or 1.
      predictions: [n], probabilities.
      num_bins: at least 1.

    Raises:
      ShapeError, DataError: as `log_loss`.
      ConfigError: num_bins is below 1.

    >>> # low bin: mean label 0, mean prediction .2; high bin: mean label .5, mean prediction .8
    >>> round(ece([0, 0, 1, 0], [0.1, 0.3, 0.7, 0.9], num_bins=2), 4)
    0.25
    """
    y, p = _binary_pairs(labels, predictions)
    _check_probabilities(p)
    _check_num_bins(num_bins)
    if not len(y):
        return float("nan")
    return float(np.abs(np.bincount(_equal_mass_bins(p, num_bins), weights=y - p)).sum() / len(y))


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Examples of like predictions.

    Attributes:
      count: examples, at least 1.
      mean_prediction: of these, in the unit of the label.
      mean_label: of these; equal to the mean prediction where the model is calibrated.
      label_low, label_high: 95 % confidence interval of the mean label.
    """

    count: int
    mean_prediction: float
    mean_label: float
    label_low: float
    label_high: float


def reliability_table(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, num_bins: int = 15
) -> list[ReliabilityBin]:
    """Mean label by level of the prediction, in bins of equal mass; for labels of any kind.

    Bins: as `ece`, in ascending order of the prediction; empty ones are left out. No examples: no bins.
    Interval: Wilson's where all labels are 0 or 1 (JASA 1927, doi:10.1080/01621459.1927.10502953), which has
    a width also in a bin of one class; else mean ± 1.96 s / √n, s with n − 1, NaN for a single example.

    Args:
      labels, predictions: [n], same unit.
      num_bins: at least 1.

    Raises:
      ShapeError: the arrays are not one-dimensional or differ in length.
      DataError: a value is not finite.
      ConfigError: num_bins is below 1.

    >>> # low bin: 0 of 2; high bin: 1 of 2, between .0945 and .9055
    >>> for row in reliability_table([0, 0, 1, 0], [0.1, 0.3, 0.7, 0.9], num_bins=2):
    ...     print(row.count, row.mean_prediction, row.mean_label, round(row.label_low, 4))
    2 0.2 0.0 0.0
    2 0.8 0.5 0.0945
    """
    y, p = _pairs(labels, predictions)
    _check_num_bins(num_bins)
    bins = _equal_mass_bins(p, num_bins)
    is_binary = bool(((y == 0) | (y == 1)).all())
    table = []
    for place in np.unique(bins):
        mine = bins == place
        low, high = _mean_interval(y[mine], is_binary)
        table.append(
            ReliabilityBin(
                int(mine.sum()), float(p[mine].mean()), float(y[mine].mean()), float(low), float(high)
            )
        )
    return table


def calibration_error(table: Sequence[ReliabilityBin]) -> float:
    """Mean distance of mean label and mean prediction over the examples, in the unit of the label.

    Formula: Σ_b n_b / n · |mean label of b − mean prediction of b|: `ece`, for labels of any kind. No bins:
    NaN.

    >>> round(calibration_error(reliability_table([0, 0, 30, 60], [5, 5, 40, 40], num_bins=2)), 4)
    5.0
    """
    count = sum(row.count for row in table)
    total = sum(row.count * abs(row.mean_label - row.mean_prediction) for row in table)
    return total / count if count else float("nan")


def mae(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Mean absolute error, in the unit of the label.

    Formula: mean |y − ŷ|. Range 0 upwards. Ties: do not matter. Empty input: NaN.
    Source: Willmott and Matsuura, Climate Research 2005, doi:10.3354/cr030079.

    Args:
      labels, predictions: [n], same unit.

    Raises:
      ShapeError: the arrays are not one-dimensional or differ in length.
      DataError: a value is not finite.

    >>> mae([0.0, 2.0, 4.0, 8.0], [1.0, 2.0, 6.0, 7.0])
    1.0
    """
    y, p = _pairs(labels, predictions)
    return _mean(np.abs(y - p))


def xauc(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Share of the pairs with different labels that the predictions put in the right order.

    Formula: (right + ½ · tied predictions) / pairs with different labels; all pairs, none sampled, O(n log
    n).
    Range 0 to 1; .5 = no better than chance. Equals `auc` for binary labels. Ties: pairs with equal labels
    do not count, tied predictions count half. Empty input, or all labels equal: NaN.
    Source: Zhan et al., KDD 2022, doi:10.1145/3534678.3539092.

    Args, Raises: as `mae`.

    >>> # six pairs: five right, (3, 2) with predictions (1, 4) wrong
    >>> round(xauc([1.0, 2.0, 3.0, 5.0], [0.5, 4.0, 1.0, 9.0]), 4)
    0.8333
    """
    y, p = _pairs(labels, predictions)
    order = np.lexsort((p, y))
    y, p = y[order], p[order]
    is_new = (np.diff(y, prepend=np.nan) != 0) | (np.diff(p, prepend=np.nan) != 0)
    num_tied_both = _num_pairs(np.diff(np.flatnonzero(is_new), append=len(y)))
    _, codes, prediction_counts = np.unique(p, return_inverse=True, return_counts=True)
    num_tied_prediction = _num_pairs(prediction_counts) - num_tied_both
    _, label_counts = np.unique(y, return_counts=True)
    num_different = len(y) * (len(y) - 1) // 2 - _num_pairs(label_counts)
    if num_different == 0:
        return float("nan")
    # Rows of equal label are in ascending prediction order, so an inversion always is a pair of different
    # labels.
    num_wrong = _count_inversions(codes)
    return (num_different - num_wrong - num_tied_prediction / 2) / num_different


def weighted_pairwise_loss(
    clicks: npt.ArrayLike, watch_times: npt.ArrayLike, predictions: npt.ArrayLike, group_ids: npt.ArrayLike
) -> float:
    """Share of watch time that goes to clicked rows ranked below an unclicked row of the same group.

    Formula: Σ T_i · [p_i < p_j] / Σ T_i over the pairs of a clicked row i and an unclicked row j of one
    group; all pairs, O(n log n). Range 0 to 1; .5 = no better than chance. Ties: a tied pair counts half.
    No pair, or no watch time in one: NaN. Source: Covington et al., RecSys 2016,
    doi:10.1145/2959100.2959190, section 4.3 and table 2, where a group is a page shown to a user.

    Args:
      clicks: [n], 0 or 1.
      watch_times: [n], at least 0; those of unclicked rows are not read.
      predictions: [n], any increasing score.
      group_ids: [n], any type that sorts: the page, the session or the user.

    Raises:
      ShapeError: the arrays are not one-dimensional or differ in length.
      DataError: a click is not 0 or 1, or a value is not finite.

    >>> # u: the clicked 30 s are above one unclicked row and below the other; v: 10 s, below; w: no pair
    >>> weighted_pairwise_loss([1, 0, 0, 1, 0, 1], [30, 0, 0, 10, 5, 9], [4, 3, 5, 1, 2, 7], list("uuuvvw"))
    0.5714285714285714
    """
    y, p = _binary_pairs(clicks, predictions)
    _, watched = _pairs(clicks, watch_times)
    groups = np.unique(np.asarray(group_ids), return_inverse=True)[1]
    if groups.shape != y.shape:
        raise ShapeError(f"group_ids has shape {groups.shape}; expected {y.shape}, one group per row.")
    clicked = y == 1
    # Among the rows ranked below a clicked one, those that are not clicked: all less the clicked.
    num_below = _mid_ranks(p, groups)[clicked] - _mid_ranks(p[clicked], groups[clicked])
    num_unclicked = np.bincount(groups[~clicked], minlength=len(y))[groups[clicked]]
    total = float((watched[clicked] * num_unclicked).sum())
    return float((watched[clicked] * (num_unclicked - num_below)).sum()) / total if total else float("nan")


def ranking_metrics(
    kind: TaskKind, labels: npt.ArrayLike, predictions: npt.ArrayLike, user_ids: npt.ArrayLike
) -> dict[str, float]:
    """All metrics that suit a task.

    Args:
      kind: what the task predicts.
      labels, predictions: [n].
      user_ids: [n].

    Returns:
      Metric name -> value, the names of `RANKING_METRICS[kind]`.

    Raises:
      ShapeError, DataError: from the metrics.
    """
    values = {
        "auc": lambda: auc(labels, predictions),
        "gauc": lambda: gauc(labels, predictions, user_ids),
        "log_loss": lambda: log_loss(labels, predictions),
        "ece": lambda: ece(labels, predictions),
        "mae": lambda: mae(labels, predictions),
        "xauc": lambda: xauc(labels, predictions),
    }
    return {name: values[name]() for name in RANKING_METRICS[kind]}


def _as_ids(ids: npt.ArrayLike, like: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Ids as an array of str, bytes or integers; `like` is what an id array must agree with."""
    array = np.asarray(ids)
    if array.dtype.kind == "O":
        array = np.array(array.tolist()).reshape(array.shape)
    if array.size == 0:
        return array.astype(like.dtype if like is not None else np.str_)
    kinds = like.dtype.kind if like is not None and like.size else "iuUS"
    if array.dtype.kind not in kinds:
        expected = "str, bytes or integers" if like is None else f"{like.dtype}, as the ranked lists"
        raise ShapeError(f"ids have dtype {array.dtype}; expected {expected}: convert one of the two.")
    return array


def _is_padding(ids: npt.NDArray[Any]) -> BoolArray:
    return np.asarray(ids < 0 if ids.dtype.kind in "iu" else ids == ids.dtype.type())


def _first(table: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    """The first k columns; refuses a k beyond the lists, which would pass metric@K off as metric@k."""
    if table.ndim != 2 or not 1 <= k <= table.shape[1]:
        raise ShapeError(
            f"k is {k} for ranked lists of shape {table.shape}; "
            "expected 1 <= k <= list length: retrieve more items."
        )
    return table[:, :k]


def _per_query(
    values: npt.NDArray[Any], num_positives: IntArray, divide_by: npt.NDArray[Any] | float = 1.0
) -> FloatArray:
    """values / divide_by where there are positives, NaN elsewhere."""
    result = np.full(len(values), np.nan)
    np.divide(values, divide_by, out=result, where=num_positives > 0)
    return result


def _pairs(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both as float64 [n], finite."""
    pair = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape:
        raise ShapeError(f"labels {pair[0].shape} and predictions {pair[1].shape} must both be [n].")
    for name, values in zip(("labels", "predictions"), pair, strict=True):
        if not np.isfinite(values).all():
            raise DataError(
                f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} {name} are NaN or infinite; "
                "drop rows without a label, and check the model for overflow."
            )
    return pair


def _binary_pairs(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    pair = _pairs(labels, predictions)
    wrong = pair[0][(pair[0] != 0) & (pair[0] != 1)]
    if len(wrong):
        raise DataError(f"binary labels must be 0 or 1; found {wrong[0]} and {len(wrong) - 1} more.")
    return pair


def _check_probabilities(predictions: FloatArray) -> None:
    wrong = predictions[(predictions < 0) | (predictions > 1)]
    if len(wrong):
        raise DataError(
            f"predictions must be probabilities in [0, 1]; found {wrong[0]} and {len(wrong) - 1} more: "
            "pass them through a sigmoid."
        )


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _num_pairs(counts: IntArray) -> int:
    return int((counts * (counts - 1) // 2).sum())


def _check_num_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ConfigError(f"num_bins is {num_bins}; expected at least 1.")


def _equal_mass_bins(predictions: FloatArray, num_bins: int) -> IntArray:
    """Bin of each example, 0 to num_bins − 1: its mid-rank / n."""
    # In whole numbers (twice the mid-rank is one), so that no bin edge depends on rounding.
    ranks = _mid_ranks(predictions, np.zeros(len(predictions), dtype=np.int64))
    doubled = (2 * ranks).astype(np.int64)
    return np.asarray((doubled - 1) * num_bins // max(2 * len(predictions), 1), dtype=np.int64)


def _mean_interval(values: FloatArray, is_binary: bool) -> tuple[float, float]:
    """95 % confidence interval of the mean of at least one value."""
    n, mean, z = len(values), values.mean(), _NORMAL_QUANTILE
    if is_binary:
        center = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        # The exact bound of a bin of one class is 0 or 1; rounding may miss it.
        return max(0.0, center - half), min(1.0, center + half)
    half = z * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return mean - half, mean + half


def _mid_ranks(values: FloatArray, groups: IntArray) -> FloatArray:
    """Ranks 1..n_g within each group, the average rank for equal values."""
    order = np.lexsort((values, groups))
    sorted_groups, sorted_values = groups[order], values[order]
    new_group = np.diff(sorted_groups, prepend=-1) != 0
    new_tie = new_group | (np.diff(sorted_values, prepend=np.nan) != 0)
    tie = np.cumsum(new_tie) - 1
    first_of_tie = np.flatnonzero(new_tie)
    size_of_tie = np.diff(first_of_tie, append=len(values))
    group_start = np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    ranks = np.empty(len(values))
    ranks[order] = (first_of_tie + (size_of_tie + 1) / 2)[tie] - group_start
    return ranks


def _count_inversions(codes: IntArray) -> int:
    """Number of places i < j with codes[i] > codes[j]; codes are 0..m-1.

    Works through the bits from the highest down. Two codes are inverted exactly when, at the highest bit in
    which they differ, the earlier one has a 1 and the later a 0. Rows that agree in all higher bits form a
    block that keeps its order, so each level is a cumulative sum.
    """
    num_inversions = 0
    top_bit = int(codes.max()).bit_length() if len(codes) else 0
    for shift in range(top_bit - 1, -1, -1):
        blocks = codes >> (shift + 1)
        bit = (codes >> shift) & 1
        ones_before = np.cumsum(bit) - bit
        block_start = np.searchsorted(blocks, blocks, side="left")
        num_inversions += int(((ones_before - ones_before[block_start]) * (1 - bit)).sum())
        codes = codes[np.argsort(codes >> shift, kind="stable")]
    return num_inversions
