"""`funnel off-policy`: what the ranker's first choice would have earned."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from schema.errors import PoorSupportError
from tfx_pipeline.commands.common import CONSOLE, output_dir_option, say
from tfx_pipeline.config import RANKING, RunPaths


@click.command("off-policy")
@click.option("--reward", metavar="LABEL", help="Default: the dataset's positive.")
@click.option(
    "--epsilon",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the picks that are uniformly random instead of the ranker's first choice.",
)
@click.option(
    "--model-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a ranking SavedModel. Default: the newest pushed one.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the estimates here."
)
@output_dir_option
def off_policy(
    reward: str | None,
    epsilon: float,
    model_dir: Path | None,
    json_file: Path | None,
    output_dir: Path,
) -> None:
    """Estimate what the ranker's first choice would have earned on the test split's exploration screens.

    On a uniformly random screen every order of its items was equally likely, so that the reward of the item
    which the ranker would have picked is estimated without bias, although the ranker never ran. Beside its
    score, each of its tasks and popularity pick as well. Refuses where the log has too few such screens.

    \b
    Examples:
      funnel off-policy
      funnel off-policy --reward watch_time_s --epsilon 0.1 --json off-policy.json
    """
    from rich.progress import Progress

    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.run_result import read_run

    quiet_libraries(None)
    run = read_run(output_dir)
    label = reward if reward is not None else run.config.dataset.positive
    with CONSOLE.status("loading TensorFlow …"):
        from tfx_pipeline.off_policy import evaluate_ranker
        from tfx_pipeline.recommend import serving_folder
        from trainer.facts_file import write_facts
        from trainer.off_policy import IPS
    with Progress(console=CONSOLE, transient=True) as progress:
        task = progress.add_task("rows", total=None)
        found = evaluate_ranker(
            Path(run.tables_dir),
            run.config.dataset,
            model_dir or serving_folder(run, RunPaths(output_dir), RANKING),
            max_positives_per_user=run.config.examples.max_positives_per_user,
            reward=label,
            epsilon=epsilon,
            on_progress=lambda done: progress.update(task, completed=done),
        )
    if not found.estimates:
        raise PoorSupportError("; ".join(dict.fromkeys(found.refused.values())))
    estimates = list(found.estimates.values())
    logged, support = estimates[0].logged, estimates[0].support
    table = Table(title=f"{label} per impression, {logged.confidence:.0%} intervals over users")
    for name in ("picked by", "value", "interval", "against a random pick", "interval", "p", "effective"):
        table.add_column(name, justify="left" if name == "picked by" else "right")
    for name, estimate in found.estimates.items():
        value, gain = estimate.values[IPS], estimate.gains[IPS]
        table.add_row(
            name,
            f"{value.value:.4g}",
            f"{value.low:.4g} to {value.high:.4g}",
            f"{gain.value:+.4g}",
            f"{gain.low:+.4g} to {gain.high:+.4g}",
            f"{gain.p_value:.2g}",
            f"{estimate.support.effective_samples:,.0f}",
        )
    table.add_row("chance", f"{logged.value:.4g}", f"{logged.low:.4g} to {logged.high:.4g}")
    table.caption = "effective: rows of equal weight that would tell as much"
    CONSOLE.print(table)
    for name, why in found.refused.items():
        say(f"  {name}: {escape(why)}")
    say(f"  {support.num_rows:,} impressions of {support.num_users:,} users on uniformly random screens")
    if json_file is not None:
        write_facts(found, json_file)
        say(f"  → {escape(str(json_file))}")
