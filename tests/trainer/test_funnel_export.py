"""The funnel in one call: the same as retrieval, then ranking, with the same restrictions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scann  # noqa: F401  registers the ops of the index
import tensorflow as tf

from tests.trainer import funnel_world, ranking_world
from tests.trainer.ranking_requests import NOW, SPEC, raw_query
from trainer.bundle import save_bundle
from trainer.fingerprint import Fingerprint
from trainer.funnel_export import ServedFunnel
from trainer.preranker import (
    PreRanker,
    PreRanking,
    ServedPreRanker,
    catalogue_features,
    describe_items,
    describe_query,
)
from trainer.preranker_config import PrerankerConfig

TASKS = ("click", "stars", "watch")
NAN = math.nan
STATES = list(funnel_world.USERS.values())
STRANGER = raw_query("stranger", ["i3"], ("i3", 50, "home", 1.0, 4.0, 20.0))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> funnel_world.Funnel:
    return funnel_world.make(tmp_path_factory.mktemp("users"))


@pytest.fixture(scope="module")
def saved(world: funnel_world.Funnel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Signatures of the funnel by name, after a reload; and the model, which they hold weakly."""
    folder = tmp_path_factory.mktemp("funnel") / "1"
    save_bundle(world.funnel, folder, Fingerprint({}), [])
    loaded = tf.saved_model.load(str(folder))
    return {**loaded.signatures, "model": loaded}


def padded(lists: list[list[Any]], spec: tf.TensorSpec) -> tf.Tensor:
    missing = {tf.string: "", tf.int64: -1, tf.float32: NAN}[spec.dtype]
    width = max(1, *map(len, lists))
    return tf.constant([[*row, *[missing] * (width - len(row))] for row in lists], spec.dtype)


def request(world: funnel_world.Funnel, queries: list[dict[str, Any]], **given: Any) -> dict[str, tf.Tensor]:
    """A request to serving_default: five items out of all, nothing excluded, every tag allowed."""
    values = {"k": [5] * len(queries), "num_candidates": [12] * len(queries), **given}
    values.setdefault("score_weights", [[NAN] * len(TASKS)] * len(queries))
    inputs = {}
    for name, spec in world.funnel.calls()["serving_default"].inputs.items():
        rows = values.get(name) or [query.get(name, []) for query in queries]
        inputs[name] = padded(rows, spec) if spec.shape.rank == 2 else tf.constant(rows, spec.dtype)
    return inputs


def of_users(world: funnel_world.Funnel, user_ids: list[str], **given: Any) -> dict[str, tf.Tensor]:
    """A request to serving_user that says nothing of the moment."""
    queries = [{"user_id": name, "event_time_unix_s": -1, "surface": ""} for name in user_ids]
    inputs = request(world, [{**raw_query("", []), **query} for query in queries], **given)
    return {name: inputs[name] for name in world.funnel.calls()["serving_user"].inputs}


def ids(outputs: dict[str, tf.Tensor]) -> list[list[str]]:
    return [[item.decode() for item in row if item] for row in outputs["item_ids"].numpy()]


def test_signatures_have_the_documented_names_types_and_shapes(saved: dict[str, Any]) -> None:
    of_request = {
        "k": (tf.int32, [None]),
        "num_candidates": (tf.int32, [None]),
        "exclude_item_ids": (tf.string, [None, None]),
        "allow_tag": (tf.string, [None, None]),
        "score_weights": (tf.float32, [None, 3]),
    }
    of_context = {
        "user_id": (tf.string, [None]),
        "surface": (tf.string, [None]),
        "event_time_unix_s": (tf.int64, [None]),
    }
    of_user = {
        "age": (tf.float32, [None]),
        "history_item_ids": (tf.string, [None, None]),
        "impression_item_ids": (tf.string, [None, None]),
        "impression_event_time_unix_s": (tf.int64, [None, None]),
        "impression_surfaces": (tf.string, [None, None]),
        "impression_click": (tf.float32, [None, None]),
        "impression_rating": (tf.float32, [None, None]),
        "impression_watch_time_s": (tf.float32, [None, None]),
    }
    expected = {
        "serving_default": {**of_context, **of_user, **of_request},
        "serving_user": {**of_context, **of_request},
    }
    for name, inputs in expected.items():
        signature = saved[name].structured_input_signature[1]
        assert {key: (spec.dtype, spec.shape.as_list()) for key, spec in signature.items()} == inputs
        outputs = saved[name].structured_outputs
        assert {key: spec.dtype for key, spec in outputs.items()} == {
            "item_ids": tf.string,
            **dict.fromkeys([*TASKS, "score", "retrieval_score"], tf.float32),
            "reason_item_ids": tf.string,
            "item_is_known": tf.int64,
            "user_is_known": tf.int64,
            "history_length": tf.int64,
            "exact_fallback": tf.int64,
        }
        assert {spec.shape.rank for key, spec in outputs.items() if key in ("item_ids", "score")} == {2}


