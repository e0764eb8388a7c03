"""A checkpoint gives back the trained model, or says why it cannot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft

from schema.errors import CheckpointError
from tests.trainer import retrieval_world as world
from trainer.checkpoint import (
    CHECKPOINT_DIR,
    Network,
    catalogue_files,
    read_checkpoint,
    write_checkpoint,
)
from trainer.config import RankingConfig, RetrievalConfig

CONFIG = RetrievalConfig(seed=7)
ROWS = world.training_window(num_examples=50)


class Tiny(tf.keras.Model):
    """Embeds the item, then a dense layer; the item table also has a second owner, and there is a metric."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.items = tf.keras.layers.Embedding(world.NUM_ITEMS + 2, width)
        self.dense = tf.keras.layers.Dense(2)
        self.only_for_training = tf.keras.layers.Embedding(4, 4)
        self.only_for_training.build(None)
        self.mean_loss = tf.keras.metrics.Mean("mean_loss")

    def call(self, rows: dict[str, tf.Tensor]) -> tf.Tensor:
        return self.dense(self.items(rows["item_id_id"]))


def network(model: Tiny, factor: float = 1.0) -> Network:
    return Network(model, [model.items, model.dense], lambda rows: {"output": factor * model(rows)})


@pytest.fixture
def model() -> Tiny:
    tf.keras.utils.set_random_seed(0)
    return Tiny()


@pytest.fixture
def model_dir(model: Tiny, tmp_path: Path) -> Path:
    transform = tmp_path / "transform"
    for name, content in (("transform_fn/assets/item_id", "a\nb\n"), ("transformed_metadata/schema", "s")):
        (transform / name).parent.mkdir(parents=True)
        (transform / name).write_text(content)
    (tmp_path / "catalogue.gz").write_bytes(b"items")
    write_checkpoint(
        tmp_path / "model",
        network(model),
        ROWS,
        spec=world.SPEC,
        config=CONFIG,
        transform_output=tft.TFTransformOutput(str(transform)),
        catalogue=[str(tmp_path / "*.gz")],
        settings={"widths": {"item_id": 4}},
        arrays={"log_q": np.arange(3.0)},
    )
    return tmp_path / "model"


def edit_manifest(model_dir: Path, **changes: Any) -> None:
    path = model_dir / CHECKPOINT_DIR / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_comes_back(model_dir: Path) -> None:
    checkpoint = read_checkpoint(model_dir)
    assert checkpoint.spec == world.SPEC
    assert checkpoint.read_config(RetrievalConfig) == CONFIG
    assert checkpoint.settings == {"widths": {"item_id": 4}}
    np.testing.assert_array_equal(checkpoint.arrays["log_q"], [0, 1, 2])
    assert checkpoint.transform_output.vocabulary_by_name("item_id") == [b"a", b"b"]
    assert [Path(file).read_bytes() for file in catalogue_files(model_dir)] == [b"items"]


def test_the_rows_that_are_kept_hold_all_that_a_model_reads_and_no_labels(
    model: Tiny, model_dir: Path, tmp_path: Path
) -> None:
    read = ("item_id_id", "impression_item_ids_ids", "impression_ages_s", "impression_click")
    read += ("item_counters", "label_means_so_far")
    rows = {**dict.fromkeys(read, np.zeros((50, 2), np.int32)), "item_id_id": ROWS["item_id_id"]}
    transform = read_checkpoint(model_dir).transform_output.transform_savedmodel_dir
    write_checkpoint(
        tmp_path / "ranker",
        network(model),
        {**rows, "click": np.ones(50, np.float32), "retrieval_weight": np.ones(50, np.float32)},
        spec=world.SPEC,
        config=CONFIG,
        transform_output=tft.TFTransformOutput(str(Path(transform).parent)),
        catalogue=[str(tmp_path / "*.gz")],
    )
    with np.load(tmp_path / "ranker" / CHECKPOINT_DIR / "probe.npz") as probe:
        assert set(probe.files) == set(read)
        assert {len(probe[name]) for name in probe.files} == {32}


def test_a_model_that_is_restored_answers_as_the_trained_one(model: Tiny, model_dir: Path) -> None:
    other = Tiny()
    assert not np.allclose(other(ROWS), model(ROWS))
    checkpoint = read_checkpoint(model_dir)
    checkpoint.restore(network(other))
    np.testing.assert_array_equal(other(ROWS), model(ROWS))
    # Neither metrics nor what only training needs.
    assert set(checkpoint.weights) == {"items.embeddings", "dense.kernel", "dense.bias"}


def test_code_that_builds_other_weights_is_refused(model_dir: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"other weights: dense.kernel is \(5, 2\), was \(3, 2\)"
    ) as error:
        read_checkpoint(model_dir).restore(network(Tiny(width=5)))
    assert "funnel run" in str(error.value)


def test_code_that_computes_something_else_from_the_same_weights_is_refused(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="other outputs from the same weights: 'output' is off by"):
        read_checkpoint(model_dir).restore(network(Tiny(), factor=1.1))


def test_a_model_of_an_older_version_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint .* exported by an older version"):
        read_checkpoint(tmp_path)
    assert catalogue_files(tmp_path) == []


def test_a_checkpoint_of_another_format_is_refused(model_dir: Path) -> None:
    edit_manifest(model_dir, format=3, version="9.9.9")
    with pytest.raises(CheckpointError, match=r"has format 3, written by Funnel 9\.9\.9; .* reads format 2"):
        read_checkpoint(model_dir)


def test_a_declaration_of_another_version_is_refused(model_dir: Path) -> None:
    edit_manifest(model_dir, dataset=json.dumps({"name": "x", "surprise": 1}), version="9.9.9")
    with pytest.raises(CheckpointError, match=r"written by Funnel 9\.9\.9, declares its dataset"):
        read_checkpoint(model_dir)


def test_settings_of_another_version_are_refused(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="no meaning to its settings"):
        read_checkpoint(model_dir).read_config(RankingConfig)


def test_a_copy_has_another_catalogue_and_restores_alike(
    model: Tiny, model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "newer.gz").write_bytes(b"more items")
    read_checkpoint(model_dir).copy_to(tmp_path / "copy", [str(tmp_path / "newer.gz")])
    assert [Path(file).read_bytes() for file in catalogue_files(tmp_path / "copy")] == [b"more items"]
    other = Tiny()
    read_checkpoint(tmp_path / "copy").restore(network(other))
    np.testing.assert_array_equal(other(ROWS), model(ROWS))
