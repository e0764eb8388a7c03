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

_DTYPES = {"string": object, "int64": np.int64, "float32": np.float32}
_KINDS = {"string": "bytes_list", "int64": "int64_list", "float32": "float_list"}


@dataclasses.dataclass(frozen=True)
class UserState:
    """One user as of the end of training.

    Attributes:
      user_id: the user.
      query: raw query features by name, as a request gives them; absent ones are left out.
      impressions: the user's latest impressions, which only the ranker reads, by name; likewise.
      seen_item_ids: all items of the user's training positives.
      serialized: the tf.Example it was read from, for the `serving_examples` signature.
    """

    user_id: str
    query: Mapping[str, Any]
    seen_item_ids: tuple[str, ...]
    serialized: bytes
    impressions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def request(self) -> dict[str, Any]:
        """All that a request for recommendations says of the user."""
        return {**self.query, **self.impressions}


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

    def read(inputs: Sequence[features.RawInput]) -> dict[str, Any]:
        found = {}
        for raw in inputs:
            held = getattr(values[raw.name], _KINDS[raw.dtype]).value
            value = [v.decode() if isinstance(v, bytes) else v for v in held]
            if value:
                found[raw.name] = value if raw.is_list else value[0]
        return found

    query = read(features.raw_query_inputs(spec))
    seen = tuple(v.decode() for v in values[features.SEEN_ITEMS].bytes_list.value)
    impressions = read(features.raw_impression_inputs(spec))
    return UserState(str(query[features.USER_ID]), query, seen, serialized, impressions)


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
    """Raw query features of several users as signature inputs: [B], lists padded on the right as [B, L]."""
    return _arrays([state.query for state in states], features.raw_query_inputs(spec))


def ranking_arrays(states: Sequence[UserState], spec: DatasetSpec) -> dict[str, np.ndarray]:
    """Raw query features and impressions of several users as inputs of the ranker."""
    inputs = (*features.raw_query_inputs(spec), *features.raw_impression_inputs(spec))
    return _arrays([state.request for state in states], inputs)


def _arrays(
    values: Sequence[Mapping[str, Any]], inputs: Sequence[features.RawInput]
) -> dict[str, np.ndarray]:
    arrays = {}
    for raw in inputs:
        if raw.is_list:
            arrays[raw.name] = padded([value.get(raw.name, ()) for value in values], raw.dtype)
        else:
            given = [value.get(raw.name, MISSING[raw.dtype]) for value in values]
            arrays[raw.name] = np.array(given, dtype=_DTYPES[raw.dtype])
    return arrays


def padded(lists: Sequence[Sequence[Any]], dtype: str = "string") -> np.ndarray:
    """Lists as an array [B, L], padded on the right with what stands for a missing value of their type."""
    width = max((len(values) for values in lists), default=0)
    result = np.full((len(lists), width), MISSING[dtype], dtype=_DTYPES[dtype])
    for row, values in enumerate(lists):
        result[row, : len(values)] = values
    return result
