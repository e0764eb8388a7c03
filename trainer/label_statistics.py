"""What the training labels say before training: their scale, their quantiles, and whether they can be learnt.

Gathered in one pass over the training data. The objectives of `trainer.ranking_losses` are built from these
statistics alone, which travel with a trained model as JSON.

Letters: G = duration groups (1 when the task has none), K = thresholds, Q = quantiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from schema.contract import FeatureKind, TaskKind, TaskSpec, WatchTimeMethod
from schema.errors import DataError
from trainer import features

FloatArray = npt.NDArray[np.float64]

# Duration groups: 0 for items of unknown duration, then the quantile buckets of the Transform graph.
NUM_DURATION_GROUPS = features.NUM_BUCKETS + 1
DEFAULT_NUM_THRESHOLDS = 32
# A quantile function of a duration group is known at the levels 0, 1 %, ..., 100 %.
_QUANTILE_LEVELS = np.linspace(0.0, 1.0, 101)
# A smaller group says little about its quantiles; those of all rows stand in for them.
_MIN_GROUP_ROWS = 100
# Above 0, thresholds crowd towards the long watches; 0 spreads them evenly over the rows.
_TAIL_EMPHASIS = 2.0
_Table = tuple[tuple[float, ...], ...]
_TABLES = ("quantiles", "thresholds", "bin_means", "context_excess")
# Duration groups of contexts: 0 padding, 1 unknown, then these many quantile buckets in one.
_BUCKETS_PER_CONTEXT = 4
# Rows that the mean of a surface counts for in that of its duration groups, and that of all rows in its own.
_CONTEXT_SMOOTHING = 20.0


@dataclasses.dataclass(frozen=True)
class LabelStatistics:
    """The training labels of one task, missing labels left out; in the label's unit, float64.

    What only some methods of watch_time tasks need is empty, or None, for the other tasks. Lists, as JSON
    has them, become tuples.

    Attributes:
      count: rows that have the label, at least 1.
      mean: of the labels.
      std: population standard deviation.
      minimum: the smallest label.
      maximum: the largest label.
      median: of the labels.
      click_rate: share of the rows that are clicked (covington_logistic).
      clicked_mean: mean over all rows of label × click (covington_logistic).
      quantiles: [G][Q], the labels of each duration group at equally spaced levels from 0 to 1, ascending
        (duration_quantiles).
      thresholds: [G][K], ascending (ordinal).
      bin_means: [G][K + 1], mean of the labels between two thresholds, ascending (ordinal).
      exceedance: [K], share of the rows whose label is above threshold k of their group (ordinal).
      context_excess: [A][C], how far the mean label of a context, a surface and a group of durations, is
        above that of all rows; a missing label counts as 0. A is 1 without surfaces, C without durations;
        empty where nothing is known of contexts.
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    median: float | None = None
    click_rate: float | None = None
    clicked_mean: float | None = None
    quantiles: _Table = ()
    thresholds: _Table = ()
    bin_means: _Table = ()
    exceedance: tuple[float, ...] = ()
    context_excess: _Table = ()

    def __post_init__(self) -> None:
        for name in _TABLES:
            object.__setattr__(self, name, tuple(tuple(row) for row in getattr(self, name)))
        object.__setattr__(self, "exceedance", tuple(self.exceedance))


def label_statistics(
    windows: Iterable[Mapping[str, npt.NDArray]],
    tasks: Sequence[TaskSpec],
    num_surfaces: int = 1,
    surface: str | None = None,
) -> dict[str, LabelStatistics]:
    """Summarises the labels of every task in one pass and refuses labels that their task cannot learn from.

    Quantiles are exact: the labels are kept in memory meanwhile, four bytes for each.

    Args:
      windows: training data in pieces; each holds every task's labels, float32 [n], NaN where missing, and
        for a task with a duration feature that feature's bucket, int [n].
      tasks: the declared tasks.
      num_surfaces: ids of surfaces, padding and OOV included.
      surface: transformed name of the surface, int [n] in each piece; None for a dataset without surfaces.

    Returns:
      Statistics by task name.

    Raises:
      DataError: a task has no label at all, a binary or click label is not 0 or 1 or has one class only, a
        completion is outside [0, 1], a watch time is negative, zero everywhere, or zero in all clicked rows
        of covington_logistic, another label is constant, or a label is infinite.
    """
    names = {name for task in tasks for name in (*task.labels, *_bucket_names(task))}
    if surface is not None:
        names.add(surface)
    pieces: dict[str, list[npt.NDArray]] = {name: [] for name in names}
    for window in windows:
        for name in names:
            pieces[name].append(np.asarray(window[name]))
    columns = {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in pieces.items()}
    duration = context_duration(tasks)
    durations = None if duration is None else duration_contexts(columns[bucket_name(duration)])
    surfaces = None if surface is None else columns[surface]
    return {
        task.name: dataclasses.replace(
            _statistics(task, columns),
            context_excess=_context_excess(columns[task.label], surfaces, num_surfaces, durations),
        )
        for task in tasks
    }


