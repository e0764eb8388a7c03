"""What each kind of ranking task optimises and serves, and the label statistics that set its scale.

An objective turns one logit per row into a loss (training) and into the task's output (serving). Watch time
and regression are scaled by statistics of the training labels, so that the loss does not depend on the
label's unit and the declared loss weights mean the same in every dataset.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from schema.contract import TaskKind, TaskSpec
from schema.errors import DataError

# Smallest served share of the mean watch time: far below any real expectation, far above underflow.
_MIN_WATCH_TIME_LOGIT = math.log(1e-6)


@dataclasses.dataclass(frozen=True)
class LabelStatistics:
    """The training labels of one task, missing labels left out; in the label's unit, float64.

    Attributes:
      count: rows that have the label, at least 1.
      mean: of the labels.
      std: population standard deviation.
      minimum: the smallest label.
      maximum: the largest label.
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float


def label_statistics(
    windows: Iterable[Mapping[str, npt.NDArray[np.float32]]], tasks: Sequence[TaskSpec]
) -> dict[str, LabelStatistics]:
    """Summarises the labels of every task in one pass and refuses labels that their task cannot learn from.

    Args:
      windows: training data in pieces; each holds every task's label, float32 [n], NaN where missing.
      tasks: the declared tasks.

    Returns:
      Statistics by task name.

    Raises:
      DataError: a task has no label at all, a binary label is not 0 or 1 or has one class only, a watch time
        is negative or zero everywhere, a regression label is constant, or a label is infinite.
    """
    parts: dict[str, list[LabelStatistics]] = {task.name: [] for task in tasks}
    for window in windows:
        for task in tasks:
            labels = np.asarray(window[task.label], dtype=np.float64)
            labels = labels[~np.isnan(labels)]
            _check_values(task, labels)
            if len(labels):
                parts[task.name].append(_summarise(labels))
    for task in tasks:
        if not parts[task.name]:
            raise _unlearnable(task, "is missing in every training row")
    statistics = {name: _merge(summaries) for name, summaries in parts.items()}
    for task in tasks:
        _check_learnable(task, statistics[task.name])
    return statistics


def _summarise(labels: npt.NDArray[np.float64]) -> LabelStatistics:
    return LabelStatistics(
        len(labels), float(labels.mean()), float(labels.std()), float(labels.min()), float(labels.max())
    )


def _merge(parts: Sequence[LabelStatistics]) -> LabelStatistics:
    """Statistics of the union; the variance is the mean variance within parts plus the variance between."""
    count = sum(part.count for part in parts)
    mean = sum(part.count * part.mean for part in parts) / count
    variance = sum(part.count * (part.std**2 + (part.mean - mean) ** 2) for part in parts) / count
    return LabelStatistics(
        count,
        mean,
        math.sqrt(variance),
        min(part.minimum for part in parts),
        max(part.maximum for part in parts),
    )


def _check_values(task: TaskSpec, labels: npt.NDArray[np.float64]) -> None:
    wrong, expected = ~np.isfinite(labels), "finite"
    if task.kind is TaskKind.BINARY:
        wrong, expected = (labels != 0) & (labels != 1), "0 or 1 (map it with 'at_least')"
    elif task.kind is TaskKind.WATCH_TIME:
        wrong, expected = wrong | (labels < 0), "seconds >= 0, finite"
    if wrong.any():
        raise DataError(
            f"task {task.name!r}: label {task.label!r} must be {expected}; found {labels[wrong][0]:g} "
            f"and {np.count_nonzero(wrong) - 1} more in the training data."
        )


def _check_learnable(task: TaskSpec, statistics: LabelStatistics) -> None:
    if task.kind is TaskKind.WATCH_TIME:
        if statistics.maximum == 0:
            raise _unlearnable(task, f"is 0 s in all {statistics.count} training rows that have it")
    elif statistics.minimum == statistics.maximum:
        raise _unlearnable(
            task, f"is {statistics.minimum:g} in all {statistics.count} training rows that have it"
        )


def _unlearnable(task: TaskSpec, problem: str) -> DataError:
    return DataError(
        f"task {task.name!r} cannot be trained: label {task.label!r} {problem}. Check its column in the "
        "dataset declaration, move the split, or remove the task."
    )


