"""The ranker as a SavedModel: raw requests or serialized examples in, task outputs and the final score out.

The export holds everything a request needs: the Transform graph, the weights, and the transformed catalogue.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer import raw_inputs
from trainer.bundle import ServedModel, Signature, Tensors, appearing_whole, save_bundle
from trainer.catalogue import Catalogue
from trainer.fingerprint import Fingerprint
from trainer.golden import GoldenRequest
from trainer.item_table import ItemTable
from trainer.ranking import SCORE, EncodedItems, EncodedQuery, RankingModel
from trainer.request_logits import request_logits
from trainer.score import SCORE_WEIGHTS, final_score, request_weights

CANDIDATES = "candidate_item_ids"
IS_KNOWN = "item_is_known"
EXAMPLES = "examples"
WEIGHTED = "serving_weighted"
DESCRIBED = "serving_candidates"
PRE_RANK = "pre_rank"
SCORE_TASKS = "score_tasks"

_logger = logging.getLogger(__name__)


class CatalogueRanker(tf.Module):
    """The ranker over the items of a catalogue, which it knows by their rows."""

    def __init__(self, model: RankingModel, layer: Any, catalogue: Catalogue, spec: DatasetSpec) -> None:
        """Copies the catalogue, with one more row that stands for any unknown item.

        Args:
          model: trained.
          layer: `trainer.transform_graph.TransformGraph`.
          catalogue: all items that can be looked up.
          spec: the declaration of the dataset.
        """
        super().__init__()
        self._spec = spec
        self.num_items = len(catalogue)
        self._layer: Callable[[], Any] = lambda: layer
        self.transform_resources = layer
        # Only the weights: the Keras model would bring its optimizer and training functions along.
        self.weights = model.weights
        self.attributes = model.attributes.tables
        # A closure keeps the model itself out of the object graph that is saved.
        self._model: Callable[[], RankingModel] = lambda: model
        unknown = _unknown_item(layer, spec)
        features = {
            name: _append_row(tf.constant(column), unknown[name])
            for name, column in catalogue.transformed.items()
        }
        features |= {name: tf.constant(column) for name, column in catalogue.counters.items()}
        self._features: Callable[[], dict[str, tf.Tensor]] = lambda: features
        self.items = ItemTable(model.encode_items(features))
        if catalogue.upload_time_unix_s is not None:
            upload_time = tf.constant(catalogue.upload_time_unix_s, tf.int64)
            missing = tf.constant([raw_inputs.MISSING["int64"]], tf.int64)
            self.upload_time_unix_s = tf.Variable(tf.concat([upload_time, missing], axis=0), trainable=False)

    @property
    def model(self) -> RankingModel:
        """The trained model."""
        return self._model()

    @property
    def features(self) -> dict[str, tf.Tensor]:
        """Transformed features and counters of the items, [I + 1, ...] by name; the last row is unknown."""
        return self._features()

    def rank(
        self,
        query: EncodedQuery,
        features: Mapping[str, tf.Tensor],
        event_time_unix_s: tf.Tensor,
        rows: tf.Tensor,
        score_weights: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """Judges N items for each of B requests.

        Args:
          query: the requests, from `model.encode_query`.
          features: transformed query features of the requests.
          event_time_unix_s: int64 [B].
          rows: int [B, N], 0 to num_items; num_items is the row of an unknown item.
          score_weights: float32 [B, T], see `trainer.score.request_weights`.

        Returns:
          float32 [B, N] per task and `score`.
        """
        upload_time = tf.gather(self.upload_time_unix_s, rows) if self._model().cross_features else None
        return self.rank_items(
            query, features, event_time_unix_s, self.items.gather(rows), upload_time, score_weights
        )

    def rank_items(
        self,
        query: EncodedQuery,
        features: Mapping[str, tf.Tensor],
        event_time_unix_s: tf.Tensor,
        items: EncodedItems,
        upload_time_unix_s: tf.Tensor | None,
        score_weights: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """Judges N items for each of B requests, wherever what is known of them comes from.

        Args:
          query: as of `rank`, like the other arguments.
          features: see there.
          event_time_unix_s: int64 [B].
          items: B × N encoded items.
          upload_time_unix_s: int64 [B, N]; None for a dataset without upload times.
          score_weights: float32 [B, T].

        Returns:
          float32 [B, N] per task and `score`.
        """
        model, at_request = self._model(), {}
        shape = tf.shape(items.label_means)[:2]
        num_candidates = shape[1]
        if model.cross_features:
            event_time = tf.repeat(event_time_unix_s, num_candidates)
            upload_time = tf.reshape(upload_time_unix_s, [-1])
            crossed = raw_inputs.transform_cross(self._layer(), event_time, upload_time, self._spec)
            at_request = {name: tf.reshape(column, shape) for name, column in crossed.items()}
        parts = model.parts(query, items, at_request)
        logits = request_logits(model, parts, tf.unstack(shape))
        besides = {name: tf.reshape(ids, [-1]) for name, ids in items.ids.items() if ids.shape.rank == 2}
        besides |= {name: tf.repeat(features[name], num_candidates) for name in model.output_features}
        outputs = {name: tf.reshape(v, shape) for name, v in model.predictions(logits, besides).items()}
        outputs[SCORE] = final_score(outputs, request_weights(score_weights, self._spec.tasks))
        return outputs


class ServedRanker(ServedModel):
    """The signatures of the exported ranker, and the variables that they read.

    Attributes:
      ranker: over the catalogue.
      rows: string to int64, the row of an item id; that of an unknown item for any other id.
      preranker: a `trainer.preranker.ServedPreRanker` that is exported along; None for none.
    """

    def __init__(self, model: RankingModel, layer: Any, catalogue: Catalogue, spec: DatasetSpec) -> None:
        """Adds the ids of the items; see `CatalogueRanker`."""
        super().__init__()
        self.preranker: Any = None
        self._spec = spec
        self._layer: Callable[[], Any] = lambda: layer
        self.ranker = CatalogueRanker(model, layer, catalogue, spec)
        # Of an item without any event, see `trainer.input_pipeline.load_catalogue`.
        unmet = {name: column[-1:] for name, column in catalogue.counters.items()}
        self._unmet: Callable[[], dict[str, Any]] = lambda: unmet
        num_items = self.ranker.num_items
        self.rows = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                tf.constant(list(catalogue.item_ids), tf.string), tf.range(num_items, dtype=tf.int64)
            ),
            default_value=num_items,
        )

    def rank(
        self, raw: Tensors, candidate_item_ids: tf.Tensor, score_weights: tf.Tensor | None = None
    ) -> dict[str, tf.Tensor]:
        """Judges N candidates for each of B requests.

        Args:
          raw: raw query features and impressions, see `raw_inputs.ranking_signature`.
          candidate_item_ids: string [B, N]; "" is padding. An id outside the catalogue is judged by the query
            and what unknown items have in common.
          score_weights: float32 [B, T], see `trainer.score.request_weights`; None for the declared ones.

        Returns:
          float32 [B, N] per task and `score`, int64 [B, N] `item_is_known`; zeros where padded.
        """
        rows = self.rows.lookup(candidate_item_ids)
        if score_weights is None:
            score_weights = self._declared(candidate_item_ids)
        # The query is transformed and encoded once, whatever the number of candidates.
        features = raw_inputs.transform_request(self._layer(), raw, self._spec)
        query = self.ranker.model.encode_query(features)
        outputs = self.ranker.rank(query, features, raw[ft.EVENT_TIME], rows, score_weights)
        return _padded({**outputs, IS_KNOWN: self._is_known(rows)}, candidate_item_ids)

    def rank_described(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Judges N candidates, which the request describes, for each of B requests.

        They need not be in the catalogue; what it holds of them is not read.

        Args:
          raw: raw query features and impressions, see `raw_inputs.ranking_signature`; candidates, see
            `raw_inputs.candidate_signature`, of which those without an ITEM_ID are padding; score weights.

        Returns:
          As `rank`.
        """
        model, ids = self.ranker.model, raw[ft.ITEM_ID]
        features = raw_inputs.transform_request(self._layer(), raw, self._spec)
        described = model.encode_items(self._described(raw_inputs.candidate_rows(raw, self._spec)))

        def grouped(column: tf.Tensor) -> tf.Tensor:
            return tf.reshape(column, tf.concat([tf.shape(ids), tf.shape(column)[1:]], axis=0))

        outputs = self.ranker.rank_items(
            model.encode_query(features),
            features,
            raw[ft.EVENT_TIME],
            tf.nest.map_structure(grouped, described),
            raw.get(ft.UPLOAD_TIME),
            raw[SCORE_WEIGHTS],
        )
        return _padded({**outputs, IS_KNOWN: self._is_known(self.rows.lookup(ids))}, ids)

    def rank_examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        """Judges serialized interaction tf.Examples, string [B]: one candidate each.

        Their items need not be in the catalogue: features come with the example, and so do the counters; an
        example without any is one of an item that nobody has been shown.

        Returns:
          float32 [B] per task and `score`, int64 [B] `item_is_known`: whether the catalogue has the id.
        """
        model = self.ranker.model
        raw = raw_inputs.parse_interaction_examples(examples, self._spec)
        transformed = raw_inputs.transform_request(self._layer(), raw, self._spec)
        transformed |= self._described(raw)
        if ft.feature_space(self._spec).cross:
            transformed |= raw_inputs.transform_cross(
                self._layer(), raw[ft.EVENT_TIME], raw[ft.UPLOAD_TIME], self._spec
            )
        outputs = model.predictions(model(transformed, training=False), transformed)
        return {
            **outputs,
            SCORE: model.score(outputs),
            IS_KNOWN: self._is_known(self.rows.lookup(raw[ft.ITEM_ID])),
        }

    def _described(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Transformed features and counters of M described candidates, [M], lists [M, L]."""
        counts = raw[ft.ITEM_COUNTS]
        has_counts = tf.reduce_any(~tf.math.is_nan(counts), axis=1, keepdims=True)
        counters = raw_inputs.transform_counts(self._layer(), counts)
        return {
            **raw_inputs.transform_candidates(self._layer(), raw, self._spec),
            **{name: tf.where(has_counts, counters[name], unmet) for name, unmet in self._unmet().items()},
        }

    def calls(self) -> dict[str, Signature]:
        """See the base class."""
        query = raw_inputs.ranking_signature(self._spec)
        request = {**query, CANDIDATES: tf.TensorSpec([None, None], tf.string, name=CANDIDATES)}
        weights = tf.TensorSpec([None, len(self._spec.tasks)], tf.float32, name=SCORE_WEIGHTS)
        examples = tf.TensorSpec([None], tf.string, name=EXAMPLES)
        calls = {
            "serving_default": Signature(lambda raw: self.rank(raw, raw[CANDIDATES]), request),
            WEIGHTED: Signature(
                lambda raw: self.rank(raw, raw[CANDIDATES], raw[SCORE_WEIGHTS]),
                {**request, SCORE_WEIGHTS: weights},
            ),
            DESCRIBED: Signature(
                self.rank_described,
                {**query, **raw_inputs.candidate_signature(self._spec), SCORE_WEIGHTS: weights},
            ),
            "serving_examples": Signature(
                lambda raw: self.rank_examples(raw[EXAMPLES]), {EXAMPLES: examples}
            ),
        }
        calls[SCORE_TASKS] = score_tasks(self._spec)
        if self.preranker is not None:
            calls[PRE_RANK] = self.preranker.signature()
        return calls

    def signatures(self) -> dict[str, Any]:
        """See the base class; there is one graph for all weights."""
        calls = self.calls()
        rank = calls[WEIGHTED].traced()
        calls["serving_default"] = Signature(
            lambda raw: rank(**raw, **{SCORE_WEIGHTS: self._declared(raw[CANDIDATES])}),
            calls["serving_default"].inputs,
        )
        del calls[WEIGHTED]
        return {WEIGHTED: rank, **{name: signature.traced() for name, signature in calls.items()}}

    def _is_known(self, rows: tf.Tensor) -> tf.Tensor:
        """Whether rows are those of items of the catalogue, int64, the shape of `rows`."""
        return tf.cast(rows < self.ranker.num_items, tf.int64)

    def _declared(self, candidate_item_ids: tf.Tensor) -> tf.Tensor:
        """What stands for the declared score weights, float32 [B, T]."""
        return tf.fill([tf.shape(candidate_item_ids)[0], len(self._spec.tasks)], math.nan)


def _padded(outputs: Tensors, item_ids: tf.Tensor) -> dict[str, tf.Tensor]:
    """Outputs [B, N], zeros where the id of the candidate is ""."""
    is_item = tf.not_equal(item_ids, "")
    return {name: tf.where(is_item, value, tf.zeros_like(value)) for name, value in outputs.items()}


def score_tasks(spec: DatasetSpec) -> Signature:
    """`score_tasks`: whose weight stands in a column of `score_weights`.

    In: `columns` int32 [B], from 0. Out: `tasks` string [B], the task's name, and `weights` float32 [B], its
    declared weight; "" and NaN for a number that is no column.
    """
    names = tf.constant([task.name for task in spec.tasks])
    declared = tf.constant([task.score_weight for task in spec.tasks], tf.float32)

    def tell(raw: Tensors) -> dict[str, tf.Tensor]:
        columns = raw["columns"]
        is_column = (columns >= 0) & (columns < len(spec.tasks))
        places = tf.where(is_column, columns, 0)
        return {
            "tasks": tf.where(is_column, tf.gather(names, places), ""),
            "weights": tf.where(is_column, tf.gather(declared, places), math.nan),
        }

    return Signature(tell, {"columns": tf.TensorSpec([None], tf.int32, name="columns")})


def export(
    ranker: ServedRanker,
    model_dir: Path | str,
    fingerprint: Fingerprint,
    golden: Sequence[GoldenRequest] = (),
) -> None:
    """Writes the SavedModel to `model_dir`, which appears complete or not at all.

    Args:
      ranker: what to export.
      model_dir: local folder; absent or empty.
      fingerprint: of its parts.
      golden: requests with the answers of the trained model.

    Raises:
      OSError: the folder cannot be written or is not empty.
    """
    with appearing_whole(model_dir) as folder:
        save_bundle(ranker, folder, fingerprint, golden)
    _logger.info("phase=export_ranking items=%d path=%s", ranker.ranker.num_items, model_dir)


def _unknown_item(layer: Any, spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """One row of transformed candidate features of an item of which nothing is known."""
    raw = {}
    for feature in ft.raw_candidate_inputs(spec):
        missing = tf.constant([raw_inputs.MISSING[feature.dtype]], feature.dtype)
        raw[feature.name] = missing[:, tf.newaxis] if feature.is_list else missing
    unknown = raw_inputs.transform_candidates(layer, raw, spec)
    item_id = ft.feature_space(spec).find(ft.ITEM_ID).id_name
    return {**unknown, item_id: tf.fill([1], tf.constant(ft.OOV_ID, unknown[item_id].dtype))}


def _append_row(column: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """[I, ...] and a row [1, ...] of at most the same width to [I + 1, ...]; lists are padded with 0."""
    row = tf.cast(row, column.dtype)
    if column.shape.rank == 2:
        row = tf.pad(row, [[0, 0], [0, column.shape[1] - row.shape[1]]])
    return tf.concat([column, row], axis=0)
