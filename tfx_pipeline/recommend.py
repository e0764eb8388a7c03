"""Recommendations from a finished run: for one user by a model server, for many by the pushed model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from schema.errors import DataError, ServingError
from schema.tables import ITEMS
from serving.versions import find_versions
from tfx_pipeline.config import RETRIEVAL, RunPaths
from tfx_pipeline.run_result import RunResult
from tfx_pipeline.user_states import (
    UserState,
    find_user_states,
    padded,
    query_arrays,
    read_user_states,
    unknown_user_state,
)
from trainer.checkpoint import catalogue_files

_BATCH_USERS = 256
_BATCH_ITEMS = 8_192


def titles(run: RunResult, paths: RunPaths) -> dict[str, str]:
    """Title by item id; an item without a title shows its id.

    The catalogue of the newest pushed model counts before the table of the run: it may have been refreshed.
    """
    items = pl.read_parquet(Path(run.tables_dir) / ITEMS, columns=["item_id", "title"])
    found = {item_id: title or item_id for item_id, title in items.iter_rows()}
    return found | _pushed_titles(paths.serving_models / RETRIEVAL)


def _pushed_titles(base: Path) -> dict[str, str]:
    import tensorflow as tf

    versions = find_versions(base)
    files = catalogue_files(versions[max(versions)]) if versions else []
    parser = {name: tf.io.FixedLenFeature([], tf.string, "") for name in ("item_id", "title")}
    found = {}
    for batch in tf.data.TFRecordDataset(files, compression_type="GZIP").batch(_BATCH_ITEMS):
        columns = tf.io.parse_example(batch, parser)
        for item_id, title in zip(columns["item_id"].numpy(), columns["title"].numpy(), strict=True):
            found[item_id.decode()] = (title or item_id).decode()
    return found


def user_state(run: RunResult, user_id: str) -> tuple[UserState, bool]:
    """The state of one user as of the end of training, and whether the user is in the data at all."""
    return user_states(run, [user_id])[0]


def user_states(run: RunResult, user_ids: Sequence[str]) -> list[tuple[UserState, bool]]:
    """The states of several users, in their order; see user_state."""
    spec = run.config.dataset
    found = find_user_states([run.user_states], spec, user_ids)
    anyone = next(read_user_states([run.user_states], spec))
    return [
        (found[user_id], True) if user_id in found else (unknown_user_state(user_id, anyone), False)
        for user_id in user_ids
    ]


def serving_folder(run: RunResult, paths: RunPaths, model: str) -> Path:
    """Folder of the newest pushed version of a model. Raises ServingError when none was ever pushed."""
    base = paths.serving_models / model
    versions = [int(p.name) for p in base.iterdir() if p.name.isdigit()] if base.is_dir() else []
    if not versions:
        reason = run.reasons.get(model, "its folder is gone")
        raise ServingError(f"no {model} model was pushed to {base}: {reason}; see {run.report}")
    return base / str(max(versions))


def read_user_ids(path: Path) -> list[str]:
    """User ids of a file: Parquet or CSV with a column user_id, or a text file with one id per line.

    Raises:
      DataError: no such file, an unreadable one, no such column, no ids, or an id that occurs twice.
    """
    if not path.is_file():
        raise DataError(f"no users file {path}")
    try:
        if path.suffix == ".parquet":
            table = pl.read_parquet(path)
        elif path.suffix == ".csv":
            table = pl.read_csv(path, infer_schema=False)
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            table = pl.DataFrame({"user_id": [line.strip() for line in lines]}, schema={"user_id": pl.String})
    except pl.exceptions.NoDataError as error:
        raise DataError(f"{path} is empty; a column 'user_id' was expected") from error
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; give .parquet, .csv, or UTF-8 text with one id per line"
        ) from error
    if "user_id" not in table.columns:
        raise DataError(f"{path} has no column 'user_id'; it has: {', '.join(table.columns)}")
    ids = table["user_id"].cast(pl.String).drop_nulls()
    ids = ids.filter(ids != "")
    if ids.is_empty():
        raise DataError(f"{path} holds no user id")
    repeated = ids.filter(ids.is_duplicated())
    if not repeated.is_empty():
        raise DataError(f"{path} holds user {repeated[0]!r} more than once; give every user once")
    return ids.to_list()


def batch_recommend(
    run: RunResult,
    paths: RunPaths,
    user_ids: Sequence[str],
    k: int,
    include_seen: bool,
    out: Path,
    on_progress: Callable[[int], None],
) -> int:
    """Writes the top-k of the pushed retrieval model for many users, as of the end of training.

    Args:
      run: a finished run.
      paths: its folders.
      user_ids: users, known or not.
      k: items per user.
      include_seen: whether items of the user's training history may be recommended.
      out: Parquet file with user_id, rank (from 1), item_id, score; written whole or not at all.
      on_progress: called with the number of users done after each batch.

    Returns:
      How many of the users are not in the data; they get what suits their empty history.

    Raises:
      ServingError: no pushed model, or k above what it was exported with.
    """
    import scann  # noqa: F401  registers the ops of the index
    import tensorflow as tf

    folder = serving_folder(run, paths, RETRIEVAL)
    loaded = tf.saved_model.load(str(folder))
    recommend = loaded.signatures["serving_default"]
    states = user_states(run, user_ids)
    parts = []
    for start in range(0, len(states), _BATCH_USERS):
        batch = [state for state, _ in states[start : start + _BATCH_USERS]]
        inputs = query_arrays(batch, run.config.dataset)
        excluded = [() if include_seen else state.seen_item_ids for state in batch]
        inputs["exclude_item_ids"] = padded(excluded)
        inputs["k"] = np.full(len(batch), k, np.int32)
        # Allow-lists; empty ones allow everything.
        for name in recommend.structured_input_signature[1].keys() - inputs.keys():
            inputs[name] = np.full((len(batch), 0), "", object)
        try:
            answer = recommend(**{name: tf.constant(value) for name, value in inputs.items()})
        except tf.errors.InvalidArgumentError as error:
            raise ServingError(f"{folder} refused k={k}: {error.message}") from error
        parts.append(
            _rows([state.user_id for state in batch], answer["item_ids"].numpy(), answer["scores"].numpy())
        )
        on_progress(min(start + _BATCH_USERS, len(states)))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        pl.concat(parts).write_parquet(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return sum(1 for _, known in states if not known)


def _rows(user_ids: Sequence[str], item_ids: np.ndarray, scores: np.ndarray) -> pl.DataFrame:
    """One row per user and rank; padding is left out."""
    count, width = item_ids.shape
    table = pl.DataFrame(
        {
            "user_id": np.repeat(np.asarray(user_ids, dtype=object), width),
            "rank": np.tile(np.arange(1, width + 1, dtype=np.int32), count),
            "item_id": item_ids.ravel(),
            "score": scores.ravel(),
        },
        schema_overrides={"user_id": pl.String, "item_id": pl.Binary},
    )
    return table.with_columns(pl.col("item_id").cast(pl.String)).filter(pl.col("item_id") != "")
