"""What people see while a run goes on."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest
from rich.console import Console

from serving.answers import Recommendation, Recommendations
from tfx_pipeline import console
from tfx_pipeline.console import ComponentProgress, shown
from tfx_pipeline.run_result import ComponentTiming
from trainer import progress

LOGGER = logging.getLogger("trainer.retrieval_validation")


@pytest.fixture(autouse=True)
def _every_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_INTERVAL_S", -1.0)
    monkeypatch.setattr(logging.getLogger("trainer"), "level", logging.INFO)


def _terminal(screen: io.StringIO) -> Console:
    return Console(file=screen, force_terminal=True, width=100)


def _frame_seen(screen: io.StringIO, text: str, start: int = 0) -> str:
    """The line on the screen, from a place on, once it shows a text; it is drawn ten times a second."""
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        for line in re.split(r"[\r\n]", screen.getvalue()[start:]):
            plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)
            if text in plain:
                return plain
        time.sleep(0.01)
    raise AssertionError(f"{text!r} is nowhere in {screen.getvalue()!r}")


def test_a_terminal_shows_what_is_logged_and_a_bar_once_the_total_is_known() -> None:
    screen = io.StringIO()
    with shown("Comparison.retrieval", _terminal(screen)):
        LOGGER.info("epoch 1")
        assert "━" not in _frame_seen(screen, "Comparison.retrieval … epoch 1")
        batches = progress.batches(1_000, 250, "users")
        next(batches), next(batches), next(batches)
        frame = _frame_seen(screen, "500 of 1,000 users (50 %)")
        assert frame.count("━") > 10
    LOGGER.info("later")
    assert "later" not in screen.getvalue()


def test_a_terminal_has_a_plain_spinner_again_once_all_is_done() -> None:
    screen = io.StringIO()
    with shown("Evaluator.retrieval", _terminal(screen)):
        batches = progress.batches(1_000, 500, "users ranked")
        next(batches), next(batches)
        _frame_seen(screen, "500 of 1,000 users ranked (50 %)")
        assert list(batches) == []
        # The frame that was begun before may still have the bar.
        _frame_seen(screen, "Evaluator.retrieval …", len(screen.getvalue()))
        frame = _frame_seen(screen, "Evaluator.retrieval …", len(screen.getvalue()))
    assert re.fullmatch(r"\S Evaluator\.retrieval …\s*", frame)


def test_elsewhere_progress_is_plain_lines_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    screen = io.StringIO()
    with shown("judging the retrieval model", Console(file=screen, width=40)):
        LOGGER.info("epoch 1")
        for _ in progress.batches(1_000, 100, "users"):
            clock[0] += 2
        for _ in progress.batches(2, 1, "slices compared"):
            clock[0] += 1
    # Steps of 2 seconds, lines at least 5 apart; at the end a line for what had lines, and for nothing else.
    assert screen.getvalue().splitlines() == [
        f"  judging the retrieval model: {done:,} of 1,000 users ({done // 10} %)"
        for done in (300, 600, 900, 1_000)
    ]


def test_a_finished_component_leaves_a_line_and_hears_no_more() -> None:
    screen = io.StringIO()
    components = ComponentProgress(Console(file=screen, width=100))
    heard = logging.getLogger("trainer").handlers
    before = list(heard)
    components.started("Trainer.retrieval")
    assert len(heard) == len(before) + 1
    components.finished(ComponentTiming("Trainer.retrieval", 2.0, 1.0, 1024**3, cached=False))
    assert heard == before
    assert screen.getvalue().split() == ["✓", "Trainer.retrieval", "2.0", "s", "peak", "1.0", "GiB"]
    components.started("Pusher")
    components.stop()
    components.stop()
    assert heard == before


def test_recommendations_show_what_a_rare_task_predicts() -> None:
    item = Recommendation("v1", 1, 3.1, "v2", {"click": 0.8674, "dislike": 0.000312}, 0.8643, True)
    answer = Recommendations((item,), user_is_known=True, history_length=1, model_versions={})
    screen = io.StringIO()
    table = console.recommendations_table(answer, {"v1": "a title"}, ["click", "dislike"], "user u1")
    Console(file=screen, width=100).print(table)
    (row,) = (line for line in screen.getvalue().splitlines() if "a title" in line)
    expected = ["1", "a title", "v2", "3.100", "0.867", "0.000312", "0.864"]
    assert [cell.strip() for cell in row.strip("│").split("│")] == expected
