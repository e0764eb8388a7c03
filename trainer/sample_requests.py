"""Requests of real users to any signature: for golden requests, warm-up and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer.bundle import Signature
from trainer.golden import GoldenRequest, answered
from trainer.input_pipeline import expand
from trainer.raw_inputs import MISSING, parse_candidate_examples, parse_users

STRANGER = "a-user-nobody-has-seen"
# Users that are looked through for some with and without a history.
_USERS_LOOKED_AT = 1_000
# Beside them there are those of the Evaluator and lookups.
_GOLDEN_SIGNATURES = (
    "serving_default",
    "serving_exact",
    "serving_weighted",
    "serving_candidates",
    "serving_user",
)
_K, _NUM_CANDIDATES, _NUM_EXCLUDED = 10, 100, 2

Arrays = dict[str, npt.NDArray[Any]]
_NO_ITEMS: Arrays = {ft.ITEM_ID: np.array([], object)}


def sample_users(user_states: Sequence[str], spec: DatasetSpec, count: int = 3) -> Arrays:
    """Raw features of some users: up to `count` with a history, one without, and one whom nobody has seen.

    Args:
      user_states: file patterns of user-state examples.
      spec: the declaration.
      count: see above.

    Returns:
      By raw name: query features, impressions and SEEN_ITEMS; [U], lists [U, L], L >= 1, padded on the right.
    """
    records = tf.data.TFRecordDataset(expand(user_states), compression_type="GZIP").take(_USERS_LOOKED_AT)
    examples = list(records.as_numpy_iterator())
    lengths = parse_users(tf.constant(examples), spec)[ft.HISTORY] != ""
    has_history = np.any(lengths.numpy(), axis=1)
    chosen = [examples[row] for row in np.flatnonzero(has_history)[:count]]
    chosen += [examples[row] for row in np.flatnonzero(~has_history)[:1]]
    stranger = tf.train.Example()
    known = tf.train.Example.FromString(examples[0]).features.feature
    for name in (ft.EVENT_TIME, ft.SURFACE):
        stranger.features.feature[name].CopyFrom(known[name])
    stranger.features.feature[ft.USER_ID].bytes_list.value.append(STRANGER.encode())
    users = parse_users(tf.constant([*chosen, stranger.SerializeToString()]), spec)
    return {name: _not_empty(value.numpy()) for name, value in users.items()}


def sample_items(catalogue: Sequence[str], spec: DatasetSpec, step: int) -> Arrays:
    """Raw features of every step-th item of a catalogue.

    Args:
      catalogue: file patterns of the catalogue's examples.
      spec: the declaration.
      step: 1 or more.

    Returns:
      By raw name: candidate features and ITEM_COUNTS; [I], lists [I, L], L >= 1, padded on the right.
    """
    records = tf.data.TFRecordDataset(expand(catalogue), compression_type="GZIP").shard(step, 0)
    items = parse_candidate_examples(tf.constant(list(records.as_numpy_iterator())), spec)
    return {name: _not_empty(value.numpy()) for name, value in items.items()}


def take(users: Arrays, rows: Sequence[int] | npt.NDArray[Any]) -> Arrays:
    """Some of the users, in the order given."""
    return {name: column[np.asarray(rows)] for name, column in users.items()}


def sample_request(inputs: Mapping[str, tf.TensorSpec], users: Arrays, items: Arrays = _NO_ITEMS) -> Arrays:
    """A request to a signature, a row per user: ten items out of a hundred candidates.

    Args:
      inputs: of the signature.
      users: see `sample_users`; the first seen items are excluded.
      items: candidates of a signature that is given some, see `sample_items`: their ITEM_ID where the
        signature looks up the rest, all of it for `serving_candidates`.

    Returns:
      Every input by name; what is not said here is missing: "", -1 or NaN.
    """
    count = len(users[ft.USER_ID])
    candidates = {name: np.repeat(column[np.newaxis], count, axis=0) for name, column in items.items()}
    given = {
        **users,
        **candidates,
        "k": np.full(count, _K, np.int32),
        "num_candidates": np.full(count, _NUM_CANDIDATES, np.int32),
        "exclude_item_ids": users[ft.SEEN_ITEMS][:, :_NUM_EXCLUDED],
        "candidate_item_ids": candidates[ft.ITEM_ID],
    }
    request = {}
    for name, spec in inputs.items():
        if name in given:
            request[name] = given[name]
        else:
            shape = [count, *(1 if size is None else size for size in spec.shape[1:])]
            request[name] = _missing(shape, spec.dtype.as_numpy_dtype)
    return request


def golden_requests(
    calls: Mapping[str, Signature], users: Arrays, items: Arrays = _NO_ITEMS
) -> list[GoldenRequest]:
    """Requests to the signatures that users call, with the answers of the trained model, run eagerly.

    All users ask together, and the first alone.

    Args:
      calls: signatures of the model.
      users: see `sample_users`.
      items: candidates of a signature that is given some, see `sample_items`; a padded one is added.
    """
    items = {
        name: np.concatenate([column, _missing((1, *column.shape[1:]), column.dtype)])
        for name, column in items.items()
    }
    everybody = np.arange(len(users[ft.USER_ID]))
    golden = []
    for name in _GOLDEN_SIGNATURES:
        if name not in calls:
            continue
        for rows in (everybody, [0]) if name == "serving_default" else (everybody,):
            request = sample_request(calls[name].inputs, take(users, rows), items)
            golden.append(answered(name, request, calls[name].function))
    return golden


def _not_empty(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Lists at least one wide: TensorFlow Serving cannot pad an empty one when it merges requests."""
    if values.ndim == 1 or values.shape[1]:
        return values
    return _missing((len(values), 1), values.dtype)


def _missing(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Values that stand for none."""
    kind = np.dtype(dtype).name
    return np.full(shape, MISSING["string" if kind == "object" else kind], dtype)
