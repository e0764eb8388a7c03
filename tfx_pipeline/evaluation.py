"""Judges exported models on the test split: reads examples and tables, asks the models, fits the baselines.

The work of the component ModelComparison and of `funnel evaluate`; what is measured is told in
`trainer.comparison`.

Letters: U = users with a positive in the test split, n = rows of the test split.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import scann  # noqa: F401  registers the operations of the index
import tensorflow as tf

from schema.contract import DatasetSpec, FeatureKind
from schema.errors import DataError, ServingError
from schema.point_in_time import VALID_FROM, join_as_of
from schema.tables import INTERACTIONS, ITEMS, USERS, read_summary
from tfx_pipeline.batch_score import load_ranker
from tfx_pipeline.config import CUTOFFS, RunConfig
from trainer import features
from trainer.collapse import CANDIDATE_RANK, MIN_VECTORS, effective_rank
from trainer.comparison import (
    CANDIDATE,
    LAST_BLESSED,
    NO_BLESSED_MODEL,
    PREDICTIONS_FILE,
    BootstrapSettings,
    Comparison,
    write_comparison,
)
from trainer.input_pipeline import expand
from trainer.metrics import CatalogueFacts, IntArray
from trainer.progress import batches
from trainer.ranking_baselines import baseline_predictions
from trainer.ranking_comparison import JudgedRows, compare_ranking, predictions_table, why_not_numbers
from trainer.ranking_features import RankingTables
from trainer.retrieval_baselines import EvalUsers, TrainPositives, baseline_lists
from trainer.retrieval_comparison import JudgedLists, compare_retrieval, lists_table, positives_table
from trainer.served_index import LOOKUP
from trainer.slices import (
    ACTIVITY,
    ITEM_POPULARITY,
    NEW_USER,
    activity_deciles,
    as_text,
    dimensions,
    popularity_segments,
)

LISTS_FILE = "lists.parquet"
_SIGNATURE = "serving_examples"
_ITEM_IDS = "item_ids"
_USERS_PER_CALL = 512
_ROWS_PER_CALL = 4_096
# Values of an attribute that the diversity of lists is measured by, the most frequent.
_MAX_ATTRIBUTES = 256
# Users of the eval split that the settings of baselines are chosen on.
_MAX_TUNING_USERS = 2_000
_IS_COLD = "is_cold"

_LOGGER = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A comparison and the tables that every number of it can be worked out from again, by file name."""

    comparison: Comparison
    tables: Mapping[str, pl.DataFrame]

    def write(self, folder: Path) -> None:
        """Writes comparison.json and the Parquet files."""
        write_comparison(self.comparison, folder)
        for name, table in self.tables.items():
            table.write_parquet(folder / name)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
      cutoffs: of the retrieval metrics; the largest is the length of the lists.
      slices: one or two dimensions each, besides those that always come.
      bootstrap: of the intervals.
    """

    cutoffs: tuple[int, ...]
    slices: tuple[tuple[str, ...], ...] = ()
    bootstrap: BootstrapSettings = dataclasses.field(default_factory=BootstrapSettings)


def evaluation_settings(config: RunConfig) -> EvaluationSettings:
    """What the comparison of a run measures."""
    validation = config.validation
    bootstrap = BootstrapSettings(validation.confidence, validation.num_resamples)
    return EvaluationSettings(CUTOFFS, config.slices, bootstrap)


def read_tables(tables_dir: Path, spec: DatasetSpec) -> RankingTables:
    """The contract tables of a run."""
    interactions, items, users = (pl.read_parquet(tables_dir / name) for name in (INTERACTIONS, ITEMS, USERS))
    return RankingTables(spec, interactions, items, users, read_summary(tables_dir).train_end_unix_s)


def judge_retrieval(
    tables: RankingTables,
    user_states: Sequence[str],
    candidate: Path,
    last_blessed: Path | None,
    settings: EvaluationSettings,
    with_baselines: bool = True,
) -> Judgement:
    """Compares a retrieval model with the last blessed one and the baselines.

    Args:
      tables: of the run.
      user_states: file patterns of the user-state examples.
      candidate: exported SavedModel.
      last_blessed: another one; None when there is none.
      settings: what is measured.
      with_baselines: whether to compare with the baselines, too; fitting them takes most of the time.

    Raises:
      DataError: no user has a positive in the test split.
      ServingError: the candidate does not answer.
    """
    spec, k = tables.spec, max(settings.cutoffs)
    states = read_judged_users(user_states, spec)
    users = states.filter(pl.col(features.TEST_ITEMS).list.len() > 0)
    if not len(users):
        raise DataError(
            "nothing to judge: no user has a positive in the test split that training did not see"
        )
    catalogue = tables.items[features.ITEM_ID].unique(maintain_order=True)
    code_of = {item_id: code for code, item_id in enumerate(catalogue)}
    serialized = users["serialized"].to_list()
    lists = {CANDIDATE: _codes(retrieved(candidate, serialized, k), code_of)}
    absent: dict[str, str] = {}
    found = _of_last_blessed(last_blessed, lambda folder: retrieved(folder, serialized, k), absent)
    if found is not None:
        lists[LAST_BLESSED] = _codes(found, code_of)

    notes: dict[str, str] = {}
    if with_baselines:
        baselines, notes = _baseline_lists(tables, states, users, catalogue, k)
        lists |= baselines

    by = dimensions(spec, settings.slices)
    positives = _positives(users, tables, code_of, by)
    judged = JudgedLists(
        users[features.USER_ID].to_list(),
        positives,
        lists,
        _catalogue_facts(tables, catalogue),
        tables.train_end_unix_s,
    )
    comparison = compare_retrieval(judged, settings.cutoffs, by, notes, absent, settings.bootstrap)
    item_ids = list(code_of)
    vectors = item_vectors(candidate, item_ids)
    rank = effective_rank(vectors) if len(vectors) >= MIN_VECTORS else None
    comparison = dataclasses.replace(comparison, facts={CANDIDATE_RANK: rank})
    return Judgement(
        comparison,
        {PREDICTIONS_FILE: positives_table(judged, item_ids), LISTS_FILE: lists_table(judged, item_ids)},
    )


def judge_ranking(
    tables: RankingTables,
    examples: Sequence[str],
    candidate: Path,
    last_blessed: Path | None,
    settings: EvaluationSettings,
    with_baselines: bool = True,
) -> Judgement:
    """Compares a ranking model with the last blessed one and the baselines.

    Args:
      tables: of the run.
      examples: file patterns of the interaction examples of the test split.
      candidate, last_blessed, settings, with_baselines: as `judge_retrieval`.

    Raises:
      DataError: the examples are not those of the tables.
      ServingError: the candidate does not answer.
    """
    spec = tables.spec
    rows, places = read_test_rows(examples, tables)
    serialized = rows["serialized"].to_list()
    predictions = {CANDIDATE: predicted(candidate, serialized, spec)}
    absent: dict[str, str] = {}
    found = _of_last_blessed(last_blessed, lambda folder: _numbers(folder, serialized, spec), absent)
    if found is not None:
        predictions[LAST_BLESSED] = found
    notes: dict[str, str] = {}
    if with_baselines:
        baselines, notes = baseline_predictions(tables, places)
        predictions |= baselines
    by = dimensions(spec, settings.slices)
    named = _row_dimensions(tables, tables.interactions[places], by)
    labels = {task.name: tables.labels(task.label)[places] for task in spec.tasks}
    chosen = tables.labels(spec.positive)[places]
    clicks = np.where(np.isnan(chosen), np.nan, chosen > 0)
    judged = JudgedRows(named, labels, clicks, predictions)
    comparison = compare_ranking(judged, spec.tasks, by, notes, absent, settings.bootstrap)
    return Judgement(comparison, {PREDICTIONS_FILE: predictions_table(judged)})


def _baseline_lists(
    tables: RankingTables, states: pl.DataFrame, users: pl.DataFrame, catalogue: pl.Series, k: int
) -> tuple[dict[str, IntArray], dict[str, str]]:
    """Lists of the baselines for the judged users, and how each was made."""
    uploads = None
    if features.UPLOAD_TIME in tables.items.columns:
        items = tables.items.unique(features.ITEM_ID, keep="first", maintain_order=True)
        uploads = items[features.UPLOAD_TIME].fill_null(-1).to_numpy()
    tuned_on = states.filter(pl.col(features.EVAL_ITEMS).list.len() > 0).head(_MAX_TUNING_USERS)
    chosen_on = EvalUsers(
        _coded_lists(tuned_on[features.SEEN_ITEMS], catalogue),
        _coded_lists(tuned_on[features.EVAL_ITEMS], catalogue),
    )
    seen = _coded_lists(users[features.SEEN_ITEMS], catalogue)
    return baseline_lists(_train_positives(tables, catalogue), seen, k, uploads, chosen_on)


def _of_last_blessed(folder: Path | None, ask: Callable[[Path], _T], absent: dict[str, str]) -> _T | None:
    """The answers of the last blessed model; None, with the reason in `absent`, when it has none."""
    if folder is None:
        absent[LAST_BLESSED] = NO_BLESSED_MODEL
        return None
    try:
        return ask(folder)
    except ServingError as error:
        _LOGGER.warning("the last blessed model cannot be compared with: %s", error)
        absent[LAST_BLESSED] = f"it does not answer this run's examples: {error}"
        return None


def read_judged_users(user_states: Sequence[str], spec: DatasetSpec) -> pl.DataFrame:
    """The users with a positive in the eval or the test split.

    Returns:
      user_id, user_type, surface (when mapped), `serialized` (the example), and the lists seen_item_ids,
      eval_item_ids, test_item_ids, cold_test_item_ids; in the order of the files.
    """
    lists = (features.SEEN_ITEMS, features.EVAL_ITEMS, features.TEST_ITEMS, features.COLD_TEST_ITEMS)
    single = (features.USER_ID, features.USER_TYPE, *((features.SURFACE,) if spec.surface_is_mapped else ()))
    parser = {name: tf.io.RaggedFeature(tf.string) for name in (*single, *lists)}
    parts = []
    files = tf.data.TFRecordDataset(expand(user_states), compression_type="GZIP")
    for batch in files.batch(8_192):
        values = tf.io.parse_example(batch, parser)
        num_held_out = values[features.TEST_ITEMS].row_lengths() + values[features.EVAL_ITEMS].row_lengths()
        kept = {name: tf.ragged.boolean_mask(column, num_held_out > 0) for name, column in values.items()}
        columns = [pl.Series(name, _decoded(_first(kept[name], "")), pl.String) for name in single]
        examples = tf.boolean_mask(batch, num_held_out > 0)
        columns.append(pl.Series("serialized", examples.numpy().tolist(), pl.Binary))
        columns += [_id_lists(name, kept[name]) for name in lists]
        parts.append(pl.DataFrame(columns))
    return pl.concat(parts)


def read_test_rows(examples: Sequence[str], tables: RankingTables) -> tuple[pl.DataFrame, IntArray]:
    """The examples of the test split, and the place of each in the table of interactions.

    An example does not carry its row number: examples and rows are brought into one order, by all that both
    hold, and compared.

    Returns:
      `serialized` [n], and int64 [n], the row of `tables.interactions` that each example was made of.

    Raises:
      DataError: the examples are not those of the tables.
    """
    spec = tables.spec
    texts = [features.USER_ID, features.ITEM_ID]
    texts += [features.SURFACE] if spec.surface_is_mapped else []
    labels = list(spec.task_labels)
    parser = {name: tf.io.RaggedFeature(tf.string) for name in texts}
    parser[features.EVENT_TIME] = tf.io.FixedLenFeature([], tf.int64)
    parser |= {name: tf.io.RaggedFeature(tf.float32) for name in labels}
    parts = []
    for batch in tf.data.TFRecordDataset(expand(examples), compression_type="GZIP").batch(8_192):
        values = tf.io.parse_example(batch, parser)
        columns: dict[str, Any] = {name: _decoded(_first(values[name], "")) for name in texts}
        columns |= {name: _first(values[name], float("nan")) for name in labels}
        columns[features.EVENT_TIME] = values[features.EVENT_TIME].numpy()
        parts.append(pl.DataFrame({**columns, "serialized": batch.numpy().tolist()}))
    keys = [features.EVENT_TIME, *texts, *labels]
    read = pl.concat(parts).sort(keys, maintain_order=True)
    known = tables.interactions.with_row_index("place").filter(pl.col("split") == "test")
    known = known.with_columns(
        *(pl.col(name).fill_null("") for name in texts), *(pl.col(name).fill_null(np.nan) for name in labels)
    ).sort(keys, maintain_order=True)
    if not read.select(keys).equals(known.select(pl.col(key).cast(read.schema[key]) for key in keys)):
        raise DataError(
            f"the {len(read):,} test examples are not those of the {len(known):,} test rows of the tables; "
            "examples and tables must come from one run"
        )
    return read.select("serialized"), known["place"].cast(pl.Int64).to_numpy()


def retrieved(folder: Path, examples: Sequence[bytes], k: int) -> np.ndarray:
    """What a retrieval model recommends to users, by `serving_examples`.

    Args:
      folder: exported SavedModel.
      examples: U serialized user states.
      k: length of the lists, at most that of the export.

    Returns:
      str [U, k], "" where a list is short.

    Raises:
      ServingError: there is no such model, or it refuses the examples.
    """
    if not (folder / "saved_model.pb").is_file():
        raise ServingError(f"{folder} holds no SavedModel")
    loaded = tf.saved_model.load(str(folder))
    signature, parts = loaded.signatures.get(_SIGNATURE), []
    # A ranker has a signature of this name, too.
    if signature is None or _ITEM_IDS not in signature.structured_outputs:
        raise ServingError(
            f"{folder} is no retrieval model: it has no signature {_SIGNATURE} with the output {_ITEM_IDS}"
        )
    for batch in batches(len(examples), _USERS_PER_CALL, "users given lists"):
        try:
            answer = signature(examples=tf.constant(examples[batch], tf.string))
        except tf.errors.InvalidArgumentError as error:
            raise ServingError(f"{folder} refuses the examples: {error.message}") from error
        parts.append(answer[_ITEM_IDS].numpy()[:, :k])
    return np.concatenate(parts).astype(str)


def item_vectors(folder: Path, item_ids: Sequence[str]) -> np.ndarray:
    """What the index of a retrieval model holds of items, by `lookup_items`.

    Args:
      folder: exported SavedModel of a retrieval model.
      item_ids: items to look up.

    Returns:
      float32 [I, D], of the items that it knows, in their order; item bias and factors are dimensions.
    """
    lookup, parts = tf.saved_model.load(str(folder)).signatures[LOOKUP], []
    for batch in batches(len(item_ids), _ROWS_PER_CALL, "items looked up"):
        found = lookup(item_ids=tf.constant(item_ids[batch], tf.string))
        parts.append(found["vectors"].numpy()[found[_ITEM_IDS].numpy() != b""])
    return np.concatenate(parts)


def predicted(folder: Path, examples: Sequence[bytes], spec: DatasetSpec) -> dict[str, np.ndarray]:
    """What a ranking model predicts for rows, by `serving_examples`: task -> float64 [n].

    Raises:
      ServingError: as `retrieved`.
    """
    ranker = load_ranker(folder, spec)
    parts = [ranker(examples[batch]) for batch in batches(len(examples), _ROWS_PER_CALL, "rows scored")]
    return {
        task.name: np.concatenate([part[task.name] for part in parts]).astype(np.float64)
        for task in spec.tasks
    }


def _numbers(folder: Path, examples: Sequence[bytes], spec: DatasetSpec) -> dict[str, np.ndarray]:
    """What a model predicts, if these are numbers: a rival of which nothing is known proves nothing."""
    found = predicted(folder, examples, spec)
    if why := why_not_numbers(found, list(found)):
        raise ServingError(f"{folder}: {why}")
    return found


def _codes(lists: np.ndarray, code_of: dict[str, int]) -> IntArray:
    """Lists of ids as codes, -1 for padding; an id outside the catalogue gets a code of its own."""
    ids, places = np.unique(lists, return_inverse=True)
    codes = np.array([code_of.setdefault(i, len(code_of)) if i else -1 for i in ids.tolist()], np.int64)
    return codes[places].reshape(lists.shape)


def _coded_lists(lists: pl.Series, catalogue: pl.Series) -> list[IntArray]:
    """Lists of ids as codes of the catalogue; ids outside it are left out."""
    codes = catalogue.to_frame("item").with_row_index("code")
    flat = pl.DataFrame({"row": pl.int_range(len(lists), eager=True), "item": lists}).explode("item")
    flat = flat.join(codes, on="item", how="inner", maintain_order="left")
    counts = np.bincount(flat["row"].to_numpy(), minlength=len(lists))
    return np.split(flat["code"].cast(pl.Int64).to_numpy(), np.cumsum(counts)[:-1])


def _train_positives(tables: RankingTables, catalogue: pl.Series) -> TrainPositives:
    chosen = tables.interactions.filter(
        (pl.col("split") == "train") & (pl.col(tables.spec.positive).fill_null(0) > 0)
    )
    codes = catalogue.to_frame(features.ITEM_ID).with_row_index("item")
    chosen = chosen.join(codes, on=features.ITEM_ID, how="inner", maintain_order="left")
    users = chosen[features.USER_ID].rank("dense").cast(pl.Int64).to_numpy() - 1
    return TrainPositives(
        users,
        chosen["item"].cast(pl.Int64).to_numpy(),
        chosen[features.EVENT_TIME].to_numpy(),
        int(users.max(initial=-1)) + 1,
        len(catalogue),
    )


def _catalogue_facts(tables: RankingTables, catalogue: pl.Series) -> CatalogueFacts:
    """Who chose each item in training, when it came, and the values of its multi-categorical features."""
    spec = tables.spec
    items = tables.items.unique(features.ITEM_ID, keep="first", maintain_order=True)
    train = _train_positives(tables, catalogue).matrix()
    uploads = None
    if features.UPLOAD_TIME in items.columns:
        uploads = items[features.UPLOAD_TIME].cast(pl.Float64).fill_null(np.nan).to_numpy()
    named = [f.name for f in spec.items.features if f.kind is FeatureKind.MULTI_CATEGORICAL]
    attributes = None
    if named:
        # The first of them says what items are about; more would weigh the longest.
        flat = items.select(pl.int_range(pl.len()).alias("row"), named[0]).explode(named[0]).drop_nulls()
        common = flat[named[0]].value_counts(sort=True).head(_MAX_ATTRIBUTES)[named[0]]
        flat = flat.filter(pl.col(named[0]).is_in(common.implode()))
        values = flat[named[0]].rank("dense").cast(pl.Int64).to_numpy() - 1
        attributes = np.zeros((len(items), int(values.max(initial=-1)) + 1), np.bool_)
        attributes[flat["row"].to_numpy(), values] = True
    choosers = np.asarray(train.sum(axis=0)).ravel().astype(np.int64)
    return CatalogueFacts(choosers, train.shape[0], uploads, attributes)


def _positives(
    users: pl.DataFrame, tables: RankingTables, code_of: dict[str, int], by: Sequence[tuple[str, ...]]
) -> pl.DataFrame:
    """Pairs of a user and a held-out positive, as `JudgedLists` wants them."""
    pairs = users.with_row_index("user").explode(features.TEST_ITEMS)
    pairs = pairs.with_columns(
        pl.col(features.TEST_ITEMS).is_in(pl.col(features.COLD_TEST_ITEMS)).alias(_IS_COLD),
        pl.col(features.TEST_ITEMS).alias(features.ITEM_ID),
        pl.lit(tables.train_end_unix_s, dtype=pl.Int64).alias(features.EVENT_TIME),
    )
    kept = [features.USER_ID, features.ITEM_ID, features.EVENT_TIME, features.USER_TYPE]
    kept += [features.SURFACE] if features.SURFACE in pairs.columns else []
    named = _row_dimensions(tables, pairs.select("user", _IS_COLD, *kept), by)
    items = [code_of.setdefault(item_id, len(code_of)) for item_id in named[features.ITEM_ID]]
    return named.select(
        pl.col("user").cast(pl.Int64),
        pl.Series("item", items, dtype=pl.Int64),
        _IS_COLD,
        *dict.fromkeys(name for names in by for name in names),
    )


def _row_dimensions(tables: RankingTables, rows: pl.DataFrame, by: Sequence[tuple[str, ...]]) -> pl.DataFrame:
    """The rows with a text column for each dimension.

    Args:
      tables: of the run.
      rows: user_id, item_id, event_time_unix_s, and what else of the dimensions the row itself has.
      by: the dimensions.

    Returns:
      user_id, item_id, event_time_unix_s, the dimensions, and further columns of `rows`, in its order.
    """
    names = list(dict.fromkeys(name for group in by for name in group))
    train = tables.interactions.filter(pl.col("split") == "train")
    is_positive = pl.col(tables.spec.positive).fill_null(0) > 0
    by_user = train.group_by(features.USER_ID).agg(pl.len().alias("events"), is_positive.any().alias("chose"))
    activity = pl.Series(ACTIVITY, activity_deciles(by_user["events"].to_numpy()), dtype=pl.String)
    user_type = pl.when("chose").then(pl.lit(features.WARM)).otherwise(pl.lit(features.COLD))
    by_user = by_user.select(features.USER_ID, activity, user_type.alias(features.USER_TYPE))

    by_item = train.group_by(features.ITEM_ID).agg(is_positive.sum().alias("positives"))
    items = tables.items.select(pl.col(features.ITEM_ID).unique(maintain_order=True))
    items = items.join(by_item, on=features.ITEM_ID, how="left", maintain_order="left")
    segments = popularity_segments(
        items["positives"].fill_null(0).to_numpy(), items["positives"].is_not_null().to_numpy()
    )
    items = items.select(features.ITEM_ID, pl.Series(ITEM_POPULARITY, segments, dtype=pl.String))

    own = [name for name in by_user.columns if name not in rows.columns or name == features.USER_ID]
    named = rows.join(by_user.select(own), on=features.USER_ID, how="left", maintain_order="left")
    named = named.join(items, on=features.ITEM_ID, how="left", maintain_order="left")
    for table, key in ((tables.users, features.USER_ID), (tables.items, features.ITEM_ID)):
        wanted = [name for name in table.columns if name in names and name not in named.columns]
        if wanted:
            valid_from = [name for name in table.columns if name == VALID_FROM]
            named = join_as_of(named, table.select(key, *wanted, *valid_from), key)
    named = named.with_columns(
        pl.col(ACTIVITY).fill_null(NEW_USER), pl.col(features.USER_TYPE).fill_null(features.COLD)
    )
    named = named.with_columns([as_text(named[name]) for name in names])
    further = [name for name in rows.columns if name in ("user", _IS_COLD)]
    return named.select(features.USER_ID, features.ITEM_ID, features.EVENT_TIME, *further, *names)


def _decoded(ids: np.ndarray) -> list[str]:
    return [i.decode() for i in ids.tolist()]


def _first(ragged: tf.RaggedTensor, missing: str | float) -> np.ndarray:
    """The one value of each example; `missing` where its list is empty."""
    return ragged.to_tensor(missing, shape=[None, 1])[:, 0].numpy()


def _id_lists(name: str, ragged: tf.RaggedTensor) -> pl.Series:
    ids = pa.array(ragged.values.numpy(), pa.large_binary()).cast(pa.large_string())
    return pl.Series(name, pa.LargeListArray.from_arrays(ragged.row_splits.numpy(), ids))
