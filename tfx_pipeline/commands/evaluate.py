"""`funnel evaluate`: the last run's models judged again, or trained again with other seeds and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from tfx_pipeline.commands.common import CONSOLE, add_to_report, output_dir_option, say
from tfx_pipeline.config import MODELS, RETRIEVAL, RunPaths

if TYPE_CHECKING:
    from tfx_pipeline.gates import Validation
    from tfx_pipeline.run_result import RunResult
    from trainer.comparison import Comparison

# Of a difference: sign, four decimals, star.
_NUMBER_WIDTH = 8


@click.command()
@click.option(
    "--model",
    "models",
    type=click.Choice(MODELS),
    multiple=True,
    help="Judge this model alone; default both.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=2),
    help="Train each model so many times again, with other seeds, and show the spread here and in the "
    "report. Publishes no model.",
)
@click.option(
    "--slices", type=click.IntRange(min=0), default=5, show_default=True, help="Worst slices to show."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the figures here.",
)
@output_dir_option
def evaluate(
    models: tuple[str, ...], seeds: int | None, slices: int, json_file: Path | None, output_dir: Path
) -> None:
    """Judge the last run's models again: metrics with intervals, against the baselines, and every gate.

    \b
    Examples:
      funnel evaluate --output-dir runs/kuairand
      funnel evaluate --model ranking --slices 20
      funnel evaluate --model retrieval --seeds 5 --json seeds.json
    """
    from tfx_pipeline.console import quiet_libraries
    from tfx_pipeline.run_result import read_run

    quiet_libraries(None)
    run, paths = read_run(output_dir), RunPaths(output_dir)
    found: dict[str, Any] = {}
    for model in models or MODELS:
        if seeds is None:
            found[model] = _judge_and_show(model, run, paths, slices)
        else:
            found[model] = _spread_over_seeds(model, run, paths, seeds)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        say(f"figures → {escape(str(json_file))}")
    if seeds is not None:
        add_to_report(paths.report, seeds=found)


def _judge_and_show(model: str, run: RunResult, paths: RunPaths, slices: int) -> dict[str, Any]:
    import dataclasses

    from tfx_pipeline.console import shown

    with shown(f"judging the {model} model", CONSOLE):
        from tfx_pipeline.rejudge import judge_again

        comparison, validation = judge_again(model, run, paths)
    CONSOLE.print(_metrics_table(comparison))
    for rival in comparison.rivals:
        if rival.note:
            say(f"  {rival.name}: {escape(rival.note)}")
    for name, why in comparison.absent.items():
        say(f"  {name}: {escape(why)}")
    if slices:
        CONSOLE.print(_slices_table(comparison, slices))
    CONSOLE.print(_gates_table(validation))
    verdict = "passes every gate" if validation.blessed else f"not blessed: {validation.reason}"
    say(f"{model}: {escape(verdict)}")
    return {"comparison": dataclasses.asdict(comparison), "gates": dataclasses.asdict(validation)}


def _metrics_table(comparison: Comparison) -> Table:
    whole = comparison.whole
    interval = f"{100 * comparison.confidence:g} % interval"
    title = f"{comparison.model}: {whole.num_users:,} users, whole test split"
    table = Table(title=title, box=SIMPLE_HEAD, padding=0)
    # With a space, so that the name of a task and that of its metric can stand below each other.
    names = [metric.key.removeprefix(f"{comparison.model}/").replace("/", " ") for metric in whole.metrics]
    table.add_column("metric", min_width=max(len(word) for name in names for word in name.split()))
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column(interval, justify="right", no_wrap=True)
    for rival in comparison.rivals:
        # One word a line: a column is no wider than it has to be, and no word is broken.
        heading = rival.name.replace("_", "\n")
        table.add_column(heading, justify="right", no_wrap=True, min_width=_NUMBER_WIDTH)
    for name, metric in zip(names, whole.metrics, strict=True):
        against = (metric.against.get(rival.name) for rival in comparison.rivals)
        differences = [
            "" if a is None or a.difference is None else f"{_difference(a.difference)}{_star(a.p_value)}"
            for a in against
        ]
        table.add_row(name, _number(metric.value), _range(metric.low, metric.high), *differences)
    table.caption = "differences: model − rival; * p < 0.05, paired bootstrap over users"
    return table


def _slices_table(comparison: Comparison, limit: int) -> Table:
    from trainer.comparison import LAST_BLESSED

    table = Table(title=f"worst slices by {comparison.headline}")
    for name in ("slice", "users", "value", "interval", "change since last blessed", ""):
        table.add_column(name, justify="left" if name in ("slice", "") else "right")
    for part in comparison.slices[1 : limit + 1]:
        metric = part.metric(comparison.headline)
        if metric is not None:
            change = metric.against.get(LAST_BLESSED)
            shown = (
                "" if change is None else f"{_number(change.difference)} {_range(change.low, change.high)}"
            )
            note = "; ".join(filter(None, (part.note, metric.note)))
            value, interval = _number(metric.value), _range(metric.low, metric.high)
            table.add_row(escape(part.name), f"{part.num_users:,}", value, interval, shown, escape(note))
    return table


def _gates_table(validation: Validation) -> Table:
    table = Table(title=f"{validation.model}: gates")
    table.add_column("verdict")
    table.add_column("gate and reason")
    for gate in validation.gates:
        table.add_row(gate.verdict.value, escape(gate.reason))
    return table


def _spread_over_seeds(
    model: str, run: RunResult, paths: RunPaths, seeds: int
) -> dict[str, list[float | None]]:
    """Metric key -> its value for each seed, 0 to seeds − 1."""
    import statistics

    from tfx_pipeline.console import shown

    values: dict[str, list[float | None]] = {}
    for seed in range(seeds):
        with shown(f"training the {model} model with seed {seed}, {seed + 1} of {seeds}", CONSOLE):
            from tfx_pipeline.rejudge import figures_of_seed

            for key, value in figures_of_seed(model, run, paths, seed).items():
                values.setdefault(key, []).append(value)
    unit = "user" if model == RETRIEVAL else "row"
    table = Table(title=f"{model}: {seeds} seeds on the same examples")
    for name in ("metric", "mean", "standard deviation", "smallest", "largest"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for key, found in values.items():
        known = [value for value in found if value is not None]
        if len(known) > 1:
            numbers = (statistics.mean(known), statistics.stdev(known), min(known), max(known))
            table.add_row(key, *map(_number, numbers))
    table.caption = f"spread of training, not of the {unit}s judged; a gate's max_drop should be wider"
    CONSOLE.print(table)
    return values


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def _difference(value: float) -> str:
    """At most seven characters."""
    return f"{value:+.4f}" if abs(value) < 10 else f"{value:+.0f}"


def _range(low: float | None, high: float | None) -> str:
    """An interval; none where all users have the same value, which says nothing of others."""
    return "" if low is None or high is None or low == high else f"{_number(low)}–{_number(high)}"


def _star(p_value: float | None) -> str:
    return "*" if p_value is not None and p_value < 0.05 else " "
