"""The ranker from examples to a served model and from its checkpoint back, on a real Transform graph."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam
from tensorflow_transform.tf_metadata import dataset_metadata, metadata_io

from schema.contract import DatasetSpec, load_dataset_spec
from schema.errors import CheckpointError
from trainer import features, raw_inputs, run_ranking
from trainer.balancing_config import BalancingConfig
from trainer.body_config import BehaviourConfig, ExpertsConfig
from trainer.calibration import Calibrator
from trainer.checkpoint import read_checkpoint
from trainer.config import RankingConfig
from trainer.debiasing_config import PositionConfig
from trainer.distillation import SURVIVAL
from trainer.preprocessing import preprocessing_fn
from trainer.preranker_config import PrerankerConfig
from trainer.ranking import RankingModel
from trainer.run_ranking import PRERANKER_LOG, TRAINING_LOG, position_tasks, refresh, run_fn
from trainer.tfx_schema import interactions_schema

TRAIN_END = 1_704_067_200
NUM_USERS, NUM_ITEMS = 20, 12
NUM_COUNTS = 3 + 2 * 2 * 3  # the log; two keys in two windows
Row = dict[str, Any]

SPEC = DatasetSpec.model_validate(
    {
        "name": "run",
        "interactions": {
            "files": ["log.csv"],
            "columns": {
                name: name
                for name in ("user_id", "item_id", "event_time_unix_s", "surface", "position", "watch_time_s")
            },
            "labels": {"click": "click"},
        },
        "users": {"files": ["users.csv"], "columns": {"user_id": "user_id"}},
        "items": {
            "files": ["items.csv"],
            "columns": {"item_id": "item_id", "creator_id": "creator", "upload_time_unix_s": "upload"},
            "features": [{"name": "length", "kind": "continuous"}],
        },
        "positive": "click",
        "tasks": [
            {"name": "click", "label": "click", "kind": "binary", "score_weight": 1.0},
            {
                "name": "watch",
                "label": "watch_time_s",
                "kind": "watch_time",
                "method": "ordinal",
                "score_weight": 0.01,
            },
        ],
        "split": {"fractions": [0.8, 0.1, 0.1]},
        "counters": {"keys": ["item_id", "creator_id"], "windows_days": [1]},
    }
)
# Something of everything that a checkpoint has to keep, or that an export has to leave out.
CONFIG = RankingConfig(
    max_embedding_width=4,
    item_vectors="cooccurrence",
    crosses=(("surface", "length"),),
    experts=ExpertsConfig(hidden_layers=(8,)),
    behaviour=BehaviourConfig(kind="din", attention_layers=(8,)),
    position=PositionConfig(kind="additive", max_position=3),
    balancing=BalancingConfig(method="uncertainty"),
    preranker=PrerankerConfig(
        num_kept=9, vector_width=8, tower_width=8, hidden_layers=(8,), num_candidates=8
    ),
    batch_size=64,
    learning_rate=0.01,
    max_epochs=2,
)
QUERY = (*features.raw_query_inputs(SPEC), *features.raw_impression_inputs(SPEC))
CANDIDATE = features.raw_candidate_inputs(SPEC)
DTYPES = {raw.name: raw.dtype for raw in (*QUERY, *CANDIDATE)} | dict.fromkeys(
    ("item_counts", "click", "watch_time_s", "retrieval_weight"), "float32"
)
DTYPES["position"] = "int64"
LOG = [900.0, 400.0, 5_000.0]


def item(number: int) -> Row:
    """Raw features of an item in the catalogue, as lists of values."""
    rng = np.random.default_rng(number)
    return {
        "item_id": [f"i{number}"],
        "creator_id": [f"c{number % 3}"],
        "upload_time_unix_s": [TRAIN_END - 86_400 * (number + 1)] if number else [],
        "length": [float(np.float32(rng.uniform(0, 9)))],
        "item_counts": LOG + [float(count) for count in rng.integers(0, 50, NUM_COUNTS - len(LOG))],
    }


def query(rng: np.random.Generator, user: int, event_time_unix_s: int) -> Row:
    """Raw features of a request, as lists of values."""
    num = int(rng.integers(0, 5))
    return {
        "user_id": [f"u{user}"],
        "surface": [["home"], ["feed"], []][rng.integers(3)],
        "event_time_unix_s": [event_time_unix_s],
        "history_item_ids": [f"i{n}" for n in rng.integers(NUM_ITEMS, size=num)],
        "impression_item_ids": [f"i{n}" for n in rng.integers(NUM_ITEMS, size=num)],
        "impression_event_time_unix_s": [event_time_unix_s - int(s) for s in rng.integers(9, 900_000, num)],
        "impression_surfaces": [["home", "feed", ""][n] for n in rng.integers(3, size=num)],
        "impression_click": [float(n) for n in rng.integers(2, size=num)],
        "impression_watch_time_s": [[0.0, 2.5, math.nan][n] for n in rng.integers(3, size=num)],
    }


def interactions(count: int, seed: int, click_rate: float) -> list[Row]:
    """Examples whose clicks depend on user and item; the counts are those of the catalogue."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        user, number = int(rng.integers(NUM_USERS)), int(rng.integers(NUM_ITEMS))
        chance = click_rate * (1.5 if user % 2 == number % 2 else 0.5)
        click = float(rng.random() < chance)
        rows.append(
            {
                **query(rng, user, TRAIN_END - int(rng.integers(86_400 * 20))),
                **item(number),
                "position": [int(rng.integers(6))],
                "click": [click],
                "watch_time_s": [float(np.float32(click * rng.exponential(20)))],
                "retrieval_weight": [click],
            }
        )
    return rows


