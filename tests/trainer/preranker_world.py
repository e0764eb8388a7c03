"""A tiny dataset for the pre-ranker's tests: declaration, requests, a Transform stub, a ranker."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from schema.contract import DatasetSpec
from schema.point_in_time import count_names, log_count_names
from trainer import features as ft
from trainer import raw_inputs
from trainer.catalogue import Catalogue
from trainer.config import RankingConfig
from trainer.impressions import ItemAttributes
from trainer.label_statistics import LabelStatistics
from trainer.ranking import RankingModel
from trainer.ranking_export import ServedRanker

DAY_S = 86_400
NOW = 1_700_000_000
USERS = [f"u{i}" for i in range(60)]
ITEMS = [f"i{i}" for i in range(30)]
CREATORS = [f"c{i}" for i in range(4)]
SURFACES = ["home", "feed"]
SIZES = {
    "user_id": len(USERS) + 2,
    "item_id": len(ITEMS) + 2,
    "creator_id": len(CREATORS) + 2,
    "surface": len(SURFACES) + 2,
    "hour_of_day": 26,
    "day_of_week": 9,
}
SPEC = DatasetSpec.model_validate(
    {
        "name": "tiny",
        "interactions": {
            "files": ["log.csv"],
            "columns": {
                "user_id": "user_id",
                "item_id": "item_id",
                "event_time_unix_s": "time",
                "surface": "tab",
            },
            "labels": {"click": "click", "rating": "rating"},
        },
        "users": {"files": ["users.csv"], "columns": {"user_id": "user_id"}},
        "items": {
            "files": ["items.csv"],
            "columns": {"item_id": "item_id", "creator_id": "creator", "upload_time_unix_s": "uploaded"},
        },
        "positive": "click",
        "counters": {"keys": ["item_id", "creator_id"], "windows_days": [1]},
        "tasks": [
            {"name": "click", "label": "click", "kind": "binary", "score_weight": 2.0},
            {"name": "stars", "label": "rating", "kind": "regression", "score_weight": 0.5},
        ],
        "split": {"fractions": [0.8, 0.1, 0.1]},
    }
)
_NUM_COUNTERS = len(count_names(SPEC)) - len(log_count_names(SPEC))


class TransformStub(tf.Module):
    """Stands for the Transform graph: sparse raw features in, any subset; what can be computed out."""

    def __init__(self) -> None:
        """Makes the vocabularies."""
        super().__init__()
        items = _table(ITEMS)
        self.ids = {
            "user_id": _table(USERS),
            "item_id": items,
            "creator_id": _table(CREATORS),
            "surface": _table(SURFACES),
        }
        self.lists = {
            "history_item_ids": (items, "history_item_ids_ids"),
            "impression_item_ids": (items, ft.IMPRESSION_IDS),
            "impression_surfaces": (self.ids["surface"], ft.IMPRESSION_SURFACE_IDS),
        }

    def __call__(self, raw: Mapping[str, tf.SparseTensor]) -> dict[str, Any]:
        """Sparse [B, <=1] or [B, L] to dense [B] or sparse [B, L]."""
        out: dict[str, Any] = {}
        for name, table in self.ids.items():
            if name in raw:
                out[f"{name}_id"] = _dense(raw[name].with_values(table.lookup(raw[name].values)), 0)
        for name, (table, transformed) in self.lists.items():
            if name in raw:
                out[transformed] = raw[name].with_values(table.lookup(raw[name].values))
        for label in SPEC.task_labels:
            name = ft.impression_label(label)
            if name in raw:
                out[name] = raw[name]
        event_time = _dense(raw[ft.EVENT_TIME], -1) if ft.EVENT_TIME in raw else None
        if event_time is not None:
            out["hour_of_day_id"] = event_time // 3600 % 24 + 2
            out["day_of_week_id"] = event_time // DAY_S % 7 + 2
            out |= _continuous("example_age_days", tf.zeros_like(event_time, tf.float32))
            if ft.IMPRESSION_TIMES in raw:
                times = raw[ft.IMPRESSION_TIMES]
                ages = tf.gather(event_time, times.indices[:, 0]) - times.values
                out[ft.IMPRESSION_AGES] = times.with_values(ages)
            if ft.UPLOAD_TIME in raw:
                age = tf.cast(event_time - _dense(raw[ft.UPLOAD_TIME], -1), tf.float32) / DAY_S
                out |= _continuous("item_age_days", age)
        return out


def _table(values: Sequence[str]) -> tf.lookup.StaticHashTable:
    ids = tf.range(2, 2 + len(values), dtype=tf.int64)
    initializer = tf.lookup.KeyValueTensorInitializer(tf.constant(list(values)), ids)
    return tf.lookup.StaticHashTable(initializer, default_value=ft.OOV_ID)


def _dense(values: tf.SparseTensor, missing: int) -> tf.Tensor:
    return tf.squeeze(tf.sparse.to_dense(values, default_value=missing), axis=1)


def _continuous(name: str, x: tf.Tensor) -> dict[str, tf.Tensor]:
    share = tf.clip_by_value(x / 40.0, 0.0, 1.0)
    return {f"{name}_cdf": share, f"{name}_bucket": 1 + tf.cast(share * 31.0, tf.int64)}


def requests(users: Sequence[str], seed: int = 1, num_impressions: int = 4) -> dict[str, tf.Tensor]:
    """Raw requests, one per user, with random histories and impressions; the last one has none."""
    rng = np.random.default_rng(seed)
    shape = (len(users), num_impressions)
    items, surfaces = rng.choice(ITEMS, shape), rng.choice(SURFACES, shape)
    history = rng.choice(ITEMS, (len(users), 3))
    times = NOW - rng.integers(1, 20 * DAY_S, shape)
    items[-1], surfaces[-1], history[-1], times[-1] = "", "", "", -1
    labels = {
        "impression_click": rng.integers(0, 2, shape).astype(np.float32),
        "impression_rating": rng.normal(3, 1, shape).astype(np.float32),
    }
    for column in labels.values():
        column[-1] = np.nan
    raw = {
        "user_id": np.array(users),
        "surface": rng.choice(SURFACES, len(users)),
        "event_time_unix_s": np.full(len(users), NOW),
        "history_item_ids": history,
        "impression_item_ids": items,
        "impression_event_time_unix_s": times,
        "impression_surfaces": surfaces,
        **labels,
    }
    return {name: tf.constant(column.tolist(), _dtype(column)) for name, column in raw.items()}


def _dtype(column: np.ndarray) -> tf.DType:
    return {"U": tf.string, "i": tf.int64, "f": tf.float32}[column.dtype.kind]


def transformed(raw: Mapping[str, tf.Tensor], layer: TransformStub) -> dict[str, np.ndarray]:
    """The transformed query features and impressions of raw requests."""
    found = raw_inputs.transform_request(layer, raw, SPEC)
    return {name: column.numpy() for name, column in found.items()}


def catalogue() -> Catalogue:
    """All items; the last row of the counters is that of an item without any event."""
    rng = np.random.default_rng(3)
    numbers = np.arange(len(ITEMS))
    return Catalogue(
        np.array(ITEMS, dtype=object),
        {"item_id_id": numbers + 2, "creator_id_id": numbers % len(CREATORS) + 2},
        NOW - numbers * DAY_S,
        {
            ft.COUNTERS: rng.random((len(ITEMS) + 1, _NUM_COUNTERS)).astype(np.float32),
            ft.LABEL_MEANS: np.tile(np.float32([0.4, 3.0]), (len(ITEMS) + 1, 1)),
        },
    )


@dataclasses.dataclass(frozen=True)
class World:
    """A ranker with random weights everywhere, so that every feature moves its score, and what serves it."""

    layer: TransformStub
    ranker: RankingModel
    served: ServedRanker


def make_world() -> World:
    """The world, the same each time."""
    layer, items = TransformStub(), catalogue()
    statistics = {
        "click": LabelStatistics(100, 0.4, 0.49, 0.0, 1.0),
        "stars": LabelStatistics(100, 3.0, 1.0, 1.0, 5.0),
    }
    config = RankingConfig.model_validate(
        {
            "max_embedding_width": 4,
            "experts": {"hidden_layers": [16]},
            "behaviour": {"kind": "din"},
            "interaction": {"kind": "none"},
            "calibration": {"method": "isotonic", "slice_feature": "surface"},
        }
    )
    tf.keras.utils.set_random_seed(1)
    ranker = RankingModel(SPEC, SIZES, statistics, ItemAttributes(items, SIZES["item_id"], SPEC), config)
    served = ServedRanker(ranker, layer, items, SPEC)
    served.rank(requests(USERS[:2]), tf.constant([["i0"], ["i1"]]))
    for weight in ranker.trainable_weights:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.3))
    # The variables of the layers exist only now.
    return World(layer, ranker, ServedRanker(ranker, layer, items, SPEC))
