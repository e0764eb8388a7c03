"""Source files to contract tables: renamed, typed, checked, split by time, written as Parquet.

Everything that can be wrong with source data is found here, before the pipeline starts.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from schema.contract import (
    COMPLETION,
    ITEM_DURATION,
    REQUIRED_INTERACTION_COLUMNS,
    WATCH_TIME,
    ColumnSpec,
    DatasetSpec,
    EntitySpec,
    FeatureKind,
    FeatureSpec,
    TaskKind,
    unix_s,
)
from schema.errors import DataError
from schema.point_in_time import EVENT_TIME, item_counts

_LOGGER = logging.getLogger(__name__)

INTERACTIONS = "interactions.parquet"
USERS = "users.parquet"
ITEMS = "items.parquet"
SUMMARY = "summary.json"

# To be raised when this module writes other tables from the same source, so that older ones are not reused.
_TABLES_VERSION = 2

# Event times outside these are taken for a wrong unit: 1990-01-01 and 2100-01-01.
_EARLIEST_UNIX_S = 631_152_000
_LATEST_UNIX_S = 4_102_444_800
_UNIT_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}

# Above this share of interactions whose item is not in the catalogue, the id columns are taken to be wrong.
_MAX_UNKNOWN_ITEM_SHARE = 0.2

# Text that source files write for a missing value.
# Not "NA": it is the country code of Namibia.
_MISSING = ["", "NaN", "nan", "null", "NULL", "None"]

# Place of a source row among all rows of its table's files, counted from 0.
_ROW = "__row"

# Whether a row is the same as an earlier one of the file in every column, declared or not.
IS_REPEATED = "is_repeated"
_TO_FIX_MAPPING = "map the right source column in the YAML"


@dataclasses.dataclass(frozen=True)
class TablesSummary:
    """What is in the contract tables; saved beside them as summary.json.

    Attributes:
      dataset: name of the dataset.
      rows, positives: interactions and positives per split.
      users, items: rows of the users table and of the catalogue.
      first_event_unix_s, last_event_unix_s: per split.
      train_end_unix_s: the moment as of which everything frozen is computed: one second after the last train
        event, or the declared end of training.
      label_means: mean of each label over the train split.
      warnings: what was dropped or looked odd, in words.
    """

    dataset: str
    rows: dict[str, int]
    positives: dict[str, int]
    users: int
    items: int
    first_event_unix_s: dict[str, int]
    last_event_unix_s: dict[str, int]
    train_end_unix_s: int
    label_means: dict[str, float]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class InteractionRows:
    """A file of interactions, row for row.

    Attributes:
      table: every contract column and label of the declaration, null where the file has none; `row_number`
        from 0; IS_REPEATED. One row per row of the file, in its order.
      absent: contract columns and labels that the file has no source column for.
    """

    table: pl.DataFrame
    absent: tuple[str, ...]


def read_summary(tables_dir: Path) -> TablesSummary:
    """Reads the summary of prepared tables. Raises DataError when the folder holds none."""
    path = tables_dir / SUMMARY
    if not path.is_file():
        raise DataError(f"no contract tables in {tables_dir}; run 'funnel run' first")
    values = json.loads(path.read_text(encoding="utf-8"))
    return TablesSummary(**{**values, "warnings": tuple(values["warnings"])})


def prepare_tables(spec: DatasetSpec, source_dir: Path, data_root: Path) -> Path:
    """Writes the contract tables of a dataset under `data_root`, or finds those written before.

    Args:
      spec: the declaration.
      source_dir: folder that the declaration's file names are relative to.
      data_root: the tables go to `data_root/<fingerprint>`; the fingerprint covers declaration and source
        files, so that unchanged inputs keep their folder and the pipeline's cache holds.

    Returns:
      The folder with interactions.parquet, users.parquet, items.parquet and summary.json.

    Raises:
      DataError: files, columns, types, times, ids or splits break the contract; the text says which and how
        to mend it.
    """
    sources = {
        table: [source_dir / name for name in entity.files]
        for table, entity in (
            ("interactions", spec.interactions),
            ("users", spec.users),
            ("items", spec.items),
        )
    }
    _check_files(sources)
    destination = data_root / _fingerprint(spec, [p for paths in sources.values() for p in paths])
    if (destination / SUMMARY).is_file():
        _LOGGER.info("contract tables reused: %s", destination)
        return destination

    warnings: list[str] = []
    users = _read_entity(sources["users"], spec.users, "user_id", spec.utc_offset_hours, warnings)
    items = _read_entity(sources["items"], spec.items, "item_id", spec.utc_offset_hours, warnings)
    interactions = _read_interactions(sources["interactions"], spec, warnings)
    interactions = _check_references(interactions, users, items, warnings)
    interactions, train_end = _assign_splits(interactions, spec)
    _check_labels(interactions, spec, warnings)
    summary = _summarise(spec, interactions, users, items, train_end, warnings)
    interactions = interactions.with_columns(item_counts(interactions, interactions, items, spec))
    at_train_end = items.select("item_id", pl.lit(train_end, dtype=pl.Int64).alias(EVENT_TIME))
    items = items.with_columns(item_counts(interactions, at_train_end, items, spec))

    data_root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tables-", dir=data_root))
    try:
        interactions.write_parquet(temporary / INTERACTIONS, row_group_size=100_000)
        users.write_parquet(temporary / USERS)
        items.write_parquet(temporary / ITEMS)
        (temporary / SUMMARY).write_text(json.dumps(dataclasses.asdict(summary), indent=1), encoding="utf-8")
        os.replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for warning in warnings:
        _LOGGER.warning("%s", warning)
    return destination


def read_items(spec: DatasetSpec, files: Sequence[Path]) -> pl.DataFrame:
    """Reads and checks an items table by itself, as `prepare_tables` does within a dataset.

    Args:
      spec: the declaration.
      files: CSV or Parquet files with the source columns of the declaration's items table.

    Returns:
      The contract table of the items.

    Raises:
      DataError: files, columns, types, times or ids break the contract; the text says which.
    """
    _check_files({"items": list(files)})
    warnings: list[str] = []
    items = _read_entity(list(files), spec.items, "item_id", spec.utc_offset_hours, warnings)
    for warning in warnings:
        _LOGGER.warning("%s", warning)
    return items


def read_interactions(spec: DatasetSpec, path: Path) -> InteractionRows:
    """Reads a file of interactions by itself: no row is dropped, and only ids and time are required.

    Values are read and mended as `prepare_tables` does: units, `at_least`, the cap on watch time, completion.
    Neither `interactions.start` nor the catalogue applies.

    Args:
      spec: the declaration.
      path: CSV or Parquet with source columns of the declaration's interactions table; it may have others.

    Raises:
      DataError: no such file or one that cannot be read, no rows, no column for user, item or time, or a row
        without one of them; values that cannot be read as declared; times in the wrong unit.
    """
    if not path.is_file():
        raise DataError(f"no interactions file {path}")
    _check_files({"interactions": [path]})
    columns = {**spec.interactions.columns, **spec.interactions.labels}
    required = [columns[name].column for name in REQUIRED_INTERACTION_COLUMNS]
    advice = f"the file must be in the source format of dataset {spec.name}"
    scan = _scan([path], [name for name in required if name is not None], "interactions", advice)
    present = scan.collect_schema().names()
    wanted = dict.fromkeys(c.column for c in columns.values() if c.column in present)
    try:
        numbered = scan.with_row_index(_ROW)
        source = numbered.select(_ROW, *wanted).collect()
        first = numbered.unique(pl.selectors.exclude(_ROW), keep="first").select(_ROW).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"interactions: cannot read {path}: {error}") from error
    warnings: list[str] = []
    table = _mend_watch_time(_typed_interactions(source, spec), spec, warnings)
    for warning in warnings:
        _LOGGER.warning("%s", warning)
    is_first = pl.col("row_number").is_in(first[_ROW].cast(pl.Int64).implode())
    absent = [name for name, c in columns.items() if c.column is not None and c.column not in present]
    if COMPLETION in spec.labels and not {WATCH_TIME, ITEM_DURATION}.isdisjoint(absent):
        absent.append(COMPLETION)
    return InteractionRows(table.with_columns((~is_first).alias(IS_REPEATED)), tuple(absent))


def _check_files(sources: dict[str, list[Path]]) -> None:
    missing = [f"{table}: {path}" for table, paths in sources.items() for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"source files not found: {'; '.join(missing)}; check --data-dir and 'files' in the YAML"
        )
    odd = [str(p) for paths in sources.values() for p in paths if p.suffix not in {".csv", ".parquet"}]
    if odd:
        raise DataError(f"only .csv and .parquet are read, got {', '.join(odd)}")


def _fingerprint(spec: DatasetSpec, paths: Iterable[Path]) -> str:
    """Short hash of the declaration and of name, size and modification time of every source file."""
    digest = hashlib.sha256(f"{_TABLES_VERSION} {spec.model_dump_json()}".encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _scan(
    paths: Sequence[Path], wanted: Sequence[str], table: str, advice: str = _TO_FIX_MAPPING
) -> pl.LazyFrame:
    """All files of a table, CSV as text, in file order, after a check that every wanted column is there."""
    frames = []
    for path in paths:
        try:
            frame = (
                pl.scan_csv(path, infer_schema=False, null_values=_MISSING)
                if path.suffix == ".csv"
                else pl.scan_parquet(path)
            )
            present = frame.collect_schema().names()
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{table}: cannot read {path}: {error}") from error
        absent = [c for c in wanted if c not in present]
        if absent:
            raise DataError(
                f"{table}: {path} has no column {', '.join(map(repr, absent))}; "
                f"it has: {', '.join(present)}; {advice}"
            )
        frames.append(frame)
    return pl.concat(frames, how="vertical_relaxed") if len(frames) > 1 else frames[0]


def _read_distinct(
    paths: Sequence[Path], wanted: Sequence[str], table: str, warnings: list[str]
) -> pl.DataFrame:
    """The wanted columns and the place (`_ROW`) of all rows that differ in some column, declared or not."""
    try:
        source = _scan(paths, wanted, table).with_row_index(_ROW)
        total = source.select(pl.len()).collect().item()
        rows = source.unique(pl.selectors.exclude(_ROW), keep="first", maintain_order=True)
        distinct = rows.select(_ROW, *wanted).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{table}: cannot read {', '.join(map(str, paths))}: {error}") from error
    if len(distinct) < total:
        warnings.append(f"{table}: dropped {total - len(distinct):,} exact duplicate rows of {total:,}")
    return distinct


def _read_interactions(paths: list[Path], spec: DatasetSpec, warnings: list[str]) -> pl.DataFrame:
    columns = {**spec.interactions.columns, **spec.interactions.labels}
    wanted = list(dict.fromkeys(c.column for c in columns.values() if c.column is not None))
    table = _typed_interactions(_read_distinct(paths, wanted, "interactions", warnings), spec)
    start = spec.interactions.start
    if start is not None:
        kept = table.filter(pl.col("event_time_unix_s") >= unix_s(start))
        if len(kept) < len(table):
            warnings.append(
                f"interactions: dropped {len(table) - len(kept):,} rows before start {start.isoformat()}"
            )
        table = kept
    _check_propensities(table)
    return _mend_watch_time(table, spec, warnings)


def _typed_interactions(source: pl.DataFrame, spec: DatasetSpec) -> pl.DataFrame:
    """Contract columns, labels and row number of source rows; null where there is no source column."""
    series = []
    for name, column in {**spec.interactions.columns, **spec.interactions.labels}.items():
        dtype = _interaction_dtype(name)
        if column.column is None or column.column in source.columns:
            values = _cast(source, name, column, dtype, "interactions", spec.utc_offset_hours)
        else:
            values = pl.Series(name, [None], dtype).new_from_index(0, len(source))
        series.append(values)
    table = pl.DataFrame(series).with_columns(source[_ROW].cast(pl.Int64).alias("row_number"))
    _require(table, source[_ROW], REQUIRED_INTERACTION_COLUMNS, "interactions")
    _check_times(table["event_time_unix_s"], "interactions.event_time_unix_s")
    return table


def _check_propensities(table: pl.DataFrame) -> None:
    if "propensity" not in table.columns:
        return
    wrong = table.filter((pl.col("propensity") <= 0) | (pl.col("propensity") > 1))
    if len(wrong):
        raise DataError(
            f"interactions.propensity: {len(wrong):,} values are no probabilities above 0 and up to 1 (for "
            f"instance {wrong['propensity'][0]:g}); leave it empty where it was not logged"
        )


def _mend_watch_time(table: pl.DataFrame, spec: DatasetSpec, warnings: list[str]) -> pl.DataFrame:
    """Takes what cannot be for missing, caps what says nothing, and adds completion."""
    for name in (WATCH_TIME, ITEM_DURATION):
        if name in table.columns:
            table = _nonnegative(table, name, warnings)
    if ITEM_DURATION in table.columns:
        zero = int((table[ITEM_DURATION] == 0).sum())
        if zero:
            warnings.append(f"interactions: {zero:,} rows have {ITEM_DURATION} 0, taken as missing")
            table = table.with_columns(pl.col(ITEM_DURATION).replace(0.0, None))
    if spec.watch_time_cap_durations is not None and WATCH_TIME in table.columns:
        cap = spec.watch_time_cap_durations * pl.col(ITEM_DURATION)
        watched = pl.col(WATCH_TIME)
        table = table.with_columns(pl.when(watched > cap).then(cap).otherwise(watched).alias(WATCH_TIME))
    if COMPLETION in spec.labels:
        # A loop watches more than the whole item; where one of the two is unknown, so is the share.
        share = (pl.col(WATCH_TIME) / pl.col(ITEM_DURATION)).clip(upper_bound=1.0)
        table = table.with_columns(share.cast(pl.Float32).alias(COMPLETION))
    return table


def _interaction_dtype(name: str) -> Any:
    if name in {"user_id", "item_id", "surface"}:
        return pl.String
    if name in {"event_time_unix_s", "position"}:
        return pl.Int64
    return pl.List(pl.String) if name == "search_tokens" else pl.Float32


def _read_entity(
    paths: list[Path], spec: EntitySpec, key: str, utc_offset_hours: float, warnings: list[str]
) -> pl.DataFrame:
    table_name = key.removesuffix("_id") + "s"
    wanted = [c.column for c in spec.columns.values() if c.column is not None]
    wanted += [f.source_column for f in spec.features]
    if spec.title is not None:
        wanted.append(spec.title)
    source = _read_distinct(paths, list(dict.fromkeys(wanted)), table_name, warnings)

    series = [
        _cast(
            source,
            name,
            column,
            pl.Int64 if name.endswith("_unix_s") else pl.String,
            table_name,
            utc_offset_hours,
        )
        for name, column in spec.columns.items()
    ]
    series += [
        _cast(source, f.name, _feature_column(f), _feature_dtype(f), table_name, utc_offset_hours)
        for f in spec.features
    ]
    if key == "item_id":
        title = source[spec.title].cast(pl.String) if spec.title is not None else series[0].rename("title")
        series.append(title.rename("title"))
    table = pl.DataFrame(series)
    required = [name for name in (key, "valid_from_unix_s") if name in table.columns]
    _require(table, source[_ROW], required, table_name)
    _check_unique(table, key, table_name)
    for name in spec.columns:
        if name.endswith("_unix_s"):
            _check_times(table[name].drop_nulls(), f"{table_name}.{name}")
    return table


def _check_unique(table: pl.DataFrame, key: str, table_name: str) -> None:
    keys = [key, "valid_from_unix_s"] if "valid_from_unix_s" in table.columns else [key]
    repeated = table.filter(table.select(keys).is_duplicated())
    if len(repeated):
        examples = ", ".join(repeated[key].unique(maintain_order=True).head(3).to_list())
        raise DataError(
            f"{table_name}: {len(repeated):,} rows share their {' and '.join(keys)} with another row "
            f"(for instance {examples}); keep one row per id, or map valid_from_unix_s if rows hold "
            "successive values"
        )


def _feature_column(feature: FeatureSpec) -> ColumnSpec:
    return ColumnSpec(column=feature.source_column, unit=feature.unit, separator=feature.separator)


def _feature_dtype(feature: FeatureSpec) -> Any:
    if feature.kind is FeatureKind.MULTI_CATEGORICAL:
        return pl.List(pl.String)
    return pl.Float32 if feature.kind is FeatureKind.CONTINUOUS else pl.String


def _cast(
    source: pl.DataFrame, name: str, column: ColumnSpec, dtype: Any, table: str, utc_offset_hours: float
) -> pl.Series:
    """One contract column from its source column, as `dtype`; a value that cannot be that is a DataError.

    A date without a time zone is in the users' local time, `utc_offset_hours` ahead of UTC.
    """
    if column.column is None:
        return pl.Series(name, [column.value]).new_from_index(0, len(source)).cast(dtype).rename(name)
    raw = source[column.column]
    # A Parquet file may hold NaN or empty text where a CSV file holds nothing.
    if raw.dtype.is_float():
        raw = raw.fill_nan(None)
    elif raw.dtype == pl.String:
        raw = raw.replace("", None)
    if column.format is not None:
        moment = raw.cast(pl.String).str.to_datetime(column.format, strict=False)
        local = getattr(moment.dtype, "time_zone", None) is None
        value = moment.dt.epoch("s") - (int(utc_offset_hours * 3_600) if local else 0)
    elif dtype == pl.List(pl.String):
        value = _to_list(raw, column.separator, f"{table}.{name}")
    elif dtype == pl.String:
        value = raw.cast(pl.String)
    else:
        text = raw.str.strip_chars() if raw.dtype == pl.String else raw
        if raw.dtype.is_temporal():
            text = raw.cast(pl.Datetime("us")).dt.epoch("s")
        # Whole numbers are read as such first: a float64 holds microseconds since 1970 only inexactly.
        value = (
            text.cast(pl.Int64, strict=False) if dtype == pl.Int64 else text.cast(pl.Float64, strict=False)
        )
        if dtype == pl.Int64:
            value = value.fill_null(text.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False))
        per_second = _UNIT_PER_SECOND[column.unit]
        if per_second != 1:
            value = value // per_second if dtype == pl.Int64 else value / per_second
        if dtype == pl.Float32:
            value = value.cast(pl.Float32)
            value = value.set(~value.is_finite(), None)
    bad = value.is_null() & raw.is_not_null()
    if bad.any():
        row = int(bad.arg_true()[0])
        raise DataError(
            f"{table}.{name}: {int(bad.sum()):,} values of source column {column.column!r} are not "
            f"{column.format or dtype}; the first is {raw[row]!r} in row {source[_ROW][row] + 1:,}; "
            "mend the source or the YAML's mapping"
        )
    if column.at_least is not None:
        value = (value >= column.at_least).cast(pl.Float32)
    return value.cast(dtype).rename(name)


def _to_list(raw: pl.Series, separator: str | None, where: str) -> pl.Series:
    """Lists of non-empty strings."""
    if isinstance(raw.dtype, pl.List):
        lists = raw.cast(pl.List(pl.String))
    elif separator is None:
        raise DataError(f"{where}: the source holds {raw.dtype}, not lists; declare a separator")
    else:
        lists = raw.cast(pl.String).str.split(separator).list.eval(pl.element().str.strip_chars())
    return lists.list.eval(pl.element().filter(pl.element() != ""))


def _require(table: pl.DataFrame, rows: pl.Series, names: Sequence[str], table_name: str) -> None:
    if table.is_empty():
        raise DataError(f"{table_name}: the source has no rows")
    for name in names:
        empty = rows.filter(table[name].is_null())
        if len(empty):
            raise DataError(
                f"{table_name}.{name}: {len(empty):,} rows have no value, the first is row {empty[0] + 1:,}; "
                "it is required: mend the source or the YAML's mapping"
            )


def _check_times(times: pl.Series, where: str) -> None:
    if times.is_empty():
        return
    low, high = int(times.min()), int(times.max())  # type: ignore[arg-type]
    if low >= _EARLIEST_UNIX_S and high < _LATEST_UNIX_S:
        return
    value = high if high >= _LATEST_UNIX_S else low
    hint = "unix seconds between 1990 and 2100 were expected"
    for unit in ("ms", "us"):
        if _EARLIEST_UNIX_S <= value / _UNIT_PER_SECOND[unit] < _LATEST_UNIX_S:
            hint = f"they look like {'milli' if unit == 'ms' else 'micro'}seconds: declare 'unit: {unit}'"
    raise DataError(f"{where}: times run from {low} to {high}; {hint}")


def _nonnegative(table: pl.DataFrame, name: str, warnings: list[str]) -> pl.DataFrame:
    count = int((table[name] < 0).sum())
    if count:
        warnings.append(f"interactions: {count:,} rows have a negative {name}, taken as missing")
    return table.with_columns(pl.when(pl.col(name) >= 0).then(pl.col(name)).alias(name))


def _check_references(
    interactions: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame, warnings: list[str]
) -> pl.DataFrame:
    """Drops interactions whose item is not in the catalogue; counts users absent from the users table."""
    total = len(interactions)
    known = interactions.filter(pl.col("item_id").is_in(items["item_id"].implode()))
    lost = total - len(known)
    if total and lost / total > _MAX_UNKNOWN_ITEM_SHARE:
        raise DataError(
            f"interactions: {lost:,} of {total:,} rows have an item_id that is not in the items table "
            f"(for instance {_first_absent(interactions, items, 'item_id')}); check that both map the same "
            "id column"
        )
    if lost:
        warnings.append(f"interactions: dropped {lost:,} rows whose item_id is not in the items table")
    absent = known.filter(~pl.col("user_id").is_in(users["user_id"].implode()))["user_id"].n_unique()
    if absent:
        warnings.append(
            f"users: {absent:,} users of the interactions are not in the users table; "
            "their features are missing"
        )
    return known


def _first_absent(table: pl.DataFrame, entity: pl.DataFrame, key: str) -> str:
    return str(table.filter(~pl.col(key).is_in(entity[key].implode()))[key][0])


def _assign_splits(table: pl.DataFrame, spec: DatasetSpec) -> tuple[pl.DataFrame, int]:
    """Adds the column `split`; returns the table and the end of training in unix seconds."""
    split = spec.split
    table = table.sort("event_time_unix_s", "row_number")
    if split.fractions is not None:
        # Cut by position in (event time, file order), so that equal times are split the same way every time.
        first, second = (
            int(len(table) * share + 1e-9) for share in (split.fractions[0], sum(split.fractions[:2]))
        )
        position = pl.int_range(pl.len())
        in_train, in_eval = position < first, position < second
        train_end = int(table["event_time_unix_s"][first - 1]) + 1 if first else 0
    else:
        assert split.train_until is not None and split.eval_until is not None  # SplitSpec checks it
        train_end = unix_s(split.train_until)
        in_train = pl.col("event_time_unix_s") < train_end
        in_eval = pl.col("event_time_unix_s") < unix_s(split.eval_until)
    table = table.with_columns(
        pl.when(in_train)
        .then(pl.lit("train"))
        .when(in_eval)
        .then(pl.lit("eval"))
        .otherwise(pl.lit("test"))
        .alias("split")
    )
    counts = dict(table["split"].value_counts().iter_rows())
    for name in ("train", "eval", "test"):
        if not counts.get(name):
            low, high = (_iso(int(table["event_time_unix_s"][row])) for row in (0, -1))
            raise DataError(
                f"split {name!r} is empty: events run from {low} to {high}, {_describe(spec)}; "
                "change 'split' in the YAML"
            )
    return table, train_end


def _describe(spec: DatasetSpec) -> str:
    if spec.split.fractions is not None:
        return f"fractions are {list(spec.split.fractions)}"
    return f"train_until is {spec.split.train_until}, eval_until is {spec.split.eval_until}"


def _iso(time_unix_s: int) -> str:
    return datetime.datetime.fromtimestamp(time_unix_s, datetime.timezone.utc).isoformat()


def _check_labels(table: pl.DataFrame, spec: DatasetSpec, warnings: list[str]) -> None:
    """Every task can be learnt from the train split, and positives exist in every split."""
    for name in ("train", "eval", "test"):
        part = table.filter(pl.col("split") == name)
        if not (part[spec.positive] > 0).any():
            raise DataError(
                f"split {name!r} has no positive: no row with {spec.positive} > 0 among {len(part):,}"
            )
    train = table.filter(pl.col("split") == "train")
    for task in spec.tasks:
        label = train[task.label].drop_nulls()
        if task.kind is TaskKind.BINARY:
            _check_binary(task.name, label)
        elif label.is_empty() or label.n_unique() == 1:
            raise DataError(
                f"task {task.name}: label {task.label} has fewer than two values in the train split; "
                "remove the task"
            )
        if task.click_label is not None:
            _check_binary(task.name, train[task.click_label].drop_nulls())
        if task.kind is TaskKind.COMPLETION and not label.is_between(0, 1).all():
            odd = label.filter(~label.is_between(0, 1))
            raise DataError(
                f"task {task.name}: label {task.label} must be a share from 0 to 1, got {odd[0]}; "
                f"use the label {COMPLETION!r}, or kind: regression"
            )
        missing = len(train) - len(label)
        if missing:
            warnings.append(
                f"task {task.name}: {missing:,} of {len(train):,} train rows have no {task.label}; "
                "they get no weight"
            )


def _check_binary(task_name: str, label: pl.Series) -> None:
    odd = label.filter(~label.is_in([0.0, 1.0]))
    if len(odd):
        raise DataError(
            f"task {task_name}: label {label.name} must be 0 or 1, got {odd[0]}; use 'at_least' to cut it"
        )
    positives = int(label.sum())
    if positives in (0, len(label)):
        kind = "positives" if positives == 0 else "negatives"
        raise DataError(
            f"task {task_name}: label {label.name} has no {kind} in {len(label):,} train rows; "
            "remove the task"
        )


def _summarise(
    spec: DatasetSpec,
    interactions: pl.DataFrame,
    users: pl.DataFrame,
    items: pl.DataFrame,
    train_end: int,
    warnings: list[str],
) -> TablesSummary:
    splits = interactions.group_by("split").agg(
        pl.len().alias("rows"),
        (pl.col(spec.positive) > 0).sum().alias("positives"),
        pl.col("event_time_unix_s").min().alias("first"),
        pl.col("event_time_unix_s").max().alias("last"),
    )
    by_split = {row["split"]: row for row in splits.iter_rows(named=True)}
    train = interactions.filter(pl.col("split") == "train")
    order = ("train", "eval", "test")
    return TablesSummary(
        dataset=spec.name,
        rows={s: by_split[s]["rows"] for s in order},
        positives={s: by_split[s]["positives"] for s in order},
        users=len(users),
        items=len(items),
        first_event_unix_s={s: by_split[s]["first"] for s in order},
        last_event_unix_s={s: by_split[s]["last"] for s in order},
        train_end_unix_s=train_end,
        label_means={name: float(train[name].mean() or 0.0) for name in spec.labels},  # type: ignore[arg-type]
        warnings=tuple(warnings),
    )
