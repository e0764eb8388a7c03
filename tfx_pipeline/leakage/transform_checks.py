"""Did the Transform graph learn from train alone? Vocabularies and quantiles, recomputed from the tables.

The graph is asked like any model asks it: what it answers for known values tells where its quantiles lie.
"""

from __future__ import annotations

import dataclasses
import unicodedata

import numpy as np
import numpy.typing as npt
import polars as pl
import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import DatasetSpec, FeatureKind
from schema.point_in_time import count_names
from tfx_pipeline.leakage.findings import Check, judged
from trainer import features

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# The sketch that the boundaries come from is off by 0.1 % of the rows at most, and so is a merge of sketches.
RANK_TOLERANCE = 0.002
_ROUNDING = 1e-3
# What TensorFlow Transform writes in place of no value at all (tensorflow_transform.analyzers).
_EMPTY_VOCABULARY = "49d0cd50-04bb-48c0-bc6f-5b575dce351a"
_SECONDS_PER_DAY = 86_400
# Values that the graph is asked about; all of train is counted.
_MAX_PROBES = 20_000
_SEED = 5


@dataclasses.dataclass(frozen=True)
class TrainRows:
    """The rows that the graph may have seen, and the others.

    Attributes:
      train: interactions of the train split with the columns of their users and items as of their time.
      held_out: the same of the other splits.
      train_end_unix_s: end of training.
    """

    train: pl.DataFrame
    held_out: pl.DataFrame
    train_end_unix_s: int


def check_vocabularies(graph: tft.TFTransformOutput, rows: TrainRows, spec: DatasetSpec) -> Check:
    """Compares every vocabulary with the distinct values of train.

    A space that several features share is learnt from the first of them, candidates before queries.

    Args:
      graph: the Transform output.
      rows: see TrainRows.
      spec: the declaration.
    """
    space = features.feature_space(spec)
    clock = {f.name for f in features.CLOCK_FEATURES}
    learnt: dict[str, features.Feature] = {}
    for feature in (*space.candidate, *space.query):
        if feature.is_categorical and feature.name not in clock:
            learnt.setdefault(feature.space, feature)
    findings = []
    total = 0
    for name, feature in learnt.items():
        held = {value.decode() for value in graph.vocabulary_by_name(name)} - {_EMPTY_VOCABULARY}
        total += len(held)
        expected, later = (_distinct(table, feature) for table in (rows.train, rows.held_out))
        unseen, lost = held - expected, expected - held
        if feature.name == features.SEARCH_TOKENS:
            # An example has the searches before it: nothing may follow a user's last search.
            lost = set()
        if unseen:
            only_later = unseen & later
            where = f"{len(only_later):,} of them only in eval or test" if only_later else "in no split"
            findings.append(
                f"vocabulary {name} has {len(unseen):,} values that train has not, {where}, "
                f"such as {min(only_later or unseen)!r}"
            )
        if lost:
            findings.append(f"vocabulary {name} lacks {len(lost):,} values of train, such as {min(lost)!r}")
    detail = f"{len(learnt)} vocabularies, {total:,} values: those of train, no more and no fewer"
    return judged("vocabularies saw train only", detail, findings)


def _distinct(table: pl.DataFrame, feature: features.Feature) -> set[str]:
    column = table[feature.name]
    if feature.kind is FeatureKind.TEXT:
        return {word for text in column.drop_nulls().unique() for word in words(text)}
    if isinstance(column.dtype, pl.List):
        column = column.explode()
    # A vocabulary file has a value per line: what does not fit in one is left out.
    return {value for value in column.drop_nulls().unique() if value and not {"\n", "\r"} & {*value}}


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    letters = (c if unicodedata.category(c)[0] in "LN" else " " for c in text.lower())
    return "".join(letters).split()


def check_quantiles(graph: tft.TFTransformOutput, rows: TrainRows, spec: DatasetSpec) -> Check:
    """Checks that every quantile boundary lies where it lies among the values of train.

    Of Q boundaries the j-th belongs where a share of j / (Q + 1) of the train values is below it; equal
    values leave room. See RANK_TOLERANCE.

    Args:
      graph: the Transform output.
      rows: see TrainRows.
      spec: the declaration.
    """
    layer = graph.transform_features_layer()
    asked = pl.concat([_sample(rows.train), _sample(rows.held_out)])
    findings = []
    checked = 0

    def judge(name: str, values: FloatArray, at: FloatArray, below: IntArray, first: int) -> None:
        nonlocal checked
        known = np.isfinite(values)
        if not known.any():
            return
        checked += 1
        values, answered = values[known], np.isfinite(at)
        error = rank_error(values, at[answered], below[answered], first, features.NUM_BUCKETS - 1)
        if error > RANK_TOLERANCE + 2 / len(values):
            findings.append(f"{name}: a boundary is off its place by {error:.1%} of the rows of train")

    for feature in features.feature_space(spec).all:
        if feature.kind is FeatureKind.CONTINUOUS:
            values, at = (_values(feature, table, rows.train_end_unix_s) for table in (rows.train, asked))
            below = layer(_inputs(feature, asked))[feature.bucket_name].numpy() - 1
            judge(feature.name, values, at, below, first=1)
    counters = layer({features.ITEM_COUNTS: _dense(_counts(asked))})[features.COUNTERS].numpy()
    of_train, of_asked = (_rates(_counts(table), spec) for table in (rows.train, asked))
    for column, name in enumerate(_counter_names(spec)):
        # A share of 0 says that one boundary, or none, is at or below: the first cannot be placed.
        below = np.floor(counters[:, column] * (features.NUM_BUCKETS - 2) + _ROUNDING).astype(np.int64)
        below = np.where(counters[:, column] > 0, below + 1, 0)
        judge(name, of_train[:, column], of_asked[:, column], below, first=2)
    detail = f"quantile boundaries of {checked} numbers, within {RANK_TOLERANCE:.1%} of the rows of train"
    return judged("quantiles saw train only", detail, findings)


