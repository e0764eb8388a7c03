"""Source files to contract tables: how source data can be wrong, and what becomes of odd rows."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from schema import tables
from schema.contract import DatasetSpec
from schema.errors import DataError
from schema.tables import INTERACTIONS, ITEMS, SUMMARY, USERS, prepare_tables, read_summary

DAY = 86_400
START = 1_704_067_200  # 2024-01-01T00:00:00Z

DECLARATION: dict[str, Any] = {
    "name": "tiny",
    "interactions": {
        "files": ["log.csv"],
        "columns": {
            "user_id": "user",
            "item_id": "video",
            "event_time_unix_s": "time",
            "watch_time_s": {"column": "played_ms", "unit": "ms"},
            "item_duration_s": "length_s",
        },
        "labels": {"click": "clicked", "loved": {"column": "stars", "at_least": 4}, "shown": {"value": 1}},
    },
    "users": {
        "files": ["users.csv"],
        "columns": {"user_id": "user"},
        "features": [{"name": "age", "kind": "continuous"}, {"name": "country", "kind": "categorical"}],
    },
    "items": {
        "files": ["items.csv"],
        "columns": {"item_id": "video", "upload_time_unix_s": {"column": "day", "format": "%Y-%m-%d"}},
        "features": [{"name": "tags", "kind": "multi_categorical", "separator": "|"}],
        "title": "name",
    },
    "positive": "click",
    "tasks": [{"name": "click", "label": "click", "kind": "binary"}],
    "split": {"train_until": "2024-01-03T00:00:00+00:00", "eval_until": "2024-01-04T00:00:00+00:00"},
}

# Two users and three items over four days; rows 1-4 are train, 5-6 eval, 7-8 test.
LOG: dict[str, list[Any]] = {
    "user": ["u1", "u2", "u1", "u2", "u1", "u2", "u1", "u2"],
    "video": ["a", "b", "c", "a", "b", "c", "c", "b"],
    "time": [START + hour * 3_600 for hour in (0, 5, 24, 30, 48, 60, 72, 80)],
    "played_ms": [1_500, 0, 20_000, 3_000, 4_000, None, 6_000, 7_000],
    "length_s": [10.0, 10.0, 2.0, 10.0, 10.0, 10.0, 10.0, 10.0],
    "clicked": [1, 0, 1, 1, 1, 0, 1, 0],
    "stars": [5, 1, 4, 3, None, 5, 5, 2],
}
PEOPLE: dict[str, list[Any]] = {"user": ["u1", "u2"], "age": [30.5, None], "country": ["NO", None]}
VIDEOS: dict[str, list[Any]] = {
    "video": ["a", "b", "c"],
    "day": ["2023-12-31", "2023-01-01", None],
    "tags": ["x|y", " y |", None],
    "name": ["A film", "B", None],
}


class Source:
    """A source folder whose tables and declaration a test changes before it prepares them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log, self.people, self.videos = (dict(copy.deepcopy(t)) for t in (LOG, PEOPLE, VIDEOS))
        self.declaration = copy.deepcopy(DECLARATION)
        self.suffix = "csv"

    def columns(self) -> dict[str, Any]:
        """The mapping of the interactions table, to be changed in place."""
        mapping: dict[str, Any] = self.declaration["interactions"]["columns"]
        return mapping

    def write(self) -> None:
        """Writes the three source files."""
        for name, table in (("log", self.log), ("users", self.people), ("items", self.videos)):
            frame = pl.DataFrame(table)
            path = self.folder / f"{name}.{self.suffix}"
            if self.suffix == "csv":
                frame.write_csv(path)
            else:
                frame.write_parquet(path)

    def spec(self) -> DatasetSpec:
        """The declaration, its files named as they were written."""
        for table, name in (("interactions", "log"), ("users", "users"), ("items", "items")):
            self.declaration[table]["files"] = [f"{name}.{self.suffix}"]
        return DatasetSpec.model_validate(self.declaration)

    def prepare(self) -> Path:
        """Writes the files and prepares them."""
        self.write()
        return prepare_tables(self.spec(), self.folder, self.folder / "out")

    def read(self, name: str = INTERACTIONS) -> pl.DataFrame:
        """Prepares the files and reads one contract table."""
        return pl.read_parquet(self.prepare() / name)

    def refuse(self, *told: str) -> None:
        """Preparing fails, says every text of `told`, and leaves nothing behind."""
        with pytest.raises(DataError) as error:
            self.prepare()
        for words in told:
            assert words in str(error.value)
        assert not list((self.folder / "out").glob("*"))

    def warnings(self) -> str:
        """What the summary warns of."""
        return "\n".join(read_summary(self.prepare()).warnings)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_values_arrive_renamed_typed_and_in_seconds(source: Source) -> None:
    table = source.read()
    assert table.schema == {
        "user_id": pl.String,
        "item_id": pl.String,
        "event_time_unix_s": pl.Int64,
        "watch_time_s": pl.Float32,
        "item_duration_s": pl.Float32,
        "click": pl.Float32,
        "loved": pl.Float32,
        "shown": pl.Float32,
        "row_number": pl.Int64,
        "completion": pl.Float32,
        "split": pl.String,
        "item_counts": pl.List(pl.Float32),
    }
    assert table["watch_time_s"].to_list() == [1.5, 0, 20, 3, 4, None, 6, 7]
    assert table["loved"].to_list() == [1, 0, 1, 0, None, 1, 1, 0]
    assert table["shown"].to_list() == [1.0] * 8
    assert table["split"].to_list() == ["train"] * 4 + ["eval"] * 2 + ["test"] * 2

    users = source.read(USERS)
    assert users["age"].to_list() == [30.5, None]
    items = source.read(ITEMS)
    assert items["tags"].to_list() == [["x", "y"], ["y"], None]
    assert items["title"].to_list() == ["A film", "B", None]
    assert items["upload_time_unix_s"].to_list() == [1_703_980_800, 1_672_531_200, None]


