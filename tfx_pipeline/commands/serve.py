"""`funnel serve`, `funnel refresh-index`: the pushed models behind a server, and newer items in them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from tfx_pipeline.commands.common import CONSOLE, GRPC_PORT, REST_PORT, output_dir_option, say
from tfx_pipeline.commands.pipeline import failures_explained
from tfx_pipeline.config import BUNDLES, RunPaths

_ITEMS_NAMED = 5


@click.command()
@click.option("--port", default=GRPC_PORT, show_default=True, help="gRPC port; 0 picks a free one.")
@click.option("--rest-api-port", default=REST_PORT, show_default=True, help="REST port; 0 picks a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@output_dir_option
@click.argument("flags", metavar="[-- SERVER FLAGS]", nargs=-1, type=click.UNPROCESSED)
def serve(port: int, rest_api_port: int, host: str, output_dir: Path, flags: tuple[str, ...]) -> None:
    """Serve the pushed models over TensorFlow Serving's gRPC and REST API until Ctrl-C.

    What follows -- goes to the server as it is: `python -m serving.model_server --help` lists its flags,
    which are those of TensorFlow Serving.

    \b
    Examples:
      funnel serve
      funnel serve --output-dir runs/kuairand --port 9500 --rest-api-port 9501
      funnel serve -- --num_workers=2 --enable_batching
      curl http://127.0.0.1:8501/v1/models/funnel
    """
    # TensorFlow reads it when it is imported, which here is before the server could set it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from serving.config import format_model_config
    from serving.model_server import main as serve_models
    from tfx_pipeline.recommend import serving_folder
    from tfx_pipeline.run_result import read_run
    from trainer.fingerprint import Fingerprint, check_together

    paths = RunPaths(output_dir)
    result = read_run(output_dir)
    bases = {name: (paths.serving_models / name).resolve() for name in BUNDLES}
    check_together({name: Fingerprint.read(serving_folder(result, paths, name)) for name in BUNDLES})
    config_file = paths.serving_models / "models.config"
    config_file.write_text(format_model_config(bases), encoding="utf-8")
    sys.exit(
        serve_models(
            [
                f"--host={host}",
                f"--port={port or 'auto'}",
                f"--rest_api_port={rest_api_port or 'auto'}",
                f"--model_config_file={config_file}",
                *flags,
            ]
        )
    )


@click.command("refresh-index")
@click.option(
    "--items",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV or Parquet file of new and changed items, in the dataset's own format; may be repeated. "
    "All other items stay as they are.",
)
@click.option(
    "--data-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the dataset's source files, with its whole items table: items that are not in it are "
    "removed.",
)
@output_dir_option
def refresh_index(items: tuple[Path, ...], data_dir: Path | None, output_dir: Path) -> None:
    """Bring newer items into the pushed models, without training.

    Publishes all five bundles under one new version: retrieval with vectors of new and changed items and an
    index over all, ranking with the same catalogue, and what is built of the two. A running server takes them
    up by itself. Nothing is published when no item is new, changed or removed.

    \b
    Examples:
      funnel refresh-index --items new_items.csv
      funnel refresh-index --output-dir runs/my-shop --data-dir ~/data
    """
    if bool(items) == (data_dir is not None):
        raise click.UsageError("give one of --items FILE (new or changed items) and --data-dir DIR (all)")
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.local_runner import run_lock
    from tfx_pipeline.run_result import read_run

    started = time.monotonic()
    paths = RunPaths(output_dir)
    result = read_run(output_dir)
    files = items if data_dir is None else [data_dir / name for name in result.config.dataset.items.files]
    with run_lock(paths), failures_explained(paths):
        quiet_libraries(paths.log_file)
        with CONSOLE.status("loading TensorFlow …") as status:
            from tfx_pipeline.refresh import refresh_index as refresh

            quiet_libraries(paths.log_file)
            done = refresh(
                result, paths, files, data_dir is not None, lambda phase: status.update(f"{phase} …")
            )
    _print_refresh(done, time.monotonic() - started)


def _print_refresh(done: Any, total_s: float) -> None:
    change = done.change
    counts = {"added": change.added, "changed": change.changed, "removed": change.removed}
    for name, item_ids in counts.items():
        if item_ids:
            more = ", …" if len(item_ids) > _ITEMS_NAMED else ""
            say(f"  {name}: {len(item_ids):,} ({escape(', '.join(item_ids[:_ITEMS_NAMED]))}{more})")
    say(
        f"  catalogue: {done.num_items:,} items, {done.num_untrained:,} of them not met in training: "
        "their vectors come from their content"
    )
    if done.index is None:
        say("nothing changed: no new version")
        return
    say(f"  index: recall@{done.index.k} {done.index.recall:.4f} against exact search")
    for model in BUNDLES:
        say(f"  [green]published[/green]: {model} version {done.version}")
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.seconds.items())
    say(f"done in {total_s:.0f} s: {phases}")
