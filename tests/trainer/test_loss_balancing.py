"""Sums of task losses against hand calculations, and what the learnt weights settle at."""

import math
from typing import Any, ClassVar

import numpy as np
import pydantic
import pytest
import tensorflow as tf

from schema.errors import ConfigError
from trainer.balancing_config import BalancingConfig
from trainer.loss_balancing import LossBalancer

WEIGHTS = {"click": 1.0, "watch": 0.5}


def balancer(method: str, weights: dict[str, float] = WEIGHTS, **settings: Any) -> LossBalancer:
    return LossBalancer(weights, BalancingConfig(method=method, **settings))


def losses(**values: float) -> dict[str, tf.Tensor]:
    return {name: tf.constant(value) for name, value in values.items()}


def test_fixed_sum_is_weighted_by_the_declared_loss_weights() -> None:
    fixed = balancer("fixed")
    assert fixed.total(losses(click=0.6, watch=1.4)).numpy() == pytest.approx(1.3)
    assert fixed.trainable_variables == []


@pytest.mark.parametrize("method", ["fixed", "uncertainty", "gradnorm"])
def test_every_method_starts_from_the_declared_loss_weights(method: str) -> None:
    start = balancer(method)
    assert start.total(losses(click=0.6, watch=1.4)).numpy() == pytest.approx(1.3)
    assert {name: float(weight) for name, weight in start.weights_by_task().items()} == WEIGHTS


def test_uncertainty_sum_equals_hand_calculation() -> None:
    learnt = balancer("uncertainty")
    (variable,) = learnt.trainable_variables
    # Log variances are ten times the variable: ln 2 and -ln 4.
    variable.assign([math.log(2) / 10, -math.log(4) / 10])
    expected = (0.6 / 2 + math.log(2) / 2) + 0.5 * (1.4 * 4 - math.log(4) / 2)
    assert learnt.total(losses(click=0.6, watch=1.4)).numpy() == pytest.approx(expected, rel=1e-6)
    found = {name: float(weight) for name, weight in learnt.weights_by_task().items()}
    assert found == pytest.approx({"click": 0.5, "watch": 2.0})


def test_learnt_variances_settle_where_each_task_weighs_the_inverse_of_twice_its_loss() -> None:
    learnt = balancer("uncertainty")
    optimizer = tf.keras.optimizers.Adam(0.01)
    for _ in range(300):
        with tf.GradientTape() as tape:
            total = learnt.total(losses(click=0.1, watch=2.0))
        variables = learnt.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(total, variables), variables, strict=True))
    found = {name: float(weight) for name, weight in learnt.weights_by_task().items()}
    # The declared 0.5 still halves the pull of the second task.
    assert found == pytest.approx({"click": 1 / 0.2, "watch": 0.5 / 4.0}, rel=0.02)


def test_task_without_labels_in_the_batch_does_not_move_its_variance() -> None:
    learnt = balancer("uncertainty")
    with tf.GradientTape() as tape:
        total = learnt.total(losses(click=0.6, watch=0.0))
    assert total.numpy() == pytest.approx(0.6)
    gradient = tape.gradient(total, learnt.trainable_variables)[0].numpy()
    assert gradient[0] != 0
    assert gradient[1] == 0


def test_variance_of_a_loss_near_zero_stays_bounded() -> None:
    learnt = balancer("uncertainty")
    learnt.trainable_variables[0].assign([-99.0, 99.0])
    found = learnt.weights_by_task()
    assert float(found["click"]) == pytest.approx(math.exp(8), rel=1e-5)
    assert float(found["watch"]) == pytest.approx(0.5 * math.exp(-8), rel=1e-5)


def step(gradnorm: LossBalancer, slopes: dict[str, float], offset: float = 1.0) -> tf.Tensor:
    """One step over three rows: the loss of a task is slope × the mean of one shared column, plus an offset.

    Returns the gradient at the shared column.
    """
    shared = tf.Variable([[0.0], [0.0], [0.0]])
    with tf.GradientTape() as tape:
        values = {
            name: tf.reduce_mean(slope * gradnorm.probe(name, shared)) + offset
            for name, slope in slopes.items()
        }
        total = gradnorm.total(values)
    return tape.gradient(total, shared)


def weights_of(gradnorm: LossBalancer) -> dict[str, float]:
    return {name: float(weight) for name, weight in gradnorm.weights_by_task().items()}


def test_gradnorm_makes_tasks_pull_in_proportion_to_their_loss_weights() -> None:
    gradnorm = balancer("gradnorm")
    slopes = {"click": 2.0, "watch": 8.0}
    first = step(gradnorm, slopes)
    # The first step goes by the declared weights: each row gets (1 × 2 + 0.5 × 8) / 3.
    np.testing.assert_allclose(first, np.full((3, 1), 2.0), rtol=1e-6)
    # Pull w × slope in proportion 1 : 0.5 and sum of the weights 1.5: w = 1.5 × (8/9, 1/9).
    assert weights_of(gradnorm) == pytest.approx({"click": 1.5 * 8 / 9, "watch": 1.5 / 9}, rel=1e-5)
    second = step(gradnorm, slopes)
    expected = 1.5 * (8 / 9 * 2.0 + 1 / 9 * 8.0) / 3
    np.testing.assert_allclose(second, np.full((3, 1), expected), rtol=1e-5)
    # The norms are those of the losses, not of the weighted ones: the same weights again.
    assert weights_of(gradnorm) == pytest.approx({"click": 1.5 * 8 / 9, "watch": 1.5 / 9}, rel=1e-5)


