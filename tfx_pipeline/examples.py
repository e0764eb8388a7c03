"""Contract tables to tf.Example columns: histories, joins and labels, all as column operations.

Three kinds of example come from the same tables: one per interaction (training and evaluation), one per user
as of the end of training (batch recommendation and retrieval evaluation), one per item (the catalogue).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import polars as pl
import pyarrow as pa

from schema.contract import DatasetSpec
from schema.point_in_time import TIME_BITS, join_as_of
from trainer import features

_SECONDS_PER_HOUR = 3_600
_KNOWN_UNTIL = "_known_until"


@dataclasses.dataclass(frozen=True)
class ExampleSettings:
    """What shapes the examples besides the data.

    Attributes:
      train_end_unix_s: moment as of which user states and catalogue are taken.
      max_positives_per_user: a user's latest positives of the train split that retrieval learns from, so that
        a few heavy users do not dominate the loss (Covington et al. 2016, section 3.4).
      history_until_unix_s: moment that histories, searches and impressions end with, for events after it,
        and as of which impressions are dated: an event sees them as old as they were then. None lets them
        reach up to each event, as a live system would know them.
    """

    train_end_unix_s: int
    max_positives_per_user: int
    history_until_unix_s: int | None = None


def interaction_columns(
    events: pl.DataFrame,
    users: pl.DataFrame,
    items: pl.DataFrame,
    spec: DatasetSpec,
    settings: ExampleSettings,
    log: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """One row per interaction: query, candidate and label columns, with the column `split`.

    Args:
      events: interactions of some users; all of their interactions, in any order.
      users: at least the rows of those users.
      items: the whole items table.
      spec: the declaration.
      settings: see ExampleSettings.
      log: interactions of the same users that are known; None for `events` themselves. When given, `events`
        are rows to predict, of which any number may be left out, and none of the train split.

    Returns:
      The rows of `events` sorted by (event time, row number). History and impressions of a row hold the known
      events of its user with a time strictly earlier than the row's, whatever their split.
    """
    users_of = events["user_id"] if log is None else pl.concat([events["user_id"], log["user_id"]])
    codes = users_of.rank("dense").cast(pl.Int64).alias("_user")
    in_order = ("_user", features.EVENT_TIME, "row_number")
    known = None if log is None else log.with_columns(codes[len(events) :]).sort(in_order)
    events = events.with_columns(codes[: len(events)]).sort(in_order)
    known = events if known is None else known
    is_positive = pl.col(spec.positive).fill_null(0) > 0
    watched = known.filter(is_positive)
    events = events.with_columns(_known_until(settings))
    columns: list[pl.Series | pl.Expr] = [_history(events, watched, spec.max_history).alias(features.HISTORY)]
    columns += _impressions(events, known, spec)
    if features.SEARCH_TOKENS in events.columns:
        columns.append(_search_history(events, known).alias(features.SEARCH_TOKENS))
    # Rank from the latest: 1 is a user's latest train positive.
    latest_first = (is_positive & (pl.col("split") == "train")).cum_sum(reverse=True).over("_user")
    in_cap = (pl.col("split") != "train") | (latest_first <= settings.max_positives_per_user)
    columns.append((is_positive & in_cap).cast(pl.Float32).alias(features.RETRIEVAL_WEIGHT))
    events = events.with_columns(columns)
    if spec.session_gap_hours is not None:
        events = events.with_columns(
            _prior_sessions(events, watched, spec.max_history, spec.session_gap_hours)
        )
    events = join_as_of(events, users, "user_id")
    # The counts of the items table are those at the end of training; the event has its own.
    events = join_as_of(events, items.drop(features.ITEM_COUNTS), "item_id")
    return events.sort(features.EVENT_TIME, "row_number").drop("_user", _KNOWN_UNTIL)


def user_state_columns(
    events: pl.DataFrame,
    users: pl.DataFrame,
    spec: DatasetSpec,
    settings: ExampleSettings,
    default_surface: str | None,
    train_item_ids: pl.Series,
) -> pl.DataFrame:
    """One row per user as of the end of training, with what was held out.

    Args:
      events: all interactions of some users.
      users: rows of those users, and of users without interactions.
      spec: the declaration.
      settings: see ExampleSettings.
      default_surface: surface of users who have no train event; None when the dataset has no surfaces.
      train_item_ids: items with an interaction of anybody in the train split.

    Returns:
      Query columns as a request at the end of training would give them; `seen_item_ids`, all train positives;
      `eval_item_ids` and `test_item_ids`, the positives of those splits that were not seen in training, in
      time order; `cold_test_item_ids`, those of the latter that are not in `train_item_ids`; `user_type`,
      "cold" for a user without a history, else "warm".
    """
    events = events.sort(features.EVENT_TIME, "row_number")
    positives = events.filter(pl.col(spec.positive).fill_null(0) > 0)
    train = positives.filter(pl.col("split") == "train")
    everyone = pl.concat([users["user_id"], events["user_id"]]).unique(maintain_order=True).to_frame()
    states = everyone.join(
        train.group_by("user_id", maintain_order=True).agg(
            pl.col("item_id").tail(spec.max_history).alias(features.HISTORY),
            pl.col("item_id").unique(maintain_order=True).alias(features.SEEN_ITEMS),
        ),
        on="user_id",
        how="left",
    )
    unseen = positives.join(
        train.select("user_id", "item_id").unique(), on=["user_id", "item_id"], how="anti"
    )
    unseen = unseen.sort(features.EVENT_TIME, "row_number")
    for split, name in (("eval", features.EVAL_ITEMS), ("test", features.TEST_ITEMS)):
        held_out = unseen.filter(pl.col("split") == split).group_by("user_id", maintain_order=True)
        states = states.join(
            held_out.agg(pl.col("item_id").unique(maintain_order=True).alias(name)), on="user_id", how="left"
        )
    is_cold_item = ~pl.element().is_in(train_item_ids.implode())
    states = states.with_columns(
        pl.col(features.TEST_ITEMS).list.filter(is_cold_item).alias(features.COLD_TEST_ITEMS),
        pl.when(pl.col(features.HISTORY).is_null())
        .then(pl.lit(features.COLD))
        .otherwise(pl.lit(features.WARM))
        .alias(features.USER_TYPE),
    )
    past = events.filter(pl.col("split") == "train")
    impressions = past.group_by("user_id", maintain_order=True).agg(
        column.tail(spec.max_impressions).alias(name) for name, column in _impression_columns(spec).items()
    )
    states = states.join(impressions, on="user_id", how="left")
    if features.SURFACE in events.columns:
        last = past.group_by("user_id").agg(pl.col(features.SURFACE).drop_nulls().last())
        states = states.join(last, on="user_id", how="left")
        states = states.with_columns(
            pl.col(features.SURFACE).fill_null(pl.lit(default_surface, dtype=pl.String))
        )
    if features.SEARCH_TOKENS in events.columns:
        tokens = _distinct_searches(past).group_by("user_id", maintain_order=True)
        states = states.join(
            tokens.agg(pl.col(features.SEARCH_TOKENS).explode().tail(features.MAX_SEARCH_TOKENS)),
            on="user_id",
            how="left",
        )
    states = states.with_columns(pl.lit(settings.train_end_unix_s, dtype=pl.Int64).alias(features.EVENT_TIME))
    return join_as_of(states, users, "user_id")


def interaction_inputs(spec: DatasetSpec, group: str) -> dict[str, str]:
    """Feature name to dtype of one group of an interaction example: "query", "candidate" or "labels"."""
    if group == "query":
        inputs = (*features.raw_query_inputs(spec), *features.raw_impression_inputs(spec))
        return {raw.name: raw.dtype for raw in inputs}
    if group == "candidate":
        inputs = features.raw_candidate_inputs(spec)
        return {**{raw.name: raw.dtype for raw in inputs}, features.ITEM_COUNTS: "float32"}
    labels = dict.fromkeys([*features.feature_space(spec).labels, features.RETRIEVAL_WEIGHT], "float32")
    labels |= {raw.name: raw.dtype for raw in features.raw_logged_inputs(spec)}
    if spec.session_gap_hours is not None:
        labels[features.PRIOR_SESSIONS] = "string"
    return labels


def catalogue_inputs(spec: DatasetSpec) -> dict[str, str]:
    """Feature name to dtype of a catalogue example: what the models read, and the title for people."""
    inputs = {raw.name: raw.dtype for raw in features.raw_candidate_inputs(spec)}
    return {**inputs, features.ITEM_COUNTS: "float32", "title": "string"}


def catalogue_columns(items: pl.DataFrame, as_of_unix_s: int) -> pl.DataFrame:
    """One row per item with its features as of a moment."""
    ids = items.select("item_id").unique(maintain_order=True)
    as_of = ids.with_columns(pl.lit(as_of_unix_s, dtype=pl.Int64).alias(features.EVENT_TIME))
    return join_as_of(as_of, items, "item_id").drop(features.EVENT_TIME)


def _known_until(settings: ExampleSettings) -> pl.Expr:
    """The moment that what is known of each event's past ends with."""
    known = pl.col(features.EVENT_TIME)
    if settings.history_until_unix_s is not None:
        known = pl.min_horizontal(known, pl.lit(settings.history_until_unix_s, dtype=pl.Int64))
    return known.alias(_KNOWN_UNTIL)


