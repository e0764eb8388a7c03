"""What was known at a moment: features as they were, and counts of strictly earlier events."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from schema.contract import DatasetSpec

EVENT_TIME = "event_time_unix_s"
VALID_FROM = "valid_from_unix_s"
ITEM_COUNTS = "item_counts"
IMPRESSIONS = "impressions"
_SECONDS_PER_DAY = 86_400
# Event times are below 2**33 seconds, so a code and a time fit one sortable int64 key.
TIME_BITS = 33

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def join_as_of(left: pl.DataFrame, right: pl.DataFrame, key: str) -> pl.DataFrame:
    """Adds the columns of users or items that were valid at the event time; the order of `left` is kept."""
    if VALID_FROM not in right.columns:
        return left.join(right, on=key, how="left", maintain_order="left")
    order = left.with_row_index("_order").sort(EVENT_TIME)
    joined = order.join_asof(
        right.sort(VALID_FROM),
        left_on=EVENT_TIME,
        right_on=VALID_FROM,
        by=key,
        strategy="backward",
        check_sortedness=False,
    )
    return joined.sort("_order").drop("_order", VALID_FROM)


def log_count_names(spec: DatasetSpec) -> tuple[str, ...]:
    """Names of the first numbers of `item_counts`: impressions and sums of task labels, of the whole log."""
    return tuple(f"log_all_{what}" for what in (IMPRESSIONS, *spec.task_labels))


def count_names(spec: DatasetSpec) -> tuple[str, ...]:
    """Names of the numbers of `item_counts`, in order.

    The impressions and the sum of each task label: first of the whole log, then per key and window, the
    longest, all time, last; for instance `log_all_click`, `creator_id_7d_click`.
    """
    windows = (*(f"{days:g}d" for days in spec.counters.windows_days), "all")
    groups = (f"{key}_{window}" for key in spec.counters.keys for window in windows)
    of_items = (f"{group}_{what}" for group in groups for what in (IMPRESSIONS, *spec.task_labels))
    return (*log_count_names(spec), *of_items)


def item_counts(log: pl.DataFrame, at: pl.DataFrame, items: pl.DataFrame, spec: DatasetSpec) -> pl.Series:
    """Counts the events of each item, and of the items that share an attribute with it, before a moment.

    An event belongs to every value that the item of the event had at that time; an item with several values
    gets the sum over them. A missing label counts as 0.

    Args:
      log: interactions: item_id, event_time_unix_s, and the task labels.
      at: item_id and the moment event_time_unix_s: only events strictly earlier count.
      items: the items table.
      spec: declares keys, windows and tasks.

    Returns:
      One list[float32] per row of `at`, in its order, as `count_names` names them.
    """
    labels = [log[name].fill_null(0.0).fill_nan(0.0).to_numpy() for name in spec.task_labels]
    values = np.column_stack([np.ones(len(log)), *labels]).astype(np.float64)
    windows = [*(round(days * _SECONDS_PER_DAY) for days in spec.counters.windows_days), None]
    whole = EarlierEvents(np.zeros(len(log), np.int64), log[EVENT_TIME].to_numpy(), values)
    moments = at[EVENT_TIME].to_numpy()
    columns = [whole.sums(np.zeros(len(at), np.int64), moments, None)]
    for key in spec.counters.keys:
        both = pl.concat([log.select("item_id", EVENT_TIME), at.select("item_id", EVENT_TIME)])
        rows, codes = key_codes(both, items, key)
        in_log = rows < len(log)
        source, asked = rows[in_log], rows[~in_log] - len(log)
        earlier = EarlierEvents(codes[in_log], log[EVENT_TIME].to_numpy()[source], values[source])
        for window in windows:
            sums = earlier.sums(codes[~in_log], moments[asked], window)
            total = np.zeros((len(at), values.shape[1]))
            np.add.at(total, asked, sums)
            columns.append(total)
    table = np.concatenate(columns, axis=1).astype(np.float32)
    return pl.Series(ITEM_COUNTS, table).cast(pl.List(pl.Float32))


def key_codes(table: pl.DataFrame, items: pl.DataFrame, key: str) -> tuple[IntArray, IntArray]:
    """Who shares a value of an attribute of items: the same value gets the same code.

    Args:
      table: item_id and event_time_unix_s.
      items: the items table.
      key: item_id, creator_id or a categorical feature of items.

    Returns:
      int64 [m] each: (row, code of a value) for every value that the row's item had at the row's time, from
      1 up, in the order of the rows.
    """
    rows = table.with_row_index("_row")
    if key != "item_id":
        kept = ["item_id", key, *([VALID_FROM] if VALID_FROM in items.columns else [])]
        rows = join_as_of(rows, items.select(kept), "item_id")
    rows = rows.select("_row", key)
    if isinstance(rows.schema[key], pl.List):
        rows = rows.with_columns(pl.col(key).list.unique()).explode(key)
    rows = rows.drop_nulls(key)
    codes = rows[key].rank("dense").cast(pl.Int64).to_numpy()
    return rows["_row"].cast(pl.Int64).to_numpy(), codes


class EarlierEvents:
    """What happened to a code strictly before a moment: sums of values over its events, time of the latest.

    Letters: n = events, m = questions, S = values per event.
    """

    def __init__(self, codes: IntArray, times: IntArray, values: FloatArray) -> None:
        """Sorts the events.

        Args:
          codes: int64 [n], of what an event belongs to; 0 to 2**30 - 1.
          times: int64 [n], unix seconds.
          values: float64 [n, S].
        """
        keys = (codes << TIME_BITS) | times
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._running = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values[order], axis=0)])

    def sums(self, codes: IntArray, moments: IntArray, window_s: int | None) -> FloatArray:
        """Sums over moment - window <= time < moment; over all earlier time without a window.

        Args:
          codes, moments: int64 [m].
          window_s: length of the window; None for all earlier time.

        Returns:
          float64 [m, S]; 0 without an event.
        """
        first = np.zeros_like(moments) if window_s is None else np.maximum(moments - window_s, 0)
        start = np.searchsorted(self._keys, (codes << TIME_BITS) | first)
        end = np.searchsorted(self._keys, (codes << TIME_BITS) | moments)
        return self._running[end] - self._running[start]

    def latest(self, codes: IntArray, moments: IntArray) -> IntArray:
        """Unix seconds of the latest event of each code before the moment, int64 [m]; -1 without one."""
        place = np.searchsorted(self._keys, (codes << TIME_BITS) | moments) - 1
        key = np.concatenate([self._keys, [-1]])[place]
        return np.where(key >> TIME_BITS == codes, key & ((1 << TIME_BITS) - 1), -1)
