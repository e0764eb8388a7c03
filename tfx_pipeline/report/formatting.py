"""Numbers, dates and metric names as people read them."""

from __future__ import annotations

import datetime
import math
import re

UNDEFINED = "undefined"
_MINUS = "\u2212"
_SCIENTIFIC_BELOW = 1e-4
_EXACT_BELOW = 1e15

# What a metric says, in one sentence each; k stands for the length of the list.
METRIC_MEANINGS = {
    "recall": "Share of what a user went on to choose that is among the first k recommendations.",
    "ndcg": "Like recall, but a hit counts more the higher it stands; 1 means that all hits are on top.",
    "hit_rate": "Share of users with at least one hit among the first k.",
    "mrr": "One over the place of the first hit, averaged over users; 0 without a hit among the first k.",
    "auc": "Chance that a positive example is scored above a negative one; 0.5 is guessing.",
    "gauc": "AUC within each user, averaged: does the order help this one user?",
    "log_loss": "How far the predicted probabilities are from what happened; lower is better.",
    "ece": "Gap between predicted and observed rates, averaged over groups of like predictions; lower is better.",
    "mae": "Mean distance between prediction and truth, in the label's unit; lower is better.",
    "xauc": "Chance that of two examples the one with the larger label is scored higher; 0.5 is guessing.",
}
_METRIC_NAMES = {
    "recall": "Recall",
    "ndcg": "NDCG",
    "hit_rate": "Hit rate",
    "mrr": "MRR",
    "coverage": "Coverage",
    "auc": "AUC",
    "gauc": "GAUC",
    "log_loss": "Log loss",
    "ece": "ECE",
    "mae": "MAE",
    "xauc": "XAUC",
    "calibration": "Calibration",
    "num_queries": "Users",
    "num_examples": "Examples",
}


def number(value: float | int | None) -> str:
    """A whole number with thousands separators, any other as `decimal`."""
    if value is not None and math.isfinite(value) and float(value).is_integer() and abs(value) < _EXACT_BELOW:
        return f"{int(value):,}".replace("-", _MINUS)
    return decimal(value)


def decimal(value: float | None) -> str:
    """Four significant digits, four decimals below 1, thousands separators; `undefined` for None and NaN."""
    if value is None or math.isnan(value):
        return UNDEFINED
    if 0 < abs(value) < _SCIENTIFIC_BELOW:
        text = f"{value:.2e}"
    else:
        digits_before_point = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
        text = f"{value:,.{max(0, 4 - digits_before_point)}f}"
    return text.replace("-", _MINUS)


def difference(value: float | None) -> str:
    """A signed number."""
    if value is None:
        return UNDEFINED
    text = decimal(value)
    return text if text.startswith(_MINUS) else f"+{text}"


def share(value: float | None) -> str:
    """0.1234 as 12.3 %."""
    return UNDEFINED if value is None else f"{100 * value:,.1f}\u00a0%".replace("-", _MINUS)


def moment(unix_s: int, utc_offset_hours: float) -> str:
    """Unix seconds as local date and time to the minute."""
    zone = datetime.timezone(datetime.timedelta(hours=utc_offset_hours))
    return datetime.datetime.fromtimestamp(unix_s, zone).strftime("%Y-%m-%d %H:%M")


def utc_offset(hours: float) -> str:
    """The name of the time zone that `moment` uses."""
    return "UTC" if not hours else f"UTC{hours:+g}".replace("-", _MINUS)


def metric_base(key: str) -> str:
    """`recall` of `retrieval/recall_at_100`."""
    return re.sub(r"_at_\d+$", "", key.rpartition("/")[2])


def metric_label(key: str) -> str:
    """`Recall@100` for `retrieval/recall_at_100`, `click AUC` for `ranking/click/auc`, `ECE` for `ece`."""
    *path, name = key.split("/")
    base, _, k = name.partition("_at_")
    label = _METRIC_NAMES.get(base, words(base)) + (f"@{k}" if k else "")
    return " ".join([*map(words, path[1:]), label])


def words(name: str) -> str:
    """`recent_popularity` as `recent popularity`."""
    return name.replace("_", " ")
