"""The two-tower retrieval model: how it is built, trained, validated and turned into candidate vectors."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from schema.errors import ConfigError, DataError
from trainer import features, metrics
from trainer.catalogue import Catalogue
from trainer.config import RetrievalConfig
from trainer.encoder import EmbeddingTables, embedding_width
from trainer.index import ExactIndex, search_excluding
from trainer.losses import in_batch_softmax_loss, log_sampling_probability
from trainer.towers import CandidateTower, QueryTower

VALIDATION_K = 100

# Users or items per call outside of training: bounds memory, costs no quality.
_ENCODE_BATCH = 1024

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
            for f in space.query + space.candidate
            if f.is_categorical
        }
        tables = EmbeddingTables(vocabulary_sizes, widths)
        # The corrected softmax learns log p(item | query), so the bias starts at log p(item): the popularity ranking
        # before the first step. Centred, which changes no order and keeps the scores small.
        bias = config.temperature * (log_q - np.mean(log_q[features.OOV_ID :]))
        sizes = (config.hidden_layers, config.embedding_dim, config.id_dropout_fraction)
        self.query_tower = QueryTower(space.query, tables, *sizes)
        self.candidate_tower = CandidateTower(space.candidate, tables, *sizes, initial_bias=bias)
        self.log_q = tf.constant(log_q, tf.float32)
        self.item_id = space.find(features.ITEM_ID).id_name
        self.temperature = config.temperature

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of one batch of positives.

        Args:
          inputs: transformed query and candidate features [B], and retrieval_weight float32 [B].
          training: whether ids are dropped.

        Returns:
          float32 scalar.
        """
        queries = self.query_tower(inputs, training=training)
        candidates = self.candidate_tower(inputs, training=training)
        item_ids = inputs[self.item_id]
        return in_batch_softmax_loss(
            tf.matmul(queries, candidates, transpose_b=True),
            item_ids,
            tf.gather(self.log_q, item_ids),
            self.temperature,
            inputs[features.RETRIEVAL_WEIGHT],
        )

    @tf.function(reduce_retracing=True)
    def encode_queries(self, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Transformed query features [B] -> query vectors float32 [B, embedding_dim + 1]."""
        return self.query_tower(inputs)

    @tf.function(reduce_retracing=True)
    def encode_candidates(self, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Transformed candidate features [B] -> candidate vectors float32 [B, embedding_dim + 1]."""
        return self.candidate_tower(inputs)

    def encode_catalogue(self, catalogue: Catalogue) -> np.ndarray:
        """Candidate vectors of every item, float32 [I, embedding_dim + 1], in the order of the catalogue."""
        batches = tf.data.Dataset.from_tensor_slices(dict(catalogue.transformed)).batch(_ENCODE_BATCH)
        return np.concatenate([self.encode_candidates(batch).numpy() for batch in batches])


def is_positive(examples: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Which examples train the retrieval model: bool [N], true where retrieval_weight is above 0."""
    return examples[features.RETRIEVAL_WEIGHT] > 0


def item_log_q(windows: tf.data.Dataset, catalogue: Catalogue, num_ids: int) -> np.ndarray:
    """Log of the chance that an item is drawn into one place of a batch, by transformed item id.

    Items outside the vocabulary share one id, hence also their mean chance.

    Args:
      windows: training windows.
      catalogue: every item.
      num_ids: ids of the item vocabulary, padding and OOV included.

    Returns:
      float32 [num_ids].

    Raises:
      DataError: there is no positive to train on.
    """
    name = features.Feature(features.ITEM_ID, features.FeatureKind.CATEGORICAL, features.ITEM_SPACE).id_name
    counts = np.zeros(num_ids, np.float64)
    for window in windows:
        positive = is_positive(window).numpy()
        counts += np.bincount(window[name].numpy()[positive], minlength=num_ids)
    if not counts.any():
        raise DataError(
            "no training example has retrieval_weight > 0; check that the dataset's 'positive' label is ever 1 "
            "before the end of the training split."
        )
    counts[features.OOV_ID] /= max(1, np.sum(catalogue.transformed[name] == features.OOV_ID))
    return log_sampling_probability(counts).numpy()


@dataclasses.dataclass(frozen=True)
class ValidationUsers:
    """Users with held-out positives, as of the end of training.

    Letters: U = users.

    Attributes:
      query: transformed query features, [U] or [U, L].
      positive_rows: catalogue rows of each user's held-out positives, U sequences.
      seen_rows: int32 [U, S], catalogue rows that are not recommended again, padded with -1.
    """

    query: Mapping[str, np.ndarray]
    positive_rows: Sequence[Sequence[int]]
    seen_rows: np.ndarray

    def __len__(self) -> int:
        return len(self.positive_rows)


def validate(model: RetrievalModel, catalogue: Catalogue, users: ValidationUsers) -> dict[str, float]:
    """Recall and NDCG at 100 by exact search over the whole catalogue, mean over users; seen items are left out."""
    index = ExactIndex(model.encode_catalogue(catalogue))
    batches = tf.data.Dataset.from_tensor_slices((dict(users.query), users.seen_rows))
    ranked = []
    for query, seen in batches.batch(_ENCODE_BATCH):
        k = tf.fill(tf.shape(seen)[:1], VALIDATION_K)
        ranked.append(search_excluding(index, model.encode_queries(query), k, seen)[0].numpy())
    hits, num_positives = metrics.match_positives(np.concatenate(ranked), users.positive_rows)
    return {
        metrics.metric_key("retrieval", name, k=VALIDATION_K): metrics.macro_mean(
            function(hits, num_positives, VALIDATION_K)
        )
        for name, function in (("recall", metrics.recall_at_k), ("ndcg", metrics.ndcg_at_k))
    }


def fit(
    model: RetrievalModel,
    batches: tf.data.Dataset,
    catalogue: Catalogue,
    users: ValidationUsers,
    config: RetrievalConfig,
    log_file: Path,
) -> list[dict[str, float]]:
    """Trains until validation recall stops growing and leaves the weights of the best epoch in the model.

    Args:
      model: changed in place.
      batches: one epoch of positives, shuffled anew each time it is iterated.
      catalogue: every item.
      users: for validation.
      config: optimiser and stopping settings.
      log_file: JSON list with one entry per epoch, rewritten after each.

    Returns:
      One dict per epoch: epoch, loss, validation metrics, train_s, validation_s.

    Raises:
      ConfigError: the loss is no longer finite.
    """
    # Adagrad, because its update touches only the embedding rows of the batch; Adam's decays every row each step.
    model.compile(optimizer=tf.keras.optimizers.legacy.Adagrad(config.learning_rate))
    recall = metrics.metric_key("retrieval", "recall", k=VALIDATION_K)
    epochs: list[dict[str, float]] = []
    best_epoch, best_weights = 0, model.get_weights()
    while len(epochs) < config.max_epochs and len(epochs) - best_epoch < config.patience_epochs:
        started = time.monotonic()
        loss = model.fit(batches, verbose=0).history["loss"][-1]
        if not np.isfinite(loss):
            raise ConfigError(f"retrieval loss became {loss} in epoch {len(epochs) + 1}; lower learning_rate")
        trained = time.monotonic()
        measured = validate(model, catalogue, users)
        epoch = {"epoch": len(epochs) + 1, "loss": float(loss), **measured}
        epoch |= {"train_s": trained - started, "validation_s": time.monotonic() - trained}
        epochs.append(epoch)
        logger.info("retrieval %s", " ".join(f"{name}={value:.4g}" for name, value in epoch.items()))
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.write_text(json.dumps(epochs, indent=2), encoding="utf-8")
        if best_epoch == 0 or epoch[recall] > epochs[best_epoch - 1][recall]:
            best_epoch, best_weights = len(epochs), model.get_weights()
    model.set_weights(best_weights)
    logger.info("retrieval best_epoch=%d %s=%.4f", best_epoch, recall, epochs[best_epoch - 1][recall])
    return epochs
