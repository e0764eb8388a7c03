"""The exported ranker: both signatures, unknown items, padding, a fresh process."""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import ranking_world as world
from trainer import ranking_export, raw_inputs
from trainer.catalogue import Catalogue
from trainer.config import RankingConfig
from trainer.ranking import EncodedQuery, RankingModel
from trainer.ranking_losses import label_statistics

SPEC = world.spec()
TASKS = ("click", "stars", "watch")
NOW = 1_700_000_000


def raw_item(item_id: str) -> dict[str, Any]:
    number = int(item_id[1:])
    return {
        "item_id": item_id,
        "creator_id": f"c{number % 3}",
        "tag": [[f"t{number % 2}"], ["t0", "t1"], []][number % 3],
        "length": float(7 * number),
        "upload_time_unix_s": NOW - number * world.DAY_S,
    }


def raw_query(user_id: str, history: list[str]) -> dict[str, Any]:
    return {
        "user_id": user_id,
        "age": 33.0,
        "history_item_ids": history,
        "surface": "feed",
        "event_time_unix_s": NOW,
    }


def example(values: Mapping[str, Any]) -> bytes:
    """A serialized tf.Example; None is absent."""
    result = tf.train.Example()
    for name, value in values.items():
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not items:
            continue
        feature = result.features.feature[name]
        if isinstance(items[0], int):
            feature.int64_list.value.extend(items)
        elif isinstance(items[0], float):
            feature.float_list.value.extend(items)
        else:
            feature.bytes_list.value.extend(item.encode() for item in items)
    return result.SerializeToString()


def request(queries: list[dict[str, Any]], candidates: list[list[str]]) -> dict[str, tf.Tensor]:
    longest = max(len(q["history_item_ids"]) for q in queries)
    lists = [q["history_item_ids"] + [""] * (longest - len(q["history_item_ids"])) for q in queries]
    return {
        "user_id": tf.constant([q["user_id"] for q in queries]),
        "age": tf.constant([q["age"] for q in queries], tf.float32),
        "history_item_ids": tf.constant(lists, tf.string, [len(queries), longest]),
        "surface": tf.constant([q["surface"] for q in queries]),
        "event_time_unix_s": tf.constant([q["event_time_unix_s"] for q in queries], tf.int64),
        "candidate_item_ids": tf.constant(candidates, tf.string, [len(queries), len(candidates[0])]),
    }


def catalogue(layer: world.TransformStub) -> Catalogue:
    serialized = tf.constant([example(raw_item(item_id)) for item_id in world.ITEMS])
    raw = raw_inputs.parse_candidate_examples(serialized, SPEC)
    transformed = raw_inputs.transform_candidates(layer, raw, SPEC)
    return Catalogue(
        np.array(world.ITEMS, dtype=object),
        {name: value.numpy() for name, value in transformed.items()},
        raw["upload_time_unix_s"].numpy(),
    )