def test_gradnorm_turns_up_the_task_that_has_learnt_less() -> None:
    gradnorm = balancer("gradnorm", {"click": 1.0, "watch": 1.0}, asymmetry=2.0, memory_steps=1)
    shared = tf.Variable([[0.0]])

    def train_step(click: float, watch: float) -> None:
        with tf.GradientTape() as tape:
            values = {
                name: tf.reduce_sum(gradnorm.probe(name, shared)) + value
                for name, value in (("click", click), ("watch", watch))
            }
            total = gradnorm.total(values)
        tape.gradient(total, shared)

    for _ in range(10):
        train_step(4.0, 2.0)
    assert weights_of(gradnorm) == pytest.approx({"click": 1.0, "watch": 1.0})
    train_step(1.0, 1.5)
    # Relative losses 1/4 and 3/4, twice of which over their mean: rates 1/2 and 3/2, squared 1/4 and 9/4.
    assert weights_of(gradnorm) == pytest.approx({"click": 0.2, "watch": 1.8}, rel=1e-5)


def test_gradnorm_averages_norms_over_its_memory() -> None:
    gradnorm = balancer("gradnorm", {"click": 1.0, "watch": 1.0}, memory_steps=2)
    for slope in (2.0, 4.0, 9.0):
        step(gradnorm, {"click": slope, "watch": 1.0})
    # Plain mean of 2 and 4, then half way to 9: 6. Weights in proportion 1/6 : 1.
    assert weights_of(gradnorm) == pytest.approx({"click": 2 / 7, "watch": 12 / 7}, rel=1e-5)


def test_gradnorm_passes_over_a_task_without_labels_in_the_batch() -> None:
    gradnorm = balancer("gradnorm")
    step(gradnorm, {"click": 2.0, "watch": 8.0})
    before = weights_of(gradnorm)
    shared = tf.Variable([[1.0]])
    with tf.GradientTape() as tape:
        total = gradnorm.total(
            {"click": 2.0 * tf.norm(gradnorm.probe("click", shared)), "watch": tf.constant(0.0)}
        )
    assert np.all(np.isfinite(tape.gradient(total, shared)))
    after = weights_of(gradnorm)
    assert after["watch"] > 0
    assert all(math.isfinite(weight) for weight in after.values())
    assert sum(after.values()) == pytest.approx(sum(before.values()))


class TwoHeads(tf.keras.Model):
    """The same task twice on a shared body, once with a loss a hundred times as large."""

    SCALES: ClassVar = {"click": 1.0, "watch": 100.0}

    def __init__(self) -> None:
        super().__init__()
        self.body = tf.keras.layers.Dense(4, activation="relu")
        self.heads = {name: tf.keras.layers.Dense(1, kernel_initializer="ones") for name in self.SCALES}
        self.balancer = balancer("gradnorm", dict.fromkeys(self.SCALES, 1.0))

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        x, y = data
        with tf.GradientTape() as tape:
            shared = self.body(x)
            values = {
                name: self.SCALES[name]
                * tf.reduce_mean(tf.square(head(self.balancer.probe(name, shared)) - y))
                for name, head in self.heads.items()
            }
            total = self.balancer.total(values)
        gradients = tape.gradient(total, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": total}


def test_gradnorm_works_in_a_compiled_keras_train_step() -> None:
    tf.keras.utils.set_random_seed(1)
    x = np.random.default_rng(1).normal(size=(256, 3)).astype(np.float32)
    model = TwoHeads()
    # Nothing moves, so that the two heads stay the same.
    model.compile(tf.keras.optimizers.SGD(0.0))
    model.fit(x, x.sum(axis=1, keepdims=True), batch_size=32, epochs=2, verbose=0)
    assert weights_of(model.balancer) == pytest.approx({"click": 200 / 101, "watch": 2 / 101}, rel=1e-4)


def test_task_of_weight_zero_is_left_out() -> None:
    for method in ("fixed", "uncertainty", "gradnorm"):
        some = balancer(method, {"click": 1.0, "silent": 0.0})
        shared = tf.Variable([[1.0]])
        with tf.GradientTape() as tape:
            total = some.total({name: tf.norm(some.probe(name, shared)) for name in ("click", "silent")})
        assert total.numpy() == pytest.approx(1.0)
        assert np.all(np.isfinite(tape.gradient(total, shared)))
        assert set(some.weights_by_task()) == {"click"}


def test_no_task_to_learn_is_refused() -> None:
    with pytest.raises(ConfigError, match="every loss_weight of the tasks click is 0"):
        balancer("fixed", {"click": 0.0})


@pytest.mark.parametrize(
    "settings", [{"method": "equal"}, {"asymmetry": -1}, {"memory_steps": 0}, {"speed": 1}]
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        BalancingConfig(**settings)
