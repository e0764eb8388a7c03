"""Telling a difference between two rankers from noise: their metrics on resampled users.

Letters: n = rows, U = users, R = resamples, S = seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from schema.errors import ConfigError
from trainer import metrics
from trainer.metrics import FloatArray, IntArray

# A metric of fixed labels and predictions where row i counts weights[i] times, float64 [n] to float.
WeightedMetric = Callable[[FloatArray], float]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much better or worse one model is than another on the same users.

    Attributes:
      difference: ours − theirs, each the mean over seeds.
      low, high: 95 % interval of it, percentiles of the paired bootstrap over users; NaN where the metric is
        not defined.
    """

    difference: float
    low: float
    high: float


def resampled(
    metric: str,
    labels: FloatArray,
    predictions: Sequence[FloatArray],
    user_ids: npt.ArrayLike,
    num_samples: int,
) -> FloatArray:
    """A metric on R draws of U users with replacement, each draw the mean over seeds.

    The draws depend on the users alone, so that two models on the same rows meet the same ones. A user who is
    drawn twice counts as two users: GAUC does not compare their rows.

    Args:
      metric: auc, gauc, mae or xauc, as in `trainer.metrics`.
      labels: float64 [n].
      predictions: S arrays, float64 [n].
      user_ids: [n], any type that sorts.
      num_samples: R.

    Returns:
      float64 [R]; NaN where a draw does not define the metric.

    Raises:
      ConfigError: an unknown metric.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; users are drawn and not
    rows, because the rows of a user depend on each other.
    """
    if metric not in _WEIGHTED:
        raise ConfigError(f"unknown metric {metric!r}; expected one of {', '.join(_WEIGHTED)}")
    users, codes = np.unique(np.asarray(user_ids), return_inverse=True)
    prepared = [_WEIGHTED[metric](labels, p, codes) for p in predictions]
    generator = np.random.default_rng(0)
    values = np.empty(num_samples)
    for draw in range(num_samples):
        times = np.bincount(generator.integers(len(users), size=len(users)), minlength=len(users))
        weights = times[codes].astype(np.float64)
        values[draw] = np.mean([value(weights) for value in prepared])
    return values


def difference(ours: float, theirs: float, our_draws: FloatArray, their_draws: FloatArray) -> Difference:
    """Compares two models by their metric on all rows, and on the draws of `resampled`."""
    spread = our_draws - their_draws
    low, high = np.percentile(spread, (2.5, 97.5)) if not np.isnan(spread).any() else (np.nan, np.nan)
    return Difference(ours - theirs, float(low), float(high))


def weighted_auc(labels: FloatArray, predictions: FloatArray, users: IntArray) -> WeightedMetric:
    """`metrics.auc`."""
    _, codes = np.unique(predictions, return_inverse=True)

    def value(weights: FloatArray) -> float:
        positive = np.bincount(codes, weights=weights * labels)
        negative = np.bincount(codes, weights=weights * (1.0 - labels))
        num_pairs = positive.sum() * negative.sum()
        below = np.cumsum(negative) - negative / 2
        return float(positive @ below / num_pairs) if num_pairs else float("nan")

    return value


def weighted_gauc(labels: FloatArray, predictions: FloatArray, users: IntArray) -> WeightedMetric:
    """`metrics.gauc`."""
    auc_of_user, num_rows = metrics.auc_by_group(labels, predictions, users)
    defined = np.flatnonzero(~np.isnan(auc_of_user))
    first_row = np.unique(users, return_index=True)[1]

    def value(weights: FloatArray) -> float:
        weight = num_rows[defined] * weights[first_row[defined]]
        total = weight.sum()
        return float(weight @ auc_of_user[defined] / total) if total else float("nan")

    return value


def weighted_mae(labels: FloatArray, predictions: FloatArray, users: IntArray) -> WeightedMetric:
    """`metrics.mae`."""
    errors = np.abs(labels - predictions)
    return lambda weights: float(weights @ errors / weights.sum())


def weighted_xauc(labels: FloatArray, predictions: FloatArray, users: IntArray) -> WeightedMetric:
    """`metrics.xauc`; the order of the rows is worked out once, see `metrics.xauc` for the method."""
    order = np.lexsort((predictions, labels))
    _, label_codes = np.unique(labels[order], return_inverse=True)
    _, codes = np.unique(predictions[order], return_inverse=True)
    _, both = np.unique(label_codes * (codes.max() + 1) + codes, return_inverse=True)
    levels = _inversion_levels(codes)

    def value(weights: FloatArray) -> float:
        w = weights[order]
        squares = [np.square(np.bincount(tie, weights=w)).sum() for tie in (label_codes, codes, both)]
        num_different = (np.square(w.sum()) - squares[0]) / 2
        num_tied = (squares[1] - squares[2]) / 2
        num_wrong = 0.0
        for rows, bit, block_start in levels:
            of_one = w[rows] * bit
            ones_before = np.cumsum(of_one) - of_one
            num_wrong += (w[rows] * (1 - bit)) @ (ones_before - ones_before[block_start])
        good = num_different - num_wrong - num_tied / 2
        return float(good / num_different) if num_different else float("nan")

    return value


def _inversion_levels(codes: IntArray) -> list[tuple[IntArray, IntArray, IntArray]]:
    """For each bit of the codes from the highest down: rows in the order of the higher bits, their bit, and
    where the rows begin that agree with each in all higher bits."""
    rows, levels = np.arange(len(codes)), []
    for shift in range(int(codes.max()).bit_length() - 1, -1, -1):
        blocks = codes[rows] >> (shift + 1)
        block_start = np.searchsorted(blocks, blocks, side="left")
        levels.append((rows, (codes[rows] >> shift) & 1, block_start))
        rows = rows[np.argsort(codes[rows] >> shift, kind="stable")]
    return levels


_WEIGHTED: Mapping[str, Callable[[FloatArray, FloatArray, IntArray], WeightedMetric]] = {
    "auc": weighted_auc,
    "gauc": weighted_gauc,
    "mae": weighted_mae,
    "xauc": weighted_xauc,
}
