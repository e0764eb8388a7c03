"""Settings of the ranker's position tower, and the tasks that have a place for one."""

from __future__ import annotations

from typing import Literal

import pydantic

from schema.contract import TaskKind, TaskSpec, WatchTimeMethod


class PositionConfig(pydantic.BaseModel):
    """What the ranker does about the position at which an item was shown.

    Attributes:
      kind: "none"; "additive", a logit per surface and position that is added in training and left out of
        serving; or "pal", the probability of being seen there, which multiplies the probability of a click
        (or the expected watch time, or the probability of each threshold of it) once seen. Watch time by
        `weighted_logistic` and `ordinal` has a place for it, other methods have not and are left alone.
      max_position: positions above it share its row; about as many rows are learnt per surface.
      dropout_fraction: share of the training rows that read their position as unknown, so that the body
        cannot rely on it.
      learn_from: "all" rows, along with the ranker; or the "exploration" bucket alone, before training: less
        data, but its positions know nothing about relevance. Needs "pal".
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "additive", "pal"] = "none"
    max_position: int = pydantic.Field(default=50, ge=1)
    dropout_fraction: float = pydantic.Field(default=0.0, ge=0, lt=1)
    learn_from: Literal["all", "exploration"] = "all"

    @pydantic.model_validator(mode="after")
    def _check(self) -> PositionConfig:
        if self.learn_from == "exploration" and self.kind == "additive":
            raise ValueError(
                "learn_from is 'exploration', whose click rates give ratios of probabilities, but kind "
                "'additive' needs log odds of single rows; set kind to 'pal', or learn_from to 'all'"
            )
        return self


def has_position_bias(config: PositionConfig, task: TaskSpec) -> bool:
    """Whether a task gets a position tower, a `PositionBias`.

    A rating or another regression label exists only where somebody looked and answered: it is no product of
    being seen and something else, and "pal" leaves it alone. Of the watch time methods, the position has a
    place in the odds of `weighted_logistic` and in the probabilities of `ordinal`: the others serve ranks or
    seconds by themselves, which being seen neither multiplies nor shifts.
    """
    if config.kind == "none":
        return False
    if task.kind is TaskKind.WATCH_TIME:
        return task.watch_time_method in (WatchTimeMethod.ORDINAL, WatchTimeMethod.WEIGHTED_LOGISTIC)
    return config.kind == "additive" or task.kind is not TaskKind.REGRESSION
