"""Files of impressions through a ranker: what each row may know; no row is lost, moved or doubled."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tensorflow as tf
import yaml
from click.testing import CliRunner, Result
from tfx_bsl.coders import example_coder

from schema.contract import DatasetSpec
from schema.errors import DataError, ServingError
from schema.tables import (
    INTERACTIONS,
    ITEMS,
    SUMMARY,
    USERS,
    InteractionRows,
    prepare_tables,
    read_interactions,
    read_summary,
)
from tests.tfx_pipeline import taste_world
from tfx_pipeline import batch_score as module
from tfx_pipeline.batch_score import (
    Knowledge,
    Scored,
    batch_score,
    load_ranker,
    read_knowledge,
    serialized_examples,
)
from tfx_pipeline.cli import main
from tfx_pipeline.config import MODELS, RunPaths, load_run_config
from tfx_pipeline.examples import ExampleSettings, example_batch, interaction_columns, interaction_inputs
from tfx_pipeline.run_result import RunResult, write_run

DAY = 86_400
START = 1_704_067_200  # 2024-01-01T00:00:00Z
TRAIN_END = START + 3 * DAY

CONFIG = """\
dataset:
  name: tiny
  interactions:
    files: [log.csv]
    start: "2024-01-01T00:00:00+00:00"
    columns:
      user_id: user
      item_id: video
      event_time_unix_s: {column: time_ms, unit: ms}
      surface: page
      watch_time_s: {column: played_ms, unit: ms}
      item_duration_s: length_s
      search_tokens: {column: query, separator: " "}
    labels: {click: clicked, loved: {column: stars, at_least: 4}}
  users: {files: [users.csv], columns: {user_id: user}, features: [{name: age, kind: continuous}]}
  items:
    files: [items.csv]
    columns: {item_id: video}
    features: [{name: genre, kind: categorical}]
  positive: click
  watch_time_cap_durations: 2
  session_gap_hours: 8
  counters: {keys: [item_id, genre], windows_days: [1]}
  tasks:
    - {name: click, label: click, kind: binary, score_weight: 1}
    - {name: watch_time, label: watch_time_s, kind: watch_time, score_weight: 0.1}
  split: {train_until: "2024-01-04T00:00:00+00:00", eval_until: "2024-01-05T00:00:00+00:00"}
gates:
  - {metric: retrieval/recall_at_50, min: 0.4}
  - {metric: ranking/click/auc, min: 0.7}
"""
# Hours since START: train before 72, eval before 96, then test.
LOG: dict[str, list[Any]] = {
    "user": ["u1", "u2", "u1", "u2", "u1", "u1", "u2", "u1", "u2"],
    "video": ["a", "a", "b", "b", "c", "a", "c", "b", "a"],
    "time_ms": [(START + hour * 3_600) * 1_000 for hour in (0, 1, 24, 30, 60, 80, 81, 100, 101)],
    "page": ["home", "home", "search", "home", "home", "home", "home", "search", "home"],
    "played_ms": [5_000, 0, 9_000, 2_000, 0, 4_000, 3_000, 1_000, 2_000],
    "length_s": [10.0] * 9,
    "query": [None, None, "cats sleeping", None, None, None, None, "dogs", None],
    "clicked": [1, 0, 1, 1, 0, 1, 1, 1, 0],
    "stars": [5, 1, 4, 3, None, 5, 5, 2, 1],
}
VIDEOS = {"video": ["a", "b", "c"], "genre": ["x", "x", "y"]}
SPEC = DatasetSpec.model_validate(yaml.safe_load(CONFIG)["dataset"])

Row = dict[str, Any]


class _FakeRanker(tf.Module):
    """Answers with the length of the history, the sum of the counts, and a hash of all values."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def serve(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        lists = {name: tf.io.VarLenFeature(dtype) for name, dtype in example_inputs(SPEC).items()}
        values = tf.io.parse_example(examples, lists)
        texts = []
        for name in sorted(values):
            sparse = values[name]
            text = sparse.values if sparse.dtype == tf.string else tf.strings.as_string(sparse.values)
            # A comma behind every value, so that what is padded says nothing.
            dense = tf.sparse.to_dense(sparse.with_values(tf.strings.join([text, ","])))
            texts.append(tf.strings.reduce_join(dense, axis=1))
        whole = tf.strings.join(texts, separator=";")
        history = values["history_item_ids"]
        present = history.with_values(tf.ones_like(history.values, tf.float32))
        return {
            "click": tf.sparse.reduce_sum(present, axis=1),
            "watch_time": tf.sparse.reduce_sum(values["item_counts"], axis=1),
            "score": tf.cast(tf.strings.to_hash_bucket_fast(whole, 1 << 22), tf.float32),
        }


