"""The candidate set of a step, by hand, and its loss against the softmax over the whole catalogue."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import ConfigError
from trainer.catalogue import Catalogue
from trainer.losses import NOT_SAMPLED, sampled_softmax_loss
from trainer.negatives import CandidateSampler, CandidateSet, CataloguePool
from trainer.sampling_probability import CountedProbability, StreamingProbability

NUM_ITEMS = 30
NUM_QUERIES = 4
RNG = np.random.default_rng(0)
# P(item | query), popularity shared between the queries in part; transformed ids start at 2.
TRUTH = np.exp(RNG.normal(size=(NUM_QUERIES, NUM_ITEMS))) / (2 + np.arange(NUM_ITEMS))
TRUTH /= TRUTH.sum(axis=1, keepdims=True)
# All queries are equally frequent.
LOG_Q = np.log(np.concatenate([[1e-9, 1e-9], TRUTH.mean(axis=0)]))
CATALOGUE = Catalogue(
    np.array([f"i{row}" for row in range(NUM_ITEMS + 1)], object),
    # The first row is a new item, outside the vocabulary.
    {"item_id_id": np.concatenate([[1], np.arange(NUM_ITEMS) + 2])},
    None,
)


class FixedMiner:
    """Stands for a HardNegativeMiner; finds the same items for each query whose positive they are not."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def mine(self, queries: tf.Tensor, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
        positives = inputs["item_id_id"][:, tf.newaxis]
        items = tf.tile([self.items], [tf.size(positives), 1])
        return tf.where(items == positives, positives, items)


def sampler(uniform_negatives: int | Literal["all"] = 0, hard: list[int] | None = None) -> CandidateSampler:
    miner: Any = FixedMiner(hard) if hard else None
    pool = CataloguePool(CATALOGUE, NUM_ITEMS + 2, uniform_negatives) if uniform_negatives or hard else None
    return CandidateSampler(["item_id_id"], CountedProbability(LOG_Q), pool, miner)


def encode_as(table: np.ndarray | tf.Variable) -> Any:
    """Candidate vectors float32 [C, NUM_QUERIES]: row `item id - 2` of the table."""
    return lambda items: tf.gather(table, items["item_id_id"] - 2)


def sampled(chosen: CandidateSampler, items: list[int], training: bool = True) -> CandidateSet:
    """The set of a batch whose candidate vectors hold the item id."""
    ids = np.tile(np.arange(2, NUM_ITEMS + 2, dtype=np.float32)[:, np.newaxis], [1, NUM_QUERIES])
    queries = tf.zeros([len(items), NUM_QUERIES])
    return chosen.sample({"item_id_id": tf.constant(items)}, queries, encode_as(ids), training)


def test_items_of_the_batch_are_candidates_once_with_their_chance_to_be_in_the_rest_of_it() -> None:
    candidates = sampled(sampler(), [7, 4, 7, 7])
    assert candidates.vectors[:, 0].numpy().tolist() == [7, 4]
    assert candidates.positives.numpy().tolist() == [0, 1, 0, 0]
    expected = -np.log(1 - (1 - np.exp(LOG_Q[[7, 4]])) ** 3)
    np.testing.assert_allclose(candidates.log_weights, expected, rtol=1e-5)
    assert candidates.hard_negatives is None


def test_batch_of_one_has_loss_zero() -> None:
    candidates = sampled(sampler(), [5])
    loss = sampled_softmax_loss(
        tf.ones([1, 4]), candidates.vectors, candidates.positives, candidates.log_weights
    )
    assert float(loss) == pytest.approx(0, abs=1e-6)


def test_mixed_negatives_have_the_joint_chance_and_new_items_are_not_drawn() -> None:
    tf.random.set_seed(0)
    candidates = sampled(sampler(uniform_negatives=200), [7, 4, 7])
    ids = candidates.vectors[:, 0].numpy().astype(int)
    assert ids[:2].tolist() == [7, 4] and sorted(set(ids)) == sorted(ids) and ids.min() >= 2 and len(ids) > 25
    absence = (1 - np.exp(LOG_Q[ids])) ** 2 * (1 - 1 / NUM_ITEMS) ** 200
    np.testing.assert_allclose(candidates.log_weights, -np.log(1 - absence), rtol=1e-4, atol=1e-6)


