"""Item factors: the fit against its normal equations, and the fold-in of a history against a solve."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.config import FactorsConfig
from trainer.item_factors import ItemFactors, item_factors

NUM_IDS = 14
CONFIG = FactorsConfig(weight=3.0, alpha=20.0, ridge=2.0, num_factors=4)


def choices(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Users 2 to 21 choose items 1 to 12, some of them twice; item 13 is never chosen."""
    rng = np.random.default_rng(seed)
    return rng.integers(2, 22, 80), rng.integers(1, 13, 80)


def test_factors_minimise_the_weighted_squares_of_hu_koren_and_volinsky() -> None:
    users, items = choices()
    factors = item_factors(users, items, NUM_IDS, CONFIG, seed=0).astype(np.float64)
    chosen = np.zeros((22, NUM_IDS))
    chosen[users, items] = 1.0
    chosen[:, 1] = 0.0  # outside the vocabulary
    weights = 1.0 + (CONFIG.alpha - 1.0) * chosen
    ridge = CONFIG.ridge * np.eye(4)
    by_user = [
        np.linalg.solve((factors.T * w) @ factors + ridge, (factors.T * w) @ c)
        for w, c in zip(weights, chosen, strict=True)
    ]
    of_users = np.array(by_user)
    for item in range(2, 13):
        w, c = weights[:, item], chosen[:, item]
        best = np.linalg.solve((of_users.T * w) @ of_users + ridge, (of_users.T * w) @ c)
        # Fifteen alternations come this close to the fixed point.
        np.testing.assert_allclose(factors[item], best, atol=0.05 * np.abs(factors).max())


def test_what_nobody_chose_has_no_factors() -> None:
    factors = item_factors(*choices(), NUM_IDS, CONFIG, seed=0)
    assert factors.dtype == np.float32 and factors.shape == (NUM_IDS, 4)
    np.testing.assert_array_equal(factors[[0, 1, 13]], 0.0)
    assert (np.abs(factors[2:13]).max(axis=1) > 0).all()


def test_factors_do_not_depend_on_the_order_and_the_repeats_of_the_choices() -> None:
    users, items = choices()
    factors = item_factors(users, items, NUM_IDS, CONFIG, seed=0)
    order = np.random.default_rng(1).permutation(len(users)).repeat(2)
    again = item_factors(users[order], items[order], NUM_IDS, CONFIG, seed=0)
    np.testing.assert_allclose(again, factors, atol=1e-6)


@pytest.fixture(name="factors")
def make_factors() -> np.ndarray:
    factors = np.random.default_rng(0).normal(size=(NUM_IDS, 4)).astype(np.float32)
    factors[:2] = 0.0
    return factors


def test_a_history_is_folded_in_as_ials_does_to_first_order(factors: np.ndarray) -> None:
    layer = ItemFactors(NUM_IDS, CONFIG, factors)
    # Three items with gaps, one of them unknown; the same without gaps; nothing.
    ids = tf.constant([[5, 0, 9, 0, 1], [5, 9, 1, 0, 0], [0, 0, 0, 0, 0]])
    total = (factors[5] + factors[9]) / np.sqrt(3)
    system = factors.T @ factors + CONFIG.ridge * np.eye(4)
    expected = CONFIG.weight * CONFIG.alpha * np.linalg.solve(system, total)
    np.testing.assert_allclose(layer.of_history(ids), [expected, expected, np.zeros(4)], rtol=1e-4, atol=1e-6)


def test_factors_are_not_trained_and_are_kept_with_the_weights(factors: np.ndarray) -> None:
    layer, empty = ItemFactors(NUM_IDS, CONFIG, factors), ItemFactors(NUM_IDS, CONFIG, None)
    assert not layer.trainable_variables
    empty.set_weights(layer.get_weights())
    ids = tf.constant([[5, 9]])
    np.testing.assert_array_equal(empty.of_history(ids), layer.of_history(ids))
    np.testing.assert_array_equal(empty.of_items(ids), layer.of_items(ids))
