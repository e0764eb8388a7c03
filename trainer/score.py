"""The final score: Σ over tasks of weight × calibrated output, with declared weights or those of a request.

A task whose declared score_weight is negative is negative feedback (a hide, a report): its weight may never
be positive, and that of any other task never negative. So an override changes how much a task counts, not
whether it speaks for an item or against it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from schema.contract import TaskKind, TaskSpec
from schema.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    import tensorflow as tf

SCORE_WEIGHTS = "score_weights"


def declared_weights(tasks: Sequence[TaskSpec]) -> dict[str, float]:
    """Task name -> score_weight, in the order of the declaration."""
    return {task.name: task.score_weight for task in tasks}


def is_negative_feedback(task: TaskSpec) -> bool:
    """Whether the task speaks against an item: its declared weight is below zero."""
    return task.score_weight < 0


def parse_weights(text: str, tasks: Sequence[TaskSpec]) -> dict[str, float]:
    """Reads weights as people write them.

    Args:
      text: `task=weight` pairs with commas between them.
      tasks: the declared tasks.

    Returns:
      Task name -> weight of every task, in the order of the declaration; a task that the text does not name
      keeps its declared weight.

    Raises:
      ConfigError: a pair is not of that form, a task is unknown or named twice, or a weight is not finite or
        has the wrong sign.

    >>> click = TaskSpec(name="click", label="click", kind="binary", score_weight=1.0)
    >>> hide = TaskSpec(name="hide", label="hide", kind="binary", score_weight=-5.0)
    >>> parse_weights("hide=-8", [click, hide])
    {'click': 1.0, 'hide': -8.0}
    """
    by_name = {task.name: task for task in tasks}
    given: dict[str, float] = {}
    for pair in text.split(","):
        name, separator, value = (part.strip() for part in pair.partition("="))
        if not separator or not name:
            raise ConfigError(
                f"weights {text!r}: {pair.strip()!r} is no task=weight; "
                f"give for instance {next(iter(by_name))}=1"
            )
        if name not in by_name:
            raise ConfigError(f"weights {text!r}: no task {name!r}; declared: {', '.join(by_name)}")
        if name in given:
            raise ConfigError(f"weights {text!r}: task {name!r} is named twice; give each task once")
        given[name] = _weight(value, by_name[name], text)
    return declared_weights(tasks) | given


def formula(tasks: Sequence[TaskSpec], weights: Mapping[str, float] | None = None) -> str:
    """The score in words; tasks of weight 0 are left out.

    Args:
      tasks: the declared tasks.
      weights: by task name; None for the declared ones.

    >>> click = TaskSpec(name="click", label="click", kind="binary", score_weight=1.0)
    >>> watch = TaskSpec(name="watch_time", label="watch_time_s", kind="watch_time", score_weight=0.02)
    >>> formula([click, watch])
    'score = 1 × click + 0.02 × watch_time [s]'
    >>> formula([click, watch], {"click": -3.0, "watch_time": 0.0})
    'score = −3 × click'
    """
    chosen = declared_weights(tasks) if weights is None else weights
    text = ""
    for task in tasks:
        weight = chosen[task.name]
        if weight:
            sign = ("−" if weight < 0 else "") if not text else (" − " if weight < 0 else " + ")
            unit = " [s]" if task.kind is TaskKind.WATCH_TIME else ""
            text += f"{sign}{abs(weight):g} × {task.name}{unit}"
    return f"score = {text or '0'}"


def final_score(outputs: Mapping[str, tf.Tensor], weights: Mapping[str, float | tf.Tensor]) -> tf.Tensor:
    """Σ over tasks of weight × output.

    Args:
      outputs: calibrated outputs by task, float32 [...], each in its task's unit; further names are ignored.
      weights: by task, numbers or tensors that broadcast to the outputs, such as `request_weights` returns.

    Returns:
      float32, the shape of the outputs.

    Raises:
      ConfigError: a weight names no output, or there are no weights.
    """
    missing = [name for name in weights if name not in outputs]
    if missing or not weights:
        raise ConfigError(
            f"no output for the score weights of {', '.join(missing) or 'no task at all'}; "
            f"outputs: {', '.join(outputs)}"
        )
    return functools.reduce(operator.add, (weights[name] * outputs[name] for name in weights))


def request_weights(score_weights: tf.Tensor, tasks: Sequence[TaskSpec]) -> dict[str, tf.Tensor]:
    """Weights of B requests, ready for outputs of shape [B, N].

    Args:
      score_weights: float32 [B, T], one column per task in the order of the declaration; NaN stands for the
        declared weight.
      tasks: the T declared tasks.

    Returns:
      Task name -> float32 [B, 1].

    Raises:
      ShapeError: the shape is not [B, T].
      InvalidArgumentError: when run, a weight is infinite or has the wrong sign.
    """
    # The command line reads and writes weights without the seconds that TensorFlow takes to load.
    import tensorflow as tf

    names = ", ".join(f"{task.name}{' (<= 0)' if is_negative_feedback(task) else ''}" for task in tasks)
    if score_weights.shape.rank != 2 or score_weights.shape[1] != len(tasks):
        raise ShapeError(
            f"{SCORE_WEIGHTS} has shape {score_weights.shape}; expected [B, {len(tasks)}]: {names}."
        )
    signs = tf.constant([-1.0 if is_negative_feedback(task) else 1.0 for task in tasks])
    # Comparisons with NaN are false: where the declared weight is asked for, nothing is wrong.
    wrong = tf.logical_or(tf.math.is_inf(score_weights), score_weights * signs < 0)
    tf.debugging.assert_equal(
        tf.reduce_any(wrong),
        False,
        message=f"{SCORE_WEIGHTS} must be finite and >= 0, or NaN for the declared weight; the columns are: "
        f"{names}",
    )
    declared = tf.constant([task.score_weight for task in tasks], tf.float32)
    resolved = tf.where(tf.math.is_nan(score_weights), declared, score_weights)
    return {task.name: resolved[:, place : place + 1] for place, task in enumerate(tasks)}


def _weight(value: str, task: TaskSpec, text: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        raise ConfigError(f"weights {text!r}: {value!r} is no number; give {task.name}=1") from None
    if not math.isfinite(weight):
        raise ConfigError(f"weights {text!r}: the weight of {task.name} is {value}; give a finite number")
    if weight < 0 and not is_negative_feedback(task):
        raise ConfigError(
            f"weights {text!r}: the weight of {task.name} is {weight:g}, expected 0 or more; only a task "
            "that is declared with a negative score_weight counts against an item"
        )
    if weight > 0 and is_negative_feedback(task):
        raise ConfigError(
            f"weights {text!r}: the weight of {task.name} is {weight:g}, expected 0 or less; the task is "
            f"declared with score_weight {task.score_weight:g}, so it counts against an item"
        )
    return weight
