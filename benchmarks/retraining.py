"""Trains a model of a finished run again, from the same examples, and asks it for lists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scann  # noqa: F401 - registers the operations of the exported index
import tensorflow as tf

from benchmarks.comparison import LIST_LENGTH
from benchmarks.protocols import Tables, read_run_on
from schema.contract import DatasetSpec
from schema.errors import DataError
from tfx_pipeline import retraining
from tfx_pipeline.config import RANKING, RETRIEVAL, RunPaths
from tfx_pipeline.user_states import find_user_states
from trainer.metrics import IntArray

_USERS_PER_CALL = 256


@contextlib.contextmanager
def retrained(
    run_dir: Path, tables: Tables, overrides: Mapping[str, Any]
) -> Iterator[tuple[Path, list[dict[str, float]]]]:
    """Trains and exports a retrieval model to a temporary folder, see `tfx_pipeline.retraining`.

    Args:
      run_dir: output directory of a finished `funnel run`.
      tables: of the benchmark that the model is for.
      overrides: settings of `trainer.config.RetrievalConfig` that differ from the run's.

    Yields:
      The exported SavedModel's folder, which is gone afterwards, and the training log.

    Raises:
      DataError: there is no finished run, it is of another dataset or split, or its examples are gone.
    """
    run = read_run_on(tables.spec, run_dir)
    with retraining.retrained(RETRIEVAL, run, RunPaths(run_dir), overrides) as found:
        yield found


@contextlib.contextmanager
def retrained_ranker(run_dir: Path, spec: DatasetSpec, overrides: Mapping[str, Any]) -> Iterator[Path]:
    """Trains and exports a ranking model to a temporary folder.

    Args:
      run_dir: output directory of a finished `funnel run`.
      spec: the declaration that the model is for.
      overrides: settings of `trainer.config.RankingConfig` that differ from the run's.

    Yields:
      The exported SavedModel's folder, which is gone afterwards.

    Raises:
      DataError: as `retrained`.
    """
    run = read_run_on(spec, run_dir)
    with retraining.retrained(RANKING, run, RunPaths(run_dir), overrides) as (folder, _):
        yield folder


def lists_of(model_dir: Path, run_dir: Path, tables: Tables, user_ids: Sequence[str]) -> IntArray:
    """What an exported model answers (`serving_examples`, ScaNN) as of the end of training.

    Args:
      model_dir: SavedModel of a retrieval model trained on the examples of the run.
      run_dir: output directory of that run; its user states are asked for.
      tables: of the benchmark.
      user_ids: U users that have a user state.

    Returns:
      int64 [U, LIST_LENGTH] item codes, best first, -1 where a list is short.

    Raises:
      DataError: the run is of another dataset or split, or a user has no state.
    """
    run = read_run_on(tables.spec, run_dir)
    states = find_user_states([run.user_states], run.config.dataset, user_ids)
    strangers = [user_id for user_id in user_ids if user_id not in states]
    if strangers:
        raise DataError(f"{len(strangers):,} users have no state in {run_dir}, for instance {strangers[0]!r}")
    code_of = {item_id.encode(): code for code, item_id in enumerate(tables.item_ids)} | {b"": -1}
    model = tf.saved_model.load(str(model_dir))
    serve = model.signatures["serving_examples"]
    parts = []
    for start in range(0, len(user_ids), _USERS_PER_CALL):
        asked = [states[user_id].serialized for user_id in user_ids[start : start + _USERS_PER_CALL]]
        found = serve(examples=tf.constant(asked))["item_ids"].numpy()[:, :LIST_LENGTH]
        parts.append(np.array([[code_of[item_id] for item_id in row] for row in found], np.int64))
    return np.concatenate(parts)
