"""Judging ranked lists user by user, and telling a difference between two models from noise.

Letters: U = users, I = items, K = length of the lists, S = seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.sparse as sp
import scipy.stats

from benchmarks.protocols import EvaluationUsers, mask_seen
from benchmarks.seeds import mean_and_std
from schema.errors import ShapeError
from trainer import metrics
from trainer.metrics import FloatArray, IntArray

LIST_LENGTH = 100
CUTOFFS = (10, LIST_LENGTH)
NEXT_ITEM_HIT_RATE = "next_item_hit_rate_at_10"
USER_METRICS = (*(f"{name}_at_{k}" for name in ("recall", "ndcg") for k in CUTOFFS), NEXT_ITEM_HIT_RATE)
_BOOTSTRAP_SAMPLES = 10_000
_CHUNK_USERS = 512


def recommend(score: Callable[[sp.csr_matrix], FloatArray], users: EvaluationUsers) -> IntArray:
    """The best unseen items of every user.

    Args:
      score: float32 [B, I] histories -> float [B, I] scores.
      users: whom to recommend to.

    Returns:
      int64 [U, LIST_LENGTH], best first, equal scores in catalogue order; -1 where too few items are unseen.
    """
    chunks = [
        _best_unseen(score(history), history)
        for history in (
            users.history[start : start + _CHUNK_USERS] for start in range(0, len(users), _CHUNK_USERS)
        )
    ]
    return np.concatenate(chunks)


def _best_unseen(scores: FloatArray, history: sp.csr_matrix) -> IntArray:
    masked = np.array(scores, np.float64)
    mask_seen(masked, np.split(history.indices, history.indptr[1:-1]))
    top = np.sort(np.argpartition(-masked, LIST_LENGTH - 1, axis=1)[:, :LIST_LENGTH], axis=1)
    values = np.take_along_axis(masked, top, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    ranked, values = np.take_along_axis(top, order, axis=1), np.take_along_axis(values, order, axis=1)
    return np.where(np.isneginf(values), -1, ranked)


def judge(ranked: IntArray, positives: Sequence[IntArray]) -> dict[str, FloatArray]:
    """The metrics of every user.

    Recall, NDCG: see trainer/metrics/retrieval.py. The next-item hit rate is 1 where the first held-out item
    in time order stands among the first 10.

    Args:
      ranked: int64 [U, LIST_LENGTH], -1 is padding.
      positives: for each user the held-out items, one or more, in time order.

    Returns:
      A name of `USER_METRICS` -> float64 [U].
    """
    hits, num_positives = metrics.match_positives(ranked, [codes.tolist() for codes in positives])
    values = metrics.retrieval_metrics(hits, num_positives, CUTOFFS, ("recall", "ndcg"))
    first = metrics.match_positives(ranked, [codes[:1].tolist() for codes in positives])
    return {**values, NEXT_ITEM_HIT_RATE: metrics.hit_rate_at_k(*first, k=10)}


@dataclasses.dataclass(frozen=True)
class Judged:
    """A model on some users, once per seed.

    Attributes:
      by_user: metric name -> float64 [S, U].
      coverage: float64 [S], distinct items in everybody's first 10, as a share of the catalogue.
    """

    by_user: Mapping[str, FloatArray]
    coverage: FloatArray

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Metric -> `mean` over users and seeds, and `std` over seeds, None for one seed."""
        per_seed = {name: values.mean(axis=1) for name, values in self.by_user.items()}
        per_seed["coverage_at_10"] = self.coverage
        return {name: mean_and_std(values) for name, values in per_seed.items()}


def judge_all(ranked_by_seed: Sequence[IntArray], users: EvaluationUsers, num_items: int) -> Judged:
    """Judges the lists of every seed, int64 [U, LIST_LENGTH] each, on the same users."""
    judged = [judge(ranked, users.positives) for ranked in ranked_by_seed]
    return Judged(
        {name: np.stack([values[name] for values in judged]) for name in USER_METRICS},
        np.array([metrics.distinct_items_at_k(ranked, 10) / num_items for ranked in ranked_by_seed]),
    )


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """How much better one model is than another on the same users.

    Attributes:
      difference: mean over users of ours − theirs.
      low, high: 95 % interval of it, percentiles of the paired bootstrap over users.
      p_value: of the two-sided paired t-test over users; 1 when no user differs.
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_difference(ours: FloatArray, theirs: FloatArray) -> PairedDifference:
    """Compares two models user by user, each user's value being the mean over seeds.

    The interval resamples users, both models at once (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, chapter 13); it holds for the seeds given, their spread is reported beside it. The p-value is that
    of `scipy.stats.ttest_rel`. Neither is corrected for the number of comparisons.

    Args:
      ours: float64 [S, U].
      theirs: float64 [S', U], the same users in the same order.

    Raises:
      ShapeError: the numbers of users differ.
    """
    if ours.shape[1:] != theirs.shape[1:]:
        raise ShapeError(f"values of {ours.shape[1:]} and {theirs.shape[1:]} users; expected the same users.")
    differences = ours.mean(axis=0) - theirs.mean(axis=0)
    if not differences.any():
        return PairedDifference(0.0, 0.0, 0.0, 1.0)
    generator = np.random.default_rng(0)
    num_users = len(differences)
    means = [
        differences[generator.integers(num_users, size=num_users)].mean() for _ in range(_BOOTSTRAP_SAMPLES)
    ]
    low, high = np.percentile(means, (2.5, 97.5))
    p_value = scipy.stats.ttest_rel(ours.mean(axis=0), theirs.mean(axis=0)).pvalue
    return PairedDifference(float(differences.mean()), float(low), float(high), float(p_value))
