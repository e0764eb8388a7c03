"""Simple ranking models, fitted by existing libraries on what the ranker knows, and tuned on the eval split.

Needs the extra `benchmarks`. The linear models are those of scikit-learn, the trees those of LightGBM. All
learn from the train split, each row as of its own event; a history, see `benchmarks.ranking_features`, is
chosen for: how the rows of eval and test look.

Letters: n = interactions, m = rows asked about, F = features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from benchmarks.ranking_features import BoolArray, FeatureMatrix, FloatArray, History, Kind, RankingTables
from schema.contract import WATCH_TIME, TaskKind, TaskSpec
from schema.errors import DataError
from trainer import metrics
from trainer.features import HOUR_OF_DAY, ITEM_ID, SURFACE, USER_ID

Parameters = Mapping[str, Any]
# Features of any n interactions, and which of them are asked about, to predictions in the unit of the label.
Predict = Callable[[FeatureMatrix, BoolArray], FloatArray]

# Rows of the train split below which a value of a category, or a pair of two, is left out of linear models.
MIN_ROWS = 5
NUM_BINS = 16
# A smoothed rate is 0 or 1 only before the first event.
_RATE_MARGIN = 1e-4
_LBFGS_ITERATIONS = 500

MAX_TREES = 2_000
PATIENCE_TREES = 50
# Chosen once and for all; what matters most is in the grids below.
TREE_SETTINGS: Parameters = {
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


@dataclasses.dataclass(frozen=True)
class RankingData:
    """What the baselines are fitted on and tuned with.

    Attributes:
      tables: of the dataset.
      features: of every interaction, by history; rows of the train split are the same in all of them.
      threads: that a library may use.
    """

    tables: RankingTables
    features: Mapping[History, FeatureMatrix]
    threads: int = 1

    @property
    def any_features(self) -> FeatureMatrix:
        """Features that are right for rows of the train split."""
        return next(iter(self.features.values()))

    def rows(self, task: TaskSpec, split: str) -> BoolArray:
        """The rows of a split that have a label for the task, bool [n].

        Raises:
          DataError: there are none.
        """
        chosen = self.tables.of_split(split) & ~np.isnan(self.tables.labels(task.label))
        if not chosen.any():
            raise DataError(
                f"task {task.name}: no row of split {split!r} has a {task.label}; remove the task"
            )
        return chosen

    def labels(self, task: TaskSpec, rows: BoolArray) -> FloatArray:
        """Labels of those rows, float64 [m]."""
        return self.tables.labels(task.label)[rows]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A model family to be tuned.

    Attributes:
      kinds: of the tasks that it is for.
      fit: (data, task, parameters, seed) -> for each history of the data, the fitted model.
      grid: parameter -> values to try on the eval split; {} when there is nothing to tune.
      seeded: whether the fit depends on the seed.
    """

    kinds: frozenset[TaskKind]
    fit: Callable[[RankingData, TaskSpec, Parameters, int], dict[History, Predict]]
    grid: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    seeded: bool = False

    def choices(self) -> Iterator[Parameters]:
        """Every combination of the grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def fit_item_mean(
    data: RankingData, task: TaskSpec, parameters: Parameters, seed: int
) -> dict[History, Predict]:
    """The smoothed mean of the item, see `ranking_features`; nothing of the user."""
    name = f"{ITEM_ID}_all_{task.label}"
    if name not in data.any_features.names:
        raise DataError(
            f"the item mean needs {ITEM_ID!r} among counters.keys {list(data.tables.spec.counters.keys)}"
        )

    def predict(features: FeatureMatrix, rows: BoolArray) -> FloatArray:
        return features.column(name)[rows].astype(np.float64)

    return dict.fromkeys(data.features, predict)


class LinearFeatures:
    """A feature matrix as linear models read it: indicators, and numbers of mean 0 and variance 1.

    Indicators: the values of ids and categories, `NUM_BINS` quantile bins of each number, and every pair of
    the surface and one of these, but for numbers and the user's declared categories. Numbers: log-odds of
    rates, log(1 + mean) of means.
    """

    def __init__(self, features: FeatureMatrix, in_train: BoolArray, crossed: Sequence[str]) -> None:
        """Learns values, bins and scales from the rows of the train split.

        Args:
          features: of all interactions.
          in_train: bool [n].
          crossed: names of the features that are paired with the surface.
        """
        self._names = features.names
        self._crossed = [self._names.index(name) for name in crossed]
        self._surface = self._names.index(SURFACE) if SURFACE in self._names else None
        self._coded = features.of_kinds(Kind.ID, Kind.CATEGORY)
        self._numbers = features.of_kinds(Kind.NUMBER)
        self._rates = features.of_kinds(Kind.RATE)
        self._means = features.of_kinds(Kind.MEAN)
        values = features.values[in_train]
        levels = np.arange(1, NUM_BINS) / NUM_BINS
        self._edges = [np.unique(np.nanquantile(values[:, place], levels)) for place in self._numbers]
        self._encoder = OneHotEncoder(
            handle_unknown="infrequent_if_exist", min_frequency=MIN_ROWS, dtype=np.float32
        )
        self._encoder.fit(self._codes(values))
        self._scaler = StandardScaler().fit(self._scaled(values))

    def __call__(self, features: FeatureMatrix, rows: BoolArray) -> sp.csr_matrix:
        """The rows as float32 [m, indicators and numbers]."""
        values = features.values[rows]
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


def linear_features(data: RankingData) -> LinearFeatures:
    """The features of the train split for linear models."""
    features, items = data.any_features, data.tables.spec.items
    declared = {f.name for f in items.features}
    coded = [features.names[place] for place in features.of_kinds(Kind.ID, Kind.CATEGORY)]
    crossed = [n for n in coded if n in declared or (n.endswith("_id") and n != USER_ID) or n == HOUR_OF_DAY]
    return LinearFeatures(features, data.tables.of_split("train"), crossed)


def fit_logistic_regression(
    data: RankingData, task: TaskSpec, parameters: Parameters, seed: int
) -> dict[History, Predict]:
    """Logistic regression with ridge; `C` is the inverse of its weight."""
    rows = data.rows(task, "train")
    encode = linear_features(data)
    model = LogisticRegression(C=parameters["C"], max_iter=_LBFGS_ITERATIONS)
    model.fit(encode(data.any_features, rows), data.labels(task, rows))

    def predict(features: FeatureMatrix, asked: BoolArray) -> FloatArray:
        return model.predict_proba(encode(features, asked))[:, 1]

    return dict.fromkeys(data.features, predict)


def fit_ridge_regression(
    data: RankingData, task: TaskSpec, parameters: Parameters, seed: int
) -> dict[History, Predict]:
    """Linear regression with ridge `alpha`; of log(1 + s) for watch times, which are skewed."""
    rows = data.rows(task, "train")
    encode = linear_features(data)
    is_time = task.label == WATCH_TIME
    labels = data.labels(task, rows)
    model = Ridge(alpha=parameters["alpha"], solver="sparse_cg")
    model.fit(encode(data.any_features, rows), np.log1p(labels) if is_time else labels)
    low, high = labels.min(), labels.max()

    def predict(features: FeatureMatrix, asked: BoolArray) -> FloatArray:
        found = model.predict(encode(features, asked)).astype(np.float64)
        return np.clip(np.expm1(found) if is_time else found, low, high)

    return dict.fromkeys(data.features, predict)


def fit_trees(objective: str) -> Callable[[RankingData, TaskSpec, Parameters, int], dict[History, Predict]]:
    """Boosted trees of LightGBM on everything but ids, with as many trees as suit the eval split.

    Args:
      objective: a name of LightGBM.
    """

    def fit(data: RankingData, task: TaskSpec, parameters: Parameters, seed: int) -> dict[History, Predict]:
        features = data.any_features
        places = features.of_kinds(Kind.CATEGORY, Kind.NUMBER, Kind.RATE, Kind.MEAN)
        settings = {
            **TREE_SETTINGS,
            **parameters,
            "objective": objective,
            "metric": "binary_logloss" if objective == "binary" else "l1",
            "num_threads": data.threads,
            "seed": seed,
        }
        categories = [places.index(place) for place in features.of_kinds(Kind.CATEGORY)]
        rows, judged = data.rows(task, "train"), data.rows(task, "eval")
        train = lightgbm.Dataset(
            features.values[rows][:, places],
            data.labels(task, rows),
            categorical_feature=categories,
            params=settings,
        )
        # One boosting for all histories, stopped when none of them gains from more trees.
        found: dict[str, dict[str, list[float]]] = {}
        booster = lightgbm.train(
            settings,
            train,
            MAX_TREES,
            valid_sets=[
                train.create_valid(f.values[judged][:, places], data.labels(task, judged))
                for f in data.features.values()
            ],
            valid_names=[history.value for history in data.features],
            callbacks=[lightgbm.record_evaluation(found), _stop_when_all_are_worse(PATIENCE_TREES)],
        )
        losses = {history: next(iter(found[history.value].values())) for history in data.features}
        return {
            history: _trees(booster, places, int(np.argmin(loss)) + 1) for history, loss in losses.items()
        }

    return fit


def _trees(booster: lightgbm.Booster, places: list[int], num_trees: int) -> Predict:
    def predict(features: FeatureMatrix, asked: BoolArray) -> FloatArray:
        return booster.predict(features.values[asked][:, places], num_iteration=num_trees)

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


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A baseline with its parameters chosen for one history.

    Attributes:
      parameters: what did best on the eval split.
      models: one fit per seed; one alone when the fit does not depend on the seed.
    """

    parameters: Parameters
    models: Sequence[Predict]