def example(row: Row) -> bytes:
    result = tf.train.Example()
    for name, values in row.items():
        feature = result.features.feature[name]
        if DTYPES[name] == "string":
            feature.bytes_list.value.extend(value.encode() for value in values)
        else:
            kind = {"int64": feature.int64_list, "float32": feature.float_list}[DTYPES[name]]
            kind.value.extend(values)
    return result.SerializeToString()


def write(path: Path, rows: list[Row]) -> str:
    with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
        for row in rows:
            writer.write(example(row))
    return str(path)


def request(queries: list[Row], candidates: list[str]) -> dict[str, tf.Tensor]:
    """The queries as one request for the same candidates."""
    inputs = {}
    for raw in QUERY:
        missing = raw_inputs.MISSING[raw.dtype]
        width = max(len(row[raw.name]) for row in queries) if raw.is_list else 1
        filled = [[*row[raw.name], *[missing] * (width - len(row[raw.name]))] for row in queries]
        tensor = tf.constant(filled, raw.dtype, [len(queries), width])
        inputs[raw.name] = tensor if raw.is_list else tensor[:, 0]
    return {**inputs, "candidate_item_ids": tf.constant([candidates] * len(queries))}


@dataclasses.dataclass
class Trained:
    """What `run_fn` wrote."""

    model_dir: Path
    log: list[dict[str, Any]]
    preranker: dict[str, Any]
    eval_rows: list[Row]
    catalogue: str
    users: str


