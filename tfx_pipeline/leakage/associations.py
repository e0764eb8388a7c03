"""Does any feature alone say too much about a label?

Letters: n = rows of a split.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

from schema.contract import DatasetSpec, TaskKind, TaskSpec
from schema.point_in_time import count_names
from tfx_pipeline.leakage.findings import Association, Check, judged
from trainer import features, metrics

# On the built-in datasets whole models stay below .85 on their easiest label, and single features below .80;
# a copy of a label of which a twentieth is flipped reaches .95.
MAX_AUC = 0.9
# Eval rows of each class below which an AUC is mostly luck.
MIN_CLASS_ROWS = 20
# Impressions that the prior counts for in a target encoding.
_SMOOTHING = 20.0
_NUM_BINS = 32
_ROW, _VALUE, _LABEL, _MEAN = "row", "value", "label", "mean"


def check_associations(
    train: pl.DataFrame, evaluation: pl.DataFrame, spec: DatasetSpec, max_auc: float = MAX_AUC
) -> tuple[Check, tuple[Association, ...]]:
    """Judges every feature by the order that its target encoding alone gives the eval rows.

    Target encoding: each value is replaced by the smoothed mean of the label over the train rows that have
    it; a list by the mean over its values. Numbers count as 32 quantile bins of train; a missing value is a
    value of its own. Besides the features themselves: lengths of lists, whether the item is among the user's
    history or impressions, means and latest values of the labels of the impressions.

    Args:
      train, evaluation: samples of examples, every feature a list.
      spec: the declaration.
      max_auc: above it a feature alone is taken for a leak.

    Returns:
      The check, and all associations, strongest first.
    """
    sides = [dict(_features(sample, spec)) for sample in (train, evaluation)]
    found = []
    thin = []
    for task in spec.tasks:
        labels = [sample[task.label].list.first() for sample in (train, evaluation)]
        if _too_thin(task, labels[1]) or not labels[0].drop_nans().drop_nulls().len():
            thin.append(task.name)
            continue
        for name in sides[0]:
            encoded = target_encoding(sides[0][name], sides[1][name], labels[0])
            known = (labels[1].is_not_null() & labels[1].is_not_nan()).to_numpy()
            score = metrics.auc if task.kind is TaskKind.BINARY else metrics.xauc
            value = score(labels[1].to_numpy()[known], encoded[known])
            found.append(Association(task.name, name, float(value), int(known.sum())))
    found.sort(key=lambda a: -a.auc)
    findings = [
        f"{a.feature} alone orders {a.task} with an AUC of {a.auc:.3f}" for a in found if a.auc > max_auc
    ]
    detail = f"{len(sides[0]):,} features, each alone against each label of eval; at most {max_auc:g} allowed"
    if thin:
        detail += f"; too few rows of a class to judge {', '.join(thin)}"
    return judged("no feature tells a label", detail, findings), tuple(found)


def _too_thin(task: TaskSpec, label: pl.Series) -> bool:
    known = label.drop_nulls().drop_nans()
    if task.kind is not TaskKind.BINARY:
        return len(known) < 2 * MIN_CLASS_ROWS
    positives = int((known > 0).sum())
    return min(positives, len(known) - positives) < MIN_CLASS_ROWS


def _features(sample: pl.DataFrame, spec: DatasetSpec) -> Iterator[tuple[str, pl.Series]]:
    """Columns to judge: scalars, or lists of strings."""
    inputs = (*features.raw_query_inputs(spec), *features.raw_candidate_inputs(spec))
    for raw in inputs:
        column = sample[raw.name]
        if raw.is_list:
            yield raw.name, column
            yield f"{raw.name} (length)", column.list.len()
        else:
            yield raw.name, column.list.first()
    yield from _counters(sample[features.ITEM_COUNTS], spec)
    item = pl.col(features.ITEM_ID).list.first()
    for name in (features.HISTORY, features.IMPRESSION_ITEMS):
        held = sample.select(pl.col(name).list.contains(item).cast(pl.String))
        yield f"item in {name}", held.to_series()
    yield f"{features.IMPRESSION_ITEMS} (length)", sample[features.IMPRESSION_ITEMS].list.len()
    for label in spec.task_labels:
        name = features.impression_label(label)
        yield f"{name} (mean)", sample[name].list.mean()
        yield f"{name} (latest)", sample[name].list.last()


def _counters(counts: pl.Series, spec: DatasetSpec) -> Iterator[tuple[str, pl.Series]]:
    """Impressions, and means of labels, of each group of counts."""
    names = count_names(spec)
    width = 1 + len(spec.task_labels)
    table = counts.list.to_struct(fields=list(names)).struct.unnest()
    for start in range(0, len(names), width):
        impressions = table[names[start]]
        yield names[start], impressions
        for name in names[start + 1 : start + width]:
            yield name, table[name] / impressions.clip(lower_bound=1)


def target_encoding(train: pl.Series, evaluation: pl.Series, labels: pl.Series) -> np.ndarray:
    """Smoothed train mean of the label for the value, or the values, of each eval row.

    Formula: (sum of the labels + 20 * mean of all) / (rows + 20), over the train rows that have the value.

    Args:
      train, evaluation: numbers, strings, or lists of strings.
      labels: of the train rows; rows without one do not count.

    Returns:
      float64 [n]; the mean of all where no train row has the value.
    """
    if train.dtype.is_numeric():
        train, evaluation = _binned(train, evaluation)
    label = pl.DataFrame({_LABEL: labels.fill_nan(None)}).with_row_index(_ROW)
    rows = _exploded(train).join(label, on=_ROW).drop_nulls(_LABEL)
    prior = float(labels.drop_nulls().drop_nans().mean())  # type: ignore[arg-type]
    mean = (pl.col(_LABEL).sum() + _SMOOTHING * prior) / (pl.len() + _SMOOTHING)
    means = rows.group_by(_VALUE).agg(mean.alias(_MEAN))
    found = _exploded(evaluation).join(means, on=_VALUE, how="left", nulls_equal=True)
    by_row = found.group_by(_ROW).agg(pl.col(_MEAN).fill_null(prior).mean()).sort(_ROW)
    return by_row[_MEAN].to_numpy()


def _exploded(column: pl.Series) -> pl.DataFrame:
    """One line per row and value; a missing value and an empty list are null."""
    table = pl.DataFrame({_VALUE: column}).with_row_index(_ROW)
    return table.explode(_VALUE, empty_as_null=True) if isinstance(column.dtype, pl.List) else table


def _binned(train: pl.Series, evaluation: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Numbers as the number of their train quantile bin; NaN and missing stay missing."""
    known = train.cast(pl.Float64).fill_nan(None).drop_nulls().to_numpy()
    edges = np.unique(np.quantile(known, np.linspace(0, 1, _NUM_BINS + 1)[1:-1])) if len(known) else []

    def binned(values: pl.Series) -> pl.Series:
        numbers = values.cast(pl.Float64).fill_nan(None)
        bins = pl.Series(np.searchsorted(edges, numbers.fill_null(0.0).to_numpy(), side="right"))
        return pl.DataFrame({"bin": bins, "known": numbers.is_not_null()}).select(
            pl.when("known").then("bin")
        )["bin"]

    return binned(train), binned(evaluation)
