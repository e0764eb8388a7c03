"""The user's latest impressions as the ranker reads them: what was shown, and what became of it.

A request brings the impressions along. For its many candidates the exported model adds them up in another
order: `trainer.request_outcomes`.

Letters: U = requests, N = candidates per request, L = impressions, V = item ids, T = values of a key per
item, S = task labels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer.body_config import PastConfig
from trainer.catalogue import Catalogue
from trainer.label_statistics import LabelStatistics, bucket_name, context_duration, duration_contexts

_SECONDS_PER_DAY = 86_400.0
# Impressions that the mean label counts for in a rate of the user: half as much after as many.
_SMOOTHING = 2.0
# Ages are read as logs up to this many days, where they reach 1.
_LONGEST_AGE_DAYS = 60.0


class ItemAttributes:
    """What impressions are matched by, by item id; a plain object, so that Keras does not train or save it.

    Attributes:
      tables: int32 [V, T] by key of the counters, 0 padded, and by the feature of the duration, of which the
        groups count; the item id itself is not among them.
    """

    def __init__(self, catalogue: Catalogue, num_item_ids: int, spec: DatasetSpec) -> None:
        """Reads the attributes of the items that training has met from the catalogue.

        Args:
          catalogue: all items.
          num_item_ids: V, padding and OOV included.
          spec: declares the keys.
        """
        space = ft.feature_space(spec)
        ids = catalogue.transformed[space.find(ft.ITEM_ID).id_name]
        columns = {
            key: catalogue.transformed[space.find(key).id_name]
            for key in spec.counters.keys
            if key != ft.ITEM_ID
        }
        duration = context_duration(spec.tasks)
        if duration is not None:
            columns[duration] = duration_contexts(catalogue.transformed[bucket_name(duration)])
        self.tables: dict[str, tf.Variable] = {}
        for key, values in columns.items():
            matrix = values if values.ndim == 2 else values[:, np.newaxis]
            table = np.zeros((num_item_ids, matrix.shape[1]), np.int32)
            table[ids] = matrix
            # What unknown items share is not known.
            table[: ft.FIRST_VOCABULARY_ID] = ft.PADDING_ID
            self.tables[key] = tf.Variable(table, trainable=False, name=f"impression_{key}")


class Impressions(NamedTuple):
    """The latest impressions of U users.

    Attributes:
      is_shown: bool [U, L], false where padded.
      age_days: float32 [U, L], before the request.
      labels: float32 [U, L, S], 0 where missing.
      surface: int [U, L]; None for a dataset without surfaces.
      keys: int [U, L, T] by key, see `ItemAttributes`, and the item id.
    """

    is_shown: tf.Tensor
    age_days: tf.Tensor
    labels: tf.Tensor
    surface: tf.Tensor | None
    keys: Mapping[str, tf.Tensor]

    @property
    def log_age(self) -> tf.Tensor:
        """Age in [0, 1], finer for what happened lately, float32 [U, L]; 1 where padded."""
        return tf.where(self.is_shown, _log_age(self.age_days), 1.0)

    def latest(self, count: int) -> Impressions:
        """The latest `count` of each user, or fewer, oldest first."""
        # Padding first, then impressions in their order: the latest stand at the end.
        order = tf.argsort(tf.cast(self.is_shown, tf.int32), axis=1, stable=True)[:, -count:]

        def take(column: tf.Tensor | None) -> tf.Tensor | None:
            return None if column is None else tf.gather(column, order, batch_dims=1)

        return Impressions(
            take(self.is_shown),
            take(self.age_days),
            take(self.labels),
            take(self.surface),
            {key: take(values) for key, values in self.keys.items()},
        )


def read_impressions(
    features: Mapping[str, tf.Tensor], attributes: ItemAttributes, spec: DatasetSpec
) -> Impressions:
    """Impressions from transformed features, see `trainer.features.impression_names`."""
    ids = features[ft.IMPRESSION_IDS]
    duration = context_duration(spec.tasks)
    keys = {
        key: ids[..., tf.newaxis] if key == ft.ITEM_ID else tf.gather(attributes.tables[key], ids)
        for key in (*spec.counters.keys, *([] if duration is None else [duration]))
    }
    return Impressions(
        tf.not_equal(ids, ft.PADDING_ID),
        tf.cast(features[ft.IMPRESSION_AGES], tf.float32) / _SECONDS_PER_DAY,
        tf.stack([features[ft.impression_label(label)] for label in spec.task_labels], axis=-1),
        features.get(ft.IMPRESSION_SURFACE_IDS),
        keys,
    )


class PastOutcomes(tf.keras.layers.Layer):
    """How the user's impressions went: all of them, on this surface, of this item, of items that share a key.

    Of each group: log(1 + n); the age of the latest impression; and per label how far the mean of the group
    is from the mean m of everybody, drawn to 0 where impressions are few and in units of the label's standard
    deviation, Σ (y - c - m) / ((n + s) σ). A group without impressions is zeros, but for the age, which is 1.

    With `PastConfig.contexts` c is the excess of the impression's context, see `LabelStatistics`, else 0: who
    is shown long videos, or much on a surface where few are clicked, is not taken for somebody who clicks
    little.

    With `PastConfig.churn` also log(1 + n) of the impressions of the item that were passed over.

    Attributes:
      duration: the feature of the items by whose groups impressions are compared and counted, or None.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        statistics: Mapping[str, LabelStatistics],
        config: PastConfig,
        **kwargs: object,
    ) -> None:
        """Makes the layer, which has no weights.

        Args:
          spec: declares keys, windows, surfaces and tasks.
          statistics: training labels by task name.
          config: what is counted; `trainer.log_requirements` says what churn and contexts need.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self._windows_days = spec.counters.windows_days
        self._key_windows_days = self._windows_days if config.key_windows else ()
        self._positive: int | None = None
        if config.churn:
            self._positive = spec.task_labels.index(spec.positive)
            self._item_key = spec.counters.keys.index(ft.ITEM_ID)
        self.duration = context_duration(spec.tasks) if config.contexts else None
        by_label = {task.label: statistics[task.name] for task in reversed(spec.tasks)}
        of_labels = [by_label[label] for label in spec.task_labels]
        self._scale = tf.constant([max(label.std, 1e-6) for label in of_labels], tf.float32)
        excess = [label.context_excess if config.contexts else [[0.0]] for label in of_labels]
        self._excess = np.stack(excess, axis=-1).astype(np.float32)

    def call(
        self,
        impressions: Impressions,
        surface: tf.Tensor | None,
        candidates: Mapping[str, tf.Tensor],
        label_means: tf.Tensor,
    ) -> tf.Tensor:
        """Summarises the impressions for every candidate.

        Args:
          impressions: of U users.
          surface: int [U], of the request; None for a dataset without surfaces.
          candidates: int [U, N, T] by key, and by `duration` the group.
          label_means: float32 [U, N, S], of everybody.

        Returns:
          float32 [U, N, D].
        """
        by_key = [_shares(values, impressions.keys[key]) for key, values in candidates.items()]
        of_keys = _added_up(impressions, self.summands(impressions), tf.stack(by_key, axis=-2))
        return self.describe(impressions, surface, of_keys, label_means)

    def summands(self, impressions: Impressions) -> tf.Tensor:
        """What is summed over the impressions that share a key with a candidate.

        Returns:
          float32 [U, L, C]: 1 and the labels in each window, and of all time; with churn, whether the
          impression was passed over.
        """
        values = _values(self._compared(impressions))
        windows = self._key_windows_days
        lately = [tf.cast(impressions.age_days < days, tf.float32)[..., tf.newaxis] for days in windows]
        # A window is a column more of one product, not a group more of all candidates.
        columns = [*(values * mask for mask in lately), values]
        if self._positive is not None:
            columns.append(_passed_over(impressions, self._positive)[..., tf.newaxis])
        return tf.concat(columns, axis=-1)

    def describe(
        self,
        impressions: Impressions,
        surface: tf.Tensor | None,
        of_keys: tf.Tensor,
        label_means: tf.Tensor,
    ) -> tf.Tensor:
        """As `call`, where the impressions that share a key with a candidate are added up.

        Args:
          impressions: of U users.
          surface: see `call`.
          of_keys: float32 [U, N, K, C + 1], by key: the sums of `summands`, and the recency of the latest
            impression, 1 less its age, which is 0 where there is none.
          label_means: see `call`.
        """
        shown = impressions.is_shown
        of_user = [shown & (impressions.age_days < days) for days in self._windows_days] + [shown]
        if surface is not None and impressions.surface is not None:
            same = tf.equal(impressions.surface, surface[:, tf.newaxis])
            of_user.append(shown & same & (impressions.surface >= ft.FIRST_VOCABULARY_ID))
        # The same for all candidates, and added up once.
        groups = tf.stack(of_user, axis=-2)[:, tf.newaxis]
        values = _values(self._compared(impressions))
        tables = [
            self._summary(_added_up(impressions, values, groups), label_means, 1),
            self._summary(of_keys, label_means, len(self._key_windows_days) + 1),
        ]
        if self._positive is not None:
            # Of the key that is the item itself, the last of the sums.
            tables.append(tf.math.log1p(of_keys[:, :, self._item_key, -2:-1]))
        return tf.concat(tables, axis=-1)

    def _compared(self, impressions: Impressions) -> Impressions:
        """The impressions with y - c in place of y, as if all had been shown in a usual context."""
        num_surfaces, num_durations, num_labels = self._excess.shape
        place = tf.zeros_like(impressions.is_shown, tf.int32)
        if num_surfaces > 1:
            place += tf.cast(impressions.surface, tf.int32) * num_durations
        if self.duration is not None:
            place += tf.cast(impressions.keys[self.duration][..., 0], tf.int32)
        excess = self._excess.reshape([num_surfaces * num_durations, num_labels])
        return impressions._replace(labels=impressions.labels - tf.gather(excess, place))

    def _summary(self, groups: tf.Tensor, label_means: tf.Tensor, num_spans: int) -> tf.Tensor:
        """Describes groups of impressions that have been added up.

        Args:
          groups: float32 [U, N or 1, G, C + 1], see `describe`.
          label_means: float32 [U, N, S].
          num_spans: W, windows and all time.

        Returns:
          float32 [U, N, G (W (1 + S) + 1)], of each group: numbers, age of the latest, rates.
        """
        num_users, num_candidates = tf.unstack(tf.shape(label_means)[:2])
        num_groups, num_labels = groups.shape[2], self._scale.shape[0]
        shape = [num_users, tf.shape(groups)[1], num_groups * num_spans, 1 + num_labels]
        counts = tf.reshape(groups[..., : num_spans * (1 + num_labels)], shape)
        number, sums = counts[..., :1], counts[..., 1:]
        excess = sums - number * label_means[:, :, tf.newaxis]
        rates = excess / (number + _SMOOTHING) / self._scale
        number = tf.reshape(number, [num_users, shape[1], num_groups, num_spans])
        known = tf.concat([tf.math.log1p(number), 1.0 - groups[..., -1:]], axis=-1)
        known = tf.broadcast_to(known, [num_users, num_candidates, *known.shape[2:]])
        rates = tf.reshape(rates, [num_users, num_candidates, num_groups, num_spans * num_labels])
        table = tf.concat([known, rates], axis=-1)
        return tf.reshape(table, [num_users, num_candidates, table.shape[2] * table.shape[3]])


def _passed_over(impressions: Impressions, positive: int) -> tf.Tensor:
    """Which impressions were neither positive nor followed by a positive one of the same item.

    Args:
      impressions: of U users; the item id is among their keys.
      positive: place of the positive label among the task labels.

    Returns:
      float32 [U, L], 0 or 1.
    """
    item, age = impressions.keys[ft.ITEM_ID][..., 0], impressions.age_days
    is_positive = impressions.is_shown & (impressions.labels[..., positive] > 0)
    # [U, L, L]: whether the impression on the last axis is not older than the other.
    later = age[:, tf.newaxis] <= age[:, :, tf.newaxis]
    same = tf.equal(item[:, tf.newaxis], item[:, :, tf.newaxis])
    answered = tf.reduce_any(later & same & is_positive[:, tf.newaxis], axis=-1)
    return tf.cast(impressions.is_shown & ~answered, tf.float32)


def shares_value(candidates: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Whether a candidate has one of the known values of a request: bool [U, N].

    Args:
      candidates: int [U, N, T].
      values: int [U, L].
    """
    return tf.reduce_any(_same(candidates, values), axis=[2, 3])


