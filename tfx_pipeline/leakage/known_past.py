"""What was known at a moment, row by row from the contract tables: slow, and apart from what makes examples.

Nothing of `tfx_pipeline.examples` or `schema.point_in_time` is used: a mistake there must show as a
difference. Rows are plain dicts, loops are loops, and every list is cut by comparing times.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from schema.contract import DatasetSpec
from trainer import features

Row = Mapping[str, Any]
Values = list[Any]

_VALID_FROM = "valid_from_unix_s"
_SECONDS_PER_HOUR = 3_600
_SECONDS_PER_DAY = 86_400


class KnownPast:
    """Recomputes examples of a few users and items from the contract tables."""

    def __init__(
        self,
        interactions: pl.DataFrame,
        users: pl.DataFrame,
        items: pl.DataFrame,
        spec: DatasetSpec,
        *,
        train_end_unix_s: int,
        max_positives_per_user: int,
        user_ids: Iterable[str],
        item_ids: Iterable[str],
    ) -> None:
        """Groups what belongs to the users and items that will be asked for.

        Args:
          interactions, users, items: the whole contract tables.
          spec: the declaration.
          train_end_unix_s: moment as of which user states and catalogue are taken.
          max_positives_per_user: a user's latest train positives that retrieval learns from.
          user_ids, item_ids: of all examples that will be recomputed.
        """
        self._spec = spec
        self._train_end_unix_s = train_end_unix_s
        self._max_positives = max_positives_per_user
        wanted = sorted(set(user_ids))
        events = interactions.filter(pl.col("user_id").is_in(wanted))
        self._events: dict[str, list[Row]] = defaultdict(list)
        for row in events.sort(features.EVENT_TIME, "row_number").iter_rows(named=True):
            self._events[row["user_id"]].append(row)
        self._users = _versions(users.filter(pl.col("user_id").is_in(wanted)), "user_id")
        self._items = _versions(items, "item_id")
        self._log = interactions
        self._times = interactions[features.EVENT_TIME].to_numpy()
        labels = [interactions[name].fill_null(0.0).fill_nan(0.0).to_numpy() for name in spec.task_labels]
        self._totals = np.column_stack([np.ones(len(interactions)), *labels]).astype(np.float64)
        self._rows_of = self._group_log(set(item_ids))

    def events_of(self, user_id: str) -> Sequence[Row]:
        """All interactions of a user, in time order."""
        return self._events.get(user_id, ())

    def interaction(self, event: Row) -> dict[str, Values]:
        """The raw example of one interaction: every value as a list, a missing one empty.

        Args:
          event: a row of the interactions table.
        """
        moment = event[features.EVENT_TIME]
        example = {
            **self._query(event["user_id"], moment, self._before(event["user_id"], moment)),
            **({features.SURFACE: _as_list(event[features.SURFACE])} if self._spec.surface_is_mapped else {}),
            **self._candidate(event["item_id"], moment),
            features.ITEM_COUNTS: self._counts(event["item_id"], moment),
            features.RETRIEVAL_WEIGHT: [self._retrieval_weight(event)],
        }
        for name in features.feature_space(self._spec).labels:
            example[name] = _as_list(event[name])
        for raw in features.raw_logged_inputs(self._spec):
            example[raw.name] = _as_list(event[raw.name])
        if self._spec.session_gap_hours is not None:
            example[features.PRIOR_SESSIONS] = self._prior_sessions(event, self._spec.session_gap_hours)
        return example

    def user_state(self, user_id: str) -> dict[str, Values]:
        """What a user-state example must hold of a user, but for the surface, which is a choice."""
        events = self.events_of(user_id)
        past = [e for e in events if e["split"] == "train"]
        train = {e["item_id"]: None for e in past if self._is_positive(e)}
        held_out = {
            split: [
                e["item_id"]
                for e in events
                if e["split"] == split and self._is_positive(e) and e["item_id"] not in train
            ]
            for split in ("eval", "test")
        }
        return {
            **self._query(user_id, self._train_end_unix_s, past),
            features.SEEN_ITEMS: list(train),
            features.EVAL_ITEMS: _distinct(held_out["eval"]),
            features.TEST_ITEMS: _distinct(held_out["test"]),
        }

    def catalogue_item(self, item_id: str) -> dict[str, Values]:
        """What a catalogue example must hold of an item."""
        counts = self._counts(item_id, self._train_end_unix_s)
        return {**self._candidate(item_id, self._train_end_unix_s), features.ITEM_COUNTS: counts}

    def _before(self, user_id: str, moment: int) -> list[Row]:
        return [e for e in self.events_of(user_id) if e[features.EVENT_TIME] < moment]

    def _query(self, user_id: str, moment: int, past: Sequence[Row]) -> dict[str, Values]:
        """What a request at the moment says of the user after these events, but for the surface."""
        shown = past[-self._spec.max_impressions :]
        user = _as_of(self._users.get(user_id, ()), moment)
        watched = [e["item_id"] for e in past if self._is_positive(e)]
        query: dict[str, Values] = {
            features.USER_ID: [user_id],
            features.EVENT_TIME: [moment],
            features.HISTORY: watched[-self._spec.max_history :],
            features.IMPRESSION_ITEMS: [e["item_id"] for e in shown],
            features.IMPRESSION_TIMES: [e[features.EVENT_TIME] for e in shown],
        }
        query |= {f.name: _as_list(user.get(f.name)) for f in self._spec.users.features}
        if self._spec.surface_is_mapped:
            query[features.IMPRESSION_SURFACES] = [e[features.SURFACE] or "" for e in shown]
        for label in self._spec.task_labels:
            given = [math.nan if e[label] is None else e[label] for e in shown]
            query[features.impression_label(label)] = given
        if features.SEARCH_TOKENS in self._spec.interactions.columns:
            query[features.SEARCH_TOKENS] = _search_tokens(past)
        return query

    def _candidate(self, item_id: str, moment: int) -> dict[str, Values]:
        item = _as_of(self._items.get(item_id, ()), moment)
        names = [f.name for f in self._spec.items.features]
        columns = self._spec.items.columns
        names += [name for name in (features.CREATOR_ID, features.UPLOAD_TIME) if name in columns]
        return {features.ITEM_ID: [item_id], **{name: _as_list(item.get(name)) for name in names}}

    def _is_positive(self, event: Row) -> bool:
        return (event[self._spec.positive] or 0) > 0

    def _retrieval_weight(self, event: Row) -> float:
        if not self._is_positive(event):
            return 0.0
        if event["split"] != "train":
            return 1.0
        learnt = [e for e in self.events_of(event["user_id"]) if e["split"] == "train"]
        latest = [e["row_number"] for e in learnt if self._is_positive(e)][-self._max_positives :]
        return float(event["row_number"] in latest)

    def _prior_sessions(self, event: Row, gap_hours: float) -> Values:
        """The history as of the start of the event's session, for positives that retrieval learns from."""
        if event["split"] != "train" or not self._retrieval_weight(event):
            return []
        start = event[features.EVENT_TIME]
        for earlier in reversed(self.events_of(event["user_id"])):
            time = earlier[features.EVENT_TIME]
            if time <= start and start - time <= gap_hours * _SECONDS_PER_HOUR:
                start = time
        past = self._before(event["user_id"], start)
        return [e["item_id"] for e in past if self._is_positive(e)][-self._spec.max_history :]

    def _group_log(self, item_ids: set[str]) -> dict[tuple[str, str], list[int]]:
        """Rows of the log by (counter key, value), for the values that the items ever had."""
        keys = self._spec.counters.keys
        wanted = {
            (key, value)
            for item_id in item_ids
            for _, item in self._items.get(item_id, ())
            for key in keys
            for value in _as_list(item_id if key == "item_id" else item.get(key))
        }
        rows: dict[tuple[str, str], list[int]] = defaultdict(list)
        events = self._log.select("item_id", features.EVENT_TIME).iter_rows()
        for place, (item_id, time) in enumerate(events):
            item = _as_of(self._items.get(item_id, ()), time)
            for key in keys:
                for value in set(_as_list(item_id if key == "item_id" else item.get(key))):
                    if (key, value) in wanted:
                        rows[key, value].append(place)
        return rows

    def _counts(self, item_id: str, moment: int) -> Values:
        """Impressions and label sums before the moment: of the whole log, then per key and window."""
        item = _as_of(self._items.get(item_id, ()), moment)
        counts = [self._totals[self._times < moment].sum(axis=0)]
        windows = [*(days * _SECONDS_PER_DAY for days in self._spec.counters.windows_days), math.inf]
        for key in self._spec.counters.keys:
            values = set(_as_list(item_id if key == "item_id" else item.get(key)))
            for window in windows:
                total = np.zeros(self._totals.shape[1])
                for value in values:
                    rows = np.array(self._rows_of.get((key, value), ()), np.int64)
                    times = self._times[rows]
                    inside = (times < moment) & (times >= moment - window)
                    total += self._totals[rows[inside]].sum(axis=0)
                counts.append(total)
        return [float(value) for value in np.concatenate(counts)]


