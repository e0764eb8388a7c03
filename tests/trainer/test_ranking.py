"""The ranker on a planted signal, its base-rate start, its loss, early stopping."""

import math

import numpy as np
import pytest
import tensorflow as tf

from schema.contract import WatchTimeMethod
from schema.errors import ConfigError, DataError
from tests.trainer import ranking_world as world
from trainer import baselines, features, metrics
from trainer.body_config import ExpertsConfig, InteractionConfig, PastConfig
from trainer.calibration_config import CalibrationConfig
from trainer.config import RankingConfig
from trainer.debiasing import PositionStatistics
from trainer.debiasing_config import PositionConfig
from trainer.label_statistics import LabelStatistics, label_statistics
from trainer.ranking import RankingModel, calibrate, evaluate, train

CONFIG = RankingConfig(
    experts=ExpertsConfig(hidden_layers=(16,)),
    batch_size=64,
    learning_rate=0.01,
    max_epochs=4,
    max_embedding_width=4,
)
SPEC = world.spec()
_QUERY = features.feature_space(SPEC).query
QUERY_NAMES = (*(n for f in _QUERY for n in f.transformed_names), *features.impression_names(SPEC))


def untrained(rows: world.Rows, config: RankingConfig = CONFIG) -> RankingModel:
    tf.keras.utils.set_random_seed(config.seed)
    statistics = label_statistics([rows], SPEC.tasks)
    return RankingModel(SPEC, world.VOCABULARY_SIZES, statistics, world.attributes(SPEC), config)


def opinionated(rows: world.Rows, config: RankingConfig = CONFIG) -> RankingModel:
    """Untrained, but its heads say something else of every row: equal outputs cannot be calibrated."""
    model = untrained(rows, config)
    model(rows)
    for head in model.heads.values():
        head.kernel.assign(tf.random.stateless_normal(head.kernel.shape, seed=(1, 2), stddev=0.3))
    return model


def outputs_of(model: RankingModel, rows: world.Rows) -> dict[str, tf.Tensor]:
    return model.predictions(model(rows), rows)


def test_untrained_model_serves_the_training_mean_of_every_task() -> None:
    rows = world.rows(256, seed=1)
    model = untrained(rows)
    served = outputs_of(model, rows)
    for task in SPEC.tasks:
        np.testing.assert_allclose(served[task.name], np.nanmean(rows[task.label]), rtol=1e-5)
    score = model.score(served)
    np.testing.assert_allclose(score, 2.0 * served["click"] + 0.1 * served["watch"], rtol=1e-5)


def test_item_embeddings_start_from_the_vectors_given_and_are_trained() -> None:
    rows = world.rows(128, seed=1)
    width = 4  # of CONFIG, at most
    vectors = np.arange(float((world.NUM_ITEMS + 2) * width)).reshape(-1, width).astype(np.float32)
    statistics = label_statistics([rows], SPEC.tasks)
    model = RankingModel(
        SPEC, world.VOCABULARY_SIZES, statistics, world.attributes(SPEC), CONFIG, item_vectors=vectors
    )
    model(rows)
    table = model.tables.tables[features.ITEM_SPACE]
    np.testing.assert_array_equal(table.embeddings, vectors)
    assert table.trainable


def test_trained_model_finds_a_signal_that_item_means_cannot_see() -> None:
    rows, held_out = world.rows(3000, seed=1), world.rows(1000, seed=2)
    model = untrained(rows)
    log = train(model, world.batches(rows, 64, seed=1), world.batches(held_out, 256), CONFIG)
    served = outputs_of(model, held_out)

    item_means = baselines.item_mean(
        rows["item_id_id"].tolist(), rows["click"], held_out["item_id_id"].tolist()
    )
    assert metrics.auc(held_out["click"], item_means) < 0.6
    # A click is known with a chance of .8: the best possible AUC is .8.
    assert metrics.auc(held_out["click"], served["click"]) > 0.74
    assert np.mean(served["click"]) == pytest.approx(held_out["click"].mean(), rel=0.1)

    # The odds are the expected watch time of both kinds of rows; 500 exponential labels have 4.5 % of noise.
    match = held_out["user_id_id"] % 2 == held_out["item_id_id"] % 2
    for is_match, expected in world.MEAN_WATCH_S.items():
        assert np.mean(served["watch"].numpy()[match == is_match]) == pytest.approx(expected, rel=0.25)

    final = min(log, key=lambda record: record["eval_loss"])
    assert final["ranking/click/auc"] == pytest.approx(metrics.auc(held_out["click"], served["click"]))
    has_rating = ~np.isnan(held_out["rating"])
    expected_mae = np.abs(held_out["rating"] - served["stars"].numpy())[has_rating].mean()
    assert final["ranking/stars/mae"] == pytest.approx(expected_mae, rel=1e-5)
    assert final["ranking/watch/calibration"] == pytest.approx(
        np.mean(served["watch"]) / held_out["watch_time_s"].mean(), rel=1e-5
    )


