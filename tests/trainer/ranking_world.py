"""A tiny dataset for the ranker's tests: declaration, rows with a planted signal, a Transform stub."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from schema.contract import DatasetSpec
from schema.point_in_time import count_names
from trainer import features as ft
from trainer.catalogue import Catalogue
from trainer.impressions import ItemAttributes

NUM_USERS = 40
NUM_ITEMS = 12
USERS = [f"u{i}" for i in range(NUM_USERS)]
ITEMS = [f"i{i}" for i in range(NUM_ITEMS)]
CREATORS = ["c0", "c1", "c2"]
TAGS = ["t0", "t1"]
DAY_S = 86_400
MEAN_WATCH_S = {True: 30.0, False: 6.0}

# Three keys in three windows, each with impressions and the labels click, rating and watch_time_s.
NUM_COUNTERS = 3 * 3 * 4

Rows = dict[str, npt.NDArray[Any]]


def spec(**changes: Any) -> DatasetSpec:
    """The declaration; `changes` replaces top-level keys."""
    values: dict[str, Any] = {
        "name": "tiny",
        "interactions": {
            "files": ["log.csv"],
            "columns": {
                "user_id": "user_id",
                "item_id": "item_id",
                "event_time_unix_s": "time",
                "surface": "tab",
                "watch_time_s": "watch",
            },
            "labels": {"click": "click", "rating": "rating"},
        },
        "users": {
            "files": ["users.csv"],
            "columns": {"user_id": "user_id"},
            "features": [{"name": "age", "kind": "continuous"}],
        },
        "items": {
            "files": ["items.csv"],
            "columns": {"item_id": "item_id", "creator_id": "creator", "upload_time_unix_s": "uploaded"},
            "features": [
                {"name": "tag", "kind": "multi_categorical", "separator": ","},
                {"name": "length", "kind": "continuous"},
            ],
        },
        "positive": "click",
        "tasks": [
            {"name": "click", "label": "click", "kind": "binary", "score_weight": 2.0},
            {"name": "stars", "label": "rating", "kind": "regression", "loss_weight": 0.5},
            {"name": "watch", "label": "watch_time_s", "kind": "watch_time", "score_weight": 0.1},
        ],
        "split": {"fractions": [0.8, 0.1, 0.1]},
        "counters": {"keys": ["item_id", "creator_id", "tag"], "windows_days": [1, 7]},
    }
    return DatasetSpec.model_validate(values | changes)


VOCABULARY_SIZES = {
    "user_id": NUM_USERS + 2,
    "item_id": NUM_ITEMS + 2,
    "surface": 4,
    "hour_of_day": 26,
    "day_of_week": 9,
    "tag": len(TAGS) + 2,
    "creator_id": len(CREATORS) + 2,
}


def attributes(declaration: DatasetSpec) -> ItemAttributes:
    """Creators and tags of all items, as `rows` has them, and lengths."""
    item = np.arange(NUM_ITEMS)
    columns = {"item_id_id": item + 2, "creator_id_id": item % 3 + 2, "tag_ids": item[:, np.newaxis] % 2 + 2}
    columns["length_bucket"] = item % 32 + 1
    catalogue = Catalogue(np.array(ITEMS, object), columns, None)
    return ItemAttributes(catalogue, VOCABULARY_SIZES["item_id"], declaration)


def rows(count: int, seed: int) -> Rows:
    """Transformed rows: users of even number like items of even number, the others like the odd ones.

    Every item is liked by half of the users, so that an item's mean says nothing about a click. Counters and
    impressions are noise.
    """
    rng = np.random.default_rng(seed)
    user, item = rng.integers(NUM_USERS, size=count), rng.integers(NUM_ITEMS, size=count)
    match = user % 2 == item % 2
    click = rng.random(count) < np.where(match, 0.8, 0.2)
    watch = rng.exponential(np.where(match, MEAN_WATCH_S[True], MEAN_WATCH_S[False]))
    rating = np.where(match, 4.5, 2.5) + rng.normal(0, 0.5, count)
    history = 2 + rng.integers(NUM_ITEMS // 2, size=(count, 3)) * 2 + (user % 2)[:, np.newaxis]
    columns: dict[str, npt.NDArray[Any]] = {
        "user_id_id": user + 2,
        "item_id_id": item + 2,
        "history_item_ids_ids": history,
        "surface_id": rng.integers(1, 4, size=count),
        "hour_of_day_id": rng.integers(2, 26, size=count),
        "day_of_week_id": rng.integers(2, 9, size=count),
        "creator_id_id": item % 3 + 2,
        "tag_ids": np.stack([item % 2 + 2, np.zeros(count, np.int64)], axis=1),
    }
    for name in ("age", "length", "example_age_days", "item_age_days"):
        cdf = rng.random(count).astype(np.float32)
        columns |= {f"{name}_cdf": cdf, f"{name}_bucket": 1 + (cdf * 32).astype(np.int32)}
    is_shown = np.arange(4) < rng.integers(0, 5, count)[:, np.newaxis]
    impressions = {
        "impression_item_ids_ids": rng.integers(1, NUM_ITEMS + 2, is_shown.shape),
        "impression_surfaces_ids": rng.integers(0, 4, is_shown.shape),
        "impression_ages_s": rng.integers(0, 30 * DAY_S, is_shown.shape),
        "impression_click": rng.integers(0, 2, is_shown.shape).astype(np.float32),
        "impression_rating": rng.integers(0, 6, is_shown.shape).astype(np.float32),
        "impression_watch_time_s": rng.exponential(10, is_shown.shape).astype(np.float32),
    }
    columns |= {name: np.where(is_shown, c, 0).astype(c.dtype) for name, c in impressions.items()}
    columns["item_counters"] = rng.random((count, NUM_COUNTERS), np.float32)
    columns["label_means_so_far"] = np.tile(np.float32([0.5, 1.8, 18.0]), (count, 1))
    columns = {name: c.astype(np.int32) if c.dtype == np.int64 else c for name, c in columns.items()}
    labels = {"click": click, "watch_time_s": watch, "rating": np.where(click, rating, np.nan)}
    return columns | {name: label.astype(np.float32) for name, label in labels.items()}


def batches(data: Mapping[str, Any], batch_size: int, seed: int | None = None) -> tf.data.Dataset:
    """The rows in batches, shuffled when a seed is given."""
    columns = {name: tf.constant(column) for name, column in data.items()}
    indices = tf.data.Dataset.range(len(data["click"]))
    if seed is not None:
        indices = indices.shuffle(len(data["click"]), seed=seed)
    return indices.batch(batch_size).map(lambda i: {name: tf.gather(c, i) for name, c in columns.items()})


class TransformStub(tf.Module):
    """Stands for the Transform graph: sparse raw features in, any subset; what can be computed out."""

    def __init__(self) -> None:
        """Makes the vocabularies."""
        super().__init__()
        item_ids = _table(ITEMS)
        self.tables = {
            "user_id": _table(USERS),
            "item_id": item_ids,
            "history_item_ids": item_ids,
            "surface": _table(["home", "feed"]),
            "creator_id": _table(CREATORS),
            "tag": _table(TAGS),
        }

    def __call__(self, raw: Mapping[str, tf.SparseTensor]) -> dict[str, tf.Tensor | tf.SparseTensor]:
        """Sparse [B, <=1] or [B, L] to dense [B] or sparse [B, L]."""
        out: dict[str, tf.Tensor | tf.SparseTensor] = {}
        for name, table in self.tables.items():
            if name not in raw:
                continue
            ids = tf.SparseTensor(raw[name].indices, table.lookup(raw[name].values), raw[name].dense_shape)
            out |= (
                {f"{name}_ids": ids}
                if name in ("history_item_ids", "tag")
                else {f"{name}_id": _dense(ids, 0)}
            )
        if ft.ITEM_COUNTS in raw:
            given = raw[ft.ITEM_COUNTS]
            # As wide as in Transform's graph, also where no example has counts.
            shape = [given.dense_shape[0], len(count_names(spec()))]
            counts = tf.sparse.to_dense(tf.SparseTensor(given.indices, given.values, shape))
            out[ft.COUNTERS] = counts[:, 4:] / (1.0 + counts[:, 4:])
            out[ft.LABEL_MEANS] = counts[:, 1:4] / tf.maximum(counts[:, :1], 1.0)
        if ft.IMPRESSION_ITEMS in raw:
            out |= self._impressions(raw)
        for name in ("age", "length"):
            if name in raw:
                out |= _continuous(name, _dense(raw[name], float("nan")))
        if ft.EVENT_TIME in raw:
            event_time = _dense(raw[ft.EVENT_TIME], -1)
            out["hour_of_day_id"] = event_time // 3600 % 24 + 2
            out["day_of_week_id"] = event_time // DAY_S % 7 + 2
            out |= _continuous("example_age_days", tf.zeros_like(event_time, tf.float32))
            if ft.UPLOAD_TIME in raw:
                upload_time = _dense(raw[ft.UPLOAD_TIME], -1)
                age = tf.cast(event_time - upload_time, tf.float32) / DAY_S
                out |= _continuous("item_age_days", tf.where(upload_time < 0, float("nan"), age))
        return out

    def _impressions(self, raw: Mapping[str, tf.SparseTensor]) -> dict[str, tf.SparseTensor]:
        items, times = raw[ft.IMPRESSION_ITEMS], raw[ft.IMPRESSION_TIMES]
        surfaces = raw[ft.IMPRESSION_SURFACES]
        surface_ids = self.tables["surface"].lookup(surfaces.values)
        now = tf.gather(_dense(raw[ft.EVENT_TIME], -1), times.indices[:, 0])
        names = [ft.impression_label(label) for label in spec().task_labels]
        return {
            ft.IMPRESSION_IDS: items.with_values(self.tables["item_id"].lookup(items.values)),
            ft.IMPRESSION_AGES: times.with_values(now - times.values),
            ft.IMPRESSION_SURFACE_IDS: surfaces.with_values(surface_ids),
            **{name: raw[name] for name in names},
        }


def _table(values: list[str]) -> tf.lookup.StaticHashTable:
    ids = tf.range(2, 2 + len(values), dtype=tf.int64)
    return tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant(values), ids), default_value=1
    )


def _dense(values: tf.SparseTensor, missing: float | int) -> tf.Tensor:
    return tf.squeeze(tf.sparse.to_dense(values, default_value=missing), axis=1)


def _continuous(name: str, x: tf.Tensor) -> dict[str, tf.Tensor]:
    known = ~tf.math.is_nan(x)
    share = tf.clip_by_value(tf.where(known, x, 0.0) / 100.0, 0.0, 1.0)
    bucket = tf.where(known, 1 + tf.cast(share * 31.0, tf.int64), 0)
    return {f"{name}_cdf": share, f"{name}_bucket": bucket}
