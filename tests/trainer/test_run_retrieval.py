"""A run that starts from an exported model: what it keeps by value, and which models it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import DatasetSpec
from schema.errors import ConfigError
from tests.trainer import retrieval_world as world
from trainer import run_retrieval
from trainer.checkpoint import CHECKPOINT_DIR, write_checkpoint
from trainer.config import RetrievalConfig
from trainer.preprocessing import vocabulary_sizes
from trainer.retrieval import RetrievalModel
from trainer.warm_start import towers

CONFIG = RetrievalConfig(embedding_dim=8, hidden_layers=(16,), warm_start=True)
TRAIN_END = 1_700_000_000
OLD_ITEMS = [f"i{n}" for n in range(20)]
# Known items under other ids, one of them gone, and enough new ones for wider embeddings in a cold start.
NEW_ITEMS = [*(f"new{n}" for n in range(300)), *OLD_ITEMS[:0:-1]]


def transform_output(folder: Path, items: list[str]) -> tft.TFTransformOutput:
    """What Transform writes, as far as it tells vocabularies."""
    values = {"user_id": ["u0"], "item_id": items, "segment": ["s0", "s1"], "genres": ["g0", "g1"]}
    (folder / "transformed_metadata").mkdir(parents=True)
    assets = folder / "transform_fn" / "assets"
    assets.mkdir(parents=True)
    for space, vocabulary in values.items():
        (assets / space).write_text("".join(f"{value}\n" for value in vocabulary))
    return tft.TFTransformOutput(str(folder))


def examples(items: list[str], asked: list[str]) -> dict[str, tf.Tensor]:
    """Transformed rows: about each item asked for, of a user who has seen just that item."""
    ids = np.array([items.index(item) + 2 for item in asked])
    rows = world.query_columns(np.zeros(len(ids), np.int64), np.zeros((len(ids), 1), np.int64))
    rows |= {"history_item_ids_ids": ids[:, np.newaxis], "item_id_id": ids}
    rows["genres_ids"] = np.full((len(ids), 1), 2)
    return {name: tf.constant(column) for name, column in rows.items()}


def counted(items: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Log q, all items being as popular, and no popularity of the day."""
    num_ids = len(items) + 2
    return np.full(num_ids, -np.log(len(items)), np.float32), np.zeros((num_ids, 1, 0), np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RetrievalModel]:
    """An exported model, whose weights are none that a new model has."""
    folder = tmp_path_factory.mktemp("base")
    transform = transform_output(folder / "transform", OLD_ITEMS)
    log_q, popularity = counted(OLD_ITEMS)
    tf.keras.utils.set_random_seed(1)
    model = RetrievalModel(CONFIG, world.SPACE, vocabulary_sizes(transform, world.SPEC), log_q, popularity)
    rows = examples(OLD_ITEMS, OLD_ITEMS)
    towers(model).answer(rows)
    for variable in towers(model).variables().values():
        variable.assign_add(tf.random.normal(variable.shape, stddev=0.1))
    (folder / "items.gz").write_bytes(b"")
    write_checkpoint(
        folder / "model",
        towers(model),
        rows,
        spec=world.SPEC,
        config=CONFIG,
        transform_output=transform,
        catalogue=[str(folder / "items.gz")],
        settings={"embedding_widths": dict(model.embedding_widths), "train_end_unix_s": TRAIN_END},
        arrays={"log_q": log_q, "popularity": popularity},
    )
    return folder / "model", model


def started(
    model_dir: Path, folder: Path, spec: DatasetSpec = world.SPEC, train_end_unix_s: int = TRAIN_END
) -> RetrievalModel:
    """What a run with the new items starts from."""
    log_q, popularity = counted(NEW_ITEMS)
    transform = transform_output(folder / "transform", NEW_ITEMS)
    probe = examples(NEW_ITEMS, NEW_ITEMS[:1])
    tf.keras.utils.set_random_seed(2)
    return run_retrieval._started_from(
        str(model_dir), train_end_unix_s, CONFIG, spec, transform, log_q, popularity, None, probe
    )


def test_known_items_keep_their_vectors_by_id_in_a_grown_catalogue(
    base: tuple[Path, RetrievalModel], tmp_path: Path
) -> None:
    model_dir, trained = base
    model = started(model_dir, tmp_path)
    known = OLD_ITEMS[1:]
    before = towers(trained).answer(examples(OLD_ITEMS, known))
    after = towers(model).answer(examples(NEW_ITEMS, known))
    np.testing.assert_allclose(after["query"], before["query"], atol=1e-6)
    # The last dimension is the item bias, which starts from the popularity in the new data.
    np.testing.assert_allclose(after["candidate"][:, :-1], before["candidate"][:, :-1], atol=1e-6)
    new = towers(model).answer(examples(NEW_ITEMS, ["new0", "new1"]))["candidate"].numpy()
    assert not np.allclose(new[0, :-1], new[1, :-1], atol=1e-4)
    assert model.embedding_widths == trained.embedding_widths


@pytest.mark.parametrize(
    ("base_features", "new_features", "complaint"),
    [
        pytest.param(["segment", "country"], ["segment"], "country", id="a feature less"),
        pytest.param(["segment"], ["segment", "country"], "country", id="a feature more"),
        pytest.param(["country", "segment"], ["segment", "country"], "another order", id="another order"),
    ],
)
def test_a_base_with_other_features_is_refused(
    base_features: list[str],
    new_features: list[str],
    complaint: str,
    base: tuple[Path, RetrievalModel],
    tmp_path: Path,
) -> None:
    def spec(names: list[str]) -> DatasetSpec:
        values = world.SPEC.model_dump()
        values["users"]["features"] = [{"name": name, "kind": "categorical"} for name in names]
        return DatasetSpec.model_validate(values)

    model_dir = tmp_path / "model"
    shutil.copytree(base[0], model_dir)
    manifest = model_dir / CHECKPOINT_DIR / "manifest.json"
    written = json.loads(manifest.read_text()) | {"dataset": spec(base_features).model_dump_json()}
    manifest.write_text(json.dumps(written))
    with pytest.raises(ConfigError, match=rf"the features .* blessed model \({complaint}\); start anew with"):
        started(model_dir, tmp_path, spec(new_features))


def test_a_base_that_was_trained_later_is_refused(base: tuple[Path, RetrievalModel], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it may know what this run is judged on"):
        started(base[0], tmp_path, train_end_unix_s=TRAIN_END - 1)
