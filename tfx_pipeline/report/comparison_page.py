"""The page that sets two runs side by side, and says first whether they can be compared."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from tfx_pipeline.config import MODELS, RETRIEVAL
from tfx_pipeline.report import formatting, metric_keys, plots, views
from tfx_pipeline.report.differences import differences
from tfx_pipeline.report.facts import Differences, Figure, ModelFacts, RunFacts
from tfx_pipeline.report.templating import render_template
from tfx_pipeline.report.verdicts import headline_key, overall_sentence, verdict
from tfx_pipeline.report.views import Cell, Row, Table

_SECTIONS = (
    ("comparable", "Comparable?"),
    ("verdicts", "Verdicts"),
    ("metrics", "Metrics"),
    ("slices", "Slices"),
    ("differences", "What differs"),
    ("cost", "Cost"),
)


def render_comparison(a: RunFacts, b: RunFacts) -> str:
    """The page: run A is what run B is held against."""
    found = differences(a, b)
    is_fair = "data" not in found.unknown and not found.data
    return render_template(
        "compare.html.j2",
        b,
        sections=_SECTIONS,
        runs_link="",
        a=a,
        b=b,
        found=found,
        is_fair=is_fair,
        headline=comparability(found),
        datasets=list(dict.fromkeys((views.dataset_name(a), views.dataset_name(b)))),
        verdicts={"A": [verdict(name, a) for name in MODELS], "B": [verdict(name, b) for name in MODELS]},
        sentences={
            label: overall_sentence([verdict(name, run) for name in MODELS])
            for label, run in (("A", a), ("B", b))
        },
        metrics={name: _metrics_table(name, a, b, is_fair) for name in MODELS},
        plots={name: _plot(name, a, b) for name in MODELS},
        slices={name: _slices_table(name, a, b, is_fair) for name in MODELS},
        cost=_cost_table(a, b),
    )


def comparability(found: Differences) -> str:
    """Whether a difference in figures can come from the models alone, in one sentence."""
    if "data" in found.unknown:
        return "Whether these two runs are on the same data is unknown: at least one has no readable summary."
    if found.data:
        return "These two runs are on different data: no difference below says which model is better."
    if "config" in found.unknown:
        return "The same data; whether the configuration is the same is unknown."
    if found.config:
        return "The same data, another configuration: a difference below may come from any of the settings."
    return "The same data and the same configuration: what differs below is code, versions, or chance."


def _figures(model: ModelFacts) -> dict[tuple[str, str], Figure]:
    return {(figure.slice, figure.key): figure for figure in model.figures}


def _cells(key: str, old: Figure | None, new: Figure | None, *, is_fair: bool) -> tuple[Cell, Cell, Cell]:
    """Value of A, value of B, and B − A; with a verdict where both are on the same data."""
    before, after = (figure.value if figure else None for figure in (old, new))
    shown = [
        Cell(
            formatting.decimal(figure.value) if figure else "not measured",
            value=figure.value if figure else None,
            interval=views.interval(figure) if figure else "",
        )
        for figure in (old, new)
    ]
    text, tone = views.change(key, after, before)
    if not is_fair or (old and new and _overlap(old, new)):
        tone = ""
    change = None if before is None or after is None else after - before
    return shown[0], shown[1], Cell(text or "–", tone, value=change)


def _overlap(old: Figure, new: Figure) -> bool:
    """Whether both have intervals, and these meet: then the difference may be chance."""
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return False
    return old.low <= new.high and new.low <= old.high


def _metrics_table(name: str, a: RunFacts, b: RunFacts, is_fair: bool) -> Table | None:
    figures = [_figures(run.models[name]) for run in (a, b)]
    keys = list(dict.fromkeys(key for known in figures for slice_name, key in known if not slice_name))
    if not keys:
        return None
    ordered = sorted(metric_keys.in_task_order(keys, b.tasks or a.tasks), key=metric_keys.cutoff)
    rows = [
        Row(
            metric_keys.label(key),
            key,
            _cells(key, *(known.get(("", key)) for known in figures), is_fair=is_fair),
        )
        for key in ordered
    ]
    columns = ("Metric", "run A", "run B", "B − A")
    return Table(
        f"{name.capitalize()}, whole test split of each run", columns, tuple(rows), name=f"metrics-{name}"
    )


def _slices_table(name: str, a: RunFacts, b: RunFacts, is_fair: bool) -> Table | None:
    """The headline metric by slice, the largest loss first."""
    key = headline_key(name, b) or headline_key(name, a)
    figures = [_figures(run.models[name]) for run in (a, b)]
    slices = sorted({slice_name for known in figures for slice_name, _ in known if slice_name})
    sizes = {part.name: part.num_users for run in (a, b) for part in run.models[name].slices}
    if key is None or not slices:
        return None
    rows = []
    for slice_name in slices:
        cells = _cells(key, *(known.get((slice_name, key)) for known in figures), is_fair=is_fair)
        count = sizes.get(slice_name)
        group = " × ".join(part.partition(" = ")[0] for part in slice_name.split(", "))
        size = Cell(formatting.number(count), value=count)
        rows.append(Row(slice_name, "", (size, *cells), group, count or 0.0))
    rows.sort(key=lambda row: _loss(key, row.cells[-1].value))
    lower_is_better = metric_keys.badness(key, 1.0) > 0
    return Table(
        f"{name.capitalize()} by slice: {metric_keys.label(key)}, largest loss first",
        ("Slice", "users", "run A", "run B", "B − A"),
        tuple(rows),
        name=f"slices-{name}",
        sorted_by=(4, "descending" if lower_is_better else "ascending"),
        size_words="users",
    )


def _loss(key: str, change: float | None) -> tuple[bool, float]:
    return (True, 0.0) if change is None else (False, -metric_keys.badness(key, change))


def _plot(name: str, a: RunFacts, b: RunFacts) -> Markup | None:
    """Both runs as dots: recall and NDCG, or AUC and XAUC; None when neither has any."""
    shown = {"recall", "ndcg"} if name == RETRIEVAL else {"auc", "xauc"}
    figures = {label: _figures(run.models[name]) for label, run in (("run A", a), ("run B", b))}
    keys = [
        key
        for key in dict.fromkeys(
            key for known in figures.values() for slice_name, key in known if not slice_name
        )
        if metric_keys.base(key) in shown
    ]
    if not keys:
        return None
    rows: dict[str, Mapping[str, float | None]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for key in keys:
        found = {label: known[("", key)] for label, known in figures.items() if ("", key) in known}
        rows[metric_keys.label(key)] = {label: figure.value for label, figure in found.items()}
        intervals[metric_keys.label(key)] = {
            label: (figure.low, figure.high)
            for label, figure in found.items()
            if figure.low is not None and figure.high is not None
        }
    alt = f"The {name} models of both runs, metric by metric; the table below has the numbers."
    return plots.dot_plot(f"comparison-{name}", alt, f"{name.capitalize()}", rows, intervals)


def _cost_table(a: RunFacts, b: RunFacts) -> Table | None:
    times = [{timing.component: timing for timing in run.timings} for run in (a, b)]
    if not any(times):
        return None
    rows = []
    for component in dict.fromkeys(name for known in times for name in known):
        cells = []
        for known in times:
            timing = known.get(component)
            if timing is None:
                cells.append(Cell("not in this run"))
            elif timing.cached:
                cells.append(Cell("reused"))
            else:
                cells.append(Cell(formatting.decimal(timing.cpu_s), value=timing.cpu_s))
        rows.append(Row(component, "", tuple(cells)))
    return Table(
        "Processor seconds by component", ("Component", "run A", "run B"), tuple(rows), name="cost-table"
    )