class Objective(Protocol):
    """One task: `initial_bias` is the logit of a head that knows only the training mean of the label."""

    @property
    def initial_bias(self) -> float:
        """Logit whose output is the mean of the training labels."""

    def loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Loss of each row, float32 [B]; labels float32 [B] without NaN, in the label's unit."""

    def output(self, logits: tf.Tensor) -> tf.Tensor:
        """What is served for each row, float32, the shape of `logits`."""


@dataclasses.dataclass(frozen=True)
class BinaryObjective:
    """Sigmoid cross-entropy; serves the probability of a 1."""

    statistics: LabelStatistics

    @property
    def initial_bias(self) -> float:
        """Log odds of the base rate."""
        return math.log(self.statistics.mean / (1.0 - self.statistics.mean))

    def loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Cross-entropy in nats."""
        return tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)

    def output(self, logits: tf.Tensor) -> tf.Tensor:
        """Probability in (0, 1)."""
        return tf.sigmoid(logits)


@dataclasses.dataclass(frozen=True)
class WatchTimeObjective:
    """Weighted logistic regression; serves the expected watch time in seconds.

    Every row is a negative of weight 1 and also a positive of weight u = T / m, where T is its watch time
    and m the mean watch time of the training data:

        loss = u * softplus(-f) + softplus(f)

    The logit f that minimises the expected loss has odds e^f = E[u | x], so m * e^f = E[T | x] exactly.

    In Covington et al. (RecSys 2016, section 4.2) clicked rows are positives of weight T and only the others
    are negatives, so that the odds are E[T] / (1 - P(click)): close to E[T] while clicks are rare, twice as
    much where half of the rows are clicked. Counting every row as a negative removes that error and needs no
    click label.

    Dividing by m sets the scale: with T in seconds one long watch has a weight of hundreds, and its gradient
    drowns the other tasks; in units of the mean, weights average 1 and a head that knows only the mean costs
    2 ln 2.
    """

    statistics: LabelStatistics

    @property
    def initial_bias(self) -> float:
        """Zero: odds of 1 serve the mean watch time."""
        return 0.0

    def loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Weighted cross-entropy in nats; labels in seconds."""
        weight = labels / self.statistics.mean
        return weight * tf.nn.softplus(-logits) + tf.nn.softplus(logits)

    def output(self, logits: tf.Tensor) -> tf.Tensor:
        """Seconds, above 0 and at most the longest watch time of the training data."""
        longest = math.log(self.statistics.maximum / self.statistics.mean)
        return self.statistics.mean * tf.exp(tf.clip_by_value(logits, _MIN_WATCH_TIME_LOGIT, longest))


@dataclasses.dataclass(frozen=True)
class RegressionObjective:
    """Mean squared error on the standardised label; serves the label's unit."""

    statistics: LabelStatistics

    @property
    def initial_bias(self) -> float:
        """Zero: serves the mean label."""
        return 0.0

    def loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Squared error in units of the label's variance."""
        return tf.square(logits - (labels - self.statistics.mean) / self.statistics.std)

    def output(self, logits: tf.Tensor) -> tf.Tensor:
        """Expected label, in its own unit."""
        return self.statistics.mean + self.statistics.std * logits


_OBJECTIVES: Mapping[TaskKind, type[BinaryObjective | WatchTimeObjective | RegressionObjective]] = {
    TaskKind.BINARY: BinaryObjective,
    TaskKind.WATCH_TIME: WatchTimeObjective,
    TaskKind.REGRESSION: RegressionObjective,
}


def objective(kind: TaskKind, statistics: LabelStatistics) -> Objective:
    """The objective of a task of this kind, scaled by its training labels."""
    return _OBJECTIVES[kind](statistics)


def labelled_loss(task: Objective, logits: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss of the rows that have a label.

    Args:
      task: the objective.
      logits: float32 [B].
      labels: float32 [B]; NaN where missing: such a row costs nothing and gives no gradient.

    Returns:
      The sum of the losses, float32 [], and the number of labelled rows, float32 [].
    """
    has_label = tf.logical_not(tf.math.is_nan(labels))
    # The label is replaced before the loss: a NaN masked only afterwards would still poison the gradient.
    losses = task.loss(logits, tf.where(has_label, labels, 0.0))
    return tf.reduce_sum(tf.where(has_label, losses, 0.0)), tf.reduce_sum(tf.cast(has_label, tf.float32))
