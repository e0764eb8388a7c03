"""User states as other commands need them: what is known of a user as of the end of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features
from trainer.input_pipeline import expand
from trainer.raw_inputs import MISSING

_KINDS = {"string": "bytes_list", "int64": "int64_list", "float32": "float_list"}


@dataclasses.dataclass(frozen=True)
class UserState:
    """One user as of the end of training.

    Attributes:
      user_id: the user.
      query: raw query features by name, as a request gives them; absent ones are left out.
      seen_item_ids: all items of the user's training positives.
      serialized: the tf.Example it was read from, for the `serving_examples` signature.
    """

    user_id: str
    query: Mapping[str, Any]
    seen_item_ids: tuple[str, ...]
    serialized: bytes


def read_user_states(patterns: Sequence[str], spec: DatasetSpec) -> Iterator[UserState]:
    """Reads all user states.

    Args:
      patterns: files of user-state examples.
      spec: the declaration.
    """
    for record in tf.data.TFRecordDataset(expand(patterns), compression_type="GZIP").as_numpy_iterator():
        yield parse_user_state(record, spec)


def find_user_states(
    patterns: Sequence[str], spec: DatasetSpec, user_ids: Sequence[str]
) -> dict[str, UserState]:
    """The states of the users among `user_ids` that have one."""
    wanted = {user_id.encode() for user_id in user_ids}
    parser = {features.USER_ID: tf.io.FixedLenFeature([], tf.string)}
    found = {}
    records = tf.data.TFRecordDataset(expand(patterns), compression_type="GZIP").batch(8_192)
    for batch in records:
        ids = tf.io.parse_example(batch, parser)[features.USER_ID].numpy()
        for row, user_id in enumerate(ids):
            if user_id in wanted:
                found[user_id.decode()] = parse_user_state(batch[row].numpy(), spec)
    return found


def parse_user_state(serialized: bytes, spec: DatasetSpec) -> UserState:
    """Reads one serialized user-state example."""
    values = tf.train.Example.FromString(serialized).features.feature
    query: dict[str, Any] = {}
    for raw in features.raw_query_inputs(spec):
        found = [
            v.decode() if isinstance(v, bytes) else v
            for v in getattr(values[raw.name], _KINDS[raw.dtype]).value
        ]
        if found:
            query[raw.name] = found if raw.is_list else found[0]
    seen = tuple(v.decode() for v in values[features.SEEN_ITEMS].bytes_list.value)
    return UserState(str(query[features.USER_ID]), query, seen, serialized)


def unknown_user_state(user_id: str, like: UserState) -> UserState:
    """The state of a user nobody has seen: the moment and surface of `like`, no history and no features."""
    shared = (features.EVENT_TIME, features.SURFACE)
    query = {features.USER_ID: user_id, **{name: like.query[name] for name in shared if name in like.query}}
    example = tf.train.Example()
    for name, value in query.items():
        if isinstance(value, int):
            example.features.feature[name].int64_list.value.append(value)
        else:
            example.features.feature[name].bytes_list.value.append(value.encode())
    return UserState(user_id, query, (), example.SerializeToString())


def query_arrays(states: Sequence[UserState], spec: DatasetSpec) -> dict[str, np.ndarray]:
    """Raw query features of several users as signature inputs: [B], lists padded with "" as [B, L]."""
    arrays = {}
    for raw in features.raw_query_inputs(spec):
        if raw.is_list:
            arrays[raw.name] = padded([state.query.get(raw.name, ()) for state in states])
        else:
            dtype = {"string": object, "int64": np.int64, "float32": np.float32}[raw.dtype]
            arrays[raw.name] = np.array(
                [state.query.get(raw.name, MISSING[raw.dtype]) for state in states], dtype=dtype
            )
    return arrays


def padded(lists: Sequence[Sequence[str]]) -> np.ndarray:
    """Lists of ids as an object array [B, L], padded on the right with ""."""
    width = max((len(values) for values in lists), default=0)
    result = np.full((len(lists), width), "", dtype=object)
    for row, values in enumerate(lists):
        result[row, : len(values)] = values
    return result
