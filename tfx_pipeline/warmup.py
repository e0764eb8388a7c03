"""Warm-up requests of real users for an exported model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from schema.contract import DatasetSpec
from serving.warmup import write_warmup_requests
from tfx_pipeline.config import RETRIEVAL
from tfx_pipeline.user_states import (
    UserState,
    padded,
    query_arrays,
    ranking_arrays,
    read_user_states,
)
from trainer.allow_list_inputs import input_name

_USERS = 3
_K = 10


def add_warmup_requests(
    model_dir: Path | str,
    model: str,
    user_states: Sequence[str],
    spec: DatasetSpec,
    allow_list: Sequence[str] = (),
) -> None:
    """Writes requests of the first few users beside a SavedModel.

    Args:
      model_dir: the SavedModel.
      model: name of the model.
      user_states: file patterns of user-state examples.
      spec: the declaration.
      allow_list: item attributes that requests to the retrieval model may filter by.
    """
    states = itertools.islice(read_user_states(user_states, spec), _USERS)
    write_warmup_requests(model_dir, model, [_request(model, state, spec, allow_list) for state in states])


def _request(
    model: str, state: UserState, spec: DatasetSpec, allow_list: Sequence[str]
) -> dict[str, np.ndarray]:
    """One user's request to a model as signature inputs, batch of one."""
    if model == RETRIEVAL:
        return {
            **query_arrays([state], spec),
            "k": np.array([_K], np.int32),
            "exclude_item_ids": padded([state.seen_item_ids[:1]]),
            **{input_name(attribute): padded([()]) for attribute in allow_list},
        }
    return {**ranking_arrays([state], spec), "candidate_item_ids": padded([state.seen_item_ids[:_K]])}
