"""Follows a local pipeline run: which component runs, how long, with how much memory, what came from the cache."""

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

from tfx_pipeline.run_result import ComponentTiming

_SAMPLING_INTERVAL_S = 0.2


@contextlib.contextmanager
def timed_components(
    on_start: Callable[[str], None], on_finish: Callable[[ComponentTiming], None]
) -> Iterator[list[ComponentTiming]]:
    """Times every component that TFX's local runner launches inside the with block.

    LocalDagRunner has no callbacks, and its log goes silent when a component changes the log level; so the launcher
    that it makes for each component is replaced by one that reports.

    Args:
      on_start: called with the component's id.
      on_finish: called with its timing.

    Yields:
      The timings so far, in order.
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
            sampler.peak_bytes = 0
            started_s, started_cpu_s = time.monotonic(), _cpu_s()
            on_start(component)
            execution = super().launch()
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

    def _run(self) -> None:
        process = psutil.Process()
        while not self._stopped.wait(_SAMPLING_INTERVAL_S):
            total = process.memory_info().rss
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += child.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, total)
