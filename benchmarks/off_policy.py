"""How often 95 % intervals of a target policy's value hold the simulator's truth.

Screens are filled by an old policy of the simulator's kind (Plackett-Luce sampling, popularity and a stale
idea of the taste) and by uniform exploration; users examine and click by the simulator's true probabilities.
Each replication is a log of its own, from which the value of a policy that never ran is estimated; the truth
is the mean of the true click probabilities under that policy over the screens of 30,000 users.

    python benchmarks/off_policy.py                                    # 1,000 replications
    python benchmarks/off_policy.py --replications 20                  # a look
    python benchmarks/off_policy.py --replications 200 --seed 9000     # other logs
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import polars as pl
from scipy.special import expit, logit

from schema.errors import PoorSupportError
from tfx_pipeline.datasets.simulator import (
    EXAMINATION,
    TINY,
    choose_screen,
    simulate,
    true_click_probability,
)
from tfx_pipeline.datasets.simulator_world import LOG_END_UNIX_S
from trainer.jackknife import jackknife_intervals
from trainer.metrics import FloatArray, IntArray
from trainer.off_policy import DOUBLY_ROBUST, LoggedActions, evaluate_policy
from trainer.uncertainty import mean_over_users, ratio_of_sums

NAIVE_MEAN, NAIVE_MATCH = "mean of the log", "rows that the target would show"
POOR_MODEL = "doubly_robust, poor model"
_SURFACE = "home"
_OFFERED = 30
_SCREEN = 6
_EXPLORATION = 0.2
_SCREENS_PER_USER = 3
_USERS_OF_TRUTH = 30_000


@dataclasses.dataclass(frozen=True)
class World:
    """What is true of each user and item, and what two policies and two models think of it; all [U, I].

    Attributes:
      clicks: true click probability once examined.
      old: log-odds of the old policy.
      target: log-odds of the target policy.
      model, poor_model: predicted clicks.
    """

    clicks: FloatArray
    old: FloatArray
    target: FloatArray
    model: FloatArray
    poor_model: FloatArray


@dataclasses.dataclass(frozen=True)
class Log:
    """Slots that were filled: [n] each."""

    users: IntArray
    rewards: FloatArray
    logging: FloatArray
    target: FloatArray
    is_targets_best: FloatArray
    predicted: dict[str, FloatArray]
    predicted_target: dict[str, FloatArray]
    true_target: FloatArray


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What the replications gave.

    Attributes:
      share: of the intervals that held the truth.
      mean_estimate, mean_width: of the estimates that were reported.
      num_reported: replications in which the estimate was not refused.
    """

    share: float
    mean_estimate: float
    mean_width: float
    num_reported: int


def make_world(folder: Path, sharpness: float) -> World:
    """Plays the simulator's tiny platform, and looks at its truth.

    Args:
      folder: where the simulation goes.
      sharpness: factor of the target policy's log-odds; the larger, the farther it is from the old policy.
    """
    if not folder.exists():
        simulate(TINY, folder)
    users, items = (
        pl.read_parquet(folder / f"{table}.parquet")[column]
        for table, column in (("users", "user_id"), ("items", "item_id"))
    )
    pairs = users.to_frame().join(items.to_frame(), how="cross", maintain_order="left_right")
    clicks = true_click_probability(folder / "truth", pairs["user_id"], pairs["item_id"], LOG_END_UNIX_S)
    clicks = clicks.reshape(len(users), len(items))
    log = pl.read_parquet(folder / "interactions.parquet").filter(pl.col("is_click") == 1)
    counted = items.to_frame().join(
        log.group_by("item_id").len(), on="item_id", how="left", maintain_order="left"
    )
    popularity = np.log1p(counted["len"].fill_null(0).to_numpy())
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, *clicks.shape))
    truth = logit(clicks)
    return World(
        clicks=clicks,
        old=0.5 * popularity + 0.3 * (truth + noise[0]),
        target=sharpness * (truth + noise[1]),
        model=expit(0.8 * truth + 0.4 * noise[2]),
        poor_model=np.full_like(clicks, 0.2),
    )