def context_duration(tasks: Sequence[TaskSpec]) -> str | None:
    """The item feature by which contexts tell durations apart: the first that a task declares."""
    return next((task.duration_feature for task in tasks if task.duration_feature is not None), None)


def duration_contexts(buckets: Any) -> Any:
    """Groups of quantile buckets, 0 being that of unknown durations: 1 for these, then from 2 up."""
    return (buckets + 2 * _BUCKETS_PER_CONTEXT - 1) // _BUCKETS_PER_CONTEXT


def _context_excess(
    labels: npt.NDArray, surfaces: npt.NDArray | None, num_surfaces: int, durations: npt.NDArray | None
) -> _Table:
    values = np.nan_to_num(labels.astype(np.float64))
    mean, nothing = values.mean(), np.zeros(len(values), np.int64)
    num_durations = 1 if durations is None else duration_contexts(features.NUM_BUCKETS) + 1
    excess = np.zeros((num_surfaces, 1))
    by_surface = nothing if surfaces is None else surfaces.astype(np.int64)
    cell = by_surface * num_durations + (nothing if durations is None else durations)
    for groups, number in ((by_surface, 1), (cell, num_durations)):
        size = num_surfaces * number
        rows, sums = np.bincount(groups, minlength=size), np.bincount(groups, values - mean, size)
        drawn = sums.reshape(num_surfaces, number) + _CONTEXT_SMOOTHING * excess
        excess = drawn / (rows.reshape(num_surfaces, number) + _CONTEXT_SMOOTHING)
    return tuple(map(tuple, excess.tolist()))


def bucket_name(duration_feature: str) -> str:
    """Transformed name of the duration group of a task's `duration_feature`."""
    return features.Feature(duration_feature, FeatureKind.CONTINUOUS, duration_feature).bucket_name


def _bucket_names(task: TaskSpec) -> tuple[str, ...]:
    return () if task.duration_feature is None else (bucket_name(task.duration_feature),)


def _statistics(task: TaskSpec, columns: Mapping[str, npt.NDArray]) -> LabelStatistics:
    known = ~np.any([np.isnan(columns[name]) for name in task.labels], axis=0)
    if not known.any():
        raise _unlearnable(task, task.label, "is missing in every training row")
    labels = columns[task.label][known].astype(np.float64)
    _check_values(task, task.label, labels)
    statistics = LabelStatistics(
        count=len(labels),
        mean=float(labels.mean()),
        std=float(labels.std()),
        minimum=float(labels.min()),
        maximum=float(labels.max()),
        median=float(np.median(labels)),
    )
    _check_learnable(task, statistics)
    if task.kind is not TaskKind.WATCH_TIME:
        return statistics
    if task.click_label is not None:
        clicks = columns[task.click_label][known].astype(np.float64)
        return _with_clicks(task, statistics, labels, clicks)
    groups = [labels]
    if task.duration_feature is not None:
        buckets = columns[bucket_name(task.duration_feature)][known]
        groups = [labels[buckets == group] for group in range(NUM_DURATION_GROUPS)]
    if task.watch_time_method is WatchTimeMethod.DURATION_QUANTILES:
        return dataclasses.replace(statistics, quantiles=_quantiles(labels, groups))
    if task.watch_time_method is WatchTimeMethod.ORDINAL:
        return _with_thresholds(task, statistics, labels, groups)
    return statistics


def _with_clicks(
    task: TaskSpec, statistics: LabelStatistics, labels: FloatArray, clicks: FloatArray
) -> LabelStatistics:
    assert task.click_label is not None  # the caller has read it
    _check_zero_or_one(task, task.click_label, clicks)
    rate, clicked_mean = float(clicks.mean()), float((labels * clicks).mean())
    if rate in (0.0, 1.0):
        raise _unlearnable(task, task.click_label, f"is {rate:g} in all {len(clicks)} training rows")
    if clicked_mean == 0:
        raise _unlearnable(
            task, task.label, f"is 0 s in all {int(clicks.sum())} training rows with {task.click_label!r} 1"
        )
    return dataclasses.replace(statistics, click_rate=rate, clicked_mean=clicked_mean)


def _quantiles(labels: FloatArray, groups: Sequence[FloatArray]) -> _Table:
    return tuple(
        tuple(np.quantile(_large_enough(group, labels), _QUANTILE_LEVELS).tolist()) for group in groups
    )


