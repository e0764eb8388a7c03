"""Compares the simulated log with KuaiRand-Pure's: a figure of aggregate curves, a table of statistics.

python benchmarks/simulator_realism.py --kuairand-dir DIR --out docs/images/simulator_realism.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.axes import Axes

from tfx_pipeline.datasets.simulator import DEFAULT, EXAMINATION, simulate

KUAIRAND_START = "20220425"  # the log is complete from this day on
COLORS = {"KuaiRand-Pure": "#1b6ca8", "simulated": "#d95f02"}
Values = npt.NDArray[np.float64]


def read_kuairand(folder: Path) -> pl.DataFrame:
    """The standard policy's complete days: who, what, local time, feedback, watch time, duration."""
    path = folder / "data" / "log_standard_4_22_to_5_08_pure.csv"
    log = pl.read_csv(path).unique(maintain_order=True).filter(pl.col("date") >= int(KUAIRAND_START))
    return log.select(
        user="user_id",
        item="video_id",
        time_s=pl.col("time_ms") // 1000 + 8 * 3600,
        click="is_click",
        like="is_like",
        dislike="is_hate",
        watch_s=pl.col("play_time_ms") / 1000,
        duration_s=pl.when(pl.col("duration_ms") > 0).then(pl.col("duration_ms") / 1000),
    )


def read_simulated(folder: Path) -> pl.DataFrame:
    """The same columns of a simulated log, and its surface, position and exploration."""
    return pl.read_parquet(folder / "interactions.parquet").select(
        "surface",
        "position",
        "exploration",
        "duration_s",
        user="user_id",
        item="item_id",
        time_s=pl.col("event_time") + 3600,
        click="is_click",
        like="is_like",
        dislike="is_not_interested",
        watch_s="watch_time_s",
    )


def _values(series: pl.Series) -> Values:
    return series.drop_nulls().to_numpy().astype(np.float64)


def _counts(log: pl.DataFrame, key: str) -> Values:
    return np.sort(_values(log.group_by(key).len()["len"]))


def _click_rates(log: pl.DataFrame, key: str, at_least: int) -> Values:
    rates = log.group_by(key).agg(pl.len(), pl.col("click").mean()).filter(pl.col("len") >= at_least)
    return _values(rates["click"])


def _watch_ratio(log: pl.DataFrame, click: int) -> Values:
    rows = log.filter(pl.col("click") == click)
    return _values(rows["watch_s"] / rows["duration_s"])


def _watch(log: pl.DataFrame, click: int) -> Values:
    return _values(log.filter(pl.col("click") == click)["watch_s"])


def _quantile(values: Values, fraction: float) -> float:
    return float(np.quantile(values, fraction))


def _share_of_top(counts: Values, fraction: float) -> float:
    return float(counts[-max(1, round(len(counts) * fraction)) :].sum() / counts.sum())


STATISTICS: dict[str, Callable[[pl.DataFrame], float]] = {
    "impressions": lambda log: len(log),
    "users": lambda log: log["user"].n_unique(),
    "items": lambda log: log["item"].n_unique(),
    "click rate": lambda log: float(_values(log["click"]).mean()),
    "like rate": lambda log: float(_values(log["like"]).mean()),
    "dislike rate": lambda log: float(_values(log["dislike"]).mean()),
    "share of impressions, top 1 % of items": lambda log: _share_of_top(_counts(log, "item"), 0.01),
    "share of impressions, top 10 % of items": lambda log: _share_of_top(_counts(log, "item"), 0.1),
    "share of impressions, top 10 % of users": lambda log: _share_of_top(_counts(log, "user"), 0.1),
    "click rate of items (30+ impressions), p10": lambda log: _quantile(_click_rates(log, "item", 30), 0.1),
    "click rate of items (30+ impressions), p90": lambda log: _quantile(_click_rates(log, "item", 30), 0.9),
    "click rate of users (20+ impressions), p10": lambda log: _quantile(_click_rates(log, "user", 20), 0.1),
    "click rate of users (20+ impressions), p90": lambda log: _quantile(_click_rates(log, "user", 20), 0.9),
    "duration, median s": lambda log: _quantile(_values(log["duration_s"]), 0.5),
    "duration, p90 s": lambda log: _quantile(_values(log["duration_s"]), 0.9),
    "watch time, median s": lambda log: _quantile(_values(log["watch_s"]), 0.5),
    "watch time, mean s": lambda log: float(_values(log["watch_s"]).mean()),
    "watch time, p99 s": lambda log: _quantile(_values(log["watch_s"]), 0.99),
    "watch time of clicks, median s": lambda log: _quantile(_watch(log, 1), 0.5),
    "watch time of others, median s": lambda log: _quantile(_watch(log, 0), 0.5),
    "clicks watched .95 to 1.05 durations": lambda log: float((abs(_watch_ratio(log, 1) - 1) < 0.05).mean()),
    "clicks watched longer": lambda log: float((_watch_ratio(log, 1) > 1.05).mean()),
}


