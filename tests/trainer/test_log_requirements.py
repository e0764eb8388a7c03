"""Settings of the ranker that a log cannot serve are refused before anything is read."""

from typing import Any

import pytest

from schema.contract import DatasetSpec, load_dataset_spec
from schema.errors import ConfigError
from trainer.config import RankingConfig
from trainer.log_requirements import check_log

# Maps neither position nor propensity.
KUAIRAND = load_dataset_spec("kuairand-pure")
SIMULATED = load_dataset_spec("simulated")
NEEDY = {
    "position": {"kind": "pal", "learn_from": "exploration"},
    "propensity_clip": 100,
    "negative_rate": 0.5,
    "past": {"churn": True, "contexts": True},
}


def only(spec: DatasetSpec, **changes: Any) -> DatasetSpec:
    return DatasetSpec.model_validate({**spec.model_dump(), **changes})


def test_a_log_that_has_everything_serves_all_settings() -> None:
    check_log(RankingConfig.model_validate(NEEDY), SIMULATED)
    check_log(RankingConfig(), KUAIRAND)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": {"kind": "additive"}}, r"ranking\.position\.kind needs the column 'position'"),
        ({"propensity_clip": 10}, r"ranking\.propensity_clip needs the column 'propensity', which the"),
    ],
)
def test_a_column_that_is_not_mapped_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_log(RankingConfig.model_validate(settings), KUAIRAND)


def test_positions_of_random_screens_need_to_know_which_are_random() -> None:
    columns = {name: c for name, c in SIMULATED.interactions.columns.items() if name != "exploration"}
    interactions = {**SIMULATED.interactions.model_dump(), "columns": columns}
    config = RankingConfig.model_validate({"position": {"kind": "pal", "learn_from": "exploration"}})
    with pytest.raises(ConfigError, match=r"position\.learn_from needs the column 'exploration'"):
        check_log(config, only(SIMULATED, interactions=interactions))


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("pal", {"name": "stars", "label": "completion", "kind": "regression"}),
        (
            "additive",
            {"name": "watch", "label": "watch_time_s", "kind": "watch_time", "method": "regression"},
        ),
    ],
)
def test_a_position_that_suits_no_task_is_refused_with_their_names(kind: str, task: dict[str, Any]) -> None:
    config = RankingConfig.model_validate({"position": {"kind": kind}})
    message = rf"position\.kind '{kind}' suits no task of the dataset 'simulated' \({task['name']}\)"
    with pytest.raises(ConfigError, match=message):
        check_log(config, only(SIMULATED, tasks=[task]))
    check_log(config, only(SIMULATED, tasks=[task, {"name": "click", "label": "click", "kind": "binary"}]))


def test_without_a_binary_task_no_row_is_a_negative() -> None:
    tasks = [{"name": "watch", "label": "watch_time_s", "kind": "watch_time"}]
    with pytest.raises(ConfigError, match=r"negative_rate is 0\.5, but no task is binary"):
        check_log(RankingConfig(negative_rate=0.5), only(KUAIRAND, tasks=tasks))


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": [{"name": "watch", "label": "watch_time_s", "kind": "watch_time"}]},
        {"counters": {"keys": ["creator_id"]}},
    ],
    ids=["no positive task", "no counters of the item"],
)
def test_churn_needs_the_item_and_its_positives(changes: dict[str, Any]) -> None:
    config = RankingConfig.model_validate({"past": {"churn": True}})
    with pytest.raises(ConfigError, match=r"past\.churn needs 'item_id' among counters\.keys"):
        check_log(config, only(KUAIRAND, **changes))


def test_contexts_need_surfaces_or_durations() -> None:
    config = RankingConfig.model_validate({"past": {"contexts": True}})
    columns = {name: c for name, c in KUAIRAND.interactions.columns.items() if name != "surface"}
    alike = only(KUAIRAND, interactions={**KUAIRAND.interactions.model_dump(), "columns": columns})
    check_log(config, alike)
    tasks = [{"name": "click", "label": "click", "kind": "binary"}]
    check_log(config, only(KUAIRAND, tasks=tasks))
    with pytest.raises(ConfigError, match="maps no surface and no task has a duration_feature"):
        check_log(config, only(alike, tasks=tasks))
