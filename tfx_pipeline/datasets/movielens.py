"""MovieLens-1M's `::`-separated latin-1 files as Parquet tables that the event contract can map."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl

from schema.errors import DataError

logger = logging.getLogger(__name__)

RATINGS = "ratings.dat"
USERS = "users.dat"
MOVIES = "movies.dat"

_SEPARATOR = "::"
_RELEASE_YEAR = r"\((\d{4})\)$"  # every title ends in it: "Toy Story (1995)"


def convert_movielens(source: Path, target: Path) -> None:
    """Writes interactions.parquet, users.parquet and items.parquet.

    Ids and codes (age, occupation) stay the strings of the source; `rating` is float32, `timestamp` int64
    unix s, `year` float32 and taken from the title, `genres` one string joined by `|`. Rows keep the order of
    the files.

    Args:
      source: folder with ratings.dat, users.dat and movies.dat.
      target: existing folder.

    Raises:
      DataError: a file is absent, empty, or has a row that does not fit.
    """
    ratings = _read(source / RATINGS, ("user_id", "item_id", "rating", "timestamp"))
    try:
        ratings = ratings.cast({"rating": pl.Float32, "timestamp": pl.Int64})
    except pl.exceptions.InvalidOperationError as error:
        raise DataError(f"{source / RATINGS}: ratings and timestamps must be numbers: {error}") from error
    users = _read(source / USERS, ("user_id", "gender", "age", "occupation", "zip_code"))
    movies = _read(source / MOVIES, ("item_id", "title", "genres"))
    movies = movies.with_columns(year=pl.col("title").str.extract(_RELEASE_YEAR).cast(pl.Float32))
    for name, frame in (("interactions", ratings), ("users", users), ("items", movies)):
        frame.write_parquet(target / f"{name}.parquet")
    logger.info("converted ratings=%d users=%d movies=%d", ratings.height, users.height, movies.height)


def _read(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    """One string column per field; split here because no CSV reader takes a separator of two characters."""
    try:
        lines = pl.read_csv(
            path,
            has_header=False,
            new_columns=["line"],
            separator="\x01",  # occurs in no line, so that a row is a line
            quote_char=None,
            encoding="latin1",
            infer_schema=False,
        )
    except FileNotFoundError as error:
        raise DataError(f"no file {path}; take it from the official ml-1m.zip") from error
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{path} cannot be read as lines of text: {error}; take it from the official ml-1m.zip"
        ) from error
    num_fields = pl.col("line").str.count_matches(_SEPARATOR, literal=True).fill_null(0) + 1
    wrong = lines.with_row_index(offset=1).filter(num_fields != len(columns)).select("index", n=num_fields)
    if wrong.height:
        index, n = wrong.row(0)
        raise DataError(
            f"{path} line {index}: expected {len(columns)} fields ({_SEPARATOR.join(columns)}), found {n}; "
            f"{wrong.height} such lines. Take the file from the official ml-1m.zip"
        )
    fields = pl.col("line").str.split_exact(_SEPARATOR, len(columns) - 1).struct.rename_fields(columns)
    return lines.select(fields).unnest("line")
