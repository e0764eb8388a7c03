"""Trains a model of a finished run again, with other settings, from the same examples."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scann  # noqa: F401 - registers the operations of the exported index
import tensorflow as tf

from benchmarks.comparison import LIST_LENGTH
from benchmarks.protocols import Tables, read_run_on
from schema.errors import DataError
from schema.tables import read_summary
from tfx_pipeline.config import RunPaths
from tfx_pipeline.run_result import RunResult
from tfx_pipeline.user_states import find_user_states
from trainer.config import RankingConfig, RetrievalConfig
from trainer.metrics import IntArray
from trainer.run_ranking import run_fn as ranking_run_fn
from trainer.run_retrieval import TRAINING_LOG
from trainer.run_retrieval import run_fn as retrieval_run_fn

_USERS_PER_CALL = 256


@contextlib.contextmanager
def retrained(
    run_dir: Path, tables: Tables, overrides: Mapping[str, Any]
) -> Iterator[tuple[Path, list[dict[str, float]]]]:
    """Trains and exports a retrieval model to a temporary folder.

    Args:
      run_dir: output directory of a finished `funnel run`.
      tables: of the benchmark that the model is for.
      overrides: settings of `trainer.config.RetrievalConfig` that differ from the run's; nested mappings are
        merged.

    Yields:
      The exported SavedModel's folder, which is gone afterwards, and the training log.

    Raises:
      DataError: there is no finished run, it is of another dataset or split, or its examples are gone or
        older than those of another run in the folder.
    """
    run = read_run_on(tables.spec, run_dir)
    settings = _merged(run.config.retrieval.model_dump(), overrides)
    artifacts = _artifacts(run, run_dir)
    folder = Path(tempfile.mkdtemp(prefix="retrained-"))
    try:
        retrieval_run_fn(
            SimpleNamespace(
                custom_config={
                    "dataset": run.config.dataset.model_dump_json(),
                    "config": RetrievalConfig.model_validate(settings).model_dump_json(),
                    "train_end_unix_s": read_summary(Path(run.tables_dir)).train_end_unix_s,
                    "catalogue": [artifacts.catalogue],
                    "user_states": [run.user_states],
                },
                transform_output=str(artifacts.transform_graph),
                train_files=[artifacts.examples("train")],
                model_run_dir=str(folder / "log"),
                serving_model_dir=str(folder / "model"),
                base_model=None,
            )
        )
        yield folder / "model", json.loads((folder / "log" / TRAINING_LOG).read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def retrained_ranker(run_dir: Path, tables: Tables, overrides: Mapping[str, Any]) -> Iterator[Path]:
    """Trains and exports a ranking model to a temporary folder.

    Args:
      run_dir: output directory of a finished `funnel run`.
      tables: of the benchmark that the model is for.
      overrides: settings of `trainer.config.RankingConfig` that differ from the run's; nested mappings are
        merged.

    Yields:
      The exported SavedModel's folder, which is gone afterwards.

    Raises:
      DataError: as `retrained`.
    """
    run = read_run_on(tables.spec, run_dir)
    settings = _merged(run.config.ranking.model_dump(), overrides)
    artifacts = _artifacts(run, run_dir)
    folder = Path(tempfile.mkdtemp(prefix="retrained-"))
    try:
        ranking_run_fn(
            SimpleNamespace(
                custom_config={
                    "dataset": run.config.dataset.model_dump_json(),
                    "config": RankingConfig.model_validate(settings).model_dump_json(),
                    "train_end_unix_s": read_summary(Path(run.tables_dir)).train_end_unix_s,
                    "catalogue": [artifacts.catalogue],
                    "user_states": [run.user_states],
                },
                transform_output=str(artifacts.transform_graph),
                train_files=[artifacts.examples("train")],
                eval_files=[artifacts.examples("eval")],
                model_run_dir=str(folder / "log"),
                serving_model_dir=str(folder / "model"),
                base_model=None,
            )
        )
        yield folder / "model"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Artifacts:
    """What the last run of a folder trained on.

    Attributes:
      interactions, transform_graph: folders.
      catalogue: file pattern.
    """

    interactions: Path
    transform_graph: Path
    catalogue: str

    def examples(self, split: str) -> str:
        """File pattern of the interactions of a split."""
        return f"{self.interactions}/Split-{split}/*.gz"


def _artifacts(run: RunResult, run_dir: Path) -> _Artifacts:
    root = RunPaths(run_dir).pipeline_root
    # Of its artifacts run.json names the user states only. When they are the latest, so are the others: all
    # are made of the same tables and settings.
    user_states = _latest(root / "UserStateGen" / "examples")
    if user_states.resolve() not in Path(run.user_states).resolve().parents:
        raise DataError(
            f"{run_dir} holds newer examples ({user_states}) than those of its last run "
            f"({run.user_states}), which reused cached ones; give the run an output directory of its own"
        )
    return _Artifacts(
        _latest(root / "InteractionGen" / "examples"),
        _latest(root / "Transform" / "transform_graph"),
        f"{_latest(root / 'CatalogueGen' / 'examples')}/Split-catalogue/*.gz",
    )


def _merged(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in overrides.items():
        merged[name] = _merged(settings[name], value) if isinstance(value, Mapping) else value
    return merged


def _latest(folder: Path) -> Path:
    executions = sorted((path for path in folder.glob("[0-9]*")), key=lambda path: int(path.name))
    if not executions:
        raise DataError(f"{folder} is empty: the run's artifacts are gone; run 'funnel run' again")
    return executions[-1]


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
