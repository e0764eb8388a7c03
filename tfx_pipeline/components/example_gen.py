"""ExampleGen over contract tables: Beam moves column batches, C++ encodes the examples.

One executor serves three ExampleGens: interactions, user states, catalogue; see `contract_example_gen`.
All rows of a user meet in one shard by a group-by-key over Arrow batches; no Python object is made per row.
"""

from __future__ import annotations

import enum
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
import pyarrow.parquet
import tensorflow as tf
from google.protobuf import json_format, struct_pb2
from tfx import types
from tfx.components.example_gen import component
from tfx.components.util import examples_utils
from tfx.dsl.components.base import base_beam_executor, executor_spec
from tfx.proto import example_gen_pb2
from tfx.types import artifact_utils
from tfx.utils import proto_utils
from tfx_bsl.coders import example_coder

from schema.contract import DatasetSpec, dataset_spec_from_json
from schema.tables import INTERACTIONS, ITEMS, USERS, read_summary
from tfx_pipeline.examples import (
    ExampleSettings,
    catalogue_columns,
    catalogue_inputs,
    example_batch,
    interaction_columns,
    interaction_inputs,
    user_state_columns,
)
from trainer import features

# Rows of the interactions table per shard; a shard is one unit of work and one file per split.
ROWS_PER_SHARD = 100_000
# Rows encoded at a time, which bounds the memory of the encoded examples.
_ROWS_PER_BATCH = 20_000