def test_loss_is_the_weighted_sum_of_mean_task_losses_over_labelled_rows() -> None:
    rows = world.rows(64, seed=3)
    rows["rating"][:] = np.nan
    rows["rating"][5] = 7.0
    rate = LabelStatistics(64, 0.5, 0.5, 0.0, 1.0)
    watch = LabelStatistics(64, float(rows["watch_time_s"].mean()), 1.0, 0.0, 100.0)
    stars = LabelStatistics(64, 3.0, 2.0, 1.0, 7.0)
    statistics = {"click": rate, "watch": watch, "stars": stars}
    model = RankingModel(SPEC, world.VOCABULARY_SIZES, statistics, world.attributes(SPEC), CONFIG)
    # Untrained: ln 2 for the click, 2 ln 2 for average watch times, ((7 - 3) / 2)^2 on one row.
    expected = math.log(2) + 0.5 * 4.0 + 2 * math.log(2)
    assert model.compute_loss(rows).numpy() == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, world.batches(rows, 10))["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_being_seen_is_in_the_loss_of_every_threshold_and_averaged_in_what_is_served() -> None:
    *others, watch = SPEC.tasks
    watch = watch.model_copy(update={"method": WatchTimeMethod.ORDINAL, "num_thresholds": 3})
    spec = world.spec(tasks=[task.model_dump() for task in (*others, watch)])
    rows = world.rows(256, seed=1)
    rows["position"] = np.arange(256) % 3 + 1
    statistics = label_statistics([rows], spec.tasks)
    # Seen with a chance of 1, .75 and .25; the average impression with one of .775.
    positions = PositionStatistics([[0, 50, 30, 20]] * 4, [[8.0, 8.0, 6.0, 2.0]] * 4)
    config = CONFIG.model_copy(update={"position": PositionConfig(kind="pal", max_position=3)})
    by_task = {"click": positions, "watch": positions}
    model = RankingModel(spec, world.VOCABULARY_SIZES, statistics, world.attributes(spec), config, by_task)
    served = outputs_of(model, rows)["watch"]
    np.testing.assert_allclose(served, rows["watch_time_s"].mean(), rtol=1e-4)
    rates = np.array(statistics["watch"].exceedance)
    assert rates.max() / 0.775 < 0.99
    shown = np.array([1.0, 0.75, 0.25])[rows["position"] - 1, np.newaxis] * rates / 0.775
    above = rows["watch_time_s"][:, np.newaxis] > np.array(statistics["watch"].thresholds[0])
    expected = -np.where(above, np.log(shown), np.log1p(-shown)).mean()
    total, weight = model.task_losses(model(rows), rows)["watch"]
    assert float(total / weight) == pytest.approx(expected, rel=1e-4)


def test_task_without_labels_in_a_batch_leaves_its_head_alone() -> None:
    rows = world.rows(64, seed=3)
    model = untrained(rows)
    rows["rating"][:] = np.nan
    with tf.GradientTape() as tape:
        loss = model.compute_loss(rows, training=True)
    gradients = tape.gradient(loss, [model.heads[name].kernel for name in ("click", "stars")])
    assert np.any(gradients[0].numpy() != 0)
    assert np.all(gradients[1].numpy() == 0)


def test_unknown_ids_are_trained_although_no_row_has_one() -> None:
    rows = world.rows(512, seed=4)
    model = untrained(rows, CONFIG.model_copy(update={"id_dropout_fraction": 0.3, "max_epochs": 1}))
    model(rows)
    before = model.tables.tables["user_id"].embeddings.numpy()[1]
    train(model, world.batches(rows, 64, seed=1), world.batches(rows, 256), CONFIG)
    assert not np.allclose(before, model.tables.tables["user_id"].embeddings.numpy()[1])


def test_weights_of_the_best_epoch_are_kept_and_training_stops_after_patience() -> None:
    rows = world.rows(512, seed=5)
    # Labels of the held-out rows are turned around: the more the model learns, the worse it does there.
    held_out = {**rows, "click": 1 - rows["click"], "watch_time_s": rows["watch_time_s"][::-1].copy()}
    config = CONFIG.model_copy(update={"patience_epochs": 2, "max_epochs": 9, "learning_rate": 0.02})
    model = untrained(rows, config)
    log = train(model, world.batches(rows, 64, seed=1), world.batches(held_out, 256), config)
    losses = [record["eval_loss"] for record in log]
    best = int(np.argmin(losses))
    assert len(log) == best + 1 + 2 < 9
    assert evaluate(model, world.batches(held_out, 256))["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert losses[-1] > losses[best]


def test_same_seed_trains_the_same_model() -> None:
    rows = world.rows(256, seed=6)
    config = CONFIG.model_copy(update={"max_epochs": 1})
    losses = [
        train(untrained(rows, config), world.batches(rows, 64, seed=1), world.batches(rows, 256), config)[0]
        for _ in range(2)
    ]
    # Parallel sums of float32 may differ in the last digits.
    assert losses[0]["eval_loss"] == pytest.approx(losses[1]["eval_loss"], rel=1e-4)


def test_metric_that_the_validation_rows_cannot_define_is_nan() -> None:
    rows = world.rows(64, seed=7)
    model = untrained(rows)
    rows["click"][:] = 0
    rows["rating"][:] = np.nan
    result = evaluate(model, world.batches(rows, 64))
    assert math.isfinite(result["eval_loss"])
    assert all(
        math.isnan(result[f"ranking/{name}"]) for name in ("click/auc", "click/calibration", "stars/mae")
    )


def test_empty_validation_split_is_refused() -> None:
    rows = world.rows(64, seed=8)
    with pytest.raises(DataError, match="no validation rows"):
        evaluate(untrained(rows), world.batches(rows, 64).take(0))


def test_diverging_training_is_refused() -> None:
    rows = world.rows(64, seed=9)
    model = untrained(rows)
    rows["rating"][3] = np.inf
    with pytest.raises(DataError, match="loss is inf in epoch 1"):
        train(model, world.batches(rows, 64), world.batches(rows, 64), CONFIG)


def test_history_changes_the_preference_between_items_even_without_hidden_layers() -> None:
    rows = world.rows(64, seed=1)
    linear = {"experts": ExpertsConfig(hidden_layers=()), "interaction": InteractionConfig(kind="none")}
    model = untrained(rows, CONFIG.model_copy(update=linear))
    model(rows)
    for head in model.heads.values():
        head.kernel.assign(tf.ones_like(head.kernel))
    # Two requests that differ in their history only, each with the same two items.
    pairs = {name: np.stack([column[0]] * 4) for name, column in rows.items()}
    pairs["item_id_id"] = np.array([2, 3, 2, 3])
    pairs["history_item_ids_ids"] = np.array([[2, 0], [2, 0], [3, 0], [3, 0]])
    first, second, first_later, second_later = model(pairs)["click"].numpy()[:, 0]
    # A linear head adds the same to both items, whatever the history: only their interaction can do this.
    assert abs((first - second) - (first_later - second_later)) > 1e-4


def test_a_candidate_with_a_value_that_the_query_names_too_is_told_from_others() -> None:
    followed = {"name": "followed", "kind": "multi_categorical", "space": "creator_id"}
    spec = world.spec(
        users={"files": ["users.csv"], "columns": {"user_id": "user_id"}, "features": [followed]}
    )
    rows = {name: np.repeat(column[:1], 4, axis=0) for name, column in world.rows(64, seed=1).items()}
    linear = {"experts": ExpertsConfig(hidden_layers=()), "interaction": InteractionConfig(kind="none")}
    rows["followed_ids"] = np.array([[3, 2], [3, 4], [0, 0], [1, 0]], np.int32)
    # The creator that the first follows, not one that the second does, one of nobody's, an unknown one.
    rows["creator_id_id"] = np.array([2, 2, 2, 1], np.int32)
    statistics = label_statistics([world.rows(64, seed=1)], spec.tasks)
    config = CONFIG.model_copy(update=linear)
    model = RankingModel(spec, world.VOCABULARY_SIZES, statistics, world.attributes(spec), config)
    before = model(rows)["click"].numpy()[:, 0]
    kernel = model.heads["click"].kernel
    # What both sides name is the last of the inputs.
    kernel.assign(np.eye(1, kernel.shape[0], kernel.shape[0] - 1).T)
    np.testing.assert_allclose(model(rows)["click"].numpy()[:, 0] - before, [1, 0, 0, 0], atol=1e-6)


def test_candidates_of_one_query_get_the_logits_of_rows_of_their_own() -> None:
    rows = world.rows(12, seed=2)
    model = untrained(rows)
    model(rows)
    for weight in model.trainable_weights:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.3))
    # Three queries with four candidates each: the query side of every fourth row, repeated.
    repeated = {name: np.repeat(column[::4], 4, axis=0) for name, column in rows.items()}
    queries = {name: column[::4] for name, column in rows.items()}
    together = model.logits(model.encode_query(queries), rows, num_candidates=4)
    sides = {**rows, **{name: repeated[name] for name in QUERY_NAMES}}
    one_by_one = model(sides)
    for name, logits in together.items():
        np.testing.assert_allclose(logits, one_by_one[name], rtol=1e-4, atol=1e-5)
        assert len(np.unique(np.round(logits, 4))) == 12


