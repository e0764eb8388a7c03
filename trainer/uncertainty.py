"""How sure a metric is: intervals over users, paired differences, and "no worse than".

Users are drawn with replacement, not rows: the rows of a user depend on each other. Every metric is kept as
sums by user (`UserSums`), so that thousands of resamples are one product of matrices, and the same seed draws
the same users for two models, which pairs them.

    candidate = ranking_sums(TaskKind.BINARY, labels, predictions, user_ids)   # or retrieval_sums(values)
    other = ranking_sums(TaskKind.BINARY, labels, other_predictions, user_ids)
    intervals(candidate)["auc"]                       # Interval(value, low, high, confidence, num_users)
    change = paired_differences(candidate, other)["log_loss"]         # PairedDifference(..., p_value, ...)
    no_worse(change, margin=0.002, lower_is_better=True).holds        # at confidence 97.5 %

Letters: n = rows, U = users, R = resamples, M = sums that a metric is made of.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 (percentiles), 15 (tests);
Field and Welsh, J. R. Stat. Soc. B 2007, doi:10.1111/j.1467-9868.2007.00593.x (clusters).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from schema.contract import TaskKind
from schema.errors import ConfigError, ShapeError
from trainer import metrics
from trainer.metrics import FloatArray, IntArray
from trainer.metrics.calibration import NUM_BINS, equal_mass_bins

NUM_RESAMPLES = 2_000
# Fewer users than this do not tell how much users differ; percentiles of their resamples would be too narrow.
MIN_USERS = 10

# Bounds the memory of the weights of some resamples to 32 MB.
_CELLS_PER_CHUNK = 4_000_000
# Sums of the same numbers differ by less, in any order; metrics that differ by less are equal.
_ROUNDING = 1e-10


@dataclasses.dataclass(frozen=True)
class UserSums:
    """A metric as a function of sums over users.

    Attributes:
      sums: float64 [U, M]; the metric is combine(Σ_u sums[u]). A user who says nothing has zeros.
      combine: float64 [..., M] -> float64 [...]; NaN where the metric is not defined.
      noise: for a metric that is a distance, which noise only makes larger: float64 [..., M], sums of a draw,
        -> float64 [...], how far noise alone has moved it; None for other metrics.
    """

    sums: FloatArray
    combine: Callable[[FloatArray], FloatArray]
    noise: Callable[[FloatArray], FloatArray] | None = None

    @property
    def value(self) -> float:
        """The metric on all users; that of `trainer.metrics`."""
        return float(self.combine(self.sums.sum(axis=0)))

    @property
    def says_something(self) -> npt.NDArray[np.bool_]:
        """bool [U], whether the user has a part in the metric."""
        return np.asarray(self.sums.any(axis=1))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A metric and its confidence interval.

    Attributes:
      value: on all users; NaN where the data do not define it.
      low, high: the bounds; NaN with fewer than MIN_USERS users.
      confidence: how often such intervals hold the truth, for instance 0.95.
      num_users: users that have a part in it.
    """

    value: float
    low: float
    high: float
    confidence: float
    num_users: int


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """How much a metric of one model differs from that of another, on the same users.

    Attributes:
      value: candidate − other, positive where the candidate's is larger.
      low, high: bounds of the interval; NaN where fewer than MIN_USERS users have a part, or where the models
        differ on some users, but on fewer than MIN_USERS. Both 0 where they differ on none.
      confidence: of the interval, two-sided.
      p_value: of "there is no difference", two-sided; at most 1 − confidence exactly where 0 lies outside the
        interval, up to 1 / R. NaN as the bounds.
      num_users: users that have a part in either metric.
    """

    value: float
    low: float
    high: float
    confidence: float
    p_value: float
    num_users: int


