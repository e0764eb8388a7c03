import numpy as np
import pytest
import scipy.sparse as sp

from benchmarks.baselines import BASELINES, Baseline
from benchmarks.protocols import global_temporal
from tests.benchmarks.tiny_tables import tables

DAY = 86_400


@pytest.fixture(scope="module")
def protocol():
    """c comes before b and a, so that an order of items by first event would differ from the catalogue's."""
    return global_temporal(
        tables(
            ("u", "c", 0, "train"),
            ("u", "b", 2 * DAY, "train"),
            ("v", "b", 4 * DAY, "train"),
            ("v", "a", 4 * DAY, "train"),
            ("w", "c", 4 * DAY, "train"),
            ("w", "b", 4 * DAY, "train"),
            ("u", "a", 5 * DAY, "eval"),
            ("u", "d", 6 * DAY, "test"),
        )
    )


def ease_oracle(x, ridge):
    """Steck 2019: B = I - P / diag(P), P = (XᵀX + λI)^-1, over the items that somebody chose."""
    inverse = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


def test_ease_equals_the_closed_form_and_gives_nothing_to_items_without_training(protocol):
    score = BASELINES["EASE"].fit(protocol, 0, {"regularization": 0.5})
    known = protocol.train.toarray()[:, :3]
    history = np.array([[1.0, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 1.0]], np.float32)
    scores = score(sp.csr_matrix(history))
    # float32 inside the library
    np.testing.assert_allclose(scores[:, :3], history[:, :3] @ ease_oracle(known, 0.5), atol=1e-5)
    assert not scores[:, 3:].any()


def test_recency_prior_halves_every_two_days_and_scales_positive_scores(protocol):
    parameters = {"regularization": 0.5}
    history = protocol.train
    plain = BASELINES["EASE"].fit(protocol, 0, parameters)(history)
    scores = BASELINES["EASE x recency"].fit(protocol, 0, parameters)(history)
    # Ages in days: a 0; b 2, 0, 0; c 4, 0.
    prior = np.array([1 + 1, 1 + 0.5 + 1 + 1, 1 + 0.25 + 1, 1, 1])
    np.testing.assert_allclose(scores, np.maximum(plain, 0) * prior, atol=1e-6)


def test_item_knn_scores_what_was_chosen_together(protocol):
    score = BASELINES["item-kNN"].fit(protocol, 0, {"K": 5, "K1": 100.0, "B": 0.2})
    scores = score(sp.csr_matrix(np.array([[0, 0, 1, 0, 0]], np.float32)))[0]
    assert scores[1] > 0  # b was chosen with c, by two users
    assert not scores[[0, 3, 4]].any()


def test_ials_scores_users_by_their_history_and_depends_on_the_seed(protocol):
    parameters = {"alpha": 10.0, "regularization_per_alpha": 0.01}
    scores = [BASELINES["iALS"].fit(protocol, seed, parameters)(protocol.train) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])
    assert (scores[0][:, :3][protocol.train.toarray()[:, :3] > 0] > 0.5).all()


def test_choices_are_every_combination_of_the_grid():
    grid = {"x": (1, 2), "y": (3, 4)}
    choices = list(Baseline(lambda protocol, seed, parameters: lambda history: history, grid).choices())
    assert choices == [{"x": 1, "y": 3}, {"x": 1, "y": 4}, {"x": 2, "y": 3}, {"x": 2, "y": 4}]
    assert list(BASELINES["popularity"].choices()) == [{}]
