"""A file of impressions through the ranker: one row out for every row in, with what was known at its time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from schema.contract import DatasetSpec
from schema.errors import DataError, ServingError
from schema.point_in_time import item_counts
from schema.tables import INTERACTIONS, IS_REPEATED, ITEMS, USERS, InteractionRows, read_summary
from tfx_pipeline.config import RANKING, RunPaths
from tfx_pipeline.examples import ExampleSettings, example_batch, interaction_columns, interaction_inputs
from tfx_pipeline.recommend import serving_folder
from tfx_pipeline.run_result import RunResult
from tfx_pipeline.score_weights import LABEL_PREFIX
from trainer.features import EVENT_TIME, ITEM_COUNTS, ITEM_ID, SEARCH_TOKENS, SURFACE, USER_ID

# Rows whose examples are made together, and rows that the model sees at once: they bound the memory.
_ROWS_PER_SLICE = 50_000
_ROWS_PER_CALL = 2_048
_SIGNATURE = "serving_examples"
SCORE = "score"
_ITEM_IS_KNOWN = "item_is_known"
_USER_IS_KNOWN = "user_is_known"

# Serialized interaction examples to float32 [B] per task, and the score.
Ranker = Callable[[Sequence[bytes]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """What is known of the past when rows are scored.

    Attributes:
      log: events in any order, each once; a row to be scored knows those strictly before it.
      train_user_ids: users with an event in the train split.
      users, items: contract tables.
      train_end_unix_s: end of training.
      is_frozen: whether nothing is known of what happened since the end of training.
      max_positives_per_user: see ExampleSettings.
    """

    log: pl.DataFrame
    train_user_ids: pl.Series
    users: pl.DataFrame
    items: pl.DataFrame
    train_end_unix_s: int
    is_frozen: bool
    max_positives_per_user: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a file turned out to be.

    Attributes:
      num_rows: rows in and out.
      num_unknown_items: rows whose item is not in the catalogue.
      num_unknown_users: rows whose user has no event in the train split.
      train_end_unix_s: end of training.
    """

    num_rows: int
    num_unknown_items: int
    num_unknown_users: int
    train_end_unix_s: int


