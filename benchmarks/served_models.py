"""Models of the size that the serving benchmarks want, written in seconds instead of trained.

The index is built, tuned and exported by the trainer's own code; in front of it stands a query tower of two
lookups: a vector by user id, and the mean of the watched items' vectors.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # isort: skip  selects Keras 2, before TensorFlow is imported
import numpy as np
import scann
import tensorflow as tf

from benchmarks.vectors import clustered_vectors
from serving.warmup import write_warmup_requests
from trainer.config import IndexConfig
from trainer.index import NO_ROW
from trainer.index_build import build_index
from trainer.served_index import ServedIndex

MAX_K = 100
MIN_RECALL = 0.95
PLAIN_K = 10
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_USERS = 1_024
_HISTORY_WEIGHT = 0.2

logger = logging.getLogger(__name__)


class RetrievalModel(tf.Module):
    """Signatures like those of the exported retrieval model, by the names of docs/architecture.md."""

    def __init__(self, index: ServedIndex, users: np.ndarray) -> None:
        """Joins index and tower; users: float32 [U, D]."""
        super().__init__()
        self.index = index
        self.users = tf.Variable(users, trainable=False)

    def serve(
        self, user_id: tf.Tensor, history_item_ids: tf.Tensor, **request: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Recommends items: user_id string [B], history_item_ids string [B, L], the rest see ServedIndex."""
        user = tf.gather(self.users, tf.strings.to_hash_bucket_fast(user_id, self.users.shape[0]))
        rows = self.index.rows.lookup(history_item_ids)
        watched = tf.cast(rows != NO_ROW, tf.float32)[..., tf.newaxis]
        vectors = tf.reduce_sum(self.index.vectors_of(rows) * watched, axis=1)
        mean = tf.math.divide_no_nan(vectors, tf.reduce_sum(watched, axis=1))
        found = self.index.search(user + _HISTORY_WEIGHT * mean, request)
        return {"item_ids": self.index.ids(found.rows), "scores": found.scores}

    def signatures(self) -> dict[str, Any]:
        """The signatures to save."""
        query = {
            "user_id": tf.TensorSpec([None], tf.string, name="user_id"),
            "history_item_ids": tf.TensorSpec([None, None], tf.string, name="history_item_ids"),
        }
        serve = tf.function(self.serve, autograph=False)
        return {"serving_default": serve.get_concrete_function(**query, **self.index.request_signature())}


class PlainModel(tf.Module):
    """Nothing but ScaNN: queries float32 [B, D] in, the PLAIN_K nearest rows int32 and scores float32 out."""

    def __init__(self, items: np.ndarray) -> None:
        """Indexes items, float32 [I, D]; the settings find 95 % of the nearest 10 of 100,000 x 32."""
        super().__init__()
        num_leaves = int(len(items) ** 0.5)
        builder = scann.scann_ops.builder(items, PLAIN_K, "dot_product")
        builder = builder.tree(num_leaves, num_leaves // 10, training_sample_size=len(items))
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(10 * PLAIN_K)
        self.state = builder.build().serialize_to_module()
        self.width = items.shape[1]

    def signatures(self) -> dict[str, Any]:
        """The signatures to save."""

        def serve(queries: tf.Tensor) -> dict[str, tf.Tensor]:
            rows, scores = scann.scann_ops.searcher_from_module(self.state).search_batched(queries)
            return {"rows": rows, "scores": scores}

        spec = tf.TensorSpec([None, self.width], tf.float32, name="queries")
        return {"serving_default": tf.function(serve, autograph=False).get_concrete_function(spec)}


def requests(num_rows: int, k: int, history: int, num_items: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of `serving_default`: users and watched items at random, nothing excluded."""
    rng = np.random.default_rng(seed)
    users = np.array([b"u%d" % user for user in rng.integers(1_000_000, size=num_rows)], object)
    items = np.array([b"i%d" % item for item in rng.integers(num_items, size=num_rows * history)], object)
    return {
        "user_id": users,
        "history_item_ids": items.reshape(num_rows, history),
        "k": np.full(num_rows, k, np.int32),
        "exclude_item_ids": np.full((num_rows, 1), b"", object),
    }


def save_retrieval_model(path: Path, num_items: int, width: int, seed: int = 0) -> None:
    """Builds an index over made-up vectors and saves the model with warm-up requests to `path`."""
    items, queries = clustered_vectors(num_items, width, 2 * _USERS, seed)
    ids = [f"i{row}" for row in range(num_items)]
    index, facts = build_index(ids, items, queries[:_USERS], IndexConfig(min_recall=MIN_RECALL), MAX_K)
    logger.info("items=%d width=%d recall=%.3f efforts=%s", num_items, width, facts.recall, facts.efforts)
    model = RetrievalModel(ServedIndex(index, ids, MAX_K), queries[_USERS:])
    _save(model, path, [requests(size, MAX_K, 20, num_items) for size in _BATCH_SIZES])


def save_plain_model(path: Path, num_items: int, width: int, seed: int = 0) -> None:
    """The same for PlainModel."""
    items, queries = clustered_vectors(num_items, width, max(_BATCH_SIZES), seed)
    _save(PlainModel(items), path, [{"queries": queries[:size]} for size in _BATCH_SIZES])


def _save(model: RetrievalModel | PlainModel, path: Path, warmup: list[dict[str, np.ndarray]]) -> None:
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    tf.saved_model.save(model, str(path), signatures=model.signatures(), options=options)
    write_warmup_requests(path, path.parent.name, {"serving_default": warmup})


def save_half_plus_three(path: Path) -> Path:
    """A TF 1 SavedModel: x / 2 + 3 of a number, and of the feature x of tf.Examples."""
    build = tf.compat.v1.saved_model.build_tensor_info
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        number = tf.compat.v1.placeholder(tf.float32, [None])
        serialized = tf.compat.v1.placeholder(tf.string, [None])
        x = tf.io.parse_example(serialized, {"x": tf.io.FixedLenFeature([1], tf.float32)})["x"]

        def signature(inputs: Any, outputs: Any, method: str) -> Any:
            infos = (
                {name: build(tensor) for name, tensor in tensors.items()} for tensors in (inputs, outputs)
            )
            return tf.compat.v1.saved_model.build_signature_def(*infos, f"tensorflow/serving/{method}")

        builder = tf.compat.v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {
                "serving_default": signature({"x": number}, {"y": number / 2 + 3}, "predict"),
                "regress": signature({"inputs": serialized}, {"outputs": x / 2 + 3}, "regress"),
                "classify": signature({"inputs": serialized}, {"scores": x / 2 + 3}, "classify"),
            },
        )
        builder.save()
    return path
