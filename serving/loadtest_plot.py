"""The figure of a load test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from serving.loadtest import TOTAL, LoadResult, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TAIL_TICKS: Final = {0.0: "0", 0.5: "50", 0.9: "90", 0.99: "99", 0.999: "99.9", 0.9999: "99.99"}


def plot_load(measured: Sequence[tuple[LoadResult, Sequence[Sample]]], title: str, path: Path) -> None:
    """Draws latency by percentile, over time, and, with several rates, by rate.

    Args:
      measured: result and samples by rate, ascending.
      title: what was asked, and where.
      path: file to write; its suffix chooses the format, such as .png or .svg.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = 3 if len(measured) > 1 else 2
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels)
    figure.suptitle(title, fontsize=11)
    _by_percentile(axes[0], measured)
    _over_time(axes[1], *measured[-1])
    if panels == 3:
        _by_rate(axes[2], [result for result, _ in measured])
    for each in axes:
        each.grid(color="0.9")
        each.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, dpi=120)


def _by_percentile(axes: Axes, measured: Sequence[tuple[LoadResult, Sequence[Sample]]]) -> None:
    """Stages of one rate, or the totals of several, on an axis that stretches the tail."""
    curves: dict[str, list[float]] = {}
    if len(measured) == 1:
        result, samples = measured[0]
        for stage in result.latency_ms:
            curves[stage] = _latencies_ms(samples, stage)
    else:
        for result, samples in measured:
            if TOTAL in result.latency_ms:
                curves[f"{result.rate_per_s:g}/s"] = _latencies_ms(samples, TOTAL)
    longest = max(2, *(len(values) for values in curves.values())) if curves else 2
    for label, values in curves.items():
        # The last point stands for 100 %, which is infinitely far away: it is drawn half a request before.
        share = (np.arange(len(values)) + 0.5) / max(1, len(values))
        axes.plot(-np.log10(1 - share), values, label=label)
    ticks = {share: text for share, text in _TAIL_TICKS.items() if share < 1 - 0.3 / longest}
    axes.set_xticks([-np.log10(1 - share) for share in ticks], list(ticks.values()))
    axes.set(title="latency by percentile", xlabel="percentile", ylabel="ms")
    _finish(axes)


def _over_time(axes: Axes, result: LoadResult, samples: Sequence[Sample]) -> None:
    answered = [sample for sample in samples if sample.error is None]
    failed = [sample for sample in samples if sample.error is not None]
    for label, chosen, style in (("answered", answered, "C0."), ("failed", failed, "C3x")):
        if chosen:
            axes.plot(
                [sample.scheduled_s for sample in chosen],
                [1e3 * (sample.done_s - sample.scheduled_s) for sample in chosen],
                style,
                markersize=4,
                label=f"{label}: {len(chosen)}",
            )
    axes.set(title=f"each request at {result.rate_per_s:g}/s", xlabel="scheduled at, s", ylabel="total, ms")
    _finish(axes)


def _by_rate(axes: Axes, results: Sequence[LoadResult]) -> None:
    answered = [result for result in results if TOTAL in result.latency_ms]
    for name in ("p50", "p95", "p99") if answered else ():
        axes.plot(
            [result.rate_per_s for result in answered],
            [getattr(result.latency_ms[TOTAL], name) for result in answered],
            marker="o",
            markersize=4,
            label=name,
        )
    axes.set(title="total by rate", xlabel="requests/s asked for", ylabel="ms")
    _finish(axes)


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if not axes.has_data():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)


def _latencies_ms(samples: Sequence[Sample], stage: str) -> list[float]:
    answered = [sample for sample in samples if sample.error is None]
    if stage == TOTAL:
        return sorted(1e3 * (sample.done_s - sample.scheduled_s) for sample in answered)
    return sorted(1e3 * sample.stage_seconds[stage] for sample in answered if stage in sample.stage_seconds)
