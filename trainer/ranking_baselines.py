"""Simple ranking models on what the ranker knows: what it is always compared with.

The linear models are those of scikit-learn, the trees those of LightGBM. They read the features of
`trainer.ranking_features`.

Letters: m = rows, F = features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from schema.contract import WATCH_TIME, DatasetSpec, TaskKind, TaskSpec
from trainer.baselines import (
    GLOBAL_MEAN,
    GLOBAL_MEDIAN,
    ITEM_MEAN,
    LIGHTGBM,
    LOGISTIC_REGRESSION,
    RIDGE_REGRESSION,
    item_mean,
)
from trainer.features import HOUR_OF_DAY, ITEM_ID, SURFACE, USER_ID
from trainer.progress import tracked
from trainer.ranking_features import (
    BoolArray,
    FeatureMatrix,
    FloatArray,
    History,
    IntArray,
    Kind,
    RankingTables,
    ranking_features,
)

# Features of m rows to predictions in the unit of the label, float64 [m].
Predict = Callable[[FeatureMatrix], FloatArray]
# The same from rows of `LinearFeatures`.
PredictLinear = Callable[[sp.csr_matrix], FloatArray]

# Rows of the train split below which a value of a category, or a pair of two, is left out of linear models.
MIN_ROWS = 5
NUM_BINS = 16
# A smoothed rate is 0 or 1 only before the first event.
_RATE_MARGIN = 1e-4

# Chosen once and for all; what matters most is tuned by `benchmarks.ranking_baselines`.
TREE_SETTINGS: Mapping[str, Any] = {
    "learning_rate": 0.05,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 10.0,
    "cat_smooth": 50.0,
    "max_bin": 127,
    "deterministic": True,
    "verbose": -1,
}


# Rows that the pipeline fits on, so that a minute does for all models and tasks.
MAX_TRAIN_ROWS = 60_000
_MAX_EVAL_ROWS = 20_000
# Of the values that `benchmarks.ranking_baselines` searches, those that do well on KuaiRand.
_INVERSE_RIDGE, _RIDGE = 0.01, 100.0
_MAX_ITERATIONS = 50
# One thread: two that wait for each other on a busy machine take ten times the processor time of one.
_PIPELINE_TREES: Mapping[str, Any] = {
    "learning_rate": 0.1,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "max_bin": 63,
    "num_threads": 1,
    "force_row_wise": True,
}
_MAX_TREES, _PATIENCE_TREES = 300, 10


def baseline_predictions(
    tables: RankingTables, asked: IntArray, seed: int = 0
) -> tuple[dict[str, dict[str, FloatArray]], dict[str, str]]:
    """What each baseline predicts for some rows after training, with all that happened before each event.

    `item_mean` and the constants are of the train split alone. The others have the ranker's information, see
    `ranking_features`: rows to predict know the outcomes of earlier events of any split, as the ranker's do.

    Args:
      tables: of the dataset.
      asked: int64 [m], places of the interactions to predict.
      seed: of the choice of rows to fit on, and of the trees.

    Returns:
      Baseline -> task -> float64 [m]; and how each was made. A task without a label in training has none.
    """
    generator = np.random.default_rng(seed)
    train = np.flatnonzero(tables.of_split("train"))
    fitted_on = _some(train, MAX_TRAIN_ROWS, generator)
    judged_on = _some(np.flatnonzero(tables.of_split("eval")), _MAX_EVAL_ROWS, generator)
    every = ranking_features(tables, History.ONLINE, np.concatenate([fitted_on, judged_on, asked]))
    places = np.split(np.arange(len(every.values)), np.cumsum([len(fitted_on), len(judged_on)]))
    on_train, on_eval, on_asked = (every.take(p) for p in places)
    encode = linear_features(on_train, tables.spec)
    linear_train, linear_asked = encode(on_train), encode(on_asked)
    item_ids = tables.interactions[ITEM_ID].to_numpy()
    predictions: dict[str, dict[str, FloatArray]] = {}

    def trees(task: TaskSpec, labels: FloatArray, has_train: BoolArray, has_eval: BoolArray) -> FloatArray:
        models = boosted_trees(
            on_train.take(has_train),
            labels[fitted_on][has_train],
            {"eval": (on_eval.take(has_eval), labels[judged_on][has_eval])},
            _tree_settings(task, seed),
            _MAX_TREES,
            _PATIENCE_TREES,
        )
        return models["eval"](on_asked)

    # Trees grow in a thread beside the linear models, which take as long.
    with ThreadPoolExecutor(max_workers=1) as beside:
        grown: dict[str, Future[FloatArray]] = {}
        for task in tracked(tables.spec.tasks, "linear baselines fitted"):
            labels = tables.labels(task.label)
            known = train[~np.isnan(labels[train])]
            has_train, has_eval = ~np.isnan(labels[fitted_on]), ~np.isnan(labels[judged_on])
            if not has_train.any() or not has_eval.any():
                continue
            grown[task.name] = beside.submit(trees, task, labels, has_train, has_eval)
            mean = np.full(len(asked), labels[known].mean())
            found = {
                GLOBAL_MEAN: mean,
                ITEM_MEAN: item_mean(item_ids[known].tolist(), labels[known], item_ids[asked].tolist()),
            }
            targets, is_time = labels[fitted_on][has_train], task.label == WATCH_TIME
            if task.kind is not TaskKind.BINARY:
                found[GLOBAL_MEDIAN] = np.full(len(asked), np.median(labels[known]))
                model = ridge_regression(linear_train[has_train], targets, _RIDGE, is_time, _MAX_ITERATIONS)
                found[RIDGE_REGRESSION] = model(linear_asked)
            elif len(np.unique(targets)) == 2:
                model = logistic_regression(linear_train[has_train], targets, _INVERSE_RIDGE, _MAX_ITERATIONS)
                found[LOGISTIC_REGRESSION] = model(linear_asked)
            for name, values in found.items():
                predictions.setdefault(name, {})[task.name] = values
        for name, future in grown.items():
            predictions.setdefault(LIGHTGBM, {})[name] = future.result()
    rows = f"on {len(fitted_on):,} of {len(train):,} train rows"
    notes = {
        GLOBAL_MEAN: "mean of the train split",
        GLOBAL_MEDIAN: "median of the train split",
        ITEM_MEAN: "smoothed train mean of the item",
        LOGISTIC_REGRESSION: f"scikit-learn, {rows}",
        RIDGE_REGRESSION: f"scikit-learn, {rows}",
        LIGHTGBM: f"at most {_MAX_TREES} trees, {rows}",
    }
    order = [name for name in notes if name in predictions]
    return {name: predictions[name] for name in order}, {name: notes[name] for name in order}


def _some(rows: IntArray, limit: int, generator: np.random.Generator) -> IntArray:
    return rows if len(rows) <= limit else np.sort(generator.choice(rows, limit, replace=False))


def _tree_settings(task: TaskSpec, seed: int) -> dict[str, Any]:
    binary = task.kind is TaskKind.BINARY
    # The absolute error is what these tasks are judged by, with the order.
    objective = "binary" if binary else "regression_l1"
    return {
        **_PIPELINE_TREES,
        "objective": objective,
        "metric": "binary_logloss" if binary else "l1",
        "seed": seed,
    }


class LinearFeatures:
    """A feature matrix as linear models read it: indicators, and numbers of mean 0 and variance 1.

    Indicators: the values of ids and categories, `NUM_BINS` quantile bins of each number, and every pair of
    the surface and one of these, but for numbers and the user's declared categories. Numbers: log-odds of
    rates, log(1 + mean) of means.
    """

    def __init__(self, train: FeatureMatrix, crossed: Sequence[str]) -> None:
        """Learns values, bins and scales.

        Args:
          train: rows of the train split.
          crossed: names of the features that are paired with the surface.
        """
        self._names = train.names
        self._crossed = [self._names.index(name) for name in crossed]
        self._surface = self._names.index(SURFACE) if SURFACE in self._names else None
        self._coded = train.of_kinds(Kind.ID, Kind.CATEGORY)
        self._numbers = train.of_kinds(Kind.NUMBER)
        self._rates = train.of_kinds(Kind.RATE)
        self._means = train.of_kinds(Kind.MEAN)
        levels = np.arange(1, NUM_BINS) / NUM_BINS
        self._edges = [np.unique(np.nanquantile(train.values[:, place], levels)) for place in self._numbers]
        self._encoder = OneHotEncoder(
            handle_unknown="infrequent_if_exist", min_frequency=MIN_ROWS, dtype=np.float32
        )
        self._encoder.fit(self._codes(train.values))
        self._scaler = StandardScaler().fit(self._scaled(train.values))

    def __call__(self, features: FeatureMatrix) -> sp.csr_matrix:
        """The rows as float32 [m, indicators and numbers]."""
        values = features.values
        numbers = self._scaler.transform(self._scaled(values)).astype(np.float32)
        return sp.hstack([self._encoder.transform(self._codes(values)), numbers], format="csr")

    def _codes(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Ids, categories, bins and pairs as integers; -1 is missing."""
        columns = [_integers(values[:, place]) for place in self._coded]
        for place, edges in zip(self._numbers, self._edges, strict=True):
            column = values[:, place]
            columns.append(np.where(np.isnan(column), -1, np.searchsorted(edges, column, side="right")))
        if self._surface is not None:
            surface = _integers(values[:, self._surface]) + 1
            columns += [surface << 32 | _integers(values[:, place]) + 1 for place in self._crossed]
        return np.column_stack(columns)

    def _scaled(self, values: npt.NDArray[np.float32]) -> FloatArray:
        rates = np.clip(values[:, self._rates].astype(np.float64), _RATE_MARGIN, 1 - _RATE_MARGIN)
        means = values[:, self._means].astype(np.float64)
        return np.concatenate([np.log(rates) - np.log1p(-rates), np.log1p(np.maximum(means, 0.0))], axis=1)