@pytest.mark.parametrize("weights", [[NAN] * 3, [0.0, 3.0, 0.5]], ids=["declared", "given"])
def test_one_call_gives_what_retrieval_and_then_ranking_give(
    world: funnel_world.Funnel, saved: dict[str, Any], weights: list[float]
) -> None:
    queries = [*STATES, STRANGER]
    given = {
        "k": [5, 3, 12, 1],
        "num_candidates": [7, 12, 12, 1],
        "exclude_item_ids": [["i1"], [], ["i2", "i9", "nowhere"], []],
        "allow_tag": [[], ["t1"], [], []],
        "score_weights": [weights] * 4,
    }
    inputs = request(world, queries, **given)
    got = saved["serving_default"](**inputs)
    retrieved = world.retrieval.recommend(
        {**inputs, "k": inputs["num_candidates"]},
        exact=False,
    )
    candidates = retrieved["item_ids"]
    ranked = world.ranker.rank(inputs, candidates, inputs["score_weights"])
    for row, k in enumerate(given["k"]):
        kept = [place for place, item in enumerate(candidates.numpy()[row]) if item]
        best = sorted(kept, key=lambda place: -ranked["score"].numpy()[row, place])[:k]
        assert ids(got)[row] == [candidates.numpy()[row, place].decode() for place in best]
        columns = {name: ranked[name] for name in ("score", *TASKS)}
        columns |= {"retrieval_score": retrieved["scores"], "reason_item_ids": retrieved["reason_item_ids"]}
        for name, column in columns.items():
            values = got[name].numpy()[row]
            expected = column.numpy()[row][best]
            if column.dtype == tf.string:
                assert values[: len(best)].tolist() == expected.tolist()
            else:
                np.testing.assert_allclose(values[: len(best)], expected, rtol=1e-5, atol=1e-6)
                assert not values[len(best) :].any()
    for name in ("user_is_known", "history_length", "exact_fallback"):
        assert got[name].numpy().tolist() == retrieved[name].numpy().tolist()


def test_fewer_items_than_asked_for_give_a_short_padded_list(
    world: funnel_world.Funnel, saved: dict[str, Any]
) -> None:
    excluded = [f"i{number}" for number in range(2, 12)]
    inputs = request(world, STATES[:2], exclude_item_ids=[excluded, []], k=[6, 2])
    got = saved["serving_default"](**inputs)
    assert got["item_ids"].shape == [2, 6]
    assert [len(row) for row in ids(got)] == [2, 2]
    assert set(ids(got)[0]) == {"i0", "i1"}
    for name in (*TASKS, "score", "retrieval_score", "item_is_known"):
        assert not got[name].numpy()[:, 2:].any()
    assert got["item_is_known"].numpy()[:, :2].all()


def test_only_allowed_items_come_back(world: funnel_world.Funnel, saved: dict[str, Any]) -> None:
    inputs = request(world, STATES[:2], allow_tag=[["t1"], ["no-such-tag"]], k=[12, 12])
    got = saved["serving_default"](**inputs)
    assert set(ids(got)[0]) == {item for item in ranking_world.ITEMS if int(item[1:]) % 3 == 1}
    assert ids(got)[1] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": [0]}, "k must be at least 1"),
        ({"k": [6], "num_candidates": [5]}, "k must not be above num_candidates"),
        ({"num_candidates": [13]}, "between 1 and 12"),
        ({"score_weights": [[-1.0, NAN, NAN]]}, "score_weights must be finite"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(
    world: funnel_world.Funnel, saved: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        saved["serving_default"](**request(world, STATES[:1], **given))


def test_a_user_by_id_gets_what_the_users_features_get(
    world: funnel_world.Funnel, saved: dict[str, Any]
) -> None:
    got = saved["serving_user"](**of_users(world, list(funnel_world.USERS)))
    expected = saved["serving_default"](**request(world, STATES))
    assert got["user_is_known"].numpy().tolist() == [1, 1, 1]
    assert got["history_length"].numpy().tolist() == [2, 0, 2]
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name].numpy(), value.numpy())


def test_the_moment_of_a_request_replaces_that_of_the_user(
    world: funnel_world.Funnel, saved: dict[str, Any]
) -> None:
    later = NOW + 3 * ranking_world.DAY_S + 7_200
    inputs = of_users(world, ["u3"])
    inputs |= {"event_time_unix_s": tf.constant([later], tf.int64), "surface": tf.constant(["home"])}
    got = saved["serving_user"](**inputs)
    state = {**funnel_world.USERS["u3"], "event_time_unix_s": later, "surface": "home"}
    expected = saved["serving_default"](**request(world, [state]))
    as_known = saved["serving_user"](**of_users(world, ["u3"]))
    np.testing.assert_array_equal(got["score"].numpy(), expected["score"].numpy())
    assert np.all(got["score"].numpy() != as_known["score"].numpy())


