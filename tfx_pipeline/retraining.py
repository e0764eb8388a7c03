"""Trains a model of a finished run again, with other settings, from the same examples; publishes nothing."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import scann  # noqa: F401  registers the operations of the exported index

from schema.errors import DataError
from schema.tables import read_summary
from tfx_pipeline.config import RETRIEVAL, RunPaths
from tfx_pipeline.outcome import read_artifact_uris
from tfx_pipeline.run_result import RunResult
from trainer.config import RankingConfig, RetrievalConfig
from trainer.run_ranking import run_fn as ranking_run_fn
from trainer.run_retrieval import TRAINING_LOG
from trainer.run_retrieval import run_fn as retrieval_run_fn


@contextlib.contextmanager
def retrained(
    model: str, run: RunResult, paths: RunPaths, overrides: Mapping[str, Any]
) -> Iterator[tuple[Path, list[dict[str, float]]]]:
    """Trains and exports a model to a temporary folder.

    Args:
      model: `retrieval` or `ranking`.
      run: the finished run.
      paths: its folders.
      overrides: settings of RetrievalConfig or RankingConfig that differ from the run's; nested mappings are
        merged.

    Yields:
      The exported SavedModel's folder, which is gone afterwards, and the training log.

    Raises:
      DataError: an artifact of the run is gone.
    """
    uris = read_artifact_uris(paths.metadata)
    inputs = {
        name: Path(uris[component, key])
        for name, (component, key) in {
            "interactions": ("InteractionGen", "examples"),
            "states": ("UserStateGen", "examples"),
            "catalogue": ("CatalogueGen", "examples"),
            "transform": ("Transform", "transform_graph"),
        }.items()
    }
    for folder in inputs.values():
        if not folder.is_dir():
            raise DataError(f"{folder} is gone; 'funnel run' with the same settings makes it again")
    is_retrieval = model == RETRIEVAL
    settings = merged(getattr(run.config, model).model_dump(), overrides)
    config = (RetrievalConfig if is_retrieval else RankingConfig).model_validate(settings)
    folder = Path(tempfile.mkdtemp(prefix="retrained-"))
    try:
        (retrieval_run_fn if is_retrieval else ranking_run_fn)(
            SimpleNamespace(
                custom_config={
                    "dataset": run.config.dataset.model_dump_json(),
                    "config": config.model_dump_json(),
                    "train_end_unix_s": read_summary(Path(run.tables_dir)).train_end_unix_s,
                    "catalogue": [f"{inputs['catalogue']}/Split-catalogue/*.gz"],
                    "user_states": [f"{inputs['states']}/Split-user_states/*.gz"],
                },
                transform_output=str(inputs["transform"]),
                train_files=[f"{inputs['interactions']}/Split-train/*.gz"],
                eval_files=[f"{inputs['interactions']}/Split-eval/*.gz"],
                model_run_dir=str(folder / "log"),
                serving_model_dir=str(folder / "model"),
                base_model=None,
            )
        )
        log = json.loads((folder / "log" / TRAINING_LOG).read_text(encoding="utf-8"))
        yield folder / "model", log
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def merged(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some of them replaced; nested mappings are merged."""
    result = dict(settings)
    for name, value in overrides.items():
        result[name] = merged(settings[name], value) if isinstance(value, Mapping) else value
    return result
