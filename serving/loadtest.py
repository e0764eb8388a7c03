"""Open-loop load: requests leave at times drawn beforehand, whether or not the server keeps up.

A closed loop waits for an answer before it asks again, and so measures least when the server is slowest
("coordinated omission"). Here the latency of a request starts at its scheduled time: what it waited because
earlier ones were slow is part of it, as it would be for a user.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from schema.errors import ConfigError, FunnelError
from serving.client import LAYOUTS, Layout, RecommenderClient, RetryPolicy
from serving.slo import Slo

_LOGGER = logging.getLogger(__name__)

TOTAL: Final = "total"
# Answered before a measurement, so that connections are open and the layout is known.
_NUM_WARM_UP_REQUESTS: Final = 5
# Requests that leave later than this were held up by the generator, not by the server.
_LATE_MS: Final = 10.0
# One Python process computes on one core.
_BUSY_CORES: Final = 0.8

# Sends request number i and returns the seconds that each stage took.
Ask = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class LoadRequest:
    """What one user asks: query features by name, and items never to return."""

    query: Mapping[str, Any]
    exclude_item_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One request; times are seconds since the start.

    Attributes:
      scheduled_s: when it should have left.
      sent_s: when it left.
      done_s: when its answer, or error, was there.
      stage_seconds: what each stage took; empty after an error.
      error: kind of the error, None where there was an answer.
    """

    scheduled_s: float
    sent_s: float
    done_s: float
    stage_seconds: Mapping[str, float]
    error: str | None = None