def _integers(column: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    return np.where(np.isnan(column), -1, column).astype(np.int64)


def linear_features(train: FeatureMatrix, spec: DatasetSpec) -> LinearFeatures:
    """The features of rows of the train split for linear models."""
    declared = {f.name for f in spec.items.features}
    coded = [train.names[place] for place in train.of_kinds(Kind.ID, Kind.CATEGORY)]
    crossed = [n for n in coded if n in declared or (n.endswith("_id") and n != USER_ID) or n == HOUR_OF_DAY]
    return LinearFeatures(train, crossed)


def logistic_regression(
    train: sp.csr_matrix, labels: FloatArray, inverse_ridge: float, max_iterations: int
) -> PredictLinear:
    """Logistic regression with ridge.

    Args:
      train: m rows of `LinearFeatures` to learn from.
      labels: [m], 0 or 1.
      inverse_ridge: scikit-learn's C.
      max_iterations: of L-BFGS.
    """
    model = LogisticRegression(C=inverse_ridge, max_iter=max_iterations)
    with warnings.catch_warnings():
        # To stop before convergence is what max_iterations is for.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, labels)
    return lambda rows: model.predict_proba(rows)[:, 1]


def ridge_regression(
    train: sp.csr_matrix, labels: FloatArray, ridge: float, is_time: bool, max_iterations: int | None = None
) -> PredictLinear:
    """Linear regression with ridge, within the range of the labels.

    Args:
      train: m rows of `LinearFeatures` to learn from.
      labels: [m].
      ridge: scikit-learn's alpha.
      is_time: whether log(1 + label) is learnt: watch times are skewed.
      max_iterations: of conjugate gradients; None until they converge.
    """
    model = Ridge(alpha=ridge, solver="sparse_cg", max_iter=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, np.log1p(labels) if is_time else labels)
    low, high = labels.min(), labels.max()

    def predict(rows: sp.csr_matrix) -> FloatArray:
        found = model.predict(rows).astype(np.float64)
        return np.clip(np.expm1(found) if is_time else found, low, high)

    return predict


def boosted_trees(
    train: FeatureMatrix,
    labels: FloatArray,
    judged: Mapping[str, tuple[FeatureMatrix, FloatArray]],
    settings: Mapping[str, Any],
    max_trees: int,
    patience_trees: int,
) -> dict[str, Predict]:
    """Boosted trees of LightGBM on everything but ids, with as many trees as suit rows of the eval split.

    Args:
      train, labels: rows to learn from.
      judged: features and labels of rows that the number of trees is chosen by, apart for each name.
      settings: of LightGBM, beside `TREE_SETTINGS`: objective, metric, seed, num_threads.
      max_trees: at most so many.
      patience_trees: without a gain on any of `judged`, so many more end the boosting.

    Returns:
      A model for each name of `judged`.
    """
    places = train.of_kinds(Kind.CATEGORY, Kind.NUMBER, Kind.RATE, Kind.MEAN)
    categories = [places.index(place) for place in train.of_kinds(Kind.CATEGORY)]
    parameters = {**TREE_SETTINGS, **settings}
    data = lightgbm.Dataset(
        train.values[:, places], labels, categorical_feature=categories, params=parameters
    )
    # One boosting for all of them, stopped when none gains from more trees.
    found: dict[str, dict[str, list[float]]] = {}
    booster = lightgbm.train(
        parameters,
        data,
        max_trees,
        valid_sets=[data.create_valid(f.values[:, places], y) for f, y in judged.values()],
        valid_names=list(judged),
        callbacks=[lightgbm.record_evaluation(found), _stop_when_all_are_worse(patience_trees)],
    )
    losses = {name: next(iter(found[name].values())) for name in judged}
    return {name: _trees(booster, places, int(np.argmin(loss)) + 1) for name, loss in losses.items()}


def _trees(booster: lightgbm.Booster, places: list[int], num_trees: int) -> Predict:
    def predict(features: FeatureMatrix) -> FloatArray:
        return np.asarray(booster.predict(features.values[:, places], num_iteration=num_trees))

    return predict


def _stop_when_all_are_worse(patience: int) -> Callable[[Any], None]:
    """LightGBM's own early stopping ends with the first valid set that does not improve."""
    best: dict[str, tuple[float, int]] = {}

    def callback(environment: Any) -> None:
        for name, _, loss, _ in environment.evaluation_result_list:
            if name not in best or loss < best[name][0]:
                best[name] = loss, environment.iteration
        if environment.iteration - max(when for _, when in best.values()) >= patience:
            raise lightgbm.callback.EarlyStopException(environment.iteration, [])

    return callback
