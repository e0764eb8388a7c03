"""`funnel report`: what the last run decided, and two runs side by side."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from schema.errors import FunnelError
from tfx_pipeline.commands.common import CONSOLE, output_dir_option, say
from tfx_pipeline.commands.pipeline import print_decision
from tfx_pipeline.config import RunPaths


@click.command()
@output_dir_option
@click.option(
    "--compare",
    nargs=2,
    metavar="RUN_A RUN_B",
    help="Write a page that holds run B against run A. A run is an output directory, the folder of a report, "
    "or the id of a run in --output-dir.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("compare.html"),
    show_default=True,
    help="The page that --compare writes.",
)
def report(output_dir: Path, compare: tuple[str, str] | None, out: Path) -> None:
    """Say what the last run decided and where its report is, or compare two runs.

    \b
    Examples:
      funnel report --output-dir runs/kuairand
      funnel report --compare runs/before runs/after --out compare.html
      funnel report --output-dir runs/kuairand --compare 20261127T090000Z 20261128T090000Z
    """
    if compare:
        _compare(*compare, RunPaths(output_dir).report, out)
        return
    from tfx_pipeline.report.runs_page import RUNS_PAGE
    from tfx_pipeline.run_result import read_run

    result = read_run(output_dir)
    page = Path(result.report)
    if not page.is_file():
        raise FunnelError(
            f"{page} is gone; 'funnel run --output-dir {output_dir}' with the same settings restores it"
        )
    CONSOLE.print(f"[bold]{result.dataset}[/bold]")
    print_decision(result)
    if (page.parent / RUNS_PAGE).is_file():
        say(f"  all runs: {escape(str(page.parent / RUNS_PAGE))}")


def _compare(run_a: str, run_b: str, report_dir: Path, out: Path) -> None:
    from tfx_pipeline.report.comparison_page import comparability, render_comparison
    from tfx_pipeline.report.differences import differences
    from tfx_pipeline.report.history import find_run
    from tfx_pipeline.report.templating import write_files

    a, b = find_run(run_a, report_dir), find_run(run_b, report_dir)
    if a == b:
        raise FunnelError(f"{run_a} and {run_b} are the same run, {a.run_id}; there is nothing to compare")
    write_files({out.name: render_comparison(a, b)}, out.resolve().parent)
    say(comparability(differences(a, b)))
    say(f"  comparison: {escape(str(out.resolve()))}")