def test_the_summary_counts_what_is_in_the_tables(source: Source) -> None:
    summary = read_summary(source.prepare())
    assert summary.rows == {"train": 4, "eval": 2, "test": 2}
    assert summary.positives == {"train": 3, "eval": 1, "test": 1}
    assert (summary.users, summary.items) == (2, 3)
    assert summary.first_event_unix_s["eval"] == START + 48 * 3_600
    assert summary.last_event_unix_s["eval"] == START + 60 * 3_600
    assert summary.train_end_unix_s == START + 2 * DAY
    assert summary.label_means["click"] == pytest.approx(3 / 4)
    assert summary.label_means["watch_time_s"] == pytest.approx((1.5 + 0 + 20 + 3) / 4)
    assert summary.warnings == ()


def test_csv_and_parquet_give_the_same_tables(tmp_path: Path) -> None:
    results = []
    for suffix in ("csv", "parquet"):
        folder = tmp_path / suffix
        folder.mkdir()
        source = Source(folder)
        source.suffix = suffix
        out = source.prepare()
        results.append([pl.read_parquet(out / name) for name in (INTERACTIONS, USERS, ITEMS)])
    for csv, parquet in zip(*results, strict=True):
        assert csv.equals(parquet)


def test_nothing_written_for_a_value_is_missing_in_parquet_too(source: Source) -> None:
    source.suffix = "parquet"
    source.people.update(age=[30.5, float("nan")], country=["NO", ""])
    source.log["played_ms"] = [1_500.0, float("nan"), *LOG["played_ms"][2:]]
    users = source.read(USERS)
    assert users["age"].to_list() == [30.5, None]
    assert users["country"].to_list() == ["NO", None]
    assert source.read()["watch_time_s"].to_list()[:2] == [1.5, None]


def test_lists_of_a_parquet_file_lose_their_empty_values(source: Source) -> None:
    source.suffix = "parquet"
    del source.declaration["items"]["features"][0]["separator"]
    source.videos["tags"] = [["x", None, "", "y"], [], None]
    assert source.read(ITEMS)["tags"].to_list() == [["x", "y"], [], None]


