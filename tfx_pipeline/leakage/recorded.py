"""What the examples of a run hold: the keys of all rows, and every feature of a sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import polars as pl
import tensorflow as tf
from tfx_bsl.coders import example_coder

from schema.contract import DatasetSpec
from schema.errors import DataError
from tfx_pipeline.examples import catalogue_inputs, interaction_inputs
from trainer import features
from trainer.input_pipeline import expand

KEY = (features.USER_ID, features.ITEM_ID, features.EVENT_TIME)
_BATCH = 8_192
_DTYPES = {"string": pl.String, "int64": pl.Int64, "float32": pl.Float32}


@dataclasses.dataclass(frozen=True)
class SplitExamples:
    """The interaction examples of one split.

    Attributes:
      keys: user_id, item_id and event_time_unix_s of every example, in file order.
      sample: every feature of some examples, each a list.
    """

    keys: pl.DataFrame
    sample: pl.DataFrame


def interaction_dtypes(spec: DatasetSpec) -> dict[str, str]:
    """Feature name to dtype of an interaction example."""
    return {
        name: dtype
        for group in ("query", "candidate", "labels")
        for name, dtype in interaction_inputs(spec, group).items()
    } | {features.ITEM_COUNTS: "float32"}


def user_state_dtypes(spec: DatasetSpec) -> dict[str, str]:
    """Feature name to dtype of a user-state example, as far as it can be recomputed."""
    lists = (features.SEEN_ITEMS, features.EVAL_ITEMS, features.TEST_ITEMS)
    return {**interaction_inputs(spec, "query"), **dict.fromkeys(lists, "string")}


def catalogue_dtypes(spec: DatasetSpec) -> dict[str, str]:
    """Feature name to dtype of a catalogue example."""
    return catalogue_inputs(spec)


def read_split(
    pattern: str,
    dtypes: Mapping[str, str],
    sample_rows: int,
    seed: int,
    on_rows: Callable[[int], None] = lambda _: None,
) -> SplitExamples:
    """Reads the keys of all interaction examples of a split, and all features of a random sample.

    Args:
      pattern: gzipped TFRecord files.
      dtypes: see `interaction_dtypes`.
      sample_rows: size of the sample; a smaller split is taken whole.
      seed: of the sample.
      on_rows: called with the number of rows of each batch read.

    Raises:
      DataError: no files or no examples.
    """
    parser = {
        features.USER_ID: tf.io.FixedLenFeature([], tf.string),
        features.ITEM_ID: tf.io.FixedLenFeature([], tf.string),
        features.EVENT_TIME: tf.io.FixedLenFeature([], tf.int64),
    }
    parts, kept = [], _Reservoir(sample_rows, seed)
    for batch in _batches(pattern):
        parsed = tf.io.parse_example(batch, parser)
        columns = {name: parsed[name].numpy() for name in KEY}
        parts.append(pl.DataFrame({name: _text(column) for name, column in columns.items()}))
        kept.add(batch.numpy())
        on_rows(len(parts[-1]))
    if not parts:
        raise DataError(f"no examples in {pattern}; 'funnel run' with the same settings makes them again")
    return SplitExamples(pl.concat(parts), decode(kept.records, dtypes))


def read_sample(pattern: str, dtypes: Mapping[str, str], sample_rows: int, seed: int) -> pl.DataFrame:
    """All features of a random sample of examples, each a list."""
    kept = _Reservoir(sample_rows, seed)
    for batch in _batches(pattern):
        kept.add(batch.numpy())
    return decode(kept.records, dtypes)


def decode(serialized: list[bytes], dtypes: Mapping[str, str]) -> pl.DataFrame:
    """Serialized tf.Examples as columns of lists; a feature that no example has is a column of empty lists.

    Raises:
      DataError: a feature is of another type than it should be.
    """
    found = pl.DataFrame(pl.from_arrow(example_coder.ExamplesToRecordBatchDecoder().DecodeBatch(serialized)))
    columns = []
    for name, dtype in dtypes.items():
        wanted = pl.List(_DTYPES[dtype])
        if name not in found.columns or found.schema[name] == pl.Null:
            column = pl.Series(name, [[]] * len(serialized), dtype=wanted)
        else:
            try:
                column = found[name].cast(wanted).fill_null(pl.lit([], dtype=wanted))
            except pl.exceptions.PolarsError as error:
                raise DataError(f"examples hold {name} as {found.schema[name]}, not {wanted}") from error
        columns.append(column)
    return pl.DataFrame(columns)


class _Reservoir:
    """A uniform sample of a stream of records of unknown length (Vitter 1985, algorithm R)."""

    def __init__(self, size: int, seed: int) -> None:
        self.records: list[bytes] = []
        self._size = size
        self._seen = 0
        self._rng = np.random.default_rng(seed)

    def add(self, records: np.ndarray) -> None:
        """Considers some more records."""
        free = max(0, self._size - len(self.records))
        self.records += records[:free].tolist()
        rest = records[free:]
        self._seen += len(records)
        counts = 1 + np.arange(self._seen - len(rest), self._seen)
        places = self._rng.integers(0, counts)
        for row in np.flatnonzero(places < self._size):
            self.records[places[row]] = rest[row]


def _batches(pattern: str) -> tf.data.Dataset:
    return tf.data.TFRecordDataset(expand([pattern]), compression_type="GZIP").batch(_BATCH)


def _text(column: np.ndarray) -> pl.Series:
    if column.dtype != object:
        return pl.Series(column)
    return pl.Series(column.tolist(), dtype=pl.Binary).cast(pl.String)
