"""A small generated log with everything that the ranking baselines read."""

import numpy as np
import polars as pl

from schema.contract import DatasetSpec
from trainer.ranking_features import RankingTables

DAY = 86_400
START = 1_650_000_000
TRAIN_END = START + 6 * DAY
SPEC = DatasetSpec.model_validate(
    {
        "name": "tiny",
        "utc_offset_hours": 8,
        "interactions": {
            "files": ["log.csv"],
            "columns": {
                "user_id": "user",
                "item_id": "video",
                "event_time_unix_s": "time",
                "surface": "tab",
                "watch_time_s": "watched",
            },
            "labels": {"click": "click"},
        },
        "users": {
            "files": ["users.csv"],
            "columns": {"user_id": "user"},
            "features": [
                {"name": "country", "kind": "categorical"},
                {"name": "friends", "kind": "continuous"},
            ],
        },
        "items": {
            "files": ["items.csv"],
            "columns": {"item_id": "video", "creator_id": "author", "upload_time_unix_s": "uploaded"},
            "features": [
                {"name": "duration_s", "kind": "continuous"},
                {"name": "tag", "kind": "multi_categorical", "separator": ","},
            ],
        },
        "positive": "click",
        "tasks": [
            {"name": "click", "label": "click", "kind": "binary"},
            {"name": "watch", "label": "watch_time_s", "kind": "watch_time"},
        ],
        "counters": {"keys": ["item_id", "creator_id", "tag"], "windows_days": [1, 3], "smoothing": 4.0},
        "split": {"fractions": [0.6, 0.2, 0.2]},
    }
)
NUM_USERS, NUM_ITEMS = 30, 12


def click_chance(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The true chance of a click, from the numbers in the ids of users and items."""
    leaning = 3.0 * (users / NUM_USERS - 0.5) + 4.0 * (items / NUM_ITEMS - 0.5)
    return 1 / (1 + np.exp(-leaning))


def log(num_rows: int, seed: int) -> RankingTables:
    """Nine days; who clicks depends on user and item, and clicks make the watch time. Some values miss."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(NUM_USERS, size=num_rows), rng.integers(NUM_ITEMS, size=num_rows)
    # Whole minutes, so that some events share their second with others.
    times = START + np.sort(rng.integers(9 * DAY // 60, size=num_rows)) * 60
    click = (rng.random(num_rows) < click_chance(users, items)).astype(np.float32)
    watched = np.where(click > 0, rng.exponential(20.0, num_rows), rng.exponential(2.0, num_rows))
    interactions = pl.DataFrame(
        {
            "user_id": [f"u{code}" for code in users],
            "item_id": [f"i{code}" for code in items],
            "event_time_unix_s": times,
            "surface": rng.choice(["0", "1"], num_rows),
            "click": click,
            "watch_time_s": pl.Series(watched.astype(np.float32)).scatter(
                np.flatnonzero(rng.random(num_rows) < 0.1), None
            ),
            "row_number": np.arange(num_rows),
            "split": np.where(times < TRAIN_END, "train", np.where(times < TRAIN_END + DAY, "eval", "test")),
        }
    )
    known = pl.DataFrame(
        {
            # Two users of the log are not in the table.
            "user_id": [f"u{code}" for code in range(2, NUM_USERS)],
            "country": [["de", "in", None][code % 3] for code in range(2, NUM_USERS)],
            "friends": [float(code) if code % 5 else None for code in range(2, NUM_USERS)],
        }
    )
    catalogue = pl.DataFrame(
        {
            "item_id": [f"i{code}" for code in range(NUM_ITEMS)],
            "title": [f"i{code}" for code in range(NUM_ITEMS)],
            "creator_id": [f"c{code % 4}" if code else None for code in range(NUM_ITEMS)],
            "upload_time_unix_s": [START - code * DAY for code in range(NUM_ITEMS)],
            "duration_s": [10.0 * code for code in range(NUM_ITEMS)],
            "tag": [["x"], ["x", "y"], ["y"], []] * (NUM_ITEMS // 4),
        }
    )
    return RankingTables(SPEC, interactions, catalogue, known, TRAIN_END)
