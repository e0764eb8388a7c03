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
from trainer.ranking import ROW_WEIGHT

_logger = logging.getLogger(__name__)


def weighted_windows(windows: tf.data.Dataset, spec: DatasetSpec, config: RankingConfig) -> tf.data.Dataset:
    """Adds ROW_WEIGHT, float32 [N], to windows of training rows; 0 for a row that does not take part.

    Args:
      windows: from `trainer.input_pipeline.windows` with ranking=True.
      spec: the declaration.
      config: `propensity_clip` and `negative_rate`; without both, the windows come back as they are.

    Raises:
      DataError: when read, a propensity is no probability.
    """
    if config.propensity_clip is None and config.negative_rate == 1:
        return windows
    binary = [task.label for task in spec.tasks if task.kind is TaskKind.BINARY]

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
        num_rows = tf.shape(window[ft.feature_space(spec).labels[0]])[0]
        weights = tf.ones([num_rows])
        if config.propensity_clip is not None:
            propensity = window[ft.PROPENSITY]
            exploration = window.get(ft.EXPLORATION, tf.zeros_like(propensity))
            weights = tf.ensure_shape(
                tf.numpy_function(of_propensity, [propensity, exploration], tf.float32), [None]
            )
        if config.negative_rate < 1:
            sampled = sample_negatives(
                [window[label] for label in binary], [tf.range(num_rows)], config.negative_rate, config.seed
            )
            weights *= tf.where(sampled.keep, sampled.weights, 0.0)
        return {**window, ROW_WEIGHT: weights}

    return windows.map(add)