def test_dates_and_moments_of_parquet_are_read_as_unix_seconds(source: Source) -> None:
    source.suffix = "parquet"
    utc = datetime.timezone.utc
    source.log["time"] = [datetime.datetime.fromtimestamp(t, utc) for t in LOG["time"]]
    source.declaration["items"]["columns"]["upload_time_unix_s"] = "day"
    source.videos["day"] = [datetime.date(2023, 12, 31), datetime.date(2023, 1, 1), None]
    assert source.read()["event_time_unix_s"].to_list() == LOG["time"]
    assert source.read(ITEMS)["upload_time_unix_s"].to_list() == [1_703_980_800, 1_672_531_200, None]


def test_a_missing_file_is_named_with_its_table(source: Source) -> None:
    source.write()
    (source.folder / "users.csv").unlink()
    with pytest.raises(DataError, match=r"users: .*users\.csv; check --data-dir"):
        prepare_tables(source.spec(), source.folder, source.folder / "out")


def test_a_file_of_another_kind_is_refused(source: Source) -> None:
    source.write()
    source.declaration["users"]["files"] = ["users.json"]
    (source.folder / "users.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"only .csv and .parquet are read, got .*users\.json"):
        prepare_tables(DatasetSpec.model_validate(source.declaration), source.folder, source.folder / "out")


def test_a_missing_column_is_named_with_those_that_are_there(source: Source) -> None:
    source.columns()["watch_time_s"] = "playtime"
    source.refuse("interactions", "no column 'playtime'", "played_ms", "log.csv")


def test_a_file_that_is_not_a_table_is_named(source: Source) -> None:
    source.suffix = "parquet"
    source.write()
    (source.folder / "items.parquet").write_bytes(b"not a parquet file")
    with pytest.raises(DataError, match=r"items: cannot read .*items\.parquet"):
        prepare_tables(source.spec(), source.folder, source.folder / "out")


@pytest.mark.parametrize("word", ["often", "inf", "1e300"])
def test_a_value_of_the_wrong_type_is_named_with_its_row(source: Source, word: str) -> None:
    source.log["played_ms"] = [*map(str, range(6)), word, "7"]
    source.refuse("interactions.watch_time_s", "1 values", "'played_ms'", repr(word), "row 7")


def test_the_row_named_counts_dropped_duplicates(source: Source) -> None:
    source.log = {name: [values[0], *values] for name, values in LOG.items()}
    source.log["clicked"] = [*map(str, source.log["clicked"][:-1]), "yes"]
    source.refuse("interactions.click", "'yes'", "row 9")


def test_a_date_that_does_not_fit_its_format_is_named(source: Source) -> None:
    source.videos["day"] = ["2023-12-31", "31.12.2023", None]
    source.refuse("items.upload_time_unix_s", "%Y-%m-%d", "31.12.2023", "row 2")


def test_text_without_separator_is_not_taken_for_a_list(source: Source) -> None:
    del source.declaration["items"]["features"][0]["separator"]
    source.refuse("items.tags", "declare a separator")


@pytest.mark.parametrize(
    ("table", "column", "told"),
    [
        ("log", "user", "interactions.user_id"),
        ("log", "video", "interactions.item_id"),
        ("log", "time", "interactions.event_time_unix_s"),
        ("people", "user", "users.user_id"),
        ("videos", "video", "items.item_id"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_missing_id_or_time_is_named_with_its_row(
    source: Source, table: str, column: str, told: str, suffix: str
) -> None:
    source.suffix = suffix
    values = getattr(source, table)[column]
    values[1] = "" if suffix == "parquet" and isinstance(values[1], str) else None
    source.refuse(told, "1 rows have no value", "row 2")


def test_a_table_without_rows_is_refused(source: Source) -> None:
    source.videos = {name: [] for name in VIDEOS}
    source.refuse("items: the source has no rows")


@pytest.mark.parametrize(
    ("table", "key", "told"), [("people", "user", "users"), ("videos", "video", "items")]
)
def test_an_id_with_two_different_rows_is_refused(source: Source, table: str, key: str, told: str) -> None:
    for name, values in getattr(source, table).items():
        values.append(values[0] if name == key else None)
    source.refuse(told, "2 rows share their", str(getattr(source, table)[key][0]), "valid_from_unix_s")


def test_exact_duplicates_are_dropped_and_counted(source: Source) -> None:
    for values in source.log.values():
        values.extend([values[2], values[2]])
    for values in source.people.values():
        values.append(values[0])
    assert len(source.read()) == 8
    assert source.read(USERS)["user_id"].to_list() == ["u1", "u2"]
    assert "interactions: dropped 2 exact duplicate rows of 10" in source.warnings()
    assert "users: dropped 1 exact duplicate rows of 3" in source.warnings()


def test_rows_that_differ_only_in_an_undeclared_column_are_kept(source: Source) -> None:
    for values in source.log.values():
        values.append(values[7])
    source.log["request"] = [*range(8), 99]
    assert len(source.read()) == 9
    assert source.warnings() == ""


@pytest.mark.parametrize(("unit", "factor"), [("ms", 1_000), ("us", 1_000_000)])
def test_times_of_another_unit_are_refused_with_the_unit_to_declare(
    source: Source, unit: str, factor: int
) -> None:
    source.log["time"] = [t * factor + factor // 2 for t in LOG["time"]]
    source.refuse("interactions.event_time_unix_s", f"declare 'unit: {unit}'")
    source.columns()["event_time_unix_s"] = {"column": "time", "unit": unit}
    assert source.read()["event_time_unix_s"].to_list() == LOG["time"]


def test_times_that_fit_no_unit_are_refused(source: Source) -> None:
    source.log["time"] = [*LOG["time"][:7], 12]
    source.refuse("12", "between 1990 and 2100")


@pytest.mark.parametrize(
    ("split", "empty"),
    [
        ({"train_until": "2023-12-01T00:00:00Z", "eval_until": "2024-01-04T00:00:00Z"}, "train"),
        ({"train_until": "2024-01-03T00:00:00Z", "eval_until": "2024-01-03T00:00:01Z"}, "test"),
        ({"train_until": "2024-01-03T00:00:00Z", "eval_until": "2025-01-01T00:00:00Z"}, "test"),
        ({"fractions": [0.05, 0.05, 0.9]}, "train"),
    ],
)
def test_an_empty_split_is_refused_with_the_span_of_the_data(
    source: Source, split: dict[str, Any], empty: str
) -> None:
    source.declaration["split"] = split
    if "eval_until" in split and split["eval_until"].endswith(":01Z"):
        source.log = {name: values[:5] for name, values in LOG.items()}
    source.refuse(f"split '{empty}' is empty", "2024-01-01T00:00:00+00:00")


def test_a_cut_time_belongs_to_the_later_split(source: Source) -> None:
    table = source.read()
    assert dict(table.select("event_time_unix_s", "split").iter_rows())[START + 2 * DAY] == "eval"


def _fraction_oracle(times: list[int], fractions: list[float]) -> list[str]:
    """The split of each row, in file order: equal times in file order, cuts rounded down."""
    order = sorted(range(len(times)), key=lambda row: (times[row], row))
    splits = [""] * len(times)
    for place, row in enumerate(order):
        share = (place + 1) / len(times)
        if share <= fractions[0] + 1e-6:
            splits[row] = "train"
        else:
            splits[row] = "eval" if share <= fractions[0] + fractions[1] + 1e-6 else "test"
    return splits


@pytest.mark.parametrize("fractions", [[0.8, 0.1, 0.1], [0.29, 0.3, 0.41], [0.7, 0.1, 0.2]])
@pytest.mark.parametrize("rows", [100, 97])
def test_fractions_cut_by_time_then_file_order(source: Source, fractions: list[float], rows: int) -> None:
    rng = np.random.default_rng(rows)
    times = [START + int(t) for t in rng.integers(0, 20, rows)]  # many ties
    source.log = {
        "user": ["u1"] * rows,
        "video": [("a", "b", "c")[row % 3] for row in range(rows)],
        "time": times,
        "played_ms": list(range(rows)),
        "length_s": [10.0] * rows,
        "clicked": [row % 2 for row in range(rows)],
        "stars": [1] * rows,
    }
    source.declaration["split"] = {"fractions": fractions}
    table = source.read().sort("row_number")
    assert table["row_number"].to_list() == list(range(rows))
    assert table["split"].to_list() == _fraction_oracle(times, fractions)
    last_train = max(
        t for t, s in zip(times, _fraction_oracle(times, fractions), strict=True) if s == "train"
    )
    assert read_summary(source.prepare()).train_end_unix_s == last_train + 1


def test_interactions_of_a_user_without_a_row_are_kept_and_counted(source: Source) -> None:
    source.people = {name: values[:1] for name, values in PEOPLE.items()}
    assert source.read()["user_id"].to_list() == LOG["user"]
    assert "users: 1 users of the interactions are not in the users table" in source.warnings()


def test_interactions_of_an_item_without_a_row_are_dropped_and_counted(source: Source) -> None:
    source.log["video"] = [*LOG["video"][:7], "gone"]
    table = source.read()
    assert table["item_id"].to_list() == LOG["video"][:7]
    assert "interactions: dropped 1 rows whose item_id" in source.warnings()


def test_too_many_items_without_a_row_are_taken_for_a_wrong_column(source: Source) -> None:
    source.log["video"] = [*LOG["video"][:6], "gone", "lost"]
    source.refuse("2 of 8 rows have an item_id that is not in the items table", "gone", "same id column")


def _clicks(values: list[Any]) -> Callable[[Source], None]:
    return lambda source: source.log.update(clicked=values)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(_clicks([0, 0, 0, 0, 1, 1, 1, 1]), "split 'train' has no positive", id="train positive"),
        pytest.param(_clicks([1, 0, 1, 1, 0, 0, 1, 0]), "split 'eval' has no positive", id="eval positive"),
        pytest.param(_clicks([1, 1, 1, 1, 1, 0, 1, 0]), "task click: label click has no negatives", id="all"),
        pytest.param(_clicks([1, 2, 1, 0, 1, 0, 1, 0]), "must be 0 or 1, got 2", id="not binary"),
    ],
)
def test_a_label_that_cannot_be_learnt_is_refused(
    source: Source, change: Callable[[Source], None], told: str
) -> None:
    change(source)
    source.refuse(told)


def test_a_task_without_positives_is_refused(source: Source) -> None:
    source.declaration["tasks"].append({"name": "love", "label": "loved", "kind": "binary"})
    source.log["stars"] = [1, 1, 1, 1, 5, 5, 5, 5]
    source.refuse("task love: label loved has no positives in 4 train rows")


@pytest.mark.parametrize("played", [[None] * 4, [5_000] * 4])
def test_a_regression_without_two_values_is_refused(source: Source, played: list[Any]) -> None:
    source.declaration["tasks"].append({"name": "watch", "label": "watch_time_s", "kind": "watch_time"})
    source.log["played_ms"] = [*played, 1_000, 2_000, 3_000, 4_000]
    source.refuse("task watch: label watch_time_s has fewer than two values")


def test_rows_without_the_label_of_a_task_are_counted(source: Source) -> None:
    source.declaration["tasks"].append({"name": "love", "label": "loved", "kind": "binary"})
    source.log["stars"] = [5, 1, None, 3, 5, 5, 5, 5]
    assert "task love: 1 of 4 train rows have no loved" in source.warnings()


def test_negative_watch_time_and_zero_duration_count_as_missing(source: Source) -> None:
    source.log["played_ms"] = [-1, *LOG["played_ms"][1:]]
    source.log["length_s"] = [10.0, 0.0, *LOG["length_s"][2:]]
    table = source.read()
    assert table["watch_time_s"][0] is None
    assert table["item_duration_s"].to_list()[:3] == [10.0, None, 2.0]
    assert "1 rows have a negative watch_time_s" in source.warnings()
    assert "1 rows have item_duration_s 0" in source.warnings()


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.01])
def test_a_propensity_that_is_no_probability_is_refused(source: Source, wrong: float) -> None:
    source.columns()["propensity"] = "chance"
    chances = [0.5, None, 1.0, 0.01, 0.5, 0.5, 0.5, 0.5]
    source.log["chance"] = chances
    assert source.read()["propensity"].to_list() == pytest.approx(chances)
    source.log["chance"] = [*chances[:-1], wrong]
    with pytest.raises(DataError, match=rf"interactions\.propensity: 1 values are no .*instance {wrong:g}\)"):
        source.prepare()


def test_the_watch_time_cap_is_in_durations_and_invents_no_watch_time(source: Source) -> None:
    source.declaration["watch_time_cap_durations"] = 5
    source.log["length_s"] = [10.0, 10.0, 2.0, 0.0, 10.0, 10.0, 10.0, 0.0]
    source.log["played_ms"] = [1_500, 0, 20_000, 90_000, 4_000, None, 60_000, None]
    # Row 3 ran over 5 x 2 s; row 4 has no duration; rows 6 and 8 have no watch time.
    assert source.read()["watch_time_s"].to_list() == [1.5, 0, 10, 90, 4, None, 50, None]


def test_completion_is_the_share_watched_at_most_all_and_unknown_where_either_part_is(source: Source) -> None:
    source.log["played_ms"] = [1_500, 0, 20_000, 3_000, -1, None, 6_000, 7_000]
    source.log["length_s"] = [10, 10, 2, 0, 10, 10, None, 7]
    # Row 3 looped ten times; rows 4 and 7 have no duration, rows 5 and 6 no watch time; row 8 saw the end.
    assert source.read()["completion"].to_list() == pytest.approx([0.15, 0, 1, None, None, None, None, 1])
    assert read_summary(source.prepare()).label_means["completion"] == pytest.approx(1.15 / 3)


def test_completion_of_a_capped_watch_time_below_one_duration_is_capped_too(source: Source) -> None:
    source.declaration["watch_time_cap_durations"] = 0.5
    assert source.read()["completion"].to_list()[:4] == pytest.approx([0.15, 0, 0.5, 0.3])


def test_a_dataset_without_durations_has_no_completion(source: Source) -> None:
    del source.columns()["item_duration_s"]
    assert "completion" not in source.read().columns


def test_a_completion_task_takes_shares_only(source: Source) -> None:
    source.declaration["tasks"].append({"name": "share", "label": "completion", "kind": "completion"})
    source.prepare()
    source.declaration["tasks"][1]["label"] = "watch_time_s"
    with pytest.raises(
        DataError, match=r"task share: label watch_time_s must be a share from 0 to 1, got 1.5"
    ):
        source.prepare()


def test_a_click_label_that_a_watch_time_task_cannot_learn_is_refused(source: Source) -> None:
    task = {"name": "watch", "label": "watch_time_s", "kind": "watch_time", "method": "covington_logistic"}
    source.declaration["tasks"].append({**task, "click_label": "shown"})
    source.refuse("task watch: label shown has no negatives in 4 train rows")


def test_every_row_counts_the_log_before_it_and_an_item_that_before_the_end_of_training(
    source: Source,
) -> None:
    # Impressions and clicks: of the log; of the item within a day, within a week, and in all.
    counts = source.read()["item_counts"].to_list()
    assert counts[0] == [0] * 8
    # c at hour 72: clicked at hour 24, shown without a click at hour 60.
    assert counts[6] == [6, 4, 1, 0, 2, 1, 2, 1]
    # b at hour 80: last shown more than a day ago, in the eval split, where it was clicked.
    assert counts[7] == [7, 5, 0, 0, 2, 1, 2, 1]
    # a was clicked at hours 0 and 30, b was not at hour 5; at hour 48, when training ends, b is shown again.
    assert source.read(ITEMS).select("item_id", "item_counts").rows() == [
        ("a", [4, 3, 1, 1, 2, 2, 2, 2]),
        ("b", [4, 3, 0, 0, 1, 0, 1, 0]),
        ("c", [4, 3, 1, 1, 1, 1, 1, 1]),
    ]


def test_counts_are_by_the_declared_keys_and_windows(source: Source) -> None:
    source.declaration["counters"] = {"keys": ["tags"], "windows_days": [0.5]}
    # Tags: a has x and y, b has y, c has none. b at hour 48: a at hour 0 and b at hour 5 share y; a at 30.
    assert source.read()["item_counts"].to_list()[4] == [4, 3, 0, 0, 3, 2]
    # a at hour 48: its tag x had two clicks, y three impressions and two clicks.
    assert source.read(ITEMS)["item_counts"].to_list()[0] == [4, 3, 0, 0, 5, 4]


def test_rows_before_the_start_are_dropped_and_counted(source: Source) -> None:
    source.declaration["interactions"]["start"] = "2024-01-01T05:00:00+00:00"
    table = source.read()
    assert table["event_time_unix_s"].min() == START + 5 * 3_600
    assert len(table) == 7
    assert "dropped 1 rows before start" in source.warnings()


def test_successive_values_of_one_user_are_kept_by_their_start(source: Source) -> None:
    source.declaration["users"]["columns"]["valid_from_unix_s"] = "since"
    source.people = {
        "user": ["u1", "u1", "u2"],
        "age": [1.0, 2.0, 3.0],
        "country": ["NO", "SE", "FI"],
        "since": [START - DAY, START + DAY, START - DAY],
    }
    assert source.read(USERS)["valid_from_unix_s"].to_list() == [START - DAY, START + DAY, START - DAY]
    source.people["since"] = [START, START, START]
    (source.folder / "out").rename(source.folder / "before")
    source.refuse("users", "2 rows share their user_id and valid_from_unix_s", "u1")
    source.people["since"] = [START, None, START]
    source.refuse("users.valid_from_unix_s", "row 2")


def test_several_files_are_read_in_the_order_of_the_declaration(source: Source) -> None:
    source.write()
    frame = pl.read_csv(source.folder / "log.csv")
    frame[:3].write_csv(source.folder / "first.csv")
    frame[3:].write_csv(source.folder / "second.csv")
    whole = source.read()
    source.declaration["interactions"]["files"] = ["first.csv", "second.csv"]
    spec = DatasetSpec.model_validate(source.declaration)
    out = prepare_tables(spec, source.folder, source.folder / "out")
    assert pl.read_parquet(out / INTERACTIONS).equals(whole)


@pytest.mark.parametrize("failing", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing_behind(
    source: Source, monkeypatch: pytest.MonkeyPatch, failing: BaseException
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise failing

    with monkeypatch.context() as patch:
        patch.setattr("schema.tables.json.dumps", fail)
        with pytest.raises(type(failing)):
            source.prepare()
    assert list((source.folder / "out").iterdir()) == []
    assert (source.prepare() / SUMMARY).is_file()


def test_unchanged_sources_keep_their_folder_and_are_not_read_again(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = source.prepare()

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(tables, "_scan", fail)
    assert prepare_tables(source.spec(), source.folder, source.folder / "out") == first


def test_a_changed_source_or_declaration_gets_a_new_folder(source: Source) -> None:
    first = source.prepare()
    source.people["age"] = [31.25, 7.0]
    second = source.prepare()
    source.people["age"] = [32.25, 8.0]  # a file of the same size
    third = source.prepare()
    source.declaration["utc_offset_hours"] = 3
    fourth = source.prepare()
    assert len({first, second, third, fourth}) == 4
    assert pl.read_parquet(first / USERS)["age"].to_list() == [30.5, None]
    assert pl.read_parquet(second / USERS)["age"].to_list() == [31.25, 7.0]


def test_a_folder_without_tables_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no contract tables in {tmp_path}"):
        read_summary(tmp_path)


def test_the_summary_is_plain_json(source: Source) -> None:
    values = json.loads((source.prepare() / SUMMARY).read_text(encoding="utf-8"))
    assert values["dataset"] == "tiny"


def test_a_date_without_a_time_zone_is_in_the_users_local_time(source: Source) -> None:
    utc = source.read(ITEMS)["upload_time_unix_s"].to_list()
    source.declaration["utc_offset_hours"] = 8
    local = source.read(ITEMS)["upload_time_unix_s"].to_list()
    assert utc == [1_703_980_800, 1_672_531_200, None]
    assert local == [1_703_980_800 - 8 * 3_600, 1_672_531_200 - 8 * 3_600, None]


def test_the_text_na_in_a_csv_file_is_a_value(source: Source) -> None:
    source.people["country"] = ["NA", None]
    assert source.read(USERS)["country"].to_list() == ["NA", None]
