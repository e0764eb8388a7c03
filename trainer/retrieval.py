"""The two-tower retrieval model: how it is built, trained and turned into query and candidate vectors."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from schema.contract import DatasetSpec, FeatureKind
from schema.errors import ConfigError, DataError
from trainer import features
from trainer.catalogue import Catalogue
from trainer.collapse import check_not_collapsed
from trainer.config import RetrievalConfig
from trainer.encoder import EmbeddingTables, embedding_width
from trainer.hard_negatives import HardNegativeMiner, RefreshHardNegatives
from trainer.item_factors import ItemFactors
from trainer.losses import log_sampling_probability, sampled_softmax_loss
from trainer.negatives import CandidateSampler, CataloguePool
from trainer.popularity import append_popularity
from trainer.retrieval_validation import RECALL, ValidationUsers, validate
from trainer.sampling_probability import CountedProbability, StreamingProbability
from trainer.towers import CandidateTower, QueryTower, tower_features

_ITEM_ID = features.Feature(features.ITEM_ID, FeatureKind.CATEGORICAL, features.ITEM_SPACE).id_name

_HISTORY_IDS = features.Feature(features.HISTORY, FeatureKind.MULTI_CATEGORICAL, features.ITEM_SPACE).id_name

# Users or items per call outside of training: bounds memory, costs no quality.
_ENCODE_BATCH = 1_024
# Gradients of a mean loss are small: from Keras' default of 0.1 thousands of steps would hardly move.
_INITIAL_ACCUMULATOR = 1e-6

logger = logging.getLogger(__name__)


class RetrievalModel(tfrs.models.Model):
    """Query tower and candidate tower, trained with a sampled softmax."""

    def __init__(
        self,
        config: RetrievalConfig,
        space: features.FeatureSpace,
        vocabulary_sizes: Mapping[str, int],
        log_q: np.ndarray,
        popularity: np.ndarray | None = None,
        item_vectors: np.ndarray | None = None,
        item_factors: np.ndarray | None = None,
        embedding_widths: Mapping[str, int] | None = None,
    ) -> None:
        """Makes the model.

        Args:
          config: sizes and loss settings.
          space: the dataset's features.
          vocabulary_sizes: ids per vocabulary space, padding and OOV included.
          log_q: float32 [vocabulary_sizes[ITEM_SPACE]], from `item_log_q`.
          popularity: float32 [ids, T, P], from `trainer.popularity.daily_popularity`; None is no popularity.
          item_vectors: float32 [ids, embedding_dim] that item embeddings start from; None is random.
          item_factors: float32 [ids, F], from `trainer.item_factors.item_factors`; None with `config.factors`
            is for a checkpoint to fill.
          embedding_widths: by vocabulary space; by default they grow with the vocabulary. A warm start keeps
            those of the model that it starts from.
        """
        super().__init__()
        query_features = tower_features(space.query, config.ignored_features)
        candidate_features = tower_features(space.candidate, config.ignored_features)
        widths = dict(embedding_widths or {}) or {
            f.space: embedding_width(vocabulary_sizes[f.space], config.max_embedding_width)
            for f in (*query_features, *candidate_features)
            if f.is_categorical
        }
        initial = {}
        if config.item_vectors == "cooccurrence":
            widths[features.ITEM_SPACE] = config.embedding_dim
            initial = {} if item_vectors is None else {features.ITEM_SPACE: item_vectors}
        self.embedding_widths = widths
        tables = EmbeddingTables(vocabulary_sizes, widths, initial)
        # The corrected softmax learns log p(item | query), so the bias starts at log p(item): the popularity
        # ranking before the first step. Centred, which changes no order and keeps the scores small.
        self.initial_bias = config.loss.temperature * (log_q - np.mean(log_q[features.OOV_ID :]))
        if popularity is None:
            popularity = np.zeros((len(log_q), 1, 0), np.float32)
        self.item_factors = (
            ItemFactors(len(log_q), config.factors, item_factors) if config.factors is not None else None
        )
        self.query_tower = QueryTower(query_features, tables, config, self.item_factors)
        self.candidate_tower = CandidateTower(
            candidate_features, tables, config, self.initial_bias, popularity[:, 0], self.item_factors
        )
        self.popularity = tf.constant(popularity) if popularity.shape[2] else None
        self.config = config
        self.num_item_ids = len(log_q)
        self.sampling_probability = (
            CountedProbability(log_q)
            if config.loss.sampling_probability == "counted"
            else StreamingProbability(len(log_q), config.batch_size, config.loss.streaming_rate)
        )
        self.candidate_names = tuple(name for f in candidate_features for name in f.transformed_names)
        # Training only, and so none of the model's variables.
        self.sampler = (
            None
            if config.loss.needs_catalogue
            else CandidateSampler(self.candidate_names, self.sampling_probability)
        )
        # What TFRS logs as "loss" is that of an epoch's last batch.
        self.mean_loss = tf.keras.metrics.Mean("mean_loss")

    def use_catalogue(self, catalogue: Catalogue, miner: HardNegativeMiner | None = None) -> None:
        """Gives the loss what uniform and hard negatives come from.

        Args:
          catalogue: every item.
          miner: of hard negatives; none are used when absent.

        Raises:
          ConfigError: no item of the catalogue occurs in the training data.
        """
        pool = CataloguePool(catalogue, self.num_item_ids, self.config.loss.uniform_negatives)
        self.sampler = CandidateSampler(self.candidate_names, self.sampling_probability, pool, miner)

    # Nothing here branches on a tensor; AutoGraph would spend half a minute on converting Keras' own code.
    train_step = tf.autograph.experimental.do_not_convert(tfrs.models.Model.train_step)

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of one batch of positives.

        Args:
          inputs: transformed query and candidate features [B], and retrieval_weight float32 [B].
          training: whether ids are hidden.

        Returns:
          float32 scalar.

        Raises:
          ConfigError: the loss needs the catalogue and has not got it.
        """
        if self.sampler is None:
            raise ConfigError("uniform and hard negatives need the catalogue; call use_catalogue first.")
        inputs = rolled_back(inputs, self.config)
        weights = self._weights(inputs)
        queries = self.query_tower(inputs, training=training, with_factors=False)
        candidates = self.sampler.sample(
            inputs,
            queries,
            lambda items: self.candidate_tower(
                items, training=training, with_popularity=False, with_factors=False
            ),
            training,
        )
        vectors = candidates.vectors
        if queries.shape.rank == 3:
            queries = _nearest_interest(queries, tf.gather(vectors, candidates.positives))
        if self.popularity is not None:
            queries, vectors = append_popularity(
                queries,
                vectors,
                inputs[features.DAYS_TO_END],
                tf.gather(self.popularity, candidates.item_ids),
                self.candidate_tower.popularity_weights,
            )
        loss = sampled_softmax_loss(
            queries,
            vectors,
            candidates.positives,
            candidates.log_weights,
            self.config.loss.temperature,
            weights,
            candidates.hard_negatives,
        )
        self.mean_loss.update_state(loss)
        return loss

    def _weights(self, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Weights of examples whose histories were rolled back, float32 [B]."""
        weights = inputs[features.RETRIEVAL_WEIGHT]
        if not _rolls_back(inputs, self.config):
            return weights
        is_first = tf.reduce_all(inputs[_HISTORY_IDS] == features.PADDING_ID, axis=1)
        return tf.where(is_first, self.config.first_session_weight * weights, weights)

    def encode_users(self, users: Mapping[str, np.ndarray]) -> np.ndarray:
        """Transformed query features [U] -> query vectors float32 [U, F + embedding_dim + 1]."""
        return _in_batches(self.query_tower, users)

    def encode_catalogue(self, catalogue: Catalogue, with_factors: bool = True) -> np.ndarray:
        """Candidate vectors of every item, float32 [I, F + embedding_dim + 1], in the order of the catalogue.

        Without factors, [I, embedding_dim + 1], as hard negatives are searched for.
        """
        return _in_batches(
            lambda items: self.candidate_tower(items, with_factors=with_factors), catalogue.transformed
        )


def _nearest_interest(queries: tf.Tensor, positives: tf.Tensor) -> tf.Tensor:
    """The interest that scores the positive highest, float32 [B, D] of [B, M, D].

    Source: Cen et al., KDD 2020, section 3.3 (ComiRec).
    """
    best = tf.argmax(tf.einsum("bmd,bd->bm", queries, positives), axis=1, output_type=tf.int32)
    return tf.gather(queries, best, batch_dims=1)


def _in_batches(
    tower: Callable[[Mapping[str, tf.Tensor]], tf.Tensor], columns: Mapping[str, np.ndarray]
) -> np.ndarray:
    batches = tf.data.Dataset.from_tensor_slices(dict(columns)).batch(_ENCODE_BATCH)
    return np.concatenate([tower(batch).numpy() for batch in batches])


def _rolls_back(inputs: Collection[str], config: RetrievalConfig) -> bool:
    return config.roll_back_to_session and features.PRIOR_SESSIONS_IDS in inputs


def rolled_back(inputs: Mapping[str, tf.Tensor], config: RetrievalConfig) -> Mapping[str, tf.Tensor]:
    """Training examples as the towers read them: if so set, histories end where the session began."""
    if not _rolls_back(inputs, config):
        return inputs
    return {**inputs, _HISTORY_IDS: inputs[features.PRIOR_SESSIONS_IDS]}


def unread_features(spec: DatasetSpec, config: RetrievalConfig) -> set[str]:
    """Raw features of interaction examples that training does not read.

    They are those of the ranker alone, labels other than that of a positive, ignored features, and histories
    that are replaced by rolled-back ones.
    """
    of_ranker = (*features.raw_impression_inputs(spec), *features.raw_logged_inputs(spec))
    names = {raw.name for raw in of_ranker} | {features.ITEM_COUNTS, features.UPLOAD_TIME}
    names |= {label for label in features.feature_space(spec).labels if label != spec.positive}
    names |= {*config.ignored_features} - ({features.SURFACE} if config.surfaces else set())
    if config.roll_back_to_session and spec.session_gap_hours is not None:
        names.add(features.HISTORY)
    return names


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
    known_positives: np.ndarray | None = None,
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
      known_positives: from `trainer.hard_negatives.known_positives`; needed for hard negatives.

    Returns:
      One dict per epoch: epoch, loss (mean over its steps), RECALL, NDCG, train_s, validation_s.

    Raises:
      ConfigError: the loss has hard negatives, and `known_positives` is absent.
      DataError: the loss is no longer finite.
      CollapsedModelError: the best epoch's model says the same to everybody.
    """
    validation = _Validation(catalogue, users, config.patience_epochs, log_file)
    callbacks: list[tf.keras.callbacks.Callback] = [validation]
    miner = None
    if config.loss.hard_negatives:
        if known_positives is None:
            raise ConfigError("loss.hard_negatives is above 0; pass known_positives to tell false ones by.")
        miner = HardNegativeMiner(config.loss, catalogue, known_positives)
        callbacks.append(
            RefreshHardNegatives(miner, lambda: model.encode_catalogue(catalogue, with_factors=False))
        )
    if config.loss.needs_catalogue:
        model.use_catalogue(catalogue, miner)
    # The update of Adagrad touches only the embedding rows of the batch; that of Adam decays every row.
    optimizer = tf.keras.optimizers.legacy.Adagrad(
        config.learning_rate, initial_accumulator_value=_INITIAL_ACCUMULATOR
    )
    model.compile(optimizer=optimizer)
    model.fit(
        batches.repeat(),
        steps_per_epoch=min(config.max_steps_per_epoch, max(1, num_positives // config.batch_size)),
        epochs=config.max_epochs,
        callbacks=callbacks,
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
        check_not_collapsed(best, len(self.users), len(self.catalogue))
