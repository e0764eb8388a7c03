"""What linear models read, and the baselines of the pipeline; tests/benchmarks has those of the fits."""

import dataclasses
import math

import numpy as np
import polars as pl
import scipy.sparse as sp

from tests.trainer.ranking_tables import SPEC, log
from trainer import metrics, ranking_baselines
from trainer.ranking_baselines import LinearFeatures, linear_features
from trainer.ranking_features import FeatureMatrix, History, Kind, ranking_features


def matrix(**columns) -> FeatureMatrix:
    """Columns as (kind, values)."""
    values = np.array([values for _, values in columns.values()], np.float32).T
    return FeatureMatrix(tuple(columns), tuple(kind for kind, _ in columns.values()), values, ())


def test_linear_features_are_indicators_and_standardised_numbers(monkeypatch):
    monkeypatch.setattr(ranking_baselines, "MIN_ROWS", 2)
    monkeypatch.setattr(ranking_baselines, "NUM_BINS", 2)
    nan = math.nan
    features = matrix(
        item_id=(Kind.ID, [0, 0, 1, 1, 2, nan]),
        surface=(Kind.CATEGORY, [0, 0, 0, 1, 1, 1]),
        age=(Kind.NUMBER, [1, 2, 3, 4, nan, 9]),
        rate=(Kind.RATE, [0.5, 0.5, 0.8, 0.8, 0.0, 0.2]),
        mean=(Kind.MEAN, [0.0, math.e - 1, 0.0, math.e - 1, 3, 5]),
    )
    encode = LinearFeatures(features.take(np.arange(4)), ["item_id"])
    found = encode(features)
    assert sp.issparse(found) and found.dtype == np.float32
    table = found.toarray()
    # Items 0 and 1; surface 0, and the rare surface 1 as "infrequent"; halves of the age below and from 2.5;
    # of the pairs only (surface 0, item 0), the two others being infrequent; the log-odds of the rate, which
    # are 0, 0, ln 4 and ln 4 in training; log(1 + mean), which is 0, 1, 0 and 1.
    columns = [
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 1],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1],
    ]
    np.testing.assert_array_equal(table[:, :8], np.array(columns).T)
    low, high = (np.log(p / (1 - p)) for p in (1e-4, 0.2))
    np.testing.assert_allclose(
        table[:, 8], (np.array([0, 0, np.log(4), np.log(4), low, high]) / np.log(4) - 0.5) * 2, rtol=1e-5
    )
    np.testing.assert_allclose(
        table[:, 9], (np.array([0, 1, 0, 1, np.log(4), np.log(6)]) - 0.5) * 2, rtol=1e-5
    )


def test_linear_models_pair_the_surface_with_items_and_hours_not_with_users():
    tables = log(4_000, seed=2)
    train = ranking_features(tables, History.ONLINE, np.flatnonzero(tables.of_split("train")))
    added = linear_features(train, SPEC)(train).shape[1] - LinearFeatures(train, [])(train).shape[1]
    # Two surfaces with 12 items, 4 creators and one without, 2 first tags and none, and 24 hours.
    assert added == 2 * (12 + 5 + 3 + 24)


def test_baselines_of_the_pipeline_know_more_the_more_they_are_told() -> None:
    tables = log(4_000, seed=2)
    asked = np.flatnonzero(tables.of_split("test"))
    predictions, notes = ranking_baselines.baseline_predictions(tables, asked)
    assert list(predictions) == list(notes)
    assert set(predictions["ridge_regression"]) == set(predictions["global_median"]) == {"watch"}
    assert set(predictions["logistic_regression"]) == {"click"}
    clicks = tables.labels("click")[asked]
    auc = {name: metrics.auc(clicks, of["click"]) for name, of in predictions.items() if "click" in of}
    assert auc["global_mean"] == 0.5
    assert auc["item_mean"] + 0.02 < min(auc["logistic_regression"], auc["lightgbm"])
    assert "of 2,6" in notes["lightgbm"] and "train rows" in notes["lightgbm"]


def test_baselines_of_the_pipeline_are_the_same_again_and_fitted_on_train_alone() -> None:
    tables = log(1_500, seed=3)
    asked = np.flatnonzero(tables.of_split("test"))
    first, _ = ranking_baselines.baseline_predictions(tables, asked)
    again, _ = ranking_baselines.baseline_predictions(tables, asked)
    # The very last event: no other row of the test split may know it.
    latest = int(np.argmax(tables.interactions["event_time_unix_s"].to_numpy()))
    click = tables.interactions["click"].to_numpy().copy()
    click[latest] = 1 - click[latest]
    changed = dataclasses.replace(tables, interactions=tables.interactions.with_columns(click=click))
    other, _ = ranking_baselines.baseline_predictions(changed, asked)
    for name in first:
        for task in first[name]:
            np.testing.assert_array_equal(first[name][task], again[name][task])
            np.testing.assert_array_equal(first[name][task], other[name][task])


def test_a_task_without_labels_in_training_has_no_baseline() -> None:
    tables = log(1_500, seed=3)
    in_train = pl.col("split") == "train"
    events = tables.interactions.with_columns(click=pl.when(~in_train).then("click"))
    changed = dataclasses.replace(tables, interactions=events)
    predictions, _ = ranking_baselines.baseline_predictions(changed, np.flatnonzero(changed.of_split("test")))
    assert {task for of in predictions.values() for task in of} == {"watch"}
