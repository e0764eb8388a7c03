"""Slow versions of the metrics, written from the formulas with loops and sets, apart from the code."""

import math
from collections.abc import Sequence
from fractions import Fraction

PADDING = ("", b"")


def _hit_ranks(ranked: Sequence[str], positives: Sequence[str], k: int) -> tuple[list[int], int]:
    """Ranks (from 1) of the hits among the first k, each item once; and the number of distinct positives."""
    wanted = {item for item in positives if item not in PADDING}
    seen: set[str] = set()
    ranks = []
    for rank, item in enumerate(ranked[:k], start=1):
        if item in wanted and item not in seen:
            ranks.append(rank)
        seen.add(item)
    return ranks, len(wanted)


def recall_at_k(ranked: Sequence[str], positives: Sequence[str], k: int) -> float:
    ranks, num_wanted = _hit_ranks(ranked, positives, k)
    return len(ranks) / num_wanted if num_wanted else math.nan


def ndcg_at_k(ranked: Sequence[str], positives: Sequence[str], k: int) -> float:
    ranks, num_wanted = _hit_ranks(ranked, positives, k)
    if not num_wanted:
        return math.nan
    gain = sum(math.log(2) / math.log(rank + 1) for rank in ranks)
    return gain / sum(math.log(2) / math.log(rank + 1) for rank in range(1, min(k, num_wanted) + 1))


def hit_rate_at_k(ranked: Sequence[str], positives: Sequence[str], k: int) -> float:
    ranks, num_wanted = _hit_ranks(ranked, positives, k)
    return float(len(ranks) > 0) if num_wanted else math.nan


def mrr_at_k(ranked: Sequence[str], positives: Sequence[str], k: int) -> float:
    ranks, num_wanted = _hit_ranks(ranked, positives, k)
    if not num_wanted:
        return math.nan
    return 1 / ranks[0] if ranks else 0.0


def coverage_at_k(ranked: Sequence[Sequence[str]], catalogue_size: int, k: int) -> float:
    return len({item for row in ranked for item in row[:k] if item not in PADDING}) / catalogue_size


def macro_mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def xauc(labels: Sequence[float], predictions: Sequence[float]) -> float:
    """Over all pairs with different labels; for labels of 0 and 1 this is the AUC."""
    score, num_pairs = Fraction(0), 0
    for i in range(len(labels)):
        for j in range(len(labels)):
            if labels[i] > labels[j]:
                num_pairs += 1
                if predictions[i] > predictions[j]:
                    score += 1
                elif predictions[i] == predictions[j]:
                    score += Fraction(1, 2)
    return float(score / num_pairs) if num_pairs else math.nan


def gauc(labels: Sequence[float], predictions: Sequence[float], user_ids: Sequence[str]) -> float:
    total, weight = 0.0, 0
    for user in set(user_ids):
        rows = [i for i, other in enumerate(user_ids) if other == user]
        value = xauc([labels[i] for i in rows], [predictions[i] for i in rows])
        if not math.isnan(value):
            total, weight = total + len(rows) * value, weight + len(rows)
    return total / weight if weight else math.nan


def log_loss(labels: Sequence[float], predictions: Sequence[float]) -> float:
    costs = []
    for label, prediction in zip(labels, predictions, strict=True):
        p = min(max(prediction, 1e-7), 1 - 1e-7)
        costs.append(-math.log(p) if label == 1 else -math.log(1 - p))
    return sum(costs) / len(costs) if costs else math.nan


def mae(labels: Sequence[float], predictions: Sequence[float]) -> float:
    costs = [abs(label - prediction) for label, prediction in zip(labels, predictions, strict=True)]
    return sum(costs) / len(costs) if costs else math.nan


def ece(labels: Sequence[float], predictions: Sequence[float], num_bins: int) -> float:
    bins: dict[int, list[int]] = {}
    for i, prediction in enumerate(predictions):
        below = sum(other < prediction for other in predictions)
        same = sum(other == prediction for other in predictions)
        middle = Fraction(2 * below + same, 2 * len(predictions))  # mid-rank less a half, as a share
        bins.setdefault(math.floor(middle * num_bins), []).append(i)
    error = 0.0
    for rows in bins.values():
        mean_label = sum(labels[i] for i in rows) / len(rows)
        mean_prediction = sum(predictions[i] for i in rows) / len(rows)
        error += len(rows) / len(labels) * abs(mean_label - mean_prediction)
    return error if bins else math.nan
