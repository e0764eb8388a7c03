"""The three ExampleGens on a tiny dataset in several shards: where rows go; none is lost or doubled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tensorflow as tf
from google.protobuf import json_format, struct_pb2
from tfx.dsl.components.base import base_beam_executor
from tfx.proto import example_gen_pb2
from tfx.types import artifact_utils, standard_artifacts
from tfx.utils import proto_utils

from schema.contract import DatasetSpec, dataset_spec_from_json
from schema.tables import INTERACTIONS, prepare_tables
from tfx_pipeline.components import example_gen
from tfx_pipeline.components.example_gen import ContractExecutor, ExampleKind, contract_example_gen

NUM_USERS = 40
ROWS = 600
START = 1_700_000_000

SPEC = DatasetSpec.model_validate(
    {
        "name": "tiny",
        "interactions": {
            "files": ["log.parquet"],
            "columns": {
                name: name for name in ("user_id", "item_id", "event_time_unix_s", "surface", "position")
            },
            "labels": {"click": "click", "unused": "click"},
        },
        "users": {
            "files": ["users.parquet"],
            "columns": {"user_id": "user_id"},
            "features": [{"name": "age", "kind": "continuous"}],
        },
        "items": {
            "files": ["items.parquet"],
            "columns": {"item_id": "item_id", "upload_time_unix_s": "upload"},
            "features": [{"name": "tags", "kind": "multi_categorical"}],
        },
        "positive": "click",
        "tasks": [{"name": "click", "label": "click", "kind": "binary"}],
        "split": {"fractions": [0.6, 0.2, 0.2]},
    }
)


@pytest.fixture(scope="module")
def tables_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contract tables of 600 events in six row groups; u39 has no event, u0..u4 have no row as users."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    pl.DataFrame(
        {
            "user_id": [f"u{i}" for i in rng.integers(0, NUM_USERS - 1, ROWS)],
            "item_id": [f"i{i}" for i in rng.integers(0, 20, ROWS)],
            "event_time_unix_s": START + np.arange(ROWS),
            "surface": ["home" if i % 3 else "watch" for i in range(ROWS)],
            "position": np.arange(ROWS),  # names the row in its example
            "click": rng.integers(0, 2, ROWS),
        }
    ).write_parquet(folder / "log.parquet")
    users = [f"u{i}" for i in range(5, NUM_USERS)]
    pl.DataFrame({"user_id": users, "age": [float(i) for i in range(len(users))]}).write_parquet(
        folder / "users.parquet"
    )
    items = [f"i{i}" for i in range(20)]
    pl.DataFrame({"item_id": items, "upload": [START] * 20, "tags": [["a"]] * 20}).write_parquet(
        folder / "items.parquet"
    )
    out = prepare_tables(SPEC, folder, folder / "out")
    pl.read_parquet(out / INTERACTIONS).write_parquet(out / INTERACTIONS, row_group_size=100)
    return out


def generate(
    kind: ExampleKind, tables_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[list[tf.train.Example]]]:
    """Runs the real executor with about four shards; returns the examples of each file of each split."""
    monkeypatch.setattr(example_gen, "ROWS_PER_SHARD", ROWS // 4)
    component = contract_example_gen(kind, str(tables_dir), SPEC, max_positives_per_user=2, code_version="1")
    output = standard_artifacts.Examples()
    output.uri = str(folder)
    properties = {
        name: proto_utils.proto_to_json(value) if hasattr(value, "DESCRIPTOR") else value
        for name, value in component.exec_properties.items()
    }
    context = base_beam_executor.BaseBeamExecutor.Context(
        beam_pipeline_args=["--runner=DirectRunner"], tmp_dir=str(folder), unique_id="1"
    )
    ContractExecutor(context).Do({}, {"examples": [output]}, properties)

    files = {}
    for split in artifact_utils.decode_split_names(output.split_names):
        names = sorted((folder / f"Split-{split}").iterdir())
        assert all(name.suffix == ".gz" for name in names), "a temporary file is left"
        files[split] = [
            [
                tf.train.Example.FromString(record)
                for record in tf.data.TFRecordDataset(str(name), compression_type="GZIP").as_numpy_iterator()
            ]
            for name in names
        ]
    return files


def text(example: tf.train.Example, name: str) -> list[str]:
    return [value.decode() for value in example.features.feature[name].bytes_list.value]


def test_every_event_is_in_one_example_of_its_split_and_users_stay_together(
    tables_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pl.read_parquet(tables_dir / INTERACTIONS)
    files = generate(ExampleKind.INTERACTIONS, tables_dir, tmp_path, monkeypatch)
    assert sorted(files) == ["eval", "test", "train"]
    shard_of: dict[str, set[int]] = {}
    for split, shards in files.items():
        assert len(shards) == 4
        rows = []
        for shard, examples in enumerate(shards):
            for example in examples:
                rows.append(example.features.feature["position"].int64_list.value[0])
                shard_of.setdefault(text(example, "user_id")[0], set()).add(shard)
        assert sorted(rows) == sorted(table.filter(pl.col("split") == split)["position"].to_list())
    assert all(len(shards) == 1 for shards in shard_of.values())
    assert len({shard for shards in shard_of.values() for shard in shards}) == 4

    events = {row["position"]: row for row in table.to_dicts()}
    weights: Counter[str] = Counter()
    for example in (e for shards in files.values() for examples in shards for e in examples):
        feature = example.features.feature
        row = events[feature["position"].int64_list.value[0]]
        earlier = [
            events[p]["item_id"]
            for p in range(row["position"])
            if events[p]["user_id"] == row["user_id"] and events[p]["click"]
        ]
        assert text(example, "history_item_ids") == earlier[-50:]
        shown = [events[p] for p in range(row["position"]) if events[p]["user_id"] == row["user_id"]][-50:]
        assert text(example, "impression_item_ids") == [event["item_id"] for event in shown]
        assert text(example, "impression_surfaces") == [event["surface"] for event in shown]
        times = feature["impression_event_time_unix_s"].int64_list.value
        assert list(times) == [event["event_time_unix_s"] for event in shown]
        clicks = [event["click"] for event in shown]
        assert list(feature["impression_click"].float_list.value) == clicks
        # Of the log, whoever's: the times are distinct, so that the position counts what is earlier.
        counts = feature["item_counts"].float_list.value
        assert counts[:2] == [row["position"], sum(events[p]["click"] for p in range(row["position"]))]
        assert list(counts) == row["item_counts"]
        assert list(feature["click"].float_list.value) == [row["click"]]
        assert len(feature["age"].float_list.value) == (int(row["user_id"][1:]) >= 5)
        assert "unused" not in feature
        if row["split"] == "train":
            weights[row["user_id"]] += feature["retrieval_weight"].float_list.value[0]
    assert max(weights.values()) == 2


def test_every_user_has_one_state_with_or_without_events_or_a_row(
    tables_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = generate(ExampleKind.USER_STATES, tables_dir, tmp_path, monkeypatch)
    assert list(files) == ["user_states"]
    examples = [example for shard in files["user_states"] for example in shard]
    assert sorted(text(e, "user_id")[0] for e in examples) == sorted(f"u{i}" for i in range(NUM_USERS))
    (quiet,) = (e for e in examples if text(e, "user_id") == ["u39"])
    assert text(quiet, "history_item_ids") == []
    assert text(quiet, "surface") == ["home"]  # where most train events are
    assert list(quiet.features.feature["age"].float_list.value) == [34.0]
    table = pl.read_parquet(tables_dir / INTERACTIONS).filter(pl.col("click") > 0)
    seen = table.filter(pl.col("split") == "train").group_by("user_id").agg("item_id")
    expected = {user: set(items) for user, items in seen.iter_rows()}
    shown = pl.read_parquet(tables_dir / INTERACTIONS).filter(pl.col("split") == "train")
    for example in examples:
        user = text(example, "user_id")[0]
        assert set(text(example, "seen_item_ids")) == expected.get(user, set())
        of_user = shown.filter(pl.col("user_id") == user).sort("event_time_unix_s")
        assert text(example, "impression_item_ids") == of_user["item_id"].to_list()[-50:]
        clicks = example.features.feature["impression_click"].float_list.value
        assert list(clicks) == of_user["click"].to_list()[-50:]


def test_the_catalogue_holds_every_item_once_in_one_file(
    tables_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = generate(ExampleKind.CATALOGUE, tables_dir, tmp_path, monkeypatch)
    (examples,) = files["catalogue"]
    assert sorted(text(e, "item_id")[0] for e in examples) == sorted(f"i{i}" for i in range(20))
    assert text(examples[0], "tags") == ["a"]
    assert list(examples[0].features.feature["upload_time_unix_s"].int64_list.value) == [START]
    # As of the end of training: its 360 rows.
    train = pl.read_parquet(tables_dir / INTERACTIONS).filter(pl.col("split") == "train")
    for example in examples:
        mine = train.filter(pl.col("item_id") == text(example, "item_id")[0])
        counts = example.features.feature["item_counts"].float_list.value
        assert counts[:2] == [360, train["click"].sum()]
        assert counts[2:4] == [len(mine), mine["click"].sum()]


@pytest.mark.parametrize("num_shards", [1, 3, 64])
def test_partitions_of_a_row_group_hold_its_rows_once(tables_dir: Path, num_shards: int) -> None:
    groups = example_gen._row_groups(tables_dir, ExampleKind.INTERACTIONS)
    rows: list[int] = []
    shards: dict[str, set[int]] = {}
    for group in groups:
        for shard, (name, data) in example_gen._partition(group, str(tables_dir), num_shards):
            part = pl.read_ipc(data)
            assert 0 <= shard < num_shards
            for user in part["user_id"]:
                shards.setdefault(user, set()).add(shard)
            rows += part["position"].to_list() if name == INTERACTIONS else []
    assert sorted(rows) == list(range(ROWS))
    assert len(shards) == NUM_USERS
    assert all(len(found) == 1 for found in shards.values())


def test_the_component_names_the_splits_and_carries_the_declaration(tables_dir: Path) -> None:
    component = contract_example_gen(ExampleKind.INTERACTIONS, str(tables_dir), SPEC, 7, "1")
    assert component.id == "InteractionGen"
    output = example_gen_pb2.Output()
    proto_utils.json_to_proto(component.exec_properties["output_config"], output)
    assert [split.name for split in output.split_config.splits] == ["train", "eval", "test"]
    config = example_gen_pb2.CustomConfig()
    proto_utils.json_to_proto(component.exec_properties["custom_config"], config)
    settings = struct_pb2.Struct()
    config.custom_config.Unpack(settings)
    assert dataset_spec_from_json(json_format.MessageToDict(settings)["dataset"]) == SPEC
    assert settings["max_positives_per_user"] == 7
