"""Validation of the retrieval model on users as of the end of training and their held-out positives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from schema.contract import DatasetSpec
from schema.errors import DataError
from trainer import features as ft
from trainer import metrics, raw_inputs
from trainer.catalogue import Catalogue
from trainer.collapse import collapse_metrics
from trainer.index import NO_ROW
from trainer.input_pipeline import expand
from trainer.progress import batches

VALIDATION_K = 100
RECALL = metrics.metric_key("retrieval", "recall", k=VALIDATION_K)
NDCG = metrics.metric_key("retrieval", "ndcg", k=VALIDATION_K)

_BATCH = 1_024
# Scores held at a time, in numbers: bounds the memory of exact search over a large catalogue.
_MAX_SCORES = 1 << 26


@dataclasses.dataclass(frozen=True)
class ValidationUsers:
    """Users with held-out positives, as of the end of training.

    Letters: U = users.

    Attributes:
      query: transformed query features, [U], lists [U, L].
      positive_rows: catalogue rows of each user's held-out positives, U sequences.
      seen_rows: int32 [U, S], catalogue rows that are not recommended again, padded with NO_ROW.
    """

    query: Mapping[str, np.ndarray]
    positive_rows: Sequence[Sequence[int]]
    seen_rows: np.ndarray

    def __len__(self) -> int:
        return len(self.positive_rows)


def load_validation_users(
    patterns: Sequence[str], layer: Any, catalogue: Catalogue, spec: DatasetSpec, max_users: int
) -> ValidationUsers:
    """Reads the users who have a history and positives in the eval split.

    Args:
      patterns: gzipped TFRecord files of user-state examples.
      layer: `trainer.transform_graph.TransformGraph`.
      catalogue: every item; held-out positives outside it cannot be found, and do not count.
      spec: the declaration of the dataset.
      max_users: stops after this many.

    Raises:
      DataError: no files, or no user with a history and a positive in the eval split.
    """
    row_of = {item_id: row for row, item_id in enumerate(catalogue.item_ids)}

    def rows(ids: np.ndarray) -> list[int]:
        decoded = (item_id.decode() for item_id in ids)
        return [row_of[item_id] for item_id in decoded if item_id in row_of]

    transform = raw_inputs.compiled(raw_inputs.transform_query, layer, spec)
    queries: list[dict[str, np.ndarray]] = []
    positives: list[list[int]] = []
    seen: list[list[int]] = []
    for serialized in tf.data.TFRecordDataset(expand(patterns), compression_type="GZIP").batch(_BATCH):
        raw = raw_inputs.parse_user_state_examples(serialized, spec)
        positive_rows = [rows(ids) for ids in raw[ft.EVAL_ITEMS].numpy()]
        # Users without a history get the popular items whatever the epoch: they would only blur the choice.
        has_history = tf.reduce_any(raw[ft.HISTORY] != "", axis=1).numpy()
        users = [u for u, found in enumerate(positive_rows) if found and has_history[u]]
        users = users[: max_users - len(positives)]
        if not users:
            continue
        positives += [positive_rows[u] for u in users]
        seen += [rows(ids) for ids in tf.gather(raw[ft.SEEN_ITEMS], users).numpy()]
        query = transform({name: raw[name] for name in raw_inputs.query_signature(spec)})
        queries.append({name: column.numpy()[users] for name, column in query.items()})
        if len(positives) == max_users:
            break
    if not positives:
        raise DataError(
            f"no user in {', '.join(patterns)} has a history and a positive in the eval split that is in the "
            "catalogue; check the split times and the 'positive' label of the dataset."
        )
    query = {name: pad_rows([row for part in queries for row in part[name]]) for name in queries[0]}
    return ValidationUsers(query, positives, pad_rows(seen, NO_ROW).astype(np.int32))


def pad_rows(rows: Sequence[Any], padding: int = ft.PADDING_ID) -> np.ndarray:
    """Stacks scalars to [N], or lists of any length to [N, longest], padded on the right."""
    if np.ndim(rows[0]) == 0:
        return np.asarray(rows)
    padded = np.full((len(rows), max(1, max(map(len, rows)))), padding, np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def validate(
    query_vectors: np.ndarray, candidate_vectors: np.ndarray, users: ValidationUsers
) -> dict[str, float]:
    """Recall and NDCG at 100 by exact search over the whole catalogue, mean over users; signs of a collapse.

    Args:
      query_vectors: float32 [U, D], or [U, M, D] where a user has several, of which the best counts.
      candidate_vectors: float32 [I, D].
      users: what they had seen, and what they went on to choose.

    Returns:
      RECALL and NDCG, 0 to 1, and the figures of `trainer.collapse.collapse_metrics`.
    """
    scores_per_user = len(candidate_vectors) * int(np.prod(query_vectors.shape[1:-1]))
    batch_size = max(1, min(_BATCH, _MAX_SCORES // scores_per_user))
    candidates = tf.constant(candidate_vectors)
    ranked = np.concatenate(
        [
            _rank_unseen(
                tf.constant(query_vectors[batch]), candidates, tf.constant(users.seen_rows[batch])
            ).numpy()
            for batch in batches(len(users), batch_size, "validation users ranked")
        ]
    )
    hits, num_positives = metrics.match_positives(ranked, users.positive_rows)
    return {
        RECALL: metrics.macro_mean(metrics.recall_at_k(hits, num_positives, VALIDATION_K)),
        NDCG: metrics.macro_mean(metrics.ndcg_at_k(hits, num_positives, VALIDATION_K)),
        **collapse_metrics(query_vectors, candidate_vectors, ranked),
    }


@tf.function(autograph=False)
def _rank_unseen(queries: tf.Tensor, candidates: tf.Tensor, seen_rows: tf.Tensor) -> tf.Tensor:
    """The VALIDATION_K best rows for each query without those seen: int32 [B, VALIDATION_K], NO_ROW pads.

    The lists of a served request are made by `trainer.index`, from more neighbours than are wanted. Here all
    scores are at hand, and taking seen items out of them first leaves fewer to sort.
    """
    scores = tf.tensordot(queries, candidates, [[-1], [-1]])
    if scores.shape.rank == 3:
        scores = tf.reduce_max(scores, axis=1)
    is_seen = seen_rows != NO_ROW
    users = tf.cast(tf.where(is_seen)[:, 0], tf.int32)
    seen = tf.stack([users, tf.boolean_mask(seen_rows, is_seen)], axis=1)
    scores = tf.tensor_scatter_nd_update(scores, seen, tf.fill([tf.shape(seen)[0]], -np.inf))
    best, rows = tf.math.top_k(scores, tf.minimum(VALIDATION_K, tf.shape(scores)[1]))
    rows = tf.where(tf.math.is_finite(best), rows, NO_ROW)
    return tf.pad(rows, [[0, 0], [0, VALIDATION_K - tf.shape(rows)[1]]], constant_values=NO_ROW)
