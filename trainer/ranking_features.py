"""What was known of every impression before it happened, as one matrix: the input of the ranking baselines.

The information is that of the ranker: the request, the declared features of user and item, and the strictly
earlier events of the log. The log may end early, see `History`.

Letters: n = interactions, F = features, S = task labels, m = (interaction, value of a key) pairs.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from schema.contract import DatasetSpec, FeatureKind, TaskKind
from schema.point_in_time import (
    EVENT_TIME,
    IMPRESSIONS,
    ITEM_COUNTS,
    EarlierEvents,
    join_as_of,
    key_codes,
)
from trainer.features import (
    CREATOR_ID,
    DAY_OF_WEEK,
    HOUR_OF_DAY,
    ITEM_AGE,
    ITEM_ID,
    SURFACE,
    UPLOAD_TIME,
    USER_ID,
)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

USER = "user"
# Impressions that the prior counts for in a rate of a user, who has few of any kind.
USER_SMOOTHING = 5.0
# A declared feature with more values than this counts as an id.
MAX_CATEGORIES = 100
_SECONDS_PER_HOUR = 3_600
_SECONDS_PER_DAY = 86_400


class History(str, enum.Enum):
    """How far the log reaches that an impression after training is judged with.

    ONLINE: up to the event, of whatever split, as a system knows it that counts while it serves.
    FROZEN: up to the end of training.
    """

    ONLINE = "online"
    FROZEN = "frozen"


class Kind(str, enum.Enum):
    """What a column of the matrix holds.

    ID: code of who or what it is, one of very many. CATEGORY: code of one of few. NUMBER: any scale.
    RATE: smoothed mean of a binary label. MEAN: smoothed mean of another label.
    """

    ID = "id"
    CATEGORY = "category"
    NUMBER = "number"
    RATE = "rate"
    MEAN = "mean"


class _Column(NamedTuple):
    """One feature: its name, kind and values [n], and whether it counts what the user did."""

    name: str
    kind: Kind
    values: FloatArray | IntArray
    of_user: bool = False


@dataclasses.dataclass(frozen=True)
class FeatureMatrix:
    """Features of every interaction.

    Codes run from 0, the most frequent value of the train split, up; a value that the train split does not
    have is NaN, as is any missing value.

    Attributes:
      names: F names, each once.
      kinds: F kinds.
      values: float32 [n, F].
      of_user: names of the features that count what the user did.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    values: npt.NDArray[np.float32]
    of_user: tuple[str, ...]

    def column(self, name: str) -> npt.NDArray[np.float32]:
        """One feature, float32 [n]."""
        return self.values[:, self.names.index(name)]

    def of_kinds(self, *kinds: Kind) -> list[int]:
        """Places of the columns of some kinds."""
        return [place for place, kind in enumerate(self.kinds) if kind in kinds]

    def take(self, rows: BoolArray | IntArray) -> FeatureMatrix:
        """Some of the interactions, by mask or by place."""
        return dataclasses.replace(self, values=self.values[rows])

    def with_columns_of(self, other: FeatureMatrix, names: Iterable[str]) -> FeatureMatrix:
        """The same matrix with some columns taken from another one of the same names."""
        places = [self.names.index(name) for name in names]
        values = self.values.copy()
        values[:, places] = other.values[:, places]
        return dataclasses.replace(self, values=values)


@dataclasses.dataclass(frozen=True)
class RankingTables:
    """Everything that the ranker is trained on.

    Attributes:
      spec: the declaration of the dataset.
      interactions, items, users: the contract tables.
      train_end_unix_s: end of training.
    """

    spec: DatasetSpec
    interactions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame
    train_end_unix_s: int

    def of_split(self, split: str) -> BoolArray:
        """Which interactions belong to a split, bool [n]."""
        return (self.interactions["split"] == split).to_numpy()

    def labels(self, label: str) -> FloatArray:
        """A label of every interaction, float64 [n]; NaN where it is missing."""
        return _floats(self.interactions[label])


