"""The sequence model of the leave-one-out benchmark: what it is trained on, and that it learns an order."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks.leave_one_out import SequenceModel, evaluate, padded, train, training_batches
from benchmarks.protocols import LeaveOneOut
from trainer.config import HistoryConfig

NUM_ITEMS = 12
CONFIG = HistoryConfig(encoder="transformer", num_blocks=1, num_heads=2, dropout_fraction=0.0, max_events=6)


def cyclic(num_users: int, length: int) -> LeaveOneOut:
    """Users who start at some item and go on with the next, a minute later, around a circle."""
    starts = np.random.default_rng(0).integers(NUM_ITEMS, size=num_users)
    return LeaveOneOut(
        user_ids=tuple(f"u{n}" for n in range(num_users)),
        item_ids=tuple(f"i{n}" for n in range(NUM_ITEMS)),
        sequences=tuple((start + np.arange(length)) % NUM_ITEMS for start in starts),
        times_unix_s=tuple(1_000 + 60 * np.arange(length) for _ in starts),
    )


def batches(data: LeaveOneOut, max_events: int = 6, events_per_batch: int = 20):
    return list(training_batches(data, max_events, events_per_batch, np.random.default_rng(0)))


def test_sequences_are_padded_on_the_right_with_row_0_and_their_last_time():
    rows, seconds = padded([(np.array([4, 0]), np.array([10, 20])), (np.array([7]), np.array([30]))])
    assert rows.tolist() == [[5, 1], [8, 0]]
    assert seconds.tolist() == [[10, 20], [30, 30]]
    assert rows.dtype == seconds.dtype == np.int32


def test_every_event_is_followed_by_its_target_and_held_out_items_are_never_seen():
    data = cyclic(num_users=5, length=8)
    seen = []
    for rows, seconds, targets in batches(data):
        assert rows.shape == seconds.shape == targets.shape
        assert rows.size <= 20 or len(rows) == 1
        for items, times, following in zip(rows, seconds, targets, strict=True):
            known = items > 0
            np.testing.assert_array_equal(following >= 0, known)
            np.testing.assert_array_equal(following[known], items[known] % NUM_ITEMS)  # row i + 1 is item i
            np.testing.assert_array_equal(np.diff(times[known]), 60)
            seen.append([*(items[known] - 1), following[known][-1]])
    # Eight items less the two held out; nothing is cut off.
    assert sorted(map(tuple, seen)) == sorted(tuple(data.train(user)) for user in range(5))


@pytest.mark.parametrize(("length", "windows"), [(8, 1), (12, 1), (13, 2)])
def test_a_long_sequence_gives_a_window_and_two_when_it_is_half_as_long_again(length, windows):
    # Trained on 6, 10 and 11 items; a window has up to 7, of which the last is only a target.
    found = batches(cyclic(num_users=1, length=length), max_events=6, events_per_batch=100)
    (rows, _, targets) = found[0]
    assert len(found) == 1 and len(rows) == windows
    assert rows.shape[1] == min(length - 3, 6)
    assert (targets[rows > 0] >= 0).all()


def test_the_loss_is_the_mean_over_targets_of_a_softmax_over_all_items():
    tf.keras.utils.set_random_seed(0)
    model = SequenceModel(CONFIG, NUM_ITEMS, 8)
    rows, seconds, targets = batches(cyclic(3, 8), events_per_batch=100)[0]
    targets[0, 2] = -1
    states = model(rows, seconds).numpy()
    model.bias.assign(np.linspace(-1, 1, NUM_ITEMS))
    logits = states @ model.items.numpy()[1:].T + model.bias.numpy()
    costs = [
        np.log(np.exp(logits[place]).sum()) - logits[place][targets[place]]
        for place in zip(*np.nonzero(targets >= 0), strict=True)
    ]
    assert float(model.loss_of(rows, seconds, targets)) == pytest.approx(np.mean(costs), rel=1e-5)


def test_scores_are_those_after_the_last_event_whatever_the_padding():
    tf.keras.utils.set_random_seed(0)
    model = SequenceModel(CONFIG, NUM_ITEMS, 8)
    short, long = (np.array([3, 4]), np.array([60, 120])), (np.arange(5), 60 * np.arange(5))
    alone = model.scores(*padded([short]), np.array([2]))
    together = model.scores(*padded([short, long]), np.array([2, 5]))
    assert together.shape == (2, NUM_ITEMS)
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-4, atol=1e-6)


def test_a_planted_order_is_learnt():
    data = cyclic(num_users=40, length=8)
    tf.keras.utils.set_random_seed(0)
    model = SequenceModel(CONFIG, NUM_ITEMS, 16)
    optimizer = tf.keras.optimizers.legacy.Adam(0.01)
    rows, seconds, targets = batches(data, events_per_batch=1_000)[0]
    model(rows, seconds)

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            loss = model.loss_of(rows, seconds, targets)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    before = evaluate(model, data, "test")
    for _ in range(60):
        step()
    after = evaluate(model, data, "test")
    # NDCG is 1 only where the next item is the first of all; 12 items less those seen leave 5.
    assert before["ndcg_at_10"] < 0.8 and after["ndcg_at_10"] > 0.99


@pytest.fixture
def without_tracing():
    """Tracing takes longer than a handful of steps."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.usefixtures("without_tracing")
def test_training_reports_the_weights_that_were_best_on_validation():
    data = cyclic(num_users=8, length=8)
    result = train(data, CONFIG, 8, 1e-3, epochs=5, events_per_batch=1_000, epochs_per_validation=2, seed=0)
    assert [point["epoch"] for point in result["curve"]] == [1, 2, 4, 5]
    assert result["validation"] in result["curve"]
    best = max(point["hit_rate_at_10"] for point in result["curve"])
    assert result["validation"]["hit_rate_at_10"] == best
    assert set(result["test"]) == {"hit_rate_at_10", "ndcg_at_10"}


@pytest.mark.usefixtures("without_tracing")
def test_the_same_seed_gives_the_same_curve_and_another_seed_another():
    data = cyclic(num_users=8, length=8)
    losses = [
        [point["loss"] for point in train(data, CONFIG, 8, 1e-3, 2, 1_000, 1, seed)["curve"]]
        for seed in (3, 3, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)