def play(world: World, num_users: int, rng: np.random.Generator) -> Log:
    """Screens of users drawn from the world; a user who is drawn twice is two users."""
    drawn = np.repeat(rng.integers(len(world.clicks), size=num_users), _SCREENS_PER_USER)
    users = np.repeat(np.arange(num_users), _SCREENS_PER_USER)
    num_items = world.clicks.shape[1]
    offered = rng.random((len(drawn), num_items)).argpartition(_OFFERED, axis=1)[:, :_OFFERED]
    of_request = {
        name: np.take_along_axis(getattr(world, name)[drawn], offered, axis=1)
        for name in ("clicks", "old", "target", "model", "poor_model")
    }
    explores = rng.random(len(drawn)) < _EXPLORATION
    eligible = np.ones_like(offered, bool)
    shown, logging = choose_screen(
        np.where(explores[:, None], 0.0, of_request["old"]), eligible, _SCREEN, rng
    )
    examination = np.array(EXAMINATION[_SURFACE][:_SCREEN])
    left = np.ones_like(offered, bool)
    rows = np.arange(len(drawn))
    columns: dict[str, list[FloatArray]] = {}
    for position in range(_SCREEN):
        odds = np.where(left, np.exp(of_request["target"]), 0.0)
        policy = odds / odds.sum(axis=1, keepdims=True)
        item, examined = shown[:, position], examination[position]
        reward = {name: examined * of_request[name] for name in ("clicks", "model", "poor_model")}
        here = {
            "rewards": rng.random(len(drawn)) < reward["clicks"][rows, item],
            "target": policy[rows, item],
            "is_targets_best": policy.argmax(axis=1) == item,
            "true_target": (policy * reward["clicks"]).sum(axis=1),
        }
        for name in ("model", "poor_model"):
            here[name] = reward[name][rows, item]
            here[f"{name}_target"] = (policy * reward[name]).sum(axis=1)
        for name, values in here.items():
            columns.setdefault(name, []).append(values.astype(np.float64))
        left[rows, item] = False
    table = {name: np.column_stack(values).ravel() for name, values in columns.items()}
    return Log(
        users=np.repeat(users, _SCREEN),
        rewards=table["rewards"],
        logging=logging.ravel(),
        target=table["target"],
        is_targets_best=table["is_targets_best"],
        predicted={DOUBLY_ROBUST: table["model"], POOR_MODEL: table["poor_model"]},
        predicted_target={DOUBLY_ROBUST: table["model_target"], POOR_MODEL: table["poor_model_target"]},
        true_target=table["true_target"],
    )


def estimates(log: Log, clip: float | None) -> dict[str, tuple[float, float, float]]:
    """Value, low and high by estimator; the naive ones first. Refused ones are absent."""
    chosen = log.is_targets_best
    naive = {
        NAIVE_MEAN: mean_over_users(_sums(log, log.rewards) / _sums(log, np.ones_like(log.rewards))),
        NAIVE_MATCH: ratio_of_sums(_sums(log, log.rewards * chosen), _sums(log, chosen)),
    }
    found = {name: (i.value, i.low, i.high) for name, i in jackknife_intervals(naive).items()}
    for name in log.predicted:
        logged = LoggedActions(
            log.rewards, log.target, log.logging, log.users, log.predicted[name], log.predicted_target[name]
        )
        try:
            values = evaluate_policy(logged, clip=clip).values
        except PoorSupportError:
            continue
        values[name] = values.pop(DOUBLY_ROBUST)
        found |= {key: (i.value, i.low, i.high) for key, i in values.items()}
    return found


def _sums(log: Log, values: FloatArray) -> FloatArray:
    return np.bincount(log.users, values)


def coverage(
    world: World,
    num_users: int,
    replications: int,
    clip: float | None = None,
    seed: int = 1_000,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[float, dict[str, Coverage]]:
    """The truth, and what became of it in the replications, by estimator; `seed` is of the first log."""
    truth = float(play(world, _USERS_OF_TRUTH, np.random.default_rng(1)).true_target.mean())
    found: dict[str, list[tuple[float, float, float]]] = {}
    for replication in range(replications):
        log = play(world, num_users, np.random.default_rng(seed + replication))
        for name, values in estimates(log, clip).items():
            found.setdefault(name, []).append(values)
        on_progress(replication + 1)
    summary = {}
    for name, values in found.items():
        value, low, high = np.array(values).T
        held = (low <= truth) & (truth <= high)
        summary[name] = Coverage(
            float(held.mean()), float(value.mean()), float((high - low).mean()), len(values)
        )
    return truth, summary


@click.command()
@click.option("--replications", type=click.IntRange(1), default=1_000, show_default=True)
@click.option("--users", "num_users", type=click.IntRange(20), default=300, show_default=True)
@click.option("--seed", type=click.IntRange(2), default=1_000, show_default=True, help="Of the first log.")
def main(replications: int, num_users: int, seed: int) -> None:
    """Prints the coverage of every estimator, for targets nearer to the log and farther from it."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for title, sharpness, clip, users in (
            ("a target near the log", 0.6, None, num_users),
            ("the same, weights cut at 5", 0.6, 5.0, num_users),
            ("a target far from the log", 1.5, None, num_users),
            ("a nearly deterministic target", 8.0, None, num_users),
            ("the same, a log of a fifth of the users", 8.0, None, num_users // 5),
            ("the same, a log of a tenth of the users", 8.0, None, num_users // 10),
        ):
            world = make_world(Path(folder) / "simulated", sharpness)
            log = play(world, users, np.random.default_rng(0))
            truth, found = coverage(world, users, replications, clip, seed)
            largest = (log.target / log.logging).max()
            click.echo(f"\n{title}: {len(log.rewards):,} rows of {users} users, largest weight {largest:.0f}")
            click.echo(
                f"{f'truth {truth:.4f}':34}{'reported':>9}{'coverage':>10}{'estimate':>10}{'width':>8}"
            )
            for name, row in found.items():
                click.echo(
                    f"{name:34}{row.num_reported:>9}{row.share:>10.1%}{row.mean_estimate:>10.4f}"
                    f"{row.mean_width:>8.4f}"
                )
    click.echo(f"\n{time.process_time() - started:.0f} s of CPU")


if __name__ == "__main__":
    main()