def tune(
    baseline: Baseline, data: RankingData, task: TaskSpec, seeds: int, on_fit: Callable[[], None]
) -> dict[History, Fitted]:
    """Chooses the parameters with the least loss on the eval split, for each history, then fits every seed.

    The loss is the log loss of binary tasks and the mean absolute error of the others.

    Args:
      baseline: the family.
      data: to fit on and to judge with.
      task: to predict.
      seeds: how many seeds a seeded baseline is fitted with.
      on_fit: called after each fit of the grid.
    """
    judged = data.rows(task, "eval")
    labels = data.labels(task, judged)
    loss = metrics.log_loss if task.kind is TaskKind.BINARY else metrics.mae
    best: dict[History, tuple[float, Parameters, Predict]] = {}
    for parameters in baseline.choices():
        for history, model in baseline.fit(data, task, parameters, 0).items():
            value = loss(labels, model(data.features[history], judged))
            if history not in best or value < best[history][0]:
                best[history] = value, parameters, model
        on_fit()
    fitted = {history: Fitted(parameters, [model]) for history, (_, parameters, model) in best.items()}
    if not baseline.seeded:
        return fitted
    for seed in range(1, seeds):
        refitted: list[tuple[Parameters, dict[History, Predict]]] = []
        for history, chosen in fitted.items():
            known = [models for parameters, models in refitted if parameters == chosen.parameters]
            if not known:
                known = [baseline.fit(data, task, chosen.parameters, seed)]
                refitted.append((chosen.parameters, known[0]))
            fitted[history] = Fitted(chosen.parameters, [*chosen.models, known[0][history]])
    return fitted


_BINARY = frozenset({TaskKind.BINARY})
_NUMERIC = frozenset(TaskKind) - _BINARY
_TREE_GRID = {"num_leaves": (8, 31), "min_data_in_leaf": (100, 400)}
BASELINES: Mapping[str, Baseline] = {
    "item mean": Baseline(frozenset(TaskKind), fit_item_mean),
    "logistic regression": Baseline(_BINARY, fit_logistic_regression, {"C": (0.001, 0.003, 0.01, 0.03)}),
    "ridge regression": Baseline(_NUMERIC, fit_ridge_regression, {"alpha": (30.0, 100.0, 300.0)}),
    "LightGBM": Baseline(_BINARY, fit_trees("binary"), _TREE_GRID, seeded=True),
    "LightGBM, L1": Baseline(_NUMERIC, fit_trees("regression_l1"), _TREE_GRID, seeded=True),
    "LightGBM, L2": Baseline(_NUMERIC, fit_trees("regression"), _TREE_GRID, seeded=True),
}
