"""A hand-made dataset of five items for the tests of the retrieval benchmarks."""

import polars as pl

from benchmarks.protocols import Tables
from schema.contract import load_dataset_spec

ITEMS = ("a", "b", "c", "d", "e")


def tables(*events: tuple[str, str, int, str]) -> Tables:
    """Tables in the form of MovieLens-1M, from (user, item, time, split) in file order."""
    interactions = pl.DataFrame(
        events, schema=["user_id", "item_id", "event_time_unix_s", "split"], orient="row"
    ).with_columns(pl.lit(1.0).alias("watched"), pl.int_range(pl.len()).alias("row_number"))
    items = pl.DataFrame(
        {
            "item_id": ITEMS,
            "year": [1990.0, 1991.0, 1992.0, None, 1994.0],
            "genres": [["x"], ["x", "y"], ["y"], [], ["x", "z"]],
        }
    )
    return Tables(load_dataset_spec("movielens-1m"), interactions, items)


def split_tables() -> Tables:
    """Users u and v have a history, w has none; nobody met e, or d before the test window."""
    return tables(
        ("u", "a", 10, "train"),
        ("u", "b", 20, "train"),
        ("v", "b", 20, "train"),
        ("v", "a", 30, "train"),
        ("v", "c", 30, "train"),
        ("u", "c", 40, "eval"),
        ("w", "a", 41, "eval"),
        ("u", "d", 50, "test"),
        ("u", "a", 51, "test"),
        ("u", "c", 52, "test"),
        ("u", "c", 53, "test"),
        ("w", "b", 54, "test"),
        ("v", "b", 55, "test"),
    )
