"""What the bootstrap over users costs: intervals of one model, and differences to rivals on the same draws.

Labels, predictions and lists are random; time depends on their number alone. The rivals are as many as
those of retrieval in a comparison: the last blessed model and six baselines. 2,000 draws unless told
otherwise.

    python -m benchmarks.bootstrap                        # 10,000 users
    python -m benchmarks.bootstrap --users 100000
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import click
import numpy as np

from schema.contract import TaskKind
from tfx_pipeline.config import CUTOFFS
from trainer import metrics
from trainer.uncertainty import (
    NUM_RESAMPLES,
    UserSums,
    intervals_and_differences,
    ranking_sums,
    retrieval_sums,
)

_ROWS_PER_USER = 15
_NUM_RIVALS = 7
_CATALOGUE = 5_000


def clicks(num_users: int, rng: np.random.Generator) -> Callable[[], dict[str, UserSums]]:
    """Makes the sums of one model of a click task."""
    users = np.repeat(np.arange(num_users), _ROWS_PER_USER)
    labels = (rng.random(len(users)) < 0.4).astype(np.float64)
    return lambda: ranking_sums(TaskKind.BINARY, labels, rng.random(len(users)), users)


def watch_time(num_users: int, rng: np.random.Generator) -> Callable[[], dict[str, UserSums]]:
    """Makes the sums of one model of a watch time task."""
    users = np.repeat(np.arange(num_users), _ROWS_PER_USER)
    chosen = (rng.random(len(users)) < 0.4).astype(np.float64)
    seconds = chosen * rng.exponential(20, len(users))
    return lambda: ranking_sums(TaskKind.WATCH_TIME, seconds, rng.exponential(20, len(users)), users, chosen)


def lists(num_users: int, rng: np.random.Generator) -> Callable[[], dict[str, UserSums]]:
    """Makes the sums of one model's lists of the longest cut-off, with three positives per user."""
    positives = list(rng.integers(_CATALOGUE, size=(num_users, 3)))

    def sums() -> dict[str, UserSums]:
        ranked = rng.integers(_CATALOGUE, size=(num_users, max(CUTOFFS)))
        return retrieval_sums(metrics.retrieval_metrics(*metrics.match_positives(ranked, positives), CUTOFFS))

    return sums


WORK: Mapping[str, Callable[[int, np.random.Generator], Callable[[], dict[str, UserSums]]]] = {
    "click": clicks,
    "watch time": watch_time,
    "lists": lists,
}


def measure(model: Callable[[], dict[str, UserSums]], num_resamples: int = NUM_RESAMPLES) -> dict[str, float]:
    """Processor seconds of the sums of one model, of its intervals, and of these with seven rivals."""
    started = time.process_time()
    candidate = model()
    made = time.process_time()
    intervals_and_differences(candidate, {}, num_resamples=num_resamples)
    alone = time.process_time()
    rivals = {f"rival {place}": model() for place in range(_NUM_RIVALS)}
    ready = time.process_time()
    intervals_and_differences(candidate, rivals, num_resamples=num_resamples)
    done = time.process_time()
    return {
        "metrics": float(len(candidate)),
        "sums of one model": made - started,
        "intervals": alone - made,
        f"with differences to {_NUM_RIVALS} rivals": done - ready,
    }


@click.command()
@click.option("--users", type=click.IntRange(min=1), default=10_000, show_default=True)
@click.option("--resamples", type=click.IntRange(min=100), default=NUM_RESAMPLES, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(users: int, resamples: int, seed: int) -> None:
    """Print processor seconds as a table of Markdown."""
    rows = {name: measure(make(users, np.random.default_rng(seed)), resamples) for name, make in WORK.items()}
    columns = list(next(iter(rows.values())))
    click.echo(f"| {users:,} users, {resamples:,} draws | " + " | ".join(columns) + " |")
    click.echo("| --- |" + " ---: |" * len(columns))
    for name, values in rows.items():
        click.echo(f"| {name} | " + " | ".join(f"{value:.3g}" for value in values.values()) + " |")


if __name__ == "__main__":
    main()
