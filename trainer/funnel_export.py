"""The whole funnel as one SavedModel: a request in, the items to show out.

Query tower, index, pre-ranker, ranker, score and selection are one graph: nothing but the answer leaves the
server, and the query is transformed once. Between index and selection items are rows of the catalogue.

Letters: B = requests, N = candidates per request, K = items per request, T = tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer import raw_inputs
from trainer.bundle import ServedModel, Signature, Tensors
from trainer.catalogue import Catalogue
from trainer.index import NO_ROW, CandidateIndex, Found
from trainer.preranker import CataloguePreRanker, PreRanking
from trainer.ranking import SCORE, EncodedQuery, RankingModel
from trainer.ranking_export import IS_KNOWN, SCORE_TASKS, CatalogueRanker, score_tasks
from trainer.retrieval import RetrievalModel
from trainer.score import SCORE_WEIGHTS
from trainer.served_index import K, ServedIndex
from trainer.user_lookup import UserLookup

NUM_CANDIDATES = "num_candidates"
SERVING_USER = "serving_user"


class ServedFunnel(ServedModel):
    """The signatures of the exported funnel, and the variables that they read."""

    def __init__(
        self,
        retrieval: RetrievalModel,
        index: CandidateIndex,
        ranker: RankingModel,
        layer: Any,
        catalogue: Catalogue,
        users: UserLookup,
        spec: DatasetSpec,
        max_k: int,
        preranking: PreRanking | None = None,
    ) -> None:
        """Joins the two models.

        Args:
          retrieval: trained.
          index: over the candidate vectors of the catalogue, in its order.
          ranker: trained with the same Transform graph.
          layer: `trainer.transform_graph.TransformGraph`.
          catalogue: every item.
          users: what is known of every user.
          spec: the declaration of the dataset.
          max_k: the largest number of candidates of a request.
          preranking: what cuts the candidates before the ranker; None hands all of them to it.
        """
        super().__init__()
        self._spec = spec
        self._layer: Callable[[], Any] = lambda: layer
        # Only the weights: the Keras model would bring its optimizer and training functions along.
        self.query_weights = retrieval.query_tower.weights
        # A closure keeps the model itself out of the object graph that is saved.
        self._encode_queries: Callable[[Mapping[str, tf.Tensor]], tf.Tensor] = lambda query: (
            retrieval.query_tower(query)
        )
        self.index = ServedIndex(index, catalogue.item_ids, max_k)
        self.ranker = CatalogueRanker(ranker, layer, catalogue, spec)
        self.preranker: CataloguePreRanker | None = None
        self.num_kept = max_k
        if preranking is not None:
            self.preranker = CataloguePreRanker(preranking, self.ranker, layer, spec)
            self.num_kept = min(max_k, preranking.num_kept)
        self.users = users

    def recommend(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """Answers B requests.

        Args:
          raw: raw query features and impressions, see `raw_inputs.ranking_signature`, and what
            `request_signature` lists.

        Returns:
          The outputs of `serving_default`, see docs/architecture.md; K = max(k).

        Raises:
          InvalidArgumentError: a k is below 1, above its num_candidates or above what the pre-ranker keeps of
            these, or num_candidates is above max_k.
        """
        k, num_candidates = raw[K], raw[NUM_CANDIDATES]
        checks = [
            tf.debugging.assert_positive(k, "k must be at least 1"),
            tf.debugging.assert_less_equal(
                k, num_candidates, "k must not be above num_candidates, out of which the k items are chosen"
            ),
        ]
        if self.preranker is not None:
            message = f"k must not be above {self.num_kept}, the number of candidates that the ranker scores"
            checks.append(tf.debugging.assert_less_equal(k, self.num_kept, message))
        with tf.control_dependencies(checks):
            num_candidates = tf.identity(num_candidates)
        features = raw_inputs.transform_request(self._layer(), raw, self._spec)
        found = self.index.search(self._encode_queries(features), {**raw, K: num_candidates})
        query = self.ranker.model.encode_query(features)
        candidates, retrieval_scores = self._kept(query, found)
        is_found = candidates != NO_ROW
        rows = tf.where(is_found, candidates, self.ranker.num_items)
        judged = self.ranker.rank(query, features, raw[ft.EVENT_TIME], rows, raw[SCORE_WEIGHTS])

        # Of equal scores the one that retrieval found first stays first: top_k is stable.
        scores = tf.where(is_found, judged[SCORE], -math.inf)
        best, order = tf.math.top_k(scores, tf.reduce_max(k))
        is_result = tf.math.is_finite(best) & (tf.range(tf.shape(best)[1]) < k[:, tf.newaxis])
        rows = tf.where(is_result, tf.gather(candidates, order, batch_dims=1), NO_ROW)
        numbers = {name: tf.gather(value, order, batch_dims=1) for name, value in judged.items()}
        numbers["retrieval_score"] = tf.gather(retrieval_scores, order, batch_dims=1)
        user_id = ft.feature_space(self._spec).find(ft.USER_ID).id_name
        return {
            "item_ids": self.index.ids(rows),
            **{name: tf.where(is_result, value, 0.0) for name, value in numbers.items()},
            "reason_item_ids": self.index.reasons(rows, raw[ft.HISTORY]),
            IS_KNOWN: tf.cast(is_result, tf.int64),
            "user_is_known": tf.cast(features[user_id] > ft.OOV_ID, tf.int64),
            "history_length": tf.math.count_nonzero(tf.not_equal(raw[ft.HISTORY], ""), axis=1),
            "exact_fallback": tf.cast(found.exact_fallback, tf.int64),
        }

    def _kept(self, query: EncodedQuery, found: Found) -> tuple[tf.Tensor, tf.Tensor]:
        """The candidates that the ranker scores, rows int32 and retrieval scores float32 [B, N]."""
        if self.preranker is None:
            return found.rows, found.scores
        is_found = found.rows != NO_ROW
        scores = self.preranker.score(query, tf.maximum(found.rows, 0))
        num_kept = tf.minimum(self.num_kept, tf.shape(found.rows)[1])
        places = tf.math.top_k(tf.where(is_found, scores, -math.inf), num_kept).indices
        # In the order in which retrieval found them.
        places = tf.sort(places, axis=1)
        return tuple(tf.gather(column, places, batch_dims=1) for column in (found.rows, found.scores))

    def request_of_user(self, raw: Tensors) -> dict[str, tf.Tensor]:
        """The request of B users, who are known by id, with what was known of them at the end of training.

        Args:
          raw: USER_ID string [B], the context, see `UserLookup.context`, and what `request_signature` lists.

        Returns:
          What `recommend` reads.
        """
        context = {inputs.name: raw[inputs.name] for inputs in self.users.context()}
        request = {name: raw[name] for name in self.request_signature()}
        return {**self.users.lookup(raw[ft.USER_ID], context), **request}

    def request_signature(self) -> dict[str, tf.TensorSpec]:
        """The inputs of a request beside what it says of user and moment, by name."""
        return {
            **self.index.request_signature(),
            NUM_CANDIDATES: tf.TensorSpec([None], tf.int32, name=NUM_CANDIDATES),
            SCORE_WEIGHTS: tf.TensorSpec([None, len(self._spec.tasks)], tf.float32, name=SCORE_WEIGHTS),
        }

    def calls(self) -> dict[str, Signature]:
        """See the base class."""
        request = self.request_signature()
        query = raw_inputs.query_signature(self._spec)
        context = {raw.name: query[raw.name] for raw in self.users.context()}
        return {
            "serving_default": Signature(
                self.recommend, {**raw_inputs.ranking_signature(self._spec), **request}
            ),
            SERVING_USER: Signature(
                lambda raw: self.recommend(self.request_of_user(raw)),
                {ft.USER_ID: query[ft.USER_ID], **context, **request},
            ),
            SCORE_TASKS: score_tasks(self._spec),
        }

    def signatures(self) -> dict[str, Any]:
        """See the base class; there is one graph for both."""
        calls = self.calls()
        recommend = calls["serving_default"].traced()
        of_user = Signature(lambda raw: recommend(**self.request_of_user(raw)), calls[SERVING_USER].inputs)
        return {
            "serving_default": recommend,
            SERVING_USER: of_user.traced(),
            SCORE_TASKS: calls[SCORE_TASKS].traced(),
        }