def test_candidates_compared_by_context_get_the_logits_of_rows_of_their_own() -> None:
    *others, watch = SPEC.model_dump(mode="json")["tasks"]
    spec = world.spec(tasks=[*others, watch | {"method": "ordinal", "duration_feature": "length"}])
    rows, shown = world.rows(12, seed=2), world.rows(200, seed=3)
    statistics = label_statistics([shown], spec.tasks, world.VOCABULARY_SIZES["surface"], "surface_id")
    settings = CONFIG.model_copy(update={"past": PastConfig(contexts=True)})
    tf.keras.utils.set_random_seed(1)
    model = RankingModel(spec, world.VOCABULARY_SIZES, statistics, world.attributes(spec), settings)
    model(rows)
    for weight in model.trainable_weights:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.3))
    queries = {name: column[::4] for name, column in rows.items()}
    together = model.logits(model.encode_query(queries), rows, num_candidates=4)
    one_by_one = model({**rows, **{name: np.repeat(queries[name], 4, axis=0) for name in QUERY_NAMES}})
    for name, logits in together.items():
        np.testing.assert_allclose(logits, one_by_one[name], rtol=1e-4, atol=1e-4)
    # Another length of a candidate is another group of impressions.
    longer = {**rows, "length_bucket": np.full_like(rows["length_bucket"], 32)}
    assert not np.allclose(model(longer)["click"], model(rows)["click"])


