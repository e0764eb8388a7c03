"""The ways to learn and serve watch time; docs/adr/0004-watch-time-odds.md says when to take which.

Each class is an `Objective` of `trainer.ranking_losses`, chosen by `method:` of a watch_time task. T is the
watch time of a row in seconds, x its features.

Letters: B = rows, n = logits of the method, G = duration groups, K = thresholds, Q = quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from schema.contract import TaskSpec, WatchTimeMethod
from trainer.label_statistics import LabelStatistics, bucket_name

# Smallest served share of the mean watch time: far below any real expectation, far above underflow.
_MIN_LOGIT = math.log(1e-6)
# Base rates of thresholds are kept this far from 0 and 1, where their logits would be infinite.
_RATE_MARGIN = 1e-6
# Share of the distribution that a trimmed mean leaves out at either end. Down to some .2 less of it orders
# better and has a larger absolute error: docs/adr/0004-watch-time-odds.md.
_TRIMMED = 0.35


class TaskContext(NamedTuple):
    """What an objective may need of a row besides its logits and its label.

    Attributes:
      duration_bucket: int [B], the row's duration group, 0 where the duration is missing; None for a task
        without a duration feature.
      clicks: float32 [B], 0 or 1, NaN where missing; in training only, None for a task without a click label.
    """

    duration_bucket: tf.Tensor | None = None
    clicks: tf.Tensor | None = None


def task_context(task: TaskSpec, inputs: Mapping[str, tf.Tensor]) -> TaskContext:
    """The context of a task's rows.

    Args:
      task: the declaration.
      inputs: transformed features and, in training, labels of B rows.
    """
    return TaskContext(
        None if task.duration_feature is None else inputs[bucket_name(task.duration_feature)],
        None if task.click_label is None else inputs.get(task.click_label),
    )


class WeightedLogistic:
    """Weighted logistic regression with every row as a negative; serves the expected watch time.

    Every row is a negative of weight 1 and also a positive of weight u = T / m, where m is the mean watch
    time of the training data:

        loss = u * softplus(-f) + softplus(f)

    The logit f that minimises the expected loss has odds e^f = E[u | x], so m * e^f = E[T | x] exactly.

    Dividing by m sets the scale: with T in seconds one long watch has a weight of hundreds, and its gradient
    drowns the other tasks; in units of the mean, weights average 1 and a head that knows only the mean costs
    2 ln 2.
    """

    num_logits = 1
    initial_bias = (0.0,)

    def __init__(self, task: TaskSpec, statistics: LabelStatistics) -> None:
        """Takes the scale from the training labels."""
        self._mean = statistics.mean
        self._max_logit = math.log(statistics.maximum / statistics.mean)

    def loss(self, logits: tf.Tensor, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Weighted cross-entropy in nats, float32 [B]; labels in seconds."""
        logit = logits[:, 0]
        return labels / self._mean * tf.nn.softplus(-logit) + tf.nn.softplus(logit)

    def output(self, logits: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Seconds, float32 [B], above 0 and at most the longest watch time of the training data."""
        return self._mean * tf.exp(tf.clip_by_value(logits[:, 0], _MIN_LOGIT, self._max_logit))


class CovingtonLogistic:
    """Weighted logistic regression with clicked rows as positives, corrected for frequent clicks.

    As in Covington et al. (RecSys 2016, doi:10.1145/2959100.2959190, section 4.2), clicked rows are positives
    of weight T, the others negatives of weight 1. With c the click and P = E[c | x], the best odds are

        e^f = E[c T | x] / (1 - P).

    The paper serves e^f, which is near E[c T | x] while clicks are rare; where half of the rows are clicked
    it is twice as much, and it overrates most what is clicked most. A second logit g learns P by the
    cross-entropy of c, and the served value is e^f (1 - sigmoid(g)) = E[c T | x], whatever the click rate.
    Watch time of unclicked rows (autoplay) counts as none. Weights are in units of M, the mean of c T, for
    the reason told in `WeightedLogistic`. A row without a click label has no loss.
    """

    num_logits = 2

    def __init__(self, task: TaskSpec, statistics: LabelStatistics) -> None:
        """Takes scale and base rates from the training labels."""
        assert statistics.click_rate is not None and statistics.clicked_mean is not None
        self._mean = statistics.clicked_mean
        self._max_logit = math.log(statistics.maximum / self._mean)
        odds = statistics.click_rate / (1.0 - statistics.click_rate)
        self.initial_bias = (-math.log1p(-statistics.click_rate), math.log(odds))

    def loss(self, logits: tf.Tensor, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Both cross-entropies in nats, summed, float32 [B]; labels in seconds."""
        logit, click_logit = logits[:, 0], logits[:, 1]
        clicks = context.clicks
        assert clicks is not None  # every training batch has the label that the task declares
        weight = clicks * labels / self._mean
        watch_loss = weight * tf.nn.softplus(-logit) + (1.0 - clicks) * tf.nn.softplus(logit)
        return watch_loss + tf.nn.sigmoid_cross_entropy_with_logits(labels=clicks, logits=click_logit)

    def output(self, logits: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Seconds, float32 [B], above 0 and at most the longest watch time of the training data."""
        log_share = logits[:, 0] - tf.nn.softplus(logits[:, 1])
        return self._mean * tf.exp(tf.clip_by_value(log_share, _MIN_LOGIT, self._max_logit))

    def uncorrected(self, logits: tf.Tensor) -> tf.Tensor:
        """What the paper serves, M e^f, in seconds, float32 [B]."""
        return self._mean * tf.exp(tf.maximum(logits[:, 0], _MIN_LOGIT))


class DurationQuantiles:
    """The rank of the watch time within items of like duration (D2Q), served through that group's quantiles.

    Long videos are watched longer whether or not they are liked. The rank R in [0, 1] of T among the training
    rows of the same duration group is free of that. One logit learns R, and the group's quantile function
    turns it into seconds. Ties get their middle rank. Source: Zhan et al., KDD 2022,
    doi:10.1145/3534678.3539092.

    `serve: mean_rank` learns E[R | x] by the cross-entropy of the soft label and serves the quantile at it.
    This is the estimate of the paper; it is far from E[T | x]: a row of which nothing is known gets the
    median of its group. `serve: median` learns the median of R by the absolute error; quantile functions
    preserve order, so the quantile at the median rank is the median of T.
    """

    num_logits = 1
    # Rank 0.5: the median of the group.
    initial_bias = (0.0,)

    def __init__(self, task: TaskSpec, statistics: LabelStatistics) -> None:
        """Takes the quantile function of each group from the training labels."""
        self._quantiles = np.array(statistics.quantiles, np.float32)
        self._serves_median = task.served == "median"

    def ranks(self, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Share of the group's training rows below each label, ties counted half, float32 [B] in [0, 1]."""
        quantiles = self._of_group(context)
        last = quantiles.shape[1] - 1
        num_below = tf.reduce_sum(tf.cast(quantiles < labels[:, tf.newaxis], tf.int32), axis=1)
        num_up_to = tf.reduce_sum(tf.cast(quantiles <= labels[:, tf.newaxis], tf.int32), axis=1)
        upper = tf.clip_by_value(num_below, 1, last)
        low = tf.gather(quantiles, upper - 1, batch_dims=1)
        high = tf.gather(quantiles, upper, batch_dims=1)
        inside = tf.clip_by_value(tf.math.divide_no_nan(labels - low, high - low), 0.0, 1.0)
        inside = tf.where(labels > high, 1.0, inside)
        between = tf.cast(upper - 1, tf.float32) + inside
        # Equal to the quantiles num_below, ..., num_up_to - 1: the middle of their levels.
        tied = tf.cast(num_below + num_up_to - 1, tf.float32) / 2.0
        return tf.where(num_below < num_up_to, tied, between) / last

    def loss(self, logits: tf.Tensor, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Cross-entropy in nats, or absolute error, of the rank, float32 [B]; labels in seconds."""
        ranks = self.ranks(labels, context)
        if self._serves_median:
            return tf.abs(tf.sigmoid(logits[:, 0]) - ranks)
        return tf.nn.sigmoid_cross_entropy_with_logits(labels=ranks, logits=logits[:, 0])

    def output(self, logits: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Seconds, float32 [B], within the range of the group's training rows."""
        quantiles = self._of_group(context)
        last = quantiles.shape[1] - 1
        place = tf.sigmoid(logits[:, 0]) * last
        lower = tf.clip_by_value(tf.cast(place, tf.int32), 0, last - 1)
        low = tf.gather(quantiles, lower, batch_dims=1)
        high = tf.gather(quantiles, lower + 1, batch_dims=1)
        return low + (place - tf.cast(lower, tf.float32)) * (high - low)

    def _of_group(self, context: TaskContext) -> tf.Tensor:
        return tf.gather(self._quantiles, context.duration_bucket)


class Ordinal:
    """One head per threshold, P_k = P(T > t_k | x); serves the mean, median or middle of this distribution.

    Thresholds are quantiles of the training rows, see `label_statistics.threshold_levels`; with a duration
    feature, those of the row's duration group. The loss is the mean over the thresholds of the cross-entropy
    of 1[T > t_k].

    The mean sums, over the thresholds, P_k times the step between the mean watch times of the bins on both
    sides: with μ_k the training mean of (t_k, t_k+1], Σ_k P(bin k | x) μ_k = μ_0 + Σ_k P_k (μ_k − μ_k−1).
    Bin means instead of bin edges make an untrained head serve the training mean exactly. CREAD (Sun et al.,
    AAAI 2024, arXiv:2401.07521) restores seconds by such a sum with the widths of the bins as steps.

    `serve: trimmed_mean` is the same sum over what is left of the distribution with `_TRIMMED` of its mass
    cut off at either end: P_k is then clip((P_k − trimmed) / (1 − 2 trimmed), 0, 1). It orders rows better
    than the median, which knows one point of the distribution, at almost the same absolute error.

    The heads are free, so P_k may grow with k somewhere; the sums do not mind. The median is read off the
    rearranged, that is sorted, P_k, which lie nearer to the truth (Chernozhukov et al., Econometrica 2010,
    doi:10.3982/ECTA7880), and is linear within a bin.
    """

    def __init__(self, task: TaskSpec, statistics: LabelStatistics) -> None:
        """Takes thresholds, bin means and base rates from the training labels."""
        self._thresholds = np.array(statistics.thresholds, np.float32)
        means = np.array(statistics.bin_means, np.float32)
        self._first_mean, self._steps = means[:, 0], np.diff(means, axis=1)
        # The outer bins end where their mean is in the middle: the longest watch of all says nothing of a
        # row.
        ends = 2.0 * means[:, [0, -1]] - self._thresholds[:, [0, -1]]
        ends = np.clip(ends, statistics.minimum, statistics.maximum).astype(np.float32)
        self._edges = np.concatenate([ends[:, :1], self._thresholds, ends[:, 1:]], axis=1)
        self._served = task.served
        self.num_logits = self._thresholds.shape[1]
        rates = np.clip(statistics.exceedance, _RATE_MARGIN, 1.0 - _RATE_MARGIN)
        self.initial_bias = tuple((np.log(rates) - np.log1p(-rates)).tolist())

    def loss(self, logits: tf.Tensor, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Mean cross-entropy of the thresholds in nats, float32 [B]; labels in seconds."""
        above = tf.cast(labels[:, tf.newaxis] > _rows(self._thresholds, context), tf.float32)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=above, logits=logits)
        return tf.reduce_mean(losses, axis=1)

    def output(self, logits: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Seconds, float32 [B], within the range of the training rows."""
        exceedance = tf.sigmoid(logits)
        if self._served == "median":
            return self._median(exceedance, context)
        if self._served == "trimmed_mean":
            exceedance = tf.clip_by_value((exceedance - _TRIMMED) / (1.0 - 2.0 * _TRIMMED), 0.0, 1.0)
        steps = tf.reduce_sum(exceedance * _rows(self._steps, context), axis=1)
        return _rows(self._first_mean, context) + steps

    def _median(self, exceedance: tf.Tensor, context: TaskContext) -> tf.Tensor:
        # Between the last edge that at least half of the watches exceed, and the one after it. The sorted P_k
        # there are the smallest of at least a half and the largest below; the outer edges have 1 and 0.
        is_high = exceedance >= 0.5
        lower = tf.reduce_sum(tf.cast(is_high, tf.int32), axis=1)
        high_rate = tf.reduce_min(tf.where(is_high, exceedance, 1.0), axis=1)
        low_rate = tf.reduce_max(tf.where(is_high, 0.0, exceedance), axis=1)
        edges = tf.broadcast_to(_rows(self._edges, context), [tf.shape(lower)[0], self.num_logits + 2])
        low, high = (tf.gather(edges, lower + i, batch_dims=1) for i in (0, 1))
        return low + (high_rate - 0.5) / (high_rate - low_rate) * (high - low)


def _rows(table: np.ndarray, context: TaskContext) -> tf.Tensor:
    """The group's row for each of B rows: [B, ...], or [1, ...] without groups."""
    return tf.constant(table) if len(table) == 1 else tf.gather(table, context.duration_bucket)


class Regression:
    """Regression on standardised watch time: squared error for the mean, absolute error for the median."""

    num_logits = 1

    def __init__(self, task: TaskSpec, statistics: LabelStatistics) -> None:
        """Takes the scale from the training labels."""
        assert statistics.median is not None
        self._mean, self._std, self._max = statistics.mean, statistics.std, statistics.maximum
        self._serves_median = task.served == "median"
        self.initial_bias = ((statistics.median - self._mean) / self._std if self._serves_median else 0.0,)

    def loss(self, logits: tf.Tensor, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Squared, or absolute, error in units of the labels' standard deviation, float32 [B]."""
        error = logits[:, 0] - (labels - self._mean) / self._std
        return tf.abs(error) if self._serves_median else tf.square(error)

    def output(self, logits: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Seconds, float32 [B], from 0 to the longest watch time of the training data."""
        return tf.clip_by_value(self._mean + self._std * logits[:, 0], 0.0, self._max)


class LogRegression:
    """Absolute error of log(1 + T / m), m being the mean watch time; serves the median.

    The logarithm preserves order, so the median of T is served exactly by undoing it, which a mean would not
    survive; and an hour more weighs little where ten were watched, so that few long watches do not decide.
    """

    num_logits = 1

    def __init__(self, task: TaskSpec, statistics: LabelStatistics) -> None:
        """Takes the scale from the training labels."""
        assert statistics.median is not None
        self._mean = statistics.mean
        self._max_logit = math.log1p(statistics.maximum / self._mean)
        self.initial_bias = (math.log1p(statistics.median / self._mean),)

    def loss(self, logits: tf.Tensor, labels: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Absolute error in nats, float32 [B]; labels in seconds."""
        return tf.abs(logits[:, 0] - tf.math.log1p(labels / self._mean))

    def output(self, logits: tf.Tensor, context: TaskContext) -> tf.Tensor:
        """Seconds, float32 [B], from 0 to the longest watch time of the training data."""
        return self._mean * tf.math.expm1(tf.clip_by_value(logits[:, 0], 0.0, self._max_logit))


WatchTimeObjective = (
    WeightedLogistic | CovingtonLogistic | DurationQuantiles | Ordinal | Regression | LogRegression
)
_METHODS: Mapping[WatchTimeMethod, type[WatchTimeObjective]] = {
    WatchTimeMethod.WEIGHTED_LOGISTIC: WeightedLogistic,
    WatchTimeMethod.COVINGTON_LOGISTIC: CovingtonLogistic,
    WatchTimeMethod.DURATION_QUANTILES: DurationQuantiles,
    WatchTimeMethod.ORDINAL: Ordinal,
    WatchTimeMethod.REGRESSION: Regression,
    WatchTimeMethod.LOG_REGRESSION: LogRegression,
}


def watch_time_objective(task: TaskSpec, statistics: LabelStatistics) -> WatchTimeObjective:
    """The objective of a watch_time task, scaled by its training labels."""
    return _METHODS[task.watch_time_method](task, statistics)
