"""Whether a model may be released: every condition, its verdict and its reason, in one place."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path

import pydantic

from schema.errors import DataError

GATES_FILE = "gates.json"


class Verdict(str, enum.Enum):
    """NOT_APPLIED: there was nothing to judge, for instance no blessed model to compare with."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLIED = "not applied"


@dataclasses.dataclass(frozen=True)
class GateResult:
    """One gate.

    Attributes:
      kind: what sort of condition, see `docs/evaluation.md`: value, no_worse, must_beat, index, collapse,
        calibration, agreement, serving, latency, anomalies, drift.
      name: unique among the gates of a model, for instance `retrieval/recall_at_100 at least 0.05`.
      verdict: NOT_APPLIED does not stop a model.
      value: what was judged; None where there is no one number, or it is not defined.
      limit: the condition in words, for instance `at least 0.05`.
      reason: one sentence that says what came and what was required.
    """

    kind: str
    name: str
    verdict: Verdict
    value: float | None
    limit: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Validation:
    """The verdict on one model, saved as gates.json beside its blessing.

    Attributes:
      model: `retrieval` or `ranking`.
      blessed: whether no gate failed, and at least one passed.
      reason: "" for a blessed model; else the reasons of the failed gates in one line.
      gates: every gate, in the order of the documentation.
    """

    model: str
    blessed: bool
    reason: str
    gates: tuple[GateResult, ...]


def validation(model: str, gates: tuple[GateResult, ...]) -> Validation:
    """Sums up the gates of a model. A model that nothing judged is not blessed."""
    failed = [gate.reason for gate in gates if gate.verdict is Verdict.FAILED]
    if not failed and not any(gate.verdict is Verdict.PASSED for gate in gates):
        failed = ["no gate was applied; give at least one under 'gates'"]
    return Validation(model, not failed, "; ".join(failed), gates)


def write_validation(result: Validation, folder: Path) -> None:
    """Writes gates.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False)
    (folder / GATES_FILE).write_text(text, encoding="utf-8")


def read_validation(folder: Path) -> Validation:
    """Reads gates.json.

    Raises:
      DataError: there is none, or it has another form.
    """
    path = folder / GATES_FILE
    try:
        return pydantic.TypeAdapter(Validation).validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise DataError(f"{path} has another form than expected, {where}: {first['msg']}") from error
