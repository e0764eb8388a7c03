"""The retrieval model as a SavedModel: raw requests or serialized user states in, recommended item ids out.

The export holds everything a request needs: the Transform graph, the query tower, the candidate index and the
ids. Whoever loads it imports scann first, which registers the operations of the index.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer import raw_inputs
from trainer.allow_list_inputs import check_attributes
from trainer.allow_lists import AllowLists
from trainer.bundle import ServedModel, Signature, appearing_whole, save_bundle
from trainer.catalogue import Catalogue
from trainer.fingerprint import Fingerprint
from trainer.golden import GoldenRequest
from trainer.index import CandidateIndex, Effort, ExactIndex, ExactItems, ScannIndex
from trainer.index_facts import IndexFacts
from trainer.retrieval import RetrievalModel
from trainer.served_index import LOOKUP, ServedIndex, check_round_trip

EXAMPLES = "examples"
# Results per user of the signature for serialized examples.
EVALUATION_K = 100
INDEX_FACTS_FILE = Path("assets.extra") / "index.json"

_logger = logging.getLogger(__name__)


class ServedRetrieval(ServedModel):
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
          layer: `trainer.transform_graph.TransformGraph`.
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
        self.transform_resources = layer
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
        user_id = ft.feature_space(self._spec).find(ft.USER_ID).id_name
        return {
            "item_ids": self.index.ids(found.rows),
            "scores": found.scores,
            "reason_item_ids": self.index.reasons(found.rows, raw[ft.HISTORY]),
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
        k = min(EVALUATION_K, self.index.max_k)

        def recommend_one(query_and_seen: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
            vectors, seen = (part[tf.newaxis] for part in query_and_seen)
            found = self.index.search(vectors, self.index.request(tf.constant([k]), seen))
            return found.rows[0], found.scores[0]

        # One at a time: a batch is searched with the effort that its longest exclusion list needs, so that
        # what a user gets, and with it every metric, would hang on who else is in the batch.
        rows, scores = tf.map_fn(
            recommend_one,
            (self._encode_queries(query), raw[ft.SEEN_ITEMS]),
            fn_output_signature=(tf.TensorSpec([k], tf.int32), tf.TensorSpec([k], tf.float32)),
        )
        return {"item_ids": self.index.ids(rows), "scores": scores}

    def calls(self) -> dict[str, Signature]:
        """See the base class."""
        request = {**raw_inputs.query_signature(self._spec), **self.index.request_signature()}
        examples = tf.TensorSpec([None], tf.string, name=EXAMPLES)
        return {
            "serving_default": Signature(lambda raw: self.recommend(raw, exact=False), request),
            "serving_exact": Signature(lambda raw: self.recommend(raw, exact=True), request),
            "serving_examples": Signature(
                lambda raw: self.recommend_examples(raw[EXAMPLES]), {EXAMPLES: examples}
            ),
            LOOKUP: self.index.lookup_signature(),
        }


def export(
    served: ServedRetrieval,
    facts: IndexFacts,
    model_dir: Path | str,
    fingerprint: Fingerprint,
    golden: Sequence[GoldenRequest] = (),
) -> None:
    """Writes the SavedModel to `model_dir`, which appears complete or not at all.

    Args:
      served: what to export.
      facts: of the index, written to assets.extra/index.json.
      model_dir: local folder; absent or empty.
      fingerprint: of its parts.
      golden: requests with the answers of the trained model.

    Raises:
      IndexBuildError: the written model does not find every item under its own id.
      OSError: the folder cannot be written or is not empty.
    """
    with appearing_whole(model_dir) as folder:
        save_bundle(served, folder, fingerprint, golden)
        check_round_trip(str(folder), served.catalogue_ids, served.index.vectors.numpy())
        write_facts(folder, facts)
    _logger.info("phase=export_retrieval items=%d path=%s", facts.num_items, model_dir)


def write_facts(model_dir: Path, facts: IndexFacts) -> None:
    """Writes assets.extra/index.json of an exported model."""
    facts_file = model_dir / INDEX_FACTS_FILE
    facts_file.parent.mkdir(exist_ok=True)
    facts_file.write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n", encoding="utf-8")


def read_index(model_dir: Path | str, allow_lists: AllowLists) -> CandidateIndex:
    """The index of an exported retrieval model: the same one, neither trained nor tuned anew.

    Args:
      model_dir: exported or pushed retrieval model.
      allow_lists: over the same catalogue.
    """
    saved = tf.saved_model.load(str(model_dir)).index.index
    exact = ExactIndex(saved.exact.vectors.numpy())
    facts = json.loads((Path(model_dir) / INDEX_FACTS_FILE).read_text(encoding="utf-8"))
    if not facts["efforts"]:
        return CandidateIndex(exact, None, allow_lists)
    efforts = [
        Effort(effort["k"], effort["num_leaves_to_search"], effort["num_reordering_candidates"])
        for effort in facts["efforts"]
    ]
    approximate = ScannIndex.restore(saved.approximate.state, facts["settings"]["num_leaves"], efforts)
    if "num_exact_items" in facts["settings"]:
        rows = saved.approximate.exact_items.rows.numpy()
        approximate.exact_items = ExactItems(rows, approximate.vectors.numpy())
    return CandidateIndex(ExactIndex(approximate.vectors), approximate, allow_lists)
