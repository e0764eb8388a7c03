"""The two-tower retrieval model: how it is built, trained and turned into query and candidate vectors."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from schema.contract import FeatureKind
from schema.errors import DataError
from trainer import features
from trainer.catalogue import Catalogue
from trainer.config import RetrievalConfig
from trainer.encoder import EmbeddingTables, embedding_width
from trainer.losses import in_batch_softmax_loss, log_sampling_probability
from trainer.retrieval_validation import RECALL, ValidationUsers, validate
from trainer.towers import CandidateTower, QueryTower, tower_features

_ITEM_ID = features.Feature(features.ITEM_ID, FeatureKind.CATEGORICAL, features.ITEM_SPACE).id_name

# Users or items per call outside of training: bounds memory, costs no quality.
_ENCODE_BATCH = 1_024
# Gradients of a mean loss are small: from Keras' default of 0.1 thousands of steps would hardly move.
_INITIAL_ACCUMULATOR = 1e-6

logger = logging.getLogger(__name__)


class RetrievalModel(tfrs.models.Model):
    """Query tower and candidate tower, trained with the in-batch softmax."""

    def __init__(
        self,
        config: RetrievalConfig,
        space: features.FeatureSpace,
        vocabulary_sizes: Mapping[str, int],
        log_q: np.ndarray,
    ) -> None:
        """Makes the model.

        Args:
          config: sizes and loss settings.
          space: the dataset's features.
          vocabulary_sizes: ids per vocabulary space, padding and OOV included.
          log_q: float32 [vocabulary_sizes[ITEM_SPACE]], from `item_log_q`.
        """
        super().__init__()
        widths = {
            f.space: embedding_width(vocabulary_sizes[f.space], config.max_embedding_width)
            for f in (*tower_features(space.query), *space.candidate)
            if f.is_categorical
        }
        tables = EmbeddingTables(vocabulary_sizes, widths)
        # The corrected softmax learns log p(item | query), so the bias starts at log p(item): the popularity
        # ranking before the first step. Centred, which changes no order and keeps the scores small.
        bias = config.temperature * (log_q - np.mean(log_q[features.OOV_ID :]))
        self.query_tower = QueryTower(
            space.query, tables, config.hidden_layers, config.embedding_dim, config.query_dropout_fraction
        )
        self.candidate_tower = CandidateTower(
            space.candidate,
            tables,
            config.hidden_layers,
            config.embedding_dim,
            config.item_id_dropout_fraction,
            initial_bias=bias,
        )
        self.log_q = tf.constant(log_q, tf.float32)
        self.temperature = config.temperature
        # What TFRS logs as "loss" is that of an epoch's last batch.
        self.mean_loss = tf.keras.metrics.Mean("mean_loss")

    # Nothing here branches on a tensor; AutoGraph would spend half a minute on converting Keras' own code.
    train_step = tf.autograph.experimental.do_not_convert(tfrs.models.Model.train_step)

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of one batch of positives.

        Args:
          inputs: transformed query and candidate features [B], and retrieval_weight float32 [B].
          training: whether ids are hidden.

        Returns:
          float32 scalar.
        """
        queries = self.query_tower(inputs, training=training)
        candidates = self.candidate_tower(inputs, training=training)
        loss = in_batch_softmax_loss(
            tf.matmul(queries, candidates, transpose_b=True),
            inputs[_ITEM_ID],
            tf.gather(self.log_q, inputs[_ITEM_ID]),
            self.temperature,
            inputs[features.RETRIEVAL_WEIGHT],
        )
        self.mean_loss.update_state(loss)
        return loss

    def encode_users(self, users: Mapping[str, np.ndarray]) -> np.ndarray:
        """Transformed query features [U] -> query vectors float32 [U, embedding_dim + 1]."""
        return _in_batches(self.query_tower, users)

    def encode_catalogue(self, catalogue: Catalogue) -> np.ndarray:
        """Candidate vectors of every item, float32 [I, embedding_dim + 1], in the order of the catalogue."""
        return _in_batches(self.candidate_tower, catalogue.transformed)


def _in_batches(
    tower: Callable[[Mapping[str, tf.Tensor]], tf.Tensor], columns: Mapping[str, np.ndarray]
) -> np.ndarray:
    batches = tf.data.Dataset.from_tensor_slices(dict(columns)).batch(_ENCODE_BATCH)
    return np.concatenate([tower(batch).numpy() for batch in batches])