def test_joint_chance_of_rare_items_is_the_mixture_of_batch_and_catalogue() -> None:
    num_ids, batch, draws = 100_002, 101, 50
    catalogue = Catalogue(
        np.arange(num_ids).astype(str).astype(object), {"item_id_id": np.arange(num_ids)}, None
    )
    pool = CataloguePool(catalogue, num_ids, draws)
    log_q = np.full(num_ids, np.log(1e-7))
    chosen = CandidateSampler(["item_id_id"], CountedProbability(log_q), pool)
    vectors = tf.zeros([num_ids, 4])
    items = tf.range(2, batch + 2)
    weights = chosen.sample({"item_id_id": items}, tf.zeros([batch, 4]), encode_as(vectors), True).log_weights
    others, num_items = batch - 1, num_ids - 2
    mixture = others / (others + draws) * 1e-7 + draws / (others + draws) / num_items
    np.testing.assert_allclose(-weights, np.log(mixture * (others + draws)), rtol=1e-4)


def test_all_items_of_the_catalogue_make_the_full_softmax() -> None:
    candidates = sampled(sampler("all"), [7, 4, 7])
    ids = candidates.vectors[:, 0].numpy()
    assert ids[:2].tolist() == [7, 4] and sorted(ids) == list(range(2, NUM_ITEMS + 2))
    assert not candidates.log_weights.numpy().any()


def test_hard_negatives_are_columns_that_only_count_where_they_are_asked_for() -> None:
    candidates = sampled(sampler(hard=[9, 4]), [7, 4])
    assert candidates.vectors[:, 0].numpy().tolist() == [7, 4, 9]
    assert candidates.hard_negatives is not None
    assert candidates.hard_negatives.numpy().tolist() == [[2, 1], [2, 1]]
    assert candidates.log_weights[2] == NOT_SAMPLED and candidates.log_weights[1] > 0


def test_catalogue_without_a_trained_item_is_refused() -> None:
    new = Catalogue(np.array(["a"], object), {"item_id_id": np.array([1])}, None)
    with pytest.raises(ConfigError, match="no item of the catalogue occurs"):
        CataloguePool(new, 5, 1)


