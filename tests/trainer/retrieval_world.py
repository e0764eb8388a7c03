"""A tiny platform with a planted preference: users of a segment watch the items of that segment's genre."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features
from trainer.catalogue import Catalogue
from trainer.index import NO_ROW
from trainer.retrieval_validation import ValidationUsers

NUM_USERS = 300
NUM_ITEMS = 600
NUM_SEGMENTS = 6
HISTORY_LENGTH = 5
NUM_DAYS = 10

SPEC = DatasetSpec.model_validate(
    {
        "name": "planted",
        "interactions": {
            "files": ["interactions.csv"],
            "columns": {name: name for name in ("user_id", "item_id", "event_time_unix_s")},
            "labels": {"click": "click"},
        },
        "users": {
            "files": ["users.csv"],
            "columns": {"user_id": "user_id"},
            "features": [{"name": "segment", "kind": "categorical"}],
        },
        "items": {
            "files": ["items.csv"],
            "columns": {"item_id": "item_id"},
            "features": [{"name": "genres", "kind": "multi_categorical", "separator": "|"}],
        },
        "positive": "click",
        "tasks": [{"name": "click", "label": "click", "kind": "binary"}],
        "split": {"fractions": [0.8, 0.1, 0.1]},
    }
)
SPACE = features.feature_space(SPEC)
VOCABULARY_SIZES = {
    "user_id": NUM_USERS + 2,
    "segment": NUM_SEGMENTS + 2,
    "item_id": NUM_ITEMS + 2,
    "genres": NUM_SEGMENTS + 2,
    "hour_of_day": 26,
    "day_of_week": 9,
}
_PREFIXES = {"user_id": "u", "segment": "s", "item_id": "i", "history_item_ids": "i", "genres": "g"}

# Item i belongs to genre i % NUM_SEGMENTS; user u to segment u % NUM_SEGMENTS. Low row numbers are popular.
_POPULARITY = 1.0 / (20 + np.arange(NUM_ITEMS))


def catalogue() -> Catalogue:
    """Items i0, i1, ...; row number r has transformed id r + 2 and one genre."""
    rows = np.arange(NUM_ITEMS)
    columns = {"item_id_id": rows + 2, "genres_ids": (rows % NUM_SEGMENTS + 2)[:, np.newaxis]}
    return Catalogue(np.array([f"i{row}" for row in rows], object), columns, None)


def draw_items(users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One item row per user: of the user's own genre in nine of ten draws, by popularity within it."""
    genre = np.where(
        rng.random(len(users)) < 0.9, users % NUM_SEGMENTS, rng.integers(NUM_SEGMENTS, size=len(users))
    )
    rows = np.arange(NUM_ITEMS).reshape(-1, NUM_SEGMENTS)
    chances = np.cumsum(_POPULARITY.reshape(-1, NUM_SEGMENTS), axis=0)
    draws = rng.random(len(users)) * chances[-1, genre]
    return rows[(draws[:, np.newaxis] > chances[:, genre].T).sum(axis=1), genre]


def query_columns(users: np.ndarray, history: np.ndarray) -> dict[str, np.ndarray]:
    """Transformed query features of known users; history holds item rows [N, L], NO_ROW as padding."""
    zeros = np.zeros(len(users), np.int64)
    return {
        "user_id_id": users + 2,
        "segment_id": users % NUM_SEGMENTS + 2,
        "history_item_ids_ids": np.where(history == NO_ROW, 0, history + 2),
        "hour_of_day_id": zeros + 2,
        "day_of_week_id": zeros + 2,
        "example_age_days_cdf": zeros.astype(np.float32),
        "example_age_days_bucket": zeros + 1,
    }


def training_window(num_examples: int = 20_000, seed: int = 0) -> dict[str, tf.Tensor]:
    """Transformed positives."""
    rng = np.random.default_rng(seed)
    users = rng.integers(NUM_USERS, size=num_examples)
    history = np.stack([draw_items(users, rng) for _ in range(HISTORY_LENGTH)], axis=1)
    rows = draw_items(users, rng)
    window = query_columns(users, history) | {n: c[rows] for n, c in catalogue().transformed.items()}
    window["retrieval_weight"] = np.ones(num_examples, np.float32)
    window["days_to_train_end"] = rng.integers(1, NUM_DAYS, num_examples)
    return {name: tf.constant(column) for name, column in window.items()}


def validation_users(seed: int = 1) -> ValidationUsers:
    """Every user, with ten held-out positives; nothing seen."""
    rng = np.random.default_rng(seed)
    users = np.arange(NUM_USERS)
    history = np.stack([draw_items(users, rng) for _ in range(HISTORY_LENGTH)], axis=1)
    positives = np.stack([draw_items(users, rng) for _ in range(10)], axis=1)
    seen = np.full((NUM_USERS, 1), NO_ROW, np.int32)
    return ValidationUsers(query_columns(users, history), [list(row) for row in positives], seen)


class FakeTransform(tf.keras.layers.Layer):
    """Stands for the Transform graph: sparse raw features in, transformed features out."""

    def __init__(self) -> None:
        """Makes the vocabulary tables."""
        super().__init__()
        self.tables = {name: self._table(prefix, name) for name, prefix in _PREFIXES.items()}

    @staticmethod
    def _table(prefix: str, name: str) -> tf.lookup.StaticHashTable:
        space = "item_id" if name == "history_item_ids" else name
        size = VOCABULARY_SIZES[space] - 2
        keys = tf.constant([f"{prefix}{n}" for n in range(size)])
        values = tf.range(2, size + 2, dtype=tf.int64)
        return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), default_value=1)

    def call(self, inputs: Mapping[str, tf.SparseTensor]) -> dict[str, Any]:
        """Transforms whatever subset of the raw features is given."""
        outputs: dict[str, Any] = {}
        for name, sparse in inputs.items():
            if name == "event_time_unix_s":
                zeros = tf.zeros([sparse.dense_shape[0]], tf.int64)
                outputs |= {"hour_of_day_id": zeros + 2, "day_of_week_id": zeros + 2}
                outputs |= {"example_age_days_cdf": tf.cast(zeros, tf.float32)}
                outputs |= {"example_age_days_bucket": zeros + 1}
                continue
            ids = tf.SparseTensor(sparse.indices, self.tables[name].lookup(sparse.values), sparse.dense_shape)
            is_list = name in ("history_item_ids", "genres")
            outputs[f"{name}_ids" if is_list else f"{name}_id"] = (
                ids if is_list else tf.squeeze(tf.sparse.to_dense(ids), axis=1)
            )
        return outputs
