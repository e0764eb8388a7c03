"""Simple ranking models, fitted by existing libraries on what the ranker knows.

The linear models are those of scikit-learn, the trees those of LightGBM. They read the features of
`trainer.ranking_features`.

Letters: m = rows, F = features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from schema.contract import DatasetSpec
from trainer.features import HOUR_OF_DAY, SURFACE, USER_ID
from trainer.ranking_features import FeatureMatrix, FloatArray, Kind

# Features of m rows to predictions in the unit of the label, float64 [m].
Predict = Callable[[FeatureMatrix], FloatArray]

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
    encode: LinearFeatures,
    train: FeatureMatrix,
    labels: FloatArray,
    inverse_ridge: float,
    max_iterations: int,
) -> Predict:
    """Logistic regression with ridge.

    Args:
      encode: from rows of the train split.
      train: m rows to learn from.
      labels: [m], 0 or 1.
      inverse_ridge: scikit-learn's C.
      max_iterations: of L-BFGS.
    """
    model = LogisticRegression(C=inverse_ridge, max_iter=max_iterations)
    model.fit(encode(train), labels)
    return lambda features: model.predict_proba(encode(features))[:, 1]


def ridge_regression(
    encode: LinearFeatures, train: FeatureMatrix, labels: FloatArray, ridge: float, is_time: bool
) -> Predict:
    """Linear regression with ridge, within the range of the labels.

    Args:
      encode, train: as `logistic_regression`.
      labels: [m].
      ridge: scikit-learn's alpha.
      is_time: whether log(1 + label) is learnt: watch times are skewed.
    """
    model = Ridge(alpha=ridge, solver="sparse_cg")
    model.fit(encode(train), np.log1p(labels) if is_time else labels)
    low, high = labels.min(), labels.max()

    def predict(features: FeatureMatrix) -> FloatArray:
        found = model.predict(encode(features)).astype(np.float64)
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
