"""The multi-task ranker: encoded features, interactions, experts, one head per task, calibrated outputs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf
import tensorflow_recommenders as tfrs

from schema.contract import DatasetSpec, TaskKind
from schema.errors import ConfigError, DataError
from schema.point_in_time import count_names, log_count_names
from trainer import features as ft
from trainer import metrics
from trainer.behaviour import behaviour
from trainer.calibration import Calibrator, fit_tasks
from trainer.calibration_config import CalibrationConfig
from trainer.config import RankingConfig
from trainer.debiasing import PositionBias, PositionStatistics
from trainer.debiasing_config import has_position_bias
from trainer.encoder import (
    CrossEncoder,
    EmbeddingTables,
    FeatureEncoder,
    category_name,
    embedding_width,
    with_powers,
)
from trainer.experts import experts
from trainer.impressions import Impressions, ItemAttributes, PastOutcomes, read_impressions, shares_value
from trainer.interactions import interaction
from trainer.label_statistics import LabelStatistics, bucket_name, duration_contexts
from trainer.loss_balancing import LossBalancer
from trainer.ranking_losses import labelled_loss, objective
from trainer.request_outcomes import request_outcomes
from trainer.score import declared_weights, final_score
from trainer.watch_time import task_context

SCORE = "score"
# float32 [B]: how much a training row counts, in batches that have it.
ROW_WEIGHT = "row_weight"

FloatArray = npt.NDArray[np.floating[Any]]

_logger = logging.getLogger(__name__)


def calibration_slice(config: CalibrationConfig, space: ft.FeatureSpace) -> str | None:
    """Transformed name of the feature whose values are calibrated apart, None for none.

    Raises:
      ConfigError: it is no single-valued categorical query feature.
    """
    if config.slice_feature is None:
        return None
    able = {f.name: f for f in space.query if f.is_categorical and not f.is_list}
    if config.slice_feature not in able:
        raise ConfigError(
            f"ranking.calibration.slice_feature is {config.slice_feature!r}; expected a single-valued "
            f"categorical query feature: {', '.join(able)}"
        )
    return able[config.slice_feature].id_name


def _initializer(bias: Sequence[float], tower: PositionBias | None) -> Callable[..., tf.Tensor]:
    """Gives a head the bias with which an untrained model serves the base rate."""
    values = bias if tower is None else tuple(map(tower.initial_bias, bias))

    def initial(shape: Sequence[int], dtype: tf.DType | None = None) -> tf.Tensor:
        return tf.constant(values, dtype)

    return initial


def _values(features: Mapping[str, tf.Tensor], feature: ft.Feature) -> tf.Tensor:
    """Ids of a categorical feature, int [B, T]; T is 1 where it has one value."""
    ids = features[feature.id_name]
    return ids if feature.is_list else ids[:, tf.newaxis]


class EncodedQuery(NamedTuple):
    """The query side of the ranker, computed once per request.

    Attributes:
      parts: float32 [U, W] of every query feature.
      history: float32 [U, W], mean embedding of the watched items; zeros without history.
      impressions: the user's latest impressions.
      surface: int [U]; None for a dataset without surfaces.
      is_event: bool [U, E], where there is one of the latest impressions, which are attended to.
      events: float32 [U, E, W], embeddings of what they showed.
      event_features: float32 [U, E, F], what became of them, and when.
      crossed: int [U] of the query features that are crossed with those of candidates.
      shared: int [U, L] of the query features whose values candidates may have too.
    """

    parts: tuple[tf.Tensor, ...]
    history: tf.Tensor
    impressions: Impressions
    surface: tf.Tensor | None
    is_event: tf.Tensor
    events: tf.Tensor
    event_features: tf.Tensor
    crossed: Mapping[str, tf.Tensor]
    shared: Mapping[str, tf.Tensor]


class EncodedItems(NamedTuple):
    """What the ranker knows of items whoever asks and when: made once per item where items are served.

    Letters: [...] = the items, [M], or [U, N] in a request.

    Attributes:
      features: float32 [..., W] of every candidate feature that is read.
      counters: float32 [..., W], of the log.
      embedding: float32 [..., W] of the item's id.
      values: int [..., T] of each feature that is compared with what the query names or was shown: the keys
        of the counters, and those that share a vocabulary with a query feature.
      key_embedding: float32 [..., W], what the keys say together; W is 0 where nothing reads it.
      label_means: float32 [..., S], of everybody.
      ids: int [...], or [..., L], by transformed name: what is crossed with the query, and what outputs
        depend on besides the logits.
    """

    features: tuple[tf.Tensor, ...]
    counters: tf.Tensor
    embedding: tf.Tensor
    values: Mapping[str, tf.Tensor]
    key_embedding: tf.Tensor
    label_means: tf.Tensor
    ids: Mapping[str, tf.Tensor]


class RankingModel(tfrs.models.Model):
    """Multi-task model (Caruana 1997) over the tasks of a dataset declaration.

    Features of query, candidate and both, counters of the log, and what the user's impressions say about the
    candidate are encoded, crossed, read by the experts, and turned into one output per task by its head. The
    loss is the sum over tasks of loss_weight times the mean loss of the rows that have the task's label.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        vocabulary_sizes: Mapping[str, int],
        statistics: Mapping[str, LabelStatistics],
        attributes: ItemAttributes,
        config: RankingConfig,
        positions: Mapping[str, PositionStatistics] | None = None,
        item_vectors: np.ndarray | None = None,
    ) -> None:
        """Makes an untrained model, which says of every row what it knows of all: the base rate.

        Args:
          spec: declares features and tasks.
          vocabulary_sizes: ids per vocabulary space, padding and OOV included.
          statistics: training labels by task name.
          attributes: of the items that impressions show.
          config: sizes and regularisation.
          positions: training labels by position, by task name; needed if `config.position` names a tower.
          item_vectors: float32 [item ids, `embedding_width` of them] that item embeddings start from; None is
            random.
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
            {} if item_vectors is None else {ft.ITEM_SPACE: item_vectors},
        )
        ignored = config.ignored_features
        self.query_encoder = FeatureEncoder([f for f in space.query if f.name not in ignored], self.tables)
        self.item_encoder = FeatureEncoder(
            [f for f in space.candidate + space.cross if f.name not in ignored], self.tables
        )
        pairs = [(space.find(left), space.find(right)) for left, right in config.crosses]
        self.cross_encoder = CrossEncoder(pairs, vocabulary_sizes)
        self.past_outcomes = PastOutcomes(spec, statistics, config.past)
        self.shared = [
            (left, right)
            for left, right in ft.shared_spaces(space)
            if not {left.name, right.name} & {ft.HISTORY, *ignored}
        ]
        self.keys = {key: space.find(key) for key in spec.counters.keys}
        width = sum(self.tables.widths[feature.space] for feature in self.keys.values())
        self.behaviour = behaviour(config.behaviour, width)
        self.interaction = interaction(config.interaction)
        self.is_parallel = config.interaction.structure == "parallel"
        self.tasks = spec.tasks
        self.cross_features = tuple(f for f in self.item_encoder.encoded if f in space.cross)
        self.body = experts(config.experts, [task.name for task in spec.tasks])
        self.objectives = {task.name: objective(task, statistics[task.name]) for task in spec.tasks}
        self.positions = {
            task.name: PositionBias(config.position, task, positions[task.name], name=f"position_{task.name}")
            for task in spec.tasks
            if positions is not None and has_position_bias(config.position, task)
        }
        # With a kernel of zeros an untrained head says exactly its bias: the base rate.
        self.heads = {
            name: tf.keras.layers.Dense(
                task.num_logits,
                kernel_initializer="zeros",
                bias_initializer=_initializer(task.initial_bias, self.positions.get(name)),
                name=f"head_{name}",
            )
            for name, task in self.objectives.items()
        }
        self.balancer = LossBalancer({t.name: t.loss_weight for t in spec.tasks}, config.balancing)
        self.mean_loss = tf.keras.metrics.Mean(name="mean_loss")
        self.calibrators: Mapping[str, Calibrator] = {}
        self.slice_name = calibration_slice(config.calibration, space)
        # A plain object, which Keras does not count among the weights.
        self.attributes = attributes
        self._spec: Callable[[], DatasetSpec] = lambda: spec
        self._history_id = space.find(ft.HISTORY).id_name
        self._item_id = space.find(ft.ITEM_ID).id_name
        self._surface_id = space.find(ft.SURFACE).id_name if spec.surface_is_mapped else None
        self._num_counters = len(count_names(spec)) - len(log_count_names(spec))
        read_besides = [right for _, right in pairs if right not in space.cross]
        durations = [task.duration_feature for task in spec.tasks if task.duration_feature is not None]
        self._item_ids = tuple(
            dict.fromkeys([*map(category_name, read_besides), *map(bucket_name, durations)])
        )
        self._single_ids = tuple(f.id_name for f in embedded if not f.is_list)
        self._id_dropout_fraction = config.id_dropout_fraction

    @property
    def output_features(self) -> tuple[str, ...]:
        """Transformed query features that outputs depend on besides the logits."""
        names = (self.slice_name, self._surface_id if self.positions else None)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    # Nothing here branches on a tensor; AutoGraph would spend half a minute on converting Keras' own code.
    train_step = tf.autograph.experimental.do_not_convert(tfrs.models.Model.train_step)

    def encode_query(self, features: Mapping[str, tf.Tensor]) -> EncodedQuery:
        """Encodes the transformed query features and impressions of U requests."""
        impressions = read_impressions(features, self.attributes, self._spec())
        events = impressions.latest(self.behaviour.max_events)
        return EncodedQuery(
            tuple(self.query_encoder.encode(features)),
            self.tables.mean(ft.ITEM_SPACE, features[self._history_id]),
            impressions,
            None if self._surface_id is None else features[self._surface_id],
            events.is_shown,
            self._embed_keys({key: events.keys[key] for key in self.keys}),
            tf.concat([events.labels, events.log_age[..., tf.newaxis]], axis=-1),
            {category_name(left): features[category_name(left)] for left, _ in self.cross_encoder.pairs},
            {left.name: _values(features, left) for left, _ in self.shared},
        )

    def encode_items(self, features: Mapping[str, tf.Tensor]) -> EncodedItems:
        """Encodes the transformed candidate features and counters of M items."""
        fixed = [feature for feature in self.item_encoder.encoded if feature not in self.cross_features]
        counters = tf.ensure_shape(features[ft.COUNTERS], [None, self._num_counters])
        compared = [*self.keys.values(), *(right for _, right in self.shared)]
        values = {feature.name: _values(features, feature) for feature in compared}
        item = self.tables(ft.ITEM_SPACE, features[self._item_id])
        return EncodedItems(
            features=tuple(self.item_encoder.encode(features, fixed)),
            counters=with_powers(counters),
            embedding=item,
            values=values,
            key_embedding=(
                self._embed_keys({key: values[key] for key in self.keys})
                if self.behaviour.reads_candidates
                else item[:, :0]
            ),
            label_means=features[ft.LABEL_MEANS],
            ids={name: features[name] for name in self._item_ids},
        )

    def logits(
        self,
        query: EncodedQuery,
        features: Mapping[str, tf.Tensor],
        num_candidates: int | tf.Tensor = 1,
        training: bool = False,
    ) -> dict[str, tf.Tensor]:
        """The logits of every task for U queries with N candidates each.

        Args:
          query: U encoded queries.
          features: transformed candidate and cross features and counters, U × N rows, query by query.
          num_candidates: N.
          training: whether dropout is on.

        Returns:
          Task name -> float32 [U × N, logits of the task].
        """

        # Not -1, which could be any number when there are no candidates.
        shape = [tf.shape(query.history)[0], num_candidates]

        def grouped(rows: tf.Tensor) -> tf.Tensor:
            return tf.reshape(rows, tf.concat([shape, tf.shape(rows)[1:]], axis=0))

        items = tf.nest.map_structure(grouped, self.encode_items(features))
        at_request = {
            name: grouped(features[name]) for f in self.cross_features for name in f.transformed_names
        }
        return self.logits_of_parts(self.parts(query, items, at_request, training), shape, training)

    def parts(
        self,
        query: EncodedQuery,
        items: EncodedItems,
        at_request: Mapping[str, tf.Tensor],
        training: bool = False,
    ) -> list[tf.Tensor]:
        """The inputs of the body for U queries with N candidates each.

        Args:
          query: U encoded queries.
          items: U × N encoded items.
          at_request: transformed features of item and request time together, [U, N].
          training: whether dropout is on.

        Returns:
          float32 [U, N, W] of each feature, or [U, 1, W] where it is the same for all candidates.
        """
        match = items.embedding * query.history[:, tf.newaxis]
        keys = {key: items.values[key] for key in self.keys}
        duration = self.past_outcomes.duration
        if duration is not None:
            keys[duration] = duration_contexts(items.ids[bucket_name(duration)])[..., tf.newaxis]
        past = request_outcomes(self.past_outcomes, query.impressions, query.surface, keys, items.label_means)
        attended = self.behaviour.match(
            items.key_embedding, query.events, query.is_event, query.event_features, training
        )
        parts = [part[:, tf.newaxis] for part in query.parts]
        parts += [*items.features, *self.item_encoder.encode(at_request, self.cross_features)]
        parts += [items.counters, match, tf.reduce_sum(match, axis=-1, keepdims=True), past, attended]
        crossed = {name: ids[:, tf.newaxis] for name, ids in query.crossed.items()}
        parts += self.cross_encoder(crossed, {**items.ids, **at_request})
        for left, right in self.shared:
            is_shared = shares_value(items.values[right.name], query.shared[left.name])
            parts.append(tf.cast(is_shared, tf.float32)[..., tf.newaxis])
        return parts

    def logits_of_parts(
        self, parts: Sequence[tf.Tensor], shape: Sequence[Any], training: bool = False
    ) -> dict[str, tf.Tensor]:
        """The logits of every task from `parts` of `shape`, U and N: float32 [U × N, logits of the task]."""
        parts = [
            tf.reshape(tf.broadcast_to(part, [*shape, part.shape[-1]]), [-1, part.shape[-1]])
            for part in parts
        ]
        inputs = tf.concat(parts, axis=-1)
        crossed = inputs if self.interaction is None else self.interaction(parts, training=training)
        shared = self.body(inputs if self.is_parallel else crossed, training=training)
        logits = {}
        for name, head in self.heads.items():
            representation = shared[name]
            if self.is_parallel and self.interaction is not None:
                representation = tf.concat([representation, crossed], axis=-1)
            if training:
                representation = self.balancer.probe(name, representation)
            logits[name] = head(representation)
        return logits

    def _embed_keys(self, keys: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """What an item shares with others as one vector: [..., T] ids by key to float32 [..., W]."""
        return tf.concat([self.tables.mean(self.keys[key].space, ids) for key, ids in keys.items()], axis=-1)

    def predictions(
        self, logits: Mapping[str, tf.Tensor], features: Mapping[str, tf.Tensor]
    ) -> dict[str, tf.Tensor]:
        """What is served: each task's calibrated output in its unit, float32 [B].

        Args:
          logits: from `logits`.
          features: what else outputs depend on, [B]: duration buckets, `output_features`.
        """
        outputs = self.raw_predictions(logits, features)
        slices = None if self.slice_name is None else features[self.slice_name]
        return {
            name: self.calibrators[name].apply(value, slices) if name in self.calibrators else value
            for name, value in outputs.items()
        }

    def raw_predictions(
        self, logits: Mapping[str, tf.Tensor], features: Mapping[str, tf.Tensor]
    ) -> dict[str, tf.Tensor]:
        """The outputs before calibration, as at the average position of the surface; see `predictions`."""
        surface = None if self._surface_id is None else features.get(self._surface_id)
        served = {**logits}
        for name, tower in self.positions.items():
            served[name] = tf.transpose(tower.served(tf.transpose(logits[name]), surface))
        return {
            task.name: self.objectives[task.name].output(served[task.name], task_context(task, features))
            for task in self.tasks
        }

    def task_losses(
        self, logits: Mapping[str, tf.Tensor], inputs: Mapping[str, tf.Tensor], training: bool = False
    ) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        """Sum of the losses and of the weights of the labelled rows, as they were shown, by task.

        Args:
          logits: from `logits`.
          inputs: features, labels, positions and, optionally, weights of B rows.
          training: whether positions are dropped.
        """
        surface = None if self._surface_id is None else inputs[self._surface_id]
        shown = {**logits}
        for name, tower in self.positions.items():
            row = tower(tf.transpose(logits[name]), inputs[ft.POSITION], surface, training=training)
            shown[name] = tf.transpose(row)
        return {
            task.name: labelled_loss(
                self.objectives[task.name],
                shown[task.name],
                inputs[task.label],
                task_context(task, inputs),
                inputs.get(ROW_WEIGHT),
            )
            for task in self.tasks
        }

    def score(self, outputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """The final score of calibrated outputs by the declared weights."""
        return final_score(outputs, declared_weights(self.tasks))

    def call(self, features: Mapping[str, tf.Tensor], training: bool = False) -> dict[str, tf.Tensor]:
        """Logits by task of B rows of transformed features, one candidate each."""
        if training:
            features = self._hide_ids(features)
        return self.logits(self.encode_query(features), features, training=training)

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of a batch of transformed features and labels, float32 []."""
        sums = self.task_losses(self(inputs, training=training), inputs, training)
        losses = {name: tf.math.divide_no_nan(total, weight) for name, (total, weight) in sums.items()}
        loss = self.balancer.total(losses)
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


