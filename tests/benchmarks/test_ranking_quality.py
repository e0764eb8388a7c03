"""The ranking benchmark: the same rows for all, honest intervals, and what online history does to GAUC."""

import dataclasses
import itertools
import json
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from benchmarks import protocols, ranking_baselines, ranking_quality
from benchmarks.ranking_baselines import RankingData
from benchmarks.ranking_quality import (
    BLENDED,
    LAMBDAS,
    OURS,
    check_predictions,
    exported_predictions,
    judge,
    main,
    online_past_trade_off,
    our_predictions,
    to_markdown,
)
from schema.errors import DataError
from tests.trainer.ranking_tables import SPEC, log
from trainer import metrics
from trainer.ranking_features import History, ranking_features

CLICK, WATCH = SPEC.tasks


@pytest.fixture(scope="module")
def data() -> RankingData:
    tables = log(1_500, seed=3)
    return RankingData(tables, {history: ranking_features(tables, history) for history in History})


def predictions_of(tables):
    rows = tables.interactions.filter(split="test")["row_number"]
    return pl.DataFrame(
        {
            "row_number": rows,
            "click": np.linspace(0.1, 0.9, len(rows)),
            "watch": np.linspace(1.0, 50.0, len(rows)),
        }
    )


def test_predictions_are_put_in_the_order_of_the_test_rows(data):
    given = predictions_of(data.tables)
    found = check_predictions(given.sample(fraction=1.0, shuffle=True, seed=1), data.tables)
    np.testing.assert_array_equal(found["click"], given["click"])
    np.testing.assert_array_equal(found["watch"], given["watch"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.head(-1), "each test row once", id="missing"),
        pytest.param(lambda t: pl.concat([t.head(-1), t.head(1)]), "each test row once", id="twice"),
        pytest.param(
            lambda t: t.with_columns(row_number=pl.col("row_number") - 1), "each test row once", id="other"
        ),
        pytest.param(
            lambda t: t.with_columns(click=pl.lit(float("nan"))), "of task click are not finite", id="nan"
        ),
    ],
)
def test_predictions_of_other_rows_are_refused(data, change, message):
    with pytest.raises(DataError, match=message):
        check_predictions(change(predictions_of(data.tables)), data.tables)


@pytest.fixture
def fake_run(monkeypatch):
    """A finished run whose ranker answers the hour of the event; what it was asked is kept."""
    asked = []
    run = types.SimpleNamespace(dataset=SPEC.name, config=types.SimpleNamespace(dataset=SPEC))

    def score(run, paths, rows, out, online_history, model_dir, on_progress):
        asked.append((rows, online_history, model_dir))
        time = rows.table["event_time_unix_s"]
        pl.DataFrame({"click": (time % 3_600) / 3_600, "watch": time / 1.0, "score": time}).write_parquet(out)

    monkeypatch.setattr(protocols, "read_run", lambda folder: run)
    monkeypatch.setattr(ranking_quality, "batch_score", score)
    return types.SimpleNamespace(run=run, asked=asked)


@pytest.mark.parametrize(
    ("history", "splits"), [(History.FROZEN, {"test"}), (History.ONLINE, {"eval", "test"})]
)
def test_the_export_is_asked_about_test_rows_and_with_online_history_knows_the_eval_rows(
    data, fake_run, tmp_path, history, splits
):
    found = exported_predictions(tmp_path, data.tables, history, tmp_path / "model")
    (rows, online, model_dir), *others = fake_run.asked
    assert not others and model_dir == tmp_path / "model"
    assert online == (history is History.ONLINE)
    expected = data.tables.interactions.filter(pl.col("split").is_in(splits))
    assert rows.table.select("user_id", "item_id", "event_time_unix_s", "click").equals(
        expected.select("user_id", "item_id", "event_time_unix_s", "click")
    )
    assert rows.table["row_number"].to_list() == list(range(len(expected)))
    assert not rows.table["is_repeated"].any() and rows.absent == ()
    time = data.tables.interactions.filter(split="test")["event_time_unix_s"]
    np.testing.assert_array_equal(check_predictions(found, data.tables)["watch"], time)


def test_a_run_of_another_dataset_is_refused(data, fake_run, tmp_path):
    fake_run.run.config.dataset = SPEC.model_copy(update={"utc_offset_hours": 3.0})
    with pytest.raises(DataError, match="declaration differs"):
        exported_predictions(tmp_path, data.tables, History.FROZEN)


