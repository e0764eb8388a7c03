"""The exported retrieval model: what a fresh process gets from its signatures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scann  # noqa: F401 - registers the operations of the index
import tensorflow as tf

from schema.errors import ConfigError, IndexBuildError
from tests.trainer import retrieval_world as world
from trainer.allow_lists import AllowLists
from trainer.config import HistoryConfig, IndexConfig, RetrievalConfig
from trainer.fingerprint import Fingerprint
from trainer.index import CandidateIndex, Effort, ExactIndex, ExactItems, ScannIndex
from trainer.index_build import build_index
from trainer.index_facts import EffortFacts, IndexFacts
from trainer.retrieval import RetrievalModel
from trainer.retrieval_export import ServedRetrieval, export, read_index
from trainer.served_index import ServedIndex

MAX_K = 50
ALL_ITEMS = [f"i{row}" for row in range(world.NUM_ITEMS)]


@pytest.fixture(scope="module")
def model() -> RetrievalModel:
    tf.keras.utils.set_random_seed(0)
    config = RetrievalConfig(embedding_dim=8, hidden_layers=(16,))
    log_q = np.linspace(-1, -2, world.VOCABULARY_SIZES["item_id"]).astype(np.float32)
    return RetrievalModel(config, world.SPACE, world.VOCABULARY_SIZES, log_q)


def _served(model: RetrievalModel, config: IndexConfig) -> tuple[ServedRetrieval, Any]:
    catalogue = world.catalogue()
    queries = model.encode_users(world.validation_users().query)
    vectors = model.encode_catalogue(catalogue)
    genres = np.array([[f"g{row % world.NUM_SEGMENTS}", "popular" if row < 10 else ""] for row in range(600)])
    index, facts = build_index(
        catalogue.item_ids, vectors, queries, config, MAX_K, attributes={"genres": genres}
    )
    return ServedRetrieval(model, index, world.FakeTransform(), catalogue, world.SPEC, MAX_K), facts


@pytest.fixture(scope="module")
def model_dir(model: RetrievalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("export") / "Format-Serving"
    export(*_served(model, IndexConfig(allow_list=("genres",))), target, Fingerprint({}))
    return target


@pytest.fixture(scope="module")
def signatures(model_dir: Path) -> Any:
    loaded = tf.saved_model.load(str(model_dir))
    signatures = dict(loaded.signatures)
    signatures["keep"] = loaded
    return signatures


def _request(**changes: Any) -> dict[str, tf.Tensor]:
    """Three requests: a known user, an unknown one, and a known one without history."""
    request = {
        "user_id": ["u7", "stranger", "u8"],
        "segment": ["s1", "", "s2"],
        "history_item_ids": [["i3", "i9", "gone"], ["i4", "", ""], ["", "", ""]],
        "exclude_item_ids": [["i3", "i9"], ["", "nonsense"], ["", ""]],
        "allow_genres": [["", ""], ["", ""], ["", ""]],
    } | changes
    tensors = {name: tf.constant(value, tf.string) for name, value in request.items() if name != "k"}
    tensors["event_time_unix_s"] = tf.constant([0, 0, -1], tf.int64)
    tensors["k"] = tf.constant(request.get("k", [4, 2, 5]), tf.int32)
    return tensors


def _text(tensor: tf.Tensor) -> np.ndarray:
    return tensor.numpy().astype(str)


def test_signatures_are_those_of_the_architecture(signatures: Any) -> None:
    for name in ("serving_default", "serving_exact"):
        inputs = signatures[name].structured_input_signature[1]
        assert {n: (s.dtype.name, s.shape.rank) for n, s in inputs.items()} == {
            "user_id": ("string", 1),
            "segment": ("string", 1),
            "history_item_ids": ("string", 2),
            "event_time_unix_s": ("int64", 1),
            "k": ("int32", 1),
            "exclude_item_ids": ("string", 2),
            "allow_genres": ("string", 2),
        }
        outputs = signatures[name].structured_outputs
        assert {n: (s.dtype.name, s.shape.rank) for n, s in outputs.items()} == {
            "item_ids": ("string", 2),
            "scores": ("float32", 2),
            "reason_item_ids": ("string", 2),
            "user_is_known": ("int64", 1),
            "history_length": ("int64", 1),
            "exact_fallback": ("int64", 1),
        }
    outputs = signatures["serving_examples"].structured_outputs
    assert {n: s.dtype.name for n, s in outputs.items()} == {"item_ids": "string", "scores": "float32"}


@pytest.mark.parametrize("signature", ["serving_default", "serving_exact"])
def test_served_ids_and_scores_are_those_of_the_model(
    signature: str, signatures: Any, model: RetrievalModel
) -> None:
    outputs = signatures[signature](**_request())
    history = np.array([[3, 9, -1], [4, -1, -1], [-1, -1, -1]])
    query = world.query_columns(np.array([7, 0, 8]), history)
    query["segment_id"] = np.array([3, 0, 4])
    query["history_item_ids_ids"][0, 2] = 1  # an item that left the catalogue is out of vocabulary
    scores = model.encode_users(query) @ model.encode_catalogue(world.catalogue()).T
    scores[0, [3, 9]] = -np.inf
    for user, k in enumerate((4, 2, 5)):
        expected = np.argsort(-scores[user])[:k]
        assert _text(outputs["item_ids"])[user].tolist() == [f"i{row}" for row in expected] + [""] * (5 - k)
        np.testing.assert_allclose(outputs["scores"][user, :k], scores[user, expected], rtol=1e-4)
        assert (outputs["scores"].numpy()[user, k:] == 0).all()
    assert outputs["user_is_known"].numpy().tolist() == [1, 0, 1]
    assert outputs["history_length"].numpy().tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    "history",
    [HistoryConfig(interests=3), HistoryConfig(encoder="transformer")],
    ids=["interests", "transformer"],
)
def test_every_way_to_read_a_history_is_served_as_it_was_trained(
    history: HistoryConfig, model: RetrievalModel, tmp_path: Path
) -> None:
    tf.keras.utils.set_random_seed(1)
    config = model.config.model_copy(update={"history": history})
    log_q = np.full(world.VOCABULARY_SIZES["item_id"], -6.0, np.float32)
    other = RetrievalModel(config, world.SPACE, world.VOCABULARY_SIZES, log_q)
    export(*_served(other, IndexConfig()), tmp_path / "model", Fingerprint({}))
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    request = _request(k=[5, 5, 5], exclude_item_ids=[[""]] * 3)
    del request["allow_genres"]
    outputs = loaded.signatures["serving_default"](**request)

    query = world.query_columns(np.array([7, 0, 8]), np.array([[3, 9, -1], [4, -1, -1], [-1, -1, -1]]))
    query["segment_id"] = np.array([3, 0, 4])
    query["history_item_ids_ids"][0, 2] = 1
    scores = other.encode_users(query) @ other.encode_catalogue(world.catalogue()).T
    if history.interests > 1:  # the best of a user's query vectors counts
        assert scores.shape == (3, history.interests, world.NUM_ITEMS)
        scores = scores.max(axis=1)
    expected = np.argsort(-scores, axis=1)[:, :5]
    assert _text(outputs["item_ids"]).tolist() == [[f"i{row}" for row in rows] for rows in expected]
    np.testing.assert_allclose(outputs["scores"], np.take_along_axis(scores, expected, 1), rtol=1e-4)


def test_reason_is_the_watched_item_with_the_largest_cosine(signatures: Any, model: RetrievalModel) -> None:
    outputs = signatures["serving_default"](**_request())
    vectors = model.encode_catalogue(world.catalogue())[:, :-1]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    items, reasons = _text(outputs["item_ids"]), _text(outputs["reason_item_ids"])
    for item, reason in zip(items[0, :4], reasons[0, :4], strict=True):
        row = int(item[1:])
        assert reason == ("i3" if unit[row] @ unit[3] > unit[row] @ unit[9] else "i9")
    assert set(reasons[0, :4]) <= {"i3", "i9"} and reasons[0, 4] == ""
    assert reasons[1].tolist() == ["i4", "i4", "", "", ""]
    assert (reasons[2] == "").all()


@pytest.mark.parametrize("k", [0, -3, MAX_K + 1])
def test_k_outside_the_exported_range_is_an_error(k: int, signatures: Any) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"k must be between 1 and {MAX_K}"):
        signatures["serving_default"](**_request(k=[4, k, 5]))


def test_lists_without_any_column_and_a_batch_of_one_work(signatures: Any) -> None:
    nothing = tf.zeros([1, 0], tf.string)
    outputs = signatures["serving_default"](
        user_id=tf.constant([""]),
        segment=tf.constant([""]),
        history_item_ids=nothing,
        exclude_item_ids=nothing,
        allow_genres=nothing,
        event_time_unix_s=tf.constant([-1], tf.int64),
        k=tf.constant([3]),
    )
    assert (_text(outputs["item_ids"]) != "").all() and outputs["item_ids"].shape == (1, 3)
    assert outputs["user_is_known"].numpy().tolist() == [0]


@pytest.mark.parametrize("signature", ["serving_default", "serving_exact"])
def test_only_items_with_an_allowed_value_are_recommended(signature: str, signatures: Any) -> None:
    allow = [["g0", "popular"], ["martian", ""], ["", ""]]
    outputs = signatures[signature](**_request(allow_genres=allow, k=[40, 2, 5]))
    items = _text(outputs["item_ids"])
    rows = [int(item[1:]) for item in items[0] if item]
    assert len(rows) == 40 and all(row % world.NUM_SEGMENTS == 0 or row < 10 for row in rows)
    assert (items[1] == "").all() and (items[2, :5] != "").all()
    assert (outputs["scores"].numpy()[1] == 0).all()
    fallback = outputs["exact_fallback"].numpy().tolist()
    assert fallback[1:] == ([1, 0] if signature == "serving_default" else [0, 0])


def test_every_item_can_be_looked_up_and_an_item_never_seen_has_no_vector(
    signatures: Any, model: RetrievalModel
) -> None:
    found = signatures["lookup_items"](item_ids=tf.constant(["i7", "never seen", "i0"]))
    assert _text(found["item_ids"]).tolist() == ["i7", "", "i0"]
    vectors = model.encode_catalogue(world.catalogue())
    np.testing.assert_allclose(found["vectors"], [vectors[7], np.zeros(9), vectors[0]], rtol=1e-5)


@pytest.mark.parametrize("fault", ["another id", "another vector"])
def test_an_export_whose_ids_do_not_lead_back_to_their_items_is_refused(
    fault: str, model: RetrievalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, facts = _served(model, IndexConfig())
    if fault == "another id":
        ids = served.index.item_ids.numpy()
        ids[[4, 5]] = ids[[5, 4]]
        served.index.item_ids.assign(ids)
    else:
        # The table leads to rows that hold the right ids and the vectors of others.
        order = np.arange(world.NUM_ITEMS)
        order[[3, 4]] = [4, 3]
        served.index = ServedIndex(served.index.index, world.catalogue().item_ids[order], MAX_K)
    with pytest.raises(IndexBuildError, match=r"2 of 600 items .*; item 'i3' came back as 'i[34]'"):
        export(served, facts, tmp_path / "model", Fingerprint({}))
    assert list(tmp_path.iterdir()) == []


def test_an_exact_export_holds_no_operation_of_scann(model: RetrievalModel, tmp_path: Path) -> None:
    export(*_served(model, IndexConfig(kind="exact")), tmp_path / "model", Fingerprint({}))
    assert b"Scann" not in (tmp_path / "model" / "saved_model.pb").read_bytes()


@pytest.mark.parametrize(
    ("attribute", "complaint"),
    [
        ("language", "'language' is not a categorical .* valid: genres, item_id"),
        ("segment", "'segment' is not"),
    ],
)
def test_an_allow_list_must_be_an_item_feature(attribute: str, complaint: str, model: RetrievalModel) -> None:
    catalogue = world.catalogue()
    index, _ = build_index(
        catalogue.item_ids,
        model.encode_catalogue(catalogue),
        model.encode_users(world.validation_users().query),
        IndexConfig(allow_list=(attribute,)),
        MAX_K,
        attributes={attribute: np.array(["x"] * world.NUM_ITEMS)},
    )
    with pytest.raises(ConfigError, match=complaint):
        ServedRetrieval(model, index, world.FakeTransform(), catalogue, world.SPEC, MAX_K)


def test_excluding_nearly_everything_gives_a_short_list_and_everything_an_empty_one(signatures: Any) -> None:
    exclude = [[*ALL_ITEMS[:-2], "", ""], ALL_ITEMS, [""] * world.NUM_ITEMS]
    outputs = signatures["serving_default"](**_request(exclude_item_ids=exclude))
    items = _text(outputs["item_ids"])
    assert set(items[0]) == {ALL_ITEMS[-1], ALL_ITEMS[-2], ""} and set(items[1]) == {""}
    assert (items[2] != "").all()


def test_user_state_examples_get_unseen_items(signatures: Any) -> None:
    def example(**values: list[str]) -> bytes:
        features = {
            name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v.encode() for v in value]))
            for name, value in values.items()
        }
        features["event_time_unix_s"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[9]))
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()

    seen = ALL_ITEMS[:300]
    examples = [
        example(user_id=["u7"], segment=["s1"], history_item_ids=seen[-50:], seen_item_ids=seen),
        example(user_id=["stranger"]),
    ]
    outputs = signatures["serving_examples"](examples=tf.constant(examples))
    items = _text(outputs["item_ids"])
    assert items.shape == (2, MAX_K) and (items != "").all()
    assert not set(items[0]) & set(seen)
    assert (np.diff(outputs["scores"].numpy(), axis=1) <= 0).all()


def test_what_an_example_gets_does_not_hang_on_who_else_is_in_the_batch(model: RetrievalModel) -> None:
    catalogue = world.catalogue()
    # Vectors of no structure: half of the neighbours lie in other leaves.
    vectors = np.random.default_rng(0).normal(size=model.encode_catalogue(catalogue).shape)
    approximate = ScannIndex.build(vectors.astype(np.float32), num_leaves=60)
    approximate.efforts = [Effort(MAX_K, 8, 50)]  # finds part of what is there; more with a longer list
    index = CandidateIndex(ExactIndex(approximate.vectors), approximate)
    served = ServedRetrieval(model, index, world.FakeTransform(), catalogue, world.SPEC, MAX_K)

    def example(user_id: str, seen: list[str]) -> bytes:
        message = tf.train.Example()
        message.features.feature["user_id"].bytes_list.value.append(user_id.encode())
        message.features.feature["event_time_unix_s"].int64_list.value.append(0)
        message.features.feature["seen_item_ids"].bytes_list.value.extend(id_.encode() for id_ in seen)
        return message.SerializeToString()

    users = [example(f"u{number}", []) for number in range(20)]
    # Whoever has seen much makes a batch search harder.
    alone = served.recommend_examples(tf.constant(users))
    together = served.recommend_examples(tf.constant([*users, example("u30", ALL_ITEMS[:400])]))
    np.testing.assert_array_equal(together["item_ids"][:20], alone["item_ids"])


def test_an_exported_index_is_read_back_with_its_exact_items(model: RetrievalModel, tmp_path: Path) -> None:
    catalogue = world.catalogue()
    vectors = model.encode_catalogue(catalogue)
    approximate = ScannIndex.build(vectors, num_leaves=60)
    approximate.efforts = [Effort(MAX_K, 1, MAX_K)]  # finds little by itself
    approximate.exact_items = ExactItems(np.arange(0, len(vectors), 2), vectors)
    index = CandidateIndex(ExactIndex(approximate.vectors), approximate)
    served = ServedRetrieval(model, index, world.FakeTransform(), catalogue, world.SPEC, MAX_K)
    facts = IndexFacts(
        num_items=len(vectors),
        vector_width=vectors.shape[1],
        settings={"num_leaves": 60, "num_exact_items": 300},
        efforts=(EffortFacts(MAX_K, 1, MAX_K, 1.0),),
        k=MAX_K,
        recall=1.0,
        recall_by_slice={},
        num_sample_queries=0,
        build_s=0.0,
    )
    export(served, facts, tmp_path / "model", Fingerprint({}))
    again = read_index(tmp_path / "model", AllowLists({})).approximate
    assert again is not None
    request = (tf.constant(vectors[:5]), tf.constant(MAX_K))
    for mine, theirs in zip(approximate.search(*request), again.search(*request), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_fresh_process_needs_only_scann_to_load_it(model_dir: Path, signatures: Any) -> None:
    program = f"""