class Judged(NamedTuple):
    """What a model says about labelled rows.

    Attributes:
      losses: sum of the losses and number of labelled rows, float64 [2] by task.
      labels: float32 [N] by label; NaN where missing.
      raw: outputs before calibration, float32 [N] by task.
      outputs: calibrated outputs, float32 [N] by task.
      slices: int [N] of the calibration; None without slices.
    """

    losses: Mapping[str, FloatArray]
    labels: Mapping[str, FloatArray]
    raw: Mapping[str, FloatArray]
    outputs: Mapping[str, FloatArray]
    slices: npt.NDArray[Any] | None


def judge(model: RankingModel, batches: tf.data.Dataset) -> Judged:
    """Runs the model over labelled batches. Raises DataError when there are no rows."""

    @tf.function(reduce_retracing=True, autograph=False)
    def step(batch: Mapping[str, tf.Tensor]) -> dict[str, Any]:
        logits = model(batch, training=False)
        losses = {name: tf.stack(sums) for name, sums in model.task_losses(logits, batch).items()}
        slices = {} if model.slice_name is None else {"": batch[model.slice_name]}
        return {
            "losses": losses,
            "labels": {task.label: batch[task.label] for task in model.tasks},
            "raw": model.raw_predictions(logits, batch),
            "outputs": model.predictions(logits, batch),
            "slices": slices,
        }

    steps = [tf.nest.map_structure(lambda value: value.numpy(), step(batch)) for batch in batches]
    if not any(len(value) for one in steps for value in one["labels"].values()):
        raise DataError("no validation rows for the ranker; the eval split is empty: move split.eval_until.")

    def joined(what: str) -> dict[str, FloatArray]:
        return {name: np.concatenate([one[what][name] for one in steps]) for name in steps[0][what]}

    losses = {
        name: sum(one["losses"][name].astype(np.float64) for one in steps) for name in steps[0]["losses"]
    }
    slices = joined("slices").get("")
    return Judged(losses, joined("labels"), joined("raw"), joined("outputs"), slices)


def calibrate(model: RankingModel, batches: tf.data.Dataset, config: CalibrationConfig) -> None:
    """Fits the calibration of every task on labelled batches that the model was not trained on."""
    judged = judge(model, batches)
    model.calibrators = fit_tasks(config, model.tasks, judged.raw, judged.labels, judged.slices)


def evaluate(model: RankingModel, batches: tf.data.Dataset) -> dict[str, float]:
    """Judges the model on labelled batches.

    Returns:
      `eval_loss`, the sum over tasks of loss_weight times the mean loss over all labelled rows; and
      `ranking/<task>/<metric>` of the served outputs: `auc` of binary tasks, `mae` and `xauc` of the others,
      and `calibration`, the mean output over the mean label (1 is perfect). A metric that the data cannot
      define is NaN.

    Raises:
      DataError: there are no rows.
    """
    judged = judge(model, batches)
    result = {
        "eval_loss": sum(
            float(task.loss_weight * judged.losses[task.name][0] / max(judged.losses[task.name][1], 1))
            for task in model.tasks
        )
    }
    for task in model.tasks:
        truth, predicted = judged.labels[task.label], judged.outputs[task.name]
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