def test_every_retrained_seed_of_every_run_is_judged(data, fake_run, tmp_path, monkeypatch):
    seeds = []

    class Retrained:
        def __init__(self, run_dir, tables, overrides):
            seeds.append((run_dir, overrides))

        def __enter__(self):
            return Path("retrained")

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(ranking_quality, "retrained_ranker", Retrained)
    progress = types.SimpleNamespace(add_task=lambda *_, **__: 0, advance=lambda _: None)
    runs = [tmp_path / "a", tmp_path / "b"]
    found = our_predictions(runs, data.tables, 2, progress)
    assert seeds == [(run, {"seed": seed}) for run, seed in itertools.product(runs, (0, 1))]
    assert {history: len(by_seed) for history, by_seed in found.items()} == dict.fromkeys(History, 4)
    assert {model_dir for _, _, model_dir in fake_run.asked} == {Path("retrained")}
    seeds.clear()
    pushed = our_predictions(runs[:1], data.tables, 0, progress)
    assert not seeds and fake_run.asked[-1][2] is None
    assert len(pushed[History.FROZEN]) == 1


def test_models_are_judged_on_the_same_rows_and_compared_over_users():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(300), 4)
    labels = rng.integers(2, size=1200).astype(float)
    good = [np.clip(0.5 + 0.3 * (labels - 0.5) + rng.normal(0, 0.2, 1200), 0, 1) for _ in range(2)]
    poor = rng.random(1200)
    figures = judge(CLICK, labels, users, {"poor": [poor], "twin": good, OURS: good}, 300)
    names = {"auc", "gauc", "log_loss", "normalised_entropy", "ece"}
    assert set(figures["models"]["poor"]) == names
    assert figures["models"]["poor"]["auc"] == {"mean": metrics.auc(labels, poor), "std": None}
    aucs = [metrics.auc(labels, p) for p in good]
    assert figures["models"][OURS]["auc"] == {
        "mean": pytest.approx(np.mean(aucs)),
        "std": pytest.approx(np.std(aucs, ddof=1)),
    }
    assert set(figures["ours_minus"]) == {"poor", "twin"}
    gain = figures["ours_minus"]["poor"]["gauc"]
    assert 0 < gain["low"] < gain["difference"] < gain["high"]
    assert figures["ours_minus"]["twin"]["auc"] == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_watch_time_is_compared_by_error_and_order():
    labels, users = np.array([1.0, 5.0, 2.0, 8.0]), np.array([0, 0, 1, 1])
    figures = judge(WATCH, labels, users, {"flat": [np.full(4, 3.0)], OURS: [labels + 1.0]}, 100)
    assert figures["models"][OURS]["mae"]["mean"] == pytest.approx(1.0)
    assert figures["ours_minus"]["flat"]["mae"]["difference"] == pytest.approx(1.0 - 2.5)
    assert figures["ours_minus"]["flat"]["xauc"]["difference"] == pytest.approx(0.5)


def test_baselines_alone_are_not_compared():
    assert "ours_minus" not in judge(WATCH, np.ones(2), np.ones(2), {"flat": [np.ones(2)]}, 100)


def test_the_trade_off_runs_from_a_frozen_past_of_the_user_to_an_online_one(data):
    def follows_the_user(features, rows):
        return (
            0.8 * features.column("user_all_click")[rows] + 0.2 * features.column("item_id_all_click")[rows]
        )

    curve = online_past_trade_off(data, CLICK, follows_the_user)
    assert [point["lambda"] for point in curve] == list(LAMBDAS)
    rows = data.rows(CLICK, "test")
    labels = data.labels(CLICK, rows)
    users = data.tables.interactions["user_id"].to_numpy()[rows]
    online, frozen = data.features[History.ONLINE], data.features[History.FROZEN]
    by_lambda = {point["lambda"]: point for point in curve}
    without = online.with_columns_of(frozen, ["user_all_click"])
    for weight, features in ((1.0, online), (0.0, without)):
        found = follows_the_user(features, rows)
        assert by_lambda[weight]["auc"] == pytest.approx(metrics.auc(labels, found))
        assert by_lambda[weight]["gauc"] == pytest.approx(metrics.gauc(labels, found, users))


def bernoulli_users(num_rows, num_users, seed):
    """Users of exchangeable labels, and two best guesses: with the user's earlier labels, and without.

    A user's rate is drawn from Beta(2, 3); the posterior mean after k positives of i rows is
    (2 + k) / (5 + i), that before them 2/5 plus noise that tells users apart as a frozen past would.
    """
    rng = np.random.default_rng(seed)
    rate = rng.beta(2, 3, size=num_users)
    labels = (rng.random((num_users, num_rows)) < rate[:, np.newaxis]).astype(float)
    earlier = np.cumsum(labels, axis=1) - labels
    online = (2 + earlier) / (5 + np.arange(num_rows))
    users = np.repeat(np.arange(num_users), num_rows)
    return labels.ravel(), online.ravel(), users


