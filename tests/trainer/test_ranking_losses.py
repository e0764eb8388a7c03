"""Objectives of tasks that are not watch time against hand calculations, and the loss of labelled rows."""

import math

import numpy as np
import pytest
import tensorflow as tf

from schema.contract import TaskKind, TaskSpec
from trainer.label_statistics import LabelStatistics
from trainer.ranking_losses import labelled_loss, objective
from trainer.watch_time import TaskContext

NONE = TaskContext()
NAN = math.nan
BINARY = TaskSpec(name="click", label="click", kind=TaskKind.BINARY)
COMPLETION = TaskSpec(name="completion", label="completion", kind=TaskKind.COMPLETION)
STARS = TaskSpec(name="stars", label="stars", kind=TaskKind.REGRESSION)
WATCH = TaskSpec(name="watch", label="watch_time_s", kind=TaskKind.WATCH_TIME)
COVINGTON = TaskSpec(
    name="watch",
    label="watch_time_s",
    kind=TaskKind.WATCH_TIME,
    method="covington_logistic",
    click_label="click",
)
RATES = LabelStatistics(count=4, mean=0.25, std=0.4, minimum=0.0, maximum=1.0)
SCALE = LabelStatistics(
    count=4, mean=10.0, std=2.0, minimum=0.0, maximum=100.0, click_rate=0.5, clicked_mean=8.0
)


@pytest.mark.parametrize(
    ("task", "statistics", "logit", "label", "expected"),
    [
        pytest.param(BINARY, RATES, 0.0, 1.0, math.log(2), id="binary-undecided"),
        # odds 3: probability of 0 is 1/4
        pytest.param(BINARY, RATES, math.log(3), 0.0, math.log(4), id="binary-wrong"),
        # sigmoid 3/4, half of the item watched: half of -ln 3/4 and half of -ln 1/4
        pytest.param(COMPLETION, RATES, math.log(3), 0.5, 0.5 * math.log(16 / 3), id="half-watched"),
        pytest.param(COMPLETION, RATES, math.log(3), 1.0, math.log(4 / 3), id="watched-to-the-end"),
        # the label 14 is two standard deviations above the mean: (0.5 - 2)^2
        pytest.param(STARS, SCALE, 0.5, 14.0, 2.25, id="regression"),
    ],
)
def test_loss_of_one_row_equals_hand_calculation(
    task: TaskSpec, statistics: LabelStatistics, logit: float, label: float, expected: float
) -> None:
    loss = objective(task, statistics).loss(tf.constant([[logit]]), tf.constant([label]), NONE)
    assert loss.numpy() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize(
    ("task", "statistics", "logit", "expected"),
    [
        pytest.param(BINARY, RATES, math.log(3), 0.75, id="probability"),
        pytest.param(COMPLETION, RATES, -math.log(3), 0.25, id="share"),
        pytest.param(STARS, SCALE, -1.5, 7.0, id="label-unit"),
    ],
)
def test_output_is_in_the_unit_of_the_task(
    task: TaskSpec, statistics: LabelStatistics, logit: float, expected: float
) -> None:
    served = objective(task, statistics).output(tf.constant([[logit], [logit]]), NONE)
    assert served.numpy() == pytest.approx([expected, expected], rel=1e-6)


def test_logit_of_least_completion_loss_serves_the_mean_share() -> None:
    shares = np.array([0.0, 0.1, 0.6, 1.0, 1.0], np.float32)
    completion = objective(COMPLETION, RATES)
    logits = tf.constant(np.linspace(-3, 3, 6001, dtype=np.float32)[:, np.newaxis])
    mean_losses = np.mean(
        [completion.loss(logits, tf.fill([6001], share), NONE).numpy() for share in shares], axis=0
    )
    best = logits[mean_losses.argmin()][tf.newaxis]
    # The grid has a step of 0.001, and float32 makes the bottom of the loss flat over a few steps.
    assert completion.output(best, NONE).numpy() == pytest.approx([0.54], abs=0.002)


@pytest.mark.parametrize(
    ("task", "statistics"), [(BINARY, RATES), (COMPLETION, RATES), (STARS, SCALE), (WATCH, SCALE)]
)
def test_initial_bias_serves_the_training_mean(task: TaskSpec, statistics: LabelStatistics) -> None:
    task_objective = objective(task, statistics)
    assert task_objective.num_logits == len(task_objective.initial_bias) == 1
    served = task_objective.output(tf.constant([task_objective.initial_bias]), NONE)
    assert served.numpy() == pytest.approx([statistics.mean], rel=1e-6)


@pytest.mark.parametrize("task", [BINARY, COMPLETION, STARS, WATCH])
def test_missing_label_costs_nothing_and_gives_no_gradient(task: TaskSpec) -> None:
    task_objective = objective(task, RATES)
    logits = tf.Variable([[0.3], [-0.7]])
    with tf.GradientTape() as tape:
        total, count = labelled_loss(task_objective, logits, tf.constant([1.0, NAN]), NONE)
    alone = task_objective.loss(tf.constant([[0.3]]), tf.constant([1.0]), NONE)
    assert total.numpy() == pytest.approx(alone.numpy()[0])
    assert count.numpy() == 1
    gradient = tape.gradient(total, logits).numpy()
    assert gradient[0] != 0
    assert gradient[1] == 0


def test_row_without_a_click_label_costs_a_task_that_reads_clicks_nothing() -> None:
    logits = tf.Variable([[0.3, 0.1], [-0.7, 0.4], [1.0, -1.0]])
    labels, clicks = tf.constant([5.0, 7.0, NAN]), tf.constant([1.0, NAN, 0.0])
    with tf.GradientTape() as tape:
        total, count = labelled_loss(objective(COVINGTON, SCALE), logits, labels, TaskContext(clicks=clicks))
    assert count.numpy() == 1
    gradient = tape.gradient(total, logits).numpy()
    assert np.all(gradient[0] != 0)
    assert np.all(gradient[1:] == 0)


def test_row_weights_multiply_the_loss_and_are_what_it_is_divided_by() -> None:
    labels, weights = tf.constant([1.0, 0.0, NAN]), tf.constant([3.0, 0.5, 9.0])
    total, weight = labelled_loss(objective(BINARY, RATES), tf.zeros([3, 1]), labels, NONE, weights)
    assert total.numpy() == pytest.approx(3.5 * math.log(2))
    assert weight.numpy() == 3.5