def gradient_function(
    chosen: CandidateSampler, scores: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Makes a function of a batch's queries and item ids: the gradient of its loss by the scores."""
    table = tf.constant(scores, tf.float32)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.int32)] * 2)
    def gradient(query_ids: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        queries = tf.one_hot(query_ids, NUM_QUERIES)
        with tf.GradientTape() as tape:
            tape.watch(table)
            c = chosen.sample({"item_id_id": items}, queries, encode_as(table), True)
            loss = sampled_softmax_loss(
                queries, c.vectors, c.positives, c.log_weights, hard_negatives=c.hard_negatives
            )
        return tf.convert_to_tensor(tape.gradient(loss, table))

    return lambda query_ids, items: gradient(query_ids.astype(np.int32), items.astype(np.int32)).numpy()


def draw_batch(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Queries, and positives drawn by the true probabilities."""
    query_ids = rng.integers(NUM_QUERIES, size=size)
    draws = rng.random(size)[:, np.newaxis]
    return query_ids, (draws > np.cumsum(TRUTH, axis=1)[query_ids, :-1]).sum(axis=1) + 2


def full_softmax_gradient(scores: np.ndarray, query_ids: np.ndarray, items: np.ndarray) -> np.ndarray:
    """From the formula: mean over the batch of softmax - one-hot; [NUM_ITEMS, NUM_QUERIES] as `scores`."""
    total = np.zeros_like(scores)
    for query, item in zip(query_ids, items, strict=True):
        exp = np.exp(scores[:, query])
        total[:, query] += exp / exp.sum()
        total[item - 2, query] -= 1
    return total / len(items)


def error(chosen: CandidateSampler, batch_size: int, seed: int) -> float:
    """Length of the mean difference from the full softmax's gradient, relative to the length of that."""
    rng = np.random.default_rng(seed)
    tf.random.set_seed(seed)
    scores = rng.normal(size=(NUM_ITEMS, NUM_QUERIES))
    gradient = gradient_function(chosen, scores)
    differences, exact = [], []
    for _ in range(30):
        query_ids, items = draw_batch(batch_size, rng)
        exact.append(full_softmax_gradient(scores, query_ids, items))
        differences.append(gradient(query_ids, items) - exact[-1])
    return float(np.linalg.norm(np.mean(differences, axis=0)) / np.linalg.norm(np.mean(exact, axis=0)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_batch_gradient_converges_to_the_full_softmax_as_the_batch_grows(seed: int) -> None:
    errors = [error(sampler(), batch_size, seed) for batch_size in (8, 64, 512)]
    assert errors[0] > 2 * errors[1] > 8 * errors[2] and errors[2] < 0.02, errors


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mixed_gradient_converges_to_the_full_softmax_as_the_draws_grow(seed: int) -> None:
    errors = [error(sampler(draws), 8, seed) for draws in (1, 30, 300)]
    assert errors[0] > 2 * errors[1] > 8 * errors[2] and errors[2] < 0.02, errors


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_over_the_whole_catalogue_is_that_of_the_full_softmax(seed: int) -> None:
    assert error(sampler("all"), 8, seed) < 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hard_negatives_bring_a_small_batch_nearer_to_the_full_softmax(seed: int) -> None:
    no_item, half, all_items = None, list(range(17, 32)), list(range(2, 32))
    errors = [error(sampler(hard=hard), 16, seed) for hard in (no_item, half, all_items)]
    # What is left is the weight of the positive, 1 / p where the full softmax has 1.
    assert errors[0] > 1.5 * errors[1] > 4 * errors[2], errors


@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_with_hard_negatives_converges_to_the_full_softmax_as_the_batch_grows(seed: int) -> None:
    errors = [error(sampler(hard=list(range(17, 32))), batch_size, seed) for batch_size in (8, 64, 512)]
    assert errors[0] > 2 * errors[1] > 8 * errors[2] and errors[2] < 0.02, errors


def streaming_sampler(batch_size: int) -> CandidateSampler:
    """Its probabilities come from 300 batches."""
    probability = StreamingProbability(NUM_ITEMS + 2, batch_size, rate=0.01)
    observe = tf.function(probability.observe, autograph=False)
    rng = np.random.default_rng(1)
    for _ in range(300):
        observe(tf.constant(draw_batch(batch_size, rng)[1], tf.int32))
    return CandidateSampler(["item_id_id"], probability)


def test_gradient_with_streaming_probabilities_converges_to_the_full_softmax_as_the_batch_grows() -> None:
    errors = [error(streaming_sampler(batch_size), batch_size, seed=0) for batch_size in (8, 64, 512)]
    assert errors[0] > 2 * errors[1] > 8 * errors[2] and errors[2] < 0.02, errors


def distance_from_zero(chosen: CandidateSampler, num_batches: int) -> float:
    """Of the mean gradient by the items' scores, at the true ones: the mean square in standard errors."""
    rng = np.random.default_rng(0)
    gradient = gradient_function(chosen, np.log(TRUTH.T))
    found = np.array([gradient(*draw_batch(64, rng)).sum(axis=1) for _ in range(num_batches)])
    z = found.mean(axis=0) / (found.std(axis=0) / np.sqrt(len(found)))
    return float(np.mean(z**2))


@pytest.mark.parametrize("uniform_negatives", [0, 8])
def test_gradient_is_zero_on_average_at_the_true_scores_though_batches_are_small(
    uniform_negatives: int,
) -> None:
    # The mean square of 30 standard normal deviates is 1 ± 0.26.
    assert distance_from_zero(sampler(uniform_negatives), 2_000) < 2


def test_gradient_with_streaming_probabilities_is_near_zero_at_the_true_scores() -> None:
    # Not 1: the estimates are as uncertain as their rate makes them. Without a correction it is 43.
    assert distance_from_zero(streaming_sampler(64), 300) < 6
