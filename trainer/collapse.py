"""Tells a model that says the same to everybody from one that does not.

Recall alone does not: a model that gives everybody the same popular items still finds some of what people
choose.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from schema.errors import CollapsedModelError
from trainer.metrics import distinct_items_at_k, metric_key

DISTINCT_K = 10
DISTINCT_ITEMS = metric_key("retrieval", "distinct_items", k=DISTINCT_K)
QUERY_RANK = metric_key("retrieval", "query_effective_rank")
CANDIDATE_RANK = metric_key("retrieval", "candidate_effective_rank")

# Vectors that differ along one direction, such as equal item vectors with biases of their own, have rank
# 1; two directions of which one is five times as long have 1.57. Trained models are far above.
MIN_EFFECTIVE_RANK = 1.5
# Differences below this share of the vectors' length are rounding errors of float32 sums.
_ROUNDING = 1e-5
# Fewer vectors than this say nothing about the tower that made them.
MIN_VECTORS = 10


def effective_rank(vectors: npt.ArrayLike) -> float:
    """In how many directions the vectors differ from each other.

    Formula: exp(-sum_k p_k ln p_k), p_k = s_k / sum_j s_j, s = singular values of the
    vectors less their mean.
    Range 0 (all vectors equal, or none) to D: 1 where they lie on one line, D where they spread evenly in all
    directions. Singular values below 1e-5 of the vectors' norm count as 0: they are rounding errors.
    Source: Roy and Vetterli, EUSIPCO 2007, section 2.

    Args:
      vectors: float [N, D], finite.

    >>> # Singular values 2 and 2: twice as far, in both of two directions.
    >>> round(effective_rank([[1, 1], [1, -1], [-1, 1], [-1, -1]]), 4), effective_rank([[3, 4], [3, 4]])
    (2.0, 0.0)
    """
    table = np.asarray(vectors, np.float64)
    if not len(table):
        return 0.0
    centred = table - table.mean(axis=0)
    # Of the D x D product: its cost grows with the number of vectors no faster than reading them.
    squares = np.clip(np.linalg.eigvalsh(centred.T @ centred), 0.0, None)
    values = np.sqrt(squares)
    values = values[values > _ROUNDING * np.linalg.norm(table)]
    shares = values / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares)))) if len(values) else 0.0


def collapse_metrics(
    query_vectors: np.ndarray, candidate_vectors: np.ndarray, ranked_rows: np.ndarray
) -> dict[str, float]:
    """The figures by which a collapse is told.

    Args:
      query_vectors: float32 [U, D] or [U, M, D].
      candidate_vectors: float32 [I, D].
      ranked_rows: int [U, K], what each user is recommended, K at least DISTINCT_K; negative numbers pad.

    Returns:
      QUERY_RANK and CANDIDATE_RANK, see `effective_rank`; DISTINCT_ITEMS, how many items are in
      anybody's top 10.
    """
    return {
        # A user's interests side by side: the directions in which users differ, not their interests.
        QUERY_RANK: effective_rank(np.reshape(query_vectors, [len(query_vectors), -1])),
        CANDIDATE_RANK: effective_rank(candidate_vectors),
        DISTINCT_ITEMS: float(distinct_items_at_k(ranked_rows, DISTINCT_K)),
    }


def check_not_collapsed(measured: Mapping[str, float], num_users: int, num_items: int) -> None:
    """Refuses a model that recommends the same to everybody.

    A ranking by popularity alone passes when users have seen different items: it is narrow, and whether it is
    good enough is for recall to say. Fewer than 10 users or items are not judged.

    Args:
      measured: from `collapse_metrics`.
      num_users: users that were measured.
      num_items: items of the catalogue.

    Raises:
      CollapsedModelError: the query vectors or the candidate vectors differ in fewer directions than
        MIN_EFFECTIVE_RANK, or everybody's top 10 holds the same ten items.
    """
    reasons = [
        f"the {count:,} {kind} vectors differ in {measured[key]:.2f} directions (effective rank), "
        f"fewer than {MIN_EFFECTIVE_RANK}"
        for kind, key, count in (("query", QUERY_RANK, num_users), ("candidate", CANDIDATE_RANK, num_items))
        if count >= MIN_VECTORS and measured[key] < MIN_EFFECTIVE_RANK
    ]
    if num_users >= MIN_VECTORS and num_items > DISTINCT_K >= measured[DISTINCT_ITEMS]:
        reasons.append(
            f"the top {DISTINCT_K} of {num_users:,} users hold {measured[DISTINCT_ITEMS]:.0f} of "
            f"{num_items:,} items"
        )
    if reasons:
        raise CollapsedModelError(
            f"the retrieval model recommends the same to everybody: {'; '.join(reasons)}. Lower "
            "learning_rate, check that the features and histories of users and items are not empty, and see "
            "training_log.json for the epoch in which it happened."
        )
