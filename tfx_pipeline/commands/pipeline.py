"""`funnel run`, `funnel compile`: the pipeline here, and for Vertex AI."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from schema.errors import FunnelError
from tfx_pipeline.commands.common import BUILT_IN, CONSOLE, output_dir_option, say
from tfx_pipeline.config import (
    BUNDLES,
    MODELS,
    RunConfig,
    RunPaths,
    load_run_config,
)
from trainer.version import __version__

DEFAULT_CACHE_DIR = Path.home() / ".cache" / "funnel"


@click.command()
@click.option("--dataset", type=click.Choice(BUILT_IN), help="A built-in dataset.")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A run YAML of your own; see docs/own-data.md.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder (or archive) of the source files; replaces a download.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; may be repeated."
)
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_CACHE_DIR,
    show_default=True,
    help="Where downloaded and unpacked archives are kept between runs.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and the graph; run nothing.")
@output_dir_option
def run(
    dataset: str | None,
    config: Path | None,
    data_dir: Path | None,
    overrides: tuple[str, ...],
    cache_dir: Path,
    dry_run: bool,
    output_dir: Path,
) -> None:
    """Run the pipeline: data in, blessed models and a report out.

    \b
    Examples:
      funnel run --dataset simulated
      funnel run --dataset kuairand-pure --data-dir ~/data --output-dir runs/kuairand
      funnel run --config my.yaml --set retrieval.max_epochs=5
    """
    if (dataset is None) == (config is None):
        raise click.UsageError(f"give one of --dataset ({', '.join(BUILT_IN)}) and --config FILE")
    run_config = load_run_config(config or str(dataset), overrides)
    if dry_run:
        _print_plan(run_config, RunPaths(output_dir))
        return
    run_and_report(run_config, RunPaths(output_dir), data_dir, cache_dir)


def run_and_report(run_config: RunConfig, paths: RunPaths, data_dir: Path | None, cache_dir: Path) -> None:
    """Runs the pipeline with its progress shown, and says what was decided."""
    from tfx_pipeline.console import ComponentProgress, quiet_libraries
    from tfx_pipeline.local_runner import prepare, run_lock, run_pipeline

    started = time.monotonic()
    with run_lock(paths), failures_explained(paths):
        paths.log_file.unlink(missing_ok=True)
        quiet_libraries(paths.log_file)
        say(
            f"[bold]{escape(run_config.dataset.name)}[/bold] → {escape(str(paths.output_dir))}  "
            f"(log: {escape(str(paths.log_file))})"
        )
        with CONSOLE.status("checking the source data …"):
            tables_dir = prepare(run_config, paths, data_dir, cache_dir)
        _print_summary(tables_dir)
        progress = ComponentProgress(CONSOLE)
        with CONSOLE.status("loading TFX …"):
            import tfx_pipeline.pipeline  # noqa: F401
        quiet_libraries(paths.log_file)
        try:
            result = run_pipeline(run_config, paths, tables_dir, progress.started, progress.finished)
        finally:
            progress.stop()
    reused = sum(timing.cached for timing in result.timings)
    say(
        f"done in {time.monotonic() - started:.0f} s, "
        f"{reused} of {len(result.timings)} components reused from cache"
    )
    print_decision(result)


@contextlib.contextmanager
def failures_explained(paths: RunPaths) -> Iterator[None]:
    """Writes what ends a run to its log, and says where to look and what the next run does."""
    try:
        yield
    except KeyboardInterrupt:
        raise FunnelError(
            "interrupted; nothing half-written was pushed, and the next run reuses what was finished"
        ) from None
    except Exception as error:
        # Through the root logger, which writes to the file only: the person gets a few words.
        logging.getLogger().error("the run failed", exc_info=error)
        if _disk_is_full(error):
            raise FunnelError(
                f"the disk is full: {error}; free some space, the next run reuses what was finished"
            ) from error
        if isinstance(error, FunnelError) and error.__cause__ is None:
            raise
        text = str(error) if isinstance(error, FunnelError) else f"{type(error).__name__}: {error}"
        raise FunnelError(f"{text}\nmore about it: {paths.log_file}") from error


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        # TensorFlow and Arrow have errors of their own with the system's text.
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _print_summary(tables_dir: Path) -> None:
    from schema.tables import read_summary

    summary = read_summary(tables_dir)
    rows = ", ".join(f"{split} {count:,}" for split, count in summary.rows.items())
    CONSOLE.print(f"  interactions: {rows};  users {summary.users:,}, items {summary.items:,}")


def print_decision(result: Any) -> None:
    """Says of each model whether it was pushed, or why not, and where the report is."""
    for model in MODELS:
        version = result.pushed[model]
        if version:
            CONSOLE.print(f"  [green]blessed and pushed[/green]: {model} version {version}")
        else:
            reason = result.reasons.get(model, "see the report")
            say(f"  [yellow]not pushed[/yellow]: {model}: {escape(reason)}")
    say(f"  report: {escape(result.report)}")


def _print_plan(run_config: RunConfig, paths: RunPaths) -> None:
    import yaml

    from tfx_pipeline.console import quiet_libraries

    quiet_libraries(None)
    from tfx_pipeline.pipeline import PipelineLocations, create_pipeline

    placeholder = PipelineLocations(
        "<tables>",
        0,
        str(paths.pipeline_root),
        str(paths.serving_models),
        code_version=__version__,
        released=dict.fromkeys(BUNDLES, ""),
    )
    pipeline = create_pipeline(run_config, placeholder)
    CONSOLE.print(
        yaml.safe_dump(run_config.model_dump(mode="json"), sort_keys=False), markup=False, soft_wrap=True
    )
    for node in pipeline.components:
        upstream = ", ".join(sorted(n.id for n in node.upstream_nodes)) or "source tables"
        CONSOLE.print(f"{node.id:<22} ← {upstream}", markup=False, soft_wrap=True)


@click.command("compile")
@click.option("--target", type=click.Choice(["vertex"]), default="vertex", show_default=True)
@click.option("--dataset", type=click.Choice(BUILT_IN), help="A built-in dataset.")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="A run YAML of your own.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting; may be repeated."
)
@click.option("--tables-dir", required=True, help="Contract tables, for instance gs://bucket/tables.")
@click.option(
    "--train-end",
    required=True,
    type=int,
    help="End of training in unix seconds; train_end_unix_s of summary.json.",
)
@click.option(
    "--pipeline-root", required=True, help="Folder of the artifacts, for instance gs://bucket/root."
)
@click.option("--image", required=True, help="Container image with this repository installed.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("pipeline.json"), show_default=True
)
def compile_pipeline(
    target: str,
    dataset: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    tables_dir: str,
    train_end: int,
    pipeline_root: str,
    image: str,
    out: Path,
) -> None:
    """Compile the same pipeline for Vertex AI; needs the 'vertex' extra.

    \b
    Example:
      funnel compile --dataset simulated --tables-dir gs://b/tables --train-end 1700000000 \\
          --pipeline-root gs://b/root --image europe-docker.pkg.dev/p/r/funnel:0.1.0
    """
    if (dataset is None) == (config is None):
        raise click.UsageError(f"give one of --dataset ({', '.join(BUILT_IN)}) and --config FILE")
    from tfx_pipeline.console import quiet_libraries

    run_config = load_run_config(config or str(dataset), overrides)
    quiet_libraries(None)
    from tfx_pipeline.vertex_compiler import compile_for_vertex

    compile_for_vertex(run_config, tables_dir, train_end, pipeline_root, image, out)
    say(f"{target} pipeline → {escape(str(out))}")
