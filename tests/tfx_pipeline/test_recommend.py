"""Requests for many users, and the files that name them."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from schema.errors import DataError, ServingError
from tests.tfx_pipeline import taste_world
from tfx_pipeline.config import RunPaths, load_run_config
from tfx_pipeline.recommend import _rows, read_user_ids, serving_folder
from tfx_pipeline.run_result import RunResult
from tfx_pipeline.user_states import UserState, padded, query_arrays, unknown_user_state


def test_lists_are_padded_on_the_right_to_the_longest() -> None:
    assert padded([["a", "b", "c"], [], ["d"]]).tolist() == [["a", "b", "c"], ["", "", ""], ["d", "", ""]]


@pytest.mark.parametrize(("lists", "shape"), [([[], []], (2, 0)), ([], (0, 0))])
def test_no_values_are_an_array_of_width_zero(lists: list[list[str]], shape: tuple[int, int]) -> None:
    assert padded(lists).shape == shape


@pytest.fixture
def states() -> list[UserState]:
    query = {
        "user_id": "u1",
        "country": "de",
        "age": 31.0,
        "surface": "home",
        "event_time_unix_s": 1_700_000_000,
        "history_item_ids": ["v1", "v2"],
    }
    known = UserState("u1", query, ("v1", "v2"), b"")
    return [known, unknown_user_state("stranger", known)]


def test_query_arrays_follow_the_signature(states: list[UserState], tmp_path: Path) -> None:
    spec = load_run_config(taste_world.write(tmp_path / "world")).dataset
    arrays = query_arrays(states, spec)
    assert arrays["user_id"].tolist() == ["u1", "stranger"]
    assert arrays["country"].tolist() == ["de", ""]
    assert arrays["age"].dtype == np.float32
    np.testing.assert_array_equal(arrays["age"], np.array([31, np.nan], np.float32))
    assert arrays["event_time_unix_s"].dtype == np.int64
    # A stranger asks at the same moment, on the same surface.
    assert arrays["event_time_unix_s"].tolist() == [1_700_000_000] * 2
    assert arrays["surface"].tolist() == ["home", "home"]
    assert arrays["history_item_ids"].tolist() == [["v1", "v2"], ["", ""]]


def test_rows_are_one_per_user_and_rank_without_padding() -> None:
    item_ids = np.array([[b"v1", "vidéo".encode(), b""], [b"v3", b"", b""]], dtype=object)
    scores = np.array([[3, 2, 0], [1, 0, 0]], np.float32)
    table = _rows(["u1", "ü2"], item_ids, scores)
    assert table.rows() == [("u1", 1, "v1", 3.0), ("u1", 2, "vidéo", 2.0), ("ü2", 1, "v3", 1.0)]
    assert table.dtypes == [pl.String, pl.Int32, pl.String, pl.Float32]


def test_a_user_with_nothing_to_recommend_has_no_row() -> None:
    table = _rows(["u1"], np.array([[b""]], dtype=object), np.zeros((1, 1), np.float32))
    assert table.is_empty()


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_user_ids_keep_the_order_of_the_file_and_are_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"users.{kind}"
    if kind == "txt":
        path.write_text("007\n\n  u1 \nü2\n", encoding="utf-8")
    else:
        table = pl.DataFrame({"other": [1, 2, 3, 4], "user_id": ["007", None, "u1", "ü2"]})
        table.write_csv(path) if kind == "csv" else table.write_parquet(path)
    assert read_user_ids(path) == ["007", "u1", "ü2"]


def test_numeric_user_ids_of_a_parquet_file_become_text(tmp_path: Path) -> None:
    path = tmp_path / "users.parquet"
    pl.DataFrame({"user_id": [3, 1]}).write_parquet(path)
    assert read_user_ids(path) == ["3", "1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("users.txt", b"", "holds no user id"),
        ("users.txt", b"\n \n", "holds no user id"),
        ("users.txt", b"u1\nu2\nu1\n", "holds user 'u1' more than once"),
        ("users.txt", b"\xff\xfeu1", "cannot be read"),
        ("users.csv", b"", "is empty; a column 'user_id' was expected"),
        ("users.csv", b"user_id\n", "holds no user id"),
        ("users.csv", b"id,name\n1,a\n", "has no column 'user_id'; it has: id, name"),
        ("users.csv", b"user_id\nu1\nu1\n", "holds user 'u1' more than once"),
        ("users.parquet", b"user_id\nu1\n", "cannot be read"),
    ],
)
def test_a_users_file_that_is_wrong_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_user_ids(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_users_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no users file .*users\.txt"):
        read_user_ids(tmp_path / "users.txt")


@pytest.fixture
def result() -> RunResult:
    return RunResult("d", "{}", "t", "u", {}, {}, {"retrieval": "too bad"}, "report.html", ())


def test_the_newest_version_is_the_largest_number(tmp_path: Path, result: RunResult) -> None:
    base = RunPaths(tmp_path).serving_models / "retrieval"
    for name in ("9", "10", ".staging", "notes"):
        (base / name).mkdir(parents=True)
    assert serving_folder(result, RunPaths(tmp_path), "retrieval") == base / "10"


def test_a_model_that_was_never_pushed_tells_why(tmp_path: Path, result: RunResult) -> None:
    with pytest.raises(ServingError, match=r"no retrieval model was pushed to .*: too bad; see report\.html"):
        serving_folder(result, RunPaths(tmp_path), "retrieval")