def _impression_columns(spec: DatasetSpec) -> dict[str, pl.Expr]:
    """Feature name to its value in one impression; a missing label is NaN, so that lists stay parallel."""
    columns = {
        features.IMPRESSION_ITEMS: pl.col("item_id"),
        features.IMPRESSION_TIMES: pl.col(features.EVENT_TIME),
    }
    if spec.surface_is_mapped:
        columns[features.IMPRESSION_SURFACES] = pl.col(features.SURFACE).fill_null("")
    for label in spec.task_labels:
        columns[features.impression_label(label)] = pl.col(label).fill_null(float("nan"))
    return columns


def _impressions(events: pl.DataFrame, log: pl.DataFrame, spec: DatasetSpec) -> list[pl.Series]:
    """The latest impressions of each event's user, of whatever outcome, before the event; oldest first."""
    start, end = _window(_key(events, _KNOWN_UNTIL), _key(log), events["_user"].to_numpy() << TIME_BITS)
    start = np.maximum(start, end - spec.max_impressions)
    columns = log.select(column.alias(name) for name, column in _impression_columns(spec).items())
    lists = {name: _gather_lists(columns[name], start, end) for name in columns.columns}
    # Otherwise everybody would seem to have been away since, which no training example has seen.
    lists[features.IMPRESSION_TIMES] += events[features.EVENT_TIME] - events[_KNOWN_UNTIL]
    return [values.alias(name) for name, values in lists.items()]


