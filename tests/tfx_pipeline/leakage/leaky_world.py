"""A tiny log with every kind of column, its honest examples, and ways to plant a leak in them."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
from tfx_bsl.coders import example_coder

from schema.contract import DatasetSpec
from schema.tables import INTERACTIONS, ITEMS, USERS, prepare_tables, read_summary
from tfx_pipeline.examples import (
    ExampleSettings,
    catalogue_columns,
    example_batch,
    interaction_columns,
    user_state_columns,
)
from tfx_pipeline.leakage import recorded
from tfx_pipeline.leakage.known_past import KnownPast
from trainer import features

START = 1_700_000_000
DAY_S = 86_400
NUM_DAYS = 10
MAX_POSITIVES = 12
NUM_USERS = 30
NUM_ITEMS = 40
NUM_EVENTS = 1_500

SPEC = DatasetSpec.model_validate(
    {
        "name": "leaky",
        "interactions": {
            "files": ["log.parquet"],
            "columns": {
                **{n: n for n in ("user_id", "item_id", "surface", "position", "search_tokens")},
                "event_time_unix_s": "time",
                "watch_time_s": "watched",
            },
            "labels": {"click": "click"},
        },
        "users": {
            "files": ["users.parquet"],
            "columns": {"user_id": "user_id", "valid_from_unix_s": "since"},
            "features": [
                {"name": "country", "kind": "categorical"},
                {"name": "activity", "kind": "continuous"},
            ],
        },
        "items": {
            "files": ["items.parquet"],
            "columns": {
                "item_id": "item_id",
                "creator_id": "creator",
                "upload_time_unix_s": "uploaded",
                "valid_from_unix_s": "since",
            },
            "features": [
                {"name": "tags", "kind": "multi_categorical"},
                {"name": "title_words", "kind": "text", "column": "title"},
                {"name": "length", "kind": "continuous"},
            ],
        },
        "positive": "click",
        "tasks": [
            {"name": "click", "label": "click", "kind": "binary"},
            {"name": "watch_time", "label": "watch_time_s", "kind": "watch_time"},
        ],
        "split": {"fractions": [0.7, 0.15, 0.15]},
        "counters": {"keys": ["item_id", "creator_id", "tags"], "windows_days": [1, 3]},
        "max_history": 7,
        "max_impressions": 9,
        "session_gap_hours": 2.0,
    }
)


@dataclasses.dataclass(frozen=True)
class World:
    """Contract tables and the honest examples made of them.

    Attributes:
      tables_dir, interactions, users, items, train_end_unix_s: of the tables.
      samples: all interaction examples by split, every feature a list.
      user_states, catalogue: all examples of users and items, likewise.
    """

    tables_dir: Path
    interactions: pl.DataFrame
    users: pl.DataFrame
    items: pl.DataFrame
    train_end_unix_s: int
    samples: dict[str, pl.DataFrame]
    user_states: pl.DataFrame
    catalogue: pl.DataFrame

    def past(self) -> KnownPast:
        """What was known, of everybody."""
        return KnownPast(
            self.interactions,
            self.users,
            self.items,
            SPEC,
            train_end_unix_s=self.train_end_unix_s,
            max_positives_per_user=MAX_POSITIVES,
            user_ids=self.interactions["user_id"],
            item_ids=self.items["item_id"],
        )


def build(folder: Path) -> World:
    """Writes the tables and makes the examples."""
    source = folder / "source"
    source.mkdir()
    _write_source(source)
    tables_dir = prepare_tables(SPEC, source, folder / "data")
    interactions, users, items = (pl.read_parquet(tables_dir / name) for name in (INTERACTIONS, USERS, ITEMS))
    train_end = read_summary(tables_dir).train_end_unix_s
    settings = ExampleSettings(train_end, MAX_POSITIVES)
    rows = interaction_columns(interactions, users, items, SPEC, settings)
    train_items = interactions.filter(pl.col("split") == "train")["item_id"].unique()
    states = user_state_columns(interactions, users, SPEC, settings, "home", train_items)
    return World(
        tables_dir,
        interactions,
        users,
        items,
        train_end,
        {
            split: _decoded(rows.filter(pl.col("split") == split), recorded.interaction_dtypes(SPEC))
            for split in features.SPLITS
        },
        _decoded(states, recorded.user_state_dtypes(SPEC)),
        _decoded(catalogue_columns(items, train_end), recorded.catalogue_dtypes(SPEC)),
    )


def _decoded(rows: pl.DataFrame, dtypes: dict[str, str]) -> pl.DataFrame:
    """Through the encoding of the real examples."""
    serialized = example_coder.RecordBatchToExamplesEncoder().encode(example_batch(rows, dtypes))
    return recorded.decode(serialized, dtypes)


def _write_source(folder: Path) -> None:
    rng = np.random.default_rng(8)
    minutes = np.sort(rng.integers(0, NUM_DAYS * 24 * 60, NUM_EVENTS))
    item = np.minimum(rng.geometric(0.08, NUM_EVENTS) - 1, NUM_ITEMS - 1)
    user = rng.integers(NUM_USERS, size=NUM_EVENTS)
    click = rng.random(NUM_EVENTS) < np.where(item % 3 == user % 3, 0.6, 0.2)
    searches: list[list[str] | None] = [None, None, ["jazz"], ["jazz", "piano"], ["cats"]]
    watched = np.where(click, rng.exponential(40, NUM_EVENTS), 0.0)
    pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in user],
            "item_id": [f"i{n}" for n in item],
            "time": START + minutes * 60,
            "surface": [[None, "home", "feed"][n] for n in rng.integers(3, size=NUM_EVENTS)],
            "position": rng.integers(0, 20, NUM_EVENTS),
            "search_tokens": [searches[n] for n in rng.integers(len(searches), size=NUM_EVENTS)],
            "watched": [None if rng.random() < 0.1 else float(w) for w in watched],
            "click": click.astype(int),
        }
    ).write_parquet(folder / "log.parquet")
    # Everybody, and every item, changes in the middle of the log.
    for name, count, columns in (
        ("users", NUM_USERS, {"country": ["de", "fr", None, "it"], "activity": [1.0, 2.5, None, 4.0]}),
        ("items", NUM_ITEMS, {"creator": ["c0", "c1", "c2"], "tags": [["a"], ["a", "b"], None, ["c", "c"]]}),
    ):
        table: dict[str, list[object]] = {f"{name[:-1]}_id": [], "since": []}
        table |= {column: [] for column in columns}
        for n in range(count):
            for version, since in enumerate((START - DAY_S, START + (NUM_DAYS // 2) * DAY_S + n)):
                table[f"{name[:-1]}_id"].append(f"{name[0]}{n}")
                table["since"].append(since)
                for column, values in columns.items():
                    table[column].append(values[(n + version) % len(values)])
        if name == "items":
            table["uploaded"] = [START - DAY_S * (row % 5) for row in range(2 * count)]
            table["title"] = [f"Déjà-vu, part {row // 2}" for row in range(2 * count)]
            table["length"] = [float(row) for row in range(2 * count)]
        pl.DataFrame(table).write_parquet(folder / f"{name}.parquet")
