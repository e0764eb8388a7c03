"""The exported ranker: all signatures, unknown items, padding, a fresh process."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import ranking_world as world
from tests.trainer.ranking_requests import (
    SPEC,
    UNSHOWN,
    catalogue,
    described_request,
    example,
    raw_item,
    raw_query,
    request,
)
from trainer import features as ft
from trainer import ranking_export
from trainer.body_config import ExpertsConfig
from trainer.calibration import Calibrator, Curve
from trainer.calibration_config import CalibrationConfig
from trainer.catalogue import Catalogue
from trainer.config import RankingConfig
from trainer.fingerprint import Fingerprint
from trainer.impressions import ItemAttributes
from trainer.label_statistics import label_statistics
from trainer.ranking import EncodedQuery, RankingModel

TASKS = ("click", "stars", "watch")


@dataclasses.dataclass
class Exported:
    ranker: ranking_export.ServedRanker
    model: RankingModel
    path: Path
    default: Any
    examples: Any
    weighted: Any
    described: Any


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A ranker with random weights everywhere, heads included, so that every feature moves every output.

    Clicks are calibrated, those of the surface "feed" by a curve of their own.
    """
    rows, layer = world.rows(64, seed=1), world.TransformStub()
    items = catalogue(layer)
    tf.keras.utils.set_random_seed(1)
    config = RankingConfig(
        experts=ExpertsConfig(hidden_layers=(16,)),
        calibration=CalibrationConfig(method="platt", slice_feature="surface"),
    )
    attributes = ItemAttributes(items, world.VOCABULARY_SIZES["item_id"], SPEC)
    statistics = label_statistics([rows], SPEC.tasks)
    model = RankingModel(SPEC, world.VOCABULARY_SIZES, statistics, attributes, config)
    model(rows)
    for weight in model.trainable_weights:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.1))
    model.calibrators = {"click": Calibrator(HALVED, {FEED_ID: SQUASHED})}
    path = tmp_path_factory.mktemp("ranker") / "serving" / "1"
    served = ranking_export.ServedRanker(model, layer, items, SPEC)
    ranking_export.export(served, path, Fingerprint({}))
    signatures = tf.saved_model.load(str(path)).signatures
    return Exported(
        served,
        model,
        path,
        signatures["serving_default"],
        signatures["serving_examples"],
        signatures["serving_weighted"],
        signatures["serving_candidates"],
    )


HALVED = Curve((0.0, 1.0), (0.0, 0.5))
SQUASHED = Curve((0.0, 0.3, 1.0), (0.1, 0.7, 0.9))
FEED_ID = "3"  # of the surface, in the vocabulary home, feed
NAN = math.nan
QUERIES = [
    raw_query(
        "u3",
        ["i1", "i5"],
        ("i4", 20 * world.DAY_S, "", 0.0, NAN, 3.0),
        ("i1", 9_000, "home", 1.0, 5.0, 40.0),
        ("nowhere", 60, "feed", 1.0, NAN, NAN),
        ("i5", 60, "nowhere", NAN, NAN, 0.0),
    ),
    {**raw_query("u8", []), "surface": "home"},
    raw_query("stranger", ["i2", "nowhere"], ("i2", 0, "feed", 1.0, 2.0, 9.0)),
]


def test_signatures_have_the_documented_names_types_and_shapes(exported: Exported) -> None:
    inputs = exported.default.structured_input_signature[1]
    request_inputs = {
        "user_id": (tf.string, [None]),
        "age": (tf.float32, [None]),
        "history_item_ids": (tf.string, [None, None]),
        "surface": (tf.string, [None]),
        "event_time_unix_s": (tf.int64, [None]),
        "impression_item_ids": (tf.string, [None, None]),
        "impression_event_time_unix_s": (tf.int64, [None, None]),
        "impression_surfaces": (tf.string, [None, None]),
        "impression_click": (tf.float32, [None, None]),
        "impression_rating": (tf.float32, [None, None]),
        "impression_watch_time_s": (tf.float32, [None, None]),
        "candidate_item_ids": (tf.string, [None, None]),
    }
    assert {name: (s.dtype, s.shape.as_list()) for name, s in inputs.items()} == request_inputs
    weighted = exported.weighted.structured_input_signature[1]
    assert {name: (s.dtype, s.shape.as_list()) for name, s in weighted.items()} == {
        **request_inputs,
        "score_weights": (tf.float32, [None, 3]),
    }
    described = exported.described.structured_input_signature[1]
    del request_inputs["candidate_item_ids"]
    assert {name: (s.dtype, s.shape.as_list()) for name, s in described.items()} == {
        **request_inputs,
        "item_id": (tf.string, [None, None]),
        "creator_id": (tf.string, [None, None]),
        "tag": (tf.string, [None, None, None]),
        "length": (tf.float32, [None, None]),
        "upload_time_unix_s": (tf.int64, [None, None]),
        "item_counts": (tf.float32, [None, None, 40]),
        "score_weights": (tf.float32, [None, 3]),
    }
    outputs = exported.default(**request(QUERIES, [["i0", "i1"]] * 3))
    assert {name: (value.dtype, value.shape.as_list()) for name, value in outputs.items()} == {
        **{name: (tf.float32, [3, 2]) for name in (*TASKS, "score")},
        "item_is_known": (tf.int64, [3, 2]),
    }
    assert list(exported.examples.structured_input_signature[1]) == ["examples"]


