"""Reading examples back: all keys, a fair sample, and files that are absent."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import DataError
from tfx_pipeline.leakage import recorded

DTYPES = {"user_id": "string", "item_id": "string", "event_time_unix_s": "int64", "score": "float32"}
NUM_ROWS = 500


def write(folder: Path) -> str:
    """Rows 0 to NUM_ROWS - 1 over two files; every third row has no score."""
    for part in range(2):
        path = str(folder / f"{part}.gz")
        with tf.io.TFRecordWriter(path, tf.io.TFRecordOptions(compression_type="GZIP")) as writer:
            for row in range(part * NUM_ROWS // 2, (part + 1) * NUM_ROWS // 2):
                example = tf.train.Example()
                values = example.features.feature
                values["user_id"].bytes_list.value.append(b"u%d" % (row % 7))
                values["item_id"].bytes_list.value.append(b"i")
                values["event_time_unix_s"].int64_list.value.append(row)
                values["score"].float_list.value.extend([row / 2] if row % 3 else [])
                writer.write(example.SerializeToString())
    return str(folder / "*.gz")


def test_every_key_is_read_and_the_sample_keeps_its_features(tmp_path: Path) -> None:
    counted: list[int] = []
    found = recorded.read_split(write(tmp_path), DTYPES, 40, seed=1, on_rows=counted.append)
    assert found.keys["event_time_unix_s"].to_list() == list(range(NUM_ROWS))
    assert sum(counted) == NUM_ROWS
    assert len(found.sample) == 40
    for row in found.sample.iter_rows(named=True):
        (time,) = row["event_time_unix_s"]
        assert row["user_id"] == [f"u{time % 7}"]
        assert row["score"] == ([time / 2] if time % 3 else [])


def test_a_sample_is_drawn_from_all_rows_evenly(tmp_path: Path) -> None:
    pattern = write(tmp_path)
    times = [
        time
        for seed in range(40)
        for time in recorded.read_sample(pattern, DTYPES, 50, seed)["event_time_unix_s"].list.first()
    ]
    # 2,000 draws, 200 of each tenth of the rows: four standard deviations are 54.
    tenths = np.bincount(np.array(times) * 10 // NUM_ROWS, minlength=10)
    assert len(times) == 2_000
    assert np.abs(tenths - 200).max() < 54


def test_a_split_smaller_than_the_sample_is_taken_whole(tmp_path: Path) -> None:
    assert len(recorded.read_sample(write(tmp_path), DTYPES, 10_000, seed=0)) == NUM_ROWS


def test_absent_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no example files"):
        recorded.read_split(str(tmp_path / "*.gz"), DTYPES, 1, seed=0)


def test_a_feature_of_another_type_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="user_id"):
        recorded.read_sample(write(tmp_path), {"user_id": "float32"}, 5, seed=0)
