"""The retrieval model as a SavedModel: raw requests or serialized user states in, recommended item ids out.

The export holds everything a request needs: the Transform graph, the query tower, the candidate index and the
ids. Whoever loads it imports scann first, which registers the operations of the index.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer import raw_inputs
from trainer.catalogue import Catalogue
from trainer.index import NO_ROW, CandidateIndex, IndexFacts
from trainer.retrieval import RetrievalModel

K = "k"
EXCLUDED = "exclude_item_ids"
EXAMPLES = "examples"
# Results per user of the signature for serialized examples.
EVALUATION_K = 100
INDEX_FACTS_FILE = "index.json"

_logger = logging.getLogger(__name__)

_Search = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


class ServedRetrieval(tf.Module):
    """The signatures of the exported retrieval model, and the variables that they read."""

    def __init__(
        self,
        model: RetrievalModel,
        index: CandidateIndex,
        layer: Any,
        catalogue: Catalogue,
        spec: DatasetSpec,
        max_k: int,
    ) -> None:
        """Joins the parts of the served model.

        Args:
          model: trained.
          index: over the candidate vectors of the catalogue, in its order.
          layer: `tft.TFTransformOutput.transform_features_layer()`.
          catalogue: every item.
          spec: the declaration of the dataset.
          max_k: the largest k of a request.
        """
        super().__init__()
        self._spec = spec
        self._max_k = max_k
        self._layer: Callable[[], Any] = lambda: layer
        self.transform_resources = raw_inputs.exported_resources(layer)
        # Only the weights: the Keras model would bring its optimizer and training functions along.
        self.weights = model.query_tower.weights
        # A closure keeps the model itself out of the object graph that is saved.
        self._encode_queries: Callable[[Mapping[str, tf.Tensor]], tf.Tensor] = lambda query: (
            model.query_tower(query)
        )
        self.index = index
        ids = tf.constant(list(catalogue.item_ids), tf.string)
        self.rows = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(ids, tf.range(len(catalogue), dtype=tf.int32)),
            default_value=NO_ROW,
        )
        # One more row, "": what NO_ROW reads as.
        self.item_ids = tf.Variable(tf.concat([ids, [""]], axis=0), trainable=False)

    def recommend(
        self, raw: Mapping[str, tf.Tensor], k: tf.Tensor, exclude: tf.Tensor, search: _Search
    ) -> dict[str, tf.Tensor]:
        """Answers B requests.

        Args:
          raw: raw query features, see `raw_inputs.query_signature`.
          k: int32 [B], items wanted, 1 to max_k.
          exclude: string [B, E], items that are not wanted; "" is padding, unknown ids are ignored.
          search: of a CandidateIndex.

        Returns:
          The outputs of `serving_default`, see docs/architecture.md.

        Raises:
          InvalidArgumentError: a k is below 1 or above max_k.
        """
        allowed = f"k must be between 1 and {self._max_k}, the largest k that this model was exported for"
        checks = [
            tf.debugging.assert_positive(k, allowed),
            tf.debugging.assert_less_equal(k, self._max_k, allowed),
        ]
        with tf.control_dependencies(checks):
            query = raw_inputs.transform_query(self._layer(), raw, self._spec)
            rows, scores = search(self._encode_queries(query), tf.identity(k), self.rows.lookup(exclude))
        history = self.rows.lookup(raw[ft.HISTORY])
        user_id = ft.feature_space(self._spec).find(ft.USER_ID).id_name
        return {
            "item_ids": self._ids(rows),
            "scores": scores,
            "reason_item_ids": self._ids(self._nearest(rows, history)),
            "user_is_known": tf.cast(query[user_id] > ft.OOV_ID, tf.int64),
            "history_length": tf.math.count_nonzero(tf.not_equal(raw[ft.HISTORY], ""), axis=1),
        }

    def recommend_examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        """Recommends unseen items to serialized user-state tf.Examples, string [B].

        Returns:
          `item_ids` string and `scores` float32 [B, min(EVALUATION_K, max_k)].
        """
        raw = raw_inputs.parse_user_state_examples(examples, self._spec)
        query = raw_inputs.transform_query(self._layer(), raw, self._spec)
        k = tf.fill(tf.shape(examples), min(EVALUATION_K, self._max_k))
        rows, scores = self.index.search(self._encode_queries(query), k, self.rows.lookup(raw[ft.SEEN_ITEMS]))
        return {"item_ids": self._ids(rows), "scores": scores}

    def _ids(self, rows: tf.Tensor) -> tf.Tensor:
        last = tf.shape(self.item_ids)[0] - 1
        return tf.gather(self.item_ids, tf.where(rows == NO_ROW, last, rows))

    def _nearest(self, rows: tf.Tensor, history: tf.Tensor) -> tf.Tensor:
        """The watched item that is most like each result.

        Args:
          rows: int32 [B, K], catalogue rows of results.
          history: int32 [B, L], catalogue rows of watched items, NO_ROW where padded or not in the catalogue.

        Returns:
          int32 [B, K]: the row in `history` with the largest cosine; NO_ROW without history or result.
        """
        # One more column makes an empty history a list too.
        history = tf.pad(history, [[0, 0], [0, 1]], constant_values=NO_ROW)
        cosine = tf.matmul(self._directions(rows), self._directions(history), transpose_b=True)
        cosine = tf.where(history[:, tf.newaxis, :] == NO_ROW, -2.0, cosine)
        nearest = tf.gather(history, tf.argmax(cosine, axis=2), batch_dims=1)
        return tf.where(rows == NO_ROW, NO_ROW, nearest)

    def _directions(self, rows: tf.Tensor) -> tf.Tensor:
        """Unit candidate vectors without the item bias, which says nothing about likeness."""
        vectors = tf.gather(self.index.exact.vectors, tf.maximum(rows, 0))[..., :-1]
        return tf.math.l2_normalize(vectors, axis=-1)

    def signatures(self) -> dict[str, Any]:
        """Traced signatures by name, as documented in docs/architecture.md."""

        def serve(search: _Search) -> Any:
            def recommend(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
                k, exclude = inputs.pop(K), inputs.pop(EXCLUDED)
                return self.recommend(inputs, k, exclude, search)

            return tf.function(recommend, autograph=False).get_concrete_function(**request)

        def serve_examples(examples: tf.Tensor) -> dict[str, tf.Tensor]:
            return self.recommend_examples(examples)

        request = raw_inputs.query_signature(self._spec)
        request[K] = tf.TensorSpec([None], tf.int32, name=K)
        request[EXCLUDED] = tf.TensorSpec([None, None], tf.string, name=EXCLUDED)
        return {
            "serving_default": serve(self.index.search),
            "serving_exact": serve(self.index.search_exact),
            "serving_examples": tf.function(serve_examples, autograph=False).get_concrete_function(
                tf.TensorSpec([None], tf.string, name=EXAMPLES)
            ),
        }


def export(served: ServedRetrieval, facts: IndexFacts, model_dir: str) -> None:
    """Writes the SavedModel to `model_dir`, which appears complete or not at all.

    Args:
      served: what to export.
      facts: of the index, written to assets.extra/index.json.
      model_dir: local folder; absent or empty.

    Raises:
      OSError: the folder cannot be written or is not empty.
    """
    target = Path(model_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
        tf.saved_model.save(served, str(partial), signatures=served.signatures(), options=options)
        facts_file = partial / "assets.extra" / INDEX_FACTS_FILE
        facts_file.parent.mkdir()
        facts_file.write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n", encoding="utf-8")
        os.chmod(partial, 0o755)  # mkdtemp makes folders that only their owner can read
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _logger.info("phase=export_retrieval items=%d path=%s", facts.num_items, target)


def example_request(
    spec: DatasetSpec, item_ids: np.ndarray, k: int, batch_size: int = 1, event_time_unix_s: int = 0
) -> dict[str, np.ndarray]:
    """A valid request to `serving_default`: unknown users who watched the given items; for warm-up.

    Args:
      spec: the declaration of the dataset.
      item_ids: str [L], watched items, oldest first.
      k: items wanted.
      batch_size: requests in the batch.
      event_time_unix_s: time of the request.

    Returns:
      Every input of the signature as an array; strings as object arrays.
    """
    request: dict[str, np.ndarray] = {}
    for raw in ft.raw_query_inputs(spec):
        dtype = object if raw.dtype == "string" else raw.dtype
        shape = (batch_size, 0) if raw.is_list else (batch_size,)
        request[raw.name] = np.full(shape, raw_inputs.MISSING[raw.dtype], dtype)
    request[ft.HISTORY] = np.tile(np.asarray(item_ids, object), (batch_size, 1))
    request[ft.EVENT_TIME] = np.full(batch_size, event_time_unix_s, np.int64)
    request[K] = np.full(batch_size, k, np.int32)
    request[EXCLUDED] = np.full((batch_size, 0), "", object)
    return request
