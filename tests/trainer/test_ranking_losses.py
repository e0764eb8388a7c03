"""Task objectives against hand calculations, and the checks of training labels."""

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from schema.contract import TaskKind, TaskSpec
from schema.errors import DataError
from trainer.ranking_losses import LabelStatistics, label_statistics, labelled_loss, objective

STATISTICS = LabelStatistics(count=4, mean=10.0, std=2.0, minimum=0.0, maximum=100.0)
CLICK = TaskSpec(name="click", label="y", kind=TaskKind.BINARY)
WATCH = TaskSpec(name="watch", label="y", kind=TaskKind.WATCH_TIME)
STARS = TaskSpec(name="stars", label="y", kind=TaskKind.REGRESSION)
NAN = math.nan


def statistics_of(task: TaskSpec, *windows: list[float]) -> LabelStatistics:
    return label_statistics([{"y": np.array(w, dtype=np.float32)} for w in windows], [task])[task.name]


@pytest.mark.parametrize(
    ("kind", "logit", "label", "expected"),
    [
        pytest.param(TaskKind.BINARY, 0.0, 1.0, math.log(2), id="binary-undecided"),
        # odds 3: probability of 0 is 1/4
        pytest.param(TaskKind.BINARY, math.log(3), 0.0, math.log(4), id="binary-wrong"),
        # 20 s of a mean of 10 s is a weight of 2: 2 ln 2 + ln 2
        pytest.param(TaskKind.WATCH_TIME, 0.0, 20.0, 3 * math.log(2), id="watch-undecided"),
        # odds 3: 2 ln(1 + 1/3) + ln(1 + 3)
        pytest.param(
            TaskKind.WATCH_TIME, math.log(3), 20.0, 2 * math.log(4 / 3) + math.log(4), id="watch-odds-3"
        ),
        pytest.param(TaskKind.WATCH_TIME, math.log(3), 0.0, math.log(4), id="watch-not-watched"),
        # the label 14 is two standard deviations above the mean: (0.5 - 2)^2
        pytest.param(TaskKind.REGRESSION, 0.5, 14.0, 2.25, id="regression"),
    ],
)
def test_loss_of_one_row_equals_hand_calculation(
    kind: TaskKind, logit: float, label: float, expected: float
) -> None:
    loss = objective(kind, STATISTICS).loss(tf.constant([logit]), tf.constant([label]))
    assert loss.numpy() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "logit", "expected"),
    [
        pytest.param(TaskKind.BINARY, math.log(3), 0.75, id="probability"),
        pytest.param(TaskKind.WATCH_TIME, math.log(3), 30.0, id="seconds"),
        pytest.param(TaskKind.WATCH_TIME, 80.0, 100.0, id="seconds-at-most-the-longest-seen"),
        pytest.param(TaskKind.WATCH_TIME, -80.0, 1e-5, id="seconds-above-zero"),
        pytest.param(TaskKind.REGRESSION, -1.5, 7.0, id="label-unit"),
    ],
)
def test_output_is_in_the_unit_of_the_task(kind: TaskKind, logit: float, expected: float) -> None:
    assert objective(kind, STATISTICS).output(tf.constant(logit)).numpy() == pytest.approx(expected, rel=1e-5)


def test_logit_of_least_watch_time_loss_serves_the_mean_watch_time() -> None:
    watched = np.array([0.0, 0.0, 5.0, 40.0], dtype=np.float32)
    watch_time = objective(TaskKind.WATCH_TIME, STATISTICS)
    logits = np.linspace(-3, 3, 6001, dtype=np.float32)
    mean_losses = np.mean(
        [watch_time.loss(tf.constant(logits), tf.fill([6001], w)).numpy() for w in watched], axis=0
    )
    best = tf.constant(logits[mean_losses.argmin()])
    # The grid has a step of 0.001, and float32 makes the bottom of the loss flat over a few steps.
    assert watch_time.output(best).numpy() == pytest.approx(45.0 / 4, rel=0.01)


def test_initial_bias_serves_the_training_mean() -> None:
    click = statistics_of(CLICK, [1, 0, 0, 0, NAN])
    assert objective(TaskKind.BINARY, click).initial_bias == pytest.approx(math.log(1 / 3))
    for kind in (TaskKind.WATCH_TIME, TaskKind.REGRESSION):
        task = objective(kind, STATISTICS)
        assert task.output(tf.constant(task.initial_bias)).numpy() == pytest.approx(10.0)


@pytest.mark.parametrize("kind", list(TaskKind))
def test_missing_label_costs_nothing_and_gives_no_gradient(kind: TaskKind) -> None:
    task = objective(kind, LabelStatistics(4, 0.5, 0.5, 0.0, 1.0))
    logits = tf.Variable([0.3, -0.7])
    with tf.GradientTape() as tape:
        total, count = labelled_loss(task, logits, tf.constant([1.0, NAN]))
    assert total.numpy() == pytest.approx(task.loss(tf.constant(0.3), tf.constant(1.0)).numpy())
    assert count.numpy() == 1
    gradient = tape.gradient(total, logits).numpy()
    assert gradient[0] != 0
    assert gradient[1] == 0


def test_statistics_over_windows_equal_those_of_all_labels_together() -> None:
    # A mean a thousand times the spread: a sum of squares in float32 would lose the spread.
    rng = np.random.default_rng(1)
    labels = rng.normal(3000, 3, 1000).astype(np.float32)
    labels[::7] = NAN
    known = labels[~np.isnan(labels)].astype(np.float64)
    found = statistics_of(STARS, labels[:900].tolist(), [NAN], labels[900:].tolist())
    assert found.count == len(known)
    assert (found.mean, found.std) == pytest.approx((known.mean(), known.std()), rel=1e-9)
    assert (found.minimum, found.maximum) == (known.min(), known.max())


@pytest.mark.parametrize(
    ("task", "windows", "message"),
    [
        pytest.param(CLICK, [[NAN], [NAN]], "missing in every training row", id="all-missing"),
        pytest.param(CLICK, [], "missing in every training row", id="no-rows"),
        pytest.param(CLICK, [[1, 1], [1, NAN]], "is 1 in all 3 training rows", id="one-class"),
        pytest.param(CLICK, [[0, 1], [2, 1]], "must be 0 or 1.*found 2 ", id="not-binary"),
        pytest.param(WATCH, [[0, 0]], "is 0 s in all 2", id="never-watched"),
        pytest.param(WATCH, [[3, -1]], "must be seconds >= 0, finite; found -1", id="negative-seconds"),
        pytest.param(WATCH, [[math.inf]], "must be seconds >= 0, finite; found inf", id="endless"),
        pytest.param(STARS, [[3.3, 3.3], [3.3]], "is 3.3 in all 3", id="constant"),
        pytest.param(STARS, [[1, -math.inf]], "must be finite", id="infinite"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(task: TaskSpec, windows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"task '{task.name}'.*'y'.*{message}"):
        statistics_of(task, *windows)
