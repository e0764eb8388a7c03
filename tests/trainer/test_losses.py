"""The sampled softmax against hand calculations, a slow oracle, and the softmax over the whole catalogue."""

import math

import numpy as np
import pytest
import tensorflow as tf

from tests import oracles
from trainer import losses
from trainer.losses import (
    NOT_SAMPLED,
    log_inclusion_probability,
    log_sampling_probability,
    sampled_softmax_loss,
)


def loss(
    scores: list[list[float]],
    positives: list[int],
    log_weights: list[float] | np.ndarray,
    temperature: float = 1.0,
    sample_weight: list[float] | None = None,
    hard_negatives: list[list[int]] | None = None,
) -> float:
    """With unit vectors for queries, the candidates are the columns of the scores."""
    return float(
        sampled_softmax_loss(
            tf.eye(len(scores)),
            tf.transpose(tf.constant(scores, tf.float32)),
            tf.constant(positives),
            tf.constant(log_weights, tf.float32),
            temperature,
            None if sample_weight is None else tf.constant(sample_weight, tf.float32),
            None if hard_negatives is None else tf.constant(hard_negatives),
        )
    )


def test_two_examples_by_hand() -> None:
    # Row 0: logits (2, 0) -> log(1 + e^-2); row 1: logits (0, 0) -> log 2.
    expected = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    assert loss([[2, 0], [0, 0]], [0, 1], [0, 0]) == pytest.approx(expected, abs=1e-6)


def test_temperature_divides_the_scores_and_not_the_log_weights() -> None:
    assert loss([[2, 0]], [0], [0, 1], 0.5) == pytest.approx(loss([[4, 0]], [0], [0, 1]), abs=1e-6)


def test_weights_take_the_advantage_of_being_drawn_often_from_an_item() -> None:
    # Equal scores, item 1 is drawn 4 times as often: the softmax is (1 / 0.2) / (1 / 0.2 + 1 / 0.8) = 0.8.
    assert loss([[0, 0]], [0], -np.log([0.2, 0.8])) == pytest.approx(-math.log(0.8), abs=1e-6)


def test_rare_items_are_corrected_without_clipping() -> None:
    assert loss([[0, 0]], [0], -np.log([1e-9, 1e-7])) == pytest.approx(-math.log(1 / 1.01), rel=1e-4)


def test_column_that_was_not_sampled_has_softmax_weight_zero() -> None:
    candidates = tf.Variable([[1.0], [5.0], [0.0]])
    with tf.GradientTape() as tape:
        value = sampled_softmax_loss(
            tf.ones([1, 1]), candidates, tf.constant([0]), tf.constant([0.0, NOT_SAMPLED, 0.0])
        )
    # The gradient of a logit is softmax weight - label.
    other = 1 / (1 + math.e)
    np.testing.assert_allclose(tape.gradient(value, candidates)[:, 0], [-other, 0, other], atol=1e-6)


def test_hard_negative_counts_in_full_for_its_own_query_only() -> None:
    log_weights = [-math.log(0.5), -math.log(0.5), NOT_SAMPLED]
    # Column 2 is query 0's: 2 / (2 + 2 + 1); column 1, drawn anyway, is query 1's: 2 / (2 + 1).
    value = loss([[0, 0, 0], [0, 0, 0]], [0, 0], log_weights, hard_negatives=[[2], [1]])
    assert value == pytest.approx((-math.log(2 / 5) - math.log(2 / 3)) / 2, abs=1e-6)


def test_positive_among_the_hard_negatives_stands_for_none() -> None:
    log_weights = -np.log([0.2, 0.8])
    assert loss([[1, 2]], [0], log_weights, hard_negatives=[[0, 0]]) == loss([[1, 2]], [0], log_weights)


def test_mean_is_over_weights_and_weight_zero_removes_a_row() -> None:
    scores, positives, log_weights = [[2, 0, 1], [0, 0, 3], [1, 1, 1]], [0, 1, 2], [0, 0, 0]
    rows = [loss(scores, positives, log_weights, 1.0, list(np.eye(3)[i])) for i in range(3)]
    weighted = loss(scores, positives, log_weights, 1.0, [1, 0, 3])
    assert weighted == pytest.approx((rows[0] + 3 * rows[2]) / 4, abs=1e-6)
    assert loss(scores, positives, log_weights, 1.0, [0, 0, 0]) == 0


def test_row_of_weight_zero_has_no_gradient() -> None:
    queries, candidates = tf.Variable([[1.0, 2.0], [2.0, 1.0]]), tf.Variable([[1.0, 0.0], [0.0, 1.0]])

    def gradients(rows: int, weights: list[float]) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            positives = tf.constant([0, 1])[:rows]
            value = sampled_softmax_loss(
                queries[:rows], candidates, positives, tf.zeros(2), 1.0, tf.constant(weights)
            )
        return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(value, [queries, candidates])]

    by_queries, by_candidates = gradients(2, [1.0, 0.0])
    assert not by_queries[1].any() and by_queries[0].any()
    np.testing.assert_allclose(by_candidates, gradients(1, [1.0])[1])


@pytest.mark.parametrize("chunk_logits", [1, 7, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_agree_with_the_slow_oracle_in_chunks_of_any_size(
    seed: int, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", chunk_logits)
    rng = np.random.default_rng(seed)
    num_rows, num_columns = rng.integers(1, 6, size=2)
    points = [rng.normal(size=(num_rows, 3)), rng.normal(size=(num_columns, 3))]
    positives = rng.integers(num_columns, size=num_rows)
    log_weights, weights = rng.uniform(-1, 9, size=num_columns), rng.uniform(0.1, 2, size=num_rows)
    hard = np.array([rng.permutation(num_columns)[:2] for _ in range(num_rows)])

    def slow(queries: np.ndarray, candidates: np.ndarray) -> float:
        return 2 * oracles.sampled_softmax(queries, candidates, positives, log_weights, 0.7, weights, hard)

    variables = [tf.Variable(values, dtype=tf.float32) for values in points]
    with tf.GradientTape() as tape:
        value = 2.0 * sampled_softmax_loss(
            *variables,
            tf.constant(positives, tf.int32),
            tf.constant(log_weights, tf.float32),
            0.7,
            tf.constant(weights, tf.float32),
            tf.constant(hard, tf.int32),
        )
    # float32 sums of at most six terms with logits below 20.
    assert float(value) == pytest.approx(slow(*points), rel=1e-5, abs=1e-5)
    for which, gradient in enumerate(tape.gradient(value, variables)):
        for place in np.ndindex(points[which].shape):
            step = np.zeros_like(points[which])
            step[place] = 1e-4
            ends = [
                slow(*(p + sign * step if i == which else p for i, p in enumerate(points)))
                for sign in (1, -1)
            ]
            # The oracle is float64: a central difference errs by 1e-8.
            assert gradient.numpy()[place] == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4, abs=1e-5)


def test_inclusion_probability_by_hand() -> None:
    # In 3 places, q = 1/2: 1 - 1/8. Rare: 1000 q, not clipped. Always drawn: 1.
    log_absence = tf.constant([3 * math.log(0.5), 1000 * math.log1p(-1e-12), -math.inf])
    np.testing.assert_allclose(np.exp(log_inclusion_probability(log_absence)), [7 / 8, 1e-9, 1], rtol=1e-5)


def test_sampling_probabilities_are_smoothed_shares() -> None:
    probabilities = np.exp(log_sampling_probability(tf.constant([3, 0, 1])).numpy())
    np.testing.assert_allclose(probabilities, [3.5 / 5.5, 0.5 / 5.5, 1.5 / 5.5], rtol=1e-6)
