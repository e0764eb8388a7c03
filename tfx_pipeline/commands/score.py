"""`funnel batch-score`, `funnel score-weights`: the ranker on a file of impressions."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.markup import escape

from tfx_pipeline.commands.common import CONSOLE, output_dir_option, say
from tfx_pipeline.config import (
    RunPaths,
    load_run_config,
)


@click.command("batch-score")
@click.option(
    "--interactions",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="CSV or Parquet of impressions, in the dataset's own source format; labels may be absent.",
)
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Parquet file to write."
)
@click.option(
    "--online-history",
    is_flag=True,
    help="A row also knows the eval split and the rows of the file with an earlier time, labels included, as "
    "a live system would. Default: the train split alone.",
)
@click.option(
    "--model-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a ranking SavedModel. Default: the newest pushed one.",
)
@output_dir_option
def batch_score(
    interactions: Path, out: Path, online_history: bool, model_dir: Path | None, output_dir: Path
) -> None:
    """Write the ranking model's predictions for every row of a file of impressions.

    One row out per row in, in the same order. Columns: user_id, item_id, event_time_unix_s, item_is_known,
    user_is_known, one per task, score, and label_<name> for each label that the file has.

    \b
    Examples:
      funnel batch-score --interactions impressions.csv --out preds.parquet
      funnel batch-score --interactions last_week.parquet --online-history --out preds.parquet
    """
    from rich.progress import Progress

    from schema.tables import read_interactions
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.run_result import read_run

    if out.resolve() == interactions.resolve():
        raise click.UsageError(f"--out {out} is the file that is read; give another name")
    quiet_libraries(None)
    result = read_run(output_dir)
    started = time.monotonic()
    rows = read_interactions(result.config.dataset, interactions)
    with CONSOLE.status("loading TensorFlow …"):
        from tfx_pipeline.batch_score import batch_score as write_scores
    with Progress(console=CONSOLE) as progress:
        task = progress.add_task("rows", total=len(rows.table))
        scored = write_scores(
            result,
            RunPaths(output_dir),
            rows,
            out,
            online_history,
            model_dir,
            lambda n: progress.update(task, completed=n),
        )
    say(f"{scored.num_rows:,} rows → {escape(str(out))} in {time.monotonic() - started:.1f} s")
    known = "earlier rows of the file, the eval split and " if online_history else ""
    say(f"  histories and counters: from {known}the train split, which ends {_utc(scored.train_end_unix_s)}")
    if rows.absent:
        say(f"  [yellow]not in the file, so missing[/yellow]: {', '.join(rows.absent)}")
    for what, count in (
        ("item not in the catalogue", scored.num_unknown_items),
        ("user without training events", scored.num_unknown_users),
    ):
        if count:
            say(f"  [yellow]{what}[/yellow]: {count:,} {'row' if count == 1 else 'rows'}")


def _utc(time_unix_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_unix_s))


@click.command("score-weights")
@click.option(
    "--predictions",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Parquet of impressions: user_id, a column per task, labels; 'funnel batch-score' writes it.",
)
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    metavar="LABEL",
    help="A label to serve, such as click or watch_time_s; give at least two.",
)
@click.option(
    "--dataset",
    metavar="NAME|YAML",
    help="Where tasks and present weights are declared: a built-in dataset, or a run YAML. "
    "Default: the dataset of the run in --output-dir.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="TASK=W,...",
    help="Weights to compare with the present ones; tasks not named keep theirs. May be repeated.",
)
@click.option(
    "--list-by",
    default="user",
    show_default=True,
    metavar="user|user-day|COLUMN",
    help="What is ranked together: the impressions of a user, of a user's local day, or of a COLUMN's value.",
)
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Ranks of a list that count."
)
@click.option(
    "--points",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Weights to try beside those given, at most.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write every point here."
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw every point here (.svg or .png).",
)
@output_dir_option
def score_weights(
    predictions: Path,
    objectives: tuple[str, ...],
    dataset: str | None,
    weights: tuple[str, ...],
    list_by: str,
    top: int,
    points: int,
    json_file: Path | None,
    plot_file: Path | None,
    output_dir: Path,
) -> None:
    """Show what other score weights would trade, on logged predictions, without training.

    Re-ranks every list of impressions by the score of each choice of weights and averages the labels by rank.
    It does not estimate what users would have done in front of the new order.

    \b
    Examples:
      funnel score-weights --predictions preds.parquet --objective click --objective watch_time_s
      funnel score-weights --predictions preds.parquet --objective click --objective like \\
          --weights like=4 --list-by user-day --plot trade-off.svg --output-dir runs/kuairand
    """
    from tfx_pipeline import score_weights as module
    from tfx_pipeline.run_result import read_run
    from trainer.score import formula, parse_weights

    if plot_file is not None:
        module.check_plot_suffix(plot_file)
    spec = (load_run_config(dataset) if dataset is not None else read_run(output_dir).config).dataset
    given = [(module.GIVEN, parse_weights(text, spec.tasks)) for text in weights]
    with CONSOLE.status("re-ranking …"):
        impressions, found = module.read_impressions(predictions, spec, objectives, list_by)
        sampled = [(module.SAMPLED, w) for w in module.sample_weights(spec.tasks, impressions, points)]
        result = module.trade_off(impressions, found, spec.tasks, [*given, *sampled], top)
    say(
        f"{result.num_impressions:,} impressions in {result.num_lists:,} lists by {escape(list_by)}; "
        f"{result.num_single:,} lists of one impression left out; the first {top} ranks count"
    )
    say(f"  now: {escape(formula(spec.tasks))}")
    CONSOLE.print(module.trade_off_table(result))
    present, *others = result.points
    say(
        f"  the present weights are {'' if present.is_dominated else 'not '}dominated by others; "
        f"{sum(point.is_dominated for point in others):,} dominated points are not shown"
    )
    say(f"  [yellow]{module.CAVEAT}[/yellow]")
    for path, write in ((json_file, module.write_json), (plot_file, module.write_plot)):
        if path is not None:
            write(result, path)
            say(f"  → {escape(str(path))}")