def is_positive(examples: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Which examples train the retrieval model: bool [N], true where retrieval_weight is above 0."""
    return examples[features.RETRIEVAL_WEIGHT] > 0


def count_positives(windows: tf.data.Dataset, num_ids: int) -> np.ndarray:
    """Training positives by transformed item id.

    Args:
      windows: training windows.
      num_ids: ids of the item vocabulary, padding and OOV included.

    Returns:
      int64 [num_ids].

    Raises:
      DataError: there is no positive to train on.
    """
    counts = np.zeros(num_ids, np.int64)
    for window in windows:
        counts += np.bincount(window[_ITEM_ID].numpy()[is_positive(window).numpy()], minlength=num_ids)
    if not counts.any():
        raise DataError(
            "no training example has retrieval_weight > 0; check that the dataset's 'positive' label is ever "
            "1 before the end of the training split."
        )
    return counts


def item_log_q(counts: np.ndarray, catalogue: Catalogue) -> np.ndarray:
    """Log of the chance that an item is drawn into one place of a batch, by transformed item id.

    Items outside the vocabulary share one id; it gets their mean chance.

    Args:
      counts: from `count_positives`.
      catalogue: every item.

    Returns:
      float32 [ids of the item vocabulary].
    """
    per_item = counts.astype(np.float64)
    per_item[features.OOV_ID] /= max(1, np.sum(catalogue.transformed[_ITEM_ID] == features.OOV_ID))
    return log_sampling_probability(per_item).numpy()


def fit(
    model: RetrievalModel,
    batches: tf.data.Dataset,
    num_positives: int,
    catalogue: Catalogue,
    users: ValidationUsers,
    config: RetrievalConfig,
    log_file: Path,
) -> list[dict[str, float]]:
    """Trains until validation recall stops growing and leaves the weights of the best epoch in the model.

    Args:
      model: changed in place.
      batches: one pass over the positives, shuffled anew each time it is iterated.
      num_positives: examples of one pass.
      catalogue: every item.
      users: for validation.
      config: optimiser and stopping settings.
      log_file: JSON list with one entry per epoch, rewritten after each.

    Returns:
      One dict per epoch: epoch, loss (mean over its steps), RECALL, NDCG, train_s, validation_s.

    Raises:
      DataError: the loss is no longer finite.
    """
    # The update of Adagrad touches only the embedding rows of the batch; that of Adam decays every row.
    optimizer = tf.keras.optimizers.legacy.Adagrad(
        config.learning_rate, initial_accumulator_value=_INITIAL_ACCUMULATOR
    )
    model.compile(optimizer=optimizer)
    validation = _Validation(catalogue, users, config.patience_epochs, log_file)
    model.fit(
        batches.repeat(),
        steps_per_epoch=min(config.max_steps_per_epoch, max(1, num_positives // config.batch_size)),
        epochs=config.max_epochs,
        callbacks=[validation],
        verbose=0,
    )
    return validation.epochs


class _Validation(tf.keras.callbacks.Callback):
    """Measures recall after each epoch, stops when it no longer grows, restores the best weights."""

    def __init__(self, catalogue: Catalogue, users: ValidationUsers, patience: int, log_file: Path) -> None:
        super().__init__()
        self.catalogue = catalogue
        self.users = users
        self.patience = patience
        self.log_file = log_file
        self.epochs: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best_weights: list[np.ndarray] = []
        self.started = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.started = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float]) -> None:
        loss = float(logs[self.model.mean_loss.name])
        if not np.isfinite(loss):
            raise DataError(f"the retrieval loss became {loss} in epoch {epoch + 1}; lower learning_rate")
        trained = time.monotonic()
        queries = self.model.encode_users(self.users.query)
        measured = validate(queries, self.model.encode_catalogue(self.catalogue), self.users)
        record = {"epoch": epoch + 1, "loss": loss, **measured}
        record |= {"train_s": trained - self.started, "validation_s": time.monotonic() - trained}
        self.epochs.append(record)
        logger.info("retrieval %s", " ".join(f"{name}={value:.4g}" for name, value in record.items()))
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self.log_file.write_text(json.dumps(self.epochs, indent=2) + "\n", encoding="utf-8")
        if epoch == 0 or record[RECALL] > self.epochs[self.best_epoch][RECALL]:
            self.best_epoch, self.best_weights = epoch, self.model.get_weights()
        elif epoch - self.best_epoch >= self.patience:
            self.model.stop_training = True

    def on_train_end(self, logs: Any = None) -> None:
        self.model.set_weights(self.best_weights)
        best = self.epochs[self.best_epoch]
        logger.info("retrieval best_epoch=%d %s=%.4f", self.best_epoch + 1, RECALL, best[RECALL])
