"""What the commands share: the console, the option of the run's folder, default ports."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from schema.errors import DataError
from tfx_pipeline.config import BUILT_IN_CONFIGS, DEFAULT_OUTPUT_DIR

# A pipe or a file has no width of its own; tables need about this much.
CONSOLE = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
GRPC_PORT = 8500
REST_PORT = 8501
BUILT_IN = sorted(p.stem for p in BUILT_IN_CONFIGS.glob("*.yaml"))


def say(text: str) -> None:
    """Prints a text."""
    # Long lines are left to the terminal, so that paths and commands in them can be copied.
    CONSOLE.print(text, soft_wrap=True)


def add_to_report(report_dir: Path, **measured: Any) -> None:
    """Adds what a command measured to the report of the newest run, or says why it could not."""
    from tfx_pipeline.report.history import add_to_newest

    try:
        say(f"  report: {escape(str(add_to_newest(report_dir, **measured)))}")
    except DataError as error:
        say(f"  [yellow]not added to a report[/yellow]: {escape(str(error))}")


def output_dir_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --output-dir to a command."""
    return click.option(
        "--output-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=DEFAULT_OUTPUT_DIR,
        show_default=True,
        help="Folder of the run: tables, artifacts, metadata, pushed models, report.",
    )(command)