def test_requests_examples_and_the_model_agree_on_every_pair(exported: Exported) -> None:
    by_request = exported.default(**request(QUERIES, [world.ITEMS] * 3))
    pairs = [example({**query, **raw_item(item)}) for query in QUERIES for item in world.ITEMS]
    by_example = exported.examples(examples=tf.constant(pairs))
    assert {name: values.dtype for name, values in by_example.items()} == {
        **dict.fromkeys((*TASKS, "score"), tf.float32),
        "item_is_known": tf.int64,
    }
    assert by_example["item_is_known"].numpy().all()
    for name in (*TASKS, "score"):
        values = by_example[name]
        np.testing.assert_allclose(np.reshape(values, [3, -1]), by_request[name], rtol=1e-5, atol=1e-5)
        # The agreement says something only if queries and items matter.
        assert len(np.unique(np.round(values, 4))) > 10
    in_memory = exported.ranker.rank_examples(tf.constant(pairs))
    for name, values in by_example.items():
        np.testing.assert_allclose(values, in_memory[name], rtol=1e-5, err_msg=name)
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
    nothing = {**dict.fromkeys(raw_item("i0")), "item_id": "another-unknown", "item_counts": UNSHOWN}
    alone = example({**QUERIES[0], **nothing})
    expected = exported.examples(examples=tf.constant([alone]))
    for name in (*TASKS, "score", "item_is_known"):
        assert outputs[name][0, 0].numpy() == pytest.approx(expected[name][0].numpy(), rel=1e-5)


def test_a_new_item_is_judged_by_the_features_that_an_example_brings(exported: Exported) -> None:
    new = {**QUERIES[0], **raw_item("i4"), "item_id": "uploaded-just-now"}
    without_counts = {name: value for name, value in new.items() if name != "item_counts"}
    other_creator = {**without_counts, "creator_id": raw_item("i5")["creator_id"]}
    rows = [{**new, "item_counts": UNSHOWN}, without_counts, other_creator, new]
    alone = exported.examples(examples=tf.constant([example(without_counts)]))
    outputs = exported.examples(examples=tf.constant([example(row) for row in rows]))
    assert outputs["item_is_known"].numpy().tolist() == [0, 0, 0, 0]
    for name in (*TASKS, "score"):
        unshown, counted_as_unshown, of_another, shown = outputs[name].numpy()
        assert counted_as_unshown == pytest.approx(unshown, rel=1e-6)
        assert alone[name][0].numpy() == pytest.approx(unshown, rel=1e-5)
        assert of_another != pytest.approx(unshown, rel=1e-4), name
        assert shown != pytest.approx(unshown, rel=1e-4), name