def draw(logs: dict[str, pl.DataFrame], out: Path) -> None:
    """Writes the figure; its format follows the suffix of `out`."""
    figure, grid = plt.subplots(3, 4, figsize=(17, 11.5), layout="constrained")
    axes: list[Axes] = list(grid.flat)
    for name, log in logs.items():
        style: dict[str, Any] = {"color": COLORS[name], "label": name, "lw": 1.8}
        for axis, key in zip(axes[:2], ("user", "item"), strict=True):
            counts = _counts(log, key)
            level = np.geomspace(1 / len(counts), 1, 60)
            axis.loglog(np.quantile(counts, 1 - level) / counts.mean(), level, **style)
        share = np.linspace(0, 1, 101)
        items = np.concatenate([[0], _counts(log, "item")[::-1].cumsum()])
        axes[2].plot(share, np.interp(share, np.linspace(0, 1, len(items)), items / items[-1]), **style)
        for axis, (key, at_least) in zip(axes[3:5], (("item", 30), ("user", 20)), strict=True):
            _density(axis, _click_rates(log, key, at_least), np.linspace(0, 1, 26), style)
        _density(axes[5], np.log10(_values(log["duration_s"])), np.linspace(0.5, 3.2, 46), style)
        for click, dash in ((1, "-"), (0, ":")):
            watch = _watch(log, click)
            line = style | {"ls": dash, "label": f"{name}, {'clicked' if click else 'not clicked'}"}
            _density(axes[6], np.log10(np.maximum(watch, 0.1)), np.linspace(-1.1, 3.2, 50), line)
        _density(axes[7], _watch_ratio(log, 1), np.linspace(0, 2.5, 51), style)
        by_duration = (
            log.drop_nulls("duration_s")
            .with_columns(bin=(pl.col("duration_s").log(2) * 2).round())
            .group_by("bin")
            .agg(pl.len(), pl.col("duration_s").median(), pl.col("click").mean(), pl.col("watch_s").median())
            .filter(pl.col("len") >= 300)
            .sort("bin")
        )
        axes[8].semilogx(by_duration["duration_s"], by_duration["click"], **style)
        dashed = style | {"ls": "--", "label": None}
        axes[8].semilogx(by_duration["duration_s"], by_duration["watch_s"] / 20, **dashed)
        hours = np.bincount(_values(log["time_s"] // 3600 % 24).astype(int), minlength=24)
        axes[9].plot(np.arange(24), hours / hours.sum(), **style)
        days = _counts_by_day(log)
        axes[10].plot(np.arange(1, len(days) + 1), days / days.mean(), **style)

    simulated = logs["simulated"]
    for surface, dash in (("home", "-"), ("search", "--")):
        rows = simulated.filter(pl.col("surface") == surface)
        for bucket, kind, color in ((0, "clicks", COLORS["simulated"]), (1, "clicks, random", "#7570b3")):
            chosen = rows.filter(pl.col("exploration") == bucket)
            rate = chosen.group_by("position").agg(pl.col("click").mean()).sort("position")
            axes[11].plot(rate["position"], rate["click"], color=color, ls=dash, label=f"{kind}, {surface}")
        curve = EXAMINATION[surface]
        axes[11].plot(
            np.arange(1, len(curve) + 1), curve, color="#999999", ls=dash, label=f"examined, {surface}"
        )
    texts = (
        ("Impressions per user", "times the mean", "share of users above"),
        ("Impressions per item", "times the mean", "share of items above"),
        ("Concentration on items", "share of items, most shown first", "share of impressions"),
        ("Click rate of items, 30+ impressions", "click rate", "density"),
        ("Click rate of users, 20+ impressions", "click rate", "density"),
        ("Duration", "log10 s", "density"),
        ("Watch time", "log10 s, below 0.1 s drawn at -1", "density"),
        ("Watched part of clicked videos", "watch time / duration", "density"),
        ("Click rate, and median watch time / 20 s (dashed)", "duration, s", ""),
        ("Hour of day", "local hour", "share of impressions"),
        ("Day of the log", "day", "times the mean"),
        ("Positions (simulated only)", "position", "share"),
    )
    for axis, (title, x, y) in zip(axes, texts, strict=True):
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7.5, frameon=False)
    for axis in axes[8:11]:
        axis.set_ylim(bottom=0)
    axes[11].set_ylim(0, 1.02)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)
    plt.close(figure)


def _density(axis: Axes, values: Values, edges: Values, style: dict[str, Any]) -> None:
    height, _ = np.histogram(values, edges)
    axis.plot((edges[1:] + edges[:-1]) / 2, height / (len(values) * np.diff(edges)), **style)


def _counts_by_day(log: pl.DataFrame) -> Values:
    return _values(
        log.group_by(day=pl.col("time_s") // 86_400).len().sort("day").filter(pl.col("len") > 1000)["len"]
    )


def main() -> None:
    """Reads both logs, prints the table, writes the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kuairand-dir", type=Path, required=True, help="the unpacked KuaiRand-Pure folder")
    parser.add_argument("--out", type=Path, required=True, help="the figure, .png or .svg")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        simulate(DEFAULT, Path(folder) / "simulated")
        logs = {
            "KuaiRand-Pure": read_kuairand(arguments.kuairand_dir),
            "simulated": read_simulated(Path(folder) / "simulated"),
        }
    print("| statistic | " + " | ".join(logs) + " |\n| --- | ---: | ---: |")
    for name, statistic in STATISTICS.items():
        values = [statistic(log) for log in logs.values()]
        print(f"| {name} | " + " | ".join(f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" for v in values) + " |")
    draw(logs, arguments.out)


if __name__ == "__main__":
    main()