def _with_thresholds(
    task: TaskSpec, statistics: LabelStatistics, labels: FloatArray, groups: Sequence[FloatArray]
) -> LabelStatistics:
    levels = threshold_levels(task.num_thresholds or DEFAULT_NUM_THRESHOLDS)
    if len(groups) == 1:
        # Nothing is learnt from a threshold that equals another, or that no label exceeds.
        thresholds = np.unique(np.quantile(labels, levels, method="inverted_cdf"))
        thresholds = thresholds[thresholds < labels.max()]
        tables = [thresholds if len(thresholds) else np.array([labels.min()])]
    else:
        # Groups share their heads, so each keeps its K thresholds, equal or not.
        tables = [
            np.quantile(_large_enough(group, labels), levels, method="inverted_cdf") for group in groups
        ]
    pairs = list(zip(tables, groups, strict=True))
    # Rows of bin k or a higher one are above threshold k.
    in_bin = np.sum([_count_bins(group, table) for table, group in pairs], axis=0)
    num_above = in_bin[::-1].cumsum()[::-1][1:]
    return dataclasses.replace(
        statistics,
        thresholds=tuple(tuple(table.tolist()) for table in tables),
        bin_means=tuple(_bin_means(_large_enough(group, labels), table) for table, group in pairs),
        exceedance=tuple((num_above / len(labels)).tolist()),
    )


def threshold_levels(num_thresholds: int) -> FloatArray:
    """Levels of the quantiles at which watch time is cut, ascending in (0, 1), float64 [num_thresholds].

    Formula: (1 − exp(−α z)) / (1 − exp(−α)) at z = k / (K + 1). Equally spaced levels (α = 0) cut the long
    watches into a few wide bins whose means say little about a row; equally spaced seconds leave bins without
    rows to learn from. The error-adaptive discretisation of CREAD (Sun et al., AAAI 2024, arXiv:2401.07521)
    goes in between by this family of truncated exponentials.
    """
    z = np.arange(1, num_thresholds + 1) / (num_thresholds + 1)
    return np.expm1(-_TAIL_EMPHASIS * z) / np.expm1(-_TAIL_EMPHASIS)


def _count_bins(labels: FloatArray, thresholds: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """Rows, or sum of their weights, in every bin (t_k, t_k+1], float64 [K + 1]."""
    bins = np.searchsorted(thresholds, labels, side="left")
    return np.bincount(bins, weights, minlength=len(thresholds) + 1).astype(np.float64)


def _bin_means(labels: FloatArray, thresholds: FloatArray) -> tuple[float, ...]:
    """Mean label of every bin; that of an empty bin is its lower threshold."""
    counts, sums = _count_bins(labels, thresholds), _count_bins(labels, thresholds, labels)
    # The first bin is never empty: thresholds are labels, so it holds at least the first of them.
    means = np.concatenate([thresholds[:1], thresholds])
    np.divide(sums, counts, out=means, where=counts > 0)
    return tuple(means.tolist())


def _large_enough(group: FloatArray, labels: FloatArray) -> FloatArray:
    return group if len(group) >= _MIN_GROUP_ROWS else labels


def _check_values(task: TaskSpec, name: str, labels: FloatArray) -> None:
    if task.kind is TaskKind.BINARY:
        _check_zero_or_one(task, name, labels)
    elif task.kind is TaskKind.WATCH_TIME:
        _refuse(task, name, labels, ~np.isfinite(labels) | (labels < 0), "seconds >= 0, finite")
    elif task.kind is TaskKind.COMPLETION:
        _refuse(task, name, labels, ~((labels >= 0) & (labels <= 1)), "a share from 0 to 1")
    else:
        _refuse(task, name, labels, ~np.isfinite(labels), "finite")


def _check_zero_or_one(task: TaskSpec, name: str, labels: FloatArray) -> None:
    _refuse(task, name, labels, (labels != 0) & (labels != 1), "0 or 1 (map it with 'at_least')")


def _refuse(
    task: TaskSpec, name: str, labels: FloatArray, wrong: npt.NDArray[np.bool_], expected: str
) -> None:
    if wrong.any():
        raise DataError(
            f"task {task.name!r}: label {name!r} must be {expected}; found {labels[wrong][0]:g} "
            f"and {np.count_nonzero(wrong) - 1} more in the training data."
        )


# Methods that divide by the mean watch time alone, and so can learn one that is always the same.
_LEARN_CONSTANTS = (WatchTimeMethod.WEIGHTED_LOGISTIC, WatchTimeMethod.COVINGTON_LOGISTIC)


def _check_learnable(task: TaskSpec, statistics: LabelStatistics) -> None:
    is_watch_time = task.kind is TaskKind.WATCH_TIME
    if is_watch_time and statistics.maximum == 0:
        raise _unlearnable(task, task.label, f"is 0 s in all {statistics.count} training rows that have it")
    if is_watch_time and task.watch_time_method in _LEARN_CONSTANTS:
        return
    if statistics.minimum == statistics.maximum:
        raise _unlearnable(
            task,
            task.label,
            f"is {statistics.minimum:g} in all {statistics.count} training rows that have it",
        )


def _unlearnable(task: TaskSpec, name: str, problem: str) -> DataError:
    return DataError(
        f"task {task.name!r} cannot be trained: label {name!r} {problem}. Check its column in the "
        "dataset declaration, move the split, or remove the task."
    )
