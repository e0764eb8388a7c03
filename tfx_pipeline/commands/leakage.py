"""`funnel lint-leakage`: does a finished run hold anything that nobody could have known at the time?"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from rich.markup import escape

from tfx_pipeline.commands.common import CONSOLE, add_to_report, output_dir_option, say
from tfx_pipeline.config import RunPaths


@click.command("lint-leakage")
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Examples per split, user states and items to recompute from the tables.",
)
@click.option(
    "--max-auc",
    type=click.FloatRange(0.5, 1.0),
    default=0.9,
    show_default=True,
    help="A feature that alone orders a label better than this is taken for a leak.",
)
@click.option(
    "--inflation/--no-inflation",
    default=True,
    show_default=True,
    help="Train cheap models to show what leaking protocols would add to the figures.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the findings go, besides the report. Default: leakage.json in the output directory.",
)
@output_dir_option
def lint_leakage(
    examples: int, max_auc: float, inflation: bool, json_file: Path | None, output_dir: Path
) -> None:
    """Look for leaks in a finished run. Exit code 1 if there is one.

    Recomputes sampled examples from the contract tables as of their events and compares; checks that the
    past ends before each event, that splits follow each other in time, that no feature alone tells a label,
    and that vocabularies and quantiles are those of train.

    \b
    Examples:
      funnel lint-leakage --output-dir runs/kuairand
      funnel lint-leakage --no-inflation --examples 1000
    """
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.run_result import read_run

    quiet_libraries(None)
    result = read_run(output_dir)
    paths = RunPaths(output_dir)
    started = time.monotonic()
    with CONSOLE.status("loading TensorFlow …") as status:
        from tfx_pipeline.leakage import display
        from tfx_pipeline.leakage.findings import write_report
        from tfx_pipeline.leakage.lint import LintSettings, lint
        from tfx_pipeline.leakage.run_data import run_data

        quiet_libraries(None)
        report = lint(
            result.config.dataset,
            result.config.examples.max_positives_per_user,
            run_data(result, paths),
            LintSettings(recomputed=examples, max_auc=max_auc, inflation=inflation),
            lambda step: status.update(f"{step} …"),
        )
    path = json_file or paths.leakage_file
    write_report(report, path)
    for table in display.tables(report):
        CONSOLE.print(table)
    say(f"{display.verdict(report)}; {time.monotonic() - started:.0f} s → {escape(str(path))}")
    add_to_report(paths.report, leakage=report)
    sys.exit(0 if report.passed else 1)
