"""The models of `trainer.ranking_baselines`, tuned on the eval split.

All learn from the train split, each row as of its own event; a history, see `trainer.ranking_features`, is
chosen for: how the rows of eval and test look.

Letters: n = interactions, m = rows asked about, F = features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from schema.contract import WATCH_TIME, TaskKind, TaskSpec
from schema.errors import DataError
from trainer import metrics
from trainer.features import ITEM_ID
from trainer.ranking_baselines import (
    LinearFeatures,
    PredictLinear,
    boosted_trees,
    linear_features,
    logistic_regression,
    ridge_regression,
)
from trainer.ranking_baselines import Predict as FittedModel
from trainer.ranking_features import BoolArray, FeatureMatrix, FloatArray, History, RankingTables

Parameters = Mapping[str, Any]
# Features of any n interactions, and which of them are asked about, to predictions in the unit of the label.
Predict = Callable[[FeatureMatrix, BoolArray], FloatArray]

_LBFGS_ITERATIONS = 500
MAX_TREES = 2_000
PATIENCE_TREES = 50


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


def _linear(data: RankingData) -> LinearFeatures:
    return linear_features(data.any_features.take(data.tables.of_split("train")), data.tables.spec)


def _on_rows(model: FittedModel) -> Predict:
    return lambda features, rows: model(features.take(rows))


def _on_linear_rows(encode: LinearFeatures, model: PredictLinear) -> Predict:
    return lambda features, rows: model(encode(features.take(rows)))


def fit_logistic_regression(
    data: RankingData, task: TaskSpec, parameters: Parameters, seed: int
) -> dict[History, Predict]:
    """Logistic regression with ridge; `C` is the inverse of its weight."""
    rows = data.rows(task, "train")
    encode = _linear(data)
    train = encode(data.any_features.take(rows))
    model = logistic_regression(train, data.labels(task, rows), parameters["C"], _LBFGS_ITERATIONS)
    return dict.fromkeys(data.features, _on_linear_rows(encode, model))


def fit_ridge_regression(
    data: RankingData, task: TaskSpec, parameters: Parameters, seed: int
) -> dict[History, Predict]:
    """Linear regression with ridge `alpha`; of log(1 + s) for watch times, which are skewed."""
    rows = data.rows(task, "train")
    encode = _linear(data)
    train = encode(data.any_features.take(rows))
    is_time = task.label == WATCH_TIME
    model = ridge_regression(train, data.labels(task, rows), parameters["alpha"], is_time)
    return dict.fromkeys(data.features, _on_linear_rows(encode, model))


def fit_trees(objective: str) -> Callable[[RankingData, TaskSpec, Parameters, int], dict[History, Predict]]:
    """Boosted trees of LightGBM on everything but ids, with as many trees as suit the eval split.

    Args:
      objective: a name of LightGBM.
    """

    def fit(data: RankingData, task: TaskSpec, parameters: Parameters, seed: int) -> dict[History, Predict]:
        rows, judged = data.rows(task, "train"), data.rows(task, "eval")
        settings = {
            **parameters,
            "objective": objective,
            "metric": "binary_logloss" if objective == "binary" else "l1",
            "num_threads": data.threads,
            "seed": seed,
        }
        models = boosted_trees(
            data.any_features.take(rows),
            data.labels(task, rows),
            {
                history.value: (features.take(judged), data.labels(task, judged))
                for history, features in data.features.items()
            },
            settings,
            MAX_TREES,
            PATIENCE_TREES,
        )
        return {history: _on_rows(models[history.value]) for history in data.features}

    return fit


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