def transform_graph(folder: Path, rows: list[Row]) -> Path:
    metadata = dataset_metadata.DatasetMetadata(interactions_schema(SPEC))
    config = {"dataset": SPEC.model_dump_json(), "train_end_unix_s": TRAIN_END}
    with tft_beam.Context(temp_dir=str(folder / "tmp"), desired_batch_size=len(rows)):
        transform_fn = (rows, metadata) | tft_beam.AnalyzeDataset(
            lambda inputs: preprocessing_fn(inputs, config)
        )
        _ = transform_fn | tft_beam.WriteTransformFn(str(folder / "out"))
    metadata_io.write_metadata(metadata, str(folder / "out" / tft.TFTransformOutput.RAW_METADATA_DIR))
    return folder / "out"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A ranker trained on rows with twice as many clicks as the eval split has."""
    folder = tmp_path_factory.mktemp("run")
    train_rows, eval_rows = interactions(600, 1, 0.6), interactions(1_200, 2, 0.3)
    catalogue = write(folder / "items.gz", [item(number) for number in range(NUM_ITEMS)])
    users = write(folder / "users.gz", QUERIES)
    fn_args = SimpleNamespace(
        custom_config={
            "dataset": SPEC.model_dump_json(),
            "config": CONFIG.model_dump_json(),
            "catalogue": [catalogue],
            "user_states": [users],
            "train_end_unix_s": TRAIN_END,
        },
        transform_output=str(transform_graph(folder, train_rows)),
        train_files=[write(folder / "train.gz", train_rows)],
        eval_files=[write(folder / "eval.gz", eval_rows)],
        serving_model_dir=str(folder / "model"),
        model_run_dir=str(folder / "model_run"),
    )
    run_fn(fn_args)
    log, preranker = (
        json.loads((folder / "model_run" / name).read_text()) for name in (TRAINING_LOG, PRERANKER_LOG)
    )
    return Trained(folder / "model", log, preranker, eval_rows, catalogue, users)


def outputs(model_dir: Path, queries: list[Row], candidates: list[str]) -> dict[str, np.ndarray]:
    served = tf.saved_model.load(str(model_dir)).signatures["serving_default"]
    return {name: value.numpy() for name, value in served(**request(queries, candidates)).items()}


ITEMS = [f"i{number}" for number in range(NUM_ITEMS)]
QUERIES = [query(np.random.default_rng(seed), seed, TRAIN_END + 3_600) for seed in (0, 1, 2, 3, 4, 11)]


def test_a_request_is_judged_as_the_examples_that_say_the_same(trained: Trained) -> None:
    by_request = outputs(trained.model_dir, QUERIES, ITEMS)
    examples = [example({**row, **item(number)}) for row in QUERIES for number in range(NUM_ITEMS)]
    signature = tf.saved_model.load(str(trained.model_dir)).signatures["serving_examples"]
    by_example = signature(examples=tf.constant(examples))
    assert set(by_example) == {"click", "watch", "score", "item_is_known"}
    for name, values in by_example.items():
        np.testing.assert_allclose(np.reshape(values, [6, 12]), by_request[name], rtol=1e-5, atol=1e-6)
    # The agreement says something only if queries and items matter.
    assert len(np.unique(np.round(by_request["click"], 4))) > 30
    assert any(row["impression_item_ids"] for row in QUERIES)
    assert not all(row["impression_item_ids"] for row in QUERIES)


def test_served_outputs_are_calibrated_on_the_eval_split(trained: Trained) -> None:
    signature = tf.saved_model.load(str(trained.model_dir)).signatures["serving_examples"]
    served = signature(examples=tf.constant([example(row) for row in trained.eval_rows]))
    clicks = np.array([row["click"][0] for row in trained.eval_rows])
    watched = np.array([row["watch_time_s"][0] for row in trained.eval_rows])
    assert np.mean(served["click"]) == pytest.approx(clicks.mean(), rel=0.02)
    assert np.mean(served["watch"]) == pytest.approx(watched.mean(), rel=0.05)
    # Training rows have twice as many clicks.
    assert trained.log[-1]["ranking/click/calibration"] > 1.4


def test_the_log_has_a_record_per_epoch(trained: Trained) -> None:
    assert [record["epoch"] for record in trained.log] == [1, 2]
    for record in trained.log:
        assert {"train_loss", "eval_loss", "ranking/click/auc", "ranking/watch/mae"} <= set(record)


def pre_ranked(model_dir: Path, queries: list[Row], candidates: list[str], k: int) -> dict[str, np.ndarray]:
    signature = tf.saved_model.load(str(model_dir)).signatures["pre_rank"]
    answer = signature(**request(queries, candidates), k=tf.fill([len(queries)], k))
    return {name: value.numpy() for name, value in answer.items()}


def test_the_pre_ranker_travels_with_the_ranker_and_its_checkpoint(trained: Trained, tmp_path: Path) -> None:
    answer = pre_ranked(trained.model_dir, QUERIES, ITEMS, 5)
    assert answer["item_ids"].shape == (len(QUERIES), 5)
    assert np.all(np.diff(answer["scores"]) <= 0)
    assert np.all(answer["num_kept"] == 9)
    assert trained.preranker["survival"][SURVIVAL] == 1.0  # all 12 items are fewer than what is kept
    assert trained.preranker["log"][0]["epoch"] == 1
    refresh(trained.model_dir, [trained.catalogue], [trained.users], tmp_path / "again")
    again = pre_ranked(tmp_path / "again", QUERIES, ITEMS, 5)
    np.testing.assert_array_equal(again["item_ids"], answer["item_ids"])
    np.testing.assert_allclose(again["scores"], answer["scores"], rtol=1e-5, atol=1e-6)
    assert np.all(again["num_kept"] == 9)


def test_the_checkpoint_gives_back_the_ranker_with_its_calibration(trained: Trained, tmp_path: Path) -> None:
    refresh(trained.model_dir, [trained.catalogue], [trained.users], tmp_path / "again")
    refresh(tmp_path / "again", [trained.catalogue], [trained.users], tmp_path / "once more")
    before = outputs(trained.model_dir, QUERIES, [*ITEMS, "unknown"])
    for name in ("again", "once more"):
        for task, values in outputs(tmp_path / name, QUERIES, [*ITEMS, "unknown"]).items():
            np.testing.assert_allclose(values, before[task], rtol=1e-6, atol=1e-7)
    kept = read_checkpoint(trained.model_dir).settings["calibrators"]
    assert set(kept) == {"click", "watch"}
    assert not any(Calibrator.from_dict(calibrator).is_identity for calibrator in kept.values())
    assert read_checkpoint(tmp_path / "once more").settings["calibrators"] == kept


def swapped(parts: list[Any]) -> list[Any]:
    """The same inputs with two of one width in each other's place."""
    widths = [part.shape[-1] for part in parts]
    first, second = next(
        (i, j) for i in range(len(widths)) for j in range(i + 1, len(widths)) if widths[i] == widths[j]
    )
    parts[first], parts[second] = parts[second], parts[first]
    return parts


