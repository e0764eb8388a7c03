"""Warm-up requests of real users for an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import serving
from schema.contract import DatasetSpec
from serving.batching_config import read_batching_parameters
from serving.servable import read_signature_defs
from serving.warmup import write_warmup_requests
from trainer.bundle import input_specs
from trainer.features import ITEM_ID
from trainer.sample_requests import sample_request, sample_users, take

_BATCHING_CONFIG = Path(serving.__file__).parent / "settings" / "batching.config"
# Signatures that users call; each is warmed up.
_WARMED_UP = ("serving_default", "serving_user")


def add_warmup_requests(
    model_dir: Path | str, model: str, user_states: Sequence[str], spec: DatasetSpec
) -> None:
    """Writes requests of the first few users beside a SavedModel.

    There is one of each batch size that `serving/settings/batching.config` allows: a server that batches
    fills batches up to one of them, and a graph is slow the first time it runs.

    Args:
      model_dir: the SavedModel.
      model: name of the model.
      user_states: file patterns of user-state examples.
      spec: the declaration.
    """
    sizes = read_batching_parameters(_BATCHING_CONFIG).allowed_batch_sizes
    users = sample_users(user_states, spec)
    count = len(users["user_id"])
    seen = [item_id for item_id in users["seen_item_ids"].ravel() if item_id]
    items = {ITEM_ID: np.array(seen[:10] or [""], object)}
    requests = {
        name: [
            sample_request(input_specs(signature), take(users, np.arange(size) % count), items)
            for size in sizes
        ]
        for name, signature in read_signature_defs(Path(model_dir)).items()
        if name in _WARMED_UP
    }
    write_warmup_requests(model_dir, model, requests)
