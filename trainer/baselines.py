"""The simplest baselines, popularity and item means, and the names of all.

The others are in `trainer.retrieval_baselines` and `trainer.ranking_baselines`.

Letters: U = users, I = items of the catalogue, n = rows.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from schema.contract import TaskKind
from schema.errors import ConfigError, DataError, ShapeError
from trainer.metrics import FloatArray, IntArray

POPULARITY, RECENT_POPULARITY, NEWEST, RANDOM = "popularity", "recent_popularity", "newest", "random"
ITEM_KNN, IALS = "item_knn", "ials"
RETRIEVAL_BASELINES = (POPULARITY, RECENT_POPULARITY, ITEM_KNN, IALS, NEWEST, RANDOM)
GLOBAL_MEAN, GLOBAL_MEDIAN, ITEM_MEAN = "global_mean", "global_median", "item_mean"
LOGISTIC_REGRESSION, RIDGE_REGRESSION, LIGHTGBM = "logistic_regression", "ridge_regression", "lightgbm"
RANKING_BASELINES = (GLOBAL_MEAN, GLOBAL_MEDIAN, ITEM_MEAN, LOGISTIC_REGRESSION, RIDGE_REGRESSION, LIGHTGBM)
# Of them, those that predict no binary task, and those that predict nothing else.
_NOT_BINARY, _BINARY_ONLY = (GLOBAL_MEDIAN, RIDGE_REGRESSION), (LOGISTIC_REGRESSION,)

SECONDS_PER_DAY = 86_400
# Bounds the memory of a chunk of users times items to some tens of megabytes.
_CELLS_PER_CHUNK = 8_000_000


def ranking_baselines(kind: TaskKind) -> tuple[str, ...]:
    """The baselines that predict tasks of a kind.

    >>> ranking_baselines(TaskKind.BINARY)
    ('global_mean', 'item_mean', 'logistic_regression', 'lightgbm')
    """
    others = _NOT_BINARY if kind is TaskKind.BINARY else _BINARY_ONLY
    return tuple(name for name in RANKING_BASELINES if name not in others)


def popularity(item_codes: IntArray, num_items: int) -> FloatArray:
    """Number of training positives of each item.

    Args:
      item_codes: int64 [n], the item of each training positive, 0 to num_items - 1.
      num_items: I.

    Returns:
      float64 [I].
    """
    return np.bincount(item_codes, minlength=num_items).astype(np.float64)


def recent_popularity(
    item_codes: IntArray, event_time_unix_s: IntArray, num_items: int, window_days: float = 7.0
) -> FloatArray:
    """Number of positives of each item in the last days of training; all of training breaks ties.

    Args:
      item_codes: int64 [n], n > 0, the item of each training positive, 0 to num_items - 1.
      event_time_unix_s: int64 [n], seconds; the latest one is the end of training.
      num_items: I.
      window_days: length of the window, above 0.

    Returns:
      float64 [I].

    Raises:
      ConfigError: window_days is not above 0.
    """
    if window_days <= 0:
        raise ConfigError(f"window_days is {window_days}; expected more than 0.")
    everything = popularity(item_codes, num_items)
    recent = event_time_unix_s > event_time_unix_s.max() - window_days * SECONDS_PER_DAY
    # The count over all of training adds less than one: it orders items of equal recent count only.
    return popularity(item_codes[recent], num_items) + everything / (len(item_codes) + 1)


def recommend(item_scores: FloatArray, seen: Sequence[IntArray], k: int) -> IntArray:
    """The k best items for each user when all users share one ranking, less what each has seen.

    Args:
      item_scores: float64 [I]; equal scores keep catalogue order.
      seen: for each user the codes of the items to leave out; codes of I and above are ignored.
      k: at least 1.

    Returns:
      int64 [U, k], best first, -1 where a user has fewer than k unseen items.

    Raises:
      ConfigError: k is below 1.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; expected at least 1.")
    num_items = len(item_scores)
    best_first = np.argsort(-item_scores, kind="stable")
    place = np.empty(num_items, dtype=np.int64)
    place[best_first] = np.arange(num_items)
    result = np.full((len(seen), k), -1, dtype=np.int64)
    chunk_size = max(1, _CELLS_PER_CHUNK // max(1, num_items))
    for start in range(0, len(seen), chunk_size):
        chunk = seen[start : start + chunk_size]
        rows = np.repeat(np.arange(len(chunk)), [len(codes) for codes in chunk])
        codes = np.concatenate([np.empty(0, dtype=np.int64), *chunk])
        # No user needs more of the ranking than k items plus all that they have seen.
        width = min(num_items, k + max(len(codes) for codes in chunk))
        known = codes < num_items
        rows, places = rows[known], place[codes[known]]
        unseen = np.ones((len(chunk), width), dtype=np.bool_)
        unseen[rows[places < width], places[places < width]] = False
        rank = np.cumsum(unseen, axis=1)
        user, column = np.nonzero(unseen & (rank <= k))
        result[start + user, rank[user, column] - 1] = best_first[column]
    return result


def item_mean(
    train_item_ids: Sequence[str],
    train_labels: npt.ArrayLike,
    eval_item_ids: Sequence[str],
    prior_weight: float = 20.0,
) -> FloatArray:
    """Predicts the smoothed training mean of the row's item.

    Formula: (Σ labels of the item + w · global mean) / (rows of the item + w). An item without training rows
    gets the global mean; w is the number of rows at which item and global mean weigh the same.

    Args:
      train_item_ids, train_labels: [n], rows with a label.
      eval_item_ids: [m].
      prior_weight: w, in rows, 0 or more.

    Returns:
      float64 [m].

    Raises:
      ShapeError: ids and labels differ in length.
      DataError: there is no training row, or a label is not finite.
      ConfigError: prior_weight is negative.
    """
    labels = np.asarray(train_labels, dtype=np.float64)
    if labels.shape != (len(train_item_ids),):
        raise ShapeError(f"{len(train_item_ids)} training items but labels of shape {labels.shape}.")
    if not len(labels) or not np.isfinite(labels).all():
        raise DataError(
            f"{np.count_nonzero(np.isfinite(labels))} of {len(labels)} training labels are finite; "
            "expected at least one label and no missing ones: drop the rows without a label."
        )
    if prior_weight < 0:
        raise ConfigError(f"prior_weight is {prior_weight}; expected 0 or more.")
    code_of: dict[str, int] = {}
    train_codes, eval_codes = _encode(train_item_ids, code_of), _encode(eval_item_ids, code_of)
    counts = np.bincount(train_codes, minlength=len(code_of))
    sums = np.bincount(train_codes, weights=labels, minlength=len(code_of))
    means = np.full(len(code_of), labels.mean())
    weights = counts + prior_weight
    np.divide(sums + prior_weight * labels.mean(), weights, out=means, where=weights > 0)
    return means[eval_codes]


def _encode(ids: Sequence[str], code_of: dict[str, int]) -> IntArray:
    """Codes of the ids; an id met for the first time gets the next code, so that it stays distinct."""
    return np.fromiter((code_of.setdefault(item_id, len(code_of)) for item_id in ids), np.int64, len(ids))
