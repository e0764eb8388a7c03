"""The waterfall of stub models whose answers are known: everybody is retrieved i0, i1, ... in this order."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import tensorflow as tf
from click.testing import CliRunner
from tfx_bsl.coders import example_coder

from schema.contract import DatasetSpec
from schema.errors import DataError, ServingError
from schema.tables import INTERACTIONS, ITEMS
from tfx_pipeline.cli import main
from tfx_pipeline.examples import ExampleSettings, example_batch, user_state_columns
from tfx_pipeline.leakage.recorded import user_state_dtypes
from tfx_pipeline.waterfall import TWO_TOWER, FunnelLists, FunnelSettings, follow, measure_waterfall
from trainer import raw_inputs
from trainer.waterfall import Positives, Waterfall, in_lists

NUM_ITEMS = 12
TRAIN_END = 1_000
SPEC = DatasetSpec.model_validate(
    {
        "name": "stub",
        "interactions": {
            "files": ["log.csv"],
            "columns": {n: n for n in ("user_id", "item_id", "event_time_unix_s", "surface")},
            "labels": {"click": "click"},
        },
        "users": {"files": ["users.csv"], "columns": {"user_id": "user_id"}},
        "items": {"files": ["items.csv"], "columns": {"item_id": "item_id"}},
        "positive": "click",
        "tasks": [{"name": "click", "label": "click", "kind": "binary"}],
        "split": {"fractions": [0.8, 0.1, 0.1]},
    }
)
# Depth 8, 6 to the ranker, which likes high numbers, 2 shown. ann saw i0 and i1: she is retrieved i2 to i9,
# ranked i2 to i7, shown i7 and i6. ben and cat are retrieved i0 to i7, ranked i0 to i5, shown i5 and i4.
SETTINGS = FunnelSettings(depth=8, k=2, num_candidates=6)
LOG = [
    ("ann", "i0", 10, "home", 1.0, "train"),
    ("ann", "i1", 20, "home", 1.0, "train"),
    ("ben", "i3", 30, "home", 0.0, "train"),
    ("ann", "i0", 2_000, "home", 1.0, "test"),  # chosen before
    ("ann", "i7", 2_001, "home", 1.0, "test"),  # shown
    ("ann", "i7", 2_002, "feed", 1.0, "test"),  # the same pair again: counted once, where it was first
    ("ann", "i9", 2_003, "feed", 1.0, "test"),  # cut after retrieval
    ("ann", "i3", 2_004, "feed", 1.0, "test"),  # ranked low
    ("ann", "i5", 2_005, "feed", 0.0, "test"),  # no positive
    ("ben", "i9", 2_006, None, 1.0, "test"),  # not retrieved
    ("ben", "gone", 2_007, "home", 1.0, "test"),  # not in the catalogue
    ("cat", "i4", 2_008, "home", 1.0, "test"),  # shown
]


class Retrieval(tf.Module):
    """The first items that are not excluded."""

    def __init__(self) -> None:
        super().__init__()
        inputs = raw_inputs.query_signature(SPEC)
        inputs["k"] = tf.TensorSpec([None], tf.int32, name="k")
        for name in ("exclude_item_ids", "allow_item_id"):
            inputs[name] = tf.TensorSpec([None, None], tf.string, name=name)
        self.served = {"serving_default": tf.function(self.serve).get_concrete_function(**inputs)}

    def serve(self, **inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        items = tf.constant([f"i{n}" for n in range(NUM_ITEMS)])
        excluded = tf.reduce_any(
            items[tf.newaxis, :, tf.newaxis] == inputs["exclude_item_ids"][:, tf.newaxis], 2
        )
        tf.debugging.assert_equal(tf.shape(inputs["allow_item_id"])[1], 0)
        order = tf.argsort(tf.cast(excluded, tf.int32), axis=1, stable=True)[:, : inputs["k"][0]]
        return {"item_ids": tf.where(tf.gather(excluded, order, batch_dims=1), "", tf.gather(items, order))}


class Ranking(tf.Module):
    """Scores an item by its number; the pre-ranker, if any, keeps the lowest numbers but the first."""

    def __init__(self, has_preranker: bool) -> None:
        super().__init__()
        inputs = raw_inputs.ranking_signature(SPEC)
        inputs["candidate_item_ids"] = tf.TensorSpec([None, None], tf.string, name="candidate_item_ids")
        self.served = {"serving_default": tf.function(self.serve).get_concrete_function(**inputs)}
        if has_preranker:
            inputs["k"] = tf.TensorSpec([None], tf.int32, name="k")
            self.served["pre_rank"] = tf.function(self.pre_rank).get_concrete_function(**inputs)

    def serve(self, **inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        number = tf.strings.regex_replace(inputs["candidate_item_ids"], "^i", "")
        return {"score": tf.strings.to_number(tf.where(number == "", "0", number))}

    def pre_rank(self, **inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"item_ids": inputs["candidate_item_ids"][:, 1 : inputs["k"][0] + 1]}


def save(module: Retrieval | Ranking, folder: Path) -> Path:
    tf.saved_model.save(module, str(folder), signatures=module.served)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    names = ("user_id", "item_id", "event_time_unix_s", "surface", "click", "split")
    log = pl.DataFrame(dict(zip(names, zip(*LOG, strict=True), strict=True))).with_row_index("row_number")
    log.write_parquet(folder / INTERACTIONS)
    pl.DataFrame({"item_id": [f"i{n}" for n in range(NUM_ITEMS)]}).write_parquet(folder / ITEMS)
    users = pl.DataFrame({"user_id": ["ann", "ben", "cat", "dan"]})
    states = user_state_columns(log, users, SPEC, ExampleSettings(TRAIN_END, 10), "home", log["item_id"])
    options = tf.io.TFRecordOptions(compression_type="GZIP")
    with tf.io.TFRecordWriter(str(folder / "states.gz"), options) as writer:
        batch = example_batch(states, user_state_dtypes(SPEC))
        for example in example_coder.RecordBatchToExamplesEncoder().encode(batch):
            writer.write(example)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "retrieval": save(Retrieval(), folder / "retrieval"),
        "ranking": save(Ranking(False), folder / "ranking"),
        "preranked": save(Ranking(True), folder / "preranked"),
    }


@pytest.fixture(scope="module")
def measure(tables: Path, models: dict[str, Path]) -> Callable[..., Waterfall]:
    def run(ranking: str = "ranking", settings: FunnelSettings = SETTINGS) -> Waterfall:
        chosen = {"retrieval": models["retrieval"], "ranking": models[ranking]}
        return measure_waterfall(tables, str(tables / "states.gz"), chosen, SPEC, settings)

    return run


def test_every_positive_is_lost_where_it_was_lost(measure: Callable[..., Waterfall]) -> None:
    found = measure()
    assert (found.num_users, found.num_users_with_positives) == (3, 3)
    assert found.whole.num_positives == 7
    assert found.whole.lost == {
        "not in the catalogue": 1,
        "removed by a rule: chosen before": 1,
        "not among the 8 of any source": 1,
        "cut after retrieval at 6": 1,
        "ranked below 2": 1,
    }
    assert found.whole.shown == 2
    (source,) = found.sources
    # Of 5 pairs that may be recommended, all but ben's i9.
    assert (source.name, source.depth, source.recall, source.unique_recall) == (TWO_TOWER, 8, 0.8, 0.8)


def test_slices_are_those_of_user_item_and_surface(measure: Callable[..., Waterfall]) -> None:
    counts = {tuple(part.slice.items()): (part.num_positives, part.shown) for part in measure().slices[1:]}
    assert counts == {
        # ann has a history, ben only an impression.
        (("user_type", "cold"),): (3, 1),
        (("user_type", "warm"),): (4, 1),
        # i0 and i1 were chosen in training, i3 shown: of three known items, half are head or torso.
        (("item_popularity", "(missing)"),): (1, 0),
        (("item_popularity", "cold"),): (4, 2),
        (("item_popularity", "tail"),): (1, 0),
        (("item_popularity", "torso"),): (1, 0),
        (("surface", "(missing)"),): (1, 0),
        (("surface", "feed"),): (2, 0),
        (("surface", "home"),): (4, 2),
    }


def test_a_preranker_takes_the_place_of_the_cut(measure: Callable[..., Waterfall]) -> None:
    """It keeps the places 1 to 6 of 8: ann i3 to i8, ben and cat i1 to i6; shown are the two highest."""
    found = measure("preranked")
    assert found.whole.lost["cut by the pre-ranker at 6"] == 1  # ann's i9
    assert found.whole.lost["ranked below 2"] == 2  # ann's i3, cat's i4
    assert found.whole.shown == 1


def test_two_sources_and_two_rules_lose_and_find_what_they_should() -> None:
    """A funnel with a second source and a second rule needs their lists alone.

    ann and ben chose i0 to i5 each. Rules remove i0 of ann (chosen before) and i5 of both (not allowed). The
    towers find i1, i2, i3, trending finds i3, i4; the ranker gets i2, i3, i4 and shows i3 and i4.
    """
    followed = Positives(np.repeat([0, 1], 6), [f"i{n}" for n in range(6)] * 2, {"half": ["a", "b"] * 6})
    both = [["i3", "i4"]] * 2
    lists = FunnelLists(
        {"towers": [["i1", "i2", "i3"]] * 2, "trending": both}, [["i2", *both[0]]] * 2, both, False
    )
    rules = {"chosen before": [["i0"], []], "not allowed": [["i5"]] * 2}
    removed = {name: in_lists(followed, items) for name, items in rules.items()}
    slices, (towers, trending) = follow(followed, np.ones(12, bool), removed, lists, FunnelSettings(3, 2, 3))
    assert slices[0].lost == {
        "not in the catalogue": 0,
        "removed by a rule: chosen before": 1,
        "removed by a rule: not allowed": 2,
        "not among the 3 of any source": 1,  # ben's i0
        "cut after retrieval at 3": 2,  # i1
        "ranked below 2": 2,  # i2
    }
    assert [(part.num_positives, part.shown) for part in slices] == [(12, 4), (6, 2), (6, 2)]
    # Nine may be recommended: the towers find six of them, i3 is also trending.
    assert (towers.recall, towers.unique_recall) == pytest.approx((6 / 9, 4 / 9))
    assert (trending.recall, trending.unique_recall) == pytest.approx((4 / 9, 2 / 9))
    assert towers.overlap == pytest.approx({"trending": 2 / 6})
    assert trending.overlap == pytest.approx({"towers": 2 / 4})


def test_a_sample_of_users_is_told_as_such(measure: Callable[..., Waterfall]) -> None:
    found = measure(settings=FunnelSettings(depth=8, k=2, num_candidates=6, max_users=2))
    assert (found.num_users, found.num_users_with_positives) == (2, 3)


def test_users_without_a_state_and_models_that_are_gone_are_told(
    tables: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ServingError, match="no SavedModel"):
        measure_waterfall(tables, str(tables / "states.gz"), models | {"ranking": tmp_path}, SPEC, SETTINGS)
    for name, change in ((ITEMS, pl.DataFrame.head), (INTERACTIONS, rename_users)):
        change(pl.read_parquet(tables / name)).write_parquet(tmp_path / name)
    with pytest.raises(DataError, match="3 test users have no user state"):
        measure_waterfall(tmp_path, str(tables / "states.gz"), models, SPEC, SETTINGS)


def rename_users(log: pl.DataFrame) -> pl.DataFrame:
    return log.with_columns(pl.concat_str(pl.lit("new-"), "user_id").alias("user_id"))


def test_the_command_prints_and_writes_the_waterfall(
    tables: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("retrieval", "ranking"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Format-Serving").symlink_to(models[name])
    result = SimpleNamespace(
        dataset="stub",
        tables_dir=str(tables),
        user_states=str(tables / "states.gz"),
        config=SimpleNamespace(dataset=SPEC, retrieval=SimpleNamespace(max_k=8)),
    )
    uris = {(f"Trainer.{name}", "model"): str(tmp_path / name) for name in ("retrieval", "ranking")}
    monkeypatch.setattr("tfx_pipeline.run_result.read_run", lambda _: result)
    monkeypatch.setattr("tfx_pipeline.outcome.read_artifact_uris", lambda _: uris)
    arguments = ["waterfall", "--k", "2", "--num-candidates", "6", "--json", str(tmp_path / "facts")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "7 positives of 3 of 3 test users" in done.output
    assert "28.6%" in done.output  # 2 of 7 shown
    assert json.loads((tmp_path / "facts" / "waterfall.json").read_text())["slices"][0]["shown"] == 2
    assert CliRunner().invoke(main, ["waterfall", "--num-candidates", "9"]).exit_code == 2
