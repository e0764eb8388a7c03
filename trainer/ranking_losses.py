"""What each kind of ranking task optimises and serves.

An objective turns the logits of a row into a loss (training) and into the task's output (serving). Watch time
and regression are scaled by statistics of the training labels, so that the loss does not depend on the
label's unit and the declared loss weights mean the same in every dataset.

Letters: B = rows, n = logits of a task.
"""

from __future__ import annotations

import math
from typing import Protocol

import tensorflow as tf

from schema.contract import TaskKind, TaskSpec
from trainer.label_statistics import LabelStatistics
from trainer.watch_time import TaskContext, watch_time_objective


class Objective(Protocol):
    """One task's loss and output."""

    @property
    def num_logits(self) -> int:
        """Logits per row, n."""

    @property
    def initial_bias(self) -> tuple[float, ...]:
        """The n logits of a head that knows nothing of the row: what it serves is right on average."""

    def loss(self, logits: tf.Tensor, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Loss of each row, float32 [B], from logits float32 [B, n].

        Labels are float32 [B] without NaN, in the label's unit.
        """

    def output(self, logits: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """What is served for each row, float32 [B], from logits float32 [B, n]."""


class SigmoidObjective:
    """Sigmoid cross-entropy of a label in [0, 1]; serves its expectation.

    A 0/1 label gives the probability of a 1. A row with a share y, such as the completion, is y of a positive
    and 1 - y of a negative: the expected loss is smallest where sigmoid(logit) = E[y | x].
    """

    num_logits = 1

    def __init__(self, statistics: LabelStatistics) -> None:
        """Takes the base rate from the training labels: the initial bias is its log odds."""
        self.initial_bias = (math.log(statistics.mean / (1.0 - statistics.mean)),)

    def loss(self, logits: tf.Tensor, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Cross-entropy in nats, float32 [B]."""
        return tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits[:, 0])

    def output(self, logits: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Probability, or expected share, float32 [B] in (0, 1)."""
        return tf.sigmoid(logits[:, 0])


class RegressionObjective:
    """Mean squared error on the standardised label; serves the label's unit."""

    num_logits = 1
    # Serves the mean label.
    initial_bias = (0.0,)

    def __init__(self, statistics: LabelStatistics) -> None:
        """Takes mean and standard deviation from the training labels."""
        self._statistics = statistics

    def loss(self, logits: tf.Tensor, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Squared error in units of the label's variance, float32 [B]."""
        return tf.square(logits[:, 0] - (labels - self._statistics.mean) / self._statistics.std)

    def output(self, logits: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Expected label in its own unit, float32 [B]."""
        return self._statistics.mean + self._statistics.std * logits[:, 0]


def objective(task: TaskSpec, statistics: LabelStatistics) -> Objective:
    """The objective of a task, scaled by its training labels."""
    if task.kind is TaskKind.WATCH_TIME:
        return watch_time_objective(task, statistics)
    return (
        RegressionObjective(statistics) if task.kind is TaskKind.REGRESSION else SigmoidObjective(statistics)
    )


def labelled_loss(
    task: Objective,
    logits: tf.Tensor,
    labels: tf.Tensor,
    context: TaskContext,
    row_weights: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss of the rows that have a label and, where the task reads clicks, a click label.

    Args:
      task: the objective.
      logits: float32 [B, n].
      labels: float32 [B]; NaN where missing: such a row costs nothing and gives no gradient.
      context: what else the objective reads.
      row_weights: float32 [B], at least 0; None weighs all rows alike.

    Returns:
      The sum of weight × loss, float32 [], and the sum of the weights of the labelled rows, float32 [].
    """
    has_label = tf.logical_not(tf.math.is_nan(labels))
    # Labels are replaced before the loss: a NaN masked only afterwards would still poison the gradient.
    if context.clicks is not None:
        has_label = tf.logical_and(has_label, tf.logical_not(tf.math.is_nan(context.clicks)))
        context = context._replace(clicks=tf.where(has_label, context.clicks, 0.0))
    losses = task.loss(logits, tf.where(has_label, labels, 0.0), context)
    weights = tf.cast(has_label, tf.float32)
    if row_weights is not None:
        weights *= row_weights
    return tf.reduce_sum(weights * losses), tf.reduce_sum(weights)
