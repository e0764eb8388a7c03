"""What a model has to beat: popularity for retrieval, training means for ranking.

Letters: U = users, I = items of the catalogue, n = rows.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from schema.contract import TaskKind
from schema.errors import ConfigError, DataError, ShapeError
from trainer import metrics
from trainer.metrics import FloatArray, IntArray

SECONDS_PER_DAY = 86_400
# Bounds the memory of a chunk of users times items to some tens of megabytes.
_CELLS_PER_CHUNK = 8_000_000
_RECALL, _COLD_ITEM_RECALL, _DISTINCT_ITEMS = (
    metrics.metric_key("retrieval", name) + "_at_{}"
    for name in ("recall", "cold_item_recall", "distinct_items")
)


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


def evaluate_retrieval_baselines(
    *,
    train_item_ids: Sequence[str],
    train_event_time_unix_s: npt.ArrayLike,
    catalogue_item_ids: Sequence[str],
    seen_item_ids: Sequence[Sequence[str]],
    positive_item_ids: Sequence[Sequence[str]],
    cold_positive_item_ids: Sequence[Sequence[str]],
    ks: Sequence[int],
    upload_time_unix_s: npt.ArrayLike | None = None,
    window_days: float = 7.0,
) -> dict[str, dict[str, float]]:
    """Judges the simple rankings on the users that the retrieval model is judged on.

    Popularity finds no cold item but by its place in the catalogue, among the items that nobody chose: cold
    items are measured against the newest items and a random order.

    Args:
      train_item_ids: [n], the item of each training positive; items outside the catalogue are ignored.
      train_event_time_unix_s: int [n], seconds.
      catalogue_item_ids: [I], distinct; what can be recommended.
      seen_item_ids: for each of U users, the items never to recommend (the user's training positives).
      positive_item_ids: for each of the same users, the held-out positives; users without any are not
        counted, positives outside the catalogue count as missed.
      cold_positive_item_ids: for each of the same users, those of the positives that had no interaction in
        training; cold_item_recall counts these alone, and users without any are not counted in it.
      ks: cut-offs, each 1 or more; users with fewer unseen items get a short list.
      upload_time_unix_s: int [I], seconds, negative where unknown; None when the dataset has none.
      window_days: length of the window of recent popularity, in days.

    Returns:
      `popularity`, `recent_popularity`, `newest` (by upload time, where there is one) and `random` (what a
      random order finds on average; recall only), each metric key -> macro mean over users, for instance
      {"popularity": {"retrieval/recall_at_100": 0.219, ...}, ...}.

    Raises:
      ShapeError: arrays that belong together differ in length.
      DataError: the catalogue is empty, repeats an id, or holds no training item.
      ConfigError: no k, a k below 1, or window_days not above 0.
    """
    times = np.asarray(train_event_time_unix_s, dtype=np.int64)
    if times.shape != (len(train_item_ids),):
        raise ShapeError(f"{len(train_item_ids)} training items but event times of shape {times.shape}.")
    if not len(seen_item_ids) == len(positive_item_ids) == len(cold_positive_item_ids):
        raise ShapeError(
            f"seen items of {len(seen_item_ids)} users, positives of {len(positive_item_ids)}, cold ones of "
            f"{len(cold_positive_item_ids)}; expected one list of each per user, in the same order."
        )
    if not ks:
        raise ConfigError("no cut-off given; expected at least one k.")
    code_of = {item_id: code for code, item_id in enumerate(catalogue_item_ids)}
    num_items = len(code_of)
    if not num_items or num_items != len(catalogue_item_ids):
        raise DataError(
            f"catalogue of {len(catalogue_item_ids)} rows holds {num_items} distinct items; "
            "expected at least one, each once."
        )

    item_codes = _encode(train_item_ids, code_of)
    known = item_codes < num_items
    if not known.any():
        raise DataError(
            f"none of the {len(item_codes)} training items is in the catalogue of {num_items}; "
            "check that both use the same ids, as strings."
        )
    item_codes, times = item_codes[known], times[known]
    seen = [_encode(ids, code_of) for ids in seen_item_ids]
    positives = [_encode(ids, code_of).tolist() for ids in positive_item_ids]
    cold = [_encode(ids, code_of).tolist() for ids in cold_positive_item_ids]
    scores = {
        "popularity": popularity(item_codes, num_items),
        "recent_popularity": recent_popularity(item_codes, times, num_items, window_days),
    }
    if upload_time_unix_s is not None:
        scores["newest"] = np.asarray(upload_time_unix_s, dtype=np.float64)
    judged = {
        name: _judge(recommend(values, seen, max(ks)), positives, cold, ks) for name, values in scores.items()
    }
    return {**judged, "random": _expected_recall(seen, positives, cold, num_items, ks)}


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


def evaluate_ranking_baselines(
    *,
    task: str,
    kind: TaskKind,
    train_item_ids: Sequence[str],
    train_labels: npt.ArrayLike,
    eval_item_ids: Sequence[str],
    eval_labels: npt.ArrayLike,
    eval_user_ids: Sequence[str],
    prior_weight: float = 20.0,
) -> dict[str, dict[str, float]]:
    """Judges the global mean and the item mean on the rows that the ranking model is judged on.

    Tasks that are not binary get the global median as well: it is the best constant for the absolute error,
    and the long tail of watch times puts it far below the mean.

    Args:
      task: its name, part of the metric keys.
      kind: what the task predicts.
      train_item_ids, train_labels: [n]; rows with a NaN label are left out.
      eval_item_ids, eval_labels, eval_user_ids: [m]; rows with a NaN label are left out.
      prior_weight: as in `item_mean`.

    Returns:
      `global_mean`, `item_mean` and, unless binary, `global_median`, each metric key -> value, for instance
      {"item_mean": {"ranking/click/auc": 0.667, ...}, ...}.

    Raises:
      ShapeError, DataError, ConfigError: from `item_mean` and `metrics.ranking_metrics`.
    """
    y_train, y_eval = np.asarray(train_labels, dtype=np.float64), np.asarray(eval_labels, dtype=np.float64)
    train_items, eval_items = np.asarray(train_item_ids), np.asarray(eval_item_ids)
    users = np.asarray(eval_user_ids)
    if train_items.shape != y_train.shape or not eval_items.shape == users.shape == y_eval.shape:
        raise ShapeError(
            f"training items {train_items.shape} and labels {y_train.shape}, evaluation items "
            f"{eval_items.shape}, labels {y_eval.shape} and users {users.shape} must agree in length."
        )
    has_train, has_eval = ~np.isnan(y_train), ~np.isnan(y_eval)
    by_item = item_mean(
        train_items[has_train].tolist(), y_train[has_train], eval_items[has_eval].tolist(), prior_weight
    )
    predictions = {"global_mean": np.full(len(by_item), y_train[has_train].mean()), "item_mean": by_item}
    if kind is not TaskKind.BINARY:
        predictions["global_median"] = np.full(len(by_item), np.median(y_train[has_train]))
    return {
        name: {
            metrics.metric_key("ranking", metric, task=task): value
            for metric, value in metrics.ranking_metrics(
                kind, y_eval[has_eval], values, users[has_eval]
            ).items()
        }
        for name, values in predictions.items()
    }


def _judge(
    ranked: IntArray, positives: Sequence[Sequence[int]], cold: Sequence[Sequence[int]], ks: Sequence[int]
) -> dict[str, float]:
    hits, num_positives = metrics.match_positives(ranked, positives)
    values = metrics.retrieval_metrics(hits, num_positives, ks)
    result = {
        metrics.metric_key("retrieval", name): metrics.macro_mean(value) for name, value in values.items()
    }
    cold_hits, num_cold = metrics.match_positives(ranked, cold)
    for k in ks:
        result[_COLD_ITEM_RECALL.format(k)] = metrics.macro_mean(metrics.recall_at_k(cold_hits, num_cold, k))
        result[_DISTINCT_ITEMS.format(k)] = float(metrics.distinct_items_at_k(ranked, k))
    return result


def _expected_recall(
    seen: Sequence[IntArray],
    positives: Sequence[Sequence[int]],
    cold: Sequence[Sequence[int]],
    num_items: int,
    ks: Sequence[int],
) -> dict[str, float]:
    """Mean recall of all orders: a positive in the catalogue is found with chance k / unseen items."""
    unseen = num_items - np.array([np.count_nonzero(np.unique(codes) < num_items) for codes in seen])
    result = {}
    for key, wanted in ((_RECALL, positives), (_COLD_ITEM_RECALL, cold)):
        distinct = [set(codes) for codes in wanted]
        findable = np.array([sum(code < num_items for code in codes) for codes in distinct], dtype=np.float64)
        counts = np.array([len(codes) for codes in distinct])
        share = np.full(len(counts), np.nan)
        np.divide(findable, counts, out=share, where=counts > 0)
        for k in ks:
            result[key.format(k)] = metrics.macro_mean(share * np.minimum(1.0, k / np.maximum(unseen, 1)))
    return result


def _encode(ids: Sequence[str], code_of: dict[str, int]) -> IntArray:
    """Codes of the ids; an id met for the first time gets the next code, so that it stays distinct."""
    return np.fromiter((code_of.setdefault(item_id, len(code_of)) for item_id in ids), np.int64, len(ids))
