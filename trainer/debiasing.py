"""What a log says about relevance once its positions, its policy and its sampling are taken out.

A position tower that is left out of serving, weights of inverse propensity, and down-sampling of negatives.
docs/debiasing.md tells when each is right, and what it cannot mend.

Letters: n = rows, B = rows of a batch, S = surfaces (1 without surfaces), P = the maximal position.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize
import tensorflow as tf

from schema.contract import TaskKind, TaskSpec, WatchTimeMethod
from schema.errors import ConfigError, DataError, ShapeError
from trainer import features as ft
from trainer.debiasing_config import PositionConfig, has_position_bias
from trainer.off_policy import effective_sample_size

FloatArray = npt.NDArray[np.float64]

# The position of a row whose position is not known.
MISSING_POSITION = -1

# How much the slope of the log mean label may change from a position to the next, one standard deviation.
_SLOPE_CHANGE = 0.05
# Adam moves every weight by up to its learning rate per step, whatever the gradient. The tower has to come as
# far as the body's biases in a fraction of an epoch: the body must not learn what belongs to the position.
_SPEED = 10.0
# Keeps odds finite where (nearly) every row of a position is positive.
_LARGEST_RATE = 0.99
# Beyond this the float32 sigmoid is 1 and its complement about to underflow.
_LARGEST_LOGIT = 80.0
_HASH_BUCKETS = 1 << 53

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PositionStatistics:
    """One task's training labels by surface and position; plain numbers, so that a checkpoint can hold them.

    Attributes:
      rows: [S, P + 1], labelled training rows with a position; all of them, whatever taught the means.
      mean_label: [S, P + 1], mean label in the label's unit, smoothed over positions; None for a surface
        whose labels say nothing about positions.
    """

    rows: Sequence[Sequence[int]]
    mean_label: Sequence[Sequence[float | None]]


def position_statistics(
    windows: Iterable[Mapping[str, npt.NDArray[Any]]],
    tasks: Sequence[TaskSpec],
    config: PositionConfig,
    num_surfaces: int = 1,
    surface_name: str | None = None,
) -> dict[str, PositionStatistics]:
    """Counts rows and averages labels by surface and position, in one pass over the training data.

    Args:
      windows: training data in pieces of n rows: `position` int [n], MISSING_POSITION where unknown; every
        task's label float [n], NaN where missing; `surface_name` int [n]; with learn_from "exploration" also
        `exploration` float [n], 1 in the bucket of uniformly random screens, NaN (not in it) where unknown.
      tasks: the declared tasks.
      config: `max_position`, and which rows teach the means.
      num_surfaces: ids of the surface vocabulary, padding and OOV included.
      surface_name: transformed surface ids; None takes all rows as of one surface.

    Returns:
      Statistics by task name.

    Raises:
      DataError: no row that should teach has a position and a label.
    """
    shape = num_surfaces, config.max_position + 1
    rows = {task.name: np.zeros(shape, np.int64) for task in tasks}
    # Of the rows that teach: their number, Σ label, Σ label².
    moments = {task.name: np.zeros((3, *shape)) for task in tasks}
    for window in windows:
        position = np.asarray(window[ft.POSITION])
        surface = np.zeros_like(position) if surface_name is None else np.asarray(window[surface_name])
        cell = surface * shape[1] + np.minimum(position, config.max_position)
        teaches = np.ones(len(position), np.bool_)
        if config.learn_from == "exploration":
            teaches = np.asarray(window[ft.EXPLORATION]) == 1
        for task in tasks:
            label = np.asarray(window[task.label], np.float64)
            known = (position > MISSING_POSITION) & ~np.isnan(label)
            rows[task.name] += _count(cell[known], shape).astype(np.int64)
            chosen = known & teaches
            for power in range(3):
                moments[task.name][power] += _count(cell[chosen], shape, label[chosen] ** power)
    statistics = {}
    for task in tasks:
        if not moments[task.name][0].any():
            raise DataError(
                f"position.learn_from is {config.learn_from!r}, but no such training row has both a position "
                f"and the label {task.label!r} of task {task.name!r}; check the columns 'position' and "
                "'exploration' of the dataset declaration, or set position.kind to 'none'."
            )
        # Negative labels have no ratios.
        is_ratio = task.kind is not TaskKind.REGRESSION
        means = [
            smooth_mean_label(*of_surface) if is_ratio else None
            for of_surface in moments[task.name].transpose(1, 0, 2)
        ]
        in_surface = rows[task.name].any(axis=1)
        num_flat = sum(mean is None and found for mean, found in zip(means, in_surface, strict=True))
        if is_ratio and num_flat:
            _logger.warning("task=%s surfaces_without_position_effect=%d", task.name, num_flat)
        statistics[task.name] = PositionStatistics(
            rows[task.name].tolist(),
            [[None] * shape[1] if mean is None else mean.tolist() for mean in means],
        )
    return statistics


def _count(cell: npt.NDArray[Any], shape: tuple[int, int], weights: FloatArray | None = None) -> FloatArray:
    return np.bincount(cell, weights, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def smooth_mean_label(rows: FloatArray, total: FloatArray, total_of_squares: FloatArray) -> FloatArray | None:
    """Mean label by position, neighbours helping out where there are few rows.

    With m the mean, θ = log m, and φ the variance of the labels within positions over their mean (1 − m for
    binary labels), this minimises

        Σ_p (rows[p] exp(θ_p) − total[p] θ_p) / φ  +  ½ Σ_p ((θ_{p+1} − 2 θ_p + θ_{p−1}) / .05)²,

    the negative quasi-log-likelihood of a log-linear model and a penalty on bends: much data at a position
    give its own mean, none the straight line through its neighbours, so that (1 / rank)^η is left nearly as
    it is. It is convex.

    Args:
      rows: float64 [P + 1], number of labels.
      total: float64 [P + 1], their sum; labels are not negative.
      total_of_squares: float64 [P + 1].

    Returns:
      float64 [P + 1]; beyond the positions that have rows, the nearest of them. None with fewer than two
      positions that have rows, or without any positive label.

    Source: Wedderburn, Biometrika 1974, doi:10.1093/biomet/61.3.439 (quasi-likelihood); Eilers and Marx,
    Statistical Science 1996, doi:10.1214/ss/1038425655 (penalised differences).
    """
    shown = np.flatnonzero(rows)
    if len(shown) < 2 or total.sum() <= 0:
        return None
    inside = slice(shown[0], shown[-1] + 1)
    mean = total.sum() / rows.sum()
    # Half a row of average labels keeps the log finite at a position that has seen zeros only.
    n, y = rows[inside] + 0.5, total[inside] + 0.5 * mean
    within = total_of_squares.sum() - (total[shown] ** 2 / rows[shown]).sum()
    dispersion = max(within / total.sum(), 1e-6)
    bends = np.diff(np.eye(len(n)), 2, axis=0) / _SLOPE_CHANGE
    penalty = bends.T @ bends
    found = scipy.optimize.minimize(
        lambda theta: (n @ np.exp(theta) - y @ theta) / dispersion + theta @ penalty @ theta / 2,
        np.full(len(n), math.log(mean)),
        jac=lambda theta: (n * np.exp(theta) - y) / dispersion + penalty @ theta,
        hess=lambda theta: np.diag(n * np.exp(theta) / dispersion) + penalty,
        method="trust-exact",
    )
    return np.exp(np.pad(found.x, (inside.start, len(rows) - inside.stop), mode="edge"))


class PositionBias(tf.keras.layers.Layer):
    """The effect of the position on one task: known in training, left out when serving.

    "additive" (Zhao et al., RecSys 2019, doi:10.1145/3298689.3346997): logit = f(x) + b[s, p].
    "pal" (Guo et al., RecSys 2019, doi:10.1145/3298689.3347033): P(click) = e[s, p] σ(f(x)), and
    for watch time E[T] = e[s, p] m exp(f(x)), or P(T > t) = e[s, p] σ(f_t(x)) for every threshold t of
    the ordinal method, with e the probability of being seen. The thresholds of "additive" share b, too.

    What is served stands for the average position of the surface's training impressions: b has mean 0 over
    them, and e is replaced by its mean over them. So the mean of the served probabilities stays comparable
    with the click rate of a log, and the order within a request is that of f. A row whose position is not
    known is taken as shown at the average position, in training too.

    The data cannot tell e from a constant times e, nor b from b plus a constant: of the positions that were
    shown, the best one of each surface has e = 1.

    With learn_from "all" the tower starts from the mean labels by position, as a head starts from the mean
    label, and learns how much of them the relevance of the items explains. With "exploration" it keeps them.
    """

    def __init__(
        self, config: PositionConfig, task: TaskSpec, statistics: PositionStatistics, **kwargs: object
    ) -> None:
        """Makes the tower of a task.

        Args:
          config: any kind but "none".
          task: the declared task.
          statistics: the task's, from `position_statistics`.
          **kwargs: passed to the Keras layer.

        Raises:
          ConfigError: the task has no position bias; ask `has_position_bias` first.
        """
        super().__init__(**kwargs)
        if not has_position_bias(config, task):
            raise ConfigError(f"position.kind {config.kind!r} does not suit the task {task.name!r}.")
        self._settings = config
        has_share = task.kind in (TaskKind.BINARY, TaskKind.COMPLETION)
        self._is_product = config.kind == "pal" and (has_share or _is_ordinal(task))
        self._has_odds = config.kind == "additive" and has_share
        self._has_curve = config.kind == "pal" or not (task.kind is TaskKind.REGRESSION or _is_ordinal(task))
        self._rows = np.asarray(statistics.rows, np.float64)
        mean_label = np.asarray(statistics.mean_label, np.float64)
        if self._has_odds:
            mean_label = np.minimum(mean_label, _LARGEST_RATE)
            initial = np.log(mean_label) - np.log1p(-mean_label)
        else:
            initial = np.log(mean_label)
        self._initial = tf.constant(np.nan_to_num(initial, nan=0.0), tf.float32)
        shown = self._rows > 0
        self._never_shown = tf.constant(~shown & shown.any(axis=1, keepdims=True))
        in_surface = self._rows.sum(axis=1, keepdims=True)
        # A surface without training rows stands at the average of all of them.
        share = np.where(in_surface > 0, self._rows, self._rows.sum(axis=0))
        self._has_rows = tf.constant(in_surface[:, 0] > 0)
        self._share = tf.constant(share / share.sum(axis=1, keepdims=True), tf.float32)
        self._surface_share = tf.constant(in_surface[:, 0] / in_surface.sum(), tf.float32)
        self._change: tf.Variable | None = None
        if config.learn_from == "all":
            self._change = self.add_weight("change", self._rows.shape, initializer="zeros")

    def call(
        self,
        logits: tf.Tensor,
        position: tf.Tensor,
        surface: tf.Tensor | None = None,
        training: bool = False,
    ) -> tf.Tensor:
        """The logits of rows as they were shown; the task's loss and output take them.

        Args:
          logits: float32 [B], or [n, B] of a task with n of them, of the body.
          position: int [B], MISSING_POSITION where unknown.
          surface: int [B] transformed ids, those of the vocabulary and not hidden ones; None if there is one.
          training: whether positions are dropped.

        Returns:
          float32, the shape of the logits.
        """
        surface = tf.zeros_like(position) if surface is None else tf.cast(surface, position.dtype)
        known = position > MISSING_POSITION
        if training and self._settings.dropout_fraction:
            known &= tf.random.uniform(tf.shape(position)) >= self._settings.dropout_fraction
        row = tf.clip_by_value(position, 0, self._settings.max_position)
        effects = self._effects()
        shown = tf.gather_nd(effects, tf.stack([surface, row], axis=-1))
        return self._apply(logits, tf.where(known, shown, tf.gather(self._reference(effects), surface)))

    def served(self, logits: tf.Tensor, surface: tf.Tensor | None = None) -> tf.Tensor:
        """The logits at the average position of the surface.

        Args:
          logits: float32 [B], or [n, B] of a task with n of them, of the body.
          surface: int [B] transformed ids; None if there is one.

        Returns:
          float32, the shape of the logits.
        """
        reference = self._reference(self._effects())
        if surface is None:
            return self._apply(logits, reference[0])
        return self._apply(logits, tf.gather(reference, surface))

    def initial_bias(self, served_logit: float) -> float:
        """The body's logit with which an untrained model serves `served_logit`, on average over surfaces."""
        reference = float(tf.reduce_sum(self._surface_share * self._reference(self._effects())))
        if not self._is_product:
            return served_logit - reference
        rate = 1.0 / (1.0 + math.exp(-served_logit))
        rate = min(rate / math.exp(reference), _LARGEST_RATE)
        return math.log(rate) - math.log1p(-rate)

    def examination_curve(
        self, logits: npt.ArrayLike | None = None, surface: npt.ArrayLike | None = None
    ) -> FloatArray:
        """How much of the first position's label each position gets, all else being equal.

        "pal": e[s, p] / e[s, first]. "additive" in a binary task: mean σ(f + b[s, p]) / mean σ(f + b[s,
        first]) over rows, the same rows at either position (standardisation: Hernán and Robins, Causal
        Inference, 2020, section 13.3); the ratio of the odds alone would be the ratio of the probabilities
        only where clicks are rare. "additive" with watch time by odds: exp(b[s, p] − b[s, first]).

        Args:
          logits: [n], of the body, for rows that stand for the traffic; "additive" in a binary task only.
          surface: int [n] of those rows; None if there is one.

        Returns:
          float64 [S, P + 1], 1 at the first position that was shown on the surface, NaN where none was.

        Raises:
          DataError: logits are needed and missing, or a surface with training rows has none.
          ConfigError: the effects are no ratios of labels: "additive" in a regression, or in the log odds of
            many thresholds.
        """
        if not self._has_curve:
            raise ConfigError("the position shifts this task's logits; there is no examination curve.")
        effects = self._effects().numpy().astype(np.float64)
        curve = np.full(effects.shape, np.nan)
        for s, (effect, rows) in enumerate(zip(effects, self._rows, strict=True)):
            shown = np.flatnonzero(rows)
            if len(shown) == 0:
                continue
            means = np.exp(effect[shown])
            if self._has_odds:
                means = _mean_rates(effect[shown], logits, surface, s)
            curve[s, shown] = means / means[0]
        return curve

    def _effects(self) -> tf.Tensor:
        """float32 [S, P + 1]: b, of mean 0 over a surface's training rows; or log e, at most 0."""
        table = self._initial
        if self._change is not None:
            table += _SPEED * self._change
        if self._settings.kind == "additive":
            return table - tf.reduce_sum(self._share * table, axis=1, keepdims=True)
        best = tf.where(self._never_shown, table.dtype.min, table)
        # A position that was never shown is never looked up, except by evaluation rows.
        return tf.minimum(table - tf.reduce_max(best, axis=1, keepdims=True), 0.0)

    def _reference(self, effects: tf.Tensor) -> tf.Tensor:
        """float32 [S]: the effect that what is served contains."""
        if self._settings.kind == "additive":
            return tf.zeros_like(effects[:, 0])
        mean = tf.reduce_sum(self._share * tf.exp(effects), axis=1)
        # The row of an unknown surface never learns.
        everywhere = tf.reduce_sum(self._surface_share * mean)
        return tf.math.log(tf.where(self._has_rows, mean, everywhere))

    def _apply(self, logits: tf.Tensor, effect: tf.Tensor) -> tf.Tensor:
        return product_logit(logits, effect) if self._is_product else logits + effect


