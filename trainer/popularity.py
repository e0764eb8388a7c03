"""How popular every item was as of every day: the part of the item bias that changes with time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from schema.contract import FeatureKind
from schema.errors import ConfigError
from trainer import features

_ITEM_ID = features.Feature(features.ITEM_ID, FeatureKind.CATEGORICAL, features.ITEM_SPACE).id_name
# Added to an item's share relative to the mean item's: an item without positives is 50 times below the mean.
_SMOOTHING = 0.02
_MAX_NUMBERS = 250_000_000  # a gigabyte of float32


def daily_popularity(
    windows: Iterable[Mapping[str, tf.Tensor]],
    num_ids: int,
    positive: str,
    half_lives_days: Sequence[float],
) -> np.ndarray:
    """Recency-weighted popularity of every item, as of 0, 1, 2, ... days before the end of training.

    Letters: I = item ids, T = days of training and one more, P = kinds of popularity.
    Formula: count[i, t] = positives of item i on day t; state[i, t] = state[i, t + 1] × 0.5^(1 / half-life) +
    count[i, t + 1]; popularity = log(0.02 + state / mean of state over items), less its mean over items,
    divided by its standard deviation over items and days.

    State t counts days before t only, and an example of day t (`trainer.features.DAYS_TO_END`) reads state t:
    what happened on the example's own day stays out. Serving reads state 0.

    Where examples have the histories of prior sessions, each half-life counts twice: all positives, and those
    of returning users that retrieval learns from (within the cap per user). What people choose on their first
    visit is not what they come back for.

    Args:
      windows: training windows, see `trainer.input_pipeline.windows`; read twice.
      num_ids: ids of the item vocabulary, padding and OOV included.
      positive: label that makes an example a positive.
      half_lives_days: in days, above 0; with none there is no popularity (P = 0).

    Returns:
      float32 [I, T, P]; 0 for padding and OOV, which stand for an average item.

    Raises:
      ConfigError: the table would not fit a gigabyte.
    """
    if not half_lives_days:
        return np.zeros((num_ids, 1, 0), np.float32)
    num_days = 1 + max(int(window[features.DAYS_TO_END].numpy().max()) for window in windows)
    num_kinds = 2 if features.PRIOR_SESSIONS_IDS in next(iter(windows)) else 1
    if num_kinds * num_ids * num_days * len(half_lives_days) > _MAX_NUMBERS:
        raise ConfigError(
            f"popularity of {num_ids:,} items on {num_days:,} days with {len(half_lives_days)} half-lives "
            "takes more than a gigabyte; give fewer retrieval.popularity_half_lives_days or train on less"
        )
    counts = np.zeros((num_ids, num_days, num_kinds), np.float32)
    for window in windows:
        _count_positives(window, positive, counts)
    popularity = np.concatenate([_log_popularity(counts, days) for days in half_lives_days], axis=2)
    popularity[: features.FIRST_VOCABULARY_ID] = 0.0
    return popularity


def _count_positives(window: Mapping[str, tf.Tensor], positive: str, counts: np.ndarray) -> None:
    """Adds a window's positives by item, day, and kind (all; of returning users) to float32 [I, T, kinds]."""
    chosen = window[positive].numpy() > 0
    cells = [window[name].numpy()[chosen] for name in (_ITEM_ID, features.DAYS_TO_END)]
    np.add.at(counts[:, :, 0], tuple(cells), 1)
    if features.PRIOR_SESSIONS_IDS in window:
        returns = (window[features.PRIOR_SESSIONS_IDS].numpy()[chosen] != features.PADDING_ID).any(axis=1)
        np.add.at(counts[:, :, 1], tuple(cell[returns] for cell in cells), 1)


def _log_popularity(counts: np.ndarray, half_life_days: float) -> np.ndarray:
    """See `daily_popularity`: float32 of the shape of `counts`."""
    decay = 0.5 ** (1.0 / half_life_days)
    state = np.zeros_like(counts)
    for day in range(counts.shape[1] - 2, -1, -1):
        state[:, day] = state[:, day + 1] * decay + counts[:, day + 1]
    items = state[features.FIRST_VOCABULARY_ID :]
    mean = np.maximum(items.mean(axis=0, keepdims=True), np.finfo(np.float32).tiny)
    log = np.log(_SMOOTHING + state / mean)
    vocabulary = log[features.FIRST_VOCABULARY_ID :]
    log -= vocabulary.mean(axis=0, keepdims=True)
    return (log / np.maximum(vocabulary.std(axis=(0, 1), keepdims=True), 1e-6)).astype(np.float32)


def append_popularity(
    queries: tf.Tensor, candidates: tf.Tensor, days: tf.Tensor, popularity: tf.Tensor, weights: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Adds, to every dot product, the candidate's popularity as of the query's day.

    Each distinct day is one more dimension: a query has 1 at its day, a candidate its popularity on that day.

    Args:
      queries: float32 [B, D].
      candidates: float32 [C, D].
      days: int32 [B], see `trainer.features.DAYS_TO_END`.
      popularity: float32 [C, T, P], from `daily_popularity`.
      weights: float32 [P].

    Returns:
      float32 [B, D + U] and [C, D + U]; U = distinct days of the batch.
    """
    distinct, place = tf.unique(days)
    by_day = tf.tensordot(tf.gather(popularity, distinct, axis=1), weights, 1)
    one_hot = tf.one_hot(place, tf.size(distinct))
    return tf.concat([queries, one_hot], axis=1), tf.concat([candidates, by_day], axis=1)
