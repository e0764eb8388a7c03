"""Compares the predictions of a ranking model with those of its rivals, row by row.

Letters: n = impressions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from schema.contract import TaskKind, TaskSpec
from schema.errors import ShapeError
from trainer import metrics
from trainer.comparison import (
    CANDIDATE,
    BootstrapSettings,
    Comparison,
    Measured,
    Rival,
    defined,
    slice_result,
    worst_first,
)
from trainer.features import USER_ID
from trainer.metrics import BoolArray, FloatArray, IntArray
from trainer.progress import tracked
from trainer.slices import slices_of
from trainer.uncertainty import UserSums, ranking_sums

STAGE = "ranking"
# Suffixes of `Comparison.facts`, after `<task>/`.
PREDICTION_STD, LABEL_STD = "prediction_std", "label_std"
MEAN_PREDICTION, MEAN_LABEL = "mean_prediction", "mean_label"


@dataclasses.dataclass(frozen=True)
class JudgedRows:
    """Impressions and what each model predicted for them.

    Attributes:
      rows: n rows: user_id, item_id, event_time_unix_s, and a text column per dimension.
      labels: task -> float64 [n], NaN where missing.
      clicks: float64 [n], 1 where the impression was chosen, 0 where not, NaN where that is not known.
      predictions: model -> task -> float64 [n]; `candidate` and the rivals in the order of tables. A rival
        may lack tasks.
    """

    rows: pl.DataFrame
    labels: Mapping[str, FloatArray]
    clicks: FloatArray
    predictions: Mapping[str, Mapping[str, FloatArray]]


def compare_ranking(
    judged: JudgedRows,
    tasks: Sequence[TaskSpec],
    by: Sequence[tuple[str, ...]],
    notes: Mapping[str, str],
    absent: Mapping[str, str],
    settings: BootstrapSettings,
) -> Comparison:
    """Every metric of every task on the whole split and by slice, with intervals, against every rival.

    Args:
      judged: what was predicted.
      tasks: what is judged; rows without a task's label are left out for it.
      by: dimensions and crosses to slice by.
      notes: rival -> how it was made.
      absent: rivals that could not be compared, and why.
      settings: of the intervals, which are over users.
    """
    if CANDIDATE not in judged.predictions:
        raise ShapeError(f"predictions of {', '.join(judged.predictions)}; expected some of {CANDIDATE!r}.")
    users = np.unique(judged.rows[USER_ID].to_numpy(), return_inverse=True)[1]
    results = []
    for part in tracked(slices_of(judged.rows, by), "slices compared"):
        measured: dict[str, Measured] = {}
        for task in tasks:
            measured |= _measure(judged, task, users, part.mask)
        num_rows = int(part.mask.sum())
        results.append(slice_result(part.key, len(np.unique(users[part.mask])), num_rows, measured, settings))
    headline = headline_metric(tasks)
    return Comparison(
        model=STAGE,
        headline=headline,
        confidence=settings.confidence,
        num_resamples=settings.num_resamples,
        rivals=tuple(Rival(name, notes.get(name, "")) for name in judged.predictions if name != CANDIDATE),
        absent=absent,
        slices=tuple(worst_first(results, headline)),
        facts=_facts(judged, tasks),
    )


def metric_keys(tasks: Sequence[TaskSpec]) -> list[str]:
    """Keys of every metric that `compare_ranking` measures."""
    return [
        metrics.metric_key(STAGE, name, task=task.name)
        for task in tasks
        for name in metrics.RANKING_METRICS[task.kind]
    ]


def headline_metric(tasks: Sequence[TaskSpec]) -> str:
    """AUC of the first binary task; XAUC of the first task where none is binary."""
    binary = [task for task in tasks if task.kind is TaskKind.BINARY]
    if binary:
        return metrics.metric_key(STAGE, "auc", task=binary[0].name)
    return metrics.metric_key(STAGE, "xauc", task=tasks[0].name)


def _measure(judged: JudgedRows, task: TaskSpec, users: IntArray, mask: BoolArray) -> dict[str, Measured]:
    """The metrics of one task over the labelled rows of a slice; users are those of the whole slice."""
    labels = judged.labels[task.name]
    rows = np.flatnonzero(mask & ~np.isnan(labels))
    in_slice = np.unique(users[mask])
    codes = np.searchsorted(in_slice, users[rows])
    names = metrics.RANKING_METRICS[task.kind]
    sums: dict[str, dict[str, UserSums | float]] = {}
    for model, predictions in judged.predictions.items():
        if task.name not in predictions:
            continue
        if np.isfinite(predictions[task.name][rows]).all():
            found = ranking_sums(
                task.kind, labels[rows], predictions[task.name][rows], codes, judged.clicks[rows]
            )
            sums[model] = {name: _with_users(metric, codes, len(in_slice)) for name, metric in found.items()}
        else:
            sums[model] = dict.fromkeys(names, np.nan)
    not_numbers = why_not_numbers(judged.predictions[CANDIDATE], [task.name], rows)
    return {
        metrics.metric_key(STAGE, name, task=task.name): Measured(
            len(rows),
            metric,
            {model: found[name] for model, found in sums.items() if model != CANDIDATE},
            not_numbers or _why_undefined(name, labels[rows], task),
        )
        for name, metric in sums[CANDIDATE].items()
    }


def why_not_numbers(
    predictions: Mapping[str, FloatArray], tasks: Sequence[str], rows: IntArray | None = None
) -> str:
    """Which predictions are NaN or infinite, in words; "" when none is.

    Args:
      predictions: task -> float64 [n].
      tasks: to look at.
      rows: to look at; None are all.
    """
    found = []
    for task in tasks:
        values = predictions[task] if rows is None else predictions[task][rows]
        num_bad = int(np.count_nonzero(~np.isfinite(values)))
        if num_bad:
            found.append(f"{num_bad:,} of {len(values):,} predictions of {task} are NaN or infinite")
    return "; ".join(found)


def _with_users(metric: UserSums, codes: IntArray, num_users: int) -> UserSums:
    """The metric over all users of the slice, those without a labelled row among them."""
    sums = np.zeros((num_users, metric.sums.shape[1]))
    sums[np.unique(codes)] = metric.sums
    return dataclasses.replace(metric, sums=sums)


def _why_undefined(metric: str, labels: FloatArray, task: TaskSpec) -> str:
    if not len(labels):
        return f"no row with a label {task.label}"
    if metric == "weighted_pairwise_loss":
        return "no user has both a chosen row with watch time and one that was not chosen"
    if task.kind is TaskKind.BINARY:
        return f"{int(labels.sum()):,} of {len(labels):,} labels are positive; it takes both classes"
    return f"all {len(labels):,} labels are equal"


def _facts(judged: JudgedRows, tasks: Sequence[TaskSpec]) -> dict[str, float | None]:
    facts: dict[str, float | None] = {}
    for task in tasks:
        labels = judged.labels[task.name]
        predictions = judged.predictions[CANDIDATE][task.name][~np.isnan(labels)]
        labels = labels[~np.isnan(labels)]
        values = {
            PREDICTION_STD: predictions.std() if len(labels) else np.nan,
            LABEL_STD: labels.std() if len(labels) else np.nan,
            MEAN_PREDICTION: predictions.mean() if len(labels) else np.nan,
            MEAN_LABEL: labels.mean() if len(labels) else np.nan,
        }
        facts |= {f"{task.name}/{name}": defined(value) for name, value in values.items()}
    return facts


def predictions_table(judged: JudgedRows) -> pl.DataFrame:
    """What every number comes from: the rows, `clicked`, `label_<task>`, and `<model>/<task>` per model."""
    return judged.rows.with_columns(
        pl.Series("clicked", judged.clicks, dtype=pl.Float32),
        *(pl.Series(f"label_{task}", labels, dtype=pl.Float32) for task, labels in judged.labels.items()),
        *(
            pl.Series(f"{model}/{task}", values, dtype=pl.Float64)
            for model, predictions in judged.predictions.items()
            for task, values in predictions.items()
        ),
    )
