"""Distillation: losses and survival by hand, the ranker as a teacher, what a pre-ranker learns from it."""

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import DataError, ShapeError
from tests.trainer import preranker_world as world
from trainer import distillation
from trainer import features as ft
from trainer.calibration import Calibrator, Curve
from trainer.distillation import (
    SURVIVAL,
    Distilled,
    Labelled,
    Teacher,
    distil,
    draw_candidates,
    item_popularity,
    latest_requests,
    listwise_loss,
    mean_scores,
    squared_loss,
    survival,
)
from trainer.preranker import catalogue_features
from trainer.preranker_config import PrerankerConfig

CONFIG = PrerankerConfig(
    vector_width=16,
    tower_width=32,
    hidden_layers=(32, 16),
    num_candidates=40,
    num_validation_users=15,
    batch_queries=20,
    learning_rate=5e-3,
    max_epochs=25,
    patience_epochs=5,
    seed=3,
)


def test_survival_is_the_share_of_the_best_that_are_kept() -> None:
    ranker = [[9.0, 8.0, 7.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]]
    ours = [[0.1, 0.9, 0.0, 0.8, 0.7], [5.0, 4.0, 3.0, 2.0, 1.0]]
    # The best three are 0, 1, 2 and 4, 3, 2; the first three by the other scores are 1, 3, 4 and 0, 1, 2.
    np.testing.assert_allclose(survival(ranker, ours, num_kept=3, num_best=3), [1 / 3, 1 / 3])
    np.testing.assert_allclose(survival(ranker, ours, num_kept=4, num_best=2), [1.0, 0.5])
    np.testing.assert_allclose(survival(ranker, ours, num_kept=5, num_best=50), [1.0, 1.0])


def test_survival_takes_the_earlier_of_equal_scores() -> None:
    np.testing.assert_allclose(survival([[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]], 1, 1), [1.0])
    np.testing.assert_allclose(survival([[0.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]], 1, 1), [0.0])


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (4,), (1, 0)])
def test_survival_of_other_shapes_is_refused(shape: tuple[int, ...]) -> None:
    other = np.zeros(shape if shape[-1] == 0 else (1, 3))
    with pytest.raises(ShapeError, match=r"expected \[U, N\] twice"):
        survival(np.zeros(shape), other)


def test_listwise_loss_is_the_cross_entropy_of_two_softmaxes() -> None:
    # Standardised scores -1 and 1, over a temperature of 2: the odds are e.
    scores = tf.constant([[10.0, 30.0]])
    second = math.e / (1 + math.e)
    logits = tf.constant([[0.0, math.log(3.0)]])
    expected = -(1 - second) * math.log(1 / 4) - second * math.log(3 / 4)
    assert listwise_loss(scores, logits, 2.0).numpy() == pytest.approx(expected, rel=1e-5)
    # The least it can be is the entropy of the targets, where the odds agree, whatever their level.
    entropy = -(1 - second) * math.log(1 - second) - second * math.log(second)
    for level in (0.0, 5.0):
        logits = tf.constant([[level, level + 1.0]])
        assert listwise_loss(scores, logits, 2.0).numpy() == pytest.approx(entropy, rel=1e-5)
    # The mean over requests; equal scores are equal targets.
    both = listwise_loss(tf.constant([[10.0, 30.0], [4.0, 4.0]]), tf.zeros([2, 2]), 2.0)
    assert both.numpy() == pytest.approx(math.log(2), rel=1e-5)


def test_squared_loss_is_towards_scores_standardised_in_their_request() -> None:
    scores = tf.constant([[10.0, 30.0], [-1.0, -1.0]])
    # Targets -1, 1 and 0, 0.
    predicted = tf.constant([[0.0, 1.0], [2.0, 0.0]])
    assert squared_loss(scores, predicted).numpy() == pytest.approx((1 + 0 + 4 + 0) / 4, rel=1e-5)


def test_candidates_are_drawn_by_popularity_and_uniformly() -> None:
    popularity = np.float32([0.1, 0.9, 0.5, 0.7])
    config = PrerankerConfig(num_candidates=1_000, popular_fraction=0.5)
    rows = draw_candidates(popularity, 100, config, np.random.default_rng(1))
    assert rows.shape == (100, 1_000) and rows.dtype == np.int32
    # Zipf's law from rank 10: 1/10, 1/11, 1/12, 1/13 for the items 1, 3, 2, 0.
    chances = np.array([1 / 13, 1 / 10, 1 / 12, 1 / 11])
    popular, uniform = (np.bincount(part.ravel()) / part.size for part in np.split(rows, 2, axis=1))
    # 50,000 draws: a standard deviation is below .002.
    np.testing.assert_allclose(popular, chances / chances.sum(), atol=0.008)
    np.testing.assert_allclose(uniform, np.full(4, 0.25), atol=0.008)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_candidates_can_all_be_popular_or_uniform(fraction: float) -> None:
    config = PrerankerConfig(num_candidates=7, popular_fraction=fraction)
    assert draw_candidates(np.zeros(3, np.float32), 2, config, np.random.default_rng(1)).shape == (2, 7)


