"""The retrieval baselines of the pipeline, on a world of two tastes."""

import numpy as np
import pytest
import scipy.sparse as sp

from schema.errors import ConfigError, ShapeError
from trainer import retrieval_baselines
from trainer.retrieval_baselines import (
    EvalUsers,
    TrainPositives,
    baseline_lists,
    best_unseen,
    ials,
)

DAY = 86_400
NUM_ITEMS = 12


@pytest.fixture(scope="module")
def train() -> TrainPositives:
    """Users of even number choose five of items 0 to 5, the others of 6 to 11; nobody all six."""
    rng = np.random.default_rng(4)
    users = np.repeat(np.arange(40), 5)
    items = np.concatenate([rng.permutation(6)[:5] + 6 * (user % 2) for user in range(40)])
    return TrainPositives(users, items, np.arange(200) * DAY, 40, NUM_ITEMS)


NOBODY = EvalUsers([], [])


@pytest.fixture(scope="module")
def lists(train: TrainPositives) -> dict[str, np.ndarray]:
    seen = [train.items[train.users == 0], train.items[train.users == 1], np.empty(0, np.int64)]
    uploads = np.arange(NUM_ITEMS) * DAY
    return baseline_lists(train, seen, 3, uploads, NOBODY)[0]


def test_models_of_taste_find_the_one_item_of_it_that_is_left(
    train: TrainPositives, lists: dict[str, np.ndarray]
) -> None:
    for user, taste in ((0, range(6)), (1, range(6, 12))):
        (left,) = set(taste) - set(train.items[train.users == user].tolist())
        assert lists["item_knn"][user, 0] == left
        # The ridge that suits thousands of users says nothing on forty.
        history = train.matrix()[user]
        scores = ials(train.matrix(), alpha=10.0, ridge_per_alpha=0.01)(history)
        assert best_unseen(scores, history, 1).tolist() == [[left]]


def test_no_list_holds_what_the_user_has_seen_or_an_item_twice(
    train: TrainPositives, lists: dict[str, np.ndarray]
) -> None:
    for ranked in lists.values():
        assert ranked.shape == (3, 3)
        for user in (0, 1):
            assert not set(ranked[user]) & set(train.items[train.users == user].tolist())
            assert len(set(ranked[user])) == 3


def test_users_without_a_history_get_recent_popularity_and_the_note_says_so(
    train: TrainPositives, lists: dict[str, np.ndarray]
) -> None:
    for name in ("item_knn", "ials"):
        np.testing.assert_array_equal(lists[name][2], lists["recent_popularity"][2])
    nothing = np.empty(0, np.int64)
    for seen, said in (([nothing, train.items[:5]], True), ([train.items[:5]], False)):
        notes = baseline_lists(train, seen, 3, None, NOBODY)[1]
        assert ("1 users without a history get recent popularity" in notes["ials"]) is said


def test_the_newest_come_by_upload_time_where_there_is_one(
    train: TrainPositives, lists: dict[str, np.ndarray]
) -> None:
    assert lists["newest"][2].tolist() == [11, 10, 9]
    assert "newest" not in baseline_lists(train, [np.empty(0, np.int64)], 3, None, NOBODY)[0]


def test_only_the_latest_positives_are_fitted_on_and_the_note_says_so(
    train: TrainPositives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval_baselines, "MAX_POSITIVES", 5)
    assert train.matrix().sum() == 5
    assert train.matrix()[39].sum() == 5
    notes = baseline_lists(train, [train.items[:5]], 3, None, NOBODY)[1]
    assert "on 5 of 200 train positives" in notes["ials"]


def test_settings_are_chosen_by_what_eval_users_went_on_to_choose() -> None:
    # One setting puts item 1 first, the other item 2; two of three users chose 2.
    first, second = (np.eye(4)[item] for item in (1, 2))
    choices = {
        "one": lambda history: np.tile(first, (history.shape[0], 1)),
        "two": lambda history: np.tile(second, (history.shape[0], 1)),
    }
    seen = [np.array([0])] * 3
    users = EvalUsers(seen, [np.array([1]), np.array([2]), np.array([2])])
    assert retrieval_baselines._best(choices, users, 1, 4) == "two"
    assert retrieval_baselines._best(choices, NOBODY, 1, 4) == "one"


def test_best_unseen_items_come_by_score_then_by_catalogue_order() -> None:
    scores = np.array([[1.0, 3.0, 3.0, 2.0], [9.0, 8.0, 7.0, 6.0]])
    seen = sp.csr_matrix(np.array([[0, 1, 0, 0], [1, 1, 1, 0]]))
    assert best_unseen(scores, seen, 3).tolist() == [[2, 3, 0], [3, -1, -1]]
    assert best_unseen(scores, seen, 6).tolist() == [[2, 3, 0, -1, -1, -1], [3, -1, -1, -1, -1, -1]]
    with pytest.raises(ConfigError, match="k is 0"):
        best_unseen(scores, seen, 0)
    with pytest.raises(ShapeError, match="expected the same"):
        best_unseen(scores[:1], seen, 1)
