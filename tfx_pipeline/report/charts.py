"""The plots of the page, made from the facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from tfx_pipeline.config import RETRIEVAL
from tfx_pipeline.report import formatting, metric_keys, plots
from tfx_pipeline.report.facts import RunFacts

_SEE_TABLE = "the table below has the numbers."


def comparison_plot(name: str, facts: RunFacts) -> Markup | None:
    """Model and rivals: recall and NDCG by k, or AUC and XAUC by task; None without metrics."""
    model = facts.models[name]
    series = {
        "this model": model.overall,
        **{formatting.words(rival): v for rival, v in model.rivals.items()},
    }
    keys = metric_keys.in_task_order(model.overall, facts.tasks)
    if name == RETRIEVAL:
        panels = []
        for base in ("recall", "ndcg"):
            chosen = sorted((k for k in keys if metric_keys.base(k) == base), key=metric_keys.cutoff)
            if chosen:
                lines = {label: [values.get(key) for key in chosen] for label, values in series.items()}
                x = [float(metric_keys.cutoff(key)) for key in chosen]
                panels.append(plots.Panel(f"{metric_keys.label(base)}@k", "k", x, lines))
        alt = f"Recall and NDCG by k of the retrieval model and of what it has to beat; {_SEE_TABLE}"
        return plots.line_plot("comparison-retrieval", alt, panels) if panels else None
    chosen = [key for key in keys if metric_keys.base(key) in {"auc", "xauc"}]
    rows = {metric_keys.label(k): {label: values.get(k) for label, values in series.items()} for k in chosen}
    alt = f"AUC and XAUC by task of the ranking model and of what it has to beat; {_SEE_TABLE}"
    title = "How often a pair is in the right order: 0.5 is guessing"
    return plots.dot_plot("comparison-ranking", alt, title, rows) if rows else None


def training_plot(name: str, facts: RunFacts) -> Markup | None:
    """Loss and validation metrics by epoch, with the epoch whose weights were kept; None without a log."""
    log = facts.models[name].training_log
    if not log:
        return None
    epochs = [float(record.get("epoch") or place) for place, record in enumerate(log, 1)]
    kept = (epochs[best_epoch(name, log)], "kept weights")
    panels = []
    for title, keys in (("Loss", _loss_keys(log)), ("Validation metrics", _validation_keys(name, log))):
        if keys:
            lines = {log_label(key): [record.get(key) for record in log] for key in keys}
            panels.append(plots.Panel(f"{name.capitalize()}: {title.lower()}", "epoch", epochs, lines, kept))
    if not panels:
        return None
    alt = f"Training of the {name} model over {len(log)} epochs; the weights of epoch {kept[0]:g} were kept."
    return plots.line_plot(f"training-{name}", alt, panels)


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
