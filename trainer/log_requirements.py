"""What the settings of the ranker need of the log."""

from __future__ import annotations

from schema.contract import DatasetSpec, TaskKind
from schema.errors import ConfigError
from trainer import features as ft
from trainer.config import RankingConfig
from trainer.debiasing_config import has_position_bias


def check_log(config: RankingConfig, spec: DatasetSpec) -> None:
    """Checks that a dataset logs what the settings need, and has tasks that they suit.

    Raises:
      ConfigError: it does not; the text says what to declare, or which setting to remove.
    """
    needed = {
        ft.POSITION: ("position.kind", config.position.kind != "none"),
        ft.EXPLORATION: ("position.learn_from", config.position.learn_from == "exploration"),
        ft.PROPENSITY: ("propensity_clip", config.propensity_clip is not None),
    }
    for column, (setting, is_set) in needed.items():
        if is_set and column not in spec.interactions.columns:
            raise ConfigError(
                f"ranking.{setting} needs the column {column!r}, which the dataset {spec.name!r} does not "
                f"map; map interactions.columns.{column}, or remove the setting."
            )
    kind = config.position.kind
    if kind != "none" and not any(has_position_bias(config.position, task) for task in spec.tasks):
        raise ConfigError(
            f"ranking.position.kind {kind!r} suits no task of the dataset {spec.name!r} "
            f"({', '.join(task.name for task in spec.tasks)}); see docs/debiasing.md, or remove the setting."
        )
    if config.negative_rate < 1 and not any(task.kind is TaskKind.BINARY for task in spec.tasks):
        raise ConfigError(
            f"ranking.negative_rate is {config.negative_rate:g}, but no task is binary, so that no row is a "
            "negative; remove the setting."
        )
    has_churn = ft.ITEM_ID in spec.counters.keys and spec.positive in spec.task_labels
    if config.past.churn and not has_churn:
        raise ConfigError(
            f"ranking.past.churn needs {ft.ITEM_ID!r} among counters.keys of the dataset {spec.name!r}, and "
            f"a task of its positive label {spec.positive!r}; declare both, or remove the setting."
        )
    has_contexts = spec.surface_is_mapped or any(task.duration_feature for task in spec.tasks)
    if config.past.contexts and not has_contexts:
        raise ConfigError(
            f"ranking.past.contexts tells surfaces and durations apart, but the dataset {spec.name!r} maps "
            "no surface and no task has a duration_feature; declare one, or remove the setting."
        )