@pytest.mark.parametrize("step", [0, 3], ids=["the same item", "another item of its creator"])
def test_what_became_of_earlier_impressions_of_the_same_is_learnt(step: int) -> None:
    shown, fresh = world.rows(3000, seed=1), world.rows(1000, seed=2)
    for rows in (shown, fresh):
        click = (
            np.random.default_rng(len(rows["click"])).integers(0, 2, len(rows["click"])).astype(np.float32)
        )
        item = rows["item_id_id"] - 2
        rows["click"] = click
        # Of two impressions one was clicked: if this one will be, then that of the item or its creator.
        # Items that are three numbers apart have the same creator, the next item has another one.
        rows["impression_item_ids_ids"][:] = 0
        rows["impression_item_ids_ids"][:, 0] = 2 + (item + step) % world.NUM_ITEMS
        rows["impression_item_ids_ids"][:, 1] = 2 + (item + 1) % world.NUM_ITEMS
        rows["impression_ages_s"][:] = 60
        rows["impression_click"][:, :2] = np.stack([click, 1 - click], axis=1)
    model = untrained(shown)
    train(model, world.batches(shown, 64, seed=1), world.batches(fresh, 256), CONFIG)
    assert metrics.auc(fresh["click"], outputs_of(model, fresh)["click"]) > 0.95


def test_impressions_of_training_rows_are_not_grouped() -> None:
    rows = world.rows(8, seed=1)
    model = untrained(rows)
    specs = {name: tf.TensorSpec([None, *column.shape[1:]], column.dtype) for name, column in rows.items()}
    # Parsed examples have lists of any length.
    specs[features.LABEL_MEANS] = tf.TensorSpec([None, None], tf.float32)
    graph = tf.function(model, autograph=False).get_concrete_function(specs).graph
    # Which would sort them anew for every row.
    assert not [op for op in graph.get_operations() if op.type == "LowerBound"]


def test_counters_are_learnt() -> None:
    rows, held_out = world.rows(3000, seed=1), world.rows(1000, seed=2)
    for data in (rows, held_out):
        rng = np.random.default_rng(5)
        data["click"] = (rng.random(len(data["click"])) < data["item_counters"][:, 7]).astype(np.float32)
    model = untrained(rows)
    train(model, world.batches(rows, 64, seed=1), world.batches(held_out, 256), CONFIG)
    # A click happens with the chance that the counter says: its AUC is the best there is.
    best = metrics.auc(held_out["click"], held_out["item_counters"][:, 7])
    assert metrics.auc(held_out["click"], outputs_of(model, held_out)["click"]) > best - 0.03


