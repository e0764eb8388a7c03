"""Which judged rows belong together: by user, by item, by request, and by crosses of two.

A row is an impression (ranking) or a pair of a user and a held-out positive (retrieval). Dimensions are text
columns of a table of rows; `Slice.mask` says which rows have its values.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import polars as pl

from schema.contract import DatasetSpec, FeatureKind
from schema.errors import ConfigError
from trainer import features
from trainer.comparison import SliceKey
from trainer.metrics import BoolArray, FloatArray

# Dimensions that every dataset has.
ACTIVITY = "activity_decile"
ITEM_POPULARITY = "item_popularity"
BUILT_IN = (features.USER_TYPE, ACTIVITY, ITEM_POPULARITY)
# Values of them.
NEW_USER = "new"
HEAD, TORSO, TAIL, COLD_ITEM = "head", "torso", "tail", "cold"
MISSING, OTHER = "(missing)", "(other)"

# Shares of the items met in training, the most popular first; the rest is the tail.
_HEAD_SHARE, _TORSO_SHARE = 0.1, 0.4
# Values of one dimension that are told apart, the most frequent; the others are one slice together.
MAX_VALUES = 20
_NUM_BINS = 4


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some of the rows.

    Attributes:
      key: its conditions; () is all rows.
      mask: bool [n], the rows that meet them.
    """

    key: SliceKey
    mask: BoolArray


def sliceable(spec: DatasetSpec) -> tuple[str, ...]:
    """Names of all dimensions of a dataset: built-in ones, surface, and declared features of one value."""
    surface = (features.SURFACE,) if spec.surface_is_mapped else ()
    single = (FeatureKind.CATEGORICAL, FeatureKind.CONTINUOUS)
    declared = (f.name for f in (*spec.users.features, *spec.items.features) if f.kind in single)
    return (*BUILT_IN, *surface, *declared)


def dimensions(spec: DatasetSpec, declared: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """What rows are split by: the built-in dimensions, the surface, then what the configuration declares.

    Args:
      spec: the dataset.
      declared: one or two names each.

    Raises:
      ConfigError: a name is unknown, or stands for more than one value.
    """
    known = sliceable(spec)
    for name in itertools.chain(*declared):
        if name not in known:
            raise ConfigError(
                f"slices: {name!r} is no dimension of {spec.name}; those are: {', '.join(known)}"
            )
    surface = [(features.SURFACE,)] if spec.surface_is_mapped else []
    return tuple(dict.fromkeys([*((name,) for name in BUILT_IN), *surface, *declared]))


def activity_deciles(num_events: Sequence[int] | np.ndarray) -> list[str]:
    """How active each user was in training: `new` without an event, else decile 1 (least) to 10.

    Users of equal activity share a decile, that of their mean rank, so that deciles can be uneven or empty.

    Args:
      num_events: int [U], events of the train split.

    >>> activity_deciles([0, 3, 8, 8, 9])
    ['new', '2', '6', '6', '9']
    """
    counts = np.asarray(num_events)
    active = np.sort(counts[counts > 0])
    below, up_to = (np.searchsorted(active, counts, side=side) for side in ("left", "right"))
    # The share of the active users at the middle of those with the same count.
    middle = (below + up_to) / 2 / max(1, len(active))
    deciles = np.minimum(10, 1 + np.floor(10 * middle)).astype(np.int64)
    return [str(decile) if count else NEW_USER for count, decile in zip(counts, deciles, strict=True)]


def popularity_segments(num_positives: Sequence[int] | np.ndarray, is_known: BoolArray) -> list[str]:
    """Segment of each item: of those met in training the most popular tenth is the head, the next four tenths
    are the torso, the rest is the tail; an item that training did not meet is cold.

    Args:
      num_positives: int [I], of training; equally popular items keep the order of the catalogue.
      is_known: bool [I], whether training has an interaction with the item.

    >>> popularity_segments([9, 1, 0, 5, 4], np.array([True, True, False, True, True]))
    ['torso', 'tail', 'cold', 'torso', 'tail']
    """
    known = np.flatnonzero(is_known)
    # Counts of polars are unsigned: their negative would wrap around.
    counts = np.asarray(num_positives, np.int64)[known]
    best_first = known[np.argsort(-counts, kind="stable")]
    head = round(_HEAD_SHARE * len(known))
    torso = round((_HEAD_SHARE + _TORSO_SHARE) * len(known))
    segments = np.full(len(is_known), COLD_ITEM, dtype=object)
    segments[best_first] = TAIL
    segments[best_first[:torso]] = TORSO
    segments[best_first[:head]] = HEAD
    return [str(segment) for segment in segments]


def popularity_masks(num_positives: Sequence[int] | np.ndarray, is_known: BoolArray) -> dict[str, BoolArray]:
    """The items of each segment of `popularity_segments`: bool [I] by segment, head first."""
    segments = np.asarray(popularity_segments(num_positives, is_known))
    return {segment: segments == segment for segment in (HEAD, TORSO, TAIL, COLD_ITEM)}


def as_text(values: pl.Series) -> pl.Series:
    """A dimension as text: numbers in quarters, at most MAX_VALUES values, null as `(missing)`.

    Quarters are named by their bounds, for instance `14 to 25`; a number with few values keeps them.
    """
    if values.dtype.is_numeric():
        return _binned(values.cast(pl.Float64).fill_nan(None)).rename(values.name)
    text = values.cast(pl.String).fill_null(MISSING)
    common = text.value_counts(sort=True)[text.name]
    if len(common) <= MAX_VALUES:
        return text
    kept = text.is_in(common.head(MAX_VALUES - 1).implode())
    return pl.select(pl.when(kept).then(text).otherwise(pl.lit(OTHER)).alias(text.name)).to_series()


def _binned(values: pl.Series) -> pl.Series:
    numbers: FloatArray = values.to_numpy()
    present = numbers[~np.isnan(numbers)]
    distinct = np.unique(present)
    if len(distinct) <= _NUM_BINS:
        names = [f"{number:g}" for number in distinct]
        places = np.searchsorted(distinct, numbers)
    else:
        edges = np.unique(np.quantile(present, np.linspace(0, 1, _NUM_BINS + 1), method="nearest"))
        names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
        # A bound belongs to the lower quarter, the smallest number to the first.
        places = np.maximum(np.searchsorted(edges, numbers, side="left") - 1, 0)
    texts = [MISSING if np.isnan(v) else names[place] for v, place in zip(numbers, places, strict=True)]
    return pl.Series(values.name, texts, dtype=pl.String)


def slices_of(rows: pl.DataFrame, by: Sequence[tuple[str, ...]]) -> list[Slice]:
    """All rows, then the slices of every dimension and cross that have a row, by name.

    Args:
      rows: n rows with the text columns that `by` names.
      by: one or two columns each.
    """
    found = [Slice((), np.ones(len(rows), np.bool_))]
    for names in by:
        keys = rows.select(names).unique().sort(names, maintain_order=True)
        for values in keys.iter_rows():
            mask = np.ones(len(rows), np.bool_)
            for name, value in zip(names, values, strict=True):
                mask &= (rows[name] == value).to_numpy()
            found.append(Slice(tuple(zip(names, values, strict=True)), mask))
    return found