def _is_ordinal(task: TaskSpec) -> bool:
    return task.kind is TaskKind.WATCH_TIME and task.watch_time_method is WatchTimeMethod.ORDINAL


def product_logit(logits: tf.Tensor, log_factor: tf.Tensor) -> tf.Tensor:
    """The logit of exp(log_factor) · σ(logits), finite where the product rounds to 0 or 1.

    Formula: with s = exp(log_factor), log s + log σ(f) − log(σ(−f) + (1 − s) σ(f)).

    Args:
      logits: float32, any shape.
      log_factor: float32, the same shape or one that broadcasts, at most 0.

    Returns:
      float32.
    """
    f = tf.minimum(logits, _LARGEST_LOGIT)
    complement = tf.sigmoid(-f) - tf.math.expm1(log_factor) * tf.sigmoid(f)
    return log_factor - tf.nn.softplus(-f) - tf.math.log(complement)


def _mean_rates(
    effects: FloatArray, logits: npt.ArrayLike | None, surface: npt.ArrayLike | None, wanted: int
) -> FloatArray:
    """Mean of σ(logit + effect) over the rows of a surface, for each effect."""
    rows = np.empty(0) if logits is None else np.asarray(logits, np.float64)
    if surface is not None:
        rows = rows[np.asarray(surface) == wanted]
    if len(rows) == 0:
        raise DataError(
            f"no logits of surface {wanted} to average over, which the additive form needs; pass the body's "
            "logits of some training rows of every surface."
        )
    return np.array([(1.0 / (1.0 + np.exp(-(rows + effect)))).mean() for effect in effects])