def _history(
    events: pl.DataFrame, watched: pl.DataFrame, max_history: int, before: str = _KNOWN_UNTIL
) -> pl.Series:
    """Latest watched item ids of each event's user with a time strictly before a column's; oldest first."""
    start, end = _window(_key(events, before), _key(watched), events["_user"].to_numpy() << TIME_BITS)
    return _gather_lists(watched["item_id"], np.maximum(start, end - max_history), end)


def _prior_sessions(
    events: pl.DataFrame, watched: pl.DataFrame, max_history: int, session_gap_hours: float
) -> pl.Series:
    """The history as of the start of each event's session, for the positives that retrieval learns from.

    A model that makes lists hours ahead does not know the session that they will be shown in.
    """
    pause = pl.col(features.EVENT_TIME).diff().over("_user") > session_gap_hours * _SECONDS_PER_HOUR
    starts = pl.when(pause.fill_null(True)).then(pl.col(features.EVENT_TIME))
    events = events.with_columns(starts.forward_fill().over("_user").alias("_session_start"))
    history = _history(events, watched, max_history, before="_session_start")
    learnt = (events["split"] == "train") & (events[features.RETRIEVAL_WEIGHT] > 0)
    frame = pl.DataFrame({"history": history, "learnt": learnt})
    rolled_back = pl.when("learnt").then("history").otherwise(pl.lit([], dtype=history.dtype))
    return frame.select(rolled_back.alias(features.PRIOR_SESSIONS))[features.PRIOR_SESSIONS]


