"""Intervals for metrics that a few users decide: the jackknife over users, with a t quantile of their number.

Resampling users (`trainer.uncertainty`) assumes that those drawn stand for those not drawn. Where a few
users have much of the weight its percentiles are too narrow. Here the variance comes from leaving each user
out, and the t distribution has fewer degrees of freedom, the fewer users make that variance up.

    jackknife_intervals({"snips": ratio_of_sums(earned, weights)})["snips"].low
    jackknife_differences(candidate, other)["snips"].p_value

Letters: U = users, v = the metric, d[u] = v less the metric without user u, ν = degrees of freedom.

Formulas: d'[u] = d[u] − mean(d); variance V = (U − 1) / U × Σ d'[u]²; interval v ± t(ν) √V;
ν = 2 (Σ d'²)² / Σ (d'² − mean(d'²))², at least 1 and at most U − 1: U − 1 where the d' are normal, less where
their tails are heavy.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11 (jackknife); Pan and Wall,
Statistics in Medicine 2002, doi:10.1002/sim.1142 (degrees of freedom).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from scipy import stats

from schema.errors import ConfigError, ShapeError
from trainer.metrics import FloatArray
from trainer.uncertainty import MIN_USERS, Interval, PairedDifference, UserSums


def jackknife_intervals(
    statistics: Mapping[str, UserSums], *, confidence: float = 0.95
) -> dict[str, Interval]:
    """Confidence intervals of metrics that are smooth in their sums, for instance ratios.

    Args:
      statistics: metrics over the same users.
      confidence: in (0, 1).

    Returns:
      Metric name -> interval; bounds are NaN with fewer than MIN_USERS users.

    Raises:
      ConfigError: confidence is out of range.
    """
    result = {}
    for name, metric in statistics.items():
        num_users = int(metric.says_something.sum())
        margin, _ = _margin(_left_out(metric), metric.value, num_users, confidence)
        result[name] = Interval(
            metric.value, metric.value - margin, metric.value + margin, confidence, num_users
        )
    return result


def jackknife_differences(
    candidate: Mapping[str, UserSums], other: Mapping[str, UserSums], *, confidence: float = 0.95
) -> dict[str, PairedDifference]:
    """Candidate minus other on the same users, with interval and p-value of the t-test.

    Args:
      candidate, other: row u of both is the same user; the metrics that both have are compared.
      confidence: in (0, 1).

    Raises:
      ConfigError: confidence is out of range.
      ShapeError: the two are over different numbers of users.
    """
    result = {}
    for name, ours in candidate.items():
        if name not in other:
            continue
        theirs = other[name]
        if len(ours.sums) != len(theirs.sums):
            raise ShapeError(f"{name} over {len(ours.sums)} and {len(theirs.sums)} users; expected the same.")
        num_users = int((ours.says_something | theirs.says_something).sum())
        value = ours.value - theirs.value
        margin, p_value = _margin(_left_out(ours) - _left_out(theirs), value, num_users, confidence)
        result[name] = PairedDifference(value, value - margin, value + margin, confidence, p_value, num_users)
    return result


def _left_out(metric: UserSums) -> FloatArray:
    """d, of the users one by one: float64 [U]."""
    return metric.value - metric.combine(metric.sums.sum(axis=0) - metric.sums)


def _margin(d: FloatArray, value: float, num_users: int, confidence: float) -> tuple[float, float]:
    """Half the width of the interval, and the p-value of "the value is 0"; NaN where users are too few."""
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected a share between 0 and 1, such as 0.95.")
    if num_users < MIN_USERS:
        return math.nan, math.nan
    squares = (d - d.mean()) ** 2
    error = math.sqrt((len(d) - 1) / len(d) * squares.sum())
    if error == 0:
        return 0.0, 1.0 if value == 0 else 0.0
    spread = float(((squares - squares.mean()) ** 2).sum())
    freedom = len(d) - 1.0
    if spread:
        freedom = min(freedom, max(1.0, 2 * float(squares.sum()) ** 2 / spread))
    return (
        float(stats.t.ppf((1 + confidence) / 2, freedom)) * error,
        float(2 * stats.t.sf(abs(value) / error, freedom)),
    )
