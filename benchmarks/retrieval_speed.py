"""Speed of retrieval in one run: reading, training and exact evaluation, the latter two beside TFRS.

The data are made up on the spot in the form of MovieLens-1M: its features, 4,000 items, 6,000 users,
histories of up to 50 items. All rates are per CPU-second of this process, all threads counted; each is the
best of several repetitions. Neighbours on the same cores slow down all rows, and the ratios least.

Example:
  python benchmarks/retrieval_speed.py --json speed.json
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import numpy as np
import polars as pl
import pyarrow as pa
import tensorflow as tf
import tensorflow_recommenders as tfrs
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam
from tensorflow_transform.tf_metadata import dataset_metadata, metadata_io
from tfx_bsl.coders import example_coder
from tfx_bsl.tfxio import tf_example_record

from schema.contract import DatasetSpec, load_dataset_spec
from schema.errors import DataError
from schema.point_in_time import count_names
from tfx_pipeline.examples import example_batch
from trainer import features
from trainer.catalogue import Catalogue
from trainer.config import RetrievalConfig
from trainer.index import NO_ROW
from trainer.input_pipeline import Window, shuffled_batches, windows
from trainer.preprocessing import preprocessing_fn, vocabulary_sizes
from trainer.retrieval import RetrievalModel, count_positives, is_positive, item_log_q, unread_features
from trainer.retrieval_validation import ValidationUsers, validate
from trainer.tfx_schema import interactions_schema

NUM_USERS, NUM_ITEMS, NUM_ROWS = 6_000, 4_000, 100_000
# A window as large as one that MovieLens-1M fills: the rows that were read, several times over.
WINDOW_COPIES = 8
BATCH_SIZES = (1_024, 8_192)
# Examples trained per measurement.
TRAINED_EXAMPLES = {1_024: 40_960, 8_192: 16_384}
EVAL_CANDIDATES, EVAL_DIM, EVAL_QUERIES, EVAL_SEEN = 20_000, 64, 2_048, 50
# The features of the smallest examples that retrieval could learn from.
SINGLE_VALUES = (features.USER_ID, features.ITEM_ID, features.EVENT_TIME, features.RETRIEVAL_WEIGHT)
_TRAIN_END_UNIX_S = 1_700_000_000
_ITEM_ID = "item_id_id"
_HISTORY = "history_item_ids_ids"


@dataclasses.dataclass(frozen=True)
class Rate:
    """How many examples, or queries, one CPU-second is enough for.

    Attributes:
      target: what was aimed at, None where nothing was.
      times_slower: how many times slower than Funnel a reference is.
    """

    name: str
    per_cpu_s: float
    target: float | None = None
    times_slower: float | None = None


@click.command(help=__doc__)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(json_path: Path | None) -> None:
    """Measures everything and prints a table, row by row."""
    spec = load_dataset_spec("movielens-1m")
    with tempfile.TemporaryDirectory(prefix="funnel-benchmark-") as folder:
        columns, dtypes = _made_up_examples(spec)
        pattern = _write_examples(Path(folder) / "examples.gz", columns, dtypes)
        four = {name: columns[name] for name in SINGLE_VALUES}
        pattern_of_four = _write_examples(Path(folder) / "four.gz", four, dtypes)
        output = _transform_graph(Path(folder), pattern, spec)
        unread = unread_features(spec, timed_config(max(BATCH_SIZES)))
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        click.echo(f"{machine}, TensorFlow {tf.__version__}")
        click.echo(f"{'':<58}{'per CPU-s':>12}{'target':>12}{'Funnel is':>14}")
        rates = _printed(measure_reading(pattern, pattern_of_four, output, unread))
        window = next(iter(windows([pattern], output, unread=unread)))
        sizes = vocabulary_sizes(output, spec)
    rates += _printed(measure_epochs(window))
    rates += _printed(measure_training(window, sizes, spec))
    rates += _printed(measure_evaluation())
    if json_path is not None:
        json_path.write_text(json.dumps([dataclasses.asdict(rate) for rate in rates], indent=1) + "\n")


def _printed(rates: Iterable[Rate]) -> list[Rate]:
    """The rates, each printed as soon as it is measured."""
    done = []
    for rate in rates:
        target = f"{rate.target:,.0f}" if rate.target else ""
        ratio = f"{rate.times_slower:.1f}x faster" if rate.times_slower else ""
        click.echo(f"{rate.name:<58}{rate.per_cpu_s:>12,.0f}{target:>12}{ratio:>14}")
        done.append(rate)
    return done


def measure_reading(
    pattern: str, pattern_of_four: str, output: tft.TFTransformOutput, unread: Collection[str]
) -> Iterator[Rate]:
    """Gzipped TFRecords to tensors: no parsing, parsing, and the Transform graph too, as retrieval does.

    And parsing of examples that hold `SINGLE_VALUES` alone: what is left when there are no lists and no other
    features to pass over.
    """
    records = tf.data.TFRecordDataset(tf.io.gfile.glob(pattern), compression_type="GZIP")
    yield Rate("read: decompress", NUM_ROWS / _cpu_s(lambda: _exhaust(records.batch(8_192))))
    raw_spec = {name: value for name, value in output.raw_feature_spec().items() if name not in unread}

    def parsed() -> tf.data.Dataset:
        return records.batch(8_192).map(lambda batch: tf.io.parse_example(batch, raw_spec))

    parse_s = _cpu_s(lambda: _exhaust(parsed()))
    yield Rate("read: decompress and parse", NUM_ROWS / parse_s, target=400_000)
    small = tf.data.TFRecordDataset(pattern_of_four, compression_type="GZIP").batch(8_192)
    of_four = {name: tf.io.FixedLenFeature([], raw_spec[name].dtype) for name in SINGLE_VALUES}
    small_s = _cpu_s(lambda: _exhaust(small.map(lambda batch: tf.io.parse_example(batch, of_four))))
    yield Rate("      the same, examples of four single values", NUM_ROWS / small_s, target=400_000)
    transform_s = _cpu_s(lambda: _exhaust(windows([pattern], output, unread=unread)))
    yield Rate("read: decompress, parse, Transform", NUM_ROWS / transform_s)


def measure_epochs(window: Window) -> Iterator[Rate]:
    """Shuffled epochs over a window in memory."""
    large = {name: tf.repeat(column, WINDOW_COPIES, axis=0) for name, column in window.items()}
    cached = tf.data.Dataset.from_tensors(large).cache()
    for batch_size in BATCH_SIZES:
        epoch_s = _cpu_s(
            functools.partial(_exhaust, shuffled_batches(cached, batch_size, seed=0)), repetitions=5
        )
        target = 5_000_000 if batch_size == max(BATCH_SIZES) else None
        name = f"read: shuffled epoch from memory, batch {batch_size:,}"
        yield Rate(name, NUM_ROWS * WINDOW_COPIES / epoch_s, target)


def measure_training(window: Window, sizes: Mapping[str, int], spec: DatasetSpec) -> Iterator[Rate]:
    """Training steps of the model, and of the same towers under the loss of `tfrs.tasks.Retrieval`."""
    ids = np.arange(sizes[features.ITEM_SPACE])
    catalogue = Catalogue(ids.astype(str).astype(object), {_ITEM_ID: ids}, None)
    log_q = item_log_q(count_positives([window], len(ids)), catalogue)
    dataset = tf.data.Dataset.from_tensors(window)
    for batch_size in BATCH_SIZES:
        batches = shuffled_batches(dataset, batch_size, seed=0, keep=is_positive).take(8).cache().repeat()
        config = timed_config(batch_size)
        check_histories(window, config)

        def model(config: RetrievalConfig = config) -> RetrievalModel:
            return RetrievalModel(config, features.feature_space(spec), sizes, log_q)

        ours = _training_rate(model(), batches, batch_size)
        yield Rate(
            f"train: Funnel, batch {batch_size:,}", ours, 25_000 if batch_size == max(BATCH_SIZES) else None
        )
        plain = _training_rate(_TfrsModel(model(), tfrs.tasks.Retrieval(), None), batches, batch_size)
        yield Rate(f"train: tfrs.tasks.Retrieval, batch {batch_size:,}", plain, times_slower=ours / plain)
        task = tfrs.tasks.Retrieval(remove_accidental_hits=True)
        same = _training_rate(_TfrsModel(model(), task, log_q), batches, batch_size)
        yield Rate("       the same with logQ and accidental hits, as ours", same, times_slower=ours / same)


def timed_config(batch_size: int) -> RetrievalConfig:
    """Settings of the model that is timed; it reads the histories up to the event, the only ones made up."""
    return RetrievalConfig(batch_size=batch_size, embedding_dim=64, roll_back_to_session=False)


def check_histories(window: Window, config: RetrievalConfig) -> None:
    """Raises DataError when the histories that the model trains on are all empty: too little work to time."""
    is_rolled_back = config.roll_back_to_session and features.PRIOR_SESSIONS_IDS in window
    name = features.PRIOR_SESSIONS_IDS if is_rolled_back else _HISTORY
    if not np.any(np.asarray(window[name]) != features.PADDING_ID):
        raise DataError(
            f"the model would be timed on empty histories: {name} holds no item; write it in "
            "_write_examples, or time a model that does not read it"
        )


class _TfrsModel(tfrs.models.Model):
    """The towers of a Funnel model under TFRS's own task; with log_q corrected as Funnel's loss is."""

    def __init__(self, towers: RetrievalModel, task: tfrs.tasks.Retrieval, log_q: np.ndarray | None) -> None:
        super().__init__()
        self.query_tower, self.candidate_tower, self.task = towers.query_tower, towers.candidate_tower, task
        self.q = None if log_q is None else tf.constant(np.exp(log_q), tf.float32)

    def compute_loss(self, inputs: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """The loss of one batch; metrics off, as they cost many times the step."""
        items, corrections = inputs[_ITEM_ID], {}
        if self.q is not None:
            corrections = {"candidate_sampling_probability": tf.gather(self.q, items), "candidate_ids": items}
        return self.task(
            *self._encode(inputs, training),
            compute_metrics=False,
            compute_batch_metrics=False,
            **corrections,
        )

    # AutoGraph is for the task, which does not work without; the towers are plain graph code.
    @tf.autograph.experimental.do_not_convert
    def _encode(self, inputs: Mapping[str, tf.Tensor], training: bool) -> tuple[tf.Tensor, tf.Tensor]:
        return self.query_tower(inputs, training=training), self.candidate_tower(inputs, training=training)


def _training_rate(model: tfrs.models.Model, batches: tf.data.Dataset, batch_size: int) -> float:
    steps = TRAINED_EXAMPLES[batch_size] // batch_size
    model.compile(optimizer=tf.keras.optimizers.legacy.Adagrad(0.005, initial_accumulator_value=1e-6))
    train = functools.partial(model.fit, batches, steps_per_epoch=steps, verbose=0)
    return steps * batch_size / _cpu_s(train, repetitions=2)


def measure_evaluation() -> Iterator[Rate]:
    """Exact evaluation at 100 over the whole catalogue: ours, and FactorizedTopK over the same vectors.

    Ours leaves out what each user has seen and judges recall and NDCG; FactorizedTopK does neither, and takes
    the candidates in batches of 128, as TFRS's tutorials do, or all at once.
    """
    rng = np.random.default_rng(0)
    candidates = rng.normal(size=(EVAL_CANDIDATES, EVAL_DIM)).astype(np.float32)
    queries = rng.normal(size=(EVAL_QUERIES, EVAL_DIM)).astype(np.float32)
    positives = rng.integers(EVAL_CANDIDATES, size=(EVAL_QUERIES, 1))
    seen = rng.integers(EVAL_CANDIDATES, size=(EVAL_QUERIES, EVAL_SEEN)).astype(np.int32)
    users = ValidationUsers({}, positives.tolist(), np.where(seen == positives, NO_ROW, seen))
    ours = EVAL_QUERIES / _cpu_s(lambda: validate(queries, candidates, users))
    yield Rate("evaluate: Funnel, exact", ours)
    pairs = tf.data.Dataset.from_tensor_slices((queries, candidates[positives[:, 0]])).batch(1_024).cache()
    for name, size in (("candidates by 128", 128), ("all candidates at once", EVAL_CANDIDATES)):
        evaluate = _factorized_top_k(
            tf.data.Dataset.from_tensor_slices(candidates).batch(size).cache(), pairs
        )
        theirs = EVAL_QUERIES / _cpu_s(evaluate, repetitions=2)
        yield Rate(f"evaluate: FactorizedTopK, {name}", theirs, times_slower=ours / theirs)


def _factorized_top_k(candidates: tf.data.Dataset, pairs: tf.data.Dataset) -> Callable[[], None]:
    metric = tfrs.metrics.FactorizedTopK(candidates, ks=(10, 100))

    @tf.function  # As inside Keras' evaluate.
    def update(query: tf.Tensor, positive: tf.Tensor) -> None:
        metric.update_state(query, positive)

    def evaluate() -> None:
        for query, positive in pairs:
            update(query, positive)

    return evaluate


def _cpu_s(work: Callable[[], object], repetitions: int = 3) -> float:
    """CPU-seconds of all threads, the best of some repetitions after one that warms up."""
    work()
    taken = []
    for _ in range(repetitions):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def _exhaust(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def _made_up_examples(spec: DatasetSpec) -> tuple[dict[str, Any], dict[str, str]]:
    """Columns with every feature of the dataset, and their dtypes; popularity falls as 1 / rank."""
    rng = np.random.default_rng(0)
    items = np.minimum(rng.zipf(1.2, NUM_ROWS * 51) % NUM_ITEMS, NUM_ITEMS - 1).astype(str)
    columns: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    for raw in (*features.raw_query_inputs(spec), *features.raw_candidate_inputs(spec)):
        dtypes[raw.name] = raw.dtype
        if raw.name == features.EVENT_TIME:
            columns[raw.name] = _TRAIN_END_UNIX_S - rng.integers(30 * 86_400, size=NUM_ROWS)
        elif raw.name == features.HISTORY:
            lengths = rng.integers(51, size=NUM_ROWS)
            ends = np.cumsum(lengths)
            columns[raw.name] = [items[end - n : end].tolist() for n, end in zip(lengths, ends, strict=True)]
        elif raw.name == features.ITEM_ID:
            columns[raw.name] = items[-NUM_ROWS:]
        elif raw.name == features.USER_ID:
            columns[raw.name] = rng.integers(NUM_USERS, size=NUM_ROWS).astype(str)
        elif raw.is_list:
            columns[raw.name] = [
                [f"v{v}" for v in rng.integers(20, size=n)] for n in rng.integers(1, 4, NUM_ROWS)
            ]
        elif raw.dtype == "string":
            columns[raw.name] = rng.integers(20, size=NUM_ROWS).astype(str)
        else:
            columns[raw.name] = rng.normal(size=NUM_ROWS)
    for label in (*features.feature_space(spec).labels, features.RETRIEVAL_WEIGHT):
        columns[label], dtypes[label] = np.ones(NUM_ROWS), "float32"
    # What retrieval does not read is in the files all the same.
    offsets = np.concatenate([[0], np.cumsum(rng.integers(spec.max_impressions + 1, size=NUM_ROWS))])
    for raw in features.raw_impression_inputs(spec):
        if raw.dtype == "int64":
            values = _TRAIN_END_UNIX_S - rng.integers(30 * 86_400, size=offsets[-1])
        elif raw.dtype == "float32":
            values = rng.normal(size=offsets[-1])
        else:
            values = items[: offsets[-1]] if raw.name == features.IMPRESSION_ITEMS else items[-offsets[-1] :]
        columns[raw.name], dtypes[raw.name] = _lists(offsets, values), raw.dtype
    num_counts = len(count_names(spec))
    counts = rng.integers(1_000, size=NUM_ROWS * num_counts).astype(np.float32)
    columns[features.ITEM_COUNTS] = _lists(np.arange(NUM_ROWS + 1) * num_counts, counts)
    dtypes[features.ITEM_COUNTS] = "float32"
    return columns, dtypes


def _write_examples(path: Path, columns: Mapping[str, Any], dtypes: Mapping[str, str]) -> str:
    """Gzipped interaction examples."""
    encoder = example_coder.RecordBatchToExamplesEncoder()
    with tf.io.TFRecordWriter(
        str(path), tf.io.TFRecordOptions(compression_type="GZIP", compression_level=1)
    ) as writer:
        for part in pl.DataFrame(columns).iter_slices(20_000):
            for example in encoder.encode(example_batch(part, {name: dtypes[name] for name in columns})):
                writer.write(example)
    return str(path)


def _lists(offsets: np.ndarray, values: np.ndarray) -> pl.Series:
    """Lists values[offsets[i]:offsets[i + 1]]."""
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))))


def _transform_graph(folder: Path, pattern: str, spec: DatasetSpec) -> tft.TFTransformOutput:
    metadata = dataset_metadata.DatasetMetadata(interactions_schema(spec))
    config = {"dataset": spec.model_dump_json(), "train_end_unix_s": _TRAIN_END_UNIX_S}
    source = tf_example_record.TFExampleRecord(pattern, schema=metadata.schema)
    import apache_beam as beam

    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(folder / "tmp")):
        data = pipeline | source.BeamSource()
        transform_fn = (data, source.TensorAdapterConfig()) | tft_beam.AnalyzeDataset(
            lambda inputs: preprocessing_fn(inputs, config)
        )
        _ = transform_fn | tft_beam.WriteTransformFn(str(folder / "out"))
    metadata_io.write_metadata(metadata, str(folder / "out" / tft.TFTransformOutput.RAW_METADATA_DIR))
    return tft.TFTransformOutput(str(folder / "out"))


if __name__ == "__main__":
    main()
