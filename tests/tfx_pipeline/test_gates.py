"""Each gate catches what it is there for, and says so in one line."""

import json
from pathlib import Path

import pytest

from schema.errors import DataError
from tfx_pipeline.gates import (
    GATES_FILE,
    GateResult,
    Verdict,
    read_validation,
    validation,
    write_validation,
)


def gate(verdict: Verdict, name: str = "one") -> GateResult:
    return GateResult("value", name, verdict, 0.1, "at least 0.2", f"{name} is 0.1, required at least 0.2")


def test_one_failed_gate_stops_a_model_and_its_reason_is_that_of_the_model() -> None:
    result = validation("ranking", (gate(Verdict.PASSED), gate(Verdict.FAILED, "two")))
    assert not result.blessed
    assert result.reason == "two is 0.1, required at least 0.2"


def test_a_gate_that_was_not_applied_stops_nothing() -> None:
    result = validation("ranking", (gate(Verdict.PASSED), gate(Verdict.NOT_APPLIED, "two")))
    assert (result.blessed, result.reason) == (True, "")


def test_a_model_that_nothing_judged_is_not_blessed() -> None:
    result = validation("ranking", (gate(Verdict.NOT_APPLIED),))
    assert (result.blessed, result.reason) == (False, "no gate was applied; give at least one under 'gates'")


def test_a_validation_survives_its_file(tmp_path: Path) -> None:
    result = validation("ranking", (gate(Verdict.PASSED), gate(Verdict.FAILED, "two")))
    write_validation(result, tmp_path / "new")
    assert read_validation(tmp_path / "new") == result
    assert json.loads((tmp_path / "new" / GATES_FILE).read_text())["gates"][1]["verdict"] == "failed"


def test_a_folder_without_gates_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no {tmp_path}"):
        read_validation(tmp_path)
