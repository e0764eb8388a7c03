"""Follows a local pipeline run: which component runs, how long, in how much memory, what was reused."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import psutil
from tfx.orchestration.local import local_dag_runner
from tfx.orchestration.portable import launcher

from schema.errors import FunnelError
from tfx_pipeline.run_result import ComponentTiming

_SAMPLING_INTERVAL_S = 0.2


class ComponentFailedError(FunnelError):
    """A component of the pipeline raised an error; the text names the component and the first cause."""


@contextlib.contextmanager
def timed_components(
    on_start: Callable[[str], None], on_finish: Callable[[ComponentTiming], None]
) -> Iterator[list[ComponentTiming]]:
    """Times every component that TFX's local runner launches inside the with block.

    LocalDagRunner has no callbacks, and its log goes silent when a component changes the log level; so the
    launcher that it makes for each component is replaced by one that reports.

    Args:
      on_start: called with the component's id.
      on_finish: called with its timing.

    Yields:
      The timings so far, in order.

    Raises:
      ComponentFailedError: a component raised any error.
    """
    timings: list[ComponentTiming] = []
    sampler = _MemorySampler()

    class TimedLauncher(launcher.Launcher):
        """Reports when a component starts and ends, and whether it was reused."""

        _reused = False

        def _prepare_execution(self) -> Any:
            result = super()._prepare_execution()
            self._reused = not result.is_execution_needed
            return result

        def launch(self) -> Any:
            component = self._pipeline_node.node_info.id
            sampler.restart()
            started_s, started_cpu_s = time.monotonic(), _cpu_s()
            on_start(component)
            try:
                execution = super().launch()
            except Exception as error:
                if first_cause(error).startswith(KeyboardInterrupt.__name__):
                    # Beam makes a RuntimeError of an interrupt.
                    raise KeyboardInterrupt from error
                raise ComponentFailedError(f"component {component} failed: {first_cause(error)}") from error
            timing = ComponentTiming(
                component=component,
                wall_s=time.monotonic() - started_s,
                cpu_s=_cpu_s() - started_cpu_s,
                peak_memory_bytes=sampler.peak_bytes,
                cached=self._reused,
            )
            timings.append(timing)
            on_finish(timing)
            return execution

    sampler.start()
    try:
        with mock.patch.object(local_dag_runner.launcher, "Launcher", TimedLauncher):
            yield timings
    finally:
        sampler.stop()


def first_cause(error: BaseException) -> str:
    """What went wrong, for people: the text of the first FunnelError among the causes, else of the innermost.

    Beam re-raises a worker's error as one whose text is the worker's traceback: its last line tells.
    """
    while not isinstance(error, FunnelError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, FunnelError):
        return str(error)
    lines = str(error).strip().splitlines()
    if not lines or not lines[0].startswith("Traceback"):
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    return lines[-1]


def _cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


class _MemorySampler:
    """Samples the resident memory of this process and its children in a thread."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak_bytes = _resident_bytes()

    def _run(self) -> None:
        while not self._stopped.wait(_SAMPLING_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, _resident_bytes())


def _resident_bytes() -> int:
    process = psutil.Process()
    total = int(process.memory_info().rss)
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += child.memory_info().rss
    return total
