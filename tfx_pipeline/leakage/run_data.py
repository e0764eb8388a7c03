"""Where a finished run keeps what is linted."""

from __future__ import annotations

from pathlib import Path

from schema.errors import DataError
from tfx_pipeline.config import RunPaths
from tfx_pipeline.leakage.lint import RunData
from tfx_pipeline.outcome import read_artifact_uris
from tfx_pipeline.run_result import RunResult


def run_data(result: RunResult, paths: RunPaths) -> RunData:
    """Finds tables, examples and graph of the newest run of an output directory.

    Raises:
      DataError: the metadata or an artifact is gone.
    """
    uris = read_artifact_uris(paths.metadata)
    data = RunData(
        tables_dir=Path(result.tables_dir),
        interactions=Path(uris["InteractionGen", "examples"]),
        user_states=Path(uris["UserStateGen", "examples"]),
        catalogue=Path(uris["CatalogueGen", "examples"]),
        transform_graph=Path(uris["Transform", "transform_graph"]),
    )
    for folder in (
        data.tables_dir,
        data.interactions,
        data.user_states,
        data.catalogue,
        data.transform_graph,
    ):
        if not folder.is_dir():
            raise DataError(f"{folder} is gone; 'funnel run' with the same settings makes it again")
    return data