import scann, tensorflow as tf
serve = tf.saved_model.load({str(model_dir)!r}).signatures["serving_default"]
text = lambda v: tf.constant(v, tf.string)
out = serve(user_id=text(["u7"]), segment=text(["s1"]), history_item_ids=text([["i3"]]),
            exclude_item_ids=text([[""]]), allow_genres=text([[""]]),
            event_time_unix_s=tf.constant([0], tf.int64), k=tf.constant([3]))
print("IDS", *[i.decode() for i in out["item_ids"].numpy()[0]])
"""
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd="/", check=True
    )
    ids = next(line for line in process.stdout.splitlines() if line.startswith("IDS")).split()[1:]
    here = signatures["serving_default"](
        user_id=tf.constant(["u7"]),
        segment=tf.constant(["s1"]),
        history_item_ids=tf.constant([["i3"]]),
        exclude_item_ids=tf.constant([[""]]),
        allow_genres=tf.constant([[""]]),
        event_time_unix_s=tf.constant([0], tf.int64),
        k=tf.constant([3]),
    )
    assert ids == _text(here["item_ids"])[0].tolist()


def test_index_facts_travel_with_the_model_and_nothing_half_written_stays(model_dir: Path) -> None:
    facts = json.loads((model_dir / "assets.extra" / "index.json").read_text())
    assert facts["num_items"] == world.NUM_ITEMS and facts["vector_width"] == 9 and facts["recall"] == 1.0
    assert [path.name for path in model_dir.parent.iterdir()] == [model_dir.name]


def test_a_request_does_not_copy_the_vectors_of_the_index(model: RetrievalModel, model_dir: Path) -> None:
    arrays = _arrays()
    with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.load(session, ["serve"], str(model_dir))
        signature = loaded.signature_def["serving_default"]
        fetches = [graph.get_tensor_by_name(info.name) for info in signature.outputs.values()]
        inputs = {graph.get_tensor_by_name(signature.inputs[n].name): v for n, v in arrays.items()}
        trace = tf.compat.v1.RunMetadata()
        options = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.FULL_TRACE)
        session.run(fetches, inputs)  # what marks a variable for copying does so from the first request on
        session.run(fetches, inputs, options=options, run_metadata=trace)
    copied = [
        (node.node_name, memory.total_bytes)
        for device in trace.step_stats.dev_stats
        for node in device.node_stats
        for memory in node.memory
        if "ReadVariableOp" in node.node_name and memory.total_bytes >= world.NUM_ITEMS * 4
    ]
    assert copied == []


def _arrays() -> dict[str, np.ndarray]:
    return {
        name: np.asarray(tensor.numpy(), object) if tensor.dtype == tf.string else tensor.numpy()
        for name, tensor in _request().items()
    }