def window(users: list[int], days: list[int], lists: list[list[int]]) -> dict[str, tf.Tensor]:
    return {
        "user_id_id": tf.constant(users),
        ft.DAYS_TO_END: tf.constant(days),
        "history_item_ids_ids": tf.constant(lists),
    }


def test_latest_request_of_each_user_is_found_across_windows() -> None:
    windows = [
        window([2, 3, 2, 4], [9, 0, 1, 5], [[1, 0], [2, 0], [3, 3], [4, 0]]),
        window([4, 2, 3], [5, 2, 7], [[5, 5, 5], [6, 0, 0], [7, 0, 0]]),
    ]
    found = latest_requests(windows, max_requests=10, seed=1)
    order = np.argsort(found["user_id_id"])
    assert found["user_id_id"][order].tolist() == [2, 3, 4]
    assert found[ft.DAYS_TO_END][order].tolist() == [1, 0, 5]
    # Of a day, the last; lists are padded to the longest.
    assert found["history_item_ids_ids"][order].tolist() == [[3, 3, 0], [2, 0, 0], [5, 5, 5]]
    assert found["user_id_id"].dtype == np.int32

    few = latest_requests(windows, max_requests=2, seed=1)
    assert len(set(few["user_id_id"].tolist())) == 2
    drawn = {tuple(latest_requests(windows, 1, seed)["user_id_id"]) for seed in range(20)}
    assert drawn == {(2,), (3,), (4,)}


def test_mean_score_of_an_item_is_relative_to_the_requests_that_saw_it() -> None:
    rows, scores = np.array([[0, 2], [2, 0], [2, 2]]), np.array([[1.0, 3.0], [10.0, 6.0], [5.0, 5.0]])
    # Less the means 2, 8 and 5: item 0 has -1 and -2, item 2 has 1, 2, 0 and 0.
    found = mean_scores(Labelled(np.zeros((3, 1)), rows, scores), 4)
    np.testing.assert_allclose(found, [-1.5, 0.0, 0.75, 0.0])


@pytest.fixture(scope="module")
def made() -> world.World:
    made = world.make_world()
    # Calibrated by surface, so that the teacher has to know the surface of each request.
    curves = {"2": Curve((0.0, 1.0), (0.0, 0.3))}
    made.ranker.calibrators = {"click": Calibrator(slices=curves)}
    return made


@pytest.fixture(scope="module")
def items(made: world.World) -> dict[str, tf.Tensor]:
    return catalogue_features(made.served.ranker, made.layer, world.SPEC, world.NOW)


