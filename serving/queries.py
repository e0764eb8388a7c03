"""Queries, as the client's users give them, turned into inputs of a signature. Imports no TensorFlow."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from serving.transport import BadRequestError, InputSpec, Kind

# Inputs that say what is asked for, not who asks.
K: Final = "k"
EXCLUDE: Final = "exclude_item_ids"
CANDIDATES: Final = "candidate_item_ids"
NUM_CANDIDATES: Final = "num_candidates"
SCORE_WEIGHTS: Final = "score_weights"
_REQUEST_INPUTS: Final = frozenset({K, EXCLUDE, CANDIDATES, NUM_CANDIDATES, SCORE_WEIGHTS})
# Inputs that hold an allow-list: this, and the name of the attribute.
_ALLOW: Final = "allow_"
_MISSING: Final[dict[Kind, object]] = {"string": "", "float": math.nan, "integer": -1}
_TYPES: Final[Mapping[Kind, Any]] = {"string": str, "integer": int, "float": (int, float)}


def check_names(query: Mapping[str, Any], inputs: Iterable[str]) -> None:
    """Raises BadRequestError for a feature that is not among the inputs of the models."""
    known = {name for name in inputs if not name.startswith(_ALLOW)} - _REQUEST_INPUTS
    for name in query:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {nearest[0]!r}?" if nearest else f"the models know: {', '.join(sorted(known))}"
            )
            raise BadRequestError(f"unknown query feature {name!r}; {hint}")


def search_inputs(
    inputs: Iterable[str], k: int, exclude_item_ids: Iterable[str], allow: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """Returns the inputs that bound a search for items.

    Args:
      inputs: names of the signature's inputs.
      k: items to find.
      exclude_item_ids: items never to return.
      allow: item attribute to values.

    Raises:
      BadRequestError: one text where a list of them belongs, or an attribute that the model cannot filter by.
    """
    lists = {EXCLUDE: exclude_item_ids} | {_ALLOW + attribute: values for attribute, values in allow.items()}
    for name, values in lists.items():
        if isinstance(values, str):
            raise BadRequestError(f"{name} must be a list, got the text {values!r}")
    attributes = sorted(name.removeprefix(_ALLOW) for name in inputs if name.startswith(_ALLOW))
    for attribute in allow:
        if attribute not in attributes:
            raise BadRequestError(
                f"the model cannot filter by {attribute!r}, only by: {', '.join(attributes) or 'nothing'}; "
                "see index.allow_list in its configuration"
            )
    return {K: k, **{name: list(values) for name, values in lists.items()}}


def weight_columns(tasks: Iterable[str], score_weights: Mapping[str, float]) -> list[float]:
    """Returns score weights in the order of the tasks; NaN, which stands for the declared one, if not given.

    Raises:
      BadRequestError: a weight names no task or is no finite number.
    """
    known = list(tasks)
    for task, weight in score_weights.items():
        if task not in known:
            nearest = difflib.get_close_matches(task, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"the model weighs: {', '.join(known)}"
            raise BadRequestError(f"score_weights name {task!r}, which is no task; {hint}")
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
            raise BadRequestError(f"the score weight of {task!r} must be a finite number, got {weight!r}")
    return [float(score_weights.get(task, math.nan)) for task in known]


def batch_of_one(
    specs: Mapping[str, InputSpec], query: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Returns every input of the signature for one query, as nested lists; what is not given is missing.

    Lists begin with a missing value, which counts for nothing anywhere in a list: TensorFlow Serving makes
    the lists of a batch equally long by repeating the first element, and a short history would gain events.

    Raises:
      BadRequestError: a value of another type than its input.
    """
    values = {**query, **extra}
    return {name: [_encode(name, values.get(name), spec)] for name, spec in specs.items()}


def _encode(name: str, value: Any, spec: InputSpec) -> Any:
    """Turns one feature value into the nested list of its input, without the batch dimension."""
    if hasattr(value, "tolist"):
        value = value.tolist()  # NumPy scalars and arrays
    missing = _MISSING[spec.kind]
    if spec.rank == 1:
        return missing if value is None else _checked(name, value, spec)
    if value is not None and not isinstance(value, (list, tuple)):
        raise BadRequestError(f"feature {name!r} is multi-valued: expected a list, got {value!r}")
    values = [_checked(name, item, spec) for item in value or ()]
    if spec.width is not None:
        return values or [missing] * spec.width
    return [missing, *values]


def _checked(name: str, value: Any, spec: InputSpec) -> Any:
    if not isinstance(value, _TYPES[spec.kind]) or isinstance(value, bool):
        raise BadRequestError(f"feature {name!r} takes type {spec.kind}, got {value!r}")
    return float(value) if spec.kind == "float" else value
