"""Raw items, users and requests of the ranking world, as source, example file and signature have them."""

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from tests.trainer import ranking_world as world
from trainer import raw_inputs
from trainer.catalogue import Catalogue
from trainer.input_pipeline import load_catalogue

SPEC = world.spec()
NOW = 1_700_000_000

# What the log says of all: 1000 impressions, 400 clicks, 900 points of rating, 20,000 s watched.
LOG = [1_000.0, 400.0, 900.0, 20_000.0]
UNSHOWN = [*LOG, *[0.0] * world.NUM_COUNTERS]


def raw_item(item_id: str) -> dict[str, Any]:
    number = int(item_id[1:])
    return {
        "item_counts": [*LOG, *(float(number * place % 7) for place in range(world.NUM_COUNTERS))],
        "item_id": item_id,
        "creator_id": f"c{number % 3}",
        "tag": [[f"t{number % 2}"], ["t0", "t1"], []][number % 3],
        "length": float(7 * number),
        "upload_time_unix_s": NOW - number * world.DAY_S,
    }


# What was shown, and how many seconds ago; surface, click, rating and seconds watched.
Shown = tuple[str, int, str, float, float, float]


def raw_query(user_id: str, history: list[str], *shown: Shown) -> dict[str, Any]:
    items, ages, surfaces, clicks, ratings, watched = (
        map(list, zip(*shown, strict=True)) if shown else [[]] * 6
    )
    return {
        "user_id": user_id,
        "age": 33.0,
        "history_item_ids": history,
        "surface": "feed",
        "event_time_unix_s": NOW,
        "impression_item_ids": items,
        "impression_event_time_unix_s": [NOW - age for age in ages],
        "impression_surfaces": surfaces,
        "impression_click": clicks,
        "impression_rating": ratings,
        "impression_watch_time_s": watched,
    }


def example(values: Mapping[str, Any]) -> bytes:
    """A serialized tf.Example; None is absent."""
    result = tf.train.Example()
    for name, value in values.items():
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not items:
            continue
        feature = result.features.feature[name]
        if isinstance(items[0], int):
            feature.int64_list.value.extend(items)
        elif isinstance(items[0], float):
            feature.float_list.value.extend(items)
        else:
            feature.bytes_list.value.extend(item.encode() for item in items)
    return result.SerializeToString()


def request(queries: list[dict[str, Any]], candidates: list[list[str]]) -> dict[str, tf.Tensor]:
    inputs = {}
    for name, spec in raw_inputs.ranking_signature(SPEC).items():
        values = [query[name] for query in queries]
        if spec.shape.rank == 2:
            longest = max(len(value) for value in values)
            missing = raw_inputs.MISSING[spec.dtype.name]
            values = [[*value, *[missing] * (longest - len(value))] for value in values]
            inputs[name] = tf.constant(values, spec.dtype, [len(queries), longest])
        else:
            inputs[name] = tf.constant(values, spec.dtype)
    inputs["candidate_item_ids"] = tf.constant(candidates, tf.string, [len(queries), len(candidates[0])])
    return inputs


def described_request(
    queries: list[dict[str, Any]], candidates: list[list[dict[str, Any]]]
) -> dict[str, tf.Tensor]:
    """A request that describes its candidates; a feature that one lacks is missing."""
    inputs = request(queries, [[""]] * len(queries))
    del inputs["candidate_item_ids"]
    for name, spec in raw_inputs.candidate_signature(SPEC).items():
        missing = raw_inputs.MISSING[spec.dtype.name]
        if spec.shape.rank == 2:
            values = [[item.get(name, missing) for item in items] for items in candidates]
            inputs[name] = tf.constant(values, spec.dtype, [len(queries), len(candidates[0])])
        else:
            lists = [[item.get(name, []) for item in items] for items in candidates]
            longest = spec.shape[2] or max((len(value) for items in lists for value in items), default=0)
            values = [[[*v, *[missing] * (longest - len(v))] for v in items] for items in lists]
            inputs[name] = tf.constant(values, spec.dtype, [len(queries), len(candidates[0]), longest])
    inputs["score_weights"] = tf.fill([len(queries), len(SPEC.tasks)], math.nan)
    return inputs


@dataclasses.dataclass
class TransformOutput:
    """Stands for the Transform output that the stub is the layer of."""

    layer: world.TransformStub

    def transform_features_layer(self) -> world.TransformStub:
        """The layer."""
        return self.layer


def write_catalogue(path: Path, items: Iterable[dict[str, Any]]) -> str:
    """The path of the file, which now holds the items."""
    with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
        for item in items:
            writer.write(example(item))
    return str(path)


def catalogue(layer: world.TransformStub, items: list[dict[str, Any]] | None = None) -> Catalogue:
    """The catalogue of these items, or of all of the world, as the trainer reads it from its file."""
    given = [raw_item(item_id) for item_id in world.ITEMS] if items is None else items
    with tempfile.TemporaryDirectory() as folder:
        path = write_catalogue(Path(folder) / "items.gz", given)
        return load_catalogue([path], TransformOutput(layer), SPEC)
