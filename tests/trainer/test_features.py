"""From the declaration to feature groups, raw inputs and the TFX schema."""

from __future__ import annotations

from typing import Any

import pytest

from schema.contract import BUILT_IN_DATASETS, DatasetSpec, FeatureKind, load_dataset_spec
from trainer import features
from trainer.tfx_schema import interactions_schema

_SMALL: dict[str, Any] = {
    "name": "small",
    "interactions": {
        "files": ["a.csv"],
        "columns": {name: name for name in ("user_id", "item_id", "event_time_unix_s")},
        "labels": {"click": "click", "unused": "unused"},
    },
    "users": {"files": ["u.csv"], "columns": {"user_id": "user_id"}},
    "items": {"files": ["i.csv"], "columns": {"item_id": "item_id"}},
    "positive": "click",
    "tasks": [{"name": "click", "label": "click", "kind": "binary"}],
    "split": {"fractions": [0.8, 0.1, 0.1]},
}


def test_the_smallest_dataset_has_ids_history_and_clock() -> None:
    spec = DatasetSpec.model_validate(_SMALL)
    space = features.feature_space(spec)
    assert [f.name for f in space.query] == [
        "user_id",
        "history_item_ids",
        "hour_of_day",
        "day_of_week",
        "example_age_days",
    ]
    assert [f.name for f in space.candidate] == ["item_id"]
    assert space.cross == ()
    assert space.labels == ("click",)
    assert [(r.name, r.dtype, r.is_list) for r in features.raw_query_inputs(spec)] == [
        ("user_id", "string", False),
        ("history_item_ids", "string", True),
        ("event_time_unix_s", "int64", False),
    ]
    assert [r.name for r in features.raw_candidate_inputs(spec)] == ["item_id"]


@pytest.mark.parametrize("name", sorted(path.stem for path in BUILT_IN_DATASETS.glob("*.yaml")))
def test_every_declared_feature_is_an_input_and_knows_its_transformed_names(name: str) -> None:
    spec = load_dataset_spec(name)
    space = features.feature_space(spec)
    query = {r.name: r for r in features.raw_query_inputs(spec)}
    candidate = {r.name: r for r in features.raw_candidate_inputs(spec)}
    for declared, inputs in ((spec.users.features, query), (spec.items.features, candidate)):
        for feature in declared:
            assert inputs[feature.name].is_list == (feature.kind is FeatureKind.MULTI_CATEGORICAL)
            assert (inputs[feature.name].dtype == "float32") == (feature.kind is FeatureKind.CONTINUOUS)
    assert not set(query) & set(candidate)
    transformed = [n for f in space.all for n in f.transformed_names]
    assert len(set(transformed)) == len(transformed)
    assert ("upload_time_unix_s" in spec.items.columns) == (len(space.cross) == 1)
    assert ("upload_time_unix_s" in candidate) == (len(space.cross) == 1)
    for task in spec.tasks:
        assert task.label in space.labels


def test_a_feature_that_is_not_there_is_a_key_error() -> None:
    space = features.feature_space(load_dataset_spec("simulated"))
    with pytest.raises(KeyError, match="nothing"):
        space.find("nothing")


def test_history_and_candidate_share_one_vocabulary() -> None:
    space = features.feature_space(DatasetSpec.model_validate(_SMALL))
    assert space.find("history_item_ids").space == space.find("item_id").space != space.find("user_id").space


def test_features_of_both_sides_are_compared_where_they_share_a_vocabulary() -> None:
    pairs = features.shared_spaces(features.feature_space(load_dataset_spec("simulated")))
    assert {(query.name, candidate.name) for query, candidate in pairs} == {
        ("history_item_ids", "item_id"),
        ("user_language", "item_language"),
        ("subscribed_creators", "creator_id"),
    }


def test_the_schema_lists_every_raw_feature_and_hides_labels_from_serving() -> None:
    spec = load_dataset_spec("simulated")
    schema = interactions_schema(spec)
    raw = {r.name for r in (*features.raw_query_inputs(spec), *features.raw_candidate_inputs(spec))}
    hidden = {f.name for f in schema.feature if "SERVING" in f.not_in_environment}
    impressions = {r.name for r in features.raw_impression_inputs(spec)}
    assert {f.name for f in schema.feature} - hidden == raw | impressions | {"item_counts"}
    logged = {"position", "exploration", "propensity"}
    labels = {"click", "like", "completion", "watch_time_s", "not_interested"}
    assert hidden == {*labels, "retrieval_weight", *logged}
    by_name = {f.name: f for f in schema.feature}
    assert (by_name["click"].float_domain.min, by_name["click"].float_domain.max) == (0, 1)
    assert by_name["watch_time_s"].float_domain.min == 0
    assert not by_name["watch_time_s"].float_domain.HasField("max")
    for name in ("user_id", "item_id", "event_time_unix_s"):
        assert (by_name[name].presence.min_fraction, by_name[name].value_count.min) == (1, 1)
    assert by_name["age_bucket"].presence.min_fraction == 0
    # The log and three keys in three windows, each with impressions and five labels.
    counts = by_name["item_counts"].value_count
    assert (counts.min, counts.max) == (60, 60)


def test_impressions_are_parallel_lists_with_a_label_for_every_task() -> None:
    spec = load_dataset_spec("simulated")
    assert [(r.name, r.dtype, r.is_list) for r in features.raw_impression_inputs(spec)] == [
        ("impression_item_ids", "string", True),
        ("impression_event_time_unix_s", "int64", True),
        ("impression_surfaces", "string", True),
        ("impression_click", "float32", True),
        ("impression_like", "float32", True),
        ("impression_completion", "float32", True),
        ("impression_watch_time_s", "float32", True),
        ("impression_not_interested", "float32", True),
    ]
    assert features.impression_names(spec) == (
        "impression_item_ids_ids",
        "impression_ages_s",
        "impression_surfaces_ids",
        "impression_click",
        "impression_like",
        "impression_completion",
        "impression_watch_time_s",
        "impression_not_interested",
    )


def test_a_dataset_without_surfaces_has_none_in_its_impressions() -> None:
    spec = DatasetSpec.model_validate(_SMALL)
    assert [r.name for r in features.raw_impression_inputs(spec)] == [
        "impression_item_ids",
        "impression_event_time_unix_s",
        "impression_click",
    ]
    assert features.impression_names(spec) == (
        "impression_item_ids_ids",
        "impression_ages_s",
        "impression_click",
    )
