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

import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer import raw_inputs
from trainer.allow_list_inputs import check_attributes
from trainer.catalogue import Catalogue
from trainer.index import NO_ROW, CandidateIndex
from trainer.index_build import IndexFacts
from trainer.retrieval import RetrievalModel
from trainer.served_index import LOOKUP, ServedIndex, check_round_trip

EXAMPLES = "examples"
# Results per user of the signature for serialized examples.
EVALUATION_K = 100
INDEX_FACTS_FILE = "index.json"

_logger = logging.getLogger(__name__)


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

        Raises:
          ConfigError: an attribute with an allow-list is not one of the dataset, see `check_attributes`.
        """
        super().__init__()
        check_attributes(index.allow_lists.attributes, spec)
        self._spec = spec
        self._layer: Callable[[], Any] = lambda: layer
        self.transform_resources = raw_inputs.exported_resources(layer)
        # Only the weights: the Keras model would bring its optimizer and training functions along.
        self.weights = model.query_tower.weights
        # A closure keeps the model itself out of the object graph that is saved.
        self._encode_queries: Callable[[Mapping[str, tf.Tensor]], tf.Tensor] = lambda query: (
            model.query_tower(query)
        )
        self.index = ServedIndex(index, catalogue.item_ids, max_k)
        self.catalogue_ids = catalogue.item_ids

    def recommend(self, raw: Mapping[str, tf.Tensor], exact: bool) -> dict[str, tf.Tensor]:
        """Answers B requests.

        Args:
          raw: raw query features, see `raw_inputs.query_signature`, and what `ServedIndex.search` reads.
          exact: score every item.

        Returns:
          The outputs of `serving_default`, see docs/architecture.md.

        Raises:
          InvalidArgumentError: a k is below 1 or above max_k.
        """
        query = raw_inputs.transform_query(self._layer(), raw, self._spec)
        found = self.index.search(self._encode_queries(query), raw, exact)
        history = self.index.rows.lookup(raw[ft.HISTORY])
        user_id = ft.feature_space(self._spec).find(ft.USER_ID).id_name
        return {
            "item_ids": self.index.ids(found.rows),
            "scores": found.scores,
            "reason_item_ids": self.index.ids(self._nearest(found.rows, history)),
            "user_is_known": tf.cast(query[user_id] > ft.OOV_ID, tf.int64),
            "history_length": tf.math.count_nonzero(tf.not_equal(raw[ft.HISTORY], ""), axis=1),
            "exact_fallback": tf.cast(found.exact_fallback, tf.int64),
        }

    def recommend_examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        """Recommends unseen items to serialized user-state tf.Examples, string [B].

        Returns:
          `item_ids` string and `scores` float32 [B, min(EVALUATION_K, max_k)].
        """
        raw = raw_inputs.parse_user_state_examples(examples, self._spec)
        query = raw_inputs.transform_query(self._layer(), raw, self._spec)
        k = tf.fill(tf.shape(examples), min(EVALUATION_K, self.index.max_k))
        request = self.index.request(k, raw[ft.SEEN_ITEMS])
        found = self.index.search(self._encode_queries(query), request)
        return {"item_ids": self.index.ids(found.rows), "scores": found.scores}

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
        return tf.math.l2_normalize(self.index.vectors_of(rows)[..., :-1], axis=-1)

    def signatures(self) -> dict[str, Any]:
        """Traced signatures by name, as documented in docs/architecture.md."""

        def serve(exact: bool) -> Any:
            def recommend(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
                return self.recommend(inputs, exact)

            return tf.function(recommend, autograph=False).get_concrete_function(**request)

        def serve_examples(examples: tf.Tensor) -> dict[str, tf.Tensor]:
            return self.recommend_examples(examples)

        request = {**raw_inputs.query_signature(self._spec), **self.index.request_signature()}
        return {
            "serving_default": serve(exact=False),
            "serving_exact": serve(exact=True),
            "serving_examples": tf.function(serve_examples, autograph=False).get_concrete_function(
                tf.TensorSpec([None], tf.string, name=EXAMPLES)
            ),
            LOOKUP: self.index.lookup_signature(),
        }


def export(served: ServedRetrieval, facts: IndexFacts, model_dir: str) -> None:
    """Writes the SavedModel to `model_dir`, which appears complete or not at all.

    Args:
      served: what to export.
      facts: of the index, written to assets.extra/index.json.
      model_dir: local folder; absent or empty.

    Raises:
      IndexBuildError: the written model does not find every item under its own id.
      OSError: the folder cannot be written or is not empty.
    """
    target = Path(model_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
        tf.saved_model.save(served, str(partial), signatures=served.signatures(), options=options)
        check_round_trip(str(partial), served.catalogue_ids, served.index.vectors.numpy())
        facts_file = partial / "assets.extra" / INDEX_FACTS_FILE
        facts_file.parent.mkdir()
        facts_file.write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n", encoding="utf-8")
        os.chmod(partial, 0o755)  # mkdtemp makes folders that only their owner can read
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _logger.info("phase=export_retrieval items=%d path=%s", facts.num_items, target)
