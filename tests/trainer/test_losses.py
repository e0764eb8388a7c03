"""The in-batch softmax loss against hand calculations and a slow NumPy oracle."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from trainer.losses import in_batch_softmax_loss, log_sampling_probability


def slow_loss(
    scores: np.ndarray, item_ids: list[int], log_q: np.ndarray, temperature: float, weights: np.ndarray
) -> float:
    """Row by row, from the formula."""
    total = 0.0
    for i in range(len(item_ids)):
        logits = {}
        for j in range(len(item_ids)):
            if i == j or item_ids[i] != item_ids[j]:
                logits[j] = scores[i, j] / temperature - log_q[j]
        total += weights[i] * (math.log(sum(math.exp(v) for v in logits.values())) - logits[i])
    return total / weights.sum()


def loss(*args: object) -> float:
    return float(
        in_batch_softmax_loss(
            *(tf.constant(a, tf.float32) if i != 1 else tf.constant(a) for i, a in enumerate(args))
        )
    )


def test_two_examples_by_hand() -> None:
    # Row 0: logits (2, 0) -> log(1 + e^-2); row 1: logits (0, 0) -> log 2.
    expected = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    assert loss([[2, 0], [0, 0]], [7, 8], [0, 0]) == pytest.approx(expected, abs=1e-6)


def test_temperature_divides_the_scores() -> None:
    assert loss([[2, 0], [0, 0]], [7, 8], [0, 0], 0.5) == pytest.approx(
        loss([[4, 0], [0, 0]], [7, 8], [0, 0]), abs=1e-6
    )


def test_log_q_takes_the_advantage_of_being_drawn_often_from_an_item() -> None:
    # Equal scores, item 8 is drawn 4 times as often: softmax of row 0 is (1/0.2) / (1/0.2 + 1/0.8) = 0.8.
    row_0 = loss([[0, 0], [0, 0]], [7, 8], np.log([0.2, 0.8]), 1.0, [1, 0])
    assert row_0 == pytest.approx(-math.log(0.8), abs=1e-6)


def test_rare_items_are_corrected_without_clipping() -> None:
    row_0 = loss([[0, 0], [0, 0]], [7, 8], np.log([1e-9, 1e-7]), 1.0, [1, 0])
    assert row_0 == pytest.approx(-math.log(1 / (1 + 0.01)), rel=1e-4)


def test_accidental_hit_has_softmax_weight_zero() -> None:
    scores = tf.Variable([[1.0, 5.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    with tf.GradientTape() as tape:
        value = in_batch_softmax_loss(scores, tf.constant([4, 4, 9]), tf.zeros(3))
    gradient = tape.gradient(value, scores).numpy()
    # The gradient of a logit is (softmax weight - label) / B.
    assert gradient[0, 1] == 0 and gradient[1, 0] == 0
    assert gradient[0, 2] == pytest.approx(1 / (1 + math.e) / 3, abs=1e-6)


def test_mean_is_over_weights_and_weight_zero_removes_a_row() -> None:
    scores, ids, log_q = [[2, 0, 1], [0, 0, 3], [1, 1, 1]], [1, 2, 3], [0, 0, 0]
    rows = [loss(scores, ids, log_q, 1.0, np.eye(3)[i]) for i in range(3)]
    assert loss(scores, ids, log_q, 1.0, [1, 0, 3]) == pytest.approx((rows[0] + 3 * rows[2]) / 4, abs=1e-6)
    assert loss(scores, ids, log_q, 1.0, [0, 0, 0]) == 0


@given(st.integers(1, 8), st.integers(1, 4), st.floats(0.1, 3), st.integers(0, 1000))
def test_agrees_with_the_slow_oracle(batch: int, num_items: int, temperature: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(batch, batch))
    ids = rng.integers(num_items, size=batch).tolist()
    log_q = np.log(rng.uniform(0.01, 1, size=num_items))[ids]
    weights = rng.uniform(0.1, 2, size=batch)
    # float32 sums of at most eight terms with logits below 50.
    assert loss(scores, ids, log_q, temperature, weights) == pytest.approx(
        slow_loss(scores, ids, log_q, temperature, weights), rel=1e-4, abs=1e-5
    )


def test_sampling_probabilities_are_smoothed_shares() -> None:
    probabilities = np.exp(log_sampling_probability(tf.constant([3, 0, 1])).numpy())
    np.testing.assert_allclose(probabilities, [3.5 / 5.5, 0.5 / 5.5, 1.5 / 5.5], rtol=1e-6)
