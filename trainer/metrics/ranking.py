"""Metrics of predictions against labels, over rows.

Letters: n = rows.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import entr

from schema.contract import TaskKind
from schema.errors import ShapeError
from trainer.metrics.arrays import (
    FloatArray,
    IntArray,
    binary_pairs,
    check_probabilities,
    mean_or_nan,
    mid_ranks,
    pairs,
)
from trainer.metrics.calibration import ece
from trainer.metrics.keys import RANKING_METRICS

# Probabilities are kept this far from 0 and 1: one sure and wrong prediction costs 16, not infinity.
_PROBABILITY_MARGIN = 1e-7


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
    y, p = binary_pairs(labels, predictions)
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
    y, p = binary_pairs(labels, predictions)
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
    rank_sum = np.bincount(groups, weights=labels * mid_ranks(predictions, groups), minlength=size)
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
    return mean_or_nan(row_log_loss(labels, predictions))


def normalised_entropy(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Log loss in units of that of always predicting the mean label.

    Formula: log loss / −(y̅ ln y̅ + (1 − y̅) ln(1 − y̅)). Range 0 upwards; 1 = no better than knowing the mean.
    Unlike log loss it can be compared between tasks whose positives are rare and not so rare.
    Ties: do not matter. Empty input, or one class only: NaN.
    Source: He et al., ADKDD 2014, doi:10.1145/2648584.2648589, section 3.

    Args, Raises: as `log_loss`.

    >>> # -(ln .8 + ln .6 + ln .8 + ln .6) / 4 over ln 2
    >>> round(normalised_entropy([1, 0, 0, 1], [0.8, 0.4, 0.2, 0.6]), 4)
    0.5294
    """
    cost, rate = log_loss(labels, predictions), mean_or_nan(np.asarray(labels, np.float64))
    entropy = float(binary_entropy(rate))
    return cost / entropy if entropy > 0 else float("nan")


def binary_entropy(rate: npt.ArrayLike) -> FloatArray:
    """Entropy of 0 or 1 of which a share `rate` is 1, in nats; 0 where one of them is certain.

    >>> binary_entropy([0.0, 0.5, 1.0]).round(4).tolist()
    [0.0, 0.6931, 0.0]
    """
    share = np.asarray(rate, np.float64)
    return np.asarray(entr(share) + entr(1.0 - share))


