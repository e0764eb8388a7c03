"""How much each training row of the ranker counts: inverse propensities, and what down-sampling leaves."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from schema.contract import DatasetSpec, TaskKind
from trainer import features as ft
from trainer.config import RankingConfig
from trainer.debiasing import inverse_propensity_weights, sample_negatives
from trainer.input_pipeline import shuffled_batches
from trainer.ranking import ROW_WEIGHT

_logger = logging.getLogger(__name__)


def training_batches(windows: tf.data.Dataset, spec: DatasetSpec, config: RankingConfig) -> tf.data.Dataset:
    """Shuffled batches of the training rows that take part, with their weights; see `weighted_windows`."""
    weighted = weighted_windows(windows, spec, config)
    is_kept = (lambda window: window[ROW_WEIGHT] > 0) if ROW_WEIGHT in weighted.element_spec else None
    return shuffled_batches(weighted, config.batch_size, config.seed, keep=is_kept)


def weighted_windows(windows: tf.data.Dataset, spec: DatasetSpec, config: RankingConfig) -> tf.data.Dataset:
    """Adds ROW_WEIGHT, float32 [N], to windows of training rows; 0 for a row that does not take part.

    Args:
      windows: from `trainer.input_pipeline.windows`.
      spec: the declaration.
      config: `propensity_clip` and `negative_rate`; without both, the windows come back as they are.
    """
    if config.propensity_clip is None and config.negative_rate == 1:
        return windows
    binary = [task.label for task in spec.tasks if task.kind is TaskKind.BINARY]
    space = ft.feature_space(spec)
    # What tells rows apart whatever their order; of one user, item and day, all are dropped or none.
    row_key = [space.find(ft.USER_ID).id_name, space.find(ft.ITEM_ID).id_name, ft.DAYS_TO_END]

    def of_propensity(propensity: np.ndarray, exploration: np.ndarray) -> np.ndarray:
        found = inverse_propensity_weights(
            propensity, exploration, config.propensity_clip, missing=np.isnan(propensity)
        )
        _logger.info(
            "phase=row_weights rows=%d without_propensity=%d clipped=%d effective_sample_size=%.0f",
            len(found.weights),
            found.num_missing,
            found.num_clipped,
            found.effective_sample_size,
        )
        return found.weights

    @tf.autograph.experimental.do_not_convert
    def add(window: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        weights = tf.ones_like(window[space.labels[0]])
        if config.propensity_clip is not None:
            propensity = window[ft.PROPENSITY]
            exploration = window.get(ft.EXPLORATION, tf.zeros_like(propensity))
            weights = tf.ensure_shape(
                tf.numpy_function(of_propensity, [propensity, exploration], tf.float32), [None]
            )
        if config.negative_rate < 1:
            sampled = sample_negatives(
                [window[label] for label in binary],
                [window[name] for name in row_key],
                config.negative_rate,
                config.seed,
            )
            weights *= tf.where(sampled.keep, sampled.weights, 0.0)
        return {**window, ROW_WEIGHT: weights}

    return windows.map(add)