def example_inputs(spec: DatasetSpec) -> dict[str, str]:
    return {**interaction_inputs(spec, "query"), **interaction_inputs(spec, "candidate")}


@pytest.fixture(scope="module")
def ranker_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranker")
    ranker = _FakeRanker()
    tf.saved_model.save(ranker, str(folder), signatures={"serving_examples": ranker.serve})
    return folder


def finished_run(config: Path, source: Path, folder: Path) -> RunResult:
    """A run of which the tables are there, and no model was pushed."""
    run_config = load_run_config(config)
    return RunResult(
        dataset=run_config.dataset.name,
        config_json=run_config.model_dump_json(),
        tables_dir=str(prepare_tables(run_config.dataset, source, folder / "data")),
        user_states="",
        blessed=dict.fromkeys(MODELS, False),
        pushed=dict.fromkeys(MODELS),
        reasons={"ranking": "auc 0.5, required: at least 0.7"},
        report=str(folder / "report" / "index.html"),
        timings=(),
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("tiny")
    pl.DataFrame(LOG).write_csv(folder / "log.csv")
    pl.DataFrame({"user": ["u1", "u2"], "age": [30, None]}).write_csv(folder / "users.csv")
    pl.DataFrame(VIDEOS).write_csv(folder / "items.csv")
    (folder / "run.yaml").write_text(CONFIG, encoding="utf-8")
    return finished_run(folder / "run.yaml", folder, folder)


def row(user: str = "u1", video: str = "a", hour: float = 200, **values: Any) -> Row:
    """A source row of the tiny world; by default long after training."""
    defaults = {"page": "home", "played_ms": 0, "length_s": 10.0, "query": None, "clicked": 0, "stars": 1}
    time_ms = int((START + hour * 3_600) * 1_000)
    return {"user": user, "video": video, "time_ms": time_ms, **defaults, **values}


def written(folder: Path, rows: list[Row], name: str = "impressions.csv") -> Path:
    path = folder / name
    table = pl.DataFrame(rows, infer_schema_length=None)
    table.write_csv(path) if path.suffix == ".csv" else table.write_parquet(path)
    return path


@dataclasses.dataclass
class Scorer:
    """Scores rows of the tiny world by the fake ranker."""

    run: RunResult
    ranker_dir: Path
    folder: Path
    scored: Scored | None = None

    def __call__(self, rows: list[Row], online: bool = False) -> pl.DataFrame:
        read = read_interactions(self.run.config.dataset, written(self.folder, rows))
        out = self.folder / "out" / "preds.parquet"
        paths = RunPaths(self.folder)
        self.scored = batch_score(self.run, paths, read, out, online, self.ranker_dir, lambda n: None)
        assert os.listdir(out.parent) == ["preds.parquet"]
        return pl.read_parquet(out)

    def features(self, rows: list[Row], online: bool = False) -> list[Row]:
        """The examples of rows, values by feature."""
        return [parsed(e) for e in encoded(self.run, written(self.folder, rows), online)]


@pytest.fixture
def score(tiny: RunResult, ranker_dir: Path, tmp_path: Path) -> Scorer:
    return Scorer(tiny, ranker_dir, tmp_path)


def knowledge_of(run: RunResult, rows: InteractionRows, online: bool) -> Knowledge:
    config = run.config
    max_positives = config.examples.max_positives_per_user
    return read_knowledge(Path(run.tables_dir), config.dataset, max_positives, rows, online)


def encoded(run: RunResult, path: Path, online: bool) -> list[bytes]:
    spec = run.config.dataset
    rows = read_interactions(spec, path)
    batches = serialized_examples(rows.table, knowledge_of(run, rows, online), spec)
    return [in_order(example) for batch in batches for example in batch]


def in_order(serialized: bytes) -> bytes:
    """The same example with its features in a fixed order: the encoder has none."""
    return bytes(tf.train.Example.FromString(serialized).SerializeToString(deterministic=True))


def parsed(serialized: bytes) -> Row:
    values = {}
    for name, feature in tf.train.Example.FromString(serialized).features.feature.items():
        held = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
        values[name] = [v.decode() if isinstance(v, bytes) else v for v in held]
    return values


def shuffled(rows: list[Row], seed: int = 0) -> list[Row]:
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def many_rows() -> list[Row]:
    """Rows in no order, some of equal times, some of them twice."""
    rng = np.random.default_rng(3)
    rows = [
        row(f"u{rng.integers(1, 4)}", "abc"[rng.integers(3)], int(rng.integers(10, 130)), clicked=n % 2)
        for n in range(40)
    ]
    return shuffled([*rows, *rows[:10]])


# One row out per row in.


@pytest.mark.parametrize("online", [False, True])
def test_every_row_comes_out_once_in_the_order_of_the_file(score: Scorer, online: bool) -> None:
    rows = many_rows()
    table = score(rows, online)
    given = [(r["user"], r["video"], r["time_ms"] // 1_000) for r in rows]
    assert table.select("user_id", "item_id", "event_time_unix_s").rows() == given
    assert table["label_click"].to_list() == [r["clicked"] for r in rows]
    answers: dict[str, set[float]] = {}
    for source, value in zip(rows, table["score"], strict=True):
        answers.setdefault(json.dumps(source), set()).add(value)
    assert len(answers) == 40
    assert all(len(values) == 1 for values in answers.values())


def test_a_row_gets_the_answer_that_it_gets_alone(score: Scorer) -> None:
    rows = many_rows()
    together = score(rows)
    assert together["score"].n_unique() > 20
    for place in (0, 7, 23, 49):
        assert score([rows[place]]).rows() == together[place].rows()


@pytest.mark.parametrize("online", [False, True])
def test_sizes_of_batches_do_not_matter(score: Scorer, monkeypatch: pytest.MonkeyPatch, online: bool) -> None:
    expected = score(many_rows(), online)
    monkeypatch.setattr(module, "_ROWS_PER_SLICE", 7)
    monkeypatch.setattr(module, "_ROWS_PER_CALL", 3)
    assert score(many_rows(), online).equals(expected)


def test_columns_and_their_types_are_those_of_the_documentation(score: Scorer) -> None:
    assert score([row()]).schema == {
        "user_id": pl.String,
        "item_id": pl.String,
        "event_time_unix_s": pl.Int64,
        "item_is_known": pl.Int64,
        "user_is_known": pl.Int64,
        "click": pl.Float32,
        "watch_time": pl.Float32,
        "score": pl.Float32,
        "label_click": pl.Float32,
        "label_loved": pl.Float32,
        "label_watch_time_s": pl.Float32,
        "label_completion": pl.Float32,
    }


def test_labels_are_those_that_training_would_have_read(score: Scorer) -> None:
    # Stars from 4 are love; watch time in seconds, at most two lengths; 0 s of length is unknown.
    rows = [
        row(played_ms=5_000, stars=4, clicked=1),
        row(played_ms=90_000, stars=3),
        row(played_ms=-1, stars=None),
        row(played_ms=3_000, length_s=0.0),
    ]
    table = score(rows)
    assert table["label_loved"].to_list() == [1, 0, None, 0]
    assert table["label_watch_time_s"].to_list() == [5, 20, None, 3]
    assert table["label_completion"].to_list() == [0.5, 1, None, None]


def test_parquet_and_columns_that_nobody_declared_change_nothing(score: Scorer, tmp_path: Path) -> None:
    rows = many_rows()
    extra = [{**r, "note": f"n{place}"} for place, r in enumerate(rows)]
    expected = encoded(score.run, written(tmp_path, rows), online=False)
    assert encoded(score.run, written(tmp_path, extra, "impressions.parquet"), online=False) == expected


def test_rows_before_the_start_of_the_log_are_scored_too(score: Scorer) -> None:
    table = score([row(hour=-5), row(hour=2)])
    assert table["event_time_unix_s"].to_list() == [START - 5 * 3_600, START + 2 * 3_600]
    assert table["click"].to_list() == [0, 1]


# What a row knows: the train split.


def test_without_online_history_a_row_knows_the_train_split_up_to_its_time(score: Scorer) -> None:
    first, inside, after = score.features([row(hour=0), row(hour=25), row(hour=500, video="b")])
    assert first["history_item_ids"] == first["impression_item_ids"] == []
    assert inside["history_item_ids"] == ["a", "b"]
    assert inside["impression_event_time_unix_s"] == [START, START + DAY]
    # Of eval and test nothing, though it is in the tables of the run.
    assert after["history_item_ids"] == ["a", "b"]
    assert after["impression_item_ids"] == ["a", "b", "c"]
    assert after["impression_click"] == [1, 1, 0]
    assert after["impression_surfaces"] == ["home", "search", "home"]
    assert after["search_tokens"] == ["cats", "sleeping"]
    assert after["event_time_unix_s"] == [START + 500 * 3_600]
    # Impressions, clicks and seconds: of all, then of item b in the day before and ever, then of its genre.
    assert after["item_counts"] == [5, 3, 16, *[0, 0, 0], *[2, 2, 11], *[0, 0, 0], *[4, 3, 16]]
    # Days end with training: the one impression of c, at hour 60, is in the last one.
    of_c = score.features([row(hour=500, video="c")])[0]
    assert of_c["item_counts"] == [5, 3, 16, *[1, 0, 0] * 4]


@pytest.mark.parametrize("hours", [(200, 210), (10, 40)], ids=["after training", "during training"])
def test_without_online_history_no_row_of_the_file_is_known(
    score: Scorer, hours: tuple[float, float]
) -> None:
    earlier, later = (row(hour=hour, query="birds", clicked=1) for hour in hours)
    assert score.features([earlier, later])[1] == score.features([later])[0]


@pytest.mark.parametrize(
    "changes", [{"clicked": 1}, {"played_ms": 9_000}, {"stars": 5}, {"clicked": None, "played_ms": None}]
)
def test_without_online_history_labels_change_nothing(score: Scorer, changes: Row) -> None:
    rows = many_rows()
    kept = [name for name in score(rows).columns if not name.startswith("label_")]
    expected = score(rows).select(kept)
    assert score([{**r, **changes} for r in rows]).select(kept).equals(expected)


def test_what_is_frozen_ignores_a_log_that_goes_on(score: Scorer, tmp_path: Path) -> None:
    rows = [row(hour=200, clicked=1, query="birds"), row(hour=210)]
    read = read_interactions(SPEC, written(tmp_path, rows))
    knowledge = dataclasses.replace(knowledge_of(score.run, read, online=True), is_frozen=True)
    (examples,) = serialized_examples(read.table, knowledge, SPEC)
    assert [parsed(example) for example in examples] == score.features(rows)


def test_an_example_of_the_train_split_is_that_of_training(score: Scorer, tmp_path: Path) -> None:
    rows = [{name: column[place] for name, column in LOG.items()} for place in range(5)]
    assert encoded(score.run, written(tmp_path, rows), online=False) == pipeline_examples(score.run, "train")


# What a row knows besides with online history: the eval split, and earlier rows of the file.


def test_with_online_history_a_row_knows_the_earlier_rows_of_the_file(score: Scorer) -> None:
    rows = [
        row(hour=203, video="c"),
        row(hour=200, video="b", clicked=1, played_ms=2_000, page="search", query="birds"),
        row("u2", hour=202, video="c", clicked=1, played_ms=4_000),
    ]
    last = score.features(rows, online=True)[0]
    # The third is of the eval split, at hour 80; of the test split nothing.
    assert last["history_item_ids"] == ["a", "b", "a", "b"]
    assert last["impression_item_ids"] == ["a", "b", "c", "a", "b"]
    assert last["impression_surfaces"][-1] == "search"
    assert last["impression_watch_time_s"][-1] == 2
    assert last["search_tokens"] == ["cats", "sleeping", "birds"]
    # Train has 5 impressions, 3 clicks and 16 s, eval 2, 2 and 7; of c both have one impression, long ago,
    # that of eval with a click and 3 s; c alone has genre y.
    assert last["item_counts"] == [9, 7, 29, *[1, 1, 4], *[3, 2, 7], *[1, 1, 4], *[3, 2, 7]]


def test_with_online_history_a_row_knows_the_eval_split_up_to_its_time(score: Scorer) -> None:
    before, after = score.features([row(hour=80), row(hour=82)], online=True)
    assert before["impression_item_ids"] == ["a", "b", "c"]
    assert after["impression_item_ids"] == ["a", "b", "c", "a"]
    # Both rows of the eval split, one of which the file holds too, and nobody's of the test split.
    assert after["item_counts"][:3] == [5 + 2, 3 + 2, 16 + 7]


def test_with_online_history_equal_times_do_not_see_each_other(score: Scorer) -> None:
    together = [row(hour=200, clicked=1), row(hour=200, video="b", clicked=1), row(hour=200, clicked=1)]
    alone = [score.features([r], online=True)[0] for r in together]
    assert score.features(together, online=True) == alone


def test_with_online_history_a_later_label_changes_nothing_and_an_earlier_one_does(score: Scorer) -> None:
    def middle(**labels: Any) -> list[Row]:
        return [row(hour=200), row(hour=202, **labels), row(hour=203, video="b"), row(hour=202, video="c")]

    without, with_click = (score.features(middle(clicked=c), online=True) for c in (0, 1))
    assert [a == b for a, b in zip(without, with_click, strict=True)] == [True, True, False, True]
    assert with_click[2]["history_item_ids"] == ["a", "b", "a", "a"]
    assert without[2]["history_item_ids"] == ["a", "b", "a"]


def test_an_exact_repetition_is_known_once_as_in_training(score: Scorer) -> None:
    event, later = row(hour=200, clicked=1, note="one"), row(hour=210, note="one")
    once = score.features([event, later], online=True)[-1]
    assert score.features([event, later, event, event], online=True)[1] == once
    # Another value in any column, declared or not, makes it another event.
    assert score.features([event, {**event, "note": "two"}, later], online=True)[-1] != once


def test_rows_of_the_train_and_eval_split_are_known_once(score: Scorer) -> None:
    rows = [{name: column[place] for name, column in LOG.items()} for place in range(7)]
    asked = row(hour=100)
    assert score.features([*rows, asked], online=True)[-1] == score.features([asked], online=True)[0]


@pytest.fixture(scope="module")
def taste(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    """The run of a larger world, and its source files."""
    folder = tmp_path_factory.mktemp("taste")
    config = taste_world.write(folder)
    # Its data matter here, not its models.
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    kept = {name: values[name] for name in ("dataset", "gates")}
    config.write_text(yaml.safe_dump(kept), encoding="utf-8")
    log = folder / "data" / "events.csv"
    pl.read_csv(log, infer_schema=False).gather_every(4).write_csv(log)
    return finished_run(config, folder / "data", folder), folder / "data"


def pipeline_examples(run: RunResult, *splits: str) -> list[bytes]:
    """Query and candidate of some splits as the pipeline encodes them, in the order of the source."""
    spec, tables_dir = run.config.dataset, Path(run.tables_dir)
    events, users, items = (pl.read_parquet(tables_dir / name) for name in (INTERACTIONS, USERS, ITEMS))
    settings = ExampleSettings(read_summary(tables_dir).train_end_unix_s, max_positives_per_user=200)
    columns = interaction_columns(events, users, items, spec, settings)
    columns = columns.filter(pl.col("split").is_in(splits)).sort("row_number")
    encoder = example_coder.RecordBatchToExamplesEncoder()
    return [in_order(example) for example in encoder.encode(example_batch(columns, example_inputs(spec)))]


def source_rows(run: RunResult, source: Path, *splits: str) -> pl.DataFrame:
    """Rows of the log by split, in the order of the source."""
    numbers = pl.read_parquet(Path(run.tables_dir) / INTERACTIONS).filter(pl.col("split").is_in(splits))
    return pl.read_csv(source / "events.csv", infer_schema=False)[sorted(numbers["row_number"])]


@pytest.mark.parametrize("splits", [("test",), ("eval", "test"), ("train", "eval", "test")], ids="+".join)
def test_with_online_history_the_log_after_training_gives_the_examples_of_the_pipeline(
    taste: tuple[RunResult, Path], tmp_path: Path, splits: tuple[str, ...]
) -> None:
    # The pipeline's examples know every earlier event of all splits: the file must hold those of the test
    # split, and may hold the others, which the run knows already. The order of the rows is free.
    run, source = taste
    rows, expected = source_rows(run, source, *splits), pipeline_examples(run, *splits)
    order = np.random.default_rng(1).permutation(len(rows))
    path = tmp_path / "events.csv"
    rows[order].write_csv(path)
    assert len(expected) == len(rows)
    assert encoded(run, path, online=True) == [expected[place] for place in order]


def test_without_online_history_the_test_split_gives_other_examples_than_the_pipeline(
    taste: tuple[RunResult, Path], tmp_path: Path
) -> None:
    run, source = taste
    path = tmp_path / "events.csv"
    source_rows(run, source, "test").write_csv(path)
    pairs = list(zip(encoded(run, path, online=False), pipeline_examples(run, "test"), strict=True))
    assert sum(ours != theirs for ours, theirs in pairs) == len(pairs)


# Files that say less, or what nobody knows.


def without(rows: list[Row], *names: str) -> list[Row]:
    return [{name: value for name, value in r.items() if name not in names} for r in rows]


def test_labels_surface_and_durations_may_be_absent(score: Scorer, tmp_path: Path) -> None:
    rows = without(many_rows(), "clicked", "stars", "played_ms", "length_s", "query", "page")
    table = score(rows)
    assert table.columns[-3:] == ["click", "watch_time", "score"]
    read = read_interactions(score.run.config.dataset, written(tmp_path, rows))
    assert read.absent == (
        "surface",
        "watch_time_s",
        "item_duration_s",
        "search_tokens",
        "click",
        "loved",
        "completion",
    )
    # What is not said of a row does not change what is known of its past.
    (bare,) = score.features(without([row(page="search")], "page", "clicked"))
    (full,) = score.features([row(page="search")])
    assert bare.pop("surface") == []
    assert full.pop("surface") == ["search"]
    assert bare == full


def test_one_label_may_be_there_without_the_others(score: Scorer) -> None:
    table = score(without([row(stars=5), row(stars=1)], "clicked", "length_s"))
    assert [name for name in table.columns if name.startswith("label_")] == [
        "label_loved",
        "label_watch_time_s",
    ]
    assert table["label_loved"].to_list() == [1, 0]


@pytest.mark.parametrize(("column", "label"), [("clicked", "click"), ("played_ms", "watch_time_s")])
def test_online_history_without_outcomes_is_refused(score: Scorer, column: str, label: str) -> None:
    with pytest.raises(DataError, match=rf"the file has no label {label}: .* leave --online-history out"):
        score(without([row()], column), online=True)
    # A label that no task predicts and that makes no history is not missed.
    assert len(score(without([row()], "stars"), online=True)) == 1


def test_unknown_users_and_items_are_scored_and_flagged(score: Scorer) -> None:
    rows = [row(), row("stranger"), row(video="unheard-of"), row("stranger", "unheard-of")]
    table = score(rows)
    assert table["user_is_known"].to_list() == [1, 0, 1, 0]
    assert table["item_is_known"].to_list() == [1, 1, 0, 0]
    assert table["click"].to_list() == [2, 0, 2, 0]
    assert score.scored == Scored(4, num_unknown_items=2, num_unknown_users=2, train_end_unix_s=TRAIN_END)
    example = score.features(rows)[2]
    assert example["item_id"] == ["unheard-of"]
    assert example["genre"] == []
    # Of all, then nothing of the item and nothing of a genre.
    assert example["item_counts"] == [5, 3, 16, *[0] * 12]


def test_unknown_items_leave_no_trace_and_unknown_users_do_as_in_training(score: Scorer) -> None:
    asked = row("stranger", hour=210)
    alone = score.features([asked], online=True)[0]
    unknown_item = row("stranger", "unheard-of", clicked=1)
    assert score.features([unknown_item, asked], online=True)[1] == alone
    table = score([row("stranger", clicked=1), asked], online=True)
    assert table["click"].to_list() == [0, 1]
    assert table["user_is_known"].to_list() == [0, 0]


# Files that are wrong.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", "cannot read .*empty.csv"),
        ("header.csv", "user,video,time_ms\n", "interactions: the source has no rows"),
        ("log.csv", "user,item,time_ms\nu1,a,1\n", "no column 'video'; it has: user, item, time_ms; .*tiny"),
        ("log.txt", "user,video,time_ms\nu1,a,1\n", r"only \.csv and \.parquet are read"),
        ("log.parquet", "user,video,time_ms\nu1,a,1\n", "cannot read .*log.parquet"),
        ("log.csv", f"user,video,time_ms\nu1,a,{START}000\n,b,{START}000\n", "user_id: 1 rows .* row 2"),
        ("log.csv", f"user,video,time_ms\nu1,,{START}000\n", "item_id: 1 rows .* the first is row 1"),
        ("log.csv", "user,video,time_ms\nu1,a,\n", "event_time_unix_s: 1 rows .* the first is row 1"),
        (
            "log.csv",
            "user,video,time_ms\nu1,a,noon\n",
            "'time_ms' are not Int64; the first is 'noon' in row 1",
        ),
        ("log.csv", f"user,video,time_ms\nu1,a,{START}\n", "unix seconds between 1990 and 2100"),
        ("log.csv", f"user,video,time_ms,clicked\nu1,a,{START}000,no\n", "click: 1 values .* row 1"),
    ],
)
def test_a_file_that_breaks_the_contract_is_refused(
    tiny: RunResult, tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_interactions(tiny.config.dataset, path)


def test_a_missing_file_is_named(tiny: RunResult, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no interactions file .*absent\.csv"):
        read_interactions(tiny.config.dataset, tmp_path / "absent.csv")


def test_a_failure_leaves_the_older_file_and_no_part_of_a_new_one(
    score: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(many_rows())

    def failing(folder: Path, spec: DatasetSpec) -> Callable[[list[bytes]], dict[str, np.ndarray]]:
        answers: Iterator[dict[str, np.ndarray]] = iter(
            [dict.fromkeys(("click", "watch_time", "score"), np.zeros(20))]
        )
        return lambda examples: next(answers)

    monkeypatch.setattr(module, "load_ranker", failing)
    monkeypatch.setattr(module, "_ROWS_PER_CALL", 20)
    with pytest.raises(StopIteration):
        score(many_rows())
    out = score.folder / "out"
    assert os.listdir(out) == ["preds.parquet"]
    assert pl.read_parquet(out / "preds.parquet").equals(expected)


def test_a_disk_that_fails_leaves_no_part_of_a_file(score: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: pl.DataFrame, path: Path) -> None:
        path.write_bytes(b"PAR1")
        raise OSError("disk full")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", half)
    with pytest.raises(OSError, match="disk full"):
        score([row()])
    assert os.listdir(score.folder / "out") == []


def test_tables_of_an_older_version_are_told(score: Scorer, tmp_path: Path) -> None:
    tables_dir = tmp_path / "old"
    shutil.copytree(score.run.tables_dir, tables_dir)
    pl.read_parquet(tables_dir / ITEMS).drop("item_counts").write_parquet(tables_dir / ITEMS)
    score.run = dataclasses.replace(score.run, tables_dir=str(tables_dir))
    with pytest.raises(DataError, match="written by an older version of Funnel; 'funnel run'"):
        score([row()])
    (tables_dir / SUMMARY).unlink()
    with pytest.raises(DataError, match="no contract tables in"):
        score([row()])


# Models.


def test_a_folder_without_a_model_is_refused(tiny: RunResult, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"holds no SavedModel; give the folder of one version"):
        load_ranker(tmp_path, tiny.config.dataset)


def test_a_model_of_other_tasks_is_refused(tiny: RunResult, ranker_dir: Path) -> None:
    declared = yaml.safe_load(CONFIG)["dataset"]
    declared["tasks"].append({"name": "loved", "label": "loved", "kind": "binary"})
    message = r"no ranker .* outputs click, watch_time, loved, score, it has: click, score, watch_time"
    with pytest.raises(ServingError, match=message):
        load_ranker(ranker_dir, DatasetSpec.model_validate(declared))


def test_a_model_without_the_signature_is_refused(tiny: RunResult, tmp_path: Path) -> None:
    tf.saved_model.save(tf.Module(), str(tmp_path / "model"))
    with pytest.raises(ServingError, match=r"no ranker of dataset tiny: .* it has: none"):
        load_ranker(tmp_path / "model", tiny.config.dataset)


# The command.


@pytest.fixture
def run_dir(tiny: RunResult, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(tiny, folder)
    return folder


def funnel(*args: str | Path) -> Result:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command_scores_by_the_newest_pushed_model(
    run_dir: Path, ranker_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(ranker_dir, run_dir / "serving_models" / "ranking" / "9")
    (run_dir / "serving_models" / "ranking" / "2").mkdir()
    rows = [row(), row("stranger", "unheard-of"), row("stranger")]
    given, out = written(tmp_path, without(rows, "page")), tmp_path / "p"
    done = funnel("batch-score", "--interactions", given, "--out", out, "--output-dir", run_dir)
    assert done.exit_code == 0, done.output
    assert re.search(r"3 rows → .*p in \d+\.\d s", done.output)
    assert "histories and counters: from the train split, which ends 2024-01-04 00:00:00 UTC" in done.output
    assert "not in the file, so missing: surface" in done.output
    assert "item not in the catalogue: 1 row\n" in done.output
    assert "user without training events: 2 rows\n" in done.output
    assert pl.read_parquet(out)["click"].to_list() == [2, 0, 0]


def test_the_command_takes_online_history_and_a_model_of_ones_own(
    run_dir: Path, ranker_dir: Path, tmp_path: Path
) -> None:
    given, out = written(tmp_path, [row(clicked=1), row(hour=210)]), tmp_path / "preds.parquet"
    args = ["batch-score", "--interactions", given, "--out", out, "--output-dir", run_dir]
    done = funnel(*args, "--online-history", "--model-dir", ranker_dir)
    assert done.exit_code == 0, done.output
    assert "from earlier rows of the file, the eval split and the train split" in done.output
    assert not re.search("not in the|without training|yellow", done.output)
    assert pl.read_parquet(out)["click"].to_list() == [3, 4]


def test_what_it_writes_is_what_score_weights_reads(run_dir: Path, ranker_dir: Path, tmp_path: Path) -> None:
    given, out = written(tmp_path, many_rows()), tmp_path / "preds.parquet"
    scored = funnel(
        "batch-score",
        "--interactions",
        given,
        "--out",
        out,
        "--output-dir",
        run_dir,
        "--model-dir",
        ranker_dir,
    )
    assert scored.exit_code == 0, scored.output
    objectives = ["--objective", "click", "--objective", "loved", "--objective", "watch_time_s"]
    weighed = funnel("score-weights", "--predictions", out, *objectives, "--output-dir", run_dir)
    assert weighed.exit_code == 0, weighed.output
    assert "50 impressions in 3 lists by user" in weighed.output


def test_the_command_says_why_there_is_no_model(run_dir: Path, tmp_path: Path) -> None:
    given = written(tmp_path, [row()])
    done = funnel("batch-score", "--interactions", given, "--out", tmp_path / "p", "--output-dir", run_dir)
    assert done.exit_code == 1
    assert "no ranking model was pushed" in done.output
    assert "auc 0.5, required: at least 0.7" in done.output
    assert not (tmp_path / "p").exists()


def test_the_command_does_not_write_over_what_it_reads(run_dir: Path, tmp_path: Path) -> None:
    given = written(tmp_path, [row()])
    done = funnel("batch-score", "--interactions", given, "--out", given, "--output-dir", run_dir)
    assert done.exit_code == 2
    assert "is the file that is read" in done.output


def test_the_command_without_a_finished_run_says_what_to_do(tmp_path: Path) -> None:
    given = written(tmp_path, [row()])
    done = funnel("batch-score", "--interactions", given, "--out", tmp_path / "p", "--output-dir", tmp_path)
    assert done.exit_code == 1
    assert "no finished run in" in done.output
