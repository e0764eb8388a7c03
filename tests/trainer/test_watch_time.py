"""Methods for watch time against hand calculations, slow oracles, and what each says it converges to."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
import tensorflow as tf

from schema.contract import TaskKind, TaskSpec
from trainer.label_statistics import LabelStatistics, label_statistics
from trainer.watch_time import (
    CovingtonLogistic,
    DurationQuantiles,
    TaskContext,
    WatchTimeObjective,
    task_context,
    watch_time_objective,
)

SCALE = LabelStatistics(
    count=4,
    mean=10.0,
    std=5.0,
    minimum=0.0,
    maximum=100.0,
    median=4.0,
    click_rate=0.75,
    clicked_mean=8.0,
    thresholds=((2.0, 10.0, 30.0),),
    bin_means=((1.0, 6.0, 20.0, 50.0),),
    exceedance=(0.8, 0.5, 0.2),
)
NONE = TaskContext()


def task(method: str, **fields: Any) -> TaskSpec:
    needed = {
        "covington_logistic": {"click_label": "click"},
        "duration_quantiles": {"duration_feature": "duration_s"},
    }
    values = {"method": method, **needed.get(method, {}), **fields}
    return TaskSpec(name="watch", label="watch_time_s", kind=TaskKind.WATCH_TIME, **values)


def method(name: str, statistics: LabelStatistics = SCALE, **fields: Any) -> WatchTimeObjective:
    return watch_time_objective(task(name, **fields), statistics)


def column(value: float) -> tf.Tensor:
    return tf.constant([[value]])


@pytest.mark.parametrize(
    ("objective", "logit", "label", "expected"),
    [
        # 20 s of a mean of 10 s is a weight of 2: 2 ln 2 + ln 2
        pytest.param(method("weighted_logistic"), 0.0, 20.0, 3 * math.log(2), id="undecided"),
        # odds 3: 2 ln(1 + 1/3) + ln(1 + 3)
        pytest.param(
            method("weighted_logistic"), math.log(3), 20.0, 2 * math.log(4 / 3) + math.log(4), id="odds-3"
        ),
        pytest.param(method("weighted_logistic"), math.log(3), 0.0, math.log(4), id="not-watched"),
        # 20 s is two standard deviations above the mean
        pytest.param(method("regression"), 0.5, 20.0, 2.25, id="squared"),
        pytest.param(method("regression", serve="median"), 0.5, 20.0, 1.5, id="absolute"),
        pytest.param(method("log_regression"), 0.0, 30.0, math.log(4), id="log-too-low"),
        pytest.param(method("log_regression"), math.log(8), 30.0, math.log(2), id="log-too-high"),
    ],
)
def test_loss_of_one_row_equals_hand_calculation(
    objective: WatchTimeObjective, logit: float, label: float, expected: float
) -> None:
    assert objective.loss(column(logit), tf.constant([label]), NONE).numpy() == pytest.approx(
        [expected], rel=1e-6
    )


@pytest.mark.parametrize(
    ("objective", "logit", "expected"),
    [
        pytest.param(method("weighted_logistic"), math.log(3), 30.0, id="odds"),
        pytest.param(method("weighted_logistic"), 80.0, 100.0, id="at-most-the-longest-seen"),
        pytest.param(method("weighted_logistic"), -80.0, 1e-5, id="above-zero"),
        pytest.param(method("regression"), -1.5, 2.5, id="regression"),
        pytest.param(method("regression"), -3.0, 0.0, id="regression-not-below-zero"),
        pytest.param(method("regression"), 99.0, 100.0, id="regression-at-most-the-longest-seen"),
        pytest.param(method("log_regression"), math.log(3), 20.0, id="log"),
        pytest.param(method("log_regression"), -1.0, 0.0, id="log-not-below-zero"),
        pytest.param(method("log_regression"), 99.0, 100.0, id="log-at-most-the-longest-seen"),
    ],
)
def test_output_is_in_seconds_within_the_range_of_the_labels(
    objective: WatchTimeObjective, logit: float, expected: float
) -> None:
    assert objective.output(column(logit), NONE).numpy() == pytest.approx([expected], rel=1e-5)


def test_covington_loss_weighs_clicks_by_watch_time_and_learns_the_click_rate_beside() -> None:
    logits = tf.constant([[math.log(3), 0.0], [math.log(3), math.log(3)]])
    labels, clicks = tf.constant([16.0, 6.0]), tf.constant([1.0, 0.0])
    losses = method("covington_logistic").loss(logits, labels, TaskContext(clicks=clicks)).numpy()
    # 16 s of 8 s is a weight of 2; the 6 s of the row without a click do not count.
    assert losses == pytest.approx([2 * math.log(4 / 3) + math.log(2), math.log(4) + math.log(4)], rel=1e-6)


def test_covington_output_is_corrected_for_the_click_rate_of_the_row() -> None:
    covington = method("covington_logistic")
    assert isinstance(covington, CovingtonLogistic)
    logits = tf.constant([[math.log(3), math.log(3)], [math.log(3), -99.0], [99.0, 0.0], [-99.0, 0.0]])
    # odds 3 in units of 8 s; clicked with 3/4, hardly ever, ...; then both ends of the range
    assert covington.output(logits, NONE).numpy() == pytest.approx([6.0, 24.0, 100.0, 8e-6], rel=1e-5)
    assert covington.uncorrected(logits[:2]).numpy() == pytest.approx([24.0, 24.0], rel=1e-5)


def slow_rank(label: float, quantiles: npt.NDArray[np.float64]) -> float:
    """Middle of the levels in [0, 1] at which the linear quantile function is at or around the label."""
    levels = np.linspace(0, 1, 100_001)
    values = np.interp(levels, np.linspace(0, 1, len(quantiles)), quantiles)
    below, above = (values < label).mean(), (values <= label).mean()
    return float((below + above) / 2)


def test_ranks_are_the_share_of_the_group_below_with_ties_in_the_middle() -> None:
    zeros_and_loops = np.concatenate([np.zeros(30), np.geomspace(1, 60, 50), np.full(21, 60.0)])
    statistics = LabelStatistics(
        **{**vars(SCALE), "quantiles": (tuple(np.linspace(5, 10, 101)), tuple(zeros_and_loops))}
    )
    quantiles = method("duration_quantiles", statistics)
    assert isinstance(quantiles, DurationQuantiles)
    labels = np.array([0.0, 0.5, 1.0, 7.3, 59.9, 60.0, 80.0, 4.0, 5.0, 5.1, 9.99, 10.0, 11.0], np.float32)
    group = np.array([1] * 7 + [0] * 6)
    found = quantiles.ranks(tf.constant(labels), TaskContext(duration_bucket=tf.constant(group))).numpy()
    expected = [
        slow_rank(float(label), np.array(statistics.quantiles[g]))
        for label, g in zip(labels, group, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-4)
    # By hand: levels 0 to 29 % are 0 s, 79 to 100 % are 60 s; 5.1 s is a fiftieth of the way from 5 to 10 s.
    assert found[[0, 5, 6, 9]] == pytest.approx([0.145, 0.895, 1.0, 0.02], abs=1e-6)


def test_rank_is_served_through_the_quantiles_of_the_row_s_own_group() -> None:
    statistics = LabelStatistics(
        **{**vars(SCALE), "quantiles": (tuple(np.arange(101.0)), tuple(np.arange(101.0) ** 2))}
    )
    objective = method("duration_quantiles", statistics)
    logits = tf.constant([[math.log(3)], [math.log(3)], [-99.0], [99.0], [99.0], [math.log(0.755 / 0.245)]])
    context = TaskContext(duration_bucket=tf.constant([0, 1, 1, 0, 1, 1], tf.int64))
    # rank 3/4: the 75 % quantile; 0.755 is half way between 75^2 and 76^2
    expected = [75.0, 75.0**2, 0.0, 100.0, 100.0**2, (75**2 + 76**2) / 2]
    assert objective.output(logits, context).numpy() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("serve", "expected"), [("mean_rank", -math.log(3 / 4) / 4 - 3 * math.log(1 / 4) / 4), ("median", 0.5)]
)
def test_rank_loss_equals_hand_calculation(serve: str, expected: float) -> None:
    statistics = LabelStatistics(**{**vars(SCALE), "quantiles": (tuple(np.arange(101.0)),)})
    objective = method("duration_quantiles", statistics, serve=serve)
    # The label has rank 1/4 and is predicted at 3/4.
    loss = objective.loss(
        column(math.log(3)), tf.constant([25.0]), TaskContext(duration_bucket=tf.constant([0]))
    )
    assert loss.numpy() == pytest.approx([expected], rel=1e-5)


def test_ordinal_loss_is_the_mean_cross_entropy_of_the_thresholds() -> None:
    logits = tf.constant([[math.log(3), 0.0, math.log(3)], [math.log(3), 0.0, math.log(3)]])
    # 20 s is above 2 and 10 s and not above 30 s; 2 s is above none.
    losses = method("ordinal").loss(logits, tf.constant([20.0, 2.0]), NONE).numpy()
    first = (math.log(4 / 3) + math.log(2) + math.log(4)) / 3
    second = (math.log(4) + math.log(2) + math.log(4)) / 3
    assert losses == pytest.approx([first, second], rel=1e-6)


def test_ordinal_mean_weighs_the_means_of_the_bins_by_their_chances() -> None:
    logits = np.log([[9.0, 1.0, 1 / 3], [1e9, 1e9, 1e9], [1e-9, 1e-9, 1e-9]]).astype(np.float32)
    # Chances above the thresholds .9, .5, .25: of the bins .1, .4, .25, .25.
    expected = [0.1 * 1 + 0.4 * 6 + 0.25 * 20 + 0.25 * 50, 50.0, 1.0]
    assert method("ordinal").output(tf.constant(logits), NONE).numpy() == pytest.approx(expected, rel=1e-5)


def test_ordinal_median_is_where_half_of_the_chance_is_above() -> None:
    rates = np.array(
        [
            [0.9, 0.6, 0.2],  # a quarter of the way from 10 to 30 s
            [0.2, 0.9, 0.6],  # the same, in the wrong order
            [0.8, 0.5, 0.1],  # exactly at a threshold
            [0.25, 0.2, 0.1],  # below the first threshold: two thirds of the way from 0 to 2 s
            [0.9, 0.8, 0.75],  # above the last one: a third of the way from 30 to 70 s
        ]
    )
    logits = tf.constant(np.log(rates / (1 - rates)).astype(np.float32))
    # The first bin has a mean of 1 s and so starts at 0 s, the last one of 50 s and so ends at 70 s.
    expected = [15.0, 15.0, 10.0, 4 / 3, 30 + 40 / 3]
    served = method("ordinal", serve="median").output(logits, NONE).numpy()
    assert served == pytest.approx(expected, rel=1e-4)


def test_ordinal_trimmed_mean_is_that_of_the_middle_of_the_chance() -> None:
    # Chances above the thresholds; what is left of them without 35 % at either end, of 30 %.
    rates = np.array(
        [
            [0.9, 0.5, 0.25],  # all, half, none: half of bin 6 s, half of bin 20 s
            [0.41, 0.38, 0.2],  # a fifth, a tenth, none: 1 s + 5 s / 5 + 14 s / 10
            [0.9, 0.8, 0.7],  # all is in the last bin
            [0.3, 0.2, 0.1],  # all is in the first
        ]
    )
    logits = tf.constant(np.log(rates / (1 - rates)).astype(np.float32))
    served = method("ordinal", serve="trimmed_mean").output(logits, NONE).numpy()
    assert served == pytest.approx([13.0, 3.4, 50.0, 1.0], rel=1e-4)


def trimmed_mean(values: npt.NDArray[Any]) -> float:
    return float(scipy.stats.trim_mean(values, 0.35))


def skewed_sample(seed: int, size: int = 2000) -> dict[str, npt.NDArray[Any]]:
    """Watch times with a point at zero and a long tail; clicks go with the long ones."""
    rng = np.random.default_rng(seed)
    watched = np.where(rng.random(size) < 0.2, 0.0, rng.lognormal(2.0, 1.0, size)).astype(np.float32)
    return {
        "watch_time_s": watched,
        "click": (watched > 5).astype(np.float32),
        "duration_s_bucket": np.full(size, 7, np.int32),
    }


def fitted(objective: WatchTimeObjective, rows: dict[str, Any], context: TaskContext) -> tf.Tensor:
    """Logits [1, n] of least mean loss, when nothing but the label is known of a row."""
    logits = tf.Variable([objective.initial_bias])
    optimizer = tf.keras.optimizers.Adam(0.05)
    count = len(rows["watch_time_s"])

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(objective.loss(tf.repeat(logits, count, 0), rows["watch_time_s"], context))
        optimizer.apply_gradients([(tape.gradient(loss, logits), logits)])

    for _ in range(300):
        step()
    return logits


@pytest.mark.parametrize(
    ("spec", "expected", "tolerance"),
    [
        pytest.param(task("weighted_logistic"), np.mean, 0.01, id="weighted-logistic"),
        pytest.param(task("regression"), np.mean, 0.01, id="regression-mean"),
        pytest.param(task("ordinal"), np.mean, 0.01, id="ordinal-mean"),
        pytest.param(
            task("ordinal", duration_feature="duration_s"), np.mean, 0.01, id="ordinal-mean-by-duration"
        ),
        # Medians of step-like losses: Adam circles around them, and bins are linear inside.
        pytest.param(task("regression", serve="median"), np.median, 0.05, id="regression-median"),
        pytest.param(task("log_regression"), np.median, 0.05, id="log-regression"),
        pytest.param(task("ordinal", serve="median"), np.median, 0.05, id="ordinal-median"),
        pytest.param(task("ordinal", serve="trimmed_mean"), trimmed_mean, 0.05, id="ordinal-middle"),
        pytest.param(
            task("duration_quantiles", serve="median"), np.median, 0.05, id="quantile-of-median-rank"
        ),
        # Nothing known: the mean rank is 1/2.
        pytest.param(task("duration_quantiles"), np.median, 0.05, id="quantile-of-mean-rank"),
    ],
)
def test_logits_of_least_loss_serve_the_mean_the_median_or_the_middle(
    spec: TaskSpec, expected: Callable[[Any], float], tolerance: float
) -> None:
    rows = skewed_sample(3)
    objective = watch_time_objective(spec, label_statistics([rows], [spec])["watch"])
    logits = fitted(objective, rows, task_context(spec, rows))
    served = objective.output(logits, task_context(spec, {name: c[:1] for name, c in rows.items()}))
    assert served.numpy() == pytest.approx([expected(rows["watch_time_s"])], rel=tolerance)


def test_covington_serves_the_watch_time_of_clicks_although_most_rows_are_clicked() -> None:
    rows = skewed_sample(4)
    spec = task("covington_logistic")
    objective = watch_time_objective(spec, label_statistics([rows], [spec])["watch"])
    assert isinstance(objective, CovingtonLogistic)
    logits = fitted(objective, rows, task_context(spec, rows))
    clicked_mean = (rows["watch_time_s"] * rows["click"]).mean()
    click_rate = rows["click"].mean()
    assert click_rate > 0.45
    assert objective.output(logits, NONE).numpy() == pytest.approx([clicked_mean], rel=0.01)
    # As in the paper: almost twice as much.
    assert objective.uncorrected(logits).numpy() == pytest.approx([clicked_mean / (1 - click_rate)], rel=0.01)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param(task("weighted_logistic"), np.mean, id="weighted-logistic"),
        pytest.param(task("regression"), np.mean, id="regression-mean"),
        pytest.param(task("regression", serve="median"), np.median, id="regression-median"),
        pytest.param(task("log_regression"), np.median, id="log-regression"),
        pytest.param(task("ordinal"), np.mean, id="ordinal-mean"),
        pytest.param(task("ordinal", num_thresholds=7), np.mean, id="ordinal-mean-of-few"),
    ],
)
def test_untrained_head_serves_what_is_right_on_average(
    spec: TaskSpec, expected: Callable[[Any], float]
) -> None:
    rows = skewed_sample(5)
    objective = watch_time_objective(spec, label_statistics([rows], [spec])["watch"])
    assert len(objective.initial_bias) == objective.num_logits
    served = objective.output(tf.constant([objective.initial_bias]), NONE)
    assert served.numpy() == pytest.approx([expected(rows["watch_time_s"])], rel=1e-4)


def test_untrained_covington_head_serves_the_mean_watch_time_of_clicks() -> None:
    rows = skewed_sample(6)
    spec = task("covington_logistic")
    objective = watch_time_objective(spec, label_statistics([rows], [spec])["watch"])
    served = objective.output(tf.constant([objective.initial_bias]), NONE)
    assert served.numpy() == pytest.approx([(rows["watch_time_s"] * rows["click"]).mean()], rel=1e-5)


def test_untrained_head_with_duration_groups_serves_the_middle_of_each_group() -> None:
    rng = np.random.default_rng(7)
    bucket = rng.integers(1, 3, 4000)
    rows = {
        "watch_time_s": (rng.exponential(10, 4000) * np.where(bucket == 1, 1, 9)).astype(np.float32),
        "duration_s_bucket": bucket.astype(np.int32),
    }
    context = TaskContext(duration_bucket=tf.constant([1, 2]))
    for name, middle in (("ordinal", np.mean), ("duration_quantiles", np.median)):
        spec = task(name, duration_feature="duration_s")
        objective = watch_time_objective(spec, label_statistics([rows], [spec])["watch"])
        served = objective.output(tf.repeat([objective.initial_bias], 2, axis=0), context).numpy()
        expected = [middle(rows["watch_time_s"][bucket == group]) for group in (1, 2)]
        assert served == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "spec",
    [
        task("weighted_logistic"),
        task("covington_logistic"),
        task("duration_quantiles"),
        task("duration_quantiles", serve="median"),
        task("ordinal"),
        task("ordinal", serve="median", duration_feature="duration_s"),
        task("ordinal", serve="trimmed_mean", duration_feature="duration_s"),
        task("regression"),
        task("regression", serve="median"),
        task("log_regression"),
    ],
)
def test_loss_and_output_have_one_finite_value_per_row_even_far_out(spec: TaskSpec) -> None:
    rows = skewed_sample(8)
    objective = watch_time_objective(spec, label_statistics([rows], [spec])["watch"])
    extremes = tf.constant([-60.0, -1.0, 0.0, 1.0, 60.0])
    logits = tf.Variable(tf.repeat(extremes[:, tf.newaxis], objective.num_logits, axis=1))
    context = task_context(spec, {name: tf.constant(c[:5]) for name, c in rows.items()})
    labels = tf.constant([0.0, 1.0, 5.0, 1e4, float(rows["watch_time_s"].max())])
    with tf.GradientTape() as tape:
        loss = objective.loss(logits, labels, context)
    assert loss.shape == [5]
    assert np.all(np.isfinite(loss)) and np.all(loss.numpy() >= 0)
    assert np.all(np.isfinite(tape.gradient(loss, logits)))
    served = objective.output(logits, context)
    assert served.shape == [5]
    assert np.all(served.numpy() >= 0) and np.all(served.numpy() <= rows["watch_time_s"].max() * 1.00001)
    assert np.all(np.diff(served.numpy()) >= 0)


def test_context_holds_only_what_the_task_reads_and_no_clicks_when_serving() -> None:
    inputs = {"duration_s_bucket": tf.constant([3]), "click": tf.constant([1.0])}
    assert task_context(task("weighted_logistic"), inputs) == TaskContext(None, None)
    context = task_context(task("ordinal", duration_feature="duration_s"), inputs)
    assert context.duration_bucket is inputs["duration_s_bucket"] and context.clicks is None
    assert task_context(task("covington_logistic"), inputs).clicks is inputs["click"]
    assert task_context(task("covington_logistic"), {}).clicks is None
