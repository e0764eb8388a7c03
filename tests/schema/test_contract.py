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


def test_completion_is_a_label_where_watch_time_and_duration_are_mapped(tmp_path: Path) -> None:
    with_duration = (("interactions", "columns", "item_duration_s"), "length")
    assert load(tmp_path, with_duration).labels == ("click", "loved", "watch_time_s", "completion")
    unwatched = (("interactions", "columns", "watch_time_s"), None), (("tasks", 1), None)
    assert load(tmp_path, with_duration, *unwatched).labels == ("click", "loved")


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
    "name",
    [
        *("item_id", "hour_of_day", "history_item_ids", "user_type", "score", "click", "item_counts"),
        *("impression_item_ids", "impression_click", "score_weights"),
    ],
)
def test_a_feature_may_not_take_a_name_of_the_contract(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is taken by the contract"):
        load(tmp_path, (("users", "features"), [{"name": name, "kind": "categorical"}]))


@pytest.mark.parametrize(
    "name",
    ["user_id", "position", "retrieval_weight", "watch_time_s", "completion", "item_counts", "surfaces"],
)
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


_DURATION = (("items", "features"), [{"name": "duration_s", "kind": "continuous"}])


def watch_task(**fields: Any) -> tuple[tuple[str | int, ...], Any]:
    return ("tasks", 1), {"name": "watch", "label": "watch_time_s", "kind": "watch_time", **fields}


@pytest.mark.parametrize(
    ("fields", "served"),
    [
        pytest.param({}, ("weighted_logistic", "mean"), id="nothing given"),
        pytest.param({"method": "ordinal"}, ("ordinal", "mean"), id="ordinal"),
        pytest.param(
            {"method": "ordinal", "serve": "median", "duration_feature": "duration_s", "num_thresholds": 9},
            ("ordinal", "median"),
            id="all of ordinal",
        ),
        pytest.param(
            {"method": "ordinal", "serve": "trimmed_mean"},
            ("ordinal", "trimmed_mean"),
            id="middle of ordinal",
        ),
        pytest.param(
            {"method": "duration_quantiles", "duration_feature": "duration_s"},
            ("duration_quantiles", "mean_rank"),
            id="quantiles",
        ),
        pytest.param(
            {"method": "covington_logistic", "click_label": "click"},
            ("covington_logistic", "mean"),
            id="covington",
        ),
        pytest.param({"method": "log_regression"}, ("log_regression", "median"), id="log regression"),
    ],
)
def test_a_watch_time_task_names_its_method_and_what_it_serves(
    tmp_path: Path, fields: dict[str, Any], served: tuple[str, str]
) -> None:
    spec = load(tmp_path, _DURATION, watch_task(**fields))
    assert (spec.tasks[1].watch_time_method.value, spec.tasks[1].served) == served
    assert dataset_spec_from_json(spec.model_dump_json()) == spec


def test_training_reads_the_click_label_of_a_task_too(tmp_path: Path) -> None:
    task = load(tmp_path, watch_task(method="covington_logistic", click_label="loved")).tasks[1]
    assert task.labels == ("watch_time_s", "loved")
    assert load(tmp_path).tasks[1].labels == ("watch_time_s",)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        pytest.param({"method": "covington_logistic"}, "needs 'click_label'", id="no click label"),
        pytest.param({"method": "duration_quantiles"}, "needs 'duration_feature'", id="no groups"),
        pytest.param(
            {"click_label": "click"},
            "'click_label' is for method covington_logistic, not for weighted_logistic",
            id="click label of another method",
        ),
        pytest.param(
            {"method": "regression", "duration_feature": "duration_s"},
            "is for method duration_quantiles or ordinal, not for regression",
            id="groups of another method",
        ),
        pytest.param({"num_thresholds": 5}, "is for method ordinal", id="thresholds of another method"),
        pytest.param(
            {"method": "weighted_logistic", "serve": "median"},
            "weighted_logistic cannot serve the median; these can: duration_quantiles, ordinal, regression, "
            "log_regression",
            id="median of odds",
        ),
        pytest.param(
            {"method": "regression", "serve": "trimmed_mean"},
            "regression cannot serve the trimmed_mean; these can: ordinal",
            id="middle of one number",
        ),
        pytest.param(
            {"method": "duration_quantiles", "duration_feature": "duration_s", "serve": "mean"},
            "duration_quantiles cannot serve the mean",
            id="mean of ranks",
        ),
        pytest.param(
            {"method": "ordinal", "duration_feature": "duration"},
            "'duration' is not a continuous item feature, did you mean 'duration_s'",
            id="unknown feature",
        ),
        pytest.param(
            {"method": "covington_logistic", "click_label": "clik"},
            "label 'clik', did you mean 'click'",
            id="unknown label",
        ),
        pytest.param({"method": "ordinal", "num_thresholds": 0}, "tasks.1.num_thresholds", id="no threshold"),
        pytest.param({"method": "odds"}, "tasks.1.method", id="unknown method"),
    ],
)
def test_a_watch_time_task_that_does_not_fit_together_is_refused(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, _DURATION, watch_task(**fields))
    assert told in str(error.value)


