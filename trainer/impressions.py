"""The user's latest impressions as the ranker reads them: what was shown, and what became of it.

The same code runs in training and in the exported model; a request brings the impressions along.

Letters: U = requests, N = candidates per request, L = impressions, V = item ids, T = values of a key per
item, S = task labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer.catalogue import Catalogue
from trainer.label_statistics import LabelStatistics

_SECONDS_PER_DAY = 86_400.0
# Impressions that the mean label counts for in a rate of the user: half as much after as many.
_SMOOTHING = 2.0
# Ages are read as logs up to this many days, where they reach 1.
_LONGEST_AGE_DAYS = 60.0


class ItemAttributes:
    """The values of the counters' keys by item id; a plain object, so that Keras does not train or save it.

    Attributes:
      tables: int32 [V, T] by key, 0 padded; the item id itself is not among them.
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
        self.tables: dict[str, tf.Variable] = {}
        for key in spec.counters.keys:
            if key == ft.ITEM_ID:
                continue
            values = catalogue.transformed[space.find(key).id_name]
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
      keys: int [U, L, T] by key.
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
    keys = {
        key: ids[..., tf.newaxis] if key == ft.ITEM_ID else tf.gather(attributes.tables[key], ids)
        for key in spec.counters.keys
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
    deviation, Σ (y - m) / ((n + s) σ). A group without impressions is zeros, but for the age, which is 1.
    """

    def __init__(
        self, spec: DatasetSpec, statistics: Mapping[str, LabelStatistics], **kwargs: object
    ) -> None:
        """Makes the layer, which has no weights.

        Args:
          spec: declares keys, windows, surfaces and tasks.
          statistics: training labels by task name.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        self._windows_days = spec.counters.windows_days
        by_label = {task.label: statistics[task.name].std for task in reversed(spec.tasks)}
        self._scale = tf.constant([max(by_label[label], 1e-6) for label in spec.task_labels], tf.float32)

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
          candidates: int [U, N, T] by key.
          label_means: float32 [U, N, S], of everybody.

        Returns:
          float32 [U, N, D].
        """
        shown = impressions.is_shown
        of_user = [shown & (impressions.age_days < days) for days in self._windows_days] + [shown]
        if surface is not None and impressions.surface is not None:
            same = tf.equal(impressions.surface, surface[:, tf.newaxis])
            of_user.append(shown & same & (impressions.surface >= ft.FIRST_VOCABULARY_ID))
        num_candidates = tf.shape(label_means)[1]
        groups = [tf.repeat(group[:, tf.newaxis], num_candidates, axis=1) for group in of_user]
        groups += [shares_value(values, impressions.keys[key]) for key, values in candidates.items()]

        group = tf.stack(groups, axis=2)  # [U, N, G, L]
        counted = tf.cast(group, tf.float32)
        number = tf.reduce_sum(counted, axis=-1, keepdims=True)
        sums = tf.einsum("ungl,uls->ungs", counted, impressions.labels)
        excess = sums - number * label_means[:, :, tf.newaxis]
        rates = excess / (number + _SMOOTHING) / self._scale
        ages = tf.where(group, impressions.log_age[:, tf.newaxis, tf.newaxis], 1.0)
        # The least of no ages at all, where nobody has impressions, is infinite.
        latest = tf.minimum(tf.reduce_min(ages, axis=-1), 1.0)
        table = tf.concat([tf.math.log1p(number), latest[..., tf.newaxis], rates], axis=-1)
        width = table.shape[2] * table.shape[3]
        return tf.reshape(table, [tf.shape(table)[0], num_candidates, width])


def shares_value(candidates: tf.Tensor, impressions: tf.Tensor) -> tf.Tensor:
    """Whether a candidate has a known value in common with an impression: bool [U, N, L].

    Args:
      candidates: int [U, N, T].
      impressions: int [U, L, T'].
    """
    mine, theirs = tf.cast(candidates, tf.int32), tf.cast(impressions, tf.int32)
    # No candidate has the id -1.
    theirs = tf.where(theirs >= ft.FIRST_VOCABULARY_ID, theirs, -1)
    # One row of pairs per user: comparing arrays of five dimensions takes several times as long.
    num_users, num_candidates, width = tf.unstack(tf.shape(mine))
    mine = tf.reshape(mine, [num_users, num_candidates * width, 1])
    length, other_width = tf.unstack(tf.shape(theirs)[1:])
    same = tf.equal(mine, tf.reshape(theirs, [num_users, 1, length * other_width]))
    same = tf.reshape(same, [num_users, num_candidates, width, length, other_width])
    return tf.reduce_any(same, axis=[2, 4])


def _log_age(age_days: tf.Tensor) -> tf.Tensor:
    hours = 24.0 * tf.maximum(age_days, 0.0)
    return tf.minimum(tf.math.log1p(hours) / math.log1p(24.0 * _LONGEST_AGE_DAYS), 1.0)
