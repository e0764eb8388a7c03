"""The ranking baselines: fitted on the train split, tuned on the eval split, and strong."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from benchmarks import ranking_baselines
from benchmarks.ranking_baselines import BASELINES, Baseline, RankingData, tune
from schema.contract import TaskKind
from schema.errors import DataError
from tests.trainer.ranking_tables import SPEC, click_chance, log
from trainer import metrics
from trainer.ranking_features import History, ranking_features

CLICK, WATCH = SPEC.tasks
IDS = ("user_id", "item_id")
BINARY = frozenset({TaskKind.BINARY})


@pytest.fixture(scope="module")
def data() -> RankingData:
    tables = log(4_000, seed=2)
    return RankingData(tables, {history: ranking_features(tables, history) for history in History})


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr(ranking_baselines, "MAX_TREES", 60)
    monkeypatch.setattr(ranking_baselines, "PATIENCE_TREES", 10)


def small(**grid) -> dict:
    """Parameters that suit a small log."""
    return {"C": 0.1, "alpha": 30.0, "num_leaves": 8, "min_data_in_leaf": 20, **grid}


def predicted(name, data, task, history=History.ONLINE, seed=0):
    baseline = BASELINES[name]
    parameters = {key: value for key, value in small().items() if key in baseline.grid}
    model = baseline.fit(data, task, parameters, seed)[history]
    return model(data.features[history], data.rows(task, "test"))


def test_item_mean_is_the_smoothed_mean_of_the_item_so_far(data):
    found = predicted("item mean", data, CLICK, History.FROZEN)
    events = data.tables.interactions
    train, test = events.filter(split="train"), events.filter(split="test")
    mean = train["click"].mean()
    for row in (0, 5, len(test) - 1):
        clicks = train.filter(item_id=test["item_id"][row])["click"]
        assert found[row] == pytest.approx((clicks.sum() + 4 * mean) / (len(clicks) + 4), rel=1e-5)
    assert (predicted("item mean", data, CLICK, History.ONLINE) != found).any()


def true_chance(data, rows):
    users, items = (data.tables.interactions[name].str.slice(1).cast(int).to_numpy() for name in IDS)
    return click_chance(users, items)[rows]


@pytest.mark.parametrize("name", ["logistic regression", "LightGBM"])
def test_models_of_a_binary_task_come_near_the_true_chances(data, name):
    rows = data.rows(CLICK, "test")
    labels, users = data.labels(CLICK, rows), data.tables.interactions["user_id"].to_numpy()[rows]
    found, truth = predicted(name, data, CLICK), true_chance(data, rows)
    by_item = metrics.auc(labels, predicted("item mean", data, CLICK))
    assert metrics.auc(labels, found) > max(by_item, metrics.auc(labels, truth) - 0.03)
    assert metrics.gauc(labels, found, users) > metrics.gauc(labels, truth, users) - 0.03
    assert ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize("name", ["ridge regression", "LightGBM, L1", "LightGBM, L2"])
def test_models_of_watch_time_come_near_the_true_order(data, name):
    rows = data.rows(WATCH, "test")
    labels, truth = data.labels(WATCH, rows), true_chance(data, rows)
    found = predicted(name, data, WATCH)
    assert metrics.xauc(labels, found) > metrics.xauc(labels, truth) - 0.04
    if name == "LightGBM, L2":  # which predicts the mean, the others the middle of skewed labels
        assert found.mean() > 0.8 * labels.mean() > 1.5 * np.median(labels)
    else:
        assert metrics.mae(labels, found) < metrics.mae(labels, np.full(len(labels), np.median(labels)))


@pytest.mark.parametrize(
    ("name", "task", "unseen"),
    [
        pytest.param("item mean", CLICK, ("eval", "test"), id="item-mean"),
        pytest.param("logistic regression", CLICK, ("eval", "test"), id="logistic"),
        pytest.param("ridge regression", WATCH, ("eval", "test"), id="ridge"),
        pytest.param("LightGBM", CLICK, ("test",), id="trees"),  # eval chooses their number
    ],
)
def test_labels_after_training_do_not_reach_a_fit(data, name, task, unseen):
    events = data.tables.interactions
    labels = events[task.label].to_numpy().copy()
    hidden = events["split"].is_in(unseen).to_numpy()
    labels[hidden] = labels[hidden][::-1]
    changed = events.with_columns(pl.Series(task.label, labels, nan_to_null=True))
    other = dataclasses.replace(data, tables=dataclasses.replace(data.tables, interactions=changed))
    parameters = {key: value for key, value in small().items() if key in BASELINES[name].grid}
    before, after = (
        BASELINES[name].fit(d, task, parameters, 0)[History.FROZEN](
            data.features[History.FROZEN], data.rows(task, "test")
        )
        for d in (data, other)
    )
    np.testing.assert_array_equal(after, before)


def test_each_history_gets_the_number_of_trees_that_suits_its_eval_rows(data, monkeypatch):
    # With labels turned around for one history the first tree already makes its eval rows worse.
    rows = data.rows(CLICK, "eval")
    harmful = data.features[History.FROZEN].values.copy()
    harmful[rows] = harmful[rows][::-1]
    features = {
        **data.features,
        History.FROZEN: dataclasses.replace(data.features[History.FROZEN], values=harmful),
    }
    other = dataclasses.replace(data, features=features)
    parameters = {"num_leaves": 8, "min_data_in_leaf": 20}
    models = BASELINES["LightGBM"].fit(other, CLICK, parameters, 0)
    test = data.rows(CLICK, "test")
    spread = {h: models[h](data.features[History.ONLINE], test).std() for h in History}
    assert spread[History.FROZEN] < spread[History.ONLINE] / 2
    alone = BASELINES["LightGBM"].fit(data, CLICK, parameters, 0)[History.ONLINE]
    # Boosting goes on until the last history has stopped gaining, and does not depend on the others.
    np.testing.assert_array_equal(
        models[History.ONLINE](data.features[History.ONLINE], test),
        alone(data.features[History.ONLINE], test),
    )


def test_seeds_change_trees_and_the_same_seed_gives_the_same_ones(data):
    first, again, other = (predicted("LightGBM", data, CLICK, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_tuning_takes_the_least_eval_loss_of_each_history_and_fits_every_seed(data):
    calls = []
    best = {History.ONLINE: 0.3, History.FROZEN: 0.9}

    def fit(data, task, parameters, seed):
        calls.append((parameters["guess"], seed))

        def model_of(history):
            # Nearest to the labels where the guess is the best one of the history.
            wrong = abs(parameters["guess"] - best[history])
            return lambda features, rows: np.abs(data.labels(task, rows) - 0.2 - wrong / 2)

        return {history: model_of(history) for history in History}

    baseline = Baseline(BINARY, fit, {"guess": (0.1, 0.3, 0.9)}, seeded=True)
    progress = []
    fitted = tune(baseline, data, CLICK, 3, lambda: progress.append(1))
    assert {history: f.parameters for history, f in fitted.items()} == {
        History.ONLINE: {"guess": 0.3},
        History.FROZEN: {"guess": 0.9},
    }
    assert [len(f.models) for f in fitted.values()] == [3, 3]
    assert len(progress) == 3
    assert sorted(calls[3:]) == [(0.3, 1), (0.3, 2), (0.9, 1), (0.9, 2)]


def test_one_fit_serves_both_histories_that_chose_the_same(data):
    calls = []

    def fit(data, task, parameters, seed):
        calls.append(seed)
        return dict.fromkeys(History, lambda features, rows: np.full(rows.sum(), 0.5))

    tune(Baseline(BINARY, fit, seeded=True), data, CLICK, 3, lambda: None)
    assert calls == [0, 1, 2]
    calls.clear()
    fitted = tune(Baseline(BINARY, fit), data, CLICK, 3, lambda: None)
    assert calls == [0]
    assert len(fitted[History.ONLINE].models) == 1


def test_a_task_without_labels_in_a_split_is_refused(data):
    events = data.tables.interactions
    is_eval = pl.col("split") == "eval"
    missing = events.with_columns(click=pl.when(~is_eval).then("click"))
    other = dataclasses.replace(data, tables=dataclasses.replace(data.tables, interactions=missing))
    with pytest.raises(DataError, match="task click: no row of split 'eval' has a click; remove the task"):
        other.rows(CLICK, "eval")


def test_the_item_mean_needs_counters_of_items(data):
    names = tuple(f"other_{name}" for name in data.features[History.ONLINE].names)
    features = {h: dataclasses.replace(f, names=names) for h, f in data.features.items()}
    with pytest.raises(DataError, match=r"counters\.keys"):
        BASELINES["item mean"].fit(dataclasses.replace(data, features=features), CLICK, {}, 0)
