"""The plots of the page, made from the facts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from tfx_pipeline.config import RETRIEVAL
from tfx_pipeline.report import formatting, metric_keys, plots
from tfx_pipeline.report.facts import LoadTest, RunFacts
from trainer.index_facts import IndexFacts, SearchPoint
from trainer.waterfall import SHOWN, Waterfall

_THIS_MODEL = "this model"
_HAPPENED = "what happened"
_POSITIVES_DRAWN = 10
_SEE_TABLE = "the table below has the numbers."


def comparison_plot(name: str, facts: RunFacts) -> Markup | None:
    """Model and rivals: recall and NDCG by k, or AUC and XAUC by task; None without metrics."""
    model = facts.models[name]
    series = {
        _THIS_MODEL: model.overall,
        **{formatting.rival(rival): model.rival(rival) for rival in model.rivals},
    }
    keys = metric_keys.in_task_order(model.overall, facts.tasks)
    bounds = {
        figure.key: (figure.low, figure.high)
        for figure in model.figures
        if not figure.slice and figure.low is not None and figure.high is not None
    }
    if name == RETRIEVAL:
        panels = []
        for base in ("recall", "ndcg"):
            chosen = sorted((k for k in keys if metric_keys.base(k) == base), key=metric_keys.cutoff)
            if chosen:
                lines = {label: [values.get(key) for key in chosen] for label, values in series.items()}
                x = [float(metric_keys.cutoff(key)) for key in chosen]
                panels.append(
                    plots.Panel(f"{metric_keys.label(base)}@k", "k", x, lines, bands=_bands(chosen, bounds))
                )
        alt = f"Recall and NDCG by k of the retrieval model and of what it has to beat; {_SEE_TABLE}"
        return plots.line_plot("comparison-retrieval", alt, panels) if panels else None
    chosen = [key for key in keys if metric_keys.base(key) in {"auc", "xauc"}]
    rows = {metric_keys.label(k): {label: values.get(k) for label, values in series.items()} for k in chosen}
    alt = f"AUC and XAUC by task of the ranking model and of what it has to beat; {_SEE_TABLE}"
    title = "How often a pair is in the right order: 0.5 is guessing"
    intervals = {metric_keys.label(k): {_THIS_MODEL: bounds[k]} for k in chosen if k in bounds}
    return plots.dot_plot("comparison-ranking", alt, title, rows, intervals) if rows else None


def _bands(
    keys: Sequence[str], bounds: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[list[float | None], list[float | None]]]:
    """The band of this model over the keys; none unless an interval of each was measured."""
    if not all(key in bounds for key in keys):
        return {}
    return {_THIS_MODEL: ([bounds[key][0] for key in keys], [bounds[key][1] for key in keys])}


def training_plot(name: str, facts: RunFacts) -> Markup | None:
    """Loss and validation metrics by epoch, with the epoch whose weights were kept; None without a log."""
    log = facts.models[name].training_log
    if not log:
        return None
    epochs = [float(record.get("epoch") or place) for place, record in enumerate(log, 1)]
    kept = epochs[best_epoch(name, log)]
    panels = []
    for title, keys in (("Loss", _loss_keys(log)), ("Validation metrics", _validation_keys(name, log))):
        if keys:
            lines = {log_label(key): [record.get(key) for record in log] for key in keys}
            title = f"{name.capitalize()}: {title.lower()}"
            panels.append(plots.Panel(title, "epoch", epochs, lines, marks={"kept weights": kept}))
    if not panels:
        return None
    alt = f"Training of the {name} model over {len(log)} epochs; the weights of epoch {kept:g} were kept."
    return plots.line_plot(f"training-{name}", alt, panels)


def reliability_plot(facts: RunFacts) -> Markup:
    """What was predicted against what happened, one panel per task; `facts.scores` is not empty."""
    panels = [
        plots.Panel(
            formatting.words(scores.task),
            "mean prediction",
            [group.predicted for group in scores.bins],
            {_HAPPENED: [group.happened for group in scores.bins]},
            bands={_HAPPENED: ([g.low for g in scores.bins], [g.high for g in scores.bins])},
            diagonal=True,
        )
        for scores in facts.scores
    ]
    alt = f"Reliability of the predictions, by task; {_SEE_TABLE}"
    return plots.line_plot("reliability", alt, panels)


def scores_plot(facts: RunFacts) -> Markup:
    """Histograms of the predictions as lines, one panel per task; `facts.scores` is not empty."""
    panels = []
    for scores in facts.scores:
        middles = [(low + high) / 2 for low, high in itertools.pairwise(scores.edges)]
        lines: dict[str, list[float | None]] = {}
        for label, counts in scores.histogram.items():
            total = sum(counts)
            lines[label] = [count / total if total else None for count in counts]
        panels.append(plots.Panel(formatting.words(scores.task), "value", middles, lines, is_histogram=True))
    alt = f"Share of the examples by predicted value, by task; {_SEE_TABLE}"
    return plots.line_plot("score-distributions", alt, panels)


def index_plot(index: IndexFacts) -> Markup:
    """Recall of the index against the time of a query, one panel per k; the index has points."""
    panels = []
    shares = [share for p in index.points for share in (p.recall, *p.recall_by_slice.values())]
    # No share is above 1; the panels can be compared.
    limits = (min(0.9, *(share for share in shares if share is not None)) - 0.01, 1.01)
    for k, group in itertools.groupby(index.points, key=lambda point: point.k):
        points = sorted(group, key=lambda point: point.p50_ms)
        lines: dict[str, list[float | None]] = {"all items": [point.recall for point in points]}
        lines |= {
            name: [point.recall_by_slice[name] for point in points] for name in points[0].recall_by_slice
        }
        marks = {_mark(point): point.p50_ms for point in points if _mark(point)}
        x = [point.p50_ms for point in points]
        title = f"The first {k:,}: share found"
        panels.append(
            plots.Panel(
                title, "ms per query (p50)", x, lines, marks=marks, is_scattered=True, y_limits=limits
            )
        )
    alt = (
        "Share of the exact results that the index finds against the time of a query, by how many items are "
        f"asked for; {_SEE_TABLE}"
    )
    return plots.line_plot("index-recall-latency", alt, panels)


def _mark(point: SearchPoint) -> str:
    """What is said of a point beside its place."""
    if point.is_chosen:
        return "as served"
    return "exact search" if point.num_leaves_to_search is None else ""


def load_test_plot(test: LoadTest) -> Markup | None:
    """Percentiles of the time of a request by rate, one panel per stage; None with a single rate."""
    if len(test.results) < 2:
        return None
    rates = [float(result.rate_per_s) for result in test.results]
    panels = []
    for stage in dict.fromkeys(stage for result in test.results for stage in result.latency_ms):
        latencies = [result.latency_ms.get(stage) for result in test.results]
        lines = {
            name: [None if latency is None else float(getattr(latency, name)) for latency in latencies]
            for name in ("p50", "p95", "p99")
        }
        panels.append(plots.Panel(f"{formatting.words(stage)}, ms", "requests per second", rates, lines))
    alt = f"Percentiles of the time of a request by rate, by stage; {_SEE_TABLE}"
    return plots.line_plot("load-test", alt, panels)


def waterfall_plot(waterfall: Waterfall) -> Markup:
    """What became of the positives as stacked bars, one for all and one per slice, what came farthest first.

    A slice of a handful is in the table alone.
    """
    rows = {
        f"{formatting.conditions(part.slice)} ({part.num_positives:,})": {
            end: count / part.num_positives
            for end, count in ((SHOWN, part.shown), *reversed([*part.lost.items()]))
        }
        for part in waterfall.slices
        if part.num_positives >= (_POSITIVES_DRAWN if part.slice else 1)
    }
    alt = f"Where the funnel lost what people went on to choose, by slice; {_SEE_TABLE}"
    return plots.bar_plot("waterfall", alt, "Share of the positives", rows)


def best_epoch(name: str, log: Sequence[Mapping[str, float | None]]) -> int:
    """Place of the epoch whose weights were kept: highest validation recall, or lowest validation loss."""
    recall = next((key for key in log[0] if metric_keys.base(key) == "recall"), "")
    key, sign = (recall, -1) if name == RETRIEVAL else ("eval_loss", 1)
    badness = [math.inf if (value := record.get(key)) is None else sign * value for record in log]
    return badness.index(min(badness))


def log_label(key: str) -> str:
    """The name of a column of the training log."""
    return metric_keys.label(key) if "/" in key else formatting.words(key)


def _loss_keys(log: Sequence[Mapping[str, float | None]]) -> list[str]:
    return [key for key in log[0] if key == "loss" or (key.endswith("_loss") and "/" not in key)]


def _validation_keys(name: str, log: Sequence[Mapping[str, float | None]]) -> list[str]:
    shown = {"recall", "ndcg", "auc", "xauc"}
    return [key for key in log[0] if key.startswith(f"{name}/") and metric_keys.base(key) in shown]
