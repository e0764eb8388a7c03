"""Calibration against known distortions, slow oracles and the laws that it must obey."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import scipy.optimize
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.contract import TaskSpec
from schema.errors import ConfigError, DataError, ShapeError
from trainer import calibration, metrics
from trainer.calibration import IDENTITY, Calibrator, Curve, fit, fit_tasks
from trainer.calibration_config import CalibrationConfig

NAN = math.nan
CLICK = TaskSpec(name="click", label="click", kind="binary")
WATCH = TaskSpec(name="watch", label="watch_time_s", kind="watch_time")
STARS = TaskSpec(name="stars", label="rating", kind="regression")
SHARE = TaskSpec(name="share", label="completion", kind="completion")
MEDIAN = TaskSpec(name="watch", label="watch_time_s", kind="watch_time", method="ordinal", serve="median")
METHODS = ("platt", "isotonic")


def sigmoid(z: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-z))


def clicks(num: int, seed: int, shift: float = -2.0) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of a model that is too sure and too high: the true log odds are 0.6 z - 0.5."""
    rng = np.random.default_rng(seed)
    z = rng.normal(shift, 1.5, num)
    return sigmoid(z).astype(np.float32), (rng.random(num) < sigmoid(0.6 * z - 0.5)).astype(np.float32)


