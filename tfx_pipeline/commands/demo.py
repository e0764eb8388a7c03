"""`funnel demo`, `funnel doctor`: the whole system once, and whether this machine is fit for it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import click
from rich.markup import escape

from tfx_pipeline.commands.common import CONSOLE, GRPC_PORT, REST_PORT, output_dir_option, say
from tfx_pipeline.commands.pipeline import DEFAULT_CACHE_DIR, run_and_report
from tfx_pipeline.commands.recommend import show_recommendations
from tfx_pipeline.config import (
    MODELS,
    RunPaths,
    load_run_config,
)


@click.command()
@output_dir_option
def demo(output_dir: Path) -> None:
    """The whole system on the simulated data: run, serve, recommend over gRPC and REST, stop.

    \b
    Example:
      funnel demo
    """
    paths = RunPaths(output_dir)
    run_and_report(load_run_config("simulated"), paths, None, DEFAULT_CACHE_DIR)

    from serving.process import ModelServerProcess
    from tfx_pipeline.recommend import serving_folder
    from tfx_pipeline.run_result import read_run
    from tfx_pipeline.user_states import read_user_states
    from trainer import features

    result = read_run(output_dir)
    for model in MODELS:
        serving_folder(result, paths, model)
    states = itertools.islice(read_user_states([result.user_states], result.config.dataset), 1_000)
    user_id = max(states, key=lambda state: len(state.query.get(features.HISTORY, ()))).user_id
    CONSOLE.print("starting the model server …")
    with ModelServerProcess({model: paths.serving_models / model for model in MODELS}) as server:
        CONSOLE.print(f"model server: {server.grpc_target}  {server.rest_target}")
        for address in (server.grpc_target, server.rest_target):
            show_recommendations(result, paths, user_id, 10, address, include_seen=False)
    CONSOLE.print("model server stopped")
    say(f"\nreport: [bold]{escape(result.report)}[/bold]")
    say(
        "next: [bold].venv/bin/funnel serve[/bold], "
        f"then [bold].venv/bin/funnel recommend --user-id {escape(user_id)}[/bold]; "
        "your own data: docs/own-data.md"
    )


@click.command()
@output_dir_option
def doctor(output_dir: Path) -> None:
    """Check interpreter, libraries, processor, ports and disk, and say the fix for what is wrong.

    \b
    Example:
      funnel doctor
    """
    from tfx_pipeline.doctor import render, run_checks

    with CONSOLE.status("checking; loading TensorFlow and ScaNN takes a while …"):
        checks = run_checks(output_dir, (GRPC_PORT, REST_PORT))
    CONSOLE.print(render(checks))
    if any(check.status == "fail" for check in checks):
        sys.exit(1)
