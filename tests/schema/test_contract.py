"""The declaration of a dataset: what is accepted, and what a wrong one is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from schema.contract import (
    BUILT_IN_DATASETS,
    DatasetSpec,
    dataset_spec_from_json,
    load_dataset_spec,
    unix_s,
)
from schema.errors import ConfigError

DECLARATION: dict[str, Any] = {
    "name": "mine",
    "interactions": {
        "files": ["log.csv"],
        "columns": {
            "user_id": "user",
            "item_id": "video",
            "event_time_unix_s": {"column": "time_ms", "unit": "ms"},
            "watch_time_s": "played",
        },
        "labels": {"click": "clicked", "loved": {"column": "stars", "at_least": 4}},
    },
    "users": {"files": ["users.csv"], "columns": {"user_id": "user"}},
    "items": {
        "files": ["items.csv"],
        "columns": {"item_id": "video"},
        "features": [{"name": "genre", "kind": "categorical"}],
    },
    "positive": "click",
    "tasks": [
        {"name": "click", "label": "click", "kind": "binary"},
        {"name": "watch_time", "label": "watch_time_s", "kind": "watch_time"},
    ],
    "split": {"fractions": [0.8, 0.1, 0.1]},
}


def load(tmp_path: Path, *changes: tuple[tuple[str | int, ...], Any]) -> DatasetSpec:
    """Loads DECLARATION as a YAML file, with the value at each path replaced; None removes the key."""
    declaration = copy.deepcopy(DECLARATION)
    for path, value in changes:
        place: Any = declaration
        for part in path[:-1]:
            place = place[part]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(declaration), encoding="utf-8")
    return load_dataset_spec(file)


@pytest.mark.parametrize("name", sorted(path.stem for path in BUILT_IN_DATASETS.glob("*.yaml")))
def test_every_built_in_dataset_loads_under_its_name_and_survives_json(name: str) -> None:
    spec = load_dataset_spec(name)
    assert spec.name == name
    assert dataset_spec_from_json(spec.model_dump_json()) == spec


def test_short_and_long_column_forms_mean_the_same(tmp_path: Path) -> None:
    short = load(tmp_path)
    long = load(tmp_path, (("interactions", "columns", "user_id"), {"column": "user", "unit": "s"}))
    assert short == long


def test_watch_time_is_a_label_only_where_it_is_mapped(tmp_path: Path) -> None:
    assert load(tmp_path).labels == ("click", "loved", "watch_time_s")
    without = load(tmp_path, (("interactions", "columns", "watch_time_s"), None), (("tasks", 1), None))
    assert without.labels == ("click", "loved")


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        pytest.param(("interactons",), {}, ["interactons", "'interactions'"], id="top level"),
        pytest.param(("split", "train_untill"), 1, ["split.train_untill", "'train_until'"], id="nested"),
        pytest.param(
            ("interactions", "columns", "item_id"),
            {"column": "video", "unti": "ms"},
            ["interactions.columns.item_id.unti", "'unit'"],
            id="column option",
        ),
        pytest.param(("tasks", 0, "loss_wieght"), 1.0, ["tasks.0.loss_wieght", "'loss_weight'"], id="task"),
        pytest.param(
            ("items", "features", 0, "knd"), "text", ["items.features.0.knd", "'kind'"], id="feature"
        ),
        pytest.param(
            ("interactions", "columns", "wacth_time_s"),
            "x",
            ["'wacth_time_s'", "'watch_time_s'"],
            id="column",
        ),
        pytest.param(("users", "columns", "item_id"), "x", ["'item_id'", "user_id"], id="column of a table"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, told: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, (path, value))
    for words in (*told, "unknown", "mine.yaml"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (("interactions", "columns", "event_time_unix_s"), "'event_time_unix_s' is required"),
        (("users", "columns", "user_id"), "'user_id' is required"),
        (("items", "columns", "item_id"), "'item_id' is required"),
        (("positive",), "positive: required"),
        (("interactions", "files"), "interactions.files: required"),
    ],
)
def test_what_has_no_default_is_asked_for(tmp_path: Path, path: tuple[str | int, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, (path, None))


@pytest.mark.parametrize(
    "name", ["item_id", "hour_of_day", "history_item_ids", "user_type", "score", "click"]
)
def test_a_feature_may_not_take_a_name_of_the_contract(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is taken by the contract"):
        load(tmp_path, (("users", "features"), [{"name": name, "kind": "categorical"}]))


@pytest.mark.parametrize("name", ["user_id", "position", "retrieval_weight", "watch_time_s"])
def test_a_label_may_not_take_a_name_of_the_contract(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is taken by the contract"):
        load(tmp_path, (("interactions", "labels", name), "x"))


def test_a_feature_name_is_unique_over_users_and_items(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'genre' is declared twice"):
        load(tmp_path, (("users", "features"), [{"name": "genre", "kind": "text"}]))


@pytest.mark.parametrize("name", ["click", "score"])
def test_a_task_name_is_unique_and_not_an_output_of_the_ranker(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is taken"):
        load(tmp_path, (("tasks", 1, "name"), name))


def test_a_task_on_an_unknown_label_names_the_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label 'clik', did you mean 'click'.*loved"):
        load(tmp_path, (("tasks", 0, "label"), "clik"))


def test_a_positive_that_is_no_label_names_the_labels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'love' is not a label, did you mean 'loved'"):
        load(tmp_path, (("positive",), "love"))


_TIMES = {"train_until": "2024-01-02T00:00:00+00:00", "eval_until": "2024-01-03T00:00:00+00:00"}


def test_cut_times_are_absolute_moments(tmp_path: Path) -> None:
    split = load(tmp_path, (("split",), {**_TIMES, "train_until": "2024-01-02T08:00:00+08:00"})).split
    assert split.train_until is not None
    assert unix_s(split.train_until) == 1_704_153_600  # 2024-01-02T00:00:00Z


@pytest.mark.parametrize(
    ("split", "told"),
    [
        pytest.param({**_TIMES, "fractions": [0.8, 0.1, 0.1]}, "either", id="both ways"),
        pytest.param({}, "either", id="no way"),
        pytest.param({"train_until": _TIMES["train_until"]}, "either", id="half a way"),
        pytest.param({**_TIMES, "train_until": "2024-01-03T00:00:00+00:00"}, "must be earlier", id="equal"),
        pytest.param({**_TIMES, "train_until": "2024-01-02T00:00:00"}, "timezone", id="no time zone"),
        pytest.param({"fractions": [0.8, 0.2, 0.0]}, "positive", id="a zero fraction"),
        pytest.param({"fractions": [0.8, 0.1, 0.2]}, "sum to 1", id="wrong sum"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(tmp_path: Path, split: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, (("split",), split))


def test_a_separator_belongs_to_multi_categorical_features(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"genre: only a multi_categorical"):
        load(tmp_path, (("items", "features", 0, "separator"), "|"))


def test_a_column_has_one_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"exactly one of 'column'"):
        load(tmp_path, (("interactions", "labels", "click"), {"column": "clicked", "value": 1}))


def test_a_watch_time_cap_needs_durations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"item_duration_s"):
        load(tmp_path, (("watch_time_cap_durations",), 5))


def test_the_length_of_histories_and_the_pause_between_sessions_have_defaults(tmp_path: Path) -> None:
    spec = load(tmp_path)
    assert spec.max_history == 50 and spec.session_gap_hours is None
    given = load(tmp_path, (("max_history",), 200), (("session_gap_hours",), 0.5))
    assert given.max_history == 200 and given.session_gap_hours == 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_history", 0), ("max_history", 501), ("session_gap_hours", 0), ("session_gap_hours", -1)],
)
def test_a_history_or_a_pause_out_of_range_is_named(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: Input should be"):
        load(tmp_path, ((key,), value))


def test_an_unknown_dataset_names_the_built_in_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown dataset 'movielens'.*movielens-1m.*\.yaml"):
        load_dataset_spec("movielens")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*absent.yaml"):
        load_dataset_spec(tmp_path / "absent.yaml")


@pytest.mark.parametrize("content", [b"name: [", b"name: \xff\xfe"])
def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad.yaml is not valid YAML"):
        load_dataset_spec(tmp_path / "bad.yaml")


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "text"])
def test_a_yaml_that_is_not_a_declaration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "odd.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"odd.yaml"):
        load_dataset_spec(tmp_path / "odd.yaml")
