"""Simple retrieval models on the training positives: what the two-tower model is always compared with.

Popularity and its recent kin are those of `trainer.baselines`; item-kNN and iALS are those of `implicit`.

Letters: n = training positives, U = judged users, I = items of the catalogue, B = users scored at a time.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.sparse as sp
from implicit.nearest_neighbours import BM25Recommender
from implicit.utils import ParameterWarning

from schema.errors import ConfigError, ShapeError
from trainer import metrics
from trainer.baselines import (
    IALS,
    ITEM_KNN,
    NEWEST,
    POPULARITY,
    RANDOM,
    RECENT_POPULARITY,
    popularity,
    recent_popularity,
    recommend,
)
from trainer.item_factors import fitted_ials
from trainer.metrics import FloatArray, IntArray
from trainer.progress import tracked

# What users have seen, float32 [B, I], 1 where seen -> scores of all items, float [B, I].
ScoreHistories = Callable[[sp.csr_matrix], FloatArray]

WINDOW_DAYS = 7.0
NUM_NEIGHBOURS, BM25_K1 = 1000, 1.2
IALS_FACTORS = 64
# What is chosen from on the eval split: of the values that `benchmarks.baselines` searches, the best ones of
# KuaiRand, MovieLens and the simulated platform. B of BM25; alpha and ridge per alpha of iALS.
KNN_CHOICES = (0.0, 0.75)
IALS_CHOICES = ((5.0, 10.0), (100.0, 5.0), (100.0, 10.0), (200.0, 5.0))
# The latest positives that item-kNN and iALS are fitted on: their time grows with the log.
MAX_POSITIVES = 5_000_000
# Bounds the memory of a chunk of users times items to some tens of megabytes.
_CELLS_PER_CHUNK = 8_000_000


@dataclasses.dataclass(frozen=True)
class TrainPositives:
    """The positives of the train split.

    Attributes:
      users, items: int64 [n], codes from 0.
      times: int64 [n], unix seconds.
      num_users, num_items: how many codes there are; num_items = I.
    """

    users: IntArray
    items: IntArray
    times: IntArray
    num_users: int
    num_items: int

    def matrix(self) -> sp.csr_matrix:
        """Who chose what, float32 [num_users, I], of the latest MAX_POSITIVES."""
        latest = np.argsort(self.times, kind="stable")[-MAX_POSITIVES:]
        shape = (self.num_users, self.num_items)
        ones = np.ones(len(latest), np.float32)
        matrix = sp.csr_matrix((ones, (self.users[latest], self.items[latest])), shape)
        matrix.data[:] = 1.0
        return matrix


@dataclasses.dataclass(frozen=True)
class EvalUsers:
    """Users that settings are chosen on: V users with a positive in the eval split.

    Attributes:
      seen: for each the codes of the items chosen in training.
      positives: for each the codes of those of the eval split.
    """

    seen: Sequence[IntArray]
    positives: Sequence[IntArray]


def baseline_lists(
    train: TrainPositives,
    seen: Sequence[IntArray],
    k: int,
    upload_times: IntArray | None,
    chosen_on: EvalUsers,
    seed: int = 0,
) -> tuple[dict[str, IntArray], dict[str, str]]:
    """What each baseline recommends.

    Args:
      train: at least one positive.
      seen: for each of U users the codes of the items that were chosen in training, never to be recommended.
      k: length of the lists.
      upload_times: int64 [I], unix seconds, negative where unknown; None when the dataset has none.
      chosen_on: users of the eval split, by whose recall the settings of item-kNN and iALS are chosen; none
        leave the first of them.
      seed: of iALS and of the random order.

    Returns:
      Baseline -> int64 [U, k] item codes, best first, -1 where a list is short; and how each was made.
    """
    recent = recommend(recent_popularity(train.items, train.times, train.num_items, WINDOW_DAYS), seen, k)
    lists = {
        POPULARITY: recommend(popularity(train.items, train.num_items), seen, k),
        RECENT_POPULARITY: recent,
    }
    matrix = train.matrix()
    knn = {
        f"K={NUM_NEIGHBOURS} K1={BM25_K1:g} B={b:g}": item_knn(matrix, b=b)
        for b in tracked(KNN_CHOICES, "settings of item-kNN fitted")
    }
    factors = {
        f"{IALS_FACTORS} factors, alpha={alpha:g}, ridge={alpha * ridge:g}": ials(matrix, alpha, ridge, seed)
        for alpha, ridge in tracked(IALS_CHOICES, "settings of iALS fitted")
    }
    num_cold = sum(not len(codes) for codes in seen)
    fitted = f"on {int(matrix.nnz):,} of {len(train.users):,} train positives"
    fitted += f"; {num_cold:,} users without a history get recent popularity" if num_cold else ""
    notes = {
        POPULARITY: "train positives of an item",
        RECENT_POPULARITY: f"train positives of an item in the last {WINDOW_DAYS:g} days",
    }
    for name, choices in ((ITEM_KNN, knn), (IALS, factors)):
        chosen = _best(choices, chosen_on, k, train.num_items)
        lists[name] = _lists(choices[chosen], seen, k, train.num_items, otherwise=recent)
        notes[name] = f"implicit, {chosen} (of {len(choices)} settings, by the eval split), {fitted}"
    if upload_times is not None:
        lists[NEWEST] = recommend(upload_times.astype(np.float64), seen, k)
        notes[NEWEST] = "latest upload first"
    generator = np.random.default_rng(seed)
    lists[RANDOM] = _lists(lambda history: generator.random(history.shape), seen, k, train.num_items)
    notes[RANDOM] = "any order"
    return lists, notes


def _best(choices: Mapping[str, ScoreHistories], chosen_on: EvalUsers, k: int, num_items: int) -> str:
    """The name of the choice with the largest recall at k."""
    if not chosen_on.positives:
        return next(iter(choices))
    positives = [codes.tolist() for codes in chosen_on.positives]

    def recall(score: ScoreHistories) -> float:
        hits = metrics.match_positives(_lists(score, chosen_on.seen, k, num_items), positives)
        return metrics.macro_mean(metrics.recall_at_k(*hits, k))

    return max(choices, key=lambda name: recall(choices[name]))


def item_knn(
    train: sp.csr_matrix, num_neighbours: int = NUM_NEIGHBOURS, k1: float = BM25_K1, b: float = 0.0
) -> ScoreHistories:
    """Sum of the similarities to the seen items, each known by its nearest neighbours.

    Item vectors weigh users by BM25 as in text retrieval: k1 saturates the count, b punishes popular items.
    Source: Deshpande and Karypis, TOIS 2004, doi:10.1145/963770.963776.

    Args:
      train: float32 [users, I].
      num_neighbours, k1, b: of implicit's BM25Recommender.
    """
    model = BM25Recommender(K=num_neighbours, K1=k1, B=b)
    with warnings.catch_warnings():
        # The library warns that it has to convert the weighted matrix, which it made itself.
        warnings.simplefilter("ignore", ParameterWarning)
        model.fit(train, show_progress=False)
    return lambda history: (history @ model.similarity).toarray()


def ials(train: sp.csr_matrix, alpha: float, ridge_per_alpha: float, seed: int = 0) -> ScoreHistories:
    """Implicit-feedback matrix factorisation; the users' factors are solved from what they have seen.

    Args:
      train: float32 [users, I].
      alpha: weight of a chosen item, that of the others being 1.
      ridge_per_alpha: the ridge is given per alpha: the best one moves with it.
      seed: of the first factors.

    Source: Hu, Koren and Volinsky, ICDM 2008, doi:10.1109/ICDM.2008.22.
    """
    model = fitted_ials(train, IALS_FACTORS, alpha, alpha * ridge_per_alpha, seed)
    return lambda history: model.recalculate_user(np.arange(history.shape[0]), history) @ model.item_factors.T


def best_unseen(scores: FloatArray, seen: sp.csr_matrix, k: int) -> IntArray:
    """The k best items of each user that it has not seen.

    Args:
      scores: float [B, I], finite; equal scores keep catalogue order.
      seen: [B, I], not 0 where seen.
      k: at least 1.

    Returns:
      int64 [B, k], best first, -1 where fewer than k items are unseen.

    Raises:
      ShapeError: the shapes differ.
      ConfigError: k is below 1.
    """
    if scores.shape != seen.shape:
        raise ShapeError(f"scores of shape {scores.shape} for histories of {seen.shape}; expected the same.")
    if k < 1:
        raise ConfigError(f"k is {k}; expected at least 1.")
    masked = np.array(scores, np.float64)
    masked[seen.nonzero()] = -np.inf
    width = min(k, masked.shape[1])
    top = np.argpartition(-masked, width - 1, axis=1)[:, :width]
    # Items that tie with the last of them, but come earlier in the catalogue, would belong there as well:
    # which of the tied are taken does not matter, their order does.
    top = np.sort(top, axis=1)
    values = np.take_along_axis(masked, top, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    top, values = np.take_along_axis(top, order, axis=1), np.take_along_axis(values, order, axis=1)
    result = np.full((len(masked), k), -1, np.int64)
    result[:, :width] = np.where(np.isneginf(values), -1, top)
    return result


def _lists(
    score: ScoreHistories,
    seen: Sequence[IntArray],
    k: int,
    num_items: int,
    otherwise: IntArray | None = None,
) -> IntArray:
    """Lists of all users, a chunk at a time; `otherwise` stands in for those of users without a history."""
    chunk = max(1, _CELLS_PER_CHUNK // num_items)
    parts = []
    for start in range(0, len(seen), chunk):
        codes = seen[start : start + chunk]
        rows = np.repeat(np.arange(len(codes)), [len(c) for c in codes])
        columns = np.concatenate([np.empty(0, np.int64), *codes])
        known = columns < num_items
        ones = np.ones(int(known.sum()), np.float32)
        history = sp.csr_matrix((ones, (rows[known], columns[known])), (len(codes), num_items))
        parts.append(best_unseen(score(history), history, k))
    lists = np.concatenate([np.empty((0, k), np.int64), *parts])
    if otherwise is None:
        return lists
    has_history = np.array([len(codes) > 0 for codes in seen], np.bool_)
    return np.where(has_history[:, None], lists, otherwise)
