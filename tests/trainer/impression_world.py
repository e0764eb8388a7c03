"""Impressions of a few users and what is in common with candidates, with a loop that adds them up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from schema.contract import DatasetSpec
from trainer.body_config import PastConfig
from trainer.catalogue import Catalogue
from trainer.impressions import ItemAttributes, PastOutcomes, read_impressions
from trainer.label_statistics import LabelStatistics

DAY_S = 86_400
NUM_ITEM_IDS = 8  # padding, OOV and six items
WINDOWS_DAYS = (1.0, 7.0)
STD = {"click": 0.5, "watch_time_s": 20.0}
Array = npt.NDArray[Any]
PAST = PastConfig()


def declaration(surfaces: bool = True) -> DatasetSpec:
    columns = {name: name for name in ("user_id", "item_id", "event_time_unix_s", "watch_time_s")}
    return DatasetSpec.model_validate(
        {
            "name": "shown",
            "interactions": {
                "files": ["log.csv"],
                "columns": columns | ({"surface": "surface"} if surfaces else {}),
                "labels": {"click": "click"},
            },
            "users": {"files": ["users.csv"], "columns": {"user_id": "user_id"}},
            "items": {
                "files": ["items.csv"],
                "columns": {"item_id": "item_id", "creator_id": "creator"},
                "features": [{"name": "tags", "kind": "multi_categorical"}],
            },
            "positive": "click",
            "tasks": [
                {"name": "watch", "label": "watch_time_s", "kind": "watch_time"},
                {"name": "click", "label": "click", "kind": "binary"},
            ],
            "split": {"fractions": [0.8, 0.1, 0.1]},
            "counters": {"keys": ["item_id", "creator_id", "tags"], "windows_days": WINDOWS_DAYS},
        }
    )


SPEC = declaration()
STATISTICS = {
    "click": LabelStatistics(9, 0.5, STD["click"], 0.0, 1.0),
    "watch": LabelStatistics(9, 10.0, STD["watch_time_s"], 0.0, 99.0),
}
# Items of the vocabulary have the ids 2 to 7. The catalogue lacks item 7; its last two rows are not in the
# vocabulary. Creator 1 and tag 1 are unknown ones, 0 is none.
CATALOGUE = Catalogue(
    np.array(["b", "a", "c", "d", "e", "new", "newer"], object),
    {
        "item_id_id": np.array([3, 2, 4, 5, 6, 1, 1]),
        "creator_id_id": np.array([2, 2, 3, 0, 1, 4, 2]),
        "tags_ids": np.array([[2, 3], [3, 0], [2, 4], [0, 0], [1, 0], [3, 0], [2, 2]]),
    },
    None,
)
ATTRIBUTES = {
    "creator_id": [[0], [0], [2], [2], [3], [0], [1], [0]],
    "tags": [[0, 0], [0, 0], [3, 0], [2, 3], [2, 4], [0, 0], [1, 0], [0, 0]],
}


def attributes() -> ItemAttributes:
    return ItemAttributes(CATALOGUE, NUM_ITEM_IDS, SPEC)


def transformed(seed: int, num_users: int = 5, length: int = 9) -> dict[str, Array]:
    """Impressions as Transform gives them: padded on the right with 0; the first user has none."""
    rng = np.random.default_rng(seed)
    is_shown = np.arange(length) < rng.integers(1, length + 1, num_users)[:, np.newaxis]
    is_shown[0] = False
    shape = is_shown.shape
    ages = rng.choice([0, 1, 3_600, DAY_S - 1, DAY_S, 7 * DAY_S - 1, 8 * DAY_S, 90 * DAY_S], shape)
    columns = {
        "impression_item_ids_ids": rng.integers(1, NUM_ITEM_IDS, shape),
        "impression_surfaces_ids": rng.integers(0, 4, shape),
        "impression_ages_s": ages,
        "impression_click": rng.integers(0, 2, shape).astype(np.float32),
        "impression_watch_time_s": rng.exponential(10, shape).astype(np.float32),
    }
    return {name: np.where(is_shown, column, 0).astype(column.dtype) for name, column in columns.items()}


def candidates(seed: int, num_users: int = 5, num_candidates: int = 4) -> dict[str, Array]:
    """Values of every key of N candidates of each user, some of them padding or unknown."""
    rng = np.random.default_rng(seed)
    return {
        "item_id": rng.integers(0, NUM_ITEM_IDS, (num_users, num_candidates, 1)),
        "creator_id": rng.integers(0, 4, (num_users, num_candidates, 1)),
        "tags": rng.integers(0, 5, (num_users, num_candidates, 3)),
    }


def oracle(
    columns: dict[str, Array],
    surface: Array | None,
    keys: dict[str, Array],
    means: Array,
    config: PastConfig = PAST,
) -> Array:
    """What the impressions say of every candidate, group by group and impression by impression."""
    labels = np.stack([columns["impression_watch_time_s"], columns["impression_click"]], axis=-1)
    rows = []
    for user, shown in enumerate(columns["impression_item_ids_ids"]):
        places = [place for place, item in enumerate(shown) if item != 0]
        age_days = columns["impression_ages_s"][user] / DAY_S
        for number in range(means.shape[1]):
            groups = [[p for p in places if age_days[p] < days] for days in (*WINDOWS_DAYS, math.inf)]
            if surface is not None:
                surfaces = columns["impression_surfaces_ids"][user]
                groups.append([p for p in places if surfaces[p] == surface[user] and surface[user] >= 2])
            spans: list[tuple[float, ...]] = [(math.inf,)] * len(groups)
            for key, values in keys.items():
                mine = {int(value) for value in values[user, number] if value >= 2}
                spans.append((*(WINDOWS_DAYS if config.key_windows else ()), math.inf))
                theirs = {
                    p: {shown[p]} if key == "item_id" else set(ATTRIBUTES[key][shown[p]]) for p in places
                }
                groups.append([p for p in places if mine & {int(value) for value in theirs[p]}])
            row: list[float] = []
            for group, windows in zip(groups, spans, strict=True):
                # An age of 60 days or more reads 1, as does no impression at all.
                ages = [math.log(1 + 24 * age_days[p]) / math.log(1 + 24 * 60) for p in group]
                within = [[p for p in group if age_days[p] < days] for days in windows]
                row += [*(math.log(1 + len(some)) for some in within), min([1.0, *ages])]
                for some in within:
                    for label, scale in enumerate([STD["watch_time_s"], STD["click"]]):
                        excess = sum(labels[user, p, label] - means[user, number, label] for p in some)
                        row.append(excess / (len(some) + 2) / scale)
            if config.churn:
                item = keys["item_id"][user, number, 0]
                mine_only = [p for p in places if shown[p] == item >= 2]
                clicked = [age_days[p] for p in mine_only if labels[user, p, 1] > 0]
                row.append(math.log(1 + sum(age_days[p] < min(clicked, default=math.inf) for p in mine_only)))
            rows.append(row)
    return np.array(rows).reshape(*means.shape[:2], -1)


def means_of(seed: int, num_users: int = 5, num_candidates: int = 4) -> Array:
    scale = np.array([20.0, 0.5], np.float32)
    rng = np.random.default_rng(seed)
    return rng.random((num_users, num_candidates, 2), np.float32) * scale


SURFACE = np.array([2, 3, 0, 1, 2])


def with_durations() -> tuple[DatasetSpec, ItemAttributes]:
    """The declaration and the items with a duration, by which contexts and impressions are told apart."""
    raw = SPEC.model_dump(mode="json")
    raw["items"]["features"] += [{"name": "duration_s", "kind": "continuous"}]
    raw["tasks"][0] |= {"method": "ordinal", "duration_feature": "duration_s"}
    spec = DatasetSpec.model_validate(raw)
    buckets = np.array([4, 1, 5, 0, 8, 3, 3])
    columns = {**CATALOGUE.transformed, "duration_s_bucket": buckets}
    return spec, ItemAttributes(Catalogue(CATALOGUE.item_ids, columns, None), NUM_ITEM_IDS, spec)


def outcomes(
    columns: dict[str, Array],
    surface: Array | None,
    keys: dict[str, Array],
    means: Array,
    config: PastConfig = PAST,
) -> Array:
    """What the layer itself says of every candidate."""
    impressions = read_impressions({n: tf.constant(c) for n, c in columns.items()}, attributes(), SPEC)
    layer = PastOutcomes(SPEC, STATISTICS, config)
    given = None if surface is None else tf.constant(surface)
    tensors = {key: tf.constant(values) for key, values in keys.items()}
    result: Array = layer(impressions, given, tensors, tf.constant(means)).numpy()
    assert not layer.weights
    return result