def differs(recorded: Values, expected: Values) -> bool:
    """Whether two lists of values differ; NaN equals NaN, and floats equal as float32 sums do."""
    return len(recorded) != len(expected) or any(
        not _same(a, b) for a, b in zip(recorded, expected, strict=True)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float | int):
        return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
    return bool(a == b)


def _as_list(value: Any) -> Values:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _versions(table: pl.DataFrame, key: str) -> dict[str, list[tuple[float, Row]]]:
    """Rows by id, each with the moment that it is valid from, earliest first."""
    versions: dict[str, list[tuple[float, Row]]] = defaultdict(list)
    for row in table.drop(features.ITEM_COUNTS, strict=False).iter_rows(named=True):
        versions[row[key]].append((row.get(_VALID_FROM, -math.inf), row))
    for rows in versions.values():
        rows.sort(key=lambda pair: pair[0])
    return versions


def _as_of(versions: Sequence[tuple[float, Row]], moment: int) -> Row:
    """The latest row that was valid at the moment; an empty one before the first."""
    valid = [row for since, row in versions if since <= moment]
    return valid[-1] if valid else {}


def _search_tokens(past: Sequence[Row]) -> Values:
    """Latest words searched for; the rows of one result page repeat the words of its search."""
    tokens: Values = []
    latest: Values = []
    for event in past:
        words = event[features.SEARCH_TOKENS] or []
        if words and words != latest:
            tokens += words
            latest = words
    return tokens[-features.MAX_SEARCH_TOKENS :]