@pytest.fixture(scope="module")
def requests(made: world.World) -> dict[str, np.ndarray]:
    """Eight requests of each user."""
    parts = [world.transformed(world.requests(world.USERS, seed), made.layer) for seed in range(8)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_popularity_is_the_impressions_of_all_time_of_the_item(items: dict[str, tf.Tensor]) -> None:
    # By item: impressions, click and rating of a day, then of all time.
    expected = items[ft.COUNTERS].numpy()[:, 3]
    np.testing.assert_array_equal(item_popularity(items, world.SPEC), expected)


def test_teacher_says_what_the_ranker_serves(
    made: world.World, items: dict[str, tf.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = world.requests(world.USERS[:7])
    served = made.served.rank(raw, tf.constant([world.ITEMS] * 7))["score"].numpy()
    rows = np.random.default_rng(1).integers(len(world.ITEMS), size=(7, 9)).astype(np.int32)
    # Pieces of three requests, the last one smaller.
    monkeypatch.setattr(distillation, "_PAIRS", 27)
    found = Teacher(made.ranker, items).label(world.transformed(raw, made.layer), rows)
    np.testing.assert_allclose(found.scores, np.take_along_axis(served, rows, axis=1), rtol=1e-4)
    np.testing.assert_array_equal(found.rows, rows)
    assert len(found.queries) == 7 and served.std() > 0.1


class Spy:
    """Records what the teacher is asked and what it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.users: list[set[int]] = []
        self.said: list[Labelled] = []
        label = Teacher.label

        def recorded(teacher: Teacher, features: Any, rows: Any) -> Labelled:
            self.users.append(set(features["user_id_id"].tolist()))
            self.said.append(label(teacher, features, rows))
            return self.said[-1]

        monkeypatch.setattr(Teacher, "label", recorded)


@pytest.mark.parametrize("loss", ["listwise", "squared"])
def test_pre_ranker_learns_the_order_of_the_ranker_for_other_users(
    made: world.World,
    items: dict[str, tf.Tensor],
    requests: dict[str, np.ndarray],
    loss: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy = Spy(monkeypatch)
    weights = made.ranker.get_weights()
    config = CONFIG.model_copy(update={"loss": loss})
    found = distil(made.ranker, requests, items, world.SPEC, config)
    assert found.log[-1]["train_loss"] < found.log[0]["train_loss"]
    for before, after in zip(weights, made.ranker.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)

    # Nobody is both learnt from and judged by; unknown items, row 30, are no candidates to find.
    labelled, validation = spy.said
    assert len(spy.users[1]) == 15 and not spy.users[0] & spy.users[1]
    assert labelled.rows.max() == 30 and validation.rows.max() == 29
    assert np.all(np.sort(validation.rows, axis=1) == np.arange(30))

    def kept(scores: np.ndarray) -> float:
        return float(survival(validation.scores, scores, num_kept=4, num_best=3).mean())

    table = found.student.precompute(distillation.describe_items(made.ranker, items))
    ours = distillation.score_rows(found.student, table, validation)
    same_for_all = mean_scores(labelled, 31)[validation.rows]
    # A random order keeps 4 / 30.
    assert kept(ours) > 0.75
    assert kept(ours) > kept(same_for_all) + 0.1

    # The weights are those of the epoch with the lowest loss.
    best = min(record["eval_loss"] for record in found.log)
    assert float(distillation.distillation_loss(validation.scores, ours, config)) == pytest.approx(
        best, rel=1e-4
    )


def short(made: world.World, requests: Any, items: Any, **changes: Any) -> Distilled:
    config = CONFIG.model_copy(update={"max_epochs": 1, **changes})
    return distil(made.ranker, requests, items, world.SPEC, config)


def test_same_seed_distils_the_same_pre_ranker(
    made: world.World, items: dict[str, tf.Tensor], requests: dict[str, np.ndarray]
) -> None:
    first, again, other = (short(made, requests, items, seed=seed) for seed in (5, 5, 6))
    assert set(first.log[0]) == {"epoch", "seconds", "train_loss", "eval_loss", SURVIVAL}
    # Parallel sums of float32 may differ in the last digits.
    assert first.log[-1]["eval_loss"] == pytest.approx(again.log[-1]["eval_loss"], rel=1e-4)
    assert first.log[-1]["eval_loss"] != pytest.approx(other.log[-1]["eval_loss"], rel=1e-4)
    for one, two in zip(first.student.get_weights(), again.student.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_survival_is_reported_beside_three_orders_that_are_no_model(
    made: world.World,
    items: dict[str, tf.Tensor],
    requests: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "NUM_CANDIDATES", 20)
    spy = Spy(monkeypatch)
    found = short(made, requests, items)
    assert set(found.survival) == {
        "preranking/survival_at_500",
        "preranking/same_for_all/survival_at_500",
        "preranking/popularity/survival_at_500",
        "preranking/random/survival_at_500",
    }
    # All 20 of 20 candidates are among the first 500.
    assert set(found.survival.values()) == {1.0}
    assert spy.said[1].rows.shape == (8 * 15, 20)


def test_requests_of_one_user_are_refused(
    made: world.World, items: dict[str, tf.Tensor], requests: dict[str, np.ndarray]
) -> None:
    alone = {name: column[requests["user_id_id"] == 7] for name, column in requests.items()}
    with pytest.raises(DataError, match=r"are of 1 user\(s\); expected two or more"):
        short(made, alone, items)


def test_half_of_few_users_is_left_to_learn_from(
    made: world.World,
    items: dict[str, tf.Tensor],
    requests: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy = Spy(monkeypatch)
    few = {name: column[requests["user_id_id"] < 6] for name, column in requests.items()}
    short(made, few, items, num_queries=9)
    assert [len(users) for users in spy.users] == [2, 2]
    assert len(spy.said[0].rows) == 9


def test_ranker_without_finite_scores_is_refused(
    made: world.World,
    items: dict[str, tf.Tensor],
    requests: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(made.ranker, "score", lambda outputs: outputs["click"] / 0.0)
    with pytest.raises(DataError, match="ranker's scores are not finite"):
        short(made, requests, items)


def test_diverging_training_is_refused(
    made: world.World, items: dict[str, tf.Tensor], requests: dict[str, np.ndarray]
) -> None:
    with pytest.raises(DataError, match="lower its learning_rate"):
        short(made, requests, items, learning_rate=1e30, loss="squared")
