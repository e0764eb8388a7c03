"""Runs the pipeline on this machine: prepares the tables, holds the lock, shows progress, leaves run.json."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from google.protobuf import text_format

from schema.errors import DataError, FunnelError
from schema.tables import TablesSummary, prepare_tables, read_summary
from tfx_pipeline.config import BUNDLES, MODELS, RunConfig, RunPaths
from tfx_pipeline.datasets.archives import ARCHIVES, prepare_source
from tfx_pipeline.datasets.simulator import DEFAULT, TINY, simulate
from tfx_pipeline.run_result import ComponentTiming, RunResult, write_run
from trainer.version import __version__

# A run writes the tables, the examples and a few copies of the models.
_MIN_FREE_BYTES = 2 * 1024**3
_SIMULATED = "simulated"


class RunInProgressError(FunnelError):
    """Another run holds the output directory."""


@contextlib.contextmanager
def run_lock(paths: RunPaths) -> Iterator[None]:
    """Holds the output directory for one run; the lock ends with the process, however it ends.

    Raises:
      RunInProgressError: another process holds it.
    """
    paths.output_dir.mkdir(parents=True, exist_ok=True)
    with paths.lock_file.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunInProgressError(
                f"another run (process {_holder(file)}) is using {paths.output_dir}; "
                "wait for it, or give another --output-dir"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "unknown"


def prepare(config: RunConfig, paths: RunPaths, data_dir: Path | None, cache_dir: Path) -> Path:
    """Brings the source files, checks them and writes the contract tables.

    Args:
      config: the run.
      paths: its folders.
      data_dir: source files given on the command line; replaces the configuration's.
      cache_dir: where downloaded and unpacked archives are kept between runs.

    Returns:
      The folder of the contract tables, with schema.pbtxt beside them.

    Raises:
      DataError: the directory is another dataset's, the disk is too full, the source breaks the contract.
    """
    _claim(paths, config.dataset.name)
    free = shutil.disk_usage(paths.output_dir).free
    if free < _MIN_FREE_BYTES:
        raise DataError(
            f"{paths.output_dir} has {free / 1024**3:.1f} GiB free, "
            f"a run needs {_MIN_FREE_BYTES / 1024**3:.0f} GiB; free some space or give another --output-dir"
        )
    tables_dir = prepare_tables(config.dataset, _source_dir(config, paths, data_dir, cache_dir), paths.tables)
    summary = read_summary(tables_dir)
    positives, batch_size = summary.positives["train"], config.retrieval.batch_size
    if positives < batch_size:
        raise DataError(
            f"{positives:,} train positives are fewer than one batch of {batch_size:,}; "
            f"lower it with --set retrieval.batch_size={max(2, positives // 8)}, or bring more data"
        )
    _write_schema(config, tables_dir)
    return tables_dir


def _claim(paths: RunPaths, dataset: str) -> None:
    """Keeps one output directory to one dataset: its models, metadata and report belong together."""
    if paths.dataset_file.is_file():
        owner = paths.dataset_file.read_text(encoding="utf-8").strip()
        if owner != dataset:
            raise DataError(
                f"{paths.output_dir} holds runs of dataset {owner!r}, not {dataset!r}; "
                "give another --output-dir"
            )
    else:
        paths.dataset_file.write_text(f"{dataset}\n", encoding="utf-8")


def _source_dir(config: RunConfig, paths: RunPaths, data_dir: Path | None, cache_dir: Path) -> Path:
    data_dir = data_dir or config.data_dir
    name = config.dataset.name
    if name == _SIMULATED:
        if data_dir is not None:
            raise DataError(f"dataset {name} is generated and takes no --data-dir, got {data_dir}")
        size = TINY if config.simulated.size == "tiny" else DEFAULT
        settings = (
            size if config.simulated.seed is None else dataclasses.replace(size, seed=config.simulated.seed)
        )
        destination = paths.source / f"{name}-{config.simulated.size}-{settings.seed}"
        if not destination.is_dir():
            destination.parent.mkdir(parents=True, exist_ok=True)
            simulate(settings, destination)
        return destination
    if name in ARCHIVES:
        return prepare_source(name, data_dir, cache_dir)
    if data_dir is None:
        raise DataError(f"dataset {name} needs its source files: give --data-dir, or data_dir in the YAML")
    if not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir} is not a folder")
    return data_dir


def _write_schema(config: RunConfig, tables_dir: Path) -> None:
    from trainer.tfx_schema import interactions_schema

    path = tables_dir / "schema.pbtxt"
    text = text_format.MessageToString(interactions_schema(config.dataset))
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def run_pipeline(
    config: RunConfig,
    paths: RunPaths,
    tables_dir: Path,
    on_start: Callable[[str], None],
    on_finish: Callable[[ComponentTiming], None],
) -> RunResult:
    """Runs all components in this process; unchanged ones are reused from the cache.

    Args:
      config: the run.
      paths: its folders; the caller holds `run_lock`.
      tables_dir: from `prepare`.
      on_start: called with each component's id.
      on_finish: called with each component's timing.

    Raises:
      ComponentFailedError: a component raised any error.
    """
    from tfx.orchestration.local.local_dag_runner import LocalDagRunner

    from tfx_pipeline.pipeline import create_pipeline
    from tfx_pipeline.progress import timed_components

    pipeline = create_pipeline(config, locations(paths, tables_dir), metadata_path=str(paths.metadata))
    with timed_components(on_start, on_finish) as timings:
        LocalDagRunner().run(pipeline)
    result = _collect(config, paths, tables_dir, tuple(timings))
    write_run(result, paths.output_dir)
    return result


def code_version() -> str:
    """The version and a hash of Funnel's sources: edited code gives new results, not cached ones."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in ("schema", "trainer", "serving", "tfx_pipeline"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def locations(paths: RunPaths, tables_dir: Path) -> Any:
    """The PipelineLocations of a local run."""
    from tfx_pipeline.components.pusher import newest_version
    from tfx_pipeline.outcome import latest_failed_infra
    from tfx_pipeline.pipeline import PipelineLocations

    summary: TablesSummary = read_summary(tables_dir)
    return PipelineLocations(
        tables_dir=str(tables_dir.resolve()),
        train_end_unix_s=summary.train_end_unix_s,
        pipeline_root=str(paths.pipeline_root.resolve()),
        serving_models=str(paths.serving_models.resolve()),
        code_version=code_version(),
        released={name: newest_version(str(paths.serving_models.resolve() / name)) for name in BUNDLES},
        failed_infra=latest_failed_infra(paths.metadata),
    )


def _collect(
    config: RunConfig, paths: RunPaths, tables_dir: Path, timings: tuple[ComponentTiming, ...]
) -> RunResult:
    """Reads the outcome of the newest run from ML Metadata, and shows its report."""
    from tfx_pipeline.outcome import read_outcome
    from tfx_pipeline.report.history import publish

    outcome = read_outcome(paths.metadata)
    # Also when the ReportWriter was reused: what lies there may be of another run, or gone.
    page = publish(Path(outcome.report_uri), paths.report, timings)
    return RunResult(
        dataset=config.dataset.name,
        config_json=config.model_dump_json(),
        tables_dir=str(tables_dir.resolve()),
        user_states=f"{outcome.user_states_uri}/Split-user_states/*.gz",
        blessed={model: outcome.blessed[model] for model in MODELS},
        pushed={model: outcome.pushed[model] for model in MODELS},
        reasons=outcome.reasons,
        report=str(page.resolve()),
        timings=timings,
    )
