"""Raw examples to transformed batches.

Examples are parsed and transformed in windows of up to a million; a window is cached, shuffled as a whole and
cut into batches. Data that fit one window are thus shuffled globally in every epoch, larger data window by
window.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import DatasetSpec
from schema.errors import ConfigError, DataError
from trainer import features
from trainer.catalogue import Catalogue
from trainer.raw_inputs import (
    compiled,
    parse_candidate_examples,
    transform_candidates,
    transform_counts,
)

WINDOW_EXAMPLES = 1_000_000
# Examples parsed and transformed at a time.
_CHUNK_EXAMPLES = 8_192

Window = Mapping[str, tf.Tensor]


def expand(patterns: Sequence[str]) -> list[str]:
    """Files that match the patterns, sorted. Raises DataError when there is none."""
    files = sorted(file for pattern in patterns for file in tf.io.gfile.glob(pattern))
    if not files:
        raise DataError(f"no example files match {', '.join(patterns)}")
    return files


def windows(
    patterns: Sequence[str],
    transform_output: tft.TFTransformOutput,
    window_examples: int = WINDOW_EXAMPLES,
    unread: Collection[str] = (),
) -> tf.data.Dataset:
    """Transformed windows of interaction examples, cached in memory.

    The Transform graph runs here, once per example, and not in Beam: that saves writing and reading the
    transformed examples and takes a fraction of the time.

    Args:
      patterns: gzipped TFRecord files of raw interaction examples.
      transform_output: holds the Transform graph.
      window_examples: examples per window.
      unread: raw features that are left out, and with them what is made of them alone: parsing is most of the
        time that reading takes.

    Returns:
      A dataset of dicts of dense tensors with N <= window_examples rows: ids and buckets int32 [N], lists of
      ids int32 [N, L] padded with 0, cdf, labels (NaN where absent) and retrieval_weight float32 [N].
    """
    declared = transform_output.raw_feature_spec()
    raw_spec = {name: value for name, value in declared.items() if name not in unread}
    layer = transform_output.transform_features_layer()

    @tf.autograph.experimental.do_not_convert
    def transform(serialized: tf.Tensor) -> dict[str, tf.Tensor | tf.RaggedTensor]:
        columns = {}
        for name, value in layer(tf.io.parse_example(serialized, raw_spec)).items():
            narrow = tf.cast(value, tf.int32) if value.dtype == tf.int64 else value
            sparse = isinstance(narrow, tf.SparseTensor)
            columns[name] = tf.RaggedTensor.from_sparse(narrow) if sparse else narrow
        return columns

    @tf.autograph.experimental.do_not_convert
    def merge(chunks: dict[str, tf.RaggedTensor]) -> dict[str, tf.Tensor]:
        flat = {name: column.merge_dims(0, 1) for name, column in chunks.items()}
        return {
            name: column.to_tensor() if isinstance(column, tf.RaggedTensor) else column
            for name, column in flat.items()
        }

    chunk = min(_CHUNK_EXAMPLES, window_examples)
    records = tf.data.TFRecordDataset(expand(patterns), compression_type="GZIP")
    chunks = records.batch(chunk).map(transform, num_parallel_calls=tf.data.AUTOTUNE)
    return chunks.ragged_batch(window_examples // chunk).map(merge).cache()


def rows_of_surfaces(
    window_dataset: tf.data.Dataset,
    surfaces: Sequence[str],
    spec: DatasetSpec,
    transform_output: tft.TFTransformOutput,
) -> tf.data.Dataset:
    """The rows of each window that happened on some surfaces.

    Args:
      window_dataset: from `windows`.
      surfaces: raw values.
      spec: the declaration.
      transform_output: holds the vocabulary.

    Raises:
      ConfigError: the dataset maps no surface, or no training example has one of those named.
    """
    if not spec.surface_is_mapped:
        raise ConfigError(
            f"retrieval.surfaces is {list(surfaces)}, but {spec.name!r} maps no surface; leave it empty."
        )
    feature = features.feature_space(spec).find(features.SURFACE)
    values = [value.decode() for value in transform_output.vocabulary_by_name(feature.space)]
    unknown = sorted(set(surfaces) - set(values))
    if unknown:
        raise ConfigError(
            f"retrieval.surfaces names {', '.join(unknown)}, which no training example has; "
            f"there are {', '.join(sorted(values))}."
        )
    ids = tf.constant([values.index(name) + features.FIRST_VOCABULARY_ID for name in surfaces], tf.int32)

    @tf.autograph.experimental.do_not_convert
    def chosen(window: Window) -> Window:
        rows = tf.reduce_any(window[feature.id_name][:, tf.newaxis] == ids, axis=1)
        return {name: tf.boolean_mask(column, rows) for name, column in window.items()}

    return window_dataset.map(chosen).cache()


def shuffled_batches(
    window_dataset: tf.data.Dataset,
    batch_size: int,
    seed: int,
    keep: Callable[[Window], tf.Tensor] | None = None,
) -> tf.data.Dataset:
    """One epoch of shuffled batches per iteration, in another order each time.

    The rows that take part are kept in memory a second time, each as one piece: bringing a batch together
    column by column costs several times as much.

    Args:
      window_dataset: from `windows`.
      batch_size: rows per batch. The last, smaller batch of a window is dropped unless it is the window's
        only one.
      seed: of the order.
      keep: bool [N] of the rows of a window that take part; all by default.
    """
    columns = window_dataset.element_spec
    seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)

    @tf.autograph.experimental.do_not_convert
    def packed(window: Window) -> tuple[tf.Tensor, tf.Tensor]:
        return _pack(window, _kept_rows(window, keep))

    @tf.autograph.experimental.do_not_convert
    def batches(rows: tuple[tf.Tensor, tf.Tensor], window_seed: tf.Tensor) -> tf.data.Dataset:
        table, widths = rows
        count = tf.shape(table)[0]
        order = tf.random.experimental.stateless_shuffle(
            tf.range(count), seed=tf.stack([window_seed, window_seed])
        )
        size = tf.minimum(batch_size, count)
        number = count // tf.maximum(size, 1)
        chosen = tf.data.Dataset.from_tensor_slices(tf.reshape(order[: number * size], [number, size]))
        return chosen.map(lambda batch: _unpack(tf.gather(table, batch), widths, columns))

    packed_windows = window_dataset.map(packed).cache()
    return tf.data.Dataset.zip((packed_windows, seeds)).flat_map(batches).prefetch(tf.data.AUTOTUNE)


def ordered_batches(
    window_dataset: tf.data.Dataset, batch_size: int, keep: Callable[[Window], tf.Tensor] | None = None
) -> tf.data.Dataset:
    """All rows in file order; the last batch of a window may be smaller."""

    @tf.autograph.experimental.do_not_convert
    def batches(window: Window) -> tf.data.Dataset:
        rows = _kept_rows(window, keep)
        count = tf.cast(tf.shape(rows)[0], tf.int64)
        starts = tf.data.Dataset.range((count + batch_size - 1) // batch_size)
        return starts.map(lambda i: _gather(window, rows[i * batch_size : (i + 1) * batch_size]))

    return window_dataset.flat_map(batches).prefetch(tf.data.AUTOTUNE)


def _kept_rows(window: Window, keep: Callable[[Window], tf.Tensor] | None) -> tf.Tensor:
    rows = tf.range(tf.shape(next(iter(window.values())))[0])
    return rows if keep is None else tf.boolean_mask(rows, keep(window))


def _gather(window: Window, rows: tf.Tensor) -> dict[str, tf.Tensor]:
    return {name: tf.gather(column, rows) for name, column in window.items()}


def _pack(window: Window, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The chosen rows of all columns side by side, int32 [N, W], floats as their bits; int32 widths [C]."""
    columns = _gather(window, rows).values()
    bits = [tf.bitcast(column, tf.int32) for column in columns]
    matrices = [column if column.shape.rank == 2 else column[:, tf.newaxis] for column in bits]
    return tf.concat(matrices, axis=1), tf.stack([tf.shape(matrix)[1] for matrix in matrices])


