"""The page over all runs of an output directory: what became of each, and the metrics over time."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tfx_pipeline.config import MODELS
from tfx_pipeline.report import formatting, metric_keys, plots, views
from tfx_pipeline.report.facts import RunFacts
from tfx_pipeline.report.templating import render_template
from tfx_pipeline.report.verdicts import headline_key, verdict
from tfx_pipeline.report.views import Cell, Row, Table

RUNS_PAGE = "runs.html"
_SECTIONS = (("runs", "Runs"), ("metrics", "Metrics over time"))
_LINES_SHOWN = 6


def render_runs(runs: Sequence[RunFacts], unreadable: Sequence[str]) -> str:
    """The page.

    Args:
      runs: oldest first.
      unreadable: what is wrong with reports that are not among them.
    """
    newest = runs[-1] if runs else None
    return render_template(
        "runs.html.j2",
        newest,
        sections=_SECTIONS,
        runs_link="",
        dataset=views.dataset_name(newest) if newest else "no run",
        count=len(runs),
        table=_runs_table(runs),
        plots=[(name, plot) for name in MODELS if (plot := _trend(name, runs)) is not None],
        num_datasets=len({run.data_fingerprint for run in runs}),
        unreadable=unreadable,
    )


def _runs_table(runs: Sequence[RunFacts]) -> Table:
    keys = {name: key for name in MODELS if runs and (key := headline_key(name, runs[-1]))}
    rows = []
    for run in reversed(runs):
        verdicts = [verdict(name, run) for name in MODELS]
        words = "; ".join(f"{v.model} {v.state}" for v in verdicts)
        tones = {"released": "better", "rejected": "worse", "held": ""}
        tone = tones[verdicts[0].state] if len({v.state for v in verdicts}) == 1 else ""
        values = [run.models[name].overall.get(key) for name, key in keys.items()]
        cells = [
            Cell(_moment(run), value=run.created_unix_s),
            Cell(words, tone),
            Cell(run.data_fingerprint[:8] or "unknown"),
            *(Cell(formatting.decimal(value), value=value) for value in values),
        ]
        cpu_s = sum(timing.cpu_s for timing in run.timings)
        cells.append(Cell(formatting.decimal(cpu_s), value=cpu_s) if run.timings else Cell("unknown"))
        rows.append(Row(run.run_id, "", tuple(cells), link=f"{run.run_id}/index.html"))
    columns = ("Run", "Written", "Outcome", "Data", *map(metric_keys.label, keys.values()), "Processor, s")
    return Table("All runs, newest first", columns, tuple(rows), text_columns=4, name="all-runs")


def _trend(name: str, runs: Sequence[RunFacts]) -> Markup | None:
    """The metrics of the gates, else the headline metric, of every run; None with fewer than two."""
    if len(runs) < 2:
        return None
    gated = (gate.get("metric", "") for run in runs for gate in run.config.get("gates", ()))
    keys = [key for key in dict.fromkeys(gated) if key.startswith(f"{name}/")]
    if not keys and (key := headline_key(name, runs[-1])):
        keys = [key]
    labels = [_moment(run)[5:] for run in runs]
    # Metrics of one kind share a panel; a recall and a mean error have no common scale.
    panels = []
    for base in dict.fromkeys(map(metric_keys.base, keys)):
        lines = {
            metric_keys.label(key): [run.models[name].overall.get(key) for run in runs]
            for key in keys
            if metric_keys.base(key) == base
        }
        x = [float(place) for place in range(len(runs))]
        panels.append(plots.Panel(metric_keys.label(base), "run", x, lines, x_labels=labels))
    alt = f"Metrics of the {name} model over {len(runs)} runs; the table above has those that stand for it."
    return plots.line_plot(f"trend-{name}", alt, panels[:3]) if panels else None


def _moment(run: RunFacts) -> str:
    return formatting.moment(run.created_unix_s, views.utc_offset_hours(run))
