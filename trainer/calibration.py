"""Calibration of task outputs: what is served agrees on average with what happens, at every level of output.

A calibrator is a strictly increasing, piecewise linear function per task, fitted on the eval split after
training. It never reorders the candidates of a task, and never ties them; it changes what they add to the
final score.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
import tensorflow as tf
from scipy.special import expit, logit

from schema.contract import TaskKind, TaskSpec
from schema.errors import ConfigError, DataError, ShapeError
from trainer.calibration_config import MIN_ROWS, CalibrationConfig, CalibrationMethod

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Rows of the rarer class of a binary task below which its output is left as it is: with 10 positives the
# standard error of a rate is a third of it.
MIN_CLASS_ROWS = 10
# Smaller blocks of the isotonic regression join their neighbour. Fewer knots; on simulated outputs any number
# from 1 to 100 is as good on new rows.
MIN_BLOCK_ROWS = 20
# float32 knows no probability between that of this logit and 1.
_MAX_LOGIT = 16.0
_LOGIT_STEP = 0.1
# Outputs that differ by less, as a share of the largest, differ by rounding only.
_ROUNDING = 1e-6
_NAMED = 5

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A strictly increasing, piecewise linear function; beyond its knots the end segments go on.

    Attributes:
      inputs: knots as the model gives them, in the unit of the task; strictly increasing, at least 2.
      outputs: the calibrated values of these knots; strictly increasing.
    """

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses knots that make no increasing function, from a fit or from a file."""
        knots = np.array([self.inputs, self.outputs]) if len(self.inputs) == len(self.outputs) else None
        if knots is None or knots.shape[1] < 2 or not (np.diff(knots) > 0).all():
            raise ConfigError(
                f"a calibration curve of {len(self.inputs)} inputs and {len(self.outputs)} outputs is not "
                "strictly increasing; fit it again."
            )

    def __call__(self, values: npt.ArrayLike) -> FloatArray:
        """Calibrated values, float64, the shape of the input; NaN stays NaN."""
        x = np.asarray(values, dtype=np.float64)
        inputs, outputs = np.array(self.inputs), np.array(self.outputs)
        segment = np.clip(np.searchsorted(inputs, x, side="right") - 1, 0, len(inputs) - 2)
        slopes = np.diff(outputs) / np.diff(inputs)
        return np.asarray(outputs[segment] + slopes[segment] * (x - inputs[segment]))


IDENTITY = Curve((0.0, 1.0), (0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Calibrator:
    """The calibration of one task's output. `dataclasses.asdict` of it is JSON, `from_dict` reads it.

    Attributes:
      curve: of all rows; also of slices that have no curve of their own.
      slices: value of the slice feature -> its curve.
      num_rows: eval rows with a label that it was fitted on.
      notes: what was not fitted as asked, and why.
    """

    curve: Curve = IDENTITY
    slices: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    num_rows: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibrator:
        """The inverse of `dataclasses.asdict`, also after a round trip through JSON.

        Raises:
          ConfigError: a curve is not strictly increasing.
        """
        return cls(
            _curve(values["curve"]),
            {key: _curve(curve) for key, curve in values["slices"].items()},
            values["num_rows"],
            tuple(values["notes"]),
        )

    @property
    def is_identity(self) -> bool:
        """Whether outputs stay as they are."""
        return self.curve == IDENTITY and not self.slices

    def apply_numpy(self, outputs: npt.ArrayLike, slices: npt.ArrayLike | None = None) -> FloatArray:
        """Calibrates outputs.

        Args:
          outputs: [...], in the unit of the task.
          slices: str, bytes or integers of the same shape; needed when the calibrator has slices. A value
            without a curve of its own uses the curve of all rows.

        Returns:
          float64 [...].

        Raises:
          ShapeError: slices are missing or have another shape.
        """
        values = np.asarray(outputs, dtype=np.float64)
        keys = self._checked_slices(values.shape, None if slices is None else np.shape(slices))
        result = self.curve(values)
        if keys:
            names = _slice_names(slices)
            for name, curve in self.slices.items():
                mine = names == name
                result[mine] = curve(values[mine])
        return result

    def apply(self, outputs: tf.Tensor, slices: tf.Tensor | None = None) -> tf.Tensor:
        """The same in TensorFlow, for the exported model.

        Args:
          outputs: float32 [...].
          slices: string or integer [...]; see `apply_numpy`.

        Returns:
          float32 [...]. Interpolated in float64, so that the rounding to float32 is the only one.

        Raises:
          ShapeError: slices are missing, or of another rank.
        """
        given = None if slices is None else tuple(slices.shape)
        has_slices = self._checked_slices(tuple(outputs.shape), given)
        if self.is_identity:
            return outputs
        # On the union of all knots every curve is linear in every segment: one search serves all slices.
        curves = [self.curve, *self.slices.values()]
        inputs = np.unique(np.concatenate([curve.inputs for curve in curves]))
        values = np.stack([curve(inputs) for curve in curves])
        slopes = np.diff(values) / np.diff(inputs)

        x = tf.cast(tf.reshape(outputs, [-1]), tf.float64)
        segment = tf.searchsorted(tf.constant(inputs), x, side="right") - 1
        segment = tf.clip_by_value(segment, 0, len(inputs) - 2)
        row = self._rows(tf.reshape(slices, [-1])) if has_slices else tf.zeros_like(segment)
        place = tf.stack([row, segment], axis=-1)
        y = tf.gather_nd(tf.constant(values), place) + tf.gather_nd(tf.constant(slopes), place) * (
            x - tf.gather(tf.constant(inputs), segment)
        )
        return tf.reshape(tf.cast(y, outputs.dtype), tf.shape(outputs))

    def _rows(self, slices: tf.Tensor) -> tf.Tensor:
        """Row of each value in the stacked curves, int32: 0 for that of all rows."""
        names = slices if slices.dtype == tf.string else tf.strings.as_string(slices)
        matches = tf.equal(names[:, tf.newaxis], tf.constant(list(self.slices)))
        places = tf.range(1, len(self.slices) + 1)
        return tf.reduce_sum(tf.where(matches, places, 0), axis=-1)

    def _checked_slices(self, shape: tuple[int | None, ...], slices: tuple[int | None, ...] | None) -> bool:
        """Whether slices matter; raises when they do and are not there, one per output."""
        if not self.slices:
            return False
        if (
            slices is None
            or len(slices) != len(shape)
            or any(a != b for a, b in zip(shape, slices, strict=True) if None not in (a, b))
        ):
            raise ShapeError(
                f"the calibrator has curves for {len(self.slices)} slices; slices of the outputs' shape "
                f"{shape} are needed, got {slices}."
            )
        return True


def fit(
    task: TaskSpec,
    method: CalibrationMethod,
    outputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    slices: npt.ArrayLike | None = None,
    min_slice_rows: int = 1000,
) -> Calibrator:
    """Fits the calibration of one task's output on labelled rows that the model was not trained on.

    "platt" is, by what the output can be (`output_range`):
      a probability p: sigmoid(a logit p + b), a > 0, of the largest likelihood, with Platt's targets
        (N+ + 1) / (N+ + 2) and 1 / (N- + 2), so that no data drive a to infinity. Source: Platt, Advances in
        Large Margin Classifiers 1999; on the log odds of a network: Guo et al., ICML 2017, arXiv:1706.04599,
        section 4.1. Drawn as a piecewise linear function with steps of 0.1 in the logit.
      at least 0 (seconds): a scale, the mean label over the mean output.
      any number: a y + b, a > 0, of least squares.

    "isotonic" is the non-decreasing function of least squares (pool adjacent violators; Zadrozny and Elkan,
    KDD 2002, doi:10.1145/775047.775151), with lines between the centres of its blocks (mean output, mean
    label) in place of steps (centred isotonic regression; Oron and Flournoy 2017, arXiv:1701.05964). Steps
    would tie the rows of a block and so lose order within the task. A block has at least `MIN_BLOCK_ROWS`
    rows and a mean label inside the range. Beyond the end blocks the function goes to the ends of the range:
    0 maps to 0, 1 to 1; where there is no end it keeps the ratio (seconds) or the distance (any number) of
    the last block.

    Slices: f_s = w f_own + (1 - w) f_all, w = n / (n + min_slice_rows), n = labelled rows of the slice. Both
    increase, so f_s does.

    The identity, announced in `notes` and in the log, where nothing can be fitted: fewer than `MIN_ROWS`
    labelled rows, labels or outputs that are all the same, fewer than `MIN_CLASS_ROWS` rows of a class, or
    "platt" on outputs that order the rows the wrong way round. Also for a watch time of which no mean is
    served.

    Args:
      task: its name for messages, its kind for the range.
      method: see above.
      outputs: [n], the model's uncalibrated outputs, in the unit of the task.
      labels: [n], NaN where missing: such rows are left out.
      slices: [n], str, bytes or integers; None for one curve.
      min_slice_rows: labelled rows that a slice needs for a curve of its own.

    Raises:
      ShapeError: the arrays are not one-dimensional, or differ in length.
      DataError: an output is not finite, or an output or a label lies outside the range.
      ConfigError: an unknown method.
    """
    if method == "none":
        return Calibrator()
    if method not in ("platt", "isotonic"):
        raise ConfigError(f"calibration method {method!r} is unknown; choose none, platt or isotonic.")
    x, y, names = _checked(task, outputs, labels, slices)
    if task.kind is TaskKind.WATCH_TIME and task.served != "mean":
        problem = f"it serves the {task.served}, and calibration is of means"
        curve, level = IDENTITY, logging.INFO
    else:
        curve, problem = _fit_curve(task.kind, method, x, y)
        level = logging.WARNING
    if problem:
        note = f"not calibrated: {problem}"
        _logger.log(level, "phase=calibrate task=%s method=%s %s", task.name, method, note)
        return Calibrator(num_rows=len(x), notes=(note,))

    found, notes = _fit_slices(task.kind, method, x, y, names, curve, min_slice_rows)
    for note in notes:
        _logger.info("phase=calibrate task=%s method=%s %s", task.name, method, note)
    _logger.info(
        "phase=calibrate task=%s method=%s rows=%d slices=%d mean_output=%.5g mean_label=%.5g",
        *(task.name, method, len(x), len(found), x.mean(), y.mean()),
    )
    return Calibrator(curve, found, len(x), notes)


def fit_tasks(
    config: CalibrationConfig,
    tasks: Sequence[TaskSpec],
    outputs: Mapping[str, npt.ArrayLike],
    labels: Mapping[str, npt.ArrayLike],
    slices: npt.ArrayLike | None = None,
) -> dict[str, Calibrator]:
    """Fits every task; see `fit`.

    Args:
      config: method and slices.
      tasks: the declared tasks.
      outputs: [n] by task name.
      labels: [n] by label name.
      slices: [n], the values of `config.slice_feature`; None when it names none.

    Returns:
      Calibrator by task name.

    Raises:
      ConfigError: slices without a slice feature, or the other way round.
      ShapeError, DataError: from `fit`.
    """
    if (slices is None) != (config.slice_feature is None):
        raise ConfigError(
            f"calibration.slice_feature is {config.slice_feature!r}, but slices were "
            f"{'not ' if slices is None else ''}given; give both or none."
        )
    return {
        task.name: fit(
            task, config.method, outputs[task.name], labels[task.label], slices, config.min_slice_rows
        )
        for task in tasks
    }


def output_range(kind: TaskKind) -> tuple[float, float]:
    """Smallest and largest value that the output and the label of a task of this kind can have."""
    return _RANGES[kind]


_RANGES: Mapping[TaskKind, tuple[float, float]] = {
    TaskKind.BINARY: (0.0, 1.0),
    TaskKind.WATCH_TIME: (0.0, math.inf),
    TaskKind.REGRESSION: (-math.inf, math.inf),
    TaskKind.COMPLETION: (0.0, 1.0),
}


def _curve(values: Mapping[str, Any]) -> Curve:
    return Curve(tuple(values["inputs"]), tuple(values["outputs"]))


def _checked(
    task: TaskSpec, outputs: npt.ArrayLike, labels: npt.ArrayLike, slices: npt.ArrayLike | None
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.str_] | None]:
    """The rows with a label: outputs, labels, names of slices."""
    x, y = np.asarray(outputs, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    names = None if slices is None else _slice_names(slices)
    if x.ndim != 1 or x.shape != y.shape or (names is not None and names.shape != x.shape):
        raise ShapeError(
            f"task {task.name!r}: outputs {x.shape}, labels {y.shape}"
            f"{'' if names is None else f', slices {names.shape}'} must all be [n]."
        )
    low, high = output_range(task.kind)
    if not np.isfinite(x).all():
        raise DataError(
            f"task {task.name!r}: {np.count_nonzero(~np.isfinite(x))} of {len(x)} outputs are NaN or "
            "infinite; check the model for overflow."
        )
    if task.kind is TaskKind.WATCH_TIME:
        # A regression may serve less than 0 s; such rows are those of the shortest watch times.
        x = np.maximum(x, low)
    known = ~np.isnan(y)
    for what, values in (("output", x), ("label", y[known])):
        wrong = values[(values < low) | (values > high) | np.isinf(values)]
        if len(wrong):
            raise DataError(
                f"task {task.name!r}: {what}s must lie in [{low:g}, {high:g}] and be finite; found "
                f"{wrong[0]:g} and {len(wrong) - 1} more: calibrate outputs in the unit of the label."
            )
    return x[known], y[known], None if names is None else names[known]


def _slice_names(slices: npt.ArrayLike | None) -> npt.NDArray[np.str_]:
    array = np.asarray(slices)
    if array.dtype.kind == "O":
        array = np.array(array.tolist()).reshape(array.shape)
    return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array.astype(np.str_)


def _fit_slices(
    kind: TaskKind,
    method: str,
    x: FloatArray,
    y: FloatArray,
    names: npt.NDArray[np.str_] | None,
    curve: Curve,
    min_rows: int,
) -> tuple[dict[str, Curve], tuple[str, ...]]:
    """A curve per slice that can have one, and notes on the others."""
    found: dict[str, Curve] = {}
    without: dict[str, list[str]] = {}
    for name in [] if names is None else np.unique(names).tolist():
        mine = names == name
        count = int(np.count_nonzero(mine))
        if count < min_rows:
            without.setdefault(f"fewer than {min_rows:,} labelled rows", []).append(name)
            continue
        own, problem = _fit_curve(kind, method, x[mine], y[mine])
        if problem:
            without.setdefault(problem, []).append(name)
        else:
            found[name] = _mix(own, curve, count / (count + min_rows))
    notes = []
    for reason, slices in without.items():
        shown = ", ".join(map(repr, slices[:_NAMED])) + (", …" if len(slices) > _NAMED else "")
        notes.append(f"slices with the curve of all rows: {len(slices):,} ({shown}): {reason}")
    return found, tuple(notes)


def _fit_curve(kind: TaskKind, method: str, x: FloatArray, y: FloatArray) -> tuple[Curve, str]:
    """The curve and ""; or the identity and why nothing was fitted."""
    if len(x) < MIN_ROWS:
        return IDENTITY, f"{len(x):,} labelled rows, fewer than {MIN_ROWS}"
    if np.ptp(y) == 0:
        return IDENTITY, f"every label is {y[0]:g}"
    rarer = min(np.count_nonzero(y == 0), np.count_nonzero(y == 1)) if kind is TaskKind.BINARY else len(y)
    if rarer < MIN_CLASS_ROWS:
        return IDENTITY, f"{rarer} rows of the rarer class, fewer than {MIN_CLASS_ROWS}"
    if np.ptp(x) <= _ROUNDING * np.abs(x).max():
        return IDENTITY, f"every output is {x[0]:g}"
    low, high = output_range(kind)
    if method == "isotonic":
        return _isotonic(x, y, low, high), ""
    if math.isfinite(high):
        return _platt(x, y)
    return _scale(x, y) if math.isfinite(low) else _line(x, y)


def _isotonic(x: FloatArray, y: FloatArray, low: float, high: float) -> Curve:
    values, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    sums = np.bincount(place, weights=y)
    pooled = scipy.optimize.isotonic_regression(sums / counts, weights=counts)
    columns = np.stack([counts, counts * values, sums], axis=1)
    blocks = _merge(np.add.reduceat(columns, pooled.blocks[:-1], axis=0), low, high)
    inputs, outputs = blocks[:, 1] / blocks[:, 0], blocks[:, 2] / blocks[:, 0]
    # A first block at the very end of the range leaves nothing below it; so does a last one above.
    if low == -math.inf:
        below = [(inputs[0] - 1.0, outputs[0] - 1.0)]
    else:
        below = [(low, low)] if inputs[0] > low else []
    if high < math.inf:
        above = [(high, high)] if inputs[-1] < high else []
    elif low == -math.inf:
        above = [(inputs[-1] + 1.0, outputs[-1] + 1.0)]
    else:
        above = [(2.0 * inputs[-1], 2.0 * outputs[-1])]
    knots = np.array([*below, *zip(inputs, outputs, strict=True), *above])
    return _increasing(knots[:, 0], knots[:, 1])


def _merge(blocks: FloatArray, low: float, high: float) -> FloatArray:
    """Joins neighbours until each has enough rows and a mean label within (low, high).

    Args:
      blocks: [m, 3], rows, sum of outputs and sum of labels; their means increase.

    Returns:
      The same of at most m blocks; the means increase as before, for each is a mean of neighbours.
    """
    merged: list[FloatArray] = []
    rest = np.zeros(3)
    for block in blocks:
        rest = rest + block
        if rest[0] >= MIN_BLOCK_ROWS and rest[2] > low * rest[0]:
            merged.append(rest)
            rest = np.zeros(3)
    if rest[0]:
        merged[-1:] = [rest + merged[-1]] if merged else [rest]
    while len(merged) > 1 and merged[-1][2] >= high * merged[-1][0]:
        merged[-2:] = [merged[-2] + merged[-1]]
    return np.stack(merged)


def _platt(p: FloatArray, y: FloatArray) -> tuple[Curve, str]:
    num_positive = float(y.sum())
    num_negative = len(y) - num_positive
    targets = y * (num_positive + 1) / (num_positive + 2) + (1 - y) / (num_negative + 2)
    z = np.clip(logit(p), -_MAX_LOGIT, _MAX_LOGIT)
    columns = np.stack([z, np.ones_like(z)], axis=1)

    def loss(ab: FloatArray) -> float:
        s = columns @ ab
        return float(np.mean(np.logaddexp(0.0, s) - targets * s))

    def gradient(ab: FloatArray) -> FloatArray:
        return np.asarray((expit(columns @ ab) - targets) @ columns / len(z))

    def hessian(ab: FloatArray) -> FloatArray:
        s = expit(columns @ ab)
        return np.asarray((columns * (s * (1.0 - s))[:, np.newaxis]).T @ columns / len(z))

    found = scipy.optimize.minimize(
        loss, np.array([1.0, 0.0]), jac=gradient, hess=hessian, method="trust-exact"
    )
    slope, shift = found.x
    if not found.success or slope <= 0:
        return IDENTITY, f"Platt scaling found a slope of {slope:g} ({found.message})"
    grid = np.arange(-_MAX_LOGIT, _MAX_LOGIT + _LOGIT_STEP / 2, _LOGIT_STEP)
    calibrated = expit(slope * grid + shift)
    # A steep slope reaches 1 before the end of the grid.
    below_one = calibrated < 1
    inputs, outputs = expit(grid)[below_one], calibrated[below_one]
    return _increasing(np.array([0.0, *inputs, 1.0]), np.array([0.0, *outputs, 1.0])), ""


def _scale(x: FloatArray, y: FloatArray) -> tuple[Curve, str]:
    return Curve((0.0, 1.0), (0.0, float(y.mean() / x.mean()))), ""


def _line(x: FloatArray, y: FloatArray) -> tuple[Curve, str]:
    spread = x - x.mean()
    slope = float(spread @ y / (spread @ spread))
    if slope <= 0:
        return IDENTITY, f"least squares found a slope of {slope:g}"
    shift = float(y.mean() - slope * x.mean())
    return Curve((0.0, 1.0), (shift, shift + slope)), ""


def _mix(first: Curve, second: Curve, share: float) -> Curve:
    """share × first + (1 − share) × second, on the knots of both."""
    inputs = np.union1d(first.inputs, second.inputs)
    return _increasing(inputs, share * first(inputs) + (1.0 - share) * second(inputs))


def _increasing(inputs: FloatArray, outputs: FloatArray) -> Curve:
    """Leaves out knots that lie so near the one before them that rounding made their outputs equal."""
    kept = np.diff(np.maximum.accumulate(outputs), prepend=-np.inf) > 0
    return Curve(tuple(inputs[kept].tolist()), tuple(outputs[kept].tolist()))