def test_code_that_reads_inputs_in_another_order_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = RankingModel.parts
    monkeypatch.setattr(RankingModel, "parts", lambda *args, **named: swapped(parts(*args, **named)))
    with pytest.raises(CheckpointError, match=r"other outputs from the same weights: '(click|watch)'"):
        refresh(trained.model_dir, [trained.catalogue], [trained.users], tmp_path / "again")


@pytest.mark.parametrize("side", ["describe_query", "describe_items"])
def test_code_that_describes_to_the_pre_ranker_in_another_order_is_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    describe = getattr(run_ranking, side)
    monkeypatch.setattr(run_ranking, side, lambda *args: describe(*args)[:, ::-1])
    with pytest.raises(CheckpointError, match="same weights: 'preranker_scores' is off by"):
        refresh(trained.model_dir, [trained.catalogue], [trained.users], tmp_path / "again")


def test_another_catalogue_keeps_the_outputs_of_the_items_that_did_not_change(
    trained: Trained, tmp_path: Path
) -> None:
    unshown = LOG + [0.0] * (NUM_COUNTS - len(LOG))
    newer = [item(number) for number in reversed(range(NUM_ITEMS)) if number != 3]
    changed = next(row for row in newer if row["item_id"] == ["i7"])
    changed.update(creator_id=["c0"], length=[100.0])
    newer.insert(4, {**item(9), "item_id": ["new"], "item_counts": unshown})
    # Nobody was shown what is gone or has another creator: this would change what impressions say.
    queries = [
        {**row, **{raw.name: [] for raw in features.raw_impression_inputs(SPEC)}}
        if {"i3", "i7"} & {*row["impression_item_ids"]}
        else row
        for row in QUERIES
    ]
    assert any(row["impression_item_ids"] for row in queries)
    items = [write(tmp_path / "newer.gz", newer)]
    refresh(trained.model_dir, items, [trained.users], tmp_path / "refreshed")
    before = outputs(trained.model_dir, queries, [*ITEMS, "new"])
    after = outputs(tmp_path / "refreshed", queries, [*ITEMS, "new"])
    same = [number for number in range(NUM_ITEMS) if number not in (3, 7)]
    for name in ("click", "watch", "score"):
        np.testing.assert_allclose(after[name][:, same], before[name][:, same], rtol=1e-5, atol=1e-6)
    assert after["item_is_known"][0].tolist() == [1, 1, 1, 0, *[1] * 9]
    assert before["item_is_known"][0].tolist() == [*[1] * 12, 0]
    for place in (3, 7, 12):
        assert np.all(np.isfinite(after["score"][:, place]))
        assert np.any(np.abs(after["score"][:, place] - before["score"][:, place]) > 1e-6)


def test_tasks_without_a_place_for_the_position_are_named_in_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    movies = load_dataset_spec("movielens-1m")
    pal, additive = (RankingConfig(position=PositionConfig(kind=kind)) for kind in ("pal", "additive"))
    assert [task.name for task in position_tasks(movies, pal)] == ["like"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == [
        "ranking.position.kind 'pal' has no place in the tasks rating: they learn without the position; see "
        "docs/debiasing.md."
    ]
    caplog.clear()
    assert position_tasks(movies, additive) == list(movies.tasks)
    assert not caplog.records