class ExampleKind(str, enum.Enum):
    """What one example stands for."""

    INTERACTIONS = "interactions"
    USER_STATES = "user_states"
    CATALOGUE = "catalogue"

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits of the Examples artifact; only interactions are split."""
        return features.SPLITS if self is ExampleKind.INTERACTIONS else (self.value,)


def contract_example_gen(
    kind: ExampleKind, tables_dir: str, spec: DatasetSpec, max_positives_per_user: int, code_version: str
) -> component.FileBasedExampleGen:
    """The ExampleGen component for one kind of example.

    Args:
      kind: which examples.
      tables_dir: folder of contract tables.
      spec: the declaration.
      max_positives_per_user: see ExampleSettings.
      code_version: changes with the code, so that examples of older code are not reused.
    """
    settings = struct_pb2.Struct()
    settings.update(
        {
            "kind": kind.value,
            "dataset": spec.model_dump_json(),
            "max_positives_per_user": max_positives_per_user,
            "code_version": code_version,
        }
    )
    custom_config = example_gen_pb2.CustomConfig()
    custom_config.custom_config.Pack(settings)
    splits = [example_gen_pb2.SplitConfig.Split(name=name, hash_buckets=1) for name in kind.splits]
    names = {"interactions": "InteractionGen", "user_states": "UserStateGen", "catalogue": "CatalogueGen"}
    return component.FileBasedExampleGen(
        input_base=tables_dir,
        input_config=example_gen_pb2.Input(
            splits=[example_gen_pb2.Input.Split(name="tables", pattern="*.parquet")]
        ),
        output_config=example_gen_pb2.Output(split_config=example_gen_pb2.SplitConfig(splits=splits)),
        custom_config=custom_config,
        custom_executor_spec=executor_spec.BeamExecutorSpec(ContractExecutor),
    ).with_id(names[kind.value])


class ContractExecutor(base_beam_executor.BaseBeamExecutor):
    """Reads contract tables, groups rows by user and writes one kind of example."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """Runs the Beam pipeline; see the base class for the arguments."""
        self._log_startup(input_dict, output_dict, exec_properties)
        custom_config = example_gen_pb2.CustomConfig()
        proto_utils.json_to_proto(exec_properties["custom_config"], custom_config)
        settings = struct_pb2.Struct()
        custom_config.custom_config.Unpack(settings)
        values = json_format.MessageToDict(settings)
        kind = ExampleKind(values["kind"])
        tables_dir = Path(exec_properties["input_base"])

        artifact = artifact_utils.get_single_instance(output_dict["examples"])
        artifact.split_names = artifact_utils.encode_split_names(list(kind.splits))
        split_dirs = {split: artifact_utils.get_split_uri([artifact], split) for split in kind.splits}
        for directory in split_dirs.values():
            tf.io.gfile.makedirs(directory)

        row_groups = _row_groups(tables_dir, kind)
        rows = sum(count for _, _, count in row_groups)
        num_shards = max(1, round(rows / ROWS_PER_SHARD))
        build = _BuildShard(
            kind=kind,
            tables_dir=str(tables_dir),
            dataset_json=values["dataset"],
            max_positives_per_user=int(values["max_positives_per_user"]),
            split_dirs=split_dirs,
            num_shards=num_shards,
        )
        with self._make_beam_pipeline() as pipeline:
            _ = (
                pipeline
                | "RowGroups" >> beam.Create(row_groups)
                | "Spread" >> beam.Reshuffle()
                | "PartitionByUser" >> beam.FlatMap(_partition, str(tables_dir), num_shards)
                | "GroupByShard" >> beam.GroupByKey()
                | "WriteExamples" >> beam.ParDo(build)
            )
        examples_utils.set_payload_format(artifact, example_gen_pb2.FORMAT_TF_EXAMPLE)
        examples_utils.set_file_format(artifact, "tfrecords_gzip")


def _row_groups(tables_dir: Path, kind: ExampleKind) -> list[tuple[str, int, int]]:
    """(file, row group, rows) of every table to partition; the catalogue is read by its one shard."""
    if kind is ExampleKind.CATALOGUE:
        return [(ITEMS, 0, 0)]
    groups = []
    for name in (INTERACTIONS, USERS):
        metadata = pyarrow.parquet.ParquetFile(tables_dir / name).metadata
        for index in range(metadata.num_row_groups):
            groups.append((name, index, metadata.row_group(index).num_rows if name == INTERACTIONS else 0))
    return groups


def _partition(
    row_group: tuple[str, int, int], tables_dir: str, num_shards: int
) -> Iterator[tuple[int, tuple[str, bytes]]]:
    """Splits one row group by a hash of the user id into (shard, (table, Arrow IPC bytes))."""
    name, index, _ = row_group
    if name == ITEMS:
        yield 0, (name, b"")
        return
    path = os.path.join(tables_dir, name)
    offset, rows = _row_range(path, index)
    table = pl.scan_parquet(path).slice(offset, rows).collect()
    table = table.with_columns((pl.col("user_id").hash(seed=0) % num_shards).alias("_shard"))
    for (shard,), part in table.partition_by("_shard", include_key=False, as_dict=True).items():
        buffer = io.BytesIO()
        part.write_ipc(buffer, compression="lz4")
        yield int(shard), (name, buffer.getvalue())


def _row_range(path: str, row_group: int) -> tuple[int, int]:
    metadata = pyarrow.parquet.ParquetFile(path).metadata
    offset = sum(metadata.row_group(i).num_rows for i in range(row_group))
    return offset, metadata.row_group(row_group).num_rows


class _BuildShard(beam.DoFn):
    """Builds and writes the examples of one shard: one TFRecord file per split."""

    def __init__(
        self,
        kind: ExampleKind,
        tables_dir: str,
        dataset_json: str,
        max_positives_per_user: int,
        split_dirs: Mapping[str, str],
        num_shards: int,
    ) -> None:
        self._kind = kind
        self._tables_dir = Path(tables_dir)
        self._dataset_json = dataset_json
        self._max_positives_per_user = max_positives_per_user
        self._split_dirs = dict(split_dirs)
        self._num_shards = num_shards

    def setup(self) -> None:
        """Reads what every shard needs: declaration, end of training, catalogue."""
        self._spec = dataset_spec_from_json(self._dataset_json)
        self._items = pl.read_parquet(self._tables_dir / ITEMS)
        self._settings = ExampleSettings(
            train_end_unix_s=read_summary(self._tables_dir).train_end_unix_s,
            max_positives_per_user=self._max_positives_per_user,
        )
        self._encoder = example_coder.RecordBatchToExamplesEncoder()

    def process(self, shard: tuple[int, Iterable[tuple[str, bytes]]]) -> None:
        """Writes one shard."""
        index, parts = shard
        tables: dict[str, list[pl.DataFrame]] = {INTERACTIONS: [], USERS: []}
        for name, data in parts:
            if name in tables:
                tables[name].append(pl.read_ipc(io.BytesIO(data)))
        groups = ("query", "candidate", "labels")
        query, candidate, labels = (interaction_inputs(self._spec, group) for group in groups)
        if self._kind is ExampleKind.CATALOGUE:
            catalogue = catalogue_columns(self._items, self._settings.train_end_unix_s)
            self._write(index, self._kind.value, catalogue, catalogue_inputs(self._spec))
            return
        events = pl.concat(tables[INTERACTIONS]) if tables[INTERACTIONS] else self._empty(INTERACTIONS)
        users = pl.concat(tables[USERS]) if tables[USERS] else self._empty(USERS)
        if self._kind is ExampleKind.USER_STATES:
            surface, train_items = self._default_surface(), self._train_item_ids()
            states = user_state_columns(events, users, self._spec, self._settings, surface, train_items)
            held_out = dict.fromkeys(
                (
                    features.EVAL_ITEMS,
                    features.TEST_ITEMS,
                    features.COLD_TEST_ITEMS,
                    features.SEEN_ITEMS,
                    features.USER_TYPE,
                ),
                "string",
            )
            self._write(index, self._kind.value, states, {**query, **held_out})
            return
        columns = interaction_columns(events, users, self._items, self._spec, self._settings)
        for split in self._kind.splits:
            self._write(
                index, split, columns.filter(pl.col("split") == split), {**query, **candidate, **labels}
            )

    def _empty(self, name: str) -> pl.DataFrame:
        return pl.read_parquet(self._tables_dir / name, n_rows=0)

    def _train_item_ids(self) -> pl.Series:
        interactions = pl.scan_parquet(self._tables_dir / INTERACTIONS).filter(pl.col("split") == "train")
        return interactions.select(pl.col(features.ITEM_ID).unique()).collect()[features.ITEM_ID]

    def _default_surface(self) -> str | None:
        if features.SURFACE not in self._spec.interactions.columns:
            return None
        surfaces = pl.scan_parquet(self._tables_dir / INTERACTIONS).filter(pl.col("split") == "train")
        counts = surfaces.select(features.SURFACE).drop_nulls().collect()[features.SURFACE].value_counts()
        top = counts.sort("count", features.SURFACE, descending=[True, False])
        return str(top[features.SURFACE][0]) if len(top) else None

    def _write(self, shard: int, split: str, table: pl.DataFrame, inputs: Mapping[str, str]) -> None:
        path = os.path.join(
            self._split_dirs[split], f"data_tfrecord-{shard:05d}-of-{self._num_shards:05d}.gz"
        )
        options = tf.io.TFRecordOptions(compression_type="GZIP", compression_level=1)
        with tf.io.TFRecordWriter(path + ".tmp", options) as writer:
            for batch in table.iter_slices(_ROWS_PER_BATCH):
                for example in self._encoder.encode(example_batch(batch, inputs)):
                    writer.write(example)
        tf.io.gfile.rename(path + ".tmp", path, overwrite=True)