@dataclasses.dataclass
class Exported:
    ranker: ranking_export.ServedRanker
    model: RankingModel
    path: Path
    default: Any
    examples: Any


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A ranker with random weights everywhere, heads included, so that every feature moves every output."""
    rows = world.rows(64, seed=1)
    tf.keras.utils.set_random_seed(1)
    config = RankingConfig(hidden_layers=(16,))
    model = RankingModel(SPEC, world.VOCABULARY_SIZES, label_statistics([rows], SPEC.tasks), config)
    model(rows)
    for weight in model.trainable_weights:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.3))
    path = tmp_path_factory.mktemp("ranker") / "serving" / "1"
    layer = world.TransformStub()
    ranking_export.export(model, layer, catalogue(layer), SPEC, str(path))
    loaded = tf.saved_model.load(str(path))
    return Exported(
        ranking_export.ServedRanker(model, layer, catalogue(layer), SPEC),
        model,
        path,
        loaded.signatures["serving_default"],
        loaded.signatures["serving_examples"],
    )


QUERIES = [raw_query("u3", ["i1", "i5"]), raw_query("u8", []), raw_query("stranger", ["i2", "nowhere"])]


def test_signatures_have_the_documented_names_types_and_shapes(exported: Exported) -> None:
    inputs = exported.default.structured_input_signature[1]
    assert {name: (s.dtype, s.shape.as_list()) for name, s in inputs.items()} == {
        "user_id": (tf.string, [None]),
        "age": (tf.float32, [None]),
        "history_item_ids": (tf.string, [None, None]),
        "surface": (tf.string, [None]),
        "event_time_unix_s": (tf.int64, [None]),
        "candidate_item_ids": (tf.string, [None, None]),
    }
    outputs = exported.default(**request(QUERIES, [["i0", "i1"]] * 3))
    assert {name: (value.dtype, value.shape.as_list()) for name, value in outputs.items()} == {
        **{name: (tf.float32, [3, 2]) for name in (*TASKS, "score")},
        "item_is_known": (tf.int64, [3, 2]),
    }
    assert list(exported.examples.structured_input_signature[1]) == ["examples"]


def test_both_signatures_and_the_model_agree_on_every_pair(exported: Exported) -> None:
    by_request = exported.default(**request(QUERIES, [world.ITEMS] * 3))
    pairs = [example({**query, **raw_item(item)}) for query in QUERIES for item in world.ITEMS]
    by_example = exported.examples(examples=tf.constant(pairs))
    assert set(by_example) == {*TASKS, "score"}
    for name, values in by_example.items():
        assert values.dtype == tf.float32
        np.testing.assert_allclose(np.reshape(values, [3, -1]), by_request[name], rtol=1e-5, atol=1e-5)
        # The agreement says something only if queries and items matter.
        assert len(np.unique(np.round(values, 4))) > 10
    in_memory = exported.ranker.rank_examples(tf.constant(pairs))
    for name, values in by_example.items():
        np.testing.assert_allclose(values, in_memory[name], rtol=1e-5)
    score = 2.0 * by_example["click"] + 0.1 * by_example["watch"]
    np.testing.assert_allclose(by_example["score"], score, rtol=1e-5)


def test_outputs_are_probabilities_and_seconds(exported: Exported) -> None:
    outputs = exported.default(**request(QUERIES, [world.ITEMS] * 3))
    assert np.all((outputs["click"] > 0) & (outputs["click"] < 1))
    assert np.all(outputs["watch"] > 0)


def test_unknown_item_is_flagged_and_judged_like_an_example_of_which_nothing_is_known(
    exported: Exported,
) -> None:
    outputs = exported.default(**request(QUERIES[:1], [["nobody-has-seen-this", "i4"]]))
    assert outputs["item_is_known"].numpy().tolist() == [[0, 1]]
    alone = example({**QUERIES[0], **dict.fromkeys(raw_item("i0")), "item_id": "another-unknown"})
    expected = exported.examples(examples=tf.constant([alone]))
    for name in (*TASKS, "score"):
        assert outputs[name][0, 0].numpy() == pytest.approx(expected[name][0].numpy(), rel=1e-5)


def test_padding_is_zero_in_every_output(exported: Exported) -> None:
    outputs = exported.default(**request(QUERIES[:2], [["i0", "i1", "i2"], ["i3", "", ""]]))
    padded = np.array([[False, False, False], [False, True, True]])
    for name, values in outputs.items():
        assert np.all(values.numpy()[padded] == 0), name
        assert np.all(values.numpy()[~padded] != 0), name


def test_candidate_is_judged_alike_alone_and_among_others_and_twice(exported: Exported) -> None:
    alone = exported.default(**request(QUERIES[1:2], [["i7"]]))
    among = exported.default(**request(QUERIES, [["i7", "i2", "i7"]] * 3))
    for name, values in among.items():
        np.testing.assert_allclose(values[1, 0], alone[name][0, 0], rtol=1e-5)
        np.testing.assert_allclose(values[:, 0], values[:, 2], rtol=1e-6)


def test_request_without_candidates_gets_empty_outputs(exported: Exported) -> None:
    outputs = exported.default(**request(QUERIES, [[], [], []]))
    assert {name: value.shape.as_list() for name, value in outputs.items()} == {
        name: [3, 0] for name in (*TASKS, "score", "item_is_known")
    }


def test_unknown_user_without_anything_is_served(exported: Exported) -> None:
    nothing = {
        "user_id": "",
        "age": float("nan"),
        "history_item_ids": [],
        "surface": "",
        "event_time_unix_s": -1,
    }
    outputs = exported.default(**request([nothing], [["i0", "unknown"]]))
    assert all(np.all(np.isfinite(value)) for value in outputs.values())


def test_query_is_encoded_once_per_request(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded_rows: list[int] = []
    encode = exported.model.encode_query

    def spy(features: Mapping[str, tf.Tensor]) -> EncodedQuery:
        encoded_rows.extend(value.shape[0] for value in features.values())
        return encode(features)

    monkeypatch.setattr(exported.model, "encode_query", spy)
    inputs = request(QUERIES, [world.ITEMS] * 3)
    exported.ranker.rank(inputs, inputs.pop("candidate_item_ids"))
    assert set(encoded_rows) == {3}


def test_export_loads_in_a_fresh_process_that_has_only_tensorflow(exported: Exported) -> None:
    code = (
        "import sys, tensorflow as tf\n"
        "model = tf.saved_model.load(sys.argv[1])\n"
        "print(sorted(model.signatures), {'scann', 'trainer', 'tensorflow_transform'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(exported.path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    assert result.stdout.strip() == "['serving_default', 'serving_examples'] set()"


def test_failed_export_leaves_nothing_behind(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "in_the_way").touch()
    layer = world.TransformStub()
    with pytest.raises(OSError, match="not empty"):
        ranking_export.export(exported.model, layer, catalogue(layer), SPEC, str(tmp_path / "1"))
    assert [p.name for p in tmp_path.rglob("*")] == ["1", "in_the_way"]


def test_dataset_without_upload_time_and_item_features_is_served() -> None:
    spec = world.spec(items={"files": ["items.csv"], "columns": {"item_id": "item_id"}})
    rows = world.rows(64, seed=1)
    model = RankingModel(spec, world.VOCABULARY_SIZES, label_statistics([rows], spec.tasks), RankingConfig())
    model(rows)
    items = Catalogue(np.array(["i0"], dtype=object), {"item_id_id": np.array([2])}, None)
    ranker = ranking_export.ServedRanker(model, world.TransformStub(), items, spec)
    inputs = request(QUERIES, [["i0", "unknown"]] * 3)
    outputs = ranker.rank(inputs, inputs.pop("candidate_item_ids"))
    np.testing.assert_allclose(outputs["click"], rows["click"].mean(), rtol=1e-5)