def test_calibrated_outputs_agree_on_average_with_the_rows_they_were_fitted_on() -> None:
    rows, held_out = world.rows(512, seed=1), world.rows(600, seed=2)
    model = opinionated(rows)
    raw = outputs_of(model, held_out)
    # The order is right here, the level is not.
    rates = 0.3 * raw["click"].numpy()
    held_out["click"] = (np.random.default_rng(3).random(600) < rates).astype(np.float32)
    held_out["watch_time_s"] *= 2
    batches = world.batches(held_out, 256)
    before = evaluate(model, batches)
    calibrate(model, batches, CalibrationConfig(method="platt"))
    after, served = evaluate(model, batches), outputs_of(model, held_out)
    for task in ("click", "watch"):
        assert after[f"ranking/{task}/calibration"] == pytest.approx(1, abs=0.01)
        assert abs(before[f"ranking/{task}/calibration"] - 1) > 0.3
        assert not np.allclose(served[task], raw[task])
    # The loss is that of the logits, which calibration leaves alone.
    assert after["eval_loss"] == pytest.approx(before["eval_loss"])
    logits = model(held_out)
    for task, values in model.raw_predictions(logits, held_out).items():
        np.testing.assert_array_equal(values, raw[task])


def test_every_surface_is_calibrated_on_its_own_rows() -> None:
    rows, held_out = world.rows(512, seed=1), world.rows(3000, seed=2)
    config = CalibrationConfig(method="platt", slice_feature="surface", min_slice_rows=100)
    model = opinionated(rows, CONFIG.model_copy(update={"calibration": config}))
    output = outputs_of(model, held_out)["click"].numpy()
    # The order is right on every surface, the level on none.
    rates = np.array([0.0, 0.1, 0.3, 0.6])[held_out["surface_id"]] * output / output.mean()
    held_out["click"] = (np.random.default_rng(3).random(3000) < rates).astype(np.float32)
    calibrate(model, world.batches(held_out, 512), config)
    served = outputs_of(model, held_out)["click"].numpy()
    for surface in (1, 2, 3):
        mine = held_out["surface_id"] == surface
        assert served[mine].mean() == pytest.approx(held_out["click"][mine].mean(), abs=0.05)


def test_only_a_single_valued_categorical_query_feature_can_be_a_slice() -> None:
    for name in ("creator_id", "age", "history_item_ids", "nothing"):
        config = CalibrationConfig(method="platt", slice_feature=name)
        with pytest.raises(ConfigError, match=rf"slice_feature is '{name}'; expected .*: user_id, surface"):
            untrained(world.rows(64, seed=1), CONFIG.model_copy(update={"calibration": config}))


def ignoring(*names: str) -> tuple[RankingModel, dict[str, tf.Tensor]]:
    """A model with random weights that has no inputs of these names, and its rows."""
    rows = world.rows(64, seed=1)
    model = untrained(rows, CONFIG.model_copy(update={"ignored_features": names}))
    model(rows)
    for weight in model.trainable_weights:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.3))
    return model, rows


def test_ignored_features_change_nothing() -> None:
    model, rows = ignoring("length", "age")
    other = world.rows(64, seed=9)
    changed = {**rows, **{name: other[name] for name in ("length_cdf", "length_bucket", "age_cdf")}}
    np.testing.assert_array_equal(model(changed)["click"], model(rows)["click"])
    assert not np.allclose(
        model({**rows, "item_age_days_cdf": other["item_age_days_cdf"]})["click"], model(rows)["click"]
    )


def test_an_ignored_item_id_is_no_input_but_still_meets_the_history() -> None:
    model, rows = ignoring("user_id", "item_id")
    everything, _ = ignoring()
    names = [feature.name for feature in model.item_encoder.encoded]
    assert names == [f.name for f in everything.item_encoder.encoded if f.name != "item_id"]
    no_past = {name: tf.zeros_like(rows[name]) for name in features.impression_names(SPEC)}
    no_history = {"history_item_ids_ids": tf.zeros_like(rows["history_item_ids_ids"])}

    def is_moved_by_the_item(**changes: tf.Tensor) -> bool:
        request = {**rows, **no_past, **changes}
        other = {**request, "item_id_id": tf.roll(rows["item_id_id"], 1, 0)}
        return not np.allclose(model(other)["click"], model(request)["click"])

    assert is_moved_by_the_item()
    assert not is_moved_by_the_item(**no_history)