@dataclasses.dataclass(frozen=True)
class NonInferiority:
    """Whether a candidate is no worse than another model by more than a margin.

    Attributes:
      holds: False also where the data cannot tell.
      worst_loss: the largest loss that the data allow, in the metric's unit; negative where the candidate is
        surely better; NaN where unknown.
      margin: the loss that is tolerated.
      confidence: one-sided.
    """

    holds: bool
    worst_loss: float
    margin: float
    confidence: float


def mean_over_users(values: npt.ArrayLike) -> UserSums:
    """A metric that is the mean over users with a value, for instance recall; see `metrics.macro_mean`.

    Args:
      values: float [U], NaN for users without one.

    >>> mean_over_users([1.0, float("nan"), 0.5]).value
    0.75
    """
    column = np.asarray(values, np.float64)
    if column.ndim != 1:
        raise ShapeError(f"values has shape {column.shape}; expected [U], one per user.")
    return ratio_of_sums(np.nan_to_num(column), ~np.isnan(column))


def ratio_of_sums(numerators: npt.ArrayLike, denominators: npt.ArrayLike) -> UserSums:
    """A metric that is one sum over users divided by another, for instance log loss: costs by rows.

    Args:
      numerators, denominators: float [U], finite.

    >>> ratio_of_sums([3.0, 1.0], [4, 4]).value
    0.5
    """
    return UserSums(np.column_stack([numerators, denominators]).astype(np.float64), _ratio)


def retrieval_sums(values: Mapping[str, FloatArray]) -> dict[str, UserSums]:
    """The metrics of `metrics.retrieval_metrics`, one query per user, ready for intervals.

    Args:
      values: metric name -> float64 [U].
    """
    return {name: mean_over_users(column) for name, column in values.items()}


def ranking_sums(
    kind: TaskKind,
    labels: npt.ArrayLike,
    predictions: npt.ArrayLike,
    user_ids: npt.ArrayLike,
    clicks: npt.ArrayLike | None = None,
) -> dict[str, UserSums]:
    """The metrics of `metrics.ranking_metrics`, ready for intervals.

    AUC and XAUC compare rows of different users. Their resamples are linear in the users' weights: pairs are
    counted as on all users, once for each of the two rows (the projection of Hájek on which the variances of
    DeLong, Biometrics 1988, doi:10.2307/2531595, and for clusters of Obuchowski, Biometrics 1997,
    doi:10.2307/2533958, rest). The bins of ECE are those of all rows.

    Args:
      kind: what the task predicts.
      labels, predictions: [n].
      user_ids: [n], any type that sorts; integers are fastest. Two models are paired by having the same.
      clicks: [n], as `metrics.ranking_metrics`.

    Returns:
      Metric name -> sums, the names of `RANKING_METRICS[kind]`.

    Raises:
      ShapeError, DataError: from the metrics.
    """
    users = np.unique(np.asarray(user_ids), return_inverse=True)[1]
    if users.shape != np.shape(labels):
        raise ShapeError(f"user_ids has shape {users.shape}; expected {np.shape(labels)}, one per label.")
    makers: dict[str, Callable[[FloatArray, FloatArray, IntArray], UserSums]] = {
        "auc": _concordance_sums,
        "gauc": _gauc_sums,
        "log_loss": _log_loss_sums,
        "normalised_entropy": _normalised_entropy_sums,
        "ece": _ece_sums,
        "mae": _mae_sums,
        "xauc": _concordance_sums,
        "weighted_pairwise_loss": partial(_weighted_pairs_sums, clicks),
    }
    y, p = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    return {name: makers[name](y, p, users) for name in metrics.RANKING_METRICS[kind]}