def _search_history(events: pl.DataFrame, log: pl.DataFrame) -> pl.Series:
    """Latest search tokens of each event's user, of searches strictly before the event."""
    searches = _distinct_searches(log)
    tokens = searches.select("_user", features.EVENT_TIME, features.SEARCH_TOKENS).explode(
        features.SEARCH_TOKENS
    )
    start, end = _window(_key(events, _KNOWN_UNTIL), _key(tokens), events["_user"].to_numpy() << TIME_BITS)
    return _gather_lists(
        tokens[features.SEARCH_TOKENS], np.maximum(start, end - features.MAX_SEARCH_TOKENS), end
    )


def _distinct_searches(events: pl.DataFrame) -> pl.DataFrame:
    """One row per search: the rows of one result page repeat its tokens."""
    searches = events.filter(pl.col(features.SEARCH_TOKENS).list.len() > 0)
    joined = pl.col(features.SEARCH_TOKENS).list.join("\x1f")
    return searches.filter((joined != joined.shift(1).over("user_id")).fill_null(True))


def _key(table: pl.DataFrame, time: str = features.EVENT_TIME) -> np.ndarray:
    return (table["_user"].to_numpy() << TIME_BITS) | table[time].to_numpy()


def _window(at: np.ndarray, past: np.ndarray, user_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row range of `past` (sorted keys) with the same user and a strictly smaller time, per key of `at`."""
    return np.searchsorted(past, user_start, side="left"), np.searchsorted(past, at, side="left")


def _gather_lists(values: pl.Series, start: np.ndarray, end: np.ndarray) -> pl.Series:
    """Lists values[start[i]:end[i]], which may overlap."""
    lengths = end - start
    offsets = np.zeros(len(start) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    flat = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - start, lengths)
    taken = pa.LargeListArray.from_arrays(pa.array(offsets), _arrow(values).take(pa.array(flat)))
    return pl.Series(pl.from_arrow(taken))


def example_batch(table: pl.DataFrame, inputs: Mapping[str, str]) -> pa.RecordBatch:
    """Arrow columns as the tf.Example encoder takes them: each feature a list, a missing value an empty list.

    Args:
      table: rows to encode.
      inputs: feature name to dtype ("string", "int64", "float32"); each must be a column of the table.
    """
    kinds = {"string": pa.large_binary(), "int64": pa.int64(), "float32": pa.float32()}
    arrays = [_as_lists(table[name], kinds[dtype]) for name, dtype in inputs.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(inputs))


def _as_lists(column: pl.Series, value_type: pa.DataType) -> pa.LargeListArray:
    if isinstance(column.dtype, pl.List):
        lengths = column.list.len().fill_null(0).to_numpy()
        values = (
            column.drop_nulls().explode(empty_as_null=False)
            if lengths.any()
            else pl.Series([], dtype=column.dtype.inner)
        )
    else:
        lengths = column.is_not_null().to_numpy().astype(np.int64)
        values = column.drop_nulls()
    offsets = np.zeros(len(column) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), _arrow(values).cast(value_type))


def _arrow(values: pl.Series) -> pa.Array:
    arrow = values.to_arrow()
    return arrow.combine_chunks() if isinstance(arrow, pa.ChunkedArray) else arrow
