"""Windows and batches: every row once per epoch, in an order that a seed decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from schema.contract import DatasetSpec
from schema.errors import ConfigError, DataError
from trainer.input_pipeline import (
    expand,
    load_catalogue,
    ordered_batches,
    rows_of_surfaces,
    shuffled_batches,
    windows,
)

SPEC = DatasetSpec.model_validate(
    {
        "name": "small",
        "interactions": {
            "files": ["a.csv"],
            "columns": {name: name for name in ("user_id", "item_id", "event_time_unix_s")},
            "labels": {"click": "click"},
        },
        "users": {"files": ["u.csv"], "columns": {"user_id": "user_id"}},
        "items": {
            "files": ["i.csv"],
            "columns": {"item_id": "item_id", "upload_time_unix_s": "upload"},
            "features": [{"name": "tags", "kind": "multi_categorical"}],
        },
        "positive": "click",
        "tasks": [{"name": "click", "label": "click", "kind": "binary"}],
        "split": {"fractions": [0.8, 0.1, 0.1]},
    }
)


class RowTransform:
    """Stands for a Transform output whose graph changes nothing."""

    def raw_feature_spec(self) -> dict[str, Any]:
        """A number per row, a list per row and a label."""
        return {
            "row": tf.io.FixedLenFeature([], tf.int64),
            "tags_ids": tf.io.VarLenFeature(tf.int64),
            "click": tf.io.FixedLenFeature([], tf.float32),
        }

    def transform_features_layer(self) -> Any:
        """The identity."""
        return dict


class SurfaceVocabulary:
    """Stands for a Transform output that has met two surfaces; their ids are 2 and 3."""

    def vocabulary_by_name(self, name: str) -> list[bytes]:
        """The surfaces by descending frequency."""
        return {"surface": [b"home", b"search"]}[name]


class ItemTransform:
    """Stands for a Transform output that turns "i7" into 7, a tag into its length, and keeps counts."""

    def transform_features_layer(self) -> Any:
        """Item ids and tags as numbers; counts split into those of the item and the last one of the log."""

        def layer(raw: dict[str, tf.SparseTensor]) -> dict[str, Any]:
            if "item_counts" in raw:
                counts = tf.sparse.to_dense(raw["item_counts"])
                return {"item_counters": counts[:, 2:], "label_means_so_far": counts[:, 1:2]}
            item, tags = raw["item_id"], raw["tags"]
            numbers = tf.strings.to_number(tf.strings.substr(item.values, 1, 9), tf.int64)
            lengths = tf.cast(tf.strings.length(tags.values), tf.int64)
            return {
                "item_id_id": tf.scatter_nd(item.indices[:, :1], numbers, item.dense_shape[:1]),
                "tags_ids": tf.SparseTensor(tags.indices, lengths, tags.dense_shape),
            }

        return layer


def write(path: Path, examples: list[dict[str, list[Any]]]) -> None:
    """Writes gzipped examples; an empty list is an absent value."""
    with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
        for values in examples:
            example = tf.train.Example()
            for name, value in values.items():
                kinds = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
                if value:
                    getattr(example.features.feature[name], kinds[type(value[0])]).value.extend(value)
            writer.write(example.SerializeToString())


def parsed(tmp_path: Path, rows: int, window: int) -> tf.data.Dataset:
    """Windows over two files that hold the rows 0, 1, ...; row r has r % 3 tags of id r + 1."""
    examples: list[dict[str, list[Any]]] = [
        {"row": [r], "tags_ids": [r + 1] * (r % 3), "click": [float("nan") if r == 1 else r / 2]}
        for r in range(rows)
    ]
    write(tmp_path / "part-0.gz", examples[: rows // 2])
    write(tmp_path / "part-1.gz", examples[rows // 2 :])
    return windows([str(tmp_path / "part-*.gz")], RowTransform(), window)


def epoch(dataset: tf.data.Dataset) -> list[list[int]]:
    """The rows of every batch, after a check that the columns of a batch belong together."""
    batches = []
    for batch in dataset:
        rows = batch["row"].numpy().tolist()
        for row, tags, click in zip(rows, batch["tags_ids"].numpy(), batch["click"].numpy(), strict=True):
            assert [t for t in tags if t] == [row + 1] * (row % 3)
            assert np.isnan(click) if row == 1 else click == row / 2
        batches.append(rows)
    return batches


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("chunk", [100, 4, 1])
def test_a_window_holds_dense_int32_and_float32_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("trainer.input_pipeline._CHUNK_EXAMPLES", chunk)
    (window,) = list(parsed(tmp_path, 6, 100))
    assert {name: value.dtype for name, value in window.items()} == {
        "row": tf.int32,
        "tags_ids": tf.int32,
        "click": tf.float32,
    }
    assert window["tags_ids"].numpy().tolist() == [[0, 0], [2, 0], [3, 3], [0, 0], [5, 0], [6, 6]]


@pytest.mark.parametrize("chunk", [100, 4, 1])
@pytest.mark.parametrize("window", [100, 8, 4], ids=["one window", "three windows", "five windows"])
def test_every_row_comes_once_per_epoch_and_in_a_new_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, chunk: int
) -> None:
    monkeypatch.setattr("trainer.input_pipeline._CHUNK_EXAMPLES", chunk)
    dataset = shuffled_batches(parsed(tmp_path, 20, window), 4, seed=1)
    epochs = [flat(epoch(dataset)) for _ in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(20))
    assert len({tuple(rows) for rows in epochs}) == 3
    assert list(range(20)) not in epochs


def test_one_window_is_shuffled_as_a_whole(tmp_path: Path) -> None:
    dataset = shuffled_batches(parsed(tmp_path, 200, 1_000), 50, seed=1)
    first = epoch(dataset)[0]
    # 50 of 200 rows by chance: the mean lies within 4 standard errors (57.7 / sqrt(50) = 8.2) of 99.5.
    assert abs(np.mean(first) - 99.5) < 33
    assert len(set(np.array(first) // 50)) == 4


def test_the_seed_decides_the_order_of_all_epochs(tmp_path: Path) -> None:
    dataset = parsed(tmp_path, 20, 8)
    orders = []
    for seed in (1, 1, 2):
        shuffled = shuffled_batches(dataset, 4, seed=seed)
        orders.append([epoch(shuffled) for _ in range(2)])
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[2][0]


@pytest.mark.parametrize(
    ("rows", "window", "batch", "sizes"),
    [
        pytest.param(10, 100, 4, [4, 4], id="the remainder is dropped"),
        pytest.param(3, 100, 4, [3], id="a small data set is one batch"),
        pytest.param(4, 100, 4, [4], id="exactly one batch"),
        pytest.param(10, 5, 4, [4, 4], id="a remainder per window"),
        pytest.param(7, 5, 4, [4, 2], id="a small last window is one batch"),
    ],
)
def test_batches_are_full_but_for_a_window_that_is_smaller(
    tmp_path: Path, rows: int, window: int, batch: int, sizes: list[int]
) -> None:
    batches = epoch(shuffled_batches(parsed(tmp_path, rows, window), batch, seed=0))
    assert [len(b) for b in batches] == sizes
    assert len(set(flat(batches))) == sum(sizes)


def test_a_dropped_remainder_is_another_one_each_time(tmp_path: Path) -> None:
    dataset = shuffled_batches(parsed(tmp_path, 7, 100), 4, seed=0)
    assert set().union(*(flat(epoch(dataset)) for _ in range(10))) == set(range(7))


@pytest.mark.parametrize("window", [100, 6])
def test_only_kept_rows_take_part(tmp_path: Path, window: int) -> None:
    dataset = parsed(tmp_path, 18, window)
    keep = lambda columns: columns["row"] % 3 == 0  # noqa: E731
    assert sorted(flat(epoch(shuffled_batches(dataset, 2, 0, keep)))) == [0, 3, 6, 9, 12, 15]
    assert flat(epoch(ordered_batches(dataset, 4, keep))) == [0, 3, 6, 9, 12, 15]


def test_windows_without_a_kept_row_give_no_batch(tmp_path: Path) -> None:
    dataset = parsed(tmp_path, 12, 4)
    keep = lambda columns: columns["row"] >= 8  # noqa: E731
    assert sorted(flat(epoch(shuffled_batches(dataset, 2, 0, keep)))) == [8, 9, 10, 11]
    assert epoch(ordered_batches(dataset, 3, keep)) == [[8, 9, 10], [11]]


@pytest.mark.parametrize(
    ("window", "expected"), [(100, [[0, 1, 2], [3, 4, 5], [6]]), (5, [[0, 1, 2], [3, 4], [5, 6]])]
)
def test_ordered_batches_hold_all_rows_in_file_order(
    tmp_path: Path, window: int, expected: list[list[int]]
) -> None:
    dataset = ordered_batches(parsed(tmp_path, 7, window), 3)
    assert epoch(dataset) == expected
    assert epoch(dataset) == expected


def test_files_are_found_sorted_and_their_absence_is_told(tmp_path: Path) -> None:
    for name in ("b.gz", "a.gz"):
        (tmp_path / name).touch()
    assert expand([f"{tmp_path}/*.gz"]) == [f"{tmp_path}/a.gz", f"{tmp_path}/b.gz"]
    with pytest.raises(DataError, match=r"no example files match .*nothing"):
        expand([f"{tmp_path}/nothing*"])


def item(name: bytes, tags: int, upload: list[int], shown: float = 1.0) -> dict[str, list[Any]]:
    return {
        "item_id": [name] if name else [],
        "tags": [b"xx"] * tags,
        "upload_time_unix_s": upload,
        # Of the log 9 impressions and 4 clicks; of the item, in three windows, impressions and clicks.
        "item_counts": [9.0, 4.0, *[shown, shown / 2] * 3],
    }


def test_the_catalogue_is_read_over_several_batches_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.input_pipeline._CHUNK_EXAMPLES", 2)
    write(tmp_path / "a.gz", [item(b"i5", 0, [7], shown=2.0), item(b"i6", 1, [])])
    write(tmp_path / "b.gz", [item(b"i7", 3, [9], shown=6.0)])
    catalogue = load_catalogue([f"{tmp_path}/*.gz"], ItemTransform(), SPEC)
    assert len(catalogue) == 3
    assert catalogue.item_ids.tolist() == ["i5", "i6", "i7"]
    assert catalogue.transformed["item_id_id"].tolist() == [5, 6, 7]
    assert catalogue.transformed["tags_ids"].tolist() == [[0, 0, 0], [2, 0, 0], [2, 2, 2]]
    assert catalogue.upload_time_unix_s is not None
    assert catalogue.upload_time_unix_s.tolist() == [7, -1, 9]
    # The last row is that of an item without any event in the same log.
    assert catalogue.counters["item_counters"][:, :2].tolist() == [[2, 1], [1, 0.5], [6, 3], [0, 0]]
    assert catalogue.counters["label_means_so_far"].tolist() == [[4]] * 4


def test_item_ids_may_be_of_any_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ItemTransform().transform_features_layer()
    ids = {"item_id_id": tf.constant([2], tf.int64), "tags_ids": tf.constant([[2]], tf.int64)}
    monkeypatch.setattr(
        ItemTransform,
        "transform_features_layer",
        lambda self: lambda raw: layer(raw) if "item_counts" in raw else ids,
    )
    write(tmp_path / "items.gz", [item("été-猫".encode(), 1, [])])
    assert load_catalogue([f"{tmp_path}/items.gz"], ItemTransform(), SPEC).item_ids.tolist() == ["été-猫"]


@pytest.mark.parametrize(
    ("items", "told"),
    [
        pytest.param([], "has no items", id="no items"),
        pytest.param([item(b"i1", 1, []), item(b"i1", 2, [])], "2 rows but 1 distinct", id="twice"),
        pytest.param([item(b"i1", 1, []), item(b"", 1, [])], "2 rows but 1 distinct, non-empty", id="no id"),
    ],
)
def test_a_catalogue_that_cannot_be_served_is_refused(
    tmp_path: Path, items: list[dict[str, list[Any]]], told: str
) -> None:
    write(tmp_path / "items.gz", items)
    with pytest.raises(DataError, match=told):
        load_catalogue([f"{tmp_path}/items.gz"], ItemTransform(), SPEC)


def test_a_missing_catalogue_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no example files match"):
        load_catalogue([f"{tmp_path}/none*"], ItemTransform(), SPEC)


def _with_surface(spec: DatasetSpec) -> DatasetSpec:
    declared = spec.model_dump()
    declared["interactions"]["columns"]["surface"] = "surface"
    return DatasetSpec.model_validate(declared)


@pytest.mark.parametrize(
    ("surfaces", "rows"), [(("search",), [[1], [4]]), (("home", "search"), [[0, 1], [3, 4]])]
)
def test_only_the_rows_of_the_named_surfaces_stay(surfaces: tuple[str, ...], rows: list[list[int]]) -> None:
    # An absent surface is 0, one outside the vocabulary 1.
    columns = {"surface_id": tf.constant([[2, 3, 0], [2, 3, 1]]), "row": tf.constant([[0, 1, 2], [3, 4, 5]])}
    data = tf.data.Dataset.from_tensor_slices(columns)
    chosen = rows_of_surfaces(data, surfaces, _with_surface(SPEC), SurfaceVocabulary())
    assert [window["row"].numpy().tolist() for window in chosen] == rows


def test_surfaces_that_training_never_met_are_refused() -> None:
    nothing = tf.data.Dataset.from_tensors({"surface_id": tf.constant([2])})
    with pytest.raises(ConfigError, match=r"surfaces names hme, .* there are home, search"):
        rows_of_surfaces(nothing, ("hme", "home"), _with_surface(SPEC), SurfaceVocabulary())
    with pytest.raises(ConfigError, match="'small' maps no surface"):
        rows_of_surfaces(nothing, ("home",), SPEC, SurfaceVocabulary())
