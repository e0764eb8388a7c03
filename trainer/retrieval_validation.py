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
from trainer.index import NO_ROW, ExactIndex, search_excluding
from trainer.input_pipeline import expand

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
    """Reads the users who have positives in the eval split.

    Args:
      patterns: gzipped TFRecord files of user-state examples.
      layer: `tft.TFTransformOutput.transform_features_layer()`.
      catalogue: every item; held-out positives outside it cannot be found, and do not count.
      spec: the declaration of the dataset.
      max_users: stops after this many.

    Raises:
      DataError: no files, or no user with a positive in the eval split.
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
        users = [u for u, found in enumerate(positive_rows) if found][: max_users - len(positives)]
        positives += [positive_rows[u] for u in users]
        seen += [rows(ids) for ids in tf.gather(raw[ft.SEEN_ITEMS], users).numpy()]
        query = transform({name: raw[name] for name in raw_inputs.query_signature(spec)})
        queries.append({name: column.numpy()[users] for name, column in query.items()})
        if len(positives) == max_users:
            break
    if not positives:
        raise DataError(
            f"no user in {', '.join(patterns)} has a positive in the eval split that is in the catalogue; "
            "check the split times and the 'positive' label of the dataset."
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
    """Recall and NDCG at 100 by exact search over the whole catalogue, mean over users.

    Args:
      query_vectors: float32 [U, D].
      candidate_vectors: float32 [I, D].
      users: what they had seen, and what they went on to choose.

    Returns:
      RECALL and NDCG, 0 to 1.
    """
    index = ExactIndex(candidate_vectors)
    batch = max(1, min(_BATCH, _MAX_SCORES // len(candidate_vectors)))
    ranked = []
    for start in range(0, len(users), batch):
        queries, seen = query_vectors[start : start + batch], users.seen_rows[start : start + batch]
        k = tf.fill([len(queries)], VALIDATION_K)
        ranked.append(search_excluding(index, tf.constant(queries), k, tf.constant(seen))[0].numpy())
    hits, num_positives = metrics.match_positives(np.concatenate(ranked), users.positive_rows)
    return {
        RECALL: metrics.macro_mean(metrics.recall_at_k(hits, num_positives, VALIDATION_K)),
        NDCG: metrics.macro_mean(metrics.ndcg_at_k(hits, num_positives, VALIDATION_K)),
    }
