"""The two-tower model learns a planted preference, and its parts do what their docstrings say."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import DataError
from tests.trainer import retrieval_world as world
from trainer.config import RetrievalConfig
from trainer.index import NO_ROW
from trainer.retrieval import RetrievalModel, count_positives, fit, is_positive, item_log_q
from trainer.retrieval_validation import NDCG, RECALL, ValidationUsers, validate

CONFIG = RetrievalConfig(
    embedding_dim=8, hidden_layers=(16,), batch_size=256, learning_rate=0.02, max_epochs=4, patience_epochs=1
)
NUM_IDS = world.VOCABULARY_SIZES["item_id"]


@pytest.fixture(scope="module")
def window() -> dict[str, tf.Tensor]:
    return world.training_window()


def _model(window: dict[str, tf.Tensor], config: RetrievalConfig = CONFIG) -> RetrievalModel:
    tf.keras.utils.set_random_seed(0)
    log_q = item_log_q(count_positives([window], NUM_IDS), world.catalogue())
    return RetrievalModel(config, world.SPACE, world.VOCABULARY_SIZES, log_q)


def _validate(model: RetrievalModel) -> dict[str, float]:
    users = world.validation_users()
    return validate(model.encode_users(users.query), model.encode_catalogue(world.catalogue()), users)


def _fit(
    model: RetrievalModel, window: dict[str, tf.Tensor], log_file: Path, config: RetrievalConfig = CONFIG
) -> list[dict[str, float]]:
    batches = (
        tf.data.Dataset.from_tensor_slices(window).shuffle(20_000, seed=0).batch(config.batch_size, True)
    )
    num_positives = len(window["retrieval_weight"])
    return fit(model, batches, num_positives, world.catalogue(), world.validation_users(), config, log_file)


def test_untrained_model_ranks_by_popularity(window: dict[str, tf.Tensor]) -> None:
    scores = _model(window).encode_catalogue(world.catalogue())[:, -1]
    counts = np.bincount(window["item_id_id"].numpy(), minlength=NUM_IDS)[2:]
    np.testing.assert_array_equal(np.argsort(-scores, kind="stable"), np.argsort(-counts, kind="stable"))


def test_learns_a_planted_preference_far_beyond_popularity(
    window: dict[str, tf.Tensor], tmp_path: Path
) -> None:
    model = _model(window)
    popularity = _validate(model)
    log_file = tmp_path / "run" / "training_log.json"
    log = _fit(model, window, log_file)
    assert _validate(model)[RECALL] > popularity[RECALL] + 0.3
    assert json.loads(log_file.read_text()) == log and [entry["epoch"] for entry in log] == list(
        range(1, len(log) + 1)
    )
    # A new item, known only by its genre, goes to the users of that genre.
    genres = np.arange(world.NUM_SEGMENTS)
    new = model.candidate_tower(
        {"item_id_id": genres * 0 + 1, "genres_ids": genres[:, np.newaxis] + 2}
    ).numpy()
    users = world.validation_users()
    queries = model.encode_users(users.query)
    chosen = np.argmax(queries @ new.T, axis=1)
    assert np.mean(chosen == np.arange(len(users)) % world.NUM_SEGMENTS) > 0.9


def test_best_epoch_is_kept_when_later_ones_are_worse(window: dict[str, tf.Tensor], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1.0, "max_epochs": 5, "max_steps_per_epoch": 10})
    model = _model(window, config)
    log = _fit(model, window, tmp_path / "log.json", config)
    assert len(log) < 5 and log[-1][RECALL] <= max(entry[RECALL] for entry in log)
    assert _validate(model)[RECALL] == pytest.approx(max(entry[RECALL] for entry in log))


def test_embedding_gradients_are_sparse(window: dict[str, tf.Tensor]) -> None:
    model = _model(window)
    batch = {name: column[:64] for name, column in window.items()}
    with tf.GradientTape() as tape:
        loss = model.compute_loss(batch, training=True)
    gradients = tape.gradient(loss, model.trainable_variables)
    dense = [
        v.name
        for v, g in zip(model.trainable_variables, gradients, strict=True)
        if "embedding" in v.name and not isinstance(g, tf.IndexedSlices)
    ]
    assert not dense


def test_a_diverged_training_is_refused(window: dict[str, tf.Tensor], tmp_path: Path) -> None:
    model = _model(window)
    broken = {**window, "retrieval_weight": tf.fill([20_000], float("nan"))}
    with pytest.raises(DataError, match=r"loss became nan in epoch 1; lower learning_rate"):
        _fit(model, broken, tmp_path / "log.json")


def test_positives_are_counted_by_weight_and_unknown_items_share_their_mean() -> None:
    window = {
        "item_id_id": tf.constant([2, 2, 1, 1, 3, 3]),
        "retrieval_weight": tf.constant([1.0, 1.0, 1.0, 1.0, 0.0, float("nan")]),
    }
    assert is_positive(window).numpy().tolist() == [True, True, True, True, False, False]
    counts = count_positives([window], 4)
    assert counts.tolist() == [0, 2, 2, 0]

    class FourNewItems:
        transformed = {"item_id_id": np.array([1, 1, 1, 1, 2, 3])}  # noqa: RUF012

    # Smoothed counts: padding .5, unknown 2/4 + .5, then 2.5 and .5.
    expected = np.array([0.5, 1.0, 2.5, 0.5]) / 4.5
    np.testing.assert_allclose(np.exp(item_log_q(counts, FourNewItems())), expected, rtol=1e-6)  # type: ignore[arg-type]


def test_training_without_positives_is_refused() -> None:
    window = {"item_id_id": tf.constant([2]), "retrieval_weight": tf.constant([0.0])}
    with pytest.raises(DataError, match=r"retrieval_weight > 0"):
        count_positives([window], 4)


def test_validation_by_hand_with_seen_items_left_out() -> None:
    # Scores of five items for user 0: 5, 4, 3, 2, 1; item 0 is seen, so item 2 has rank 2 and item 4 rank 4.
    candidates = np.array([[5.0], [4.0], [3.0], [2.0], [1.0]], np.float32)
    users = ValidationUsers({}, [[2, 4], [0]], np.array([[0, NO_ROW], [NO_ROW, NO_ROW]], np.int32))
    measured = validate(np.ones((2, 1), np.float32), candidates, users)
    ndcg_0 = (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert measured[RECALL] == 1.0
    assert measured[NDCG] == pytest.approx((ndcg_0 + 1) / 2)
