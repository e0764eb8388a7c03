"""Sampling probabilities, counted and streaming, against hand calculations and a simulated stream."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.sampling_probability import CountedProbability, StreamingProbability


def in_batch(probability: StreamingProbability, num_ids: int) -> np.ndarray:
    """Chance of each item to be in a batch."""
    log_absence = probability.batch_size * probability.log_absence(tf.range(num_ids)).numpy()
    return -np.expm1(log_absence)


def test_counted_probabilities_keep_the_tail() -> None:
    probability = CountedProbability(np.log([0.25, 1e-9]))
    np.testing.assert_allclose(
        probability.log_absence(tf.constant([1, 0, 1])), [-1e-9, np.log(0.75), -1e-9], rtol=1e-6
    )


def test_streaming_interval_is_a_moving_average_by_hand() -> None:
    probability = StreamingProbability(num_ids=4, batch_size=2, rate=0.5)
    for batch in ([1, 1], [2, 2], [1, 2], [3, 1]):
        probability.observe(tf.constant(batch))
    # Item 1: seen in batches 1, 3, 4: 1, then (1 + 2) / 2, then (1.5 + 1) / 2. Item 2: in 2, 3. Item 3: in 4.
    np.testing.assert_allclose(in_batch(probability, 4), [0, 1 / 1.25, 1 / 1.5, 1 / 4], rtol=1e-5)


def test_item_of_every_batch_has_probability_one() -> None:
    probability = StreamingProbability(num_ids=1, batch_size=3, rate=0.1)
    for _ in range(5):
        probability.observe(tf.constant([0, 0, 0]))
    assert probability.log_absence(tf.constant([0])).numpy() == -np.inf


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_streaming_estimate_converges_to_the_true_probability(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = 1.0 / (3 + np.arange(20))
    shares /= shares.sum()
    truth = 1 - (1 - shares) ** 8
    probability = StreamingProbability(num_ids=20, batch_size=8, rate=0.02)

    @tf.function
    def observe(batches: tf.Tensor) -> None:
        for batch in batches:
            probability.observe(batch)

    estimates = []
    for _ in range(60):
        observe(tf.constant(rng.choice(20, size=[50, 8], p=shares), tf.int32))
        estimates.append(in_batch(probability, 20))
    ratios = np.mean(estimates[30:], axis=0) / truth
    # An estimate varies by sqrt(rate / 2) = 10 % of itself, and keeps its error for 1 / (rate p), that is
    # for 70 to 350 steps: the mean of an item varies by up to 5 %, that of twenty items by 1 %.
    assert np.all(np.abs(ratios - 1) < 0.2) and abs(np.mean(ratios) - 1) < 0.04, ratios


def test_streaming_estimate_follows_a_change() -> None:
    probability = StreamingProbability(num_ids=3, batch_size=1, rate=0.1)
    often, seldom = [1, 2] * 100, ([1] + [2] * 19) * 10
    for item in often + seldom:
        probability.observe(tf.constant([item]))
    # From every 2nd to every 20th batch, 9 new intervals: 20 - (20 - 2) × 0.9^9, one of them from the change.
    assert in_batch(probability, 3)[1] == pytest.approx(1 / (20 - 18 * 0.9**9), rel=0.01)


def test_a_later_stream_goes_on_from_the_estimate_whatever_its_batch_size() -> None:
    earlier = StreamingProbability(num_ids=4, batch_size=1, rate=0.5)
    for item in [1, 2, 1, 2]:
        earlier.observe(tf.constant([item]))
    later = StreamingProbability(num_ids=4, batch_size=2, rate=0.5)
    later.start_from(np.array([3, 2, 0]), earlier.log_absence(tf.constant([1, 2, 3])).numpy())
    # Item 1 came after 1 and then 2 batches: 1.5, and is item 3 now; item 2 after 2 and 2. In two places a
    # share of 2/3 is missing with chance 1/9, one of 1/2 with 1/4.
    np.testing.assert_allclose(in_batch(later, 4), [0, 0, 3 / 4, 8 / 9], rtol=1e-6)
    later.observe(tf.constant([2, 2]))
    assert in_batch(later, 4)[2] == pytest.approx(1 / ((4 / 3 + 1) / 2), rel=1e-6)


def test_an_item_of_every_batch_stays_one_of_every_batch() -> None:
    later = StreamingProbability(num_ids=1, batch_size=3, rate=0.1)
    later.start_from(np.array([0]), np.array([-np.inf], np.float32))
    assert later.log_absence(tf.constant([0])).numpy() == -np.inf