def intervals(
    statistics: Mapping[str, UserSums],
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Confidence intervals: percentiles of the metrics over resampled users.

    Noise makes a distance (ECE) larger, in the data and once more in their resamples. By the triangle
    inequality the truth is no farther from the value than noise has moved it, so that the lower bound is the
    value less a percentile of the noise of the resamples, at least 0. It is on the low side; it is 0 where
    noise alone could have made the value. In a difference of two distances the noise cancels.
    Resamples in which a metric is not defined (no positive was drawn) are left out. Users that all have the
    same value make an interval without width.

    Args:
      statistics: metrics over the same users.
      confidence: in (0, 1).
      num_resamples: R, at least 100.
      seed: of the draws; the same seed and number of users give the same draws.

    Returns:
      Metric name -> interval.

    Raises:
      ConfigError: confidence or num_resamples is out of range.
      ShapeError: the metrics differ in the number of users.
    """
    return intervals_and_differences(
        statistics, {}, confidence=confidence, num_resamples=num_resamples, seed=seed
    )[0]


def paired_differences(
    candidate: Mapping[str, UserSums],
    other: Mapping[str, UserSums],
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Candidate minus other on the same users, with interval and p-value.

    The test is the paired bootstrap: p = 2 (1 + the smaller number of resamples on either side of 0) /
    (R + 1). It tests the very difference that is reported, for ratios of sums and AUC as for means, and
    agrees with its interval. For means it agrees with the paired t-test; Wilcoxon's test is about the
    median of differences that are mostly 0, another question. What draws can say rests on the users on whom
    the models differ: with 1 to 5 of these, 95 % intervals of GAUC held the truth in 17 to 80 % of simulated
    logs, with 10 and more in 91 to 97 %.

    Args:
      candidate, other: row u of both is the same user; the metrics that both have are compared.
      confidence, num_resamples, seed: as `intervals`.

    Returns:
      Metric name -> difference.

    Raises:
      ConfigError, ShapeError: as `intervals`.
    """
    return intervals_and_differences(
        candidate, {"other": other}, confidence=confidence, num_resamples=num_resamples, seed=seed
    )[1]["other"]


def intervals_and_differences(
    candidate: Mapping[str, UserSums],
    rivals: Mapping[str, Mapping[str, UserSums]],
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[dict[str, Interval], dict[str, dict[str, PairedDifference]]]:
    """`intervals` of a candidate and its `paired_differences` to each rival, from one set of draws.

    To draw the users is what takes time.

    Args:
      candidate: metrics over users.
      rivals: rival -> metrics over the same users.
      confidence, num_resamples, seed: as `intervals`.

    Returns:
      Metric name -> interval; and rival -> metric name -> difference, of the metrics that both have.

    Raises:
      ConfigError, ShapeError: as `intervals`.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected a share between 0 and 1, such as 0.95.")
    if num_resamples < 100:
        raise ConfigError(f"num_resamples is {num_resamples}; expected at least 100.")
    shared = {
        rival: {name: metric for name, metric in theirs.items() if name in candidate}
        for rival, theirs in rivals.items()
    }
    everything = [*candidate.values(), *(metric for theirs in shared.values() for metric in theirs.values())]
    drawn = iter(_resampled_sums([metric.sums for metric in everything], num_resamples, seed))
    ours = {name: next(drawn) for name in candidate}
    own = {name: _interval(metric, ours[name], confidence) for name, metric in candidate.items()}
    differences = {
        rival: {
            name: _difference(candidate[name], metric, ours[name], next(drawn), confidence)
            for name, metric in theirs.items()
        }
        for rival, theirs in shared.items()
    }
    return own, differences


def _interval(metric: UserSums, drawn: FloatArray, confidence: float) -> Interval:
    """The interval of a metric from its sums in the draws, float64 [R, M]."""
    num_users = int(metric.says_something.sum())
    low, high = _bounds(metric.combine(drawn), confidence, num_users)
    if metric.noise is not None and not math.isnan(low):
        _, moved = _bounds(metric.noise(drawn), confidence, num_users)
        low = max(0.0, metric.value - moved)
    return Interval(metric.value, low, high, confidence, num_users)


def _difference(
    first: UserSums, second: UserSums, drawn_first: FloatArray, drawn_second: FloatArray, confidence: float
) -> PairedDifference:
    """The difference of two metrics from their sums in the same draws, float64 [R, M]."""
    num_users = num_differing = int((first.says_something | second.says_something).sum())
    # Sums of another form, such as means over several seeds, cannot be set against each other user by user.
    if first.sums.shape == second.sums.shape:
        is_close = np.isclose(first.sums, second.sums, rtol=_ROUNDING, atol=0.0)
        num_differing = int((~is_close).any(axis=1).sum())
    ours, theirs = first.combine(drawn_first), second.combine(drawn_second)
    changes = np.where(np.isclose(ours, theirs, rtol=_ROUNDING, atol=0.0), 0.0, ours - theirs)
    # A handful of users stands for all that might differ: percentiles would hold the truth half of the time.
    low, high = _bounds(changes, confidence, min(num_users, num_differing or num_users))
    p_value = math.nan if math.isnan(low) else _p_value(changes)
    return PairedDifference(first.value - second.value, low, high, confidence, p_value, num_users)


def no_worse(difference: PairedDifference, margin: float, lower_is_better: bool) -> NonInferiority:
    """Whether the candidate is no worse than the other by more than a margin.

    It holds where the bound of the interval on the bad side is within the margin, which is a one-sided test
    of "worse by more than the margin" at confidence (1 + difference.confidence) / 2: a difference at 0.9
    answers at 95 %. A difference whose bounds are unknown never holds.

    Args:
      difference: from `paired_differences`.
      margin: loss that is tolerated, 0 or more, in the metric's unit.
      lower_is_better: see `metrics.lower_is_better`.

    Raises:
      ConfigError: the margin is negative or not a number.

    Source: Wellek, Testing Statistical Hypotheses of Equivalence and Noninferiority, 2010, chapter 2.

    >>> change = PairedDifference(0.001, -0.003, 0.005, 0.95, 0.6, 5_000)
    >>> no_worse(change, margin=0.004, lower_is_better=False).holds
    True
    >>> no_worse(change, margin=0.004, lower_is_better=True).holds
    False
    """
    if not margin >= 0:
        raise ConfigError(f"margin is {margin}; expected 0 or more.")
    worst_loss = difference.high if lower_is_better else -difference.low
    return NonInferiority(worst_loss <= margin, worst_loss, margin, (1 + difference.confidence) / 2)


def _ratio(sums: FloatArray) -> FloatArray:
    result = np.full(sums.shape[:-1], np.nan)
    np.divide(sums[..., 0], sums[..., 1], out=result, where=sums[..., 1] > 0)
    return result


def _by_user(users: IntArray, columns: Sequence[npt.ArrayLike]) -> FloatArray:
    """Sums of row columns by user: float64 [U, M]; without rows, one user who says nothing."""
    size = int(users.max()) + 1 if len(users) else 1
    return np.column_stack([np.bincount(users, weights=column, minlength=size) for column in columns])


def _concordance_sums(labels: FloatArray, predictions: FloatArray, users: IntArray) -> UserSums:
    num_right, num_different = metrics.concordance(labels, predictions)
    sums = _by_user(users, [num_right, num_different])
    # On all users each pair is counted twice, for either row; half of that does not vary with the weights.
    fixed = sums.sum(axis=0) / 2
    # Without a user who is in most pairs, what is left of either sum is no count of pairs any more.
    return UserSums(sums, lambda drawn: np.clip(_ratio(drawn - fixed), 0.0, 1.0))


def _gauc_sums(labels: FloatArray, predictions: FloatArray, users: IntArray) -> UserSums:
    auc_of_user, num_rows = metrics.auc_by_group(labels, predictions, users)
    defined = ~np.isnan(auc_of_user)
    return ratio_of_sums(np.where(defined, num_rows * auc_of_user, 0.0), np.where(defined, num_rows, 0))


def _log_loss_sums(labels: FloatArray, predictions: FloatArray, users: IntArray) -> UserSums:
    return UserSums(_by_user(users, [metrics.row_log_loss(labels, predictions), np.ones(len(users))]), _ratio)


def _normalised_entropy_sums(labels: FloatArray, predictions: FloatArray, users: IntArray) -> UserSums:
    costs = metrics.row_log_loss(labels, predictions)

    def combine(sums: FloatArray) -> FloatArray:
        entropy = metrics.binary_entropy(_ratio(sums[..., 1:]))
        return _ratio(np.stack([_ratio(sums[..., [0, 2]]), entropy], axis=-1))

    return UserSums(_by_user(users, [costs, labels, np.ones(len(users))]), combine)


def _mae_sums(labels: FloatArray, predictions: FloatArray, users: IntArray) -> UserSums:
    errors = metrics.row_absolute_error(labels, predictions)
    return UserSums(_by_user(users, [errors, np.ones(len(users))]), _ratio)


def _weighted_pairs_sums(
    clicks: npt.ArrayLike | None, labels: FloatArray, predictions: FloatArray, users: IntArray
) -> UserSums:
    # With the place of the row, so that users whose clicks are all unknown keep theirs.
    known = metrics.known_clicks(clicks, labels, predictions, users, np.arange(len(users)))
    columns = np.zeros((2, len(users)))
    columns[:, known[-1]] = metrics.row_weighted_pairs(*known[:-1])
    return UserSums(_by_user(users, list(columns)), _ratio)


def _ece_sums(labels: FloatArray, predictions: FloatArray, users: IntArray) -> UserSums:
    bins = equal_mass_bins(predictions, NUM_BINS)
    columns = [np.where(bins == place, labels - predictions, 0.0) for place in range(NUM_BINS)]
    sums = _by_user(users, [*columns, np.ones(len(users))])
    everybody = sums.sum(axis=0)

    def gap(drawn: FloatArray) -> FloatArray:
        gaps, num_rows = drawn[..., :-1], drawn[..., -1:]
        return np.divide(gaps, num_rows, out=np.full(gaps.shape, np.nan), where=num_rows > 0)

    return UserSums(
        sums,
        combine=lambda drawn: np.abs(gap(drawn)).sum(axis=-1),
        noise=lambda drawn: np.abs(gap(drawn) - gap(everybody)).sum(axis=-1),
    )


def _resampled_sums(sums: Sequence[FloatArray], num_resamples: int, seed: int) -> list[FloatArray]:
    """Sums over users, float64 [U, M] each, in R draws of the users: float64 [R, M] each."""
    sizes = {len(columns) for columns in sums}
    if len(sizes) > 1:
        raise ShapeError(
            f"metrics over {sorted(sizes)} users; expected the same users in the same order for all of them."
        )
    if not sums:
        return []
    (num_users,) = sizes
    if not num_users:
        return [np.full((num_resamples, columns.shape[1]), np.nan) for columns in sums]
    ends = np.cumsum([columns.shape[1] for columns in sums])[:-1]
    together = np.concatenate(sums, axis=1)
    generator = np.random.default_rng(seed)
    chunks = []
    chunk = max(1, _CELLS_PER_CHUNK // num_users)
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        drawn = generator.integers(num_users, size=(size, num_users))
        drawn += np.arange(size)[:, None] * num_users
        weights = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        chunks.append(weights.astype(np.float64) @ together)
    return np.split(np.concatenate(chunks), ends, axis=1)


def _bounds(draws: FloatArray, confidence: float, num_users: int) -> tuple[float, float]:
    defined = draws[~np.isnan(draws)]
    if num_users < MIN_USERS or not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _p_value(draws: FloatArray) -> float:
    defined = draws[~np.isnan(draws)]
    one_side = min(np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0))
    return min(1.0, 2 * (1 + one_side) / (len(defined) + 1))