def batch_score(
    run: RunResult,
    paths: RunPaths,
    rows: InteractionRows,
    out: Path,
    online_history: bool,
    model_dir: Path | None,
    on_progress: Callable[[int], None],
) -> Scored:
    """Writes the predictions of a ranker for every row of a file.

    Args:
      run: a finished run.
      paths: its folders.
      rows: what to score.
      out: Parquet file, written whole or not at all: user_id, item_id, event_time_unix_s, item_is_known and
        user_is_known (int64, 0 or 1), float32 per task and `score`, and `label_<name>` for each label that
        the file has. One row per row of `rows`, in their order.
      online_history: whether a row also knows the rows with an earlier time, and the eval split; else the
        train split alone.
      model_dir: a ranker's SavedModel; None for the newest pushed one.
      on_progress: called with the number of rows done after each batch.

    Raises:
      DataError: the run's tables are gone or too old, or `online_history` without a label that is counted.
      ServingError: no such model, or one that does not predict the run's tasks from examples.
    """
    spec = run.config.dataset
    folder = model_dir if model_dir is not None else serving_folder(run, paths, RANKING)
    max_positives = run.config.examples.max_positives_per_user
    knowledge = read_knowledge(Path(run.tables_dir), spec, max_positives, rows, online_history)
    ranker = load_ranker(folder, spec)
    table = rows.table
    predictions = predict_rows(table, knowledge, spec, ranker, on_progress)
    in_catalogue = table[ITEM_ID].is_in(knowledge.items[ITEM_ID].implode())
    in_training = table[USER_ID].is_in(knowledge.train_user_ids.implode())
    labels = [name for name in spec.labels if name not in rows.absent]
    written = table.select(
        USER_ID,
        ITEM_ID,
        EVENT_TIME,
        in_catalogue.cast(pl.Int64).alias(_ITEM_IS_KNOWN),
        in_training.cast(pl.Int64).alias(_USER_IS_KNOWN),
        *(pl.Series(name, values) for name, values in predictions.items()),
        *(pl.col(name).alias(f"{LABEL_PREFIX}{name}") for name in labels),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        written.write_parquet(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return Scored(
        len(table), int((~in_catalogue).sum()), int((~in_training).sum()), knowledge.train_end_unix_s
    )


def predict_rows(
    table: pl.DataFrame,
    knowledge: Knowledge,
    spec: DatasetSpec,
    ranker: Ranker,
    on_progress: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """The ranker's predictions for rows, in their order.

    Args:
      table, knowledge, spec: as `serialized_examples`.
      ranker: from `load_ranker`.
      on_progress: called with the number of rows done after each batch.

    Returns:
      float32 [n] per task, and SCORE.
    """
    names = [*(task.name for task in spec.tasks), SCORE]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    done = 0
    for examples in serialized_examples(table, knowledge, spec):
        answer = ranker(examples)
        for name in names:
            parts[name].append(answer[name])
        done += len(examples)
        on_progress(done)
    return {name: np.concatenate(values) for name, values in parts.items()}


def read_knowledge(
    tables_dir: Path,
    spec: DatasetSpec,
    max_positives_per_user: int,
    rows: InteractionRows,
    online_history: bool,
) -> Knowledge:
    """What the rows may know: the train split of the run's tables; with `online_history` the eval split too,
    which a live system would know by then, and the rows themselves.

    As in training, exact repetitions count once and rows of items outside the catalogue leave no trace. An
    event of the run that the file holds as well is known once. The run's test split is not known.

    Args:
      tables_dir, spec: contract tables of the run, and their declaration.
      max_positives_per_user: of the run, see ExampleSettings.
      rows: what is to be scored.
      online_history: see `batch_score`.

    Raises:
      DataError: the tables are gone or too old, or `online_history` without a label that is counted.
    """
    if online_history:
        _check_outcomes(rows, spec)
    train_end = read_summary(tables_dir).train_end_unix_s
    items = pl.read_parquet(tables_dir / ITEMS)
    if ITEM_COUNTS not in items.columns:
        raise DataError(
            f"the tables in {tables_dir} were written by an older version of Funnel; 'funnel run' with the "
            "same settings renews them"
        )
    optional = (name for name in (SURFACE, SEARCH_TOKENS) if name in spec.interactions.columns)
    names = dict.fromkeys(
        (USER_ID, ITEM_ID, EVENT_TIME, "row_number", spec.positive, *spec.task_labels, *optional)
    )
    splits = ("train", "eval") if online_history else ("train",)
    events = pl.scan_parquet(tables_dir / INTERACTIONS).filter(pl.col("split").is_in(splits))
    log = events.select(*names, "split").collect()
    train_user_ids = log.filter(pl.col("split") == "train")[USER_ID].unique()
    log = log.drop("split")
    if online_history:
        is_event = ~pl.col(IS_REPEATED) & pl.col(ITEM_ID).is_in(items[ITEM_ID].implode())
        seen = rows.table.filter(is_event).join(log, on=[USER_ID, ITEM_ID, EVENT_TIME], how="anti")
        # Of equal times, those of the run come first.
        after = pl.col("row_number") + log["row_number"].max() + 1
        log = pl.concat([log, seen.with_columns(after).select(*names)])
    return Knowledge(
        log,
        train_user_ids,
        pl.read_parquet(tables_dir / USERS),
        items,
        train_end,
        not online_history,
        max_positives_per_user,
    )


def _check_outcomes(rows: InteractionRows, spec: DatasetSpec) -> None:
    absent = [name for name in dict.fromkeys((spec.positive, *spec.task_labels)) if name in rows.absent]
    if absent:
        raise DataError(
            f"--online-history: the file has no label {', '.join(absent)}: its rows would count as "
            "impressions of which nothing came, and the rates of items would fall with every row. Add what "
            f"the labels of dataset {spec.name} are read from, or leave --online-history out: then the train "
            "split alone is known, and no labels are needed"
        )


def serialized_examples(
    table: pl.DataFrame, knowledge: Knowledge, spec: DatasetSpec
) -> Iterator[list[bytes]]:
    """The rows as serialized tf.Examples of query and candidate, in their order, a batch at a time.

    Args:
      table: see `schema.tables.InteractionRows`.
      knowledge: what the rows know.
      spec: the declaration.
    """
    from tfx_bsl.coders import example_coder

    encoder = example_coder.RecordBatchToExamplesEncoder()
    inputs = {**interaction_inputs(spec, "query"), **interaction_inputs(spec, "candidate")}
    moment = pl.col(EVENT_TIME)
    if knowledge.is_frozen:
        moment = pl.min_horizontal(moment, pl.lit(knowledge.train_end_unix_s, dtype=pl.Int64))
    settings = ExampleSettings(
        knowledge.train_end_unix_s,
        knowledge.max_positives_per_user,
        history_until_unix_s=knowledge.train_end_unix_s if knowledge.is_frozen else None,
    )
    log = knowledge.log
    for part in table.iter_slices(_ROWS_PER_SLICE):
        counts = item_counts(log, part.select(ITEM_ID, moment.alias(EVENT_TIME)), knowledge.items, spec)
        # The split of rows that nothing is learnt from.
        events = part.with_columns(counts, pl.lit("test").alias("split"))
        of_users = log.filter(pl.col(USER_ID).is_in(part[USER_ID].unique().implode()))
        columns = interaction_columns(
            events, knowledge.users, knowledge.items, spec, settings, log=of_users
        ).sort("row_number")
        for batch in columns.iter_slices(_ROWS_PER_CALL):
            yield encoder.encode(example_batch(batch, inputs))


def load_ranker(folder: Path, spec: DatasetSpec) -> Ranker:
    """Loads the signature `serving_examples` of an exported ranker.

    Raises:
      ServingError: the folder holds no SavedModel, or one without the signature or one of its outputs.
    """
    import tensorflow as tf

    if not (folder / "saved_model.pb").is_file():
        raise ServingError(
            f"{folder} holds no SavedModel; give the folder of one version, for instance "
            f"<output-dir>/serving_models/{RANKING}/<version>"
        )
    loaded = tf.saved_model.load(str(folder))
    signature = loaded.signatures.get(_SIGNATURE)
    expected = [*(task.name for task in spec.tasks), SCORE]
    outputs = {} if signature is None else signature.structured_outputs
    missing = [name for name in expected if name not in outputs]
    if missing:
        raise ServingError(
            f"{folder} is no ranker of dataset {spec.name}: signature {_SIGNATURE} should have the outputs "
            f"{', '.join(expected)}, it has: {', '.join(sorted(outputs)) or 'none'}"
        )

    def rank(examples: Sequence[bytes]) -> dict[str, np.ndarray]:
        # `loaded` is named here so that it lives as long as its signature.
        try:
            answer = loaded.signatures[_SIGNATURE](examples=tf.constant(examples, tf.string))
        except tf.errors.InvalidArgumentError as error:
            raise ServingError(f"{folder} refused the rows: {error.message}") from error
        return {name: answer[name].numpy() for name in expected}

    return rank