def seconds(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs that are 25 % too high where they are low and 4 times too high where they are high."""
    rng = np.random.default_rng(seed)
    outputs = rng.gamma(2.0, 15.0, num)
    return outputs.astype(np.float32), (rng.exponential(1.0, num) * outputs / (1.2 + outputs / 40)).astype(
        np.float32
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [-2.0, -5.0], ids=["common", "rare"])
def test_calibration_of_new_rows_gets_better_and_the_order_of_rows_stays(method: Any, shift: float) -> None:
    calibrator = fit(CLICK, method, *clicks(20_000, seed=1, shift=shift))
    outputs, labels = clicks(200_000, seed=2, shift=shift)
    served = calibrator.apply(tf.constant(outputs)).numpy()
    before, after = metrics.ece(labels, outputs, 15), metrics.ece(labels, served, 15)
    # Sampling leaves about sqrt(p (1 - p) / n) of each of 15 bins: .002 of common clicks, .0005 of rare ones.
    assert after < 0.3 * before
    assert served.mean() == pytest.approx(labels.mean(), rel=0.05)
    assert metrics.auc(labels, served) == pytest.approx(metrics.auc(labels, outputs), abs=1e-5)
    assert metrics.log_loss(labels, served) < metrics.log_loss(labels, outputs)


def test_steps_of_isotonic_regression_would_lose_order_within_the_task() -> None:
    outputs, labels = clicks(2_000, seed=3)
    order = np.argsort(outputs)
    steps = scipy.optimize.isotonic_regression(labels[order].astype(float)).x
    new_outputs, new_labels = clicks(50_000, seed=4)
    place = np.clip(np.searchsorted(outputs[order], new_outputs), 0, len(steps) - 1)
    auc = metrics.auc(new_labels, new_outputs)
    assert metrics.auc(new_labels, steps[place]) < auc - 1e-3
    served = fit(CLICK, "isotonic", outputs, labels).apply(tf.constant(new_outputs)).numpy()
    assert metrics.auc(new_labels, served) == pytest.approx(auc, abs=1e-5)


@pytest.mark.parametrize(("num", "tolerance"), [(150, 0.6), (5_000, 0.1)])
def test_platt_scaling_is_the_maximum_of_the_likelihood(num: int, tolerance: float) -> None:
    outputs, labels = clicks(num, seed=5)
    curve = fit(CLICK, "platt", outputs, labels).curve
    # Read a and b off the curve, then check that the derivatives of the likelihood are zero there.
    ends = curve(sigmoid(np.array([-3.0, 3.0])))
    low, high = np.log(ends / (1 - ends))
    slope, shift = (high - low) / 6, (high + low) / 2
    assert (slope, shift) == (pytest.approx(0.6, abs=tolerance), pytest.approx(-0.5, abs=2 * tolerance))
    positives = labels.sum(dtype=np.float64)
    high_target, low_target = (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2)
    targets = np.where(labels == 1, high_target, low_target)
    z = np.log(outputs.astype(np.float64) / (1 - outputs.astype(np.float64)))
    residuals = sigmoid(slope * z + shift) - targets
    assert abs(residuals.mean()) < 1e-4
    assert abs((residuals * z).mean()) < 1e-4
    # The knots are dense enough: .1 in the logit costs at most a .8 (1 - a) x .01 / 8 share.
    expected = sigmoid(slope * z + shift)
    np.testing.assert_allclose(curve(outputs), expected, rtol=1e-3)


def test_platt_scaling_of_outputs_that_separate_the_classes_stays_finite() -> None:
    outputs = np.linspace(0.3, 0.7, 200)
    curve = fit(CLICK, "platt", outputs, (outputs > 0.5).astype(float)).curve
    # Near Platt's targets 101/102 and 1/102 at the mean of a class, not 1 and 0.
    assert 0.9 < curve(0.6) < 0.9999
    assert curve(0.4) == pytest.approx(1 - curve(0.6), abs=1e-4)


def pooled(outputs: np.ndarray, labels: np.ndarray) -> list[tuple[float, float]]:
    """Blocks of isotonic regression by the min-max formula of Barlow et al. 1972: (mean output, mean label).

    The fit at i is the largest over starts j <= i of the smallest over ends k >= i of the mean label of j..k.
    """
    order = np.argsort(outputs, kind="stable")
    x, y = outputs[order], labels[order]
    n = len(y)
    fits = [
        max(min(float(np.mean(y[j : k + 1])) for k in range(i, n)) for j in range(i + 1)) for i in range(n)
    ]
    blocks = []
    for level in sorted(set(np.round(fits, 9))):
        rows = [i for i in range(n) if round(fits[i], 9) == level]
        blocks.append((float(np.mean(x[rows])), float(np.mean(y[rows]))))
    return blocks


def test_isotonic_knots_equal_the_min_max_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MIN_BLOCK_ROWS", 1)
    monkeypatch.setattr(calibration, "MIN_ROWS", 1)
    rng = np.random.default_rng(6)
    outputs = np.sort(rng.random(60))
    labels = outputs * 3 + rng.normal(0, 0.5, 60)
    blocks = pooled(outputs, labels)
    assert 5 < len(blocks) < 40
    curve = fit(STARS, "isotonic", outputs, labels).curve
    np.testing.assert_allclose(list(zip(curve.inputs, curve.outputs, strict=True))[1:-1], blocks, rtol=1e-9)


def test_isotonic_curve_of_three_blocks_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rates of 1/50, then 30/50 and 10/50, which pool to 40/100, then 45/50. Blocks have 50 rows or more.
    outputs = np.repeat([0.1, 0.3, 0.4, 0.8], 50)
    labels = np.concatenate([np.arange(50) < positives for positives in (1, 30, 10, 45)]).astype(float)
    curve = fit(CLICK, "isotonic", outputs, labels).curve
    np.testing.assert_allclose(curve.inputs, [0.0, 0.1, 0.35, 0.8, 1.0])
    np.testing.assert_allclose(curve.outputs, [0.0, 0.02, 0.4, 0.9, 1.0])
    # Half way between block centres, and half way to the end of the range.
    np.testing.assert_allclose(curve([0.05, 0.225, 0.9]), [0.01, 0.21, 0.95])


def test_block_without_a_positive_or_a_negative_joins_its_neighbour_so_that_no_row_is_certain() -> None:
    outputs = np.repeat([0.1, 0.3, 0.6, 0.8], 50)
    labels = np.concatenate([np.arange(50) < positives for positives in (0, 10, 30, 50)]).astype(float)
    curve = fit(CLICK, "isotonic", outputs, labels).curve
    np.testing.assert_allclose(curve.inputs, [0.0, 0.2, 0.7, 1.0])
    np.testing.assert_allclose(curve.outputs, [0.0, 0.1, 0.8, 1.0])


@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(100, 400),
    decimals=st.integers(1, 8),
    kind=st.sampled_from([CLICK, WATCH, STARS, SHARE]),
    method=st.sampled_from(METHODS),
    share=st.floats(0.05, 0.95),
)
@settings(max_examples=80, deadline=None)
def test_every_fit_increases_stays_in_range_and_is_the_same_in_tensorflow(
    seed: int, num: int, decimals: int, kind: TaskSpec, method: Any, share: float
) -> None:
    rng = np.random.default_rng(seed)
    low, high = calibration.output_range(kind.kind)
    outputs = rng.beta(0.5, 2.0, num) * (1 if high == 1 else 90) + (0 if low == 0 else -40)
    outputs = outputs.round(decimals)
    labels = rng.permutation(outputs) if kind is not CLICK else (rng.random(num) < share).astype(float)
    slices = rng.choice(["feed", "search"], num)
    calibrator = fit(kind, method, outputs, labels, slices, min_slice_rows=100)
    for curve in (calibrator.curve, *calibrator.slices.values()):
        grid = np.unique(np.concatenate([outputs, np.linspace(max(low, -50.0), min(high, 100.0), 200)]))
        values = curve(grid)
        assert (np.diff(values) > 0).all()
        assert values[0] >= low - 1e-12 and values[-1] <= high + 1e-12
    served = calibrator.apply(tf.constant(outputs, tf.float32), tf.constant(slices))
    expected = calibrator.apply_numpy(outputs.astype(np.float32), slices)
    # Both round once to float32; their float64 may differ in the last digit.
    np.testing.assert_array_max_ulp(served.numpy(), expected.astype(np.float32), maxulp=1)


def test_watch_time_is_scaled_to_the_mean_or_bent_by_level() -> None:
    outputs, labels = seconds(20_000, seed=7)
    new_outputs, new_labels = seconds(50_000, seed=8)
    scale = fit(WATCH, "platt", outputs, labels)
    ratio = labels.mean(dtype=np.float64) / outputs.mean(dtype=np.float64)
    np.testing.assert_allclose(scale.apply_numpy([0.0, 10.0, 1e4]), [0.0, 10 * ratio, 1e4 * ratio])

    bent = fit(WATCH, "isotonic", outputs, labels)
    errors = []
    for values in (new_outputs, scale.apply_numpy(new_outputs), bent.apply_numpy(new_outputs)):
        table = metrics.reliability_table(new_labels, values)
        errors.append(sum(row.count * abs(row.mean_label - row.mean_prediction) for row in table))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    # Beyond the last block its ratio goes on.
    last = bent.curve.inputs[-2], bent.curve.outputs[-2]
    np.testing.assert_allclose(bent.apply_numpy(10 * last[0]), 10 * last[1])


def test_regression_is_put_on_the_line_of_least_squares() -> None:
    rng = np.random.default_rng(9)
    outputs = rng.normal(3.0, 1.0, 5_000)
    labels = -1.0 + 1.5 * outputs + rng.normal(0, 0.5, 5_000)
    line = fit(STARS, "platt", outputs, labels)
    slope, shift = np.polyfit(outputs, labels, 1)
    np.testing.assert_allclose(line.apply_numpy([-9.0, 2.0]), [shift - 9 * slope, shift + 2 * slope])
    bent = fit(STARS, "isotonic", outputs, labels)
    np.testing.assert_allclose(bent.apply_numpy(3.0), 3.5, atol=0.1)
    first, last = bent.curve.inputs[1], bent.curve.inputs[-2]
    for edge, step in ((first, -7.0), (last, 7.0)):
        np.testing.assert_allclose(bent.curve(edge + step) - bent.curve(edge), step)


def test_rows_without_a_label_are_left_out() -> None:
    outputs, labels = clicks(1_000, seed=10)
    with_gaps = labels.copy()
    with_gaps[::3] = NAN
    known = ~np.isnan(with_gaps)
    for method in METHODS:
        assert fit(CLICK, method, outputs, with_gaps) == fit(CLICK, method, outputs[known], labels[known])
    assert fit(CLICK, "platt", outputs, with_gaps).num_rows == known.sum()


def half(num: int) -> np.ndarray:
    return (np.arange(num) % 2).astype(float)


RAMP = np.linspace(0.1, 0.9, 200)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("task", "outputs", "labels", "reason"),
    [
        pytest.param(CLICK, RAMP[:99], half(99), "99 labelled rows, fewer than 100", id="few-rows"),
        pytest.param(CLICK, RAMP, np.full(200, NAN), "0 labelled rows, fewer than 100", id="no-labels"),
        pytest.param(CLICK, np.array([]), np.array([]), "0 labelled rows", id="no-rows"),
        pytest.param(CLICK, RAMP, np.zeros(200), "every label is 0", id="one-class"),
        pytest.param(WATCH, RAMP, np.full(200, 7.0), "every label is 7", id="constant-seconds"),
        pytest.param(CLICK, RAMP, np.arange(200) < 9.0, "9 rows of the rarer class", id="nine-positives"),
        pytest.param(CLICK, RAMP, np.arange(200) >= 9.0, "9 rows of the rarer class", id="nine-negatives"),
        pytest.param(CLICK, np.full(200, 0.3), half(200), "every output is 0.3", id="constant-outputs"),
        pytest.param(WATCH, np.zeros(200), half(200), "every output is 0", id="outputs-of-zero"),
        pytest.param(STARS, 5 + 1e-7 * half(200), half(200), "every output is 5", id="rounding-alone"),
    ],
)
def test_output_that_cannot_be_calibrated_stays_and_is_announced(
    task: TaskSpec, method: Any, outputs: Any, labels: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    calibrator = fit(task, method, outputs, labels)
    assert calibrator.is_identity
    assert reason in calibrator.notes[0]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text and f"task={task.name}" in caplog.text
    values = tf.constant([-2.0, 0.1, 0.7, 3.5, NAN])
    np.testing.assert_array_equal(calibrator.apply(values), values)


def test_a_median_is_left_as_it_is_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        calibrator = fit(MEDIAN, "isotonic", RAMP, half(200))
    assert calibrator.is_identity and "it serves the median" in calibrator.notes[0]
    assert [record.levelno for record in caplog.records] == [logging.INFO]


@pytest.mark.parametrize(("task", "slope"), [(CLICK, "Platt"), (STARS, "least squares")])
def test_outputs_in_the_wrong_order_are_not_turned_round(task: TaskSpec, slope: str) -> None:
    labels = (np.arange(200) < 80).astype(float)
    calibrator = fit(task, "platt", RAMP, labels)
    assert calibrator.is_identity
    assert slope in calibrator.notes[0] and "slope of -" in calibrator.notes[0]
    # Isotonic regression pools all rows: the level is put right, the order stays.
    curve = fit(task, "isotonic", RAMP, labels).curve
    assert curve(0.5) == pytest.approx(0.4)


def test_method_none_changes_nothing_and_has_nothing_to_announce(caplog: pytest.LogCaptureFixture) -> None:
    calibrator = fit(CLICK, "none", RAMP, half(200))
    assert calibrator == Calibrator()
    assert calibrator.is_identity and not caplog.records


def sliced(seed: int = 11) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """3,000 rows of "feed" as the model says, 1,000 of "search" with a third of it, 50 of "new"."""
    rng = np.random.default_rng(seed)
    slices = np.repeat(["feed", "search", "new"], [3_000, 1_000, 50])
    outputs = rng.beta(2, 4, 4_050)
    rates = np.where(slices == "search", outputs / 3, outputs)
    return outputs, (rng.random(4_050) < rates).astype(float), slices


@pytest.mark.parametrize("method", METHODS)
def test_slices_are_shrunk_to_the_curve_of_all_rows_by_their_number_of_rows(method: Any) -> None:
    outputs, labels, slices = sliced()
    calibrator = fit(CLICK, method, outputs, labels, slices, min_slice_rows=500)
    assert set(calibrator.slices) == {"feed", "search"}
    grid = np.linspace(0, 1, 101)
    for name, share in (("feed", 3000 / 3500), ("search", 1000 / 1500)):
        own = fit(CLICK, method, outputs[slices == name], labels[slices == name]).curve
        expected = share * own(grid) + (1 - share) * calibrator.curve(grid)
        np.testing.assert_allclose(calibrator.apply_numpy(grid, np.full(101, name)), expected, rtol=1e-9)
    assert calibrator.curve == fit(CLICK, method, outputs, labels).curve


def test_slice_with_few_rows_or_unseen_uses_the_curve_of_all_rows_and_is_announced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outputs, labels, slices = sliced()
    with caplog.at_level(logging.INFO):
        calibrator = fit(CLICK, "isotonic", outputs, labels, slices, min_slice_rows=500)
    note = "slices with the curve of all rows: 1 ('new'): fewer than 500 labelled rows"
    assert calibrator.notes == (note,)
    assert note in caplog.text
    for name in ("new", "never seen", ""):
        np.testing.assert_array_equal(
            calibrator.apply_numpy(RAMP, np.full(200, name)), calibrator.curve(RAMP)
        )


def test_slice_that_cannot_be_fitted_uses_the_curve_of_all_rows_and_is_announced() -> None:
    outputs, labels, slices = sliced()
    labels[slices == "search"] = 1.0
    calibrator = fit(CLICK, "isotonic", outputs, labels, slices, min_slice_rows=500)
    assert set(calibrator.slices) == {"feed"}
    assert "slices with the curve of all rows: 1 ('search'): every label is 1" in calibrator.notes


def test_slices_may_be_text_bytes_or_numbers() -> None:
    outputs, labels, slices = sliced()
    numbers = np.select([slices == "feed", slices == "search"], [3, 12], 4)
    by_number = fit(CLICK, "isotonic", outputs, labels, numbers, min_slice_rows=500)
    by_text = fit(CLICK, "isotonic", outputs, labels, slices, min_slice_rows=500)
    assert set(by_number.slices) == {"3", "12"}
    as_bytes = np.array([name.encode() for name in slices], dtype=object)
    assert fit(CLICK, "isotonic", outputs, labels, as_bytes, min_slice_rows=500) == by_text
    expected = by_text.apply_numpy(outputs, slices)
    np.testing.assert_array_equal(by_text.apply_numpy(outputs, as_bytes), expected)
    np.testing.assert_array_equal(by_number.apply_numpy(outputs, numbers), expected)
    served = by_number.apply(tf.constant(outputs, tf.float32), tf.constant(numbers))
    np.testing.assert_allclose(served, expected, rtol=1e-6)


def test_calibrator_survives_json_and_the_saved_model(tmp_path: Path) -> None:
    outputs, labels, slices = sliced()
    fitted = fit(CLICK, "isotonic", outputs, labels, slices, min_slice_rows=500)
    calibrator = Calibrator.from_dict(json.loads(json.dumps(dataclasses.asdict(fitted))))
    assert calibrator == fitted
    module = tf.Module()
    module.serve = tf.function(
        lambda p, s: calibrator.apply(p, s),
        input_signature=[tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([None, None], tf.string)],
        autograph=False,
    )
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    shape = (2, len(outputs) // 2)
    served = loaded.serve(tf.constant(outputs.reshape(shape), tf.float32), tf.constant(slices.reshape(shape)))
    expected = fitted.apply_numpy(outputs.astype(np.float32), slices).astype(np.float32)
    np.testing.assert_array_max_ulp(served.numpy(), expected.reshape(shape), maxulp=1)
    assert loaded.serve(tf.zeros([0, 3]), tf.zeros([0, 3], tf.string)).shape == (0, 3)


@pytest.mark.parametrize("slices", [None, ["feed"], [["feed"], ["feed"]]])
def test_calibrator_with_slices_refuses_outputs_without_one_slice_each(slices: Any) -> None:
    calibrator = Calibrator(IDENTITY, {"feed": Curve((0.0, 1.0), (0.0, 0.5))})
    with pytest.raises(ShapeError, match="curves for 1 slices"):
        calibrator.apply_numpy([0.1, 0.2], slices)
    with pytest.raises(ShapeError, match="curves for 1 slices"):
        calibrator.apply(tf.constant([0.1, 0.2]), None if slices is None else tf.constant(slices))


@pytest.mark.parametrize(
    ("task", "method", "outputs", "labels", "slices", "error", "message"),
    [
        pytest.param(CLICK, "platt", [0.1], [0, 1], None, ShapeError, r"\(1,\), labels \(2,\)", id="lengths"),
        pytest.param(CLICK, "platt", [0.1], [0], ["a", "b"], ShapeError, r"slices \(2,\)", id="slices"),
        pytest.param(CLICK, "platt", [[0.1]], [[0]], None, ShapeError, "must all be", id="two-dimensional"),
        pytest.param(CLICK, "platt", [NAN], [0], None, DataError, "1 of 1 outputs are NaN", id="nan-output"),
        pytest.param(CLICK, "platt", [2.5], [0], None, DataError, "outputs must lie in .0, 1", id="logits"),
        pytest.param(CLICK, "platt", [0.5], [2], None, DataError, "labels must lie in .0, 1", id="label"),
        pytest.param(WATCH, "platt", [5], [-1], None, DataError, "found -1", id="negative-seconds"),
        pytest.param(WATCH, "platt", [5], [math.inf], None, DataError, "found inf", id="endless"),
        pytest.param(CLICK, "beta", [0.5], [1], None, ConfigError, "'beta' is unknown", id="method"),
    ],
)
def test_bad_input_is_refused_with_a_reason(
    task: TaskSpec, method: Any, outputs: Any, labels: Any, slices: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(task, method, outputs, labels, slices)


def test_watch_times_served_below_zero_count_as_the_shortest() -> None:
    outputs, labels = seconds(1_000, seed=12)
    negative = outputs.copy()
    negative[:5] = -1.0
    outputs[:5] = 0.0
    assert fit(WATCH, "isotonic", negative, labels) == fit(WATCH, "isotonic", outputs, labels)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [((0.0, 1.0), (0.0, 0.0)), ((0.0, 0.0), (0.0, 1.0)), ((0.0,), (0.0,)), ((0.0, 1.0), (0.0, 1.0, 2.0))],
)
def test_curve_that_does_not_increase_is_refused(inputs: Any, outputs: Any) -> None:
    with pytest.raises(ConfigError, match="not strictly increasing"):
        Curve(inputs, outputs)


def test_every_task_is_fitted_on_its_own_label() -> None:
    outputs, labels = clicks(1_000, seed=13)
    config = CalibrationConfig(method="isotonic")
    stars = 1 + 4 * labels
    columns = {"click": labels, "rating": stars}
    fitted = fit_tasks(config, [CLICK, STARS], {"click": outputs, "stars": outputs}, columns)
    assert fitted == {
        "click": fit(CLICK, "isotonic", outputs, labels),
        "stars": fit(STARS, "isotonic", outputs, stars),
    }
    with pytest.raises(ConfigError, match="slice_feature is None, but slices were given"):
        fit_tasks(config, [CLICK], {"click": outputs}, columns, np.full(1_000, "feed"))
    per_surface = CalibrationConfig(method="isotonic", slice_feature="surface", min_slice_rows=200)
    with pytest.raises(ConfigError, match="'surface', but slices were not given"):
        fit_tasks(per_surface, [CLICK], {"click": outputs}, columns)
    fitted = fit_tasks(per_surface, [CLICK], {"click": outputs}, columns, np.full(1_000, "feed"))
    assert set(fitted["click"].slices) == {"feed"}


@pytest.mark.parametrize(
    "values",
    [
        {"method": "beta"},
        {"min_slice_rows": 99},
        {"slices": "surface"},
        {"method": "none", "slice_feature": "surface"},
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        CalibrationConfig(**values)