def test_candidates_described_as_in_the_catalogue_are_judged_like_their_ids(exported: Exported) -> None:
    nothing = {"item_id": "nobody-has-seen-this", "item_counts": UNSHOWN}
    items = [*map(raw_item, world.ITEMS), nothing, {}]
    by_id = exported.default(**request(QUERIES, [[*world.ITEMS, "nobody-has-seen-this", ""]] * 3))
    by_features = exported.described(**described_request(QUERIES, [items] * 3))
    assert by_features.keys() == by_id.keys()
    for name, values in by_features.items():
        assert values.dtype == by_id[name].dtype
        np.testing.assert_allclose(values, by_id[name], rtol=1e-5, atol=1e-6, err_msg=name)
    in_memory = exported.ranker.rank_described(described_request(QUERIES, [items] * 3))
    for name, values in by_features.items():
        np.testing.assert_allclose(values, in_memory[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_candidates_that_are_described_differ_from_request_to_request(exported: Exported) -> None:
    new = {name: value for name, value in raw_item("i4").items() if name != "item_counts"}
    new["item_id"] = "uploaded-just-now"
    # Not what the catalogue says of i4.
    changed = {**raw_item("i4"), "tag": ["t1"], "length": 3.0}
    pairs = [(QUERIES[0], [new, changed, {}]), (QUERIES[1], [raw_item("i2"), new, changed])]
    outputs = exported.described(**described_request(*map(list, zip(*pairs, strict=True))))
    assert outputs["item_is_known"].numpy().tolist() == [[0, 1, 0], [1, 0, 1]]
    for row, (query, items) in enumerate(pairs):
        examples = [example({**query, **item}) for item in items if item]
        expected = exported.examples(examples=tf.constant(examples))
        for name in (*TASKS, "score"):
            found = outputs[name][row, : len(examples)]
            np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    known = exported.default(**request(QUERIES[:1], [["i4"]]))
    assert np.abs(known["score"][0, 0] - outputs["score"][0, 1]) > 1e-4


def test_described_candidates_take_score_weights_and_may_be_none(exported: Exported) -> None:
    inputs = described_request(QUERIES[:1], [[raw_item("i4")]])
    outputs = exported.described(**{**inputs, "score_weights": tf.constant([[0.0, 0.0, 3.0]])})
    np.testing.assert_allclose(outputs["score"], 3.0 * outputs["watch"], rtol=1e-6)
    empty = exported.described(**described_request(QUERIES, [[], [], []]))
    assert {name: value.shape.as_list() for name, value in empty.items()} == {
        name: [3, 0] for name in (*TASKS, "score", "item_is_known")
    }


@pytest.mark.parametrize("name", ["creator_id", "tag", "upload_time_unix_s", "item_counts"])
def test_features_of_another_number_of_candidates_are_refused(exported: Exported, name: str) -> None:
    inputs = described_request(QUERIES, [[raw_item("i4"), raw_item("i5")]] * 3)
    inputs[name] = inputs[name][:, :-1]
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{name} must describe the candidates that"):
        exported.described(**inputs)


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
    nothing = {**raw_query("", []), "age": NAN, "surface": "", "event_time_unix_s": -1}
    for queries in ([nothing], [nothing, QUERIES[0]]):
        outputs = exported.default(**request(queries, [["i0", "unknown"]] * len(queries)))
        assert all(np.all(np.isfinite(value)) for value in outputs.values())


def test_calibration_is_that_of_the_surface_or_of_all(exported: Exported) -> None:
    served = exported.default(**request(QUERIES, [world.ITEMS] * 3))["click"].numpy()
    calibrators, exported.model.calibrators = exported.model.calibrators, {}
    try:
        inputs = request(QUERIES, [world.ITEMS] * 3)
        raw = exported.ranker.rank(inputs, inputs.pop("candidate_item_ids"))["click"].numpy()
    finally:
        exported.model.calibrators = calibrators
    np.testing.assert_allclose(served[1], raw[1] / 2, rtol=1e-5)
    for query in (0, 2):
        low, high = 0.1 + 2 * raw[query], 0.7 + (raw[query] - 0.3) * 2 / 7
        np.testing.assert_allclose(served[query], np.where(raw[query] < 0.3, low, high), rtol=1e-5)


def test_weights_of_a_request_make_the_score_and_nothing_else(exported: Exported) -> None:
    inputs = request(QUERIES, [["i0", "i7", "unknown", ""]] * 3)
    declared = exported.default(**inputs)
    # In the order of the tasks: click, stars, watch.
    weights = np.array([[NAN, NAN, NAN], [0.0, 3.0, NAN], [1.5, 0.0, 0.25]], np.float32)
    outputs = exported.weighted(**inputs, score_weights=tf.constant(weights))
    for name in (*TASKS, "item_is_known"):
        np.testing.assert_array_equal(outputs[name], declared[name])
    used = [(2.0, 0.0, 0.1), (0.0, 3.0, 0.1), (1.5, 0.0, 0.25)]
    for row, (click, stars, watch) in enumerate(used):
        expected = (
            click * outputs["click"][row] + stars * outputs["stars"][row] + watch * outputs["watch"][row]
        )
        np.testing.assert_allclose(outputs["score"][row], expected, rtol=1e-6)
    np.testing.assert_array_equal(outputs["score"][0], declared["score"][0])
    assert np.all(outputs["score"][:, 3] == 0)


@pytest.mark.parametrize("weight", [-1.0, math.inf])
def test_weights_of_the_wrong_sign_or_without_end_are_refused(exported: Exported, weight: float) -> None:
    inputs = request(QUERIES[:1], [["i0"]])
    with pytest.raises(tf.errors.InvalidArgumentError, match="score_weights must be finite and >= 0"):
        exported.weighted(**inputs, score_weights=tf.constant([[NAN, weight, NAN]]))


@pytest.mark.parametrize(
    "name",
    ["impression_event_time_unix_s", "impression_surfaces", "impression_click", "impression_watch_time_s"],
)
def test_impressions_of_different_length_are_refused(exported: Exported, name: str) -> None:
    inputs = request(QUERIES, [["i0"]] * 3)
    inputs[name] = inputs[name][:, :-1]
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{name} and impression_item_ids must be lists"):
        exported.default(**inputs)


def test_impressions_move_every_output_of_a_known_item(exported: Exported) -> None:
    shown, _, _ = QUERIES
    without = raw_query("u3", ["i1", "i5"])
    outputs = exported.default(**request([shown, without], [world.ITEMS] * 2))
    for name in (*TASKS, "score"):
        assert np.all(np.abs(outputs[name][0] - outputs[name][1]) > 1e-6), name


def test_a_user_is_judged_alike_alone_and_beside_users_with_longer_lists(exported: Exported) -> None:
    together = exported.default(**request(QUERIES, [world.ITEMS] * 3))
    for row, query in enumerate(QUERIES):
        alone = exported.default(**request([query], [world.ITEMS]))
        for name, values in together.items():
            np.testing.assert_allclose(values[row], alone[name][0], rtol=1e-5, atol=1e-6)


def test_another_catalogue_leaves_the_items_that_did_not_change_as_they_were(exported: Exported) -> None:
    layer = world.TransformStub()
    items = [raw_item(item_id) for item_id in reversed(world.ITEMS) if item_id != "i3"]
    changed = next(item for item in items if item["item_id"] == "i7")
    changed["creator_id"], changed["item_counts"] = "c0", UNSHOWN
    items.insert(5, {**raw_item("i9"), "item_id": "new", "item_counts": UNSHOWN})
    newer = catalogue(layer, items)
    model, kept = exported.model, exported.model.attributes
    model.attributes = ItemAttributes(newer, world.VOCABULARY_SIZES["item_id"], SPEC)
    try:
        ranker = ranking_export.ServedRanker(model, layer, newer, SPEC)
        inputs = request(QUERIES, [[*world.ITEMS, "new"]] * 3)
        outputs = ranker.rank(inputs, inputs.pop("candidate_item_ids"))
    finally:
        model.attributes = kept
    before = exported.default(**request(QUERIES, [[*world.ITEMS, "new"]] * 3))
    same = [place for place, item_id in enumerate(world.ITEMS) if item_id not in ("i3", "i7")]
    for name in (*TASKS, "score"):
        after, earlier = outputs[name].numpy(), before[name].numpy()
        np.testing.assert_allclose(after[:, same], earlier[:, same], rtol=1e-5, atol=1e-6)
        for place in (3, 7, 12):
            assert np.all(np.abs(after[:, place] - earlier[:, place]) > 1e-6)
    assert outputs["item_is_known"].numpy()[0].tolist() == [1, 1, 1, 0, *[1] * 9]


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
    assert result.stdout.strip() == (
        "['fingerprint', 'score_tasks', 'serving_candidates', 'serving_default', 'serving_examples', "
        "'serving_weighted'] set()"
    )


def test_the_columns_of_score_weights_are_told_with_the_declared_weights(exported: Exported) -> None:
    tell = tf.saved_model.load(str(exported.path)).signatures["score_tasks"]
    told = tell(columns=tf.constant([0, 1, 2, 3, -1]))
    # As `ranking_world` declares them.
    assert told["tasks"].numpy().tolist() == [b"click", b"stars", b"watch", b"", b""]
    np.testing.assert_allclose(told["weights"], [2.0, 0.0, 0.1, math.nan, math.nan], rtol=1e-6)


def test_failed_export_leaves_nothing_behind(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "in_the_way").touch()
    with pytest.raises(OSError, match="not empty"):
        ranking_export.export(exported.ranker, tmp_path / "1", Fingerprint({}))
    assert [p.name for p in tmp_path.rglob("*")] == ["1", "in_the_way"]


def test_dataset_without_upload_time_and_item_features_is_served() -> None:
    spec = world.spec(items={"files": ["items.csv"], "columns": {"item_id": "item_id"}}, counters={})
    rows = world.rows(64, seed=1)
    rows["item_counters"] = rows["item_counters"][:, :12]
    counters = {name: np.zeros((2, rows[name].shape[1]), np.float32) for name in ft.COUNTER_NAMES}
    items = Catalogue(np.array(["i0"], dtype=object), {"item_id_id": np.array([2])}, None, counters)
    attributes = ItemAttributes(items, world.VOCABULARY_SIZES["item_id"], spec)
    statistics = label_statistics([rows], spec.tasks)
    model = RankingModel(spec, world.VOCABULARY_SIZES, statistics, attributes, RankingConfig())
    model(rows)
    ranker = ranking_export.ServedRanker(model, world.TransformStub(), items, spec)
    inputs = request(QUERIES, [["i0", "unknown"]] * 3)
    outputs = ranker.rank(inputs, inputs.pop("candidate_item_ids"))
    np.testing.assert_allclose(outputs["click"], rows["click"].mean(), rtol=1e-5)