class InversePropensity(NamedTuple):
    """Row weights and what to say about them in the log.

    Attributes:
      weights: float32 [n], above 0.
      num_missing: rows without a propensity.
      num_clipped: rows whose weight was cut.
      effective_sample_size: of the weights, see there.
    """

    weights: npt.NDArray[np.float32]
    num_missing: int
    num_clipped: int
    effective_sample_size: float


def inverse_propensity_weights(
    propensity: npt.ArrayLike,
    exploration: npt.ArrayLike | None = None,
    clip: float | None = None,
    self_normalise: bool = True,
    missing: npt.ArrayLike | None = None,
) -> InversePropensity:
    """Weights with which logged rows stand for a policy that shows everything equally often.

    Formula: w = min(1 / propensity, clip); self-normalised, w / (mean w of the rows of the same bucket).

    Propensities are given the request and its bucket, so either bucket stands for uniform screens on its own,
    and each keeps its share of the rows. Without the cut the weighted mean of any function of the rows is
    unbiased (self-normalised: consistent); the cut trades that for variance.

    Args:
      propensity: float [n], the probability with which the policy showed the item there.
      exploration: float [n], 1 in the bucket of uniformly random screens, any other value outside it; None
        if all rows are of one bucket.
      clip: largest 1 / propensity, at least 1; None never cuts.
      self_normalise: whether weights have mean 1, which keeps the size of the gradient.
      missing: bool [n], rows that were logged without a propensity, whatever stands there; they weigh 1. None
        if there is none.

    Returns:
      Weights, float32 [n], and their summary.

    Raises:
      ShapeError: the arrays are not [n].
      DataError: a propensity that is not missing is NaN, not above 0, or above 1.
      ConfigError: `clip` is below 1.

    Source: Horvitz and Thompson, JASA 1952, doi:10.1080/01621459.1952.10483446 (weights); Ionides, JCGS 2008,
    doi:10.1198/106186008X320456 (the cut); Swaminathan and Joachims, NIPS 2015 (self-normalised).
    """
    p = np.asarray(propensity, np.float64)
    is_missing = np.zeros(p.shape, np.bool_) if missing is None else np.asarray(missing, np.bool_)
    bucket = np.zeros(p.shape, np.bool_) if exploration is None else np.asarray(exploration) == 1
    if p.ndim != 1 or is_missing.shape != p.shape or bucket.shape != p.shape:
        raise ShapeError(
            f"propensity {p.shape}, exploration {bucket.shape} and missing {is_missing.shape}; "
            "expected arrays of one dimension and the same length."
        )
    if clip is not None and not clip >= 1:
        raise ConfigError(f"clip is {clip}; expected the largest 1 / propensity, at least 1, or None.")
    known = ~is_missing
    # Written so that NaN is wrong as well.
    wrong = p[known & ~((p > 0) & (p <= 1))]
    if len(wrong):
        raise DataError(
            f"propensities must be probabilities in (0, 1]; found {wrong[0]} and {len(wrong) - 1} more. "
            "Check the column 'propensity' of the dataset declaration; rows that have none are `missing`."
        )
    inverse = 1.0 / np.where(known, p, 1.0)
    weights = inverse if clip is None else np.minimum(inverse, clip)
    num_clipped = int(np.count_nonzero(known & (weights < inverse)))
    if self_normalise:
        for rows in (known & bucket, known & ~bucket):
            if rows.any():
                weights[rows] /= weights[rows].mean()
    return InversePropensity(
        weights.astype(np.float32),
        int(np.count_nonzero(is_missing)),
        num_clipped,
        effective_sample_size(weights),
    )