def row_log_loss(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> FloatArray:
    """What each row costs in `log_loss`: float64 [n], in nats; arguments and errors as there."""
    y, p = binary_pairs(labels, predictions)
    check_probabilities(p)
    p = np.clip(p, _PROBABILITY_MARGIN, 1.0 - _PROBABILITY_MARGIN)
    return np.asarray(-(y * np.log(p) + (1.0 - y) * np.log1p(-p)))


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
    return mean_or_nan(row_absolute_error(labels, predictions))


def row_absolute_error(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> FloatArray:
    """How far each prediction is off: float64 [n]; arguments and errors as `mae`."""
    y, p = pairs(labels, predictions)
    return np.asarray(np.abs(y - p))


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
    num_right, num_different = concordance(labels, predictions)
    total = num_different.sum()
    return float(num_right.sum() / total) if total else float("nan")


def concordance(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """How each row stands to all rows with another label; summed over rows, every pair counts twice.

    Args, Raises: as `mae`.

    Returns:
      float64 [n], number of rows with another label that the predictions put in the right order with this
      one, tied predictions counting half; float64 [n], number of rows with another label. O(n log n).

    >>> num_right, num_different = concordance([1, 0, 1], [0.9, 0.4, 0.4])
    >>> num_right.tolist(), num_different.tolist()
    ([1.0, 1.5, 0.5], [1.0, 2.0, 1.0])
    """
    y, p = pairs(labels, predictions)
    if not len(y):
        return np.zeros(0), np.zeros(0)
    order = np.lexsort((p, y))
    label_codes, label_counts = np.unique(y[order], return_inverse=True, return_counts=True)[1:]
    codes, code_counts = np.unique(p[order], return_inverse=True, return_counts=True)[1:]
    both = label_codes * (codes.max() + 1) + codes
    both_codes, both_counts = np.unique(both, return_inverse=True, return_counts=True)[1:]
    num_different = len(y) - label_counts[label_codes]
    num_tied = code_counts[codes] - both_counts[both_codes]
    # Rows of equal label are in ascending prediction order, so an inversion always is a pair of different
    # labels.
    num_right = np.empty(len(y))
    num_right[order] = num_different - _inversions(codes) - num_tied / 2
    result = np.empty(len(y))
    result[order] = num_different
    return num_right, result


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
    lost, total = (row.sum() for row in row_weighted_pairs(clicks, watch_times, predictions, group_ids))
    return float(lost / total) if total else float("nan")


def row_weighted_pairs(
    clicks: npt.ArrayLike, watch_times: npt.ArrayLike, predictions: npt.ArrayLike, group_ids: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """The sums of `weighted_pairwise_loss` by clicked row; arguments and errors as there.

    Returns:
      float64 [n], watch time times the unclicked rows of the group that are ranked above the row, ties
      counting half; float64 [n], watch time times all unclicked rows of the group. Both 0 for unclicked rows.
    """
    y, p = binary_pairs(clicks, predictions)
    _, watched = pairs(clicks, watch_times)
    groups = np.unique(np.asarray(group_ids), return_inverse=True)[1]
    if groups.shape != y.shape:
        raise ShapeError(f"group_ids has shape {groups.shape}; expected {y.shape}, one group per row.")
    clicked = y == 1
    # Among the rows ranked below a clicked one, those that are not clicked: all less the clicked.
    num_below = mid_ranks(p, groups)[clicked] - mid_ranks(p[clicked], groups[clicked])
    num_unclicked = np.bincount(groups[~clicked], minlength=len(y))[groups[clicked]]
    lost, total = np.zeros(len(y)), np.zeros(len(y))
    lost[clicked] = watched[clicked] * (num_unclicked - num_below)
    total[clicked] = watched[clicked] * num_unclicked
    return lost, total


def ranking_metrics(
    kind: TaskKind,
    labels: npt.ArrayLike,
    predictions: npt.ArrayLike,
    user_ids: npt.ArrayLike,
    clicks: npt.ArrayLike | None = None,
) -> dict[str, float]:
    """All metrics that suit a task.

    Args:
      kind: what the task predicts.
      labels, predictions: [n].
      user_ids: [n].
      clicks: [n], whether the row was chosen, 1 or 0, NaN where that is not known; for watch time, whose
        weighted pairwise loss takes the rows of a user for a page. None: not known of any row.

    Returns:
      Metric name -> value, the names of `RANKING_METRICS[kind]`.

    Raises:
      ShapeError, DataError: from the metrics.
    """
    values = {
        "auc": lambda: auc(labels, predictions),
        "gauc": lambda: gauc(labels, predictions, user_ids),
        "log_loss": lambda: log_loss(labels, predictions),
        "normalised_entropy": lambda: normalised_entropy(labels, predictions),
        "ece": lambda: ece(labels, predictions),
        "mae": lambda: mae(labels, predictions),
        "xauc": lambda: xauc(labels, predictions),
        "weighted_pairwise_loss": lambda: weighted_pairwise_loss(
            *known_clicks(clicks, labels, predictions, user_ids)
        ),
    }
    return {name: values[name]() for name in RANKING_METRICS[kind]}


def known_clicks(clicks: npt.ArrayLike | None, *columns: npt.ArrayLike) -> tuple[npt.NDArray[Any], ...]:
    """Clicks and further columns of the rows whose click is known; none of them where `clicks` is None.

    Raises:
      ShapeError: `clicks` is not one per row.
    """
    arrays = [np.asarray(column) for column in columns]
    found = np.full(len(arrays[0]), np.nan) if clicks is None else np.asarray(clicks, np.float64)
    if found.shape != arrays[0].shape:
        raise ShapeError(f"clicks has shape {found.shape}; expected {arrays[0].shape}, one per row.")
    known = ~np.isnan(found)
    return (found[known], *(array[known] for array in arrays))


def _inversions(codes: IntArray) -> IntArray:
    """For each place, how many others are inverted with it: a larger code before it or a smaller one after.

    Works through the bits from the highest down. Two codes are inverted exactly when, at the highest bit in
    which they differ, the earlier one has a 1 and the later a 0. Rows that agree in all higher bits form a
    block that keeps its order, so each level is a cumulative sum.

    Args:
      codes: [n], 0 to m - 1.
    """
    num_inversions = np.zeros(len(codes), dtype=np.int64)
    place = np.arange(len(codes))
    for shift in range(int(codes.max()).bit_length() - 1, -1, -1):
        blocks, bit = codes >> (shift + 1), (codes >> shift) & 1
        start, end = (np.searchsorted(blocks, blocks, side=side) for side in ("left", "right"))
        ones = np.concatenate([[0], np.cumsum(bit)])
        here = np.arange(len(codes))
        ones_before = ones[here] - ones[start]
        zeros_after = (end - here) - (ones[end] - ones[here])
        num_inversions[place] += np.where(bit == 1, zeros_after, ones_before)
        order = np.argsort(codes >> shift, kind="stable")
        codes, place = codes[order], place[order]
    return num_inversions
