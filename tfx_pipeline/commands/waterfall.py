"""`funnel waterfall`: where the funnel lost what test users went on to choose."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from tfx_pipeline.commands.common import CONSOLE, output_dir_option, say
from tfx_pipeline.config import RANKING, RETRIEVAL, RunPaths


@click.command()
@click.option("--k", type=click.IntRange(min=1), default=20, show_default=True, help="Items shown.")
@click.option(
    "--num-candidates",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Items that the ranker scores.",
)
@click.option(
    "--users", type=click.IntRange(min=1), default=500, show_default=True, help="Test users to follow."
)
@click.option(
    "--json",
    "json_dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write waterfall.json to.",
)
@output_dir_option
def waterfall(k: int, num_candidates: int, users: int, json_dir: Path | None, output_dir: Path) -> None:
    """Show which stage lost each thing that test users went on to choose.

    Asks the models that the last run trained, pushed or not, for a sample of the users with a positive in the
    test split, as of the end of training.

    \b
    Examples:
      funnel waterfall --output-dir runs/kuairand
      funnel waterfall --num-candidates 300 --k 10 --users 2000
    """
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.run_result import read_run

    quiet_libraries(None)
    result = read_run(output_dir)
    config = result.config
    depth = config.retrieval.max_k
    if not k <= num_candidates <= depth:
        raise click.UsageError(
            f"--k {k} <= --num-candidates {num_candidates} <= retrieval.max_k {depth} was expected"
        )
    with CONSOLE.status("loading TensorFlow …") as status:
        from tfx_pipeline.outcome import read_artifact_uris
        from tfx_pipeline.waterfall import FunnelSettings, measure_waterfall
        from trainer.waterfall import SHOWN, Waterfall, write_waterfall

        quiet_libraries(None)
        uris = read_artifact_uris(RunPaths(output_dir).metadata)
        status.update("asking the models …")
        found: Waterfall = measure_waterfall(
            Path(result.tables_dir),
            result.user_states,
            {
                name: Path(uris[f"Trainer.{name}", "model"]) / "Format-Serving"
                for name in (RETRIEVAL, RANKING)
            },
            config.dataset,
            FunnelSettings(depth, k, num_candidates, users),
        )
    say(
        f"[bold]{result.dataset}[/bold]: {found.whole.num_positives:,} positives of {found.num_users:,} of "
        f"{found.num_users_with_positives:,} test users; grey: {found.confidence:.0%} intervals over users"
    )
    table = Table()
    table.add_column("slice", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("positives", justify="right")
    for name in (*found.whole.lost, f"shown in {k}"):
        table.add_column(name, justify="right")
    before = ""
    for part in found.slices:
        ((dimension, value),) = part.slice.items() or [("all", "")]
        if dimension != before:
            table.add_section()
        cells = []
        for end, count in {**part.lost, SHOWN: part.shown}.items():
            cells.append(f"{count / part.num_positives:.1%}" if part.num_positives else "")
            if end in part.bounds:
                low, high = part.bounds[end]
                cells[-1] += f"\n[dim]{100 * low:.1f}–{100 * high:.1f}[/dim]"
        heading = dimension if dimension != before else ""
        table.add_row(
            heading, escape(value), f"{part.num_positives:,}", *cells, style="" if part.slice else "bold"
        )
        before = dimension
    CONSOLE.print(table)
    for source in found.sources:
        shares = [
            f"{share:.1%} also by {other}" for other, share in source.overlap.items() if share is not None
        ]
        recall, unique = (
            "none to find" if value is None else f"{value:.1%}"
            for value in (source.recall, source.unique_recall)
        )
        say(
            f"  source {source.name}, {source.depth} candidates: finds {recall} of what may be found, "
            f"{unique} by it alone{'; of its hits ' + ', '.join(shares) if shares else ''}"
        )
    if json_dir is not None:
        write_waterfall(found, json_dir)
        say(f"  → {escape(str(json_dir))}")
