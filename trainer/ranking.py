"""The multi-task ranker: a shared body over query, candidate and cross features, one head per task."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf
import tensorflow_recommenders as tfrs

from schema.contract import DatasetSpec, TaskKind
from schema.errors import DataError
from trainer import features as ft
from trainer import metrics
from trainer.config import RankingConfig
from trainer.encoder import EmbeddingTables, FeatureEncoder, embedding_width
from trainer.ranking_losses import LabelStatistics, labelled_loss, objective

SCORE = "score"

FloatArray = npt.NDArray[np.floating[Any]]

_logger = logging.getLogger(__name__)


def body(config: RankingConfig) -> tf.keras.Sequential:
    """The shared layers between the encoded features and the heads: [B, D] -> [B, last hidden width]."""
    layers: list[tf.keras.layers.Layer] = []
    for width in config.hidden_layers:
        layers += [
            tf.keras.layers.Dropout(config.dropout_fraction),
            tf.keras.layers.Dense(width, activation="relu"),
        ]
    return tf.keras.Sequential(layers, name="body")


class EncodedQuery(NamedTuple):
    """The query side of the ranker, computed once per request.

    Attributes:
      vector: float32 [B, D], all query features.
      history: float32 [B, W], mean embedding of the watched items; zeros without history.
    """

    vector: tf.Tensor
    history: tf.Tensor

    def repeat(self, times: tf.Tensor) -> EncodedQuery:
        """Each row `times` times in a row: [B * times, ...], one row per candidate."""
        return EncodedQuery(tf.repeat(self.vector, times, axis=0), tf.repeat(self.history, times, axis=0))


class RankingModel(tfrs.models.Model):
    """Shared-bottom multi-task model (Caruana 1997) over the tasks of a dataset declaration.

    The loss is the sum over tasks of loss_weight times the mean loss of the rows that have the task's label.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        vocabulary_sizes: Mapping[str, int],
        statistics: Mapping[str, LabelStatistics],
        config: RankingConfig,
    ) -> None:
        """Makes an untrained model, which predicts the training mean of every task for every row.

        Args:
          spec: declares features and tasks.
          vocabulary_sizes: ids per vocabulary space, padding and OOV included.
          statistics: training labels by task name.
          config: sizes and regularisation.
        """
        super().__init__()
        space = ft.feature_space(spec)
        embedded = [f for f in space.query + space.candidate if f.is_categorical]
        self.tables = EmbeddingTables(
            vocabulary_sizes,
            {
                f.space: embedding_width(vocabulary_sizes[f.space], config.max_embedding_width)
                for f in embedded
            },
        )
        self.query_encoder = FeatureEncoder(space.query, self.tables)
        self.item_encoder = FeatureEncoder(space.candidate + space.cross, self.tables)
        self.body = body(config)
        self.tasks = spec.tasks
        self.objectives = {task.name: objective(task.kind, statistics[task.name]) for task in spec.tasks}
        # With a kernel of zeros an untrained head says exactly its bias: the base rate.
        self.heads = {
            name: tf.keras.layers.Dense(
                1,
                kernel_initializer="zeros",
                bias_initializer=tf.keras.initializers.Constant(task.initial_bias),
                name=f"head_{name}",
            )
            for name, task in self.objectives.items()
        }
        self.mean_loss = tf.keras.metrics.Mean(name="mean_loss")
        self._history_id = space.find(ft.HISTORY).id_name
        self._item_id = space.find(ft.ITEM_ID).id_name
        self._single_ids = tuple(f.id_name for f in embedded if not f.is_list)
        self._id_dropout_fraction = config.id_dropout_fraction

    # Nothing here branches on a tensor; AutoGraph would spend half a minute on converting Keras' own code.
    train_step = tf.autograph.experimental.do_not_convert(tfrs.models.Model.train_step)

    def encode_query(self, features: Mapping[str, tf.Tensor]) -> EncodedQuery:
        """Encodes the transformed query features of B requests."""
        history = self.tables.mean(ft.ITEM_SPACE, features[self._history_id])
        return EncodedQuery(self.query_encoder(features), history)

    def logits(
        self, query: EncodedQuery, features: Mapping[str, tf.Tensor], training: bool = False
    ) -> dict[str, tf.Tensor]:
        """One logit per task for B pairs of a query and an item.

        Args:
          query: encoded queries, one row per pair.
          features: transformed candidate and cross features, one row per pair.
          training: whether dropout is on.

        Returns:
          Task name -> float32 [B].
        """
        item = self.tables(ft.ITEM_SPACE, features[self._item_id])
        match = item * query.history
        similarity = tf.reduce_sum(match, axis=-1, keepdims=True)
        inputs = tf.concat([query.vector, self.item_encoder(features), match, similarity], axis=-1)
        shared = self.body(inputs, training=training)
        return {name: tf.squeeze(head(shared), axis=-1) for name, head in self.heads.items()}

    def predictions(self, logits: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """What is served: each task's output in its unit; `score` is their sum weighted by score_weight."""
        outputs = {name: task.output(logits[name]) for name, task in self.objectives.items()}
        outputs[SCORE] = tf.add_n([task.score_weight * outputs[task.name] for task in self.tasks])
        return outputs

    def call(self, features: Mapping[str, tf.Tensor], training: bool = False) -> dict[str, tf.Tensor]:
        """Logits by task, float32 [B], of B rows of transformed features."""
        if training:
            features = self._hide_ids(features)
        return self.logits(self.encode_query(features), features, training)

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Weighted sum of the task losses of a batch of transformed features and labels, float32 []."""
        logits = self(inputs, training=training)
        losses = []
        for task in self.tasks:
            total, count = labelled_loss(self.objectives[task.name], logits[task.name], inputs[task.label])
            losses.append(task.loss_weight * total / tf.maximum(count, 1.0))
        loss = tf.add_n(losses)
        self.mean_loss.update_state(loss)
        return loss

    def _hide_ids(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Lets a random share of the known single-valued ids read as unknown, each on its own.

        Vocabularies come from the training data: without this the embedding of unknown ids would stay
        untrained.
        """
        hidden = dict(features)
        for name in self._single_ids:
            ids = hidden[name]
            hide = tf.random.uniform(tf.shape(ids)) < self._id_dropout_fraction
            hide = tf.logical_and(hide, ids >= ft.FIRST_VOCABULARY_ID)
            hidden[name] = tf.where(hide, tf.constant(ft.OOV_ID, ids.dtype), ids)
        return hidden


def train(
    model: RankingModel, batches: tf.data.Dataset, eval_batches: tf.data.Dataset, config: RankingConfig
) -> list[dict[str, float]]:
    """Trains until the validation loss stops falling, and leaves the weights of the best epoch in the model.

    Args:
      model: untrained.
      batches: training batches; one epoch per iteration.
      eval_batches: validation batches in a fixed order, every row once.
      config: learning rate, epochs, patience.

    Returns:
      One record per epoch: `epoch` (from 1), `seconds` (training only), `train_loss`, and what `evaluate`
      returns.

    Raises:
      DataError: no validation rows, or the loss is not a finite number.
    """
    model.compile(optimizer=tf.keras.optimizers.Adam(config.learning_rate))
    log: list[dict[str, float]] = []
    best_epoch, best_loss, best_weights = 0, math.inf, None
    for epoch in range(1, config.max_epochs + 1):
        start = time.perf_counter()
        train_loss = model.fit(batches, verbose=0).history["mean_loss"][0]
        if not math.isfinite(train_loss):
            raise DataError(
                f"the ranking loss is {train_loss} in epoch {epoch}; lower the ranker's learning_rate, "
                "or look for extreme labels."
            )
        record = {"epoch": epoch, "seconds": time.perf_counter() - start, "train_loss": train_loss}
        record |= evaluate(model, eval_batches)
        log.append(record)
        _logger.info(
            "phase=train_ranking %s", " ".join(f"{name}={value:.5g}" for name, value in record.items())
        )
        if record["eval_loss"] < best_loss:
            best_epoch, best_loss, best_weights = epoch, record["eval_loss"], model.get_weights()
        elif epoch - best_epoch >= config.patience_epochs:
            break
    model.set_weights(best_weights)
    _logger.info("phase=train_ranking best_epoch=%d eval_loss=%.5g", best_epoch, best_loss)
    return log


def evaluate(model: RankingModel, batches: tf.data.Dataset) -> dict[str, float]:
    """Judges the model on labelled batches.

    Returns:
      `eval_loss`, the training objective with exact means over all labelled rows; and
      `ranking/<task>/<metric>` of the served outputs: `auc` of binary tasks, `mae` and `xauc` of the others,
      and `calibration`, the mean output over the mean label (1 is perfect). A metric that the data cannot
      define is NaN.

    Raises:
      DataError: there are no rows.
    """

    @tf.function(reduce_retracing=True, autograph=False)
    def judge(batch: Mapping[str, tf.Tensor]) -> dict[str, Any]:
        logits = model(batch, training=False)
        losses = {n: labelled_loss(task, logits[n], batch[label[n]]) for n, task in model.objectives.items()}
        return {"losses": losses, "outputs": model.predictions(logits)}

    label = {task.name: task.label for task in model.tasks}
    sums = {name: np.zeros(2) for name in label}
    labels: dict[str, list[FloatArray]] = {name: [] for name in label}
    outputs: dict[str, list[FloatArray]] = {name: [] for name in label}
    for batch in batches:
        judged = judge(batch)
        for name in label:
            sums[name] += [float(value) for value in judged["losses"][name]]
            labels[name].append(batch[label[name]].numpy())
            outputs[name].append(judged["outputs"][name].numpy())
    if not any(len(piece) for piece in labels[model.tasks[0].name]):
        raise DataError("no validation rows for the ranker; the eval split is empty: move split.eval_until.")

    result = {
        "eval_loss": sum(
            task.loss_weight * sums[task.name][0] / max(sums[task.name][1], 1) for task in model.tasks
        )
    }
    for task in model.tasks:
        truth, predicted = np.concatenate(labels[task.name]), np.concatenate(outputs[task.name])
        known = ~np.isnan(truth)
        truth, predicted = truth[known].astype(np.float64), predicted[known].astype(np.float64)
        for name, value in _task_metrics(task.kind, truth, predicted).items():
            result[metrics.metric_key("ranking", name, task=task.name)] = value
    return result


def _task_metrics(kind: TaskKind, labels: FloatArray, outputs: FloatArray) -> dict[str, float]:
    if kind is TaskKind.BINARY:
        quality = {"auc": metrics.auc(labels, outputs)}
    else:
        quality = {"mae": metrics.mae(labels, outputs), "xauc": metrics.xauc(labels, outputs)}
    total = labels.sum()
    return {**quality, "calibration": float(outputs.sum() / total) if total else math.nan}
