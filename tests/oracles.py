"""Slow versions of the metrics, written from the formulas with loops and sets, apart from the code."""

import itertools
import math
from collections.abc import Hashable, Sequence
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


def precision_at_k(ranked: Sequence[str], positives: Sequence[str], k: int) -> float:
    ranks, num_wanted = _hit_ranks(ranked, positives, k)
    return len(ranks) / k if num_wanted else math.nan


def map_at_k(ranked: Sequence[str], positives: Sequence[str], k: int) -> float:
    ranks, num_wanted = _hit_ranks(ranked, positives, k)
    if not num_wanted:
        return math.nan
    return sum(number / rank for number, rank in enumerate(ranks, start=1)) / min(k, num_wanted)


def distinct_items_at_k(ranked: Sequence[Sequence[str]], k: int) -> int:
    return len({item for row in ranked for item in row[:k] if item not in PADDING})


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


def normalised_entropy(labels: Sequence[float], predictions: Sequence[float]) -> float:
    if len(set(labels)) < 2:
        return math.nan
    rate = sum(labels) / len(labels)
    return log_loss(labels, predictions) / log_loss(labels, [rate] * len(labels))


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


def weighted_pairwise_loss(
    clicks: Sequence[float],
    watch_times: Sequence[float],
    predictions: Sequence[float],
    groups: Sequence[Hashable],
) -> float:
    lost = total = 0.0
    for i, j in itertools.product(range(len(clicks)), repeat=2):
        if groups[i] == groups[j] and clicks[i] == 1 and clicks[j] == 0:
            total += watch_times[i]
            if predictions[i] < predictions[j]:
                lost += watch_times[i]
            elif predictions[i] == predictions[j]:
                lost += watch_times[i] / 2
    return lost / total if total else math.nan


def coverage_at_k(lists: Sequence[Sequence[int]], k: int, num_items: int) -> float:
    return len({row for items in lists for row in items[:k] if row >= 0}) / num_items


def gini_at_k(lists: Sequence[Sequence[int]], k: int, num_items: int) -> float:
    """Mean difference of two distinct items' counts, over twice the mean count."""
    counts = [sum(items[:k].count(row) for items in lists) for row in range(num_items)]
    pairs = list(itertools.combinations(counts, 2))
    if not pairs or not sum(counts):
        return math.nan
    return sum(abs(a - b) for a, b in pairs) / len(pairs) / (2 * sum(counts) / num_items)


def novelty_at_k(items: Sequence[int], k: int, num_choosers: Sequence[int], num_users: int) -> float:
    rows = [row for row in items[:k] if row >= 0]
    bits = [math.log((num_users + 1) / (num_choosers[row] + 1)) / math.log(2) for row in rows]
    return sum(bits) / len(bits) if bits else math.nan


def mean_popularity_at_k(items: Sequence[int], k: int, num_choosers: Sequence[int]) -> float:
    counts = [num_choosers[row] for row in items[:k] if row >= 0]
    return sum(counts) / len(counts) if counts else math.nan


def attribute_diversity_at_k(items: Sequence[int], k: int, attributes: Sequence[set[int]]) -> float:
    distances = []
    for a, b in itertools.combinations([attributes[row] for row in items[:k] if row >= 0], 2):
        distances.append(1 - len(a & b) / len(a | b) if a | b else 1.0)
    return sum(distances) / len(distances) if distances else math.nan


def mean_age_days_at_k(items: Sequence[int], k: int, uploads: Sequence[float], now: float) -> float:
    known = [uploads[row] for row in items[:k] if row >= 0 and not math.isnan(uploads[row])]
    return sum(max(0.0, now - time) / 86_400 for time in known) / len(known) if known else math.nan


def sampled_softmax(
    queries: Sequence[Sequence[float]],
    candidates: Sequence[Sequence[float]],
    positives: Sequence[int],
    log_weights: Sequence[float],
    temperature: float,
    sample_weights: Sequence[float],
    hard_negatives: Sequence[Sequence[int]],
) -> float:
    total = 0.0
    for row, query in enumerate(queries):
        certain = set(hard_negatives[row]) - {positives[row]}
        logits = []
        for column, candidate in enumerate(candidates):
            score = sum(q * c for q, c in zip(query, candidate, strict=True)) / temperature
            logits.append(score + (0.0 if column in certain else log_weights[column]))
        top = max(logits)
        partition = top + math.log(sum(math.exp(logit - top) for logit in logits))
        total += sample_weights[row] * (partition - logits[positives[row]])
    return total / sum(sample_weights)


def daily_popularity(
    choices: Sequence[tuple[int, int]], num_ids: int, num_days: int, half_life_days: float
) -> list[list[float]]:
    """By item and day; a choice is (item, days before the end), and ids 0 and 1 stand for an average item."""
    table: list[list[float]] = []
    for item in range(num_ids):
        table.append([])
        for today in range(num_days):
            # The youngest choice that counts is a day older than today, and weighs 1.
            ages = [day - today - 1 for chosen, day in choices if chosen == item and day > today]
            table[item].append(math.fsum(0.5 ** (age / half_life_days) for age in ages))
    items = range(2, num_ids)
    for today in range(num_days):
        mean = math.fsum(table[item][today] for item in items) / len(items)
        for item in items:
            table[item][today] = math.log(0.02 + (table[item][today] / mean if mean else 0.0))
        mean = math.fsum(table[item][today] for item in items) / len(items)
        for item in items:
            table[item][today] -= mean
    deviation = math.sqrt(math.fsum(v * v for item in items for v in table[item]) / (len(items) * num_days))
    return [[v / deviation if item > 1 else 0.0 for v in row] for item, row in enumerate(table)]
