"""Simple retrieval models of the literature, fitted by existing libraries and tuned on the validation window.

Needs the extra `benchmarks`. Item-kNN and iALS are those of `implicit`, EASE is that of `rectools`.

Letters: U = users, I = items of the catalogue.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from implicit.nearest_neighbours import BM25Recommender
from implicit.utils import ParameterWarning
from rectools.dataset import Dataset
from rectools.models import EASEModel

from benchmarks.protocols import TemporalProtocol
from trainer.baselines import SECONDS_PER_DAY, popularity, recent_popularity
from trainer.item_factors import fitted_ials
from trainer.metrics import FloatArray

# Scores of all items for some users, from what they have seen: float32 [B, I] in, float [B, I] out.
ScoreHistories = Callable[[sp.csr_matrix], FloatArray]
Parameters = Mapping[str, Any]

IALS_FACTORS = 64
RECENCY_HALF_LIFE_DAYS = 2.0


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A model family to be tuned.

    Attributes:
      fit: (protocol, seed, parameters) -> the fitted model.
      grid: parameter -> values to try on the validation window; {} when there is nothing to tune.
      seeded: whether the fit depends on the seed.
    """

    fit: Callable[[TemporalProtocol, int, Parameters], ScoreHistories]
    grid: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    seeded: bool = False

    def choices(self) -> Iterator[Parameters]:
        """Every combination of the grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def same_for_all(item_scores: FloatArray) -> ScoreHistories:
    """One ranking for everybody, from float [I]."""
    return lambda history: np.tile(item_scores, (history.shape[0], 1))


def fit_popularity(protocol: TemporalProtocol, seed: int, parameters: Parameters) -> ScoreHistories:
    """Number of training positives of each item."""
    return same_for_all(popularity(protocol.train_items, len(protocol.item_ids)))


def fit_recent_popularity(protocol: TemporalProtocol, seed: int, parameters: Parameters) -> ScoreHistories:
    """Number of training positives in the last `window_days` of training."""
    return same_for_all(
        recent_popularity(
            protocol.train_items, protocol.train_times_unix_s, len(protocol.item_ids), **parameters
        )
    )


def fit_item_knn(protocol: TemporalProtocol, seed: int, parameters: Parameters) -> ScoreHistories:
    """Sum of the similarities to the seen items, each known by its `K` nearest neighbours.

    Item vectors weigh users by BM25, `K1` and `B` as in text retrieval: K1 saturates the count, B punishes
    popular items. Source: Deshpande and Karypis, TOIS 2004, doi:10.1145/963770.963776.
    """
    model = BM25Recommender(**parameters)
    with warnings.catch_warnings():
        # The library warns that it has to convert the weighted matrix, which it made itself.
        warnings.simplefilter("ignore", ParameterWarning)
        model.fit(protocol.train, show_progress=False)
    return lambda history: (history @ model.similarity).toarray()


def fit_ials(protocol: TemporalProtocol, seed: int, parameters: Parameters) -> ScoreHistories:
    """Implicit-feedback matrix factorisation; the users' factors are solved from what they have seen.

    `alpha` is the weight of a chosen item, that of the others being 1. The ridge is given per `alpha`: the
    best one moves with it.

    Source: Hu, Koren and Volinsky, ICDM 2008, doi:10.1109/ICDM.2008.22.
    """
    ridge = parameters["alpha"] * parameters["regularization_per_alpha"]
    model = fitted_ials(protocol.train, IALS_FACTORS, parameters["alpha"], ridge, seed)
    return lambda history: model.recalculate_user(np.arange(history.shape[0]), history) @ model.item_factors.T


def fit_ease(protocol: TemporalProtocol, seed: int, parameters: Parameters) -> ScoreHistories:
    """Linear item-item model with a zero diagonal and ridge `regularization`.

    Source: Steck, WWW 2019, doi:10.1145/3308558.3313710.
    """
    users, items = protocol.train.nonzero()
    dataset = Dataset.construct(
        pd.DataFrame({"user_id": users, "item_id": items, "weight": 1.0, "datetime": pd.Timestamp(0)})
    )
    model = EASEModel(**parameters).fit(dataset)
    # The library numbers the items in its own order and leaves out those without interactions.
    known = dataset.item_id_map.external_ids
    num_items = len(protocol.item_ids)

    def score(history: sp.csr_matrix) -> FloatArray:
        scores = np.zeros((history.shape[0], num_items))
        scores[:, known] = history[:, known] @ model.weight
        return scores

    return score


def fit_ease_recency(protocol: TemporalProtocol, seed: int, parameters: Parameters) -> ScoreHistories:
    """EASE, negative scores cut off, times one plus the recent popularity of the item.

    The recent popularity sums 0.5^(age / half-life) over the training positives of the item; age counts from
    the last of all of them.
    """
    ease = fit_ease(protocol, seed, parameters)
    times = protocol.train_times_unix_s
    age_days = (times.max() - times) / SECONDS_PER_DAY
    weights = 0.5 ** (age_days / RECENCY_HALF_LIFE_DAYS)
    prior = 1.0 + np.bincount(protocol.train_items, weights=weights, minlength=len(protocol.item_ids))
    return lambda history: np.maximum(ease(history), 0.0) * prior


_EASE_GRID = {"regularization": (1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0)}
BASELINES = {
    "popularity": Baseline(fit_popularity),
    "recent popularity": Baseline(fit_recent_popularity, {"window_days": (7.0,)}),
    "item-kNN": Baseline(
        fit_item_knn, {"K": (100, 1000), "K1": (1.2, 10.0, 100.0, 1000.0), "B": (0.0, 0.2, 0.75)}
    ),
    "iALS": Baseline(
        fit_ials,
        {
            "alpha": (5.0, 20.0, 100.0, 200.0, 500.0, 1000.0),
            "regularization_per_alpha": (3.0, 5.0, 10.0, 30.0, 50.0),
        },
        seeded=True,
    ),
    "EASE": Baseline(fit_ease, _EASE_GRID),
    "EASE x recency": Baseline(fit_ease_recency, _EASE_GRID),
}
