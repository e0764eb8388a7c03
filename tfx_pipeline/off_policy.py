"""What the ranker's first choice is worth, from the uniformly random screens of a run's test split.

A screen of the exploration bucket is a random set of items in random order: given the set, each item was as
likely at each position as any other. So a policy that picks one item of the screen, and shows it at a random
position of it, has known weights whatever it picks. Every item of a screen is logged once, so that the
weights of a screen have mean 1 and a reward model cancels: IPS, SNIPS and doubly robust are the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from schema.contract import DatasetSpec
from schema.errors import ConfigError, DataError, PoorSupportError
from schema.tables import INTERACTIONS, InteractionRows
from tfx_pipeline.batch_score import SCORE, load_ranker, predict_rows, read_knowledge
from trainer.features import EVENT_TIME, EXPLORATION, ITEM_ID, POSITION, PROPENSITY, SURFACE, USER_ID
from trainer.off_policy import LoggedActions, PolicyFacts, evaluate_policy, greedy_probabilities
from trainer.ranking_comparison import why_not_numbers
from trainer.score import is_negative_feedback

POPULARITY = "popularity"
SCREEN = "screen"
_ROW_NUMBER = "row_number"
# A propensity of 1 / (items left) rounded to float32 gives the number of items left to this share.
_ROUNDING = 1e-3


class NoScreensError(DataError):
    """The log has no uniformly random screens that tell what another order would have earned."""


def evaluate_ranker(
    tables_dir: Path,
    spec: DatasetSpec,
    ranker_dir: Path,
    *,
    max_positives_per_user: int,
    reward: str,
    epsilon: float = 0.0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PolicyFacts:
    """Estimates the reward per impression if the ranker, or one of its tasks alone, had picked the item.

    Args:
      tables_dir, spec: contract tables of the run, and their declaration.
      ranker_dir: SavedModel of the ranker.
      max_positives_per_user: of the run, see ExampleSettings.
      reward: a label of the dataset.
      epsilon: share of the picks that are uniformly random, see `greedy_probabilities`.
      on_progress: called with the number of rows scored after each batch.

    Returns:
      Estimates by what picks: `score`, each task (of negative feedback the least likely), and POPULARITY, the
      items with most positives in training. Refused is what the log has too few screens for, and a task that
      predicts no numbers.

    Raises:
      ConfigError: the dataset has no such label.
      NoScreensError: the log has no exploration rows with positions in the test split, or their screens are
        not uniformly random.
      DataError: the tables are too old.
      ServingError: no such model.
    """
    if reward not in spec.labels:
        raise ConfigError(f"dataset {spec.name} has no label {reward!r}; it has {', '.join(spec.labels)}.")
    screens = exploration_screens(tables_dir, spec, reward)
    ranker = load_ranker(ranker_dir, spec)
    rows = InteractionRows(screens, ())
    knowledge = read_knowledge(tables_dir, spec, max_positives_per_user, rows, online_history=False)
    predictions = predict_rows(screens, knowledge, spec, ranker, on_progress)
    positives = knowledge.log.filter(pl.col(spec.positive).fill_null(0) > 0)[ITEM_ID].value_counts(
        name="positives"
    )
    counted = screens.select(ITEM_ID).join(positives, on=ITEM_ID, how="left", maintain_order="left")
    against = {task.name for task in spec.tasks if is_negative_feedback(task)}
    scores = {
        SCORE: predictions.pop(SCORE),
        **{name: -values if name in against else values for name, values in predictions.items()},
        POPULARITY: counted["positives"].fill_null(0).to_numpy(),
    }
    screen = screens[SCREEN].to_numpy()
    rewards, users = screens[reward].cast(pl.Float64).to_numpy(), screens[USER_ID].to_numpy()
    logging = 1.0 / np.bincount(screen)[screen]
    estimates, refused = {}, {}
    for name, values in scores.items():
        if why := why_not_numbers(scores, [name]):
            refused[name] = why
            continue
        target = greedy_probabilities(values.astype(np.float64), screen, epsilon)
        try:
            estimates[name] = evaluate_policy(LoggedActions(rewards, target, logging, users))
        except PoorSupportError as error:
            refused[name] = str(error)
    return PolicyFacts(reward, epsilon, estimates, refused)


def exploration_screens(tables_dir: Path, spec: DatasetSpec, reward: str) -> pl.DataFrame:
    """The uniformly random screens of the test split that have more than one row, each with its reward.

    A screen ends where a user's positions do not grow, or the surface changes. All rows of a screen get the
    time of its first one: nothing that happened on the screen may tell the ranker about its rewards.

    Args:
      tables_dir: contract tables.
      spec: the declaration.
      reward: label; screens with a row without it are left out.

    Returns:
      Rows of the interactions table, ordered by screen and position, with SCREEN (0 to S − 1) and
      row_number counted anew.

    Raises:
      NoScreensError: see `evaluate_ranker`.
    """
    missing = [name for name in (EXPLORATION, POSITION) if name not in spec.interactions.columns]
    if missing:
        raise NoScreensError(
            f"dataset {spec.name} does not map {' and '.join(missing)}: without uniformly random screens "
            "whose positions are known there is no telling what another order would have earned."
        )
    rows = pl.read_parquet(tables_dir / INTERACTIONS).filter(
        pl.col("split") == "test", pl.col(EXPLORATION) == 1, pl.col(POSITION).is_not_null()
    )
    rows = rows.sort(USER_ID, EVENT_TIME, _ROW_NUMBER)
    starts = (pl.col(USER_ID) != pl.col(USER_ID).shift()) | (pl.col(POSITION) <= pl.col(POSITION).shift())
    if SURFACE in rows.columns:
        starts |= pl.col(SURFACE).ne_missing(pl.col(SURFACE).shift())
    rows = rows.with_columns(starts.fill_null(True).cum_sum().alias(SCREEN))
    of_screen = pl.col(reward).is_not_null().all().over(SCREEN) & (pl.len().over(SCREEN) > 1)
    rows = rows.filter(of_screen)
    if not len(rows):
        raise NoScreensError(
            f"the test split of {spec.name} has no uniformly random screens of two or more rows that have "
            f"the label {reward!r}."
        )
    if PROPENSITY in rows.columns:
        _check_uniform(rows.filter(pl.col(PROPENSITY).is_not_null().all().over(SCREEN)))
    return rows.with_columns(
        (pl.col(SCREEN).rank("dense") - 1).cast(pl.Int64),
        pl.col(EVENT_TIME).first().over(SCREEN),
        pl.int_range(pl.len(), dtype=pl.Int64).alias(_ROW_NUMBER),
    )


def _check_uniform(rows: pl.DataFrame) -> None:
    """Each row's propensity is one over the items left: one less than for the row above it."""
    left = 1.0 / pl.col(PROPENSITY).cast(pl.Float64) + pl.col(POSITION)
    spread = rows.group_by(SCREEN).agg((left.max() - left.min()).alias("spread"), left.max().alias("left"))
    wrong = spread.filter(pl.col("spread") > _ROUNDING * pl.col("left"))
    if len(wrong):
        raise NoScreensError(
            f"{len(wrong):,} of {len(spread):,} screens with exploration = 1 have propensities that are not "
            "those of a uniformly random order; map `exploration` to the bucket of random screens alone."
        )