def ranking_features(tables: RankingTables, history: History, rows: IntArray | None = None) -> FeatureMatrix:
    """The features of interactions of the tables.

    The request: surface, hour of day, day of week (0 = Monday), age of the item in days. The declared
    features of user and item, of several values the first; no text. Ids of user, item and creator.

    Of the log, groups of events: everything of the user (`user`), of the user on this surface
    (`user_surface`), and for each key of the dataset's counters, item_id for instance, of the candidate's
    value of it (`item_id`), of that on this surface (`item_id_surface`), and of the user with it
    (`user_item_id`). Of each group: `_impressions`, log(1 + number); the smoothed mean of each task label;
    and `_age`, log(1 + hours since the latest event), NaN without one. All time is counted, as
    `<group>_all_...`, and for `user` and the keys the dataset's windows besides, as `<group>_1d_...`. An item
    with several values of a key gets the sum over them, and the latest.

    Smoothed mean: (sum + s · prior) / (impressions + s). Keys: s is the dataset's `counters.smoothing`, the
    prior the mean of the whole log at that time. Users: s is `USER_SMOOTHING`; the prior of `user` is the
    same mean, that of what a user did on a surface or with a key is the user's own smoothed mean. A missing
    label counts as 0; before the first event all means are 0.

    Args:
      tables: sorted in any way.
      history: of rows after the train split; those of the train split know what was before their own event.
      rows: int64, places of the interactions asked about; None for all of them.

    Returns:
      One row per interaction asked about, in that order.
    """
    if rows is None:
        rows = np.arange(len(tables.interactions))
    moments = tables.interactions[EVENT_TIME]
    if history is History.FROZEN:
        moments = moments.clip(upper_bound=tables.train_end_unix_s)
    static = (column._replace(values=column.values[rows]) for column in _static(tables))
    columns = [*static, *_counted(tables, moments.to_numpy()[rows], rows)]
    return FeatureMatrix(
        tuple(column.name for column in columns),
        tuple(column.kind for column in columns),
        np.column_stack([column.values.astype(np.float32) for column in columns]),
        tuple(column.name for column in columns if column.of_user),
    )


