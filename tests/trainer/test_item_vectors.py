"""Item vectors from co-occurrence: against the full decomposition of a dense matrix, and in a plain world."""

import numpy as np
import pytest

from trainer.item_vectors import cooccurrence_vectors

NUM_IDS = 14


def choices(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Users 2 to 21 choose items 1 to 12, some of them twice; item 13 is never chosen."""
    rng = np.random.default_rng(seed)
    return rng.integers(2, 22, 150), rng.integers(1, 13, 150)


def test_products_of_vectors_are_those_of_the_decomposition() -> None:
    users, items = choices()
    matrix = np.zeros((22, NUM_IDS))
    matrix[users, items] = 1.0
    matrix[:, 1] = 0.0  # outside the vocabulary
    per_user, per_item = matrix.sum(axis=1, keepdims=True), matrix.sum(axis=0, keepdims=True)
    matrix /= np.sqrt(np.maximum(per_user, 1) * np.maximum(per_item, 1))
    _, singular, rows = np.linalg.svd(matrix)
    products = rows[:4].T @ np.diag(singular[:4]) @ rows[:4]
    chosen = per_item[0] > 0
    products /= np.mean(np.diag(products)[chosen])
    vectors = cooccurrence_vectors(users, items, NUM_IDS, width=4, seed=0)
    assert vectors.shape == (NUM_IDS, 4) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors @ vectors.T, products, atol=1e-5)


def test_vectors_are_the_same_each_time_and_whatever_the_order_of_the_rows() -> None:
    users, items = choices()
    vectors = cooccurrence_vectors(users, items, NUM_IDS, 4, seed=0)
    np.testing.assert_array_equal(cooccurrence_vectors(users, items, NUM_IDS, 4, seed=0), vectors)
    shuffled = np.random.default_rng(1).permutation(len(users))
    again = cooccurrence_vectors(users[shuffled], items[shuffled], NUM_IDS, 4, seed=0)
    np.testing.assert_array_equal(again, vectors)
    # Another start of the solver finds the same directions, signs included.
    np.testing.assert_allclose(cooccurrence_vectors(users, items, NUM_IDS, 4, seed=5), vectors, atol=1e-4)


def test_items_that_nobody_chose_have_no_vector() -> None:
    vectors = cooccurrence_vectors(*choices(), NUM_IDS, 4, seed=0)
    np.testing.assert_array_equal(vectors[[0, 1, 13]], 0.0)
    lengths = np.sum(vectors[2:13] ** 2, axis=1)
    assert (lengths > 0).all() and lengths.mean() == pytest.approx(1.0, rel=1e-5)


def test_items_that_the_same_users_choose_lie_close() -> None:
    rng = np.random.default_rng(3)
    users = rng.integers(2, 102, 1_500)
    # Of two tastes; nine of ten choices follow the user's.
    taste = np.where(rng.random(1_500) < 0.9, users % 2, rng.integers(2, size=1_500))
    items = 2 + taste + 2 * rng.integers(10, size=1_500)
    vectors = cooccurrence_vectors(users, items, 22, 2, seed=0)[2:]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine, alike = unit @ unit.T, np.arange(20)[:, np.newaxis] % 2 == np.arange(20) % 2
    assert cosine[alike].min() > cosine[~alike].max() + 0.5


def test_a_vector_wider_than_the_data_ends_in_zeros() -> None:
    users, items = np.array([2, 2, 3, 3]), np.array([2, 3, 2, 3])  # rank 1: both items are alike
    vectors = cooccurrence_vectors(users, items, 4, 6, seed=0)
    np.testing.assert_allclose(vectors[2], vectors[3], atol=1e-5)
    assert vectors[2] @ vectors[2] == pytest.approx(1.0, rel=1e-4)
    np.testing.assert_allclose(np.sort(np.abs(vectors[2]))[:-1], 0.0, atol=1e-5)
