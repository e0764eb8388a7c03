"""What people see while a run goes on."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from tfx_pipeline.console import ComponentProgress


def test_what_the_trainer_logs_stands_beside_the_spinner_while_it_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    screen = io.StringIO()
    progress = ComponentProgress(Console(file=screen, force_terminal=True, width=100))
    logger = logging.getLogger("trainer.retrieval_validation")
    with caplog.at_level(logging.INFO, logger.name):
        progress.started("Trainer.retrieval")
        logger.info("validation %d %%", 50)
        progress.stop()
        logger.info("later")
    assert "Trainer.retrieval …" in screen.getvalue()
    assert "validation 50 %" in screen.getvalue()
    assert "later" not in screen.getvalue()