def rank_error(values: FloatArray, at: FloatArray, below: IntArray, first: int, count: int) -> float:
    """How far boundaries are from where they belong among values, as a share of the values.

    Args:
      values: [n], n > 0, all values that the boundaries should have been learnt from.
      at: [m], values that the graph was asked about.
      below: int64 [m], how many boundaries are at or below each of `at`.
      first: the first boundary to judge, from 1.
      count: how many boundaries there are.

    Returns:
      0 to 1; 0 where every boundary may be at its place.

    >>> # Boundaries 2.5 and 5 of 1..6: shares of 2/6 and 4/6 were due, and both are possible.
    >>> at = np.arange(1.0, 7.0)
    >>> rank_error(at, at, np.array([0, 0, 1, 1, 2, 2]), first=1, count=2)
    0.0
    >>> # Boundary 5.5 has 5/6 of the values below it, and 1/2 was due.
    >>> round(rank_error(at, at, np.array([0, 0, 0, 0, 0, 1]), first=1, count=1), 3)
    0.333
    """
    order = np.argsort(at, kind="stable")
    at, below = at[order], below[order]
    # Share of the values at or below each value asked about; 0 before the first, 1 after the last.
    up_to = np.searchsorted(np.sort(values), at, side="right") / len(values)
    up_to = np.concatenate([[0.0], up_to, [1.0]])
    boundaries = np.arange(first, count + 1)
    # The boundary is above the value asked about before this place, and at or below the one at it.
    place = np.searchsorted(below, boundaries, side="left")
    due = boundaries / (count + 1)
    return float(np.max(np.maximum(up_to[place] - due, due - up_to[place + 1]), initial=0.0))


def _sample(table: pl.DataFrame) -> pl.DataFrame:
    return table.sample(min(len(table), _MAX_PROBES), seed=_SEED)


def _values(feature: features.Feature, table: pl.DataFrame, train_end_unix_s: int) -> FloatArray:
    """A continuous feature of every row, as the graph computes it; NaN where it is missing."""
    moments = table[features.EVENT_TIME].to_numpy()
    if feature.name == features.EXAMPLE_AGE:
        return _days(np.maximum(train_end_unix_s - moments, 0))
    if feature.name == features.ITEM_AGE:
        uploaded = table[features.UPLOAD_TIME]
        ages = _days(np.maximum(moments - uploaded.fill_null(0).to_numpy(), 0))
        return np.where(uploaded.is_null().to_numpy(), np.nan, ages)
    return table[feature.name].cast(pl.Float64).fill_null(np.nan).to_numpy()


def _days(seconds: IntArray) -> FloatArray:
    # In float32, as the graph: a rounding of its own would put a value on the other side of a boundary.
    return (seconds.astype(np.float32) / np.float32(_SECONDS_PER_DAY)).astype(np.float64)


def _inputs(feature: features.Feature, table: pl.DataFrame) -> dict[str, tf.SparseTensor]:
    """The raw inputs that a continuous feature is computed from."""
    clock = {features.EXAMPLE_AGE: [features.EVENT_TIME]}
    clock |= {features.ITEM_AGE: [features.EVENT_TIME, features.UPLOAD_TIME]}
    return {name: _scalar(table[name]) for name in clock.get(feature.name, [feature.name])}


def _scalar(column: pl.Series) -> tf.SparseTensor:
    known = column.is_not_null().to_numpy()
    indices = np.stack([np.flatnonzero(known), np.zeros(known.sum(), np.int64)], axis=1)
    return tf.SparseTensor(indices, column.drop_nulls().to_numpy(), [len(column), 1])


def _dense(table: npt.NDArray[np.float32]) -> tf.SparseTensor:
    rows, columns = np.indices(table.shape)
    return tf.SparseTensor(np.stack([rows.ravel(), columns.ravel()], axis=1), table.ravel(), table.shape)


def _counts(table: pl.DataFrame) -> npt.NDArray[np.float32]:
    counts = table[features.ITEM_COUNTS]
    return counts.explode().to_numpy().reshape(len(counts), -1).astype(np.float32)


def _rates(counts: npt.NDArray[np.float32], spec: DatasetSpec) -> FloatArray:
    """Impressions and smoothed means of each group of counts, as the ranker's input defines them."""
    groups = counts.reshape(len(counts), -1, 1 + len(spec.task_labels))
    log, impressions, sums = groups[:, :1], groups[:, 1:, :1], groups[:, 1:, 1:]
    means = log[..., 1:] / np.maximum(log[..., :1], np.float32(1))
    smoothing = np.float32(spec.counters.smoothing)
    smoothed = (sums + smoothing * means) / (impressions + smoothing)
    return np.concatenate([impressions, smoothed], axis=-1).reshape(len(counts), -1).astype(np.float64)


def _counter_names(spec: DatasetSpec) -> tuple[str, ...]:
    return count_names(spec)[1 + len(spec.task_labels) :]
