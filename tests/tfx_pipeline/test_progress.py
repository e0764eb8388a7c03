"""Components are timed, told as reused or run, and an error inside one is told in words that name it."""

# No postponed annotations here: TFX reads the types of the component function.
from pathlib import Path

import pytest
from tfx import v1 as tfx
from tfx.dsl.component.experimental.annotations import Parameter
from tfx.dsl.component.experimental.decorators import component

from schema.errors import DataError
from tfx_pipeline.progress import ComponentFailedError, first_cause, timed_components
from tfx_pipeline.run_result import ComponentTiming


@component
def Checker(rows: Parameter[int], marker: Parameter[str]) -> None:
    """Writes a line per execution; fails without rows, is interrupted below."""
    if rows < 0:
        raise RuntimeError("Traceback (most recent call last):\n  File ...\nKeyboardInterrupt\n")
    if rows == 0:
        raise DataError("no rows at all")
    with Path(marker).open("a") as file:
        file.write("ran\n")


def run(tmp_path: Path, rows: int, started: list[str], finished: list[ComponentTiming]) -> None:
    pipeline = tfx.dsl.Pipeline(
        pipeline_name="checks",
        pipeline_root=str(tmp_path / "root"),
        components=[Checker(rows=rows, marker=str(tmp_path / "marker"))],
        enable_cache=True,
        metadata_connection_config=tfx.orchestration.metadata.sqlite_metadata_connection_config(
            str(tmp_path / "metadata.sqlite")
        ),
    )
    with timed_components(started.append, finished.append) as timings:
        tfx.orchestration.LocalDagRunner().run(pipeline)
    assert timings == finished


def test_a_component_runs_once_and_is_reused_after(tmp_path: Path) -> None:
    started: list[str] = []
    finished: list[ComponentTiming] = []
    run(tmp_path, 1, started, finished)
    assert started == ["Checker"]
    assert [timing.component for timing in finished] == ["Checker"]
    assert not finished[0].cached
    # Even a component shorter than the sampling interval has a peak.
    assert finished[0].peak_memory_bytes > 10 * 1024**2
    again: list[ComponentTiming] = []
    run(tmp_path, 1, [], again)
    assert again[0].cached
    assert (tmp_path / "marker").read_text() == "ran\n"


def test_a_failing_component_is_named_with_its_reason_and_the_next_run_works(tmp_path: Path) -> None:
    finished: list[ComponentTiming] = []
    with pytest.raises(ComponentFailedError, match=r"^component Checker failed: no rows at all$"):
        run(tmp_path, 0, [], finished)
    assert finished == []
    run(tmp_path, 1, [], finished)
    assert not finished[0].cached


def test_an_interrupt_that_beam_wrapped_is_an_interrupt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, -1, [], [])


def caused(error: Exception, cause: Exception | None) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("no positives"), "no positives"),
        (caused(RuntimeError("wrapped"), DataError("no positives")), "no positives"),
        # What Funnel says is for people; what lies behind it is for the log.
        (caused(DataError("no positives"), KeyError("click")), "no positives"),
        (caused(RuntimeError("outer"), ValueError("inner")), "ValueError: inner"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (
            RuntimeError(
                "Traceback (most recent call last):\n  File ...\n"
                "schema.errors.DataError: no positives [while running 'Encode']\n"
            ),
            "schema.errors.DataError: no positives [while running 'Encode']",
        ),
    ],
)
def test_the_first_cause_that_people_can_act_upon_is_told(error: Exception, text: str) -> None:
    assert first_cause(error) == text


def test_an_error_during_the_handling_of_another_counts_as_its_consequence() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise DataError("no positives")
        except DataError:
            raise RuntimeError("cleaning up failed too")  # noqa: B904  the implicit chain is the point
    assert first_cause(caught.value) == "no positives"