@dataclass(frozen=True)
class Latency:
    """Percentiles in ms; each was measured: the smallest value that at least that share does not exceed."""

    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class LoadResult:
    """What came of one rate.

    Attributes:
      rate_per_s: mean of the arrivals asked for.
      duration_s: time over which they were spread.
      num_requests: requests sent.
      achieved_rate_per_s: answers per second, from the start to the last answer.
      latency_ms: by stage, over answered requests; `total` counts from the scheduled time.
      errors: number of requests by kind of error.
      late_ms: by how much requests left after their scheduled time.
      generator_cpu_ms_per_request: CPU time of this process, client and generator together.
      generator_cores: the same as a share of one core over the run.
    """

    rate_per_s: float
    duration_s: float
    num_requests: int
    achieved_rate_per_s: float
    latency_ms: Mapping[str, Latency]
    errors: Mapping[str, int]
    late_ms: Latency
    generator_cpu_ms_per_request: float
    generator_cores: float

    @property
    def error_share(self) -> float:
        """Requests without an answer, of all."""
        return sum(self.errors.values()) / self.num_requests

    @property
    def warnings(self) -> list[str]:
        """Reasons to doubt that the figures are those of the server."""
        found = []
        if self.late_ms.p99 > _LATE_MS:
            found.append(
                f"1 % of the requests left {self.late_ms.p99:.0f} ms late or later: too many were open at "
                "once, or the load generator or its machine is the bottleneck; the wait counts as latency"
            )
        if self.generator_cores > _BUSY_CORES:
            found.append(
                f"the load generator used {self.generator_cores:.2f} of the one core that it can use; "
                "lower the rate, or run several on other machines"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {**dataclasses.asdict(self), "error_share": self.error_share, "warnings": self.warnings}


def poisson_arrivals(rate_per_s: float, duration_s: float, seed: int) -> np.ndarray:
    """Draws the arrivals of a Poisson process: gaps are exponential, as those of many independent users.

    Args:
      rate_per_s: mean arrivals per second, above 0.
      duration_s: seconds, above 0.
      seed: the same seed draws the same arrivals.

    Returns:
      float64 [N] seconds since the start, ascending, below `duration_s`; N >= 1.

    Raises:
      ConfigError: a value that is not above 0, or so little load that nothing arrives.
    """
    if rate_per_s <= 0 or duration_s <= 0:
        raise ConfigError(f"expected a rate and a duration above 0, got {rate_per_s=}, {duration_s=}")
    rng = np.random.default_rng(seed)
    expected = rate_per_s * duration_s
    # Ten standard deviations above the mean: the draw never ends before the duration does.
    gaps = rng.exponential(1 / rate_per_s, size=int(expected + 10 * np.sqrt(expected) + 10))
    arrivals = np.cumsum(gaps)
    arrivals = arrivals[arrivals < duration_s]
    if not len(arrivals):
        raise ConfigError(f"{rate_per_s} requests/s for {duration_s} s drew no request; ask for more load")
    return arrivals


@contextlib.contextmanager
def asking(
    target: str,
    requests: Sequence[LoadRequest],
    *,
    k: int,
    num_candidates: int,
    timeout_s: float,
    layouts: Sequence[Layout] = LAYOUTS,
    seed: int = 1,
) -> Iterator[Ask]:
    """Opens a client for a load test: it repeats no request, and has been answered before.

    The garbage collector passes over what there is by then: the users with their histories are millions of
    objects, and while it walked them, some .4 s at a time, no request left.

    Args:
      target: see RecommenderClient, as are `timeout_s` and `layouts`.
      requests: of the users.
      k: items per answer.
      num_candidates: items to retrieve and rank.
      seed: draws the users.

    Raises:
      ServingError: the server is not ready, or fails a first request.
    """
    once = RetryPolicy(max_attempts=1)
    with RecommenderClient(target, timeout_s=timeout_s, layouts=layouts, retry=once) as client:
        client.wait_until_ready(timeout_s)
        ask = ask_for_recommendations(client, requests, k, num_candidates, seed)
        for i in range(_NUM_WARM_UP_REQUESTS):
            ask(i)
        gc.collect()
        gc.freeze()
        try:
            yield ask
        finally:
            gc.unfreeze()


def ask_for_recommendations(
    client: RecommenderClient, requests: Sequence[LoadRequest], k: int, num_candidates: int, seed: int
) -> Ask:
    """Returns an Ask that recommends to one of the users, drawn evenly by seed and number of the request."""
    chosen = np.random.default_rng(seed).integers(len(requests), size=1 << 16)

    def ask(i: int) -> Mapping[str, float]:
        request = requests[chosen[i % len(chosen)]]
        answer = client.recommend(
            request.query, k, exclude_item_ids=request.exclude_item_ids, num_candidates=num_candidates
        )
        return answer.stage_seconds

    return ask


def run_load(ask: Ask, arrivals_s: np.ndarray, max_in_flight: int) -> list[Sample]:
    """Sends requests at their times.

    Args:
      ask: sends one; what it raises as a FunnelError is counted, anything else ends the test.
      arrivals_s: float64 [N], ascending seconds since the start.
      max_in_flight: requests open at once; further ones wait, which counts as their latency.

    Returns:
      One sample per request, in order of arrival.
    """

    def one(i: int, scheduled_s: float) -> Sample:
        sent_s = time.perf_counter() - start
        try:
            stages, error = ask(i), None
        except FunnelError as caught:
            _LOGGER.debug("request %d failed: %s", i, caught)
            stages, error = {}, type(caught).__name__
        return Sample(scheduled_s, sent_s, time.perf_counter() - start, stages, error)

    with ThreadPoolExecutor(max_in_flight, thread_name_prefix="load") as pool:
        start = time.perf_counter()
        futures = []
        for i, scheduled_s in enumerate(arrivals_s.tolist()):
            wait_s = scheduled_s - (time.perf_counter() - start)
            if wait_s > 0:
                time.sleep(wait_s)
            futures.append(pool.submit(one, i, scheduled_s))
        return [future.result() for future in futures]


def measure(
    ask: Ask, rate_per_s: float, duration_s: float, seed: int, max_in_flight: int
) -> tuple[LoadResult, list[Sample]]:
    """Sends Poisson arrivals at one rate and sums up what came of them; see run_load."""
    arrivals_s = poisson_arrivals(rate_per_s, duration_s, seed)
    cpu_s = time.process_time()
    samples = run_load(ask, arrivals_s, max_in_flight)
    return summarize(samples, rate_per_s, duration_s, time.process_time() - cpu_s), samples


def summarize(
    samples: Sequence[Sample], rate_per_s: float, duration_s: float, generator_cpu_s: float
) -> LoadResult:
    """Sums up the samples of one rate; the arguments are those of LoadResult."""
    answered = [sample for sample in samples if sample.error is None]
    seconds: dict[str, list[float]] = {}
    for sample in answered:
        for stage, stage_s in (*sample.stage_seconds.items(), (TOTAL, sample.done_s - sample.scheduled_s)):
            seconds.setdefault(stage, []).append(stage_s)
    wall_s = max(duration_s, *(sample.done_s for sample in samples))
    return LoadResult(
        rate_per_s=rate_per_s,
        duration_s=duration_s,
        num_requests=len(samples),
        achieved_rate_per_s=len(answered) / wall_s,
        latency_ms={stage: _latency(values) for stage, values in seconds.items()},
        errors=dict(Counter(sample.error for sample in samples if sample.error is not None)),
        late_ms=_latency([sample.sent_s - sample.scheduled_s for sample in samples]),
        generator_cpu_ms_per_request=1e3 * generator_cpu_s / len(samples),
        generator_cores=generator_cpu_s / wall_s,
    )


def slo_misses(slo: Slo, result: LoadResult) -> list[str]:
    """Returns what a result at the rate of the objective misses, in words; nothing when it is met."""
    found = []
    if result.error_share > slo.error_budget:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(result.errors.items()))
        found.append(
            f"{result.error_share:.2%} of {result.num_requests} requests failed, "
            f"the budget is {slo.error_budget:.2%} ({kinds})"
        )
    total = result.latency_ms.get(TOTAL)
    if total is not None and total.p99 > slo.p99_ms:
        found.append(f"p99 was {total.p99:.1f} ms at {slo.rate_per_s:g}/s, the limit is {slo.p99_ms:g} ms")
    return found


def _latency(seconds: Sequence[float]) -> Latency:
    percentiles = np.percentile(seconds, [50, 95, 99, 100], method="inverted_cdf")
    return Latency(*(float(1e3 * value) for value in percentiles))
