"""What people see: quiet logs, progress of components, tables of recommendations."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Display
from rich.table import Table

from serving.client import Recommendations
from tfx_pipeline.run_result import ComponentTiming
from trainer.progress import ATTRIBUTE, Progress

OUR_PACKAGES = ("schema", "trainer", "serving", "tfx_pipeline")
# Between two lines of progress where there is no terminal.
_LINE_INTERVAL_S = 5.0


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
        # Whatever a library makes of the root's level.
        logging.getLogger(package).setLevel(logging.INFO)


class _BarOfKnownTotal(ProgressColumn):
    """A bar once it is known how much there is to do; until then the spinner says enough."""

    _bar = BarColumn()

    def render(self, task: Task) -> RenderableType:
        """See `ProgressColumn`."""
        return "" if task.total is None else self._bar.render(task)


class _ShowInTerminal(logging.Handler):
    """Shows what is logged last beside a spinner, and a bar where it tells how far the work has come."""

    def __init__(self, title: str, display: Display) -> None:
        super().__init__(logging.INFO)
        self._title = title
        self._display = display
        self._task = display.add_task(f"{title} …", total=None)

    def emit(self, record: logging.LogRecord) -> None:
        """Replaces what stands beside the spinner; work that is over leaves the spinner alone."""
        progress: Progress | None = getattr(record, ATTRIBUTE, None)
        task = self._display.tasks[self._task]
        if progress is not None and progress.done == progress.total:
            # What comes next may tell nothing, and is not the work that was told last.
            task.total, task.description = None, f"{self._title} …"
            return
        task.total = None if progress is None else progress.total
        task.completed = 0 if progress is None else progress.done
        task.description = f"{self._title} … [dim]{escape(record.getMessage())}[/dim]"


class _PrintProgress(logging.Handler):
    """Prints how far the work has come, a line at a time and not too often, and the end of what it began."""

    def __init__(self, title: str, console: Console) -> None:
        super().__init__(logging.INFO)
        self._title = title
        self._console = console
        self._printed_s = time.monotonic()
        # The work of the last line, unless it was over.
        self._begun: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a line, if the record tells how far the work has come."""
        progress: Progress | None = getattr(record, ATTRIBUTE, None)
        if progress is None:
            return
        is_over = progress.done == progress.total
        if (is_over and progress.what == self._begun) or (
            time.monotonic() - self._printed_s > _LINE_INTERVAL_S
        ):
            self._printed_s = time.monotonic()
            self._begun = None if is_over else progress.what
            self._console.print(f"  {self._title}: {escape(record.getMessage())}", soft_wrap=True)


@contextlib.contextmanager
def shown(title: str, console: Console) -> Iterator[None]:
    """Shows people that work goes on: what `trainer` logs last, and how far it has come.

    Args:
      title: of the work.
      console: a terminal gets a line with spinner and bar that goes away, anything else plain lines.
    """
    display = Display(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        _BarOfKnownTotal(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    handler = _ShowInTerminal(title, display) if console.is_terminal else _PrintProgress(title, console)
    # Training and judging are what takes minutes.
    logger = logging.getLogger("trainer")
    logger.addHandler(handler)
    try:
        with display:
            yield
    finally:
        logger.removeHandler(handler)


class ComponentProgress:
    """Shows the running component, and each finished one in a line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running = contextlib.ExitStack()

    def started(self, component: str) -> None:
        """A component starts."""
        self._running.enter_context(shown(component, self._console))

    def finished(self, timing: ComponentTiming) -> None:
        """A component is done."""
        self.stop()
        outcome = "reused from cache" if timing.cached else f"{timing.wall_s:6.1f} s"
        memory = "" if timing.cached else f"  [dim]peak {timing.peak_memory_bytes / 1024**3:.1f} GiB[/dim]"
        self._console.print(f"  [green]✓[/green] {timing.component:<23} {outcome}{memory}", highlight=False)

    def stop(self) -> None:
        """Takes away what shows the running component."""
        self._running.close()


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
            # Not three decimals: a rare task would be 0.000 in every row.
            *(f"{item.predictions[task]:.3g}" for task in tasks),
            f"[bold]{item.score:.3f}[/bold]",
        )
    return table


def _title(titles: Mapping[str, str], item_id: str, width: int = 28) -> str:
    text = titles.get(item_id, item_id)
    # Escaped, because "[live]" in a title would be taken for a style.
    return escape(text if len(text) <= width else text[: width - 1] + "…")
