"""What people see: quiet logs, progress of components, tables of recommendations."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from serving.client import Recommendations
from tfx_pipeline.run_result import ComponentTiming

OUR_PACKAGES = ("schema", "trainer", "serving", "tfx_pipeline")


def quiet_libraries(log_file: Path | None) -> None:
    """Sends all logs to a file and shows people only our own warnings.

    Libraries change logging when they are imported: a further call puts it right again.

    Args:
      log_file: everything from INFO up is added to it; None drops it.
    """
    # 3 also hides the notices about CUDA plug-ins, which TensorFlow logs as errors; real errors are raised.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    # Beam and TFX mark API stages and Python versions that a user of Funnel cannot act upon.
    warnings.filterwarnings("ignore")
    logging.captureWarnings(True)
    root = logging.getLogger()
    for logger in (root, *map(logging.getLogger, OUR_PACKAGES)):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
    root.setLevel(logging.INFO)
    if log_file is None:
        root.addHandler(logging.NullHandler())
    else:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file_handler = logging.FileHandler(log_file, encoding="utf-8")
        file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file_handler)
    ours = RichHandler(console=Console(stderr=True), level=logging.WARNING, show_path=False, show_time=False)
    for package in OUR_PACKAGES:
        logging.getLogger(package).addHandler(ours)


class _ShowOnSpinner(logging.Handler):
    """Shows what a component logs last beside its spinner: epochs, and how far a long validation is."""

    def __init__(self, status: Status, component: str) -> None:
        super().__init__(logging.INFO)
        self._status = status
        self._component = component

    def emit(self, record: logging.LogRecord) -> None:
        """Replaces the text beside the spinner."""
        self._status.update(f"{self._component} … [dim]{escape(record.getMessage())}[/dim]")


class ComponentProgress:
    """Shows the running component with a spinner and what it logs last, and each finished one in a line."""

    # Training is what takes minutes.
    _shown_logger = logging.getLogger("trainer")

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._handler: _ShowOnSpinner | None = None

    def started(self, component: str) -> None:
        """A component starts."""
        self._status = self._console.status(f"{component} …")
        self._handler = _ShowOnSpinner(self._status, component)
        self._shown_logger.addHandler(self._handler)
        self._status.start()

    def finished(self, timing: ComponentTiming) -> None:
        """A component is done."""
        self.stop()
        outcome = "reused from cache" if timing.cached else f"{timing.wall_s:6.1f} s"
        memory = "" if timing.cached else f"  [dim]peak {timing.peak_memory_bytes / 1024**3:.1f} GiB[/dim]"
        self._console.print(f"  [green]✓[/green] {timing.component:<23} {outcome}{memory}", highlight=False)

    def stop(self) -> None:
        """Takes the spinner away."""
        if self._handler is not None:
            self._shown_logger.removeHandler(self._handler)
            self._handler = None
        if self._status is not None:
            self._status.stop()
            self._status = None


def recommendations_table(
    answer: Recommendations, titles: Mapping[str, str], tasks: Sequence[str], heading: str
) -> Table:
    """Recommendations as people read them: title, why retrieved, score per task, final score."""
    table = Table(title=escape(heading), title_justify="left")
    table.add_column("#", justify="right", min_width=2)
    table.add_column("item")
    table.add_column("retrieved: near watched")
    for name in ("retrieval", *tasks, "score"):
        # Narrow terminals break titles over lines, never numbers.
        table.add_column(name, justify="right", no_wrap=True, min_width=max(len(name), 6))
    for item in answer.items:
        reason = _title(titles, item.reason_item_id) if item.reason_item_id else "(no history)"
        table.add_row(
            str(item.rank),
            _title(titles, item.item_id),
            reason,
            f"{item.retrieval_score:.3f}",
            *(f"{item.predictions[task]:.3f}" for task in tasks),
            f"[bold]{item.score:.3f}[/bold]",
        )
    return table


def _title(titles: Mapping[str, str], item_id: str, width: int = 28) -> str:
    text = titles.get(item_id, item_id)
    # Escaped, because "[live]" in a title would be taken for a style.
    return escape(text if len(text) <= width else text[: width - 1] + "…")