def test_a_duration_feature_is_a_continuous_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'genre' is not a continuous item feature, valid: none"):
        load(tmp_path, watch_task(method="ordinal", duration_feature="genre"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("method", "ordinal"), ("serve", "mean"), ("click_label", "click"), ("num_thresholds", 3)],
)
def test_only_a_watch_time_task_has_a_method(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"task 'click': only a watch_time task has '{field}'"):
        load(tmp_path, (("tasks", 0, field), value))


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
    [
        ("max_history", 0),
        ("max_history", 501),
        ("max_impressions", 0),
        ("max_impressions", 501),
        ("session_gap_hours", 0),
        ("session_gap_hours", -1),
    ],
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


def test_counters_are_of_the_item_within_a_day_and_a_week_unless_declared(tmp_path: Path) -> None:
    assert load(tmp_path).counters.model_dump() == {
        "keys": ("item_id",),
        "windows_days": (1.0, 7.0),
        "smoothing": 20.0,
    }
    with_creator = (("items", "columns", "creator_id"), "author")
    declared = {"keys": ["creator_id", "genre"], "windows_days": [0.5], "smoothing": 3}
    spec = load(tmp_path, with_creator, (("counters",), declared))
    assert spec.counters.keys == ("creator_id", "genre")
    assert dataset_spec_from_json(spec.model_dump_json()) == spec


_CONTINUOUS = (("items", "features"), [{"name": "genre", "kind": "continuous"}])


@pytest.mark.parametrize(
    ("counters", "change", "told"),
    [
        pytest.param({"keys": ["gnre"]}, None, "'gnre'.*did you mean 'genre'", id="unknown"),
        pytest.param({"keys": ["creator_id"]}, None, "'creator_id', which is no id", id="creator not mapped"),
        pytest.param({"keys": ["genre"]}, _CONTINUOUS, "'genre', which is no id", id="continuous"),
        pytest.param({"keys": ["item_id", "item_id"]}, None, "name a key twice", id="twice"),
        pytest.param({"windows_days": [7, 1]}, None, r"counters: .*\[7.0, 1.0\] must grow", id="falling"),
        pytest.param({"windows_days": [1, 1]}, None, "must grow", id="equal"),
        pytest.param({"windows_days": [0]}, None, "counters.windows_days.0", id="empty window"),
        pytest.param({"smoothing": 0}, None, "counters.smoothing", id="no smoothing"),
    ],
)
def test_counters_that_cannot_be_counted_are_refused(
    tmp_path: Path, counters: dict[str, Any], change: Any, told: str
) -> None:
    changes = [(("counters",), counters), *([change] if change else [])]
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, *changes)


def test_a_label_of_two_tasks_is_one_label_of_tasks(tmp_path: Path) -> None:
    spec = load(tmp_path, (("tasks", 1), {"name": "again", "label": "click", "kind": "regression"}))
    assert spec.task_labels == ("click",)
    assert load(tmp_path).task_labels == ("click", "watch_time_s")
