"""Reading what a model is judged on: examples and the rows they came from, models that do not answer."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tensorflow as tf

from schema.errors import DataError, ServingError
from tests.trainer.ranking_tables import SPEC, log
from tfx_pipeline import evaluation
from tfx_pipeline.evaluation import EvaluationSettings, judge_ranking, read_judged_users, read_test_rows
from trainer.comparison import BootstrapSettings, Comparison
from trainer.ranking_features import RankingTables

SETTINGS = EvaluationSettings((10,), (("country",),), BootstrapSettings(num_resamples=100))


@pytest.fixture(scope="module")
def tables() -> RankingTables:
    return log(1_500, seed=5)


def feature(name: str, values: list[object]) -> tf.train.Feature:
    if name == "event_time_unix_s":
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
    if name in SPEC.task_labels:
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[str(v).encode() for v in values]))


def write(path: Path, rows: list[dict[str, list[object]]]) -> list[bytes]:
    """Writes examples; an absent value is an empty list, as the pipeline writes it."""
    records = [
        tf.train.Example(
            features=tf.train.Features(feature={name: feature(name, values) for name, values in row.items()})
        ).SerializeToString()
        for row in rows
    ]
    with tf.io.TFRecordWriter(str(path), tf.io.TFRecordOptions("GZIP")) as writer:
        for record in records:
            writer.write(record)
    return records


def examples_of(tables: RankingTables) -> list[dict[str, list[object]]]:
    """The test rows in another order than that of the table."""
    test = tables.interactions.filter(pl.col("split") == "test").sample(fraction=1.0, shuffle=True, seed=1)
    names = ("user_id", "item_id", "surface", "event_time_unix_s", "click", "watch_time_s")
    return [{name: [] if row[name] is None else [row[name]] for name in names} for row in test.to_dicts()]


@pytest.fixture(scope="module")
def examples(tables: RankingTables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "test.gz"
    write(path, examples_of(tables))
    return path


def test_every_example_finds_its_row_of_the_table(tables: RankingTables, examples: Path) -> None:
    read, places = read_test_rows([str(examples)], tables)
    assert len(read) == len(places) == len(set(places.tolist()))
    for serialized, place in list(zip(read["serialized"], places, strict=True))[::40]:
        values = tf.train.Example.FromString(serialized).features.feature
        row = tables.interactions.row(int(place), named=True)
        assert values["user_id"].bytes_list.value[0].decode() == row["user_id"]
        assert values["event_time_unix_s"].int64_list.value[0] == row["event_time_unix_s"]
        watched = values["watch_time_s"].float_list.value
        assert list(watched) == ([] if row["watch_time_s"] is None else [pytest.approx(row["watch_time_s"])])


def test_examples_of_other_tables_are_refused(tables: RankingTables, examples: Path) -> None:
    other = dataclasses.replace(
        tables, interactions=tables.interactions.with_columns(click=1 - pl.col("click"))
    )
    with pytest.raises(DataError, match="are not those of the"):
        read_test_rows([str(examples)], other)


def test_only_users_with_something_held_out_are_read(tmp_path: Path) -> None:
    users = [
        {
            "user_id": ["a"],
            "user_type": ["warm"],
            "surface": ["0"],
            "seen_item_ids": ["x"],
            "test_item_ids": ["y"],
        },
        {"user_id": ["b"], "user_type": ["warm"], "surface": [], "seen_item_ids": ["x"], "test_item_ids": []},
        {"user_id": ["c"], "user_type": ["cold"], "surface": [], "eval_item_ids": ["z", "w"]},
    ]
    write(tmp_path / "users.gz", users)
    found = read_judged_users([str(tmp_path / "users.gz")], SPEC)
    assert found["user_id"].to_list() == ["a", "c"]
    assert found["surface"].to_list() == ["0", ""]
    assert found["eval_item_ids"].to_list() == [[], ["z", "w"]]
    assert found["seen_item_ids"].to_list() == [["x"], []]


def test_a_last_blessed_model_that_does_not_answer_is_said_and_not_compared(
    tables: RankingTables, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(folder: Path, serialized: list[bytes], spec: object) -> dict[str, np.ndarray]:
        if folder.name == "old":
            raise ServingError("the feature 'mood' is required")
        noise = np.random.default_rng(0).random(len(serialized))
        return {"click": noise, "watch": noise}

    monkeypatch.setattr(evaluation, "predicted", answer)
    judged = judge_ranking(
        tables, [str(examples)], tmp_path / "new", tmp_path / "old", SETTINGS, with_baselines=False
    )
    why = "it does not answer this run's examples: the feature 'mood' is required"
    assert judged.comparison.absent == {"last_blessed": why}
    assert judged.comparison.rivals == ()
    names = {part.name for part in judged.comparison.slices}
    assert {"", "country = de", "country = (missing)", "surface = 0", "user_type = warm"} <= names
    judged.write(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.json", "predictions.parquet"}


def test_predictions_that_are_not_numbers_are_undefined_or_absent_and_never_an_error(
    tables: RankingTables, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = ""

    def answer(folder: Path, serialized: list[bytes], spec: object) -> dict[str, np.ndarray]:
        noise = np.random.default_rng(0).random(len(serialized))
        clicks = np.where(noise < 0.5, np.nan, noise) if folder.name == spoilt else noise
        return {"click": clicks, "watch": noise}

    def judged() -> Comparison:
        found = judge_ranking(
            tables, [str(examples)], tmp_path / "new", tmp_path / "old", SETTINGS, with_baselines=False
        )
        found.write(tmp_path)
        return found.comparison

    monkeypatch.setattr(evaluation, "predicted", answer)
    spoilt = "new"
    compared = judged()
    auc, mae = compared.whole.metric("ranking/click/auc"), compared.whole.metric("ranking/watch/mae")
    assert auc is not None and mae is not None
    assert auc.value is None and auc.against["last_blessed"].difference is None
    assert re.fullmatch(r"\d+ of \d+ predictions of click are NaN or infinite", auc.note)
    assert compared.facts["click/prediction_std"] is None
    # The other task is none the worse for it.
    assert mae.against["last_blessed"].difference == 0

    spoilt = "old"
    compared = judged()
    assert re.search(r"old: \d+ of \d+ predictions of click are NaN", compared.absent["last_blessed"])
    assert compared.rivals == ()


class Ranker(tf.Module):
    """The signature of a ranker on examples."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def serve(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"click": tf.zeros(tf.shape(examples))}


def test_a_ranker_is_refused_where_a_retrieval_model_is_asked(tmp_path: Path) -> None:
    ranker = Ranker()
    tf.saved_model.save(ranker, str(tmp_path), signatures={"serving_examples": ranker.serve})
    with pytest.raises(ServingError, match=r"is no retrieval model: .* with the output item_ids"):
        evaluation.retrieved(tmp_path, [b""], 10)


@pytest.mark.parametrize("ask", [evaluation.retrieved, evaluation.predicted])
def test_a_folder_without_a_model_is_named(ask: object, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="holds no SavedModel"):
        ask(tmp_path, [], 10 if ask is evaluation.retrieved else SPEC)  # type: ignore[operator]
