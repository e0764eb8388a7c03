"""Requests at a fixed rate while versions of the model are swapped: failed requests and memory over time.

Every --swap-every seconds a new version of the model appears, the oldest disappears, and every third time a
damaged one appears instead and stays until the next. Requests are sent at the given rate whether or not
earlier ones are answered (open loop). The command fails when a request failed, when an answer came from a
damaged version, when a swap is missing or none was to a damaged version, when a whole version never answered,
or when memory grew by more than --max-growth over the second half of the time. --quick is too short to tell
growth of memory from what a process takes up once: it does not check it.

Example:
  python -m benchmarks.soak --quick
  python -m benchmarks.soak --minutes 10 --rate 300 --items 200000 --json soak.json
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import grpc
import uvloop
from scipy import stats
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from benchmarks import served_models
from benchmarks.serving import HISTORY, memory_mb
from serving.process import ModelServerProcess
from serving.tensors import encode_tensor

_MODEL = "retrieval"
_DAMAGED_EVERY = 3
_SAMPLE_S = 5.0
_TIMEOUT_S = 5.0


@dataclass
class Outcome:
    """What happened: latencies in ms, errors by code, answers by version, (seconds, MB) of memory."""

    times_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    versions: Counter[int] = field(default_factory=Counter)
    whole: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def growth_mb(self) -> float:
        """MB by which memory grew over the second half of the time.

        The slope is that of Theil and Sen, the median over all pairs of samples: what a version takes while
        it is loaded beside the old one comes and goes, and must not count.
        """
        half = self.memory[len(self.memory) // 2 :]
        times, sizes = zip(*half, strict=True)
        return float(stats.theilslopes(sizes, times).slope) * (times[-1] - times[0])

    def problems(self, num_swaps: int, max_growth_mb: float | None) -> list[str]:
        """Returns what went wrong.

        Args:
          num_swaps: versions, whole and damaged, that should have appeared after the first.
          max_growth_mb: for `growth_mb`; None does not check it.
        """
        problems = []
        if failed := sum(self.errors.values()):
            problems.append(f"{failed} requests failed")
        if (swapped := len(self.whole) + len(self.damaged) - 1) != num_swaps:
            problems.append(f"{swapped} versions appeared after the first, not {num_swaps}")
        if not self.damaged:
            problems.append("no damaged version appeared; give it more time")
        if silent := sorted(self.whole - self.versions.keys()):
            problems.append(f"the versions {silent} never answered")
        if self.damaged & self.versions.keys():
            problems.append("a damaged version answered")
        if max_growth_mb is not None and self.growth_mb() > max_growth_mb:
            problems.append(f"memory grew by {self.growth_mb():.0f} MB over the second half")
        return problems


class Versions:
    """The version folder of the served model: what appears and disappears in it."""

    def __init__(self, source: Path, base_path: Path, outcome: Outcome) -> None:
        self._source, self._base_path, self._outcome = source, base_path, outcome
        self._whole: list[Path] = []
        self._last = 0

    def add(self) -> None:
        """Adds a whole version and removes all but the two newest."""
        self._last += 1
        self._outcome.whole.add(self._last)
        self._whole.append(self._copy(self._base_path / f".{self._last}"))
        for version in self._outcome.damaged:
            shutil.rmtree(self._base_path / str(version), ignore_errors=True)
        while len(self._whole) > 2:
            shutil.rmtree(self._whole.pop(0))

    def add_damaged(self) -> None:
        """Adds a version whose variables are cut short."""
        self._last += 1
        self._outcome.damaged.add(self._last)
        partial = self._base_path / f".{self._last}"
        shutil.copytree(self._source, partial)
        for file in (partial / "variables").glob("*.index"):
            file.write_bytes(b"damaged")
        partial.rename(self._base_path / str(self._last))

    def _copy(self, partial: Path) -> Path:
        # Hard links: a version is large, and what the server reads is the same.
        shutil.copytree(self._source, partial, copy_function=os.link)
        return partial.rename(self._base_path / str(self._last))


async def _run(
    server: ModelServerProcess, versions: Versions, message: predict_pb2.PredictRequest,
    outcome: Outcome, rate: float, seconds: float, swap_times_s: list[float],
) -> None:  # fmt: skip
    started = time.monotonic()
    async with grpc.aio.insecure_channel(server.grpc_target.removeprefix("grpc://")) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        async def ask() -> None:
            begun = time.perf_counter()
            try:
                response = await stub.Predict(message, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                outcome.errors[error.code().name] += 1
                return
            outcome.times_ms.append((time.perf_counter() - begun) * 1000)
            outcome.versions[response.model_spec.version.value] += 1

        async def swap() -> None:
            for number, time_s in enumerate(swap_times_s, start=1):
                await asyncio.sleep(max(0.0, started + time_s - time.monotonic()))
                damaged = number % _DAMAGED_EVERY == 0
                await asyncio.to_thread(versions.add_damaged if damaged else versions.add)

        async def watch() -> None:
            while True:
                outcome.memory.append((time.monotonic() - started, memory_mb(server.pid)["rss"]))
                await asyncio.sleep(min(_SAMPLE_S, seconds / 20))

        swapping, watching = asyncio.ensure_future(swap()), asyncio.ensure_future(watch())
        asked = []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
            asked.append(asyncio.ensure_future(ask()))
        await asyncio.gather(*asked)
        await swapping  # raises what went wrong in it
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def _swap_times(seconds: float, swap_every: float) -> list[float]:
    """When versions appear, in seconds: each is left `swap_every` seconds to answer, or nearly."""
    return [number * swap_every for number in range(1, math.ceil(seconds / swap_every))]


@click.command(help=__doc__)
@click.option("--minutes", default=10.0, show_default=True, help="How long.")
@click.option("--rate", default=300.0, show_default=True, help="Requests per second.")
@click.option("--swap-every", default=30.0, show_default=True, help="Seconds between versions.")
@click.option("--items", default=200_000, show_default=True, help="Items in the index.")
@click.option("--width", default=128, show_default=True, help="Width of a vector.")
@click.option("--models", type=click.Path(path_type=Path), help="Folder with models of benchmarks.serving.")
@click.option("--workers", default=1, show_default=True, help="Processes of the server.")
@click.option(
    "--max-growth", default=50.0, show_default=True, help="MB that memory may grow by in the second half."
)
@click.option(
    "--quick", is_flag=True, help="2,000 items, 20 seconds, a version every 5: to see that it works."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(
    minutes: float, rate: float, swap_every: float, items: int, width: int, models: Path | None,
    workers: int, max_growth: float, quick: bool, json_file: Path | None,
) -> None:  # fmt: skip
    if quick:
        minutes, rate, swap_every, items, width = 1 / 3, 50.0, 5.0, 2_000, 32
    swap_times_s = _swap_times(minutes * 60, swap_every)
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as temporary:
        source = (models or Path(temporary)) / f"retrieval-{items}x{width}" / "1"
        if not source.is_dir():
            served_models.save_retrieval_model(source, items, width)
        # Beside the source, because hard links do not cross file systems.
        with tempfile.TemporaryDirectory(dir=source.parents[1], prefix="soak-") as folder:
            base_path = Path(folder) / _MODEL
            base_path.mkdir()
            versions = Versions(source, base_path, outcome)
            versions.add()
            message = predict_pb2.PredictRequest()
            message.model_spec.name = _MODEL
            for name, array in served_models.requests(1, served_models.MAX_K, HISTORY, items).items():
                message.inputs[name].ParseFromString(encode_tensor(array))
            with ModelServerProcess(
                {_MODEL: base_path}, poll_wait_s=1.0, flags=[f"--num_workers={workers}"]
            ) as server:
                uvloop.run(_run(server, versions, message, outcome, rate, minutes * 60, swap_times_s))
    _report(outcome, json_file)
    if problems := outcome.problems(len(swap_times_s), None if quick else max_growth):
        raise click.ClickException("; ".join(problems))


def _report(outcome: Outcome, json_file: Path | None) -> None:
    times = sorted(outcome.times_ms)
    answered, failed = len(times), sum(outcome.errors.values())
    click.echo(f"answered {answered:,}, failed {failed:,} {dict(outcome.errors) or ''}")
    if times:
        p50, p99 = times[answered // 2], times[int(answered * 0.99)]
        click.echo(f"latency p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {times[-1]:.2f} ms")
    click.echo(
        f"answers by version: {dict(sorted(outcome.versions.items()))}, damaged: {sorted(outcome.damaged)}"
    )
    sizes = [size for _, size in outcome.memory]
    click.echo(
        f"memory: first {sizes[0]:,.0f} MB, highest {max(sizes):,.0f} MB, last {sizes[-1]:,.0f} MB, "
        f"growth over the second half {outcome.growth_mb():+,.0f} MB"
    )
    if json_file is not None:
        figures = {
            "answered": answered,
            "errors": outcome.errors,
            "versions": outcome.versions,
            "damaged": sorted(outcome.damaged),
            "memory_mb": outcome.memory,
        }
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