def _static(tables: RankingTables) -> Iterator[_Column]:
    """The request and the declared features."""
    spec, in_train = tables.spec, tables.of_split("train")
    users = tables.users.drop(ITEM_COUNTS, strict=False)
    items = tables.items.drop(ITEM_COUNTS, strict=False)
    rows = join_as_of(join_as_of(tables.interactions, users, USER_ID), items, ITEM_ID)
    for name in (USER_ID, ITEM_ID, CREATOR_ID):
        if name in rows.columns:
            yield _Column(name, Kind.ID, _codes(rows[name], in_train))
    for feature in (*spec.users.features, *spec.items.features):
        values = rows[feature.name]
        if feature.kind is FeatureKind.CONTINUOUS:
            yield _Column(feature.name, Kind.NUMBER, _floats(values))
        elif feature.kind is not FeatureKind.TEXT:
            if isinstance(values.dtype, pl.List):
                values = values.list.first()
            codes = _codes(values, in_train)
            many = np.nanmax(codes, initial=0) >= MAX_CATEGORIES
            yield _Column(feature.name, Kind.ID if many else Kind.CATEGORY, codes)
    if spec.surface_is_mapped:
        yield _Column(SURFACE, Kind.CATEGORY, _codes(rows[SURFACE], in_train))
    event = rows[EVENT_TIME].to_numpy()
    local = event + int(spec.utc_offset_hours * _SECONDS_PER_HOUR)
    yield _Column(HOUR_OF_DAY, Kind.CATEGORY, local // _SECONDS_PER_HOUR % 24)
    # Day 0, 1970-01-01, was a Thursday.
    yield _Column(DAY_OF_WEEK, Kind.CATEGORY, (local // _SECONDS_PER_DAY + 3) % 7)
    if UPLOAD_TIME in rows.columns:
        age_s = np.maximum(event - _floats(rows[UPLOAD_TIME]), 0.0)
        yield _Column(ITEM_AGE, Kind.NUMBER, age_s / _SECONDS_PER_DAY)


def _floats(values: pl.Series) -> FloatArray:
    return values.cast(pl.Float64).fill_null(np.nan).to_numpy()


def _codes(values: pl.Series, in_train: BoolArray) -> FloatArray:
    """0, 1, ... from the most to the least frequent value of the train split, NaN for others."""
    known = values.filter(pl.Series(in_train)).drop_nulls().value_counts(sort=False, name="rows")
    known = known.sort(["rows", values.name], descending=[True, False]).with_row_index("code")
    joined = values.to_frame().join(known, on=values.name, how="left", maintain_order="left")
    return _floats(joined["code"])


@dataclasses.dataclass(frozen=True)
class _Group:
    """Events that are counted together.

    Attributes:
      name: of its features.
      windows_days: besides all time.
      of_user: whether its means start from the user's own.
      rows, codes: int64 [m], which interaction belongs to which code.
    """

    name: str
    windows_days: tuple[float, ...]
    of_user: bool
    rows: IntArray
    codes: IntArray


def _groups(tables: RankingTables) -> Iterator[_Group]:
    """Every group but that of the user's whole log."""
    spec, log = tables.spec, tables.interactions
    users = _ranks(log[USER_ID])
    surfaces = _ranks(log[SURFACE].fill_null("")) if spec.surface_is_mapped else None
    everything = np.arange(len(log))
    if surfaces is not None:
        yield _Group(f"{USER}_{SURFACE}", (), True, everything, _pairs(users, surfaces))
    for key in spec.counters.keys:
        rows, codes = key_codes(log.select(ITEM_ID, EVENT_TIME), tables.items, key)
        yield _Group(key, spec.counters.windows_days, False, rows, codes)
        if surfaces is not None:
            yield _Group(f"{key}_{SURFACE}", (), False, rows, _pairs(codes, surfaces[rows]))
        yield _Group(f"{USER}_{key}", (), True, rows, _pairs(users[rows], codes))


def _counted(tables: RankingTables, known: IntArray, rows: IntArray) -> Iterator[_Column]:
    """What the log says about some rows up to a moment of each."""
    spec, log = tables.spec, tables.interactions
    times = log[EVENT_TIME].to_numpy()
    place = np.full(len(log), -1)
    place[rows] = np.arange(len(rows))
    labels = [np.nan_to_num(tables.labels(name)) for name in spec.task_labels]
    values = np.column_stack([np.ones(len(log)), *labels])
    kinds = _label_kinds(spec)
    whole = EarlierEvents(np.zeros(len(log), np.int64), times, values)
    everybody = _smoothed(whole.sums(np.zeros(len(rows), np.int64), known, None), 0.0, 0.0)

    def features(group: _Group, prior: FloatArray, smoothing: float) -> Iterator[_Column]:
        events = EarlierEvents(group.codes, times[group.rows], values[group.rows])
        is_asked = place[group.rows] >= 0
        asked, codes = place[group.rows][is_asked], group.codes[is_asked]
        for days in (*group.windows_days, None):
            window_s = None if days is None else round(days * _SECONDS_PER_DAY)
            sums = np.zeros((len(rows), values.shape[1]))
            np.add.at(sums, asked, events.sums(codes, known[asked], window_s))
            window = f"{group.name}_all" if days is None else f"{group.name}_{days:g}d"
            yield _Column(f"{window}_{IMPRESSIONS}", Kind.NUMBER, np.log1p(sums[:, 0]), group.of_user)
            means = _smoothed(sums, prior, smoothing)
            for number, label in enumerate(spec.task_labels):
                yield _Column(f"{window}_{label}", kinds[label], means[:, number], group.of_user)
        latest = np.full(len(rows), -1)
        np.maximum.at(latest, asked, events.latest(codes, known[asked]))
        hours = np.where(latest < 0, np.nan, (times[rows] - latest) / _SECONDS_PER_HOUR)
        yield _Column(f"{group.name}_age", Kind.NUMBER, np.log1p(hours), group.of_user)

    users = _Group(USER, spec.counters.windows_days, True, np.arange(len(log)), _ranks(log[USER_ID]))
    of_user = list(features(users, everybody, USER_SMOOTHING))
    yield from of_user
    by_name = {column.name: column.values for column in of_user}
    own = np.column_stack([by_name[f"{USER}_all_{label}"] for label in spec.task_labels]).astype(np.float64)
    for group in _groups(tables):
        if group.of_user:
            yield from features(group, own, USER_SMOOTHING)
        else:
            yield from features(group, everybody, spec.counters.smoothing)


def _label_kinds(spec: DatasetSpec) -> dict[str, Kind]:
    binary = {task.label for task in spec.tasks if task.kind is TaskKind.BINARY}
    return {label: Kind.RATE if label in binary else Kind.MEAN for label in spec.task_labels}


def _smoothed(sums: FloatArray, prior: FloatArray | float, smoothing: float) -> FloatArray:
    """Means [n, S] of impressions and label sums [n, 1 + S]; 0 without an event and a prior."""
    weight = np.maximum(sums[:, :1] + smoothing, np.finfo(np.float64).tiny)
    return (sums[:, 1:] + smoothing * prior) / weight


def _ranks(values: pl.Series) -> IntArray:
    """The same number for the same value, from 1 up."""
    return values.rank("dense").cast(pl.Int64).to_numpy()


def _pairs(first: IntArray, second: IntArray) -> IntArray:
    """The same number for the same pair, from 0 up."""
    return np.unique(first * (second.max(initial=0) + 1) + second, return_inverse=True)[1].astype(np.int64)
