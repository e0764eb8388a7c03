"""The two-tower model learns a planted preference, and its parts do what their docstrings say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from pydantic import ValidationError

from schema.errors import CollapsedModelError, ConfigError, DataError
from tests.trainer import retrieval_world as world
from trainer.config import FactorsConfig, HistoryConfig, LossConfig, RetrievalConfig
from trainer.hard_negatives import known_positives
from trainer.index import NO_ROW
from trainer.item_vectors import cooccurrence_vectors
from trainer.popularity import daily_popularity
from trainer.retrieval import RetrievalModel, count_positives, fit, is_positive, item_log_q
from trainer.retrieval_validation import NDCG, RECALL, ValidationUsers, validate

CONFIG = RetrievalConfig(
    embedding_dim=8, hidden_layers=(16,), batch_size=256, learning_rate=0.02, max_epochs=4, patience_epochs=1
)
NUM_IDS = world.VOCABULARY_SIZES["item_id"]


@pytest.fixture(scope="module")
def window() -> dict[str, tf.Tensor]:
    return world.training_window()


def _model(
    window: dict[str, tf.Tensor],
    config: RetrievalConfig = CONFIG,
    popularity: np.ndarray | None = None,
    item_vectors: np.ndarray | None = None,
    factors: np.ndarray | None = None,
) -> RetrievalModel:
    tf.keras.utils.set_random_seed(0)
    log_q = item_log_q(count_positives([window], NUM_IDS), world.catalogue())
    return RetrievalModel(
        config, world.SPACE, world.VOCABULARY_SIZES, log_q, popularity, item_vectors, factors
    )


def _config(**settings: Any) -> RetrievalConfig:
    """Nothing is hidden in training, and the loss is over the whole catalogue: it can be computed by hand."""
    exact = {"loss": LossConfig(uniform_negatives="all", temperature=0.5)}
    exact |= {"item_id_dropout_fraction": 0.0, "query_dropout_fraction": 0.0}
    return CONFIG.model_copy(update=exact | settings)


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
    pairs = known_positives([{**window, "click": window["retrieval_weight"]}], "click")
    return fit(
        model, batches, num_positives, world.catalogue(), world.validation_users(), config, log_file, pairs
    )


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


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(sampling_probability="streaming"),
        LossConfig(uniform_negatives=200),
        LossConfig(uniform_negatives="all"),
        LossConfig(hard_negatives=5, hard_negative_refresh_steps=20),
    ],
    ids=["streaming", "mixed", "full", "hard"],
)
def test_every_kind_of_negatives_learns_the_preference(
    loss: LossConfig, window: dict[str, tf.Tensor], tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"loss": loss, "max_epochs": 2})
    model = _model(window, config)
    popularity = _validate(model)
    _fit(model, window, tmp_path / "log.json", config)
    assert _validate(model)[RECALL] > popularity[RECALL] + 0.25


def test_loss_over_the_whole_catalogue_by_hand(window: dict[str, tf.Tensor]) -> None:
    model = _model(window, _config())
    model.use_catalogue(world.catalogue())
    batch = {name: column[:32] for name, column in window.items()}
    scores = model.query_tower(batch).numpy() @ model.encode_catalogue(world.catalogue()).T
    assert float(model.compute_loss(batch, training=True)) == pytest.approx(_loss(scores, batch), rel=1e-5)


def _loss(scores: np.ndarray, batch: dict[str, tf.Tensor]) -> float:
    """Softmax over the catalogue at temperature 0.5, mean over the batch; scores float [B, I]."""
    logits = scores / 0.5
    positive = logits[np.arange(len(logits)), batch["item_id_id"].numpy() - 2]
    costs = np.log(np.exp(logits).sum(axis=1)) - positive
    return float(np.average(costs, weights=batch["retrieval_weight"].numpy()))


def test_the_loss_counts_the_popularity_of_the_day_of_each_example(window: dict[str, tf.Tensor]) -> None:
    popularity = np.random.default_rng(0).normal(size=(NUM_IDS, world.NUM_DAYS, 2)).astype(np.float32)
    model = _model(window, _config(), popularity)
    model.use_catalogue(world.catalogue())
    batch = {name: column[:32] for name, column in window.items()}
    catalogue = world.catalogue()
    without = model.query_tower(batch).numpy() @ model.encode_catalogue(catalogue).T
    weights = np.array([0.3, -0.7], np.float32)
    model.candidate_tower.popularity_weights.assign(weights)
    of_day = (popularity @ weights)[2:, batch["days_to_train_end"].numpy()].T  # rows are ids less 2
    expected = _loss(without + of_day, batch)
    assert float(model.compute_loss(batch, training=True)) == pytest.approx(expected, rel=1e-5)
    # Every later request is one of day 0.
    served = model.query_tower(batch).numpy() @ model.encode_catalogue(catalogue).T
    np.testing.assert_allclose(served - without, np.tile((popularity[2:, 0] @ weights), (32, 1)), atol=1e-4)


def test_factors_count_in_the_scores_and_not_in_the_loss(
    window: dict[str, tf.Tensor], tmp_path: Path
) -> None:
    """They have seen the positives of the loss; and what is mined as a hard negative is hard for the loss."""
    factors = np.random.default_rng(0).normal(size=(NUM_IDS, 3)).astype(np.float32)
    settings = FactorsConfig(weight=100.0, alpha=2.0, ridge=1.0, num_factors=3)
    model = _model(window, _config(factors=settings), factors=factors)
    model.use_catalogue(world.catalogue())
    batch = {name: column[:32] for name, column in window.items()}
    queries = model.query_tower(batch, with_factors=False).numpy()
    scores = queries @ model.encode_catalogue(world.catalogue(), with_factors=False).T
    assert float(model.compute_loss(batch, training=True)) == pytest.approx(_loss(scores, batch), rel=1e-5)
    served = model.query_tower(batch).numpy() @ model.encode_catalogue(world.catalogue()).T
    assert np.abs(served - scores).max() > 1.0

    mined = CONFIG.model_copy(
        update={"factors": settings, "loss": LossConfig(hard_negatives=5), "max_epochs": 1}
    )
    _fit(_model(window, mined, factors=factors), window, tmp_path / "log.json", mined)


def test_factors_need_the_history() -> None:
    factors = FactorsConfig(weight=5.0, alpha=2.0, ridge=1.0)
    with pytest.raises(ValueError, match="ignored_features names history_item_ids; set factors to null"):
        RetrievalConfig(factors=factors, ignored_features=("history_item_ids",))


@pytest.mark.parametrize(
    "settings", [{"loss": LossConfig(hard_negatives=1)}, {"history": HistoryConfig(interests=2)}]
)
def test_what_reads_the_history_cannot_be_had_without_it(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(hard_negatives|interests) .* ignored_features names history"):
        RetrievalConfig(ignored_features=("history_item_ids",), **settings)


def test_the_loss_is_that_of_the_interest_that_fits_the_positive(window: dict[str, tf.Tensor]) -> None:
    model = _model(window, _config(history=HistoryConfig(interests=3)))
    model.use_catalogue(world.catalogue())
    batch = {name: column[:32] for name, column in window.items()}
    interests = model.query_tower(batch).numpy()
    catalogue = model.encode_catalogue(world.catalogue())
    positives = catalogue[batch["item_id_id"].numpy() - 2]
    best = [
        int(np.argmax([interest @ positive for interest in user]))
        for user, positive in zip(interests, positives, strict=True)
    ]
    assert len(set(best)) > 1
    scores = interests[np.arange(32), best] @ catalogue.T
    assert float(model.compute_loss(batch, training=True)) == pytest.approx(_loss(scores, batch), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "rolled_back", "first_weight"),
    [
        ({}, True, 1.0),
        ({"first_session_weight": 0.25}, True, 0.25),
        ({"first_session_weight": 0.0}, True, 0.0),
        ({"roll_back_to_session": False, "first_session_weight": 0.25}, False, 1.0),
    ],
    ids=["rolled back", "first session weighs less", "first session not learnt", "plain history"],
)
def test_the_history_ends_where_the_session_began(
    settings: dict[str, Any], rolled_back: bool, first_weight: float, window: dict[str, tf.Tensor]
) -> None:
    model = _model(window, _config(**settings))
    model.use_catalogue(world.catalogue())
    batch = {name: column[:32] for name, column in window.items()}
    # One event of the prior sessions; none for every fourth example, which is of a first session.
    first = np.arange(32) % 4 == 0
    prior = np.where(first[:, np.newaxis], 0, np.stack([np.arange(32) + 2, np.zeros(32)], axis=1))
    prior = tf.constant(prior, batch["history_item_ids_ids"].dtype)
    as_read = {**batch, "history_item_ids_ids": prior} if rolled_back else batch
    scores = model.query_tower(as_read).numpy() @ model.encode_catalogue(world.catalogue()).T
    as_weighed = {**batch, "retrieval_weight": tf.constant(np.where(first, first_weight, 1.0))}
    with_prior = {**batch, "prior_sessions_item_ids_ids": prior}
    loss = float(model.compute_loss(with_prior, training=True))
    assert loss == pytest.approx(_loss(scores, as_weighed), rel=1e-5)


def test_a_start_from_cooccurrence_finds_the_preference_before_the_first_step(
    window: dict[str, tf.Tensor],
) -> None:
    config = _config(item_vectors="cooccurrence")
    vectors = cooccurrence_vectors(
        window["user_id_id"].numpy(), window["item_id_id"].numpy(), NUM_IDS, config.embedding_dim, seed=0
    )
    popularity = _validate(_model(window))
    assert _validate(_model(window, config, item_vectors=vectors))[RECALL] > popularity[RECALL] + 0.2


@pytest.mark.parametrize(
    "settings",
    [
        {"history": HistoryConfig(encoder="transformer", num_blocks=1)},
        {"history": HistoryConfig(interests=2)},
        {"history": HistoryConfig(encoder="attention"), "popularity_half_lives_days": (2.0,)},
    ],
    ids=["transformer", "interests", "attention and popularity"],
)
def test_every_way_to_read_the_history_learns_the_preference(
    settings: dict[str, Any], window: dict[str, tf.Tensor], tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update=settings | {"max_epochs": 1})
    half_lives = config.popularity_half_lives_days
    model = _model(window, config, daily_popularity([window], NUM_IDS, "retrieval_weight", half_lives))
    popularity = _validate(model)
    _fit(model, window, tmp_path / "log.json", config)
    assert _validate(model)[RECALL] > popularity[RECALL] + 0.2
    learnt = model.candidate_tower.popularity_weights.numpy()
    assert len(learnt) == len(half_lives) and (learnt != 0).all()


def test_hard_negatives_and_several_interests_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match=r"interests is 2, but loss.hard_negatives"):
        RetrievalConfig(history=HistoryConfig(interests=2), loss=LossConfig(hard_negatives=1))


@pytest.mark.parametrize("loss", [LossConfig(uniform_negatives=1), LossConfig(hard_negatives=1)])
def test_negatives_from_the_catalogue_need_it(loss: LossConfig, window: dict[str, tf.Tensor]) -> None:
    model = _model(window, CONFIG.model_copy(update={"loss": loss}))
    with pytest.raises(ConfigError, match="call use_catalogue first"):
        model.compute_loss(window, training=True)


def test_hard_negatives_need_the_known_positives(window: dict[str, tf.Tensor], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"loss": LossConfig(hard_negatives=1)})
    batches = tf.data.Dataset.from_tensors(window)
    rest = (world.catalogue(), world.validation_users(), config, tmp_path / "log.json")
    with pytest.raises(ConfigError, match="pass known_positives"):
        fit(_model(window, config), batches, 1, *rest)


def test_best_epoch_is_kept_when_later_ones_are_worse(
    window: dict[str, tf.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At such a learning rate the model collapses, which is for the next test.
    monkeypatch.setattr("trainer.retrieval.check_not_collapsed", lambda *_: None)
    config = CONFIG.model_copy(update={"learning_rate": 1.0, "max_epochs": 5, "max_steps_per_epoch": 10})
    model = _model(window, config)
    log = _fit(model, window, tmp_path / "log.json", config)
    assert len(log) < 5 and log[-1][RECALL] <= max(entry[RECALL] for entry in log)
    assert _validate(model)[RECALL] == pytest.approx(max(entry[RECALL] for entry in log))


def test_training_that_ends_in_a_collapse_is_refused(window: dict[str, tf.Tensor], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 0.0, "max_epochs": 1, "max_steps_per_epoch": 1})
    model = _model(window, config)
    few = {name: column[:256] for name, column in window.items()}
    model.compute_loss(few)  # makes the weights
    # Sabotage: whatever is known of a user, the query is the same.
    for weight in model.query_tower.mlp.trainable_weights:
        weight.assign(tf.zeros_like(weight))
    with pytest.raises(CollapsedModelError, match="recommends the same to everybody"):
        _fit(model, few, tmp_path / "log.json", config)


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
