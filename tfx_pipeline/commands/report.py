"""`funnel report`: what the last run decided."""

from __future__ import annotations

from pathlib import Path

import click

from schema.errors import FunnelError
from tfx_pipeline.commands.common import CONSOLE, output_dir_option
from tfx_pipeline.commands.pipeline import print_decision


@click.command()
@output_dir_option
def report(output_dir: Path) -> None:
    """Say what the last run decided and where its report is.

    \b
    Example:
      funnel report --output-dir runs/kuairand
    """
    from tfx_pipeline.run_result import read_run

    result = read_run(output_dir)
    if not Path(result.report).is_file():
        raise FunnelError(
            f"{result.report} is gone; "
            f"'funnel run --output-dir {output_dir}' with the same settings restores it"
        )
    CONSOLE.print(f"[bold]{result.dataset}[/bold]")
    print_decision(result)