def _shares(candidates: tf.Tensor, impressions: tf.Tensor) -> tf.Tensor:
    """Whether an impression has a known value in common with a candidate: bool [U, N, L].

    Args:
      candidates: int [U, N, T].
      impressions: int [U, L, T'].
    """
    # Value by value: arrays of five dimensions take several times as long to compare and to reduce.
    values = tf.unstack(impressions, axis=-1)
    same = functools.reduce(tf.logical_or, (_same(candidates, value) for value in values))
    if candidates.shape[2] is None:
        return tf.reduce_any(same, axis=2)
    # A reduction over an axis in the middle takes several times as long.
    return functools.reduce(tf.logical_or, tf.unstack(same, axis=2))


def _same(candidates: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Which known values are equal: int [U, N, T] and [U, L] to bool [U, N, T, L]."""
    mine, theirs = tf.cast(candidates, tf.int32), tf.cast(values, tf.int32)
    # No candidate has the id -1.
    theirs = tf.where(theirs >= ft.FIRST_VOCABULARY_ID, theirs, -1)
    return tf.equal(mine[..., tf.newaxis], theirs[:, tf.newaxis, tf.newaxis])


def _values(impressions: Impressions) -> tf.Tensor:
    """1 and the labels, float32 [U, L, 1 + S]."""
    return tf.concat([tf.ones_like(impressions.labels[..., :1]), impressions.labels], axis=-1)


def _added_up(impressions: Impressions, summands: tf.Tensor, groups: tf.Tensor) -> tf.Tensor:
    """Groups of impressions, bool [U, N, G, L], of summands [U, L, C], added up: float32 [U, N, G, C + 1].

    The last column is the recency of the latest, see `PastOutcomes.describe`.
    """
    counted = tf.cast(groups, tf.float32)
    recency = counted * (1.0 - impressions.log_age[:, tf.newaxis, tf.newaxis])
    # The largest of nothing at all, where nobody has impressions, is minus infinity.
    latest = tf.maximum(tf.reduce_max(recency, axis=-1, keepdims=True), 0.0)
    return tf.concat([_times(counted, summands), latest], axis=-1)


def _times(groups: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Float32 [U, N, G, L] times [U, L, S]: [U, N, G, S]. An einsum would transpose."""
    num_users, *_ = shape = tf.unstack(tf.shape(groups))
    product = tf.matmul(tf.reshape(groups, [num_users, shape[1] * groups.shape[2], shape[3]]), values)
    return tf.reshape(product, [num_users, shape[1], groups.shape[2], values.shape[2]])


def _log_age(age_days: tf.Tensor) -> tf.Tensor:
    hours = 24.0 * tf.maximum(age_days, 0.0)
    return tf.minimum(tf.math.log1p(hours) / math.log1p(24.0 * _LONGEST_AGE_DAYS), 1.0)