class SampledRows(NamedTuple):
    """Which rows take part in training, and with what weight.

    Attributes:
      keep: bool [n].
      weights: float32 [n], 1 / rate for a kept row that could have been dropped, else 1.
    """

    keep: tf.Tensor
    weights: tf.Tensor


def sample_negatives(
    binary_labels: Sequence[tf.Tensor], row_key: Sequence[tf.Tensor], rate: float, seed: int
) -> SampledRows:
    """Drops a share of the rows that are negative in every binary task.

    A row with a positive or a missing label in any binary task is kept, so no task loses a positive. What is
    kept of the others weighs 1 / rate: every task's weighted loss is that of all rows on average, watch time
    and regression included, and nothing has to be corrected when serving.

    The decision is a hash of the row's key and the seed: it does not depend on the order of the rows, and the
    rows kept at a rate are among those kept at any higher one. Rows of equal keys share their fate.

    Args:
      binary_labels: float [n] of each binary task, NaN where missing; at least one.
      row_key: what tells rows apart, int or string [n] each; at least one.
      rate: share of those rows to keep, above 0 and at most 1.
      seed: of the hash.

    Returns:
      Masks and weights, [n].

    Raises:
      ConfigError: the rate is out of range, or there is no binary task, or no key.
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"the sampling rate of negatives is {rate}; expected above 0 and at most 1.")
    if not binary_labels or not row_key:
        raise ConfigError(
            f"{len(binary_labels)} binary tasks and {len(row_key)} key columns; down-sampling of negatives "
            "needs at least one of each: set its rate to 1."
        )
    is_negative = tf.reduce_all(tf.stack([tf.equal(label, 0) for label in binary_labels]), axis=0)
    columns = [key if key.dtype == tf.string else tf.strings.as_string(key) for key in row_key]
    key = tf.strings.join(columns, separator="\n")
    draw = tf.strings.to_hash_bucket_strong(key, _HASH_BUCKETS, key=[seed, 0])
    keep = tf.logical_not(is_negative) | (tf.cast(draw, tf.float64) < rate * _HASH_BUCKETS)
    return SampledRows(keep, tf.where(is_negative, 1.0 / rate, 1.0))


def correct_sampled_logit(logits: tf.Tensor, rate: float) -> tf.Tensor:
    """The logit over all rows, of a model trained without weights on all positives and some negatives.

    Formula: logit + log(rate), which is q = p / (p + (1 − p) / rate).

    Exact for a task all of whose negatives are kept with the same probability. `sample_negatives` keeps a
    negative of one task that is a positive of another, so with several tasks its weights are right, and this
    is not.

    Args:
      logits: float32, any shape.
      rate: share of the negatives that was kept, above 0 and at most 1.

    Returns:
      float32, the same shape.

    Raises:
      ConfigError: the rate is out of range.

    Source: He et al., ADKDD 2014, doi:10.1145/2648584.2648589, section 6.3.
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"the sampling rate of negatives is {rate}; expected above 0 and at most 1.")
    return logits + math.log(rate)
