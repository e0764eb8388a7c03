"""Metric keys such as `retrieval/recall_at_100` and `ranking/click/auc`: names, meanings, order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfx_pipeline.report.formatting import words
from trainer.metrics import lower_is_better

# What a metric says, in one sentence each; k stands for the length of the list.
MEANINGS = {
    "recall": "Share of what a user went on to choose that is among the first k recommendations.",
    "precision": "Share of the first k recommendations that the user went on to choose.",
    "ndcg": "Like recall, but a hit counts more the higher it stands; 1 means that all hits are on top.",
    "hit_rate": "Share of users with at least one hit among the first k.",
    "cold_item_recall": "Recall of those items alone that nobody met before the end of training.",
    "distinct_items": "How many items stand among anybody's first k; k of them is the same for everybody.",
    "mrr": "One over the place of the first hit, averaged over users; 0 without a hit among the first k.",
    "map": "Precision at each hit, averaged: all hits on top is 1.",
    "coverage": "Share of the catalogue that stands among anybody's first k.",
    "gini": "How unevenly recommendations go to items; 0 is evenly, 1 is one item for everybody.",
    "novelty": "How surprising it is that somebody knows the first k items, in bits; rare items have more.",
    "mean_popularity": "How many users chose the recommended items in training, on average.",
    "intra_list_diversity": "How much the first k items differ in their attributes; 0 is not at all.",
    "mean_age_days": "Mean age of the first k items when they are recommended, in days.",
    "auc": "Chance that a positive example is scored above a negative one; 0.5 is guessing.",
    "gauc": "AUC within each user, averaged: does the order help this one user?",
    "log_loss": "How far the predicted probabilities are from what happened; lower is better.",
    "normalised_entropy": "Log loss against always predicting the mean rate, which has 1; lower is better.",
    "ece": "Gap between predicted and observed rates, averaged over like predictions; lower is better.",
    "mae": "Mean distance between prediction and truth, in the label's unit; lower is better.",
    "xauc": "Chance that of two examples the one with the larger label is scored higher; 0.5 is guessing.",
    "weighted_pairwise_loss": "Of the watch time of chosen impressions, the share that is scored below one "
    "of the same user that was not chosen; 0 is best, 0.5 is guessing. Means do better here than medians.",
}
_ABBREVIATIONS = frozenset({"ndcg", "mrr", "map", "auc", "gauc", "ece", "mae", "xauc"})


def base(key: str) -> str:
    """`recall` of `retrieval/recall_at_100`."""
    return re.sub(r"_at_\d+$", "", key.rpartition("/")[2])


def cutoff(key: str) -> int:
    """100 of `retrieval/recall_at_100`; 0 where there is none."""
    match = re.search(r"_at_(\d+)$", key)
    return int(match.group(1)) if match else 0


def task(key: str) -> str:
    """`click` of `ranking/click/auc`; "" for retrieval."""
    return key.split("/")[1] if key.count("/") == 2 else ""


def label(key: str) -> str:
    """`Recall@100` of `retrieval/recall_at_100`, `click AUC` of `ranking/click/auc`, `ECE` of `ece`."""
    name = base(key)
    text = name.upper() if name in _ABBREVIATIONS else words(name)
    text += f"@{cutoff(key)}" if cutoff(key) else ""
    return f"{words(task(key))} {text}" if task(key) else text[:1].upper() + text[1:]


def is_cold(key: str) -> bool:
    """Whether the key is about cold items alone."""
    return "cold_item" in base(key)


def badness(key: str, value: float) -> float:
    """The value, with its sign changed where higher is better: the smaller, the better."""
    return value if lower_is_better(key) else -value


def in_task_order(keys: Iterable[str], tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in the order in which the tasks were declared; those of one task keep their order."""
    order = {declared["name"]: place for place, declared in enumerate(tasks)}
    return sorted(keys, key=lambda key: order.get(task(key), len(order)))