def _unpack(
    table: tf.Tensor, widths: tf.Tensor, columns: Mapping[str, tf.TensorSpec]
) -> dict[str, tf.Tensor]:
    """The inverse of `_pack`."""
    parts = zip(columns.items(), tf.split(table, widths, axis=1, num=len(columns)), strict=True)
    return {
        name: tf.bitcast(part if spec.shape.rank == 2 else tf.reshape(part, [-1]), spec.dtype)
        for (name, spec), part in parts
    }


def load_catalogue(
    patterns: Sequence[str], transform_output: tft.TFTransformOutput, spec: DatasetSpec
) -> Catalogue:
    """Reads the whole catalogue and transforms its features.

    Raises:
      DataError: no files, no items, or item ids that are empty or not unique.
    """
    layer = transform_output.transform_features_layer()
    transform = compiled(transform_candidates, layer, spec)
    raw_parts: list[dict[str, tf.Tensor]] = []
    parts: list[dict[str, np.ndarray]] = []
    records = tf.data.TFRecordDataset(expand(patterns), compression_type="GZIP")
    for serialized in records.batch(_CHUNK_EXAMPLES):
        raw = parse_candidate_examples(serialized, spec)
        raw_parts.append(
            {
                name: raw[name]
                for name in (features.ITEM_ID, features.UPLOAD_TIME, features.ITEM_COUNTS)
                if name in raw
            }
        )
        parts.append({name: value.numpy() for name, value in transform(raw).items()})
    if not parts:
        raise DataError(f"the catalogue {', '.join(patterns)} has no items")

    def upload_times() -> np.ndarray | None:
        if features.UPLOAD_TIME not in raw_parts[0]:
            return None
        return np.concatenate([part[features.UPLOAD_TIME].numpy() for part in raw_parts])

    encoded = np.concatenate([part[features.ITEM_ID].numpy() for part in raw_parts])
    ids = np.array([item_id.decode() for item_id in encoded], dtype=object)
    if len(set(ids)) != len(ids) or "" in set(ids):
        raise DataError(
            f"the catalogue has {len(ids)} rows but {len(set(ids) - {''})} distinct, non-empty item ids"
        )
    counts = np.concatenate([part[features.ITEM_COUNTS].numpy() for part in raw_parts])
    return Catalogue(
        ids,
        {name: _concat_padded([part[name] for part in parts]) for name in parts[0]},
        upload_times(),
        _counters(counts, layer, len(spec.task_labels)),
    )


def _counters(counts: np.ndarray, layer: Any, num_labels: int) -> dict[str, np.ndarray]:
    """Counters of raw counts [I, C], and of an item without any event in the last row."""
    of_log = 1 + num_labels
    unmet = np.concatenate([counts[0, :of_log], np.zeros(counts.shape[1] - of_log, np.float32)])
    transformed = transform_counts(layer, tf.constant(np.vstack([counts, unmet])))
    return {name: value.numpy() for name, value in transformed.items()}


def _concat_padded(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenates rows; lists are padded with 0 to the longest."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    width = max(1, max(part.shape[1] for part in parts))
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])
