"""Predictions of a model against those of its rivals."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from schema.contract import TaskKind, TaskSpec
from tests import oracles
from trainer.comparison import BootstrapSettings, Comparison
from trainer.ranking_comparison import JudgedRows, compare_ranking, predictions_table

CLICK = TaskSpec(name="click", label="click", kind=TaskKind.BINARY)
WATCH = TaskSpec(name="watch", label="watch_time_s", kind=TaskKind.WATCH_TIME)
AUC = "ranking/click/auc"


def world(num_users: int = 60, rows_per_user: int = 8) -> JudgedRows:
    """The candidate knows the chance of a click, the baseline does not; half of the watch times miss."""
    rng = np.random.default_rng(3)
    size = num_users * rows_per_user
    chance = rng.random(size)
    clicks = (rng.random(size) < chance).astype(np.float64)
    watched = np.where(rng.random(size) < 0.5, np.nan, clicks * rng.exponential(20, size))
    surface = np.where(np.arange(size) % 3 == 0, "home", "feed").astype(object)
    surface[:4] = "rare"  # of one user
    rows = pl.DataFrame(
        {
            "user_id": [f"u{n // rows_per_user:03}" for n in range(size)],
            "item_id": [f"i{n % 7}" for n in range(size)],
            "event_time_unix_s": np.arange(size),
            "surface": surface.tolist(),
        }
    )
    return JudgedRows(
        rows,
        {"click": clicks, "watch": watched},
        clicks,
        {
            "candidate": {"click": chance, "watch": 20 * chance},
            "item_mean": {"click": np.full(size, 0.5), "watch": np.full(size, 10.0)},
            "logistic_regression": {"click": rng.random(size)},
        },
    )


@pytest.fixture(scope="module")
def judged() -> JudgedRows:
    return world()


@pytest.fixture(scope="module")
def result(judged: JudgedRows) -> Comparison:
    settings = BootstrapSettings(num_resamples=200)
    return compare_ranking(judged, (CLICK, WATCH), [("surface",)], {"item_mean": "w = 20"}, {}, settings)


def test_figures_are_those_of_the_oracles(judged: JudgedRows, result: Comparison) -> None:
    users = judged.rows["user_id"].to_list()
    labels, chance = judged.labels["click"].tolist(), judged.predictions["candidate"]["click"].tolist()
    expected = {
        # AUC is XAUC of binary labels.
        AUC: oracles.xauc(labels, chance),
        "ranking/click/gauc": oracles.gauc(labels, chance, users),
        "ranking/click/log_loss": oracles.log_loss(labels, chance),
    }
    known = ~np.isnan(judged.labels["watch"])
    watched = judged.labels["watch"][known].tolist()
    guessed = judged.predictions["candidate"]["watch"][known].tolist()
    expected["ranking/watch/mae"] = oracles.mae(watched, guessed)
    expected["ranking/watch/xauc"] = oracles.xauc(watched, guessed)
    clicks = judged.clicks[known].tolist()
    users = [user for user, is_known in zip(users, known, strict=True) if is_known]
    loss = oracles.weighted_pairwise_loss(clicks, watched, guessed, users)
    expected["ranking/watch/weighted_pairwise_loss"] = loss
    for key, value in expected.items():
        found = result.whole.metric(key)
        assert found is not None and found.value == pytest.approx(value), key
        assert found.low is not None and found.high is not None and found.low < value < found.high
    auc, mae = result.whole.metric(AUC), result.whole.metric("ranking/watch/mae")
    assert auc is not None and auc.count == len(judged.rows)
    assert mae is not None and mae.count == int(known.sum())


def test_a_rival_is_compared_in_the_tasks_that_it_has(result: Comparison) -> None:
    auc, mae = result.whole.metric(AUC), result.whole.metric("ranking/watch/mae")
    assert auc is not None and set(auc.against) == {"item_mean", "logistic_regression"}
    assert mae is not None and set(mae.against) == {"item_mean"}
    assert auc.against["item_mean"].value == 0.5
    assert auc.against["item_mean"].difference == pytest.approx((auc.value or 0) - 0.5)
    assert (auc.against["item_mean"].p_value or 1) < 0.02
    assert [rival.note for rival in result.rivals] == ["w = 20", ""]


def test_one_user_is_too_few_for_an_interval_and_one_class_for_an_auc(judged: JudgedRows) -> None:
    clicks = judged.labels["click"].copy()
    clicks[:4] = 0
    changed = JudgedRows(judged.rows, {"click": clicks}, clicks, judged.predictions)
    settings = BootstrapSettings(num_resamples=100)
    found = compare_ranking(changed, (CLICK,), [("surface",)], {}, {}, settings)
    # A slice that cannot be judged stands last, and says why.
    rare = found.slices[-1]
    assert (rare.name, rare.num_rows, rare.num_users) == ("surface = rare", 4, 1)
    assert rare.note == "1 users are too few to tell"
    auc = rare.metric(AUC)
    assert auc is not None
    assert (auc.value, auc.note) == (None, "0 of 4 labels are positive; it takes both classes")
    assert auc.against["item_mean"].value is None
    log_loss = rare.metric("ranking/click/log_loss")
    assert log_loss is not None and log_loss.value is not None and log_loss.low is None


def test_facts_tell_a_constant_head_from_one_that_varies(judged: JudgedRows) -> None:
    constant = {**judged.predictions, "candidate": judged.predictions["item_mean"]}
    settings = BootstrapSettings(num_resamples=100)
    found = compare_ranking(dataclasses.replace(judged, predictions=constant), (CLICK,), [], {}, {}, settings)
    labels = judged.labels["click"]
    assert found.facts["click/prediction_std"] == 0
    assert found.facts["click/label_std"] == pytest.approx(labels.std())
    assert found.facts["click/mean_label"] == pytest.approx(labels.mean())


def test_the_table_holds_what_the_numbers_come_from(judged: JudgedRows, result: Comparison) -> None:
    table = predictions_table(judged)
    assert {"user_id", "surface", "label_click", "candidate/click", "item_mean/watch"} <= set(table.columns)
    auc = oracles.xauc(table["label_click"].to_list(), table["candidate/click"].to_list())
    assert auc == pytest.approx(result.whole.metric(AUC).value)  # type: ignore[union-attr]