def test_gauc_of_the_best_online_prediction_is_below_chance():
    """What a user did lately says that the rest of a short window went the other way.

    Given the number of positives every order of a user's labels is equally likely, so no prediction can rank
    them: .5 is what a constant gets. Yet the posterior mean, the best prediction of every single row, ranks a
    row high after positives, of which fewer are left.
    """
    labels, online, users = bernoulli_users(num_rows=3, num_users=20_000, seed=0)
    constant = np.full(len(labels), 2 / 5)
    assert metrics.log_loss(labels, online) < metrics.log_loss(labels, constant)
    assert metrics.auc(labels, online) > 0.53 > metrics.auc(labels, constant) == 0.5
    assert metrics.gauc(labels, online, users) < 0.3
    assert metrics.gauc(labels, constant, users) == 0.5


def test_gauc_of_two_rows_is_zero_for_any_model_that_follows_the_user():
    # Of two rows with both classes: after a positive comes the negative, ranked higher; or the reverse.
    labels, online, users = bernoulli_users(num_rows=2, num_users=1_000, seed=1)
    assert metrics.gauc(labels, online, users) == 0.0


def test_the_artefact_fades_with_the_rows_of_a_user():
    values = []
    for num_rows in (2, 3, 10, 100):
        labels, online, users = bernoulli_users(num_rows, num_users=4_000 // num_rows + 400, seed=2)
        values.append(metrics.gauc(labels, online, users))
    assert values == sorted(values)
    assert 0.4 < values[-1] < 0.5


def test_command_judges_the_run_and_every_baseline(data, fake_run, tmp_path, monkeypatch):
    monkeypatch.setattr(ranking_quality, "load_ranking_tables", lambda *_: data.tables)
    monkeypatch.setattr(ranking_baselines, "MAX_TREES", 5)
    small = {"C": (0.1,), "alpha": (30.0,), "num_leaves": (4,), "min_data_in_leaf": (20,)}
    quick = {
        name: dataclasses.replace(baseline, grid={key: small[key] for key in baseline.grid})
        for name, baseline in ranking_baselines.BASELINES.items()
    }
    monkeypatch.setattr(ranking_quality, "BASELINES", quick)
    options = ["--dataset", "kuairand-pure", "--run-dir", str(tmp_path), "--seeds", "2"]
    options += ["--bootstrap-samples", "100", "--json", f"{tmp_path}/out/f.json"]
    outcome = CliRunner().invoke(main, options)
    assert outcome.exit_code == 0, outcome.output
    figures = json.loads((tmp_path / "out" / "f.json").read_text(encoding="utf-8"))
    assert figures["rows"]["test"] == data.tables.of_split("test").sum()
    assert figures["seeds"] == {"baselines": 2, OURS: 1}
    for history in ("frozen", "online"):
        models = figures["test"][history]["click"]["models"]
        assert set(models) == {"item mean", "logistic regression", "LightGBM", OURS}
        assert models["LightGBM"]["auc"]["std"] is not None
        assert models["logistic regression"]["auc"]["std"] is None
        assert set(figures["test"][history]["watch"]["models"]) == {
            "item mean",
            "ridge regression",
            "LightGBM, L1",
            "LightGBM, L2",
            OURS,
        }
    assert figures["test"]["frozen"]["click"] != figures["test"]["online"]["click"]
    assert figures["parameters"]["click"]["LightGBM"]["frozen"] == {"num_leaves": 4, "min_data_in_leaf": 20}
    assert [point["lambda"] for point in figures["online_past"]["click"]] == list(LAMBDAS)
    assert "## click, online history" in outcome.output
    assert f"| {OURS} |" in outcome.output


def figures_of(dataset):
    cell = {"mean": 0.7, "std": None}
    part = {
        "models": {BLENDED: {"auc": cell, "gauc": {"mean": 0.6, "std": 0.01}}},
        "ours_minus": {BLENDED: {"auc": {"difference": 0.01, "low": -0.005, "high": 0.02}}},
    }
    return {
        "dataset": dataset,
        "rows": {"train": 1_000, "eval": 10, "test": 20},
        "test": {"frozen": {"click": part}, "online": {"click": part}},
        "online_past": {"click": [{"lambda": -0.6, "auc": 0.72, "gauc": 0.66}]},
    }


def test_report_shows_spread_intervals_and_the_trade_off():
    report = to_markdown(figures_of("other"))
    assert "| LightGBM | 0.7000 | 0.6000 ± 0.0100 |" in report
    assert "| LightGBM | +0.0100 [-0.0050, +0.0200] |" in report
    assert "| -0.6 | 0.7200 | 0.6600 |" in report
    assert "anchor" not in report


def test_report_sets_anchors_beside_frozen_history_alone():
    report = to_markdown(figures_of("kuairand-pure"))
    assert report.count("| anchor, other rows: LightGBM | 0.7402 | 0.6411 |") == 1
    assert report.index("anchor") < report.index("## click, online history")


def test_help_tells_how_to_run_it():
    outcome = CliRunner().invoke(main, ["--help"])
    assert outcome.exit_code == 0
    assert "python -m benchmarks.ranking_quality --dataset kuairand-pure" in " ".join(outcome.output.split())