def test_an_unknown_user_gets_what_suits_an_empty_history_and_is_flagged(
    world: funnel_world.Funnel, saved: dict[str, Any]
) -> None:
    inputs = of_users(world, ["nobody", "u3"])
    inputs |= {"event_time_unix_s": tf.fill([2], tf.constant(NOW, tf.int64))}
    got = saved["serving_user"](**inputs)
    nobody = {**raw_query("nobody", []), "age": NAN, "surface": ""}
    expected = saved["serving_default"](**request(world, [nobody]))
    assert got["user_is_known"].numpy().tolist() == [0, 1]
    assert got["history_length"].numpy().tolist() == [0, 2]
    assert ids(got)[0] == ids(expected)[0]
    np.testing.assert_allclose(got["score"].numpy()[:1], expected["score"].numpy(), rtol=1e-5)


def test_the_lookup_holds_nothing_that_only_the_evaluation_reads(world: funnel_world.Funnel) -> None:
    for record in world.funnel.users.examples.numpy():
        names = set(tf.train.Example.FromString(record).features.feature)
        assert not names & {"test_item_ids", "seen_item_ids"}


def test_the_exact_funnel_answers_as_the_other_one(world: funnel_world.Funnel) -> None:
    # ScaNN scores every item of so small a catalogue.
    inputs = request(world, STATES)
    exact, approximate = world.funnel_exact.recommend(inputs), world.funnel.recommend(inputs)
    assert ids(exact) == ids(approximate)
    np.testing.assert_allclose(exact["score"], approximate["score"], rtol=1e-5)


@pytest.fixture(scope="module")
def preranked(world: funnel_world.Funnel) -> tuple[ServedFunnel, ServedPreRanker]:
    """The exact funnel with a random pre-ranker that keeps four candidates; and the latter's signature."""
    ranker = world.funnel_exact.ranker
    items = catalogue_features(ranker, world.layer, SPEC, NOW)
    described = describe_items(world.ranking_model, items)
    rows = ranking_world.rows(64, seed=1)
    queries = describe_query(world.ranking_model, world.ranking_model.encode_query(rows))
    student = PreRanker(queries.shape[1], described.shape[1], PrerankerConfig())
    student.query_inputs.fit(queries)
    student.item_inputs.fit(described)
    preranking = PreRanking(student, NOW, num_kept=4)
    funnel = ServedFunnel(
        world.retrieval_model,
        world.funnel_exact.index.index,
        world.ranking_model,
        world.layer,
        world.catalogue,
        world.funnel_exact.users,
        SPEC,
        funnel_world.MAX_K,
        preranking,
    )
    return funnel, ServedPreRanker(preranking, world.ranker, world.layer, SPEC)


def test_the_ranker_scores_what_the_pre_ranker_keeps_of_what_retrieval_finds(
    world: funnel_world.Funnel, preranked: tuple[ServedFunnel, ServedPreRanker]
) -> None:
    funnel, preranker = preranked
    inputs = request(world, STATES, k=[4, 3, 2], num_candidates=[12, 6, 3])
    got = funnel.recommend(inputs)
    found = world.retrieval_exact.recommend({**inputs, "k": inputs["num_candidates"]}, exact=False)[
        "item_ids"
    ]
    kept = preranker.pre_rank(inputs, found, tf.constant([4, 4, 4]))["item_ids"]
    scores = world.ranker.rank(inputs, kept, inputs["score_weights"])["score"].numpy()
    for row, k in enumerate([4, 3, 2]):
        given = [item.decode() for item in kept.numpy()[row] if item]
        best = sorted(zip(scores[row], given, strict=False), reverse=True)[:k]
        assert ids(got)[row] == [item for _, item in best]
        np.testing.assert_allclose(got["score"].numpy()[row, :k], [score for score, _ in best], rtol=1e-5)
    # Somebody loses an item to it, else it would not show.
    assert ids(got) != ids(world.funnel_exact.recommend(inputs))


def test_more_items_than_the_pre_ranker_keeps_are_refused(
    world: funnel_world.Funnel, preranked: tuple[ServedFunnel, ServedPreRanker]
) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="k must not be above 4"):
        preranked[0].recommend(request(world, STATES[:1], k=[5]))


def test_the_exact_bundles_hold_no_scann_op(world: funnel_world.Funnel, tmp_path: Path) -> None:
    names = {}
    for bundle, served in world.bundles().items():
        save_bundle(served, tmp_path / bundle, Fingerprint({}), [])
        names[bundle] = b"Scann" in (tmp_path / bundle / "saved_model.pb").read_bytes()
    assert names == {
        "retrieval": True,
        "retrieval_exact": False,
        "ranking": False,
        "funnel": True,
        "funnel_exact": False,
    }
