"""The client against the real server, and against stubs where the server cannot be made to misbehave."""

import dataclasses
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import grpc
import numpy as np
import pytest

from schema.errors import ConfigError, ServingError
from serving import client as client_module
from serving import transport
from serving.client import (
    LAYOUTS,
    BadRequestError,
    DeadlineExceededError,
    ModelNotFoundError,
    OneCall,
    OverloadedError,
    RecommenderClient,
    RetryPolicy,
    ServerUnavailableError,
    TwoCalls,
)
from serving.transport import InputSpec, Prediction
from tests.serving import models
from tests.serving.waiting import wait_for
from trainer import fingerprint

QUERY = {
    "user_id": "known7",
    "age": 2.5,
    "event_time_unix_s": 2**53 + 1,
    "history_item_ids": ["item1", "item4"],
}


@pytest.fixture(params=["grpc", "rest"])
def target(request, server):
    return server.grpc_target if request.param == "grpc" else server.rest_target


@pytest.fixture
def client(target):
    with RecommenderClient(target, timeout_s=30) as client:
        yield client


def test_recommendations_are_the_retrieved_items_in_order_of_their_ranking_score(client, target):
    answer = client.recommend(QUERY, k=3, exclude_item_ids=["item0", "item4"], num_candidates=5)
    # Retrieval: items 1 2 3 5 6 with scores 7 6 5 3 2. Ranking: number / 10 + age, so 6 5 3.
    assert [item.item_id for item in answer.items] == ["item6", "item5", "item3"]
    assert [item.rank for item in answer.items] == [1, 2, 3]
    assert [item.retrieval_score for item in answer.items] == [2.0, 3.0, 5.0]
    assert [item.score for item in answer.items] == pytest.approx([3.1, 3.0, 2.8])
    assert answer.items[0].predictions == pytest.approx({"click": 0.6, "watch_time": 2.5})
    assert {item.reason_item_id for item in answer.items} == {"item4"}
    assert answer.user_is_known is True
    assert answer.history_length == 2
    expected_versions = {"retrieval": 1, "ranking": 1} if target.startswith("grpc") else {}
    assert answer.model_versions == expected_versions


def test_one_call_gives_the_items_of_the_two_calls_and_every_output(target):
    asked = {"k": 3, "exclude_item_ids": ["item0", "item4"], "allow": {"parity": ["odd", "even"]}}
    with (
        RecommenderClient(target, timeout_s=30, layouts=(OneCall("one_call"),)) as one,
        RecommenderClient(target, timeout_s=30, layouts=(TwoCalls(),)) as two,
    ):
        answer = one.recommend(QUERY, **asked, num_candidates=8)
        # All of 1 2 3 5 6 7 are ranked: number / 10 + age.
        assert [item.item_id for item in answer.items] == ["item7", "item6", "item5"]
        assert [item.retrieval_score for item in answer.items] == [1.0, 2.0, 3.0]
        assert answer.items[0].predictions == pytest.approx({"click": 0.7, "watch_time": 2.5})
        assert answer.model_versions == ({"one_call": 1} if target.startswith("grpc") else {})
        assert set(answer.stage_seconds) == {"funnel"}
        both = two.recommend(QUERY, **asked, num_candidates=8)
        assert set(both.stage_seconds) == {"retrieve", "rank"}
        assert answer.items == both.items
        assert (answer.user_is_known, answer.history_length) == (both.user_is_known, both.history_length)
        assert [item.item_id for item in one.recommend(QUERY, k=1, num_candidates=3).items] == ["item2"]
        few = one.recommend(
            QUERY, k=8, allow={"parity": ["odd"]}, exclude_item_ids=iter(["item3"]), num_candidates=8
        )
        assert [item.item_id for item in few.items] == ["item7", "item5", "item1"] and few.exact_fallback
        assert one.recommend(QUERY, k=2, exclude_item_ids=models.ITEM_IDS, num_candidates=2).items == ()
        stranger = one.recommend({"user_id": "u"}, k=1, num_candidates=8)
        assert (stranger.user_is_known, stranger.history_length) == (False, 0)
        assert [item.item_id for item in stranger.items] == ["item7"]
        with pytest.raises(BadRequestError, match="unknown query feature 'usr_id'"):
            one.recommend({"usr_id": "u"}, k=1)
        with pytest.raises(ConfigError, match="layout TwoCalls"):
            one.retrieve(QUERY, k=1)


def test_the_first_layout_that_is_served_is_used(target):
    with RecommenderClient(target, timeout_s=30) as client:
        # No funnel, no funnel_exact here: retrieval and ranking.
        assert set(client.recommend(QUERY, k=1, num_candidates=2).stage_seconds) == {"retrieve", "rank"}
    layouts = (TwoCalls("retrieval_exact"), OneCall("one_call"), TwoCalls())
    with RecommenderClient(target, timeout_s=30, layouts=layouts) as client:
        assert set(client.recommend(QUERY, k=1, num_candidates=2).stage_seconds) == {"funnel"}
        assert len(client.retrieve(QUERY, k=2).candidates) == 2
    with RecommenderClient(target, timeout_s=30, layouts=(OneCall("a"), TwoCalls("b"))) as client:
        with pytest.raises(ModelNotFoundError, match=r"none of a, b \+ ranking: a is not served, b is not"):
            client.recommend(QUERY, k=1)
        with pytest.raises(ServerUnavailableError, match="a is not served"):
            client.wait_until_ready(timeout_s=0.2)


def test_models_of_different_runs_are_told_once_and_still_answer(target, caplog):
    with RecommenderClient(target, timeout_s=30, layouts=(TwoCalls(),)) as client:
        assert client.recommend(QUERY, k=1, num_candidates=2).mismatch == ""
    assert "different runs" not in caplog.text
    with RecommenderClient(
        target, timeout_s=30, layouts=(TwoCalls(ranking="ranking_of_other_run"),)
    ) as client:
        for _ in range(2):
            answer = client.recommend(QUERY, k=1, num_candidates=2)
            assert answer.mismatch == "catalogue" and len(answer.items) == 1
    assert caplog.text.count("models of different runs answer together") == 1


def test_the_client_asks_for_the_parts_that_bundles_have():
    parts = (fingerprint.TRANSFORM, fingerprint.CATALOGUE, fingerprint.TOWERS)
    assert (*parts, fingerprint.INDEX, fingerprint.RANKER) == client_module._PARTS
    assert transport.FINGERPRINT_SIGNATURE == fingerprint.FINGERPRINT


def test_a_client_without_a_layout_is_refused():
    with pytest.raises(ConfigError, match="at least one layout"):
        RecommenderClient("http://127.0.0.1:1", layouts=())


def test_features_left_out_count_as_missing(client):
    answer = client.recommend({"user_id": "u"}, k=2, num_candidates=8)
    assert [item.item_id for item in answer.items] == ["item7", "item6"]
    assert answer.items[0].predictions == pytest.approx({"click": 0.7, "watch_time": 0.0})
    assert answer.items[0].reason_item_id == ""
    assert answer.user_is_known is False
    assert answer.history_length == 0
    assert (
        client.recommend({"user_id": "u", "age": None, "history_item_ids": []}, k=2, num_candidates=8)
        == answer
    )


def test_numpy_values_are_accepted(client):
    query = {"user_id": np.str_("u"), "age": np.float32(2.5), "event_time_unix_s": np.int64(5)}
    query["history_item_ids"] = np.array(["item1"], object)
    assert client.recommend(query, k=1, num_candidates=2).history_length == 1


def test_retrieve_and_rank_can_be_called_alone(client):
    retrieval = client.retrieve(QUERY, k=8, exclude_item_ids=[f"item{i}" for i in range(6)])
    assert [candidate.item_id for candidate in retrieval.candidates] == ["item6", "item7"]
    ranked = client.rank(QUERY, ["item3", "item9", "item1"])
    assert [item.item_id for item in ranked] == ["item3", "item9", "item1"]
    assert [item.score for item in ranked] == pytest.approx([2.8, 3.4, 2.6])
    assert client.rank(QUERY, []) == []


PRE_RANKING = TwoCalls(ranking="pre_ranking")


def test_of_many_candidates_the_pre_ranker_keeps_those_that_are_ranked(target):
    with RecommenderClient(target, timeout_s=30, layouts=(PRE_RANKING,)) as client:
        answer = client.recommend(QUERY, k=2, exclude_item_ids=["item0"], num_candidates=7)
        # Of items 1 to 7 the pre-ranker keeps 1 2 3, of which the ranker prefers the last.
        assert [item.item_id for item in answer.items] == ["item3", "item2"]
        assert set(answer.stage_seconds) == {"retrieve", "pre_rank", "rank"}
        # No more candidates than it said it keeps: nothing to cut.
        few = client.recommend(QUERY, k=2, num_candidates=3)
        assert set(few.stage_seconds) == {"retrieve", "rank"}
        # As many as are asked for are kept at least.
        many = client.recommend(QUERY, k=5, exclude_item_ids=["item0"], num_candidates=7)
        assert [item.item_id for item in many.items] == [f"item{i}" for i in (5, 4, 3, 2, 1)]
        assert client.pre_rank(QUERY, ["item5", "item2", "item9"], k=2) == ["item2", "item5"]
        assert client.pre_rank(QUERY, [], k=2) == []


def test_a_model_without_a_pre_ranker_ranks_all_and_says_so_when_asked_to_pre_rank(client):
    assert set(client.recommend(QUERY, k=1, num_candidates=8).stage_seconds) == {"retrieve", "rank"}
    with pytest.raises(BadRequestError, match=r"'ranking' has no pre-ranker; set ranking\.preranker"):
        client.pre_rank(QUERY, ["item1"], k=1)


@pytest.mark.parametrize("layout", [PRE_RANKING, OneCall("one_call")], ids=["two calls", "one call"])
def test_weights_of_a_request_replace_the_declared_ones_by_task(target, layout):
    with RecommenderClient(target, timeout_s=30, layouts=(layout,)) as client:
        asked = {"k": 1, "num_candidates": 3}
        best = client.recommend(QUERY, **asked, score_weights={"click": 3.0}).items[0]
        # 3 × 0.2 + 1 × 2.5
        assert (best.item_id, best.score) == ("item2", pytest.approx(3.1))
        best = client.recommend(QUERY, **asked, score_weights={"watch_time": 0, "click": 2}).items[0]
        assert best.score == pytest.approx(0.4)
        assert client.recommend(QUERY, **asked).items[0].score == pytest.approx(2.7)


def test_weights_can_be_given_to_the_ranking_of_named_items(target):
    with RecommenderClient(target, timeout_s=30, layouts=(PRE_RANKING,)) as client:
        ranked = client.rank(QUERY, ["item3", "item1"], score_weights={"click": 10.0})
        assert [item.score for item in ranked] == pytest.approx([5.5, 3.5])


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"clik": 1.0}, "score_weights name 'clik', which is no task; did you mean 'click'"),
        ({"zzz": 1.0}, "no task; the model weighs: click, watch_time"),
        ({"click": "much"}, "weight of 'click' must be a finite number, got 'much'"),
        ({"click": math.nan}, "must be a finite number, got nan"),
        ({"click": True}, "must be a finite number, got True"),
        ({"click": -1.0}, "score_weights must be >= 0"),
    ],
    ids=str,
)
def test_weights_that_name_no_task_or_are_no_weights_are_refused(target, weights, complaint):
    with (
        RecommenderClient(target, timeout_s=30, layouts=(PRE_RANKING,)) as client,
        pytest.raises(BadRequestError, match=complaint),
    ):
        client.recommend(QUERY, k=1, num_candidates=2, score_weights=weights)


def test_a_model_that_does_not_tell_its_tasks_takes_no_weights(client):
    with pytest.raises(BadRequestError, match="does not tell which tasks it weighs"):
        client.recommend(QUERY, k=1, num_candidates=2, score_weights={"click": 2.0})


def test_only_allowed_items_come_back_and_a_fallback_is_told(client, caplog):
    caplog.set_level("INFO", logger="serving.client")
    odd = client.retrieve(QUERY, k=8, allow={"parity": ["odd"]}, exclude_item_ids=["item3"])
    assert [item.item_id for item in odd.candidates] == ["item1", "item5", "item7"]
    assert odd.exact_fallback and "exact_fallback=1" in caplog.text
    answer = client.recommend(QUERY, k=2, allow={"parity": ["odd", "even"]}, num_candidates=3)
    assert [item.item_id for item in answer.items] == ["item2", "item1"] and not answer.exact_fallback
    assert client.recommend(QUERY, k=1, allow={"parity": ("even",)}, num_candidates=3).exact_fallback
    assert len(client.retrieve(QUERY, k=8, allow={"parity": []}).candidates) == 8


def test_an_allow_list_that_the_model_does_not_have_is_refused(client):
    with pytest.raises(BadRequestError, match="cannot filter by 'language', only by: parity"):
        client.retrieve(QUERY, k=1, allow={"language": ["en"]})
    with pytest.raises(BadRequestError, match="allow_parity must be a list, got the text 'odd'"):
        client.retrieve(QUERY, k=1, allow={"parity": "odd"})
    with pytest.raises(BadRequestError, match="unknown query feature 'allow_parity'"):
        client.retrieve({**QUERY, "allow_parity": ["odd"]}, k=1)


def test_nothing_left_to_recommend_is_an_empty_answer(client):
    answer = client.recommend(QUERY, k=2, exclude_item_ids=models.ITEM_IDS, num_candidates=8)
    assert answer.items == ()
    assert answer.user_is_known is True


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ({"usr_id": "u"}, "unknown query feature 'usr_id'; did you mean 'user_id'"),
        ({"zzz": 1}, "unknown query feature 'zzz'.*age, event_time_unix_s, history_item_ids, user_id"),
        ({"k": 3}, "unknown query feature 'k'"),
        ({"user_id": 5}, "'user_id' takes type string, got 5"),
        ({"age": "old"}, "'age' takes type float"),
        (
            {"event_time_unix_s": 1.5},
            "'event_time_unix_s' takes type integer, got 1.5",
        ),
        ({"event_time_unix_s": True}, "'event_time_unix_s'"),
        ({"event_time_unix_s": 2**70}, "event_time_unix_s"),
        ({"history_item_ids": "item1"}, "'history_item_ids' is multi-valued: expected a list"),
        ({"history_item_ids": [1]}, "'history_item_ids' takes type string"),
    ],
    ids=str,
)
def test_a_wrong_query_is_refused_by_name(client, query, complaint):
    with pytest.raises(BadRequestError, match=complaint):
        client.recommend(query, k=1, num_candidates=2)


@pytest.mark.parametrize(("k", "num_candidates"), [(0, 5), (6, 5)])
def test_k_must_lie_between_one_and_the_number_of_candidates(client, k, num_candidates):
    with pytest.raises(BadRequestError, match=f"got k={k}, num_candidates={num_candidates}"):
        client.recommend(QUERY, k=k, num_candidates=num_candidates)


def test_excluded_ids_given_as_one_text_are_refused(client):
    with pytest.raises(BadRequestError, match="exclude_item_ids must be a list, got the text 'item1'"):
        client.retrieve(QUERY, k=1, exclude_item_ids="item1")


def test_a_refusal_by_the_model_reaches_the_caller(client):
    with pytest.raises(BadRequestError, match="k above the exported maximum"):
        client.recommend(QUERY, k=1, num_candidates=models.MAX_K + 1)


def test_a_model_that_is_not_served_is_named(target):
    with (
        RecommenderClient(target, layouts=(TwoCalls("nothing"),), timeout_s=30) as client,
        pytest.raises(ModelNotFoundError, match="nothing"),
    ):
        client.retrieve(QUERY, k=1)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_never_answers_ends_at_the_deadline(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"
        with RecommenderClient(target, timeout_s=0.5) as client:
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                client.recommend(QUERY)
            assert 0.4 < time.monotonic() - started < 5


def test_a_server_that_trickles_its_answer_ends_at_the_deadline():
    def trickle(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            try:
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.1)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,))
        thread.start()
        with RecommenderClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5) as client:
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                client.recommend(QUERY)
            assert time.monotonic() - started < 5
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_is_down_is_named_with_the_next_step(scheme):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        target = f"{scheme}://127.0.0.1:{closed.getsockname()[1]}"
    with RecommenderClient(target, timeout_s=5) as client:
        with pytest.raises(ServerUnavailableError, match=f"{target}.*funnel serve"):
            client.recommend(QUERY)
        with pytest.raises(ServerUnavailableError, match=r"not ready after 0\.3 s"):
            client.wait_until_ready(timeout_s=0.3)


def test_ready_server_needs_no_waiting(client):
    client.wait_until_ready(timeout_s=10)


def test_waiting_for_a_model_that_is_not_there_says_so(target):
    with (
        RecommenderClient(target, layouts=(TwoCalls(ranking="nothing"),)) as client,
        pytest.raises(ServerUnavailableError, match="nothing is not served"),
    ):
        client.wait_until_ready(timeout_s=0.3)


def test_a_last_look_that_is_cut_short_hides_no_problem(target, monkeypatch):
    problems = iter([ModelNotFoundError("nothing is not served"), DeadlineExceededError("cut short")])

    def discover(*_):
        raise next(problems)

    with RecommenderClient(target) as client:
        monkeypatch.setattr(client, "_discover", discover)
        with pytest.raises(ServerUnavailableError, match="not ready after 9 s: nothing is not served"):
            client.wait_until_ready(timeout_s=9)


def test_a_label_that_no_model_has_is_named(target):
    with (
        RecommenderClient(target, version_label="canary", timeout_s=30) as client,
        pytest.raises(ModelNotFoundError, match="retrieval has no version with label 'canary'"),
    ):
        client.recommend(QUERY, k=1)


@pytest.mark.parametrize("target", ["127.0.0.1:8500", "ftp://x", "grpc://", ""])
def test_a_target_of_another_form_is_refused(target):
    with pytest.raises(ConfigError, match="expected grpc://host:port"):
        RecommenderClient(target)


def test_rest_client_does_not_import_tensorflow():
    code = (
        "import sys, serving.client as c; c.RecommenderClient('http://a'); print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class StubTransport:
    """A server whose retrieval model takes one more feature after the first call."""

    def __init__(self, score=1.0):
        self.num_predictions = 0
        self.score = score
        self.timeouts_s = []

    def signatures(self, model, timeout_s):
        specs = {"user_id": InputSpec("string", "DT_STRING", 1)}
        if model == "ranking":
            specs["candidate_item_ids"] = InputSpec("string", "DT_STRING", 2)
        elif self.num_predictions:
            specs["age"] = InputSpec("float", "DT_FLOAT", 1)
        return {"serving_default": specs}

    def predict(self, model, inputs, specs, timeout_s, signature="serving_default"):
        self.timeouts_s.append(timeout_s)
        time.sleep(0.05)
        if model == "ranking":
            return Prediction({"score": [[0.0, self.score]], "item_is_known": [[0, 1]]}, 1)
        self.num_predictions += 1
        if set(inputs) != set(self.signatures(model, timeout_s)["serving_default"]):
            raise BadRequestError("Missing: age")
        self.inputs = inputs
        outputs = {"item_ids": [["a"]], "scores": [[1.0]], "reason_item_ids": [[""]]}
        return Prediction({**outputs, "user_is_known": [0], "history_length": [0], "exact_fallback": [0]}, 2)

    def available_versions(self, model, timeout_s):
        if model in ("retrieval", "ranking"):
            return [1]
        raise ModelNotFoundError(model)

    def close(self):
        pass


def test_a_swapped_model_with_another_feature_is_asked_for_its_features_again(monkeypatch):
    stub = StubTransport()
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    answer = RecommenderClient("stub").retrieve({"user_id": "u"}, k=1)
    assert answer.model_version == 2
    assert stub.inputs["user_id"] == ["u"]
    assert math.isnan(stub.inputs["age"][0])


class PreRanking(StubTransport):
    """The ranker of five candidates may have a pre-ranker, which prefers what comes last in the alphabet."""

    def __init__(self, num_kept):
        super().__init__()
        self.num_kept = num_kept
        self.asked = []

    def signatures(self, model, timeout_s):
        specs = {"user_id": InputSpec("string", "DT_STRING", 1)}
        if model == "retrieval":
            return {"serving_default": specs}
        specs["candidate_item_ids"] = InputSpec("string", "DT_STRING", 2)
        k = InputSpec("integer", "DT_INT32", 1)
        return {"serving_default": specs, **({"pre_rank": {**specs, "k": k}} if self.num_kept else {})}

    def predict(self, model, inputs, specs, timeout_s, signature="serving_default"):
        if model == "retrieval":
            lists = {"item_ids": [list("abcde")], "scores": [[5.0, 4.0, 3.0, 2.0, 1.0]]}
            user = {"user_is_known": [0], "history_length": [0], "exact_fallback": [0]}
            return Prediction({**lists, "reason_item_ids": [[""] * 5], **user}, 1)
        if signature not in self.signatures(model, timeout_s):
            raise BadRequestError(f"Serving signature {signature} not found")
        ids = inputs["candidate_item_ids"][0]
        self.asked.append(signature)
        if signature == "pre_rank":
            best = sorted(filter(None, ids), reverse=True)[: inputs["k"][0]]
            return Prediction({"item_ids": [best], "num_kept": [self.num_kept]}, 1)
        scores = {"score": [[0.0] + [1.0] * (len(ids) - 1)], "item_is_known": [[1] * len(ids)]}
        self.ranked = "".join(ids)
        return Prediction(scores, 1)


@pytest.fixture
def pre_ranking(monkeypatch):
    """Calls a client and returns which candidates were ranked; and the server that it calls."""
    stub = PreRanking(num_kept=3)
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    client = RecommenderClient("stub", layouts=(TwoCalls(),))

    def ranked(k=1):
        assert len(client.recommend({"user_id": "u"}, k=k).items) == k
        return stub.ranked

    return client, stub, ranked


def test_the_model_tells_how_many_candidates_its_ranker_gets(pre_ranking):
    _, stub, ranked = pre_ranking
    assert ranked() == "cde", "in the order of retrieval"
    assert ranked() == "cde"
    assert ranked(k=4) == "bcde", "what is asked for is kept at least"
    stub.num_kept = 2  # of a newer version
    assert ranked() == "de"
    stub.num_kept = 4
    assert (ranked(), ranked()) == ("de", "bcde")
    assert ranked(k=5) == "abcde" and stub.asked[-2:] != ["pre_rank", "serving_default"]


def test_candidates_are_all_ranked_once_a_newer_version_has_no_pre_ranker(pre_ranking):
    client, stub, ranked = pre_ranking
    assert ranked() == "cde"
    stub.num_kept = 0
    assert (ranked(), ranked()) == ("abcde", "abcde")
    with pytest.raises(BadRequestError, match="has no pre-ranker"):
        client.pre_rank({"user_id": "u"}, ["a"], k=1)


def test_a_pre_ranker_that_a_newer_version_gains_is_found_within_a_minute(pre_ranking, monkeypatch):
    client, stub, ranked = pre_ranking
    stub.num_kept = 0
    assert ranked() == "abcde"
    stub.num_kept = 3
    assert ranked() == "abcde", "no request fails by it, so nobody looks"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert ranked() == "cde"
    stub.num_kept = 0
    assert ranked() == "abcde"
    stub.num_kept = 3
    assert client.pre_rank({"user_id": "u"}, ["a", "b"], k=1) == ["b"]


def test_a_feature_that_a_newer_version_gains_can_be_given_at_once(monkeypatch):
    stub = StubTransport()
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    client = RecommenderClient("stub")
    with pytest.raises(BadRequestError, match="unknown query feature 'age'"):
        client.retrieve({"user_id": "u", "age": 3.0}, k=1)
    stub.num_predictions = 1
    client.retrieve({"user_id": "u", "age": 3.0}, k=1)
    assert stub.inputs["age"] == [3.0]


def test_a_request_that_is_refused_for_good_is_sent_once(monkeypatch):
    stub = StubTransport()
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    client = RecommenderClient("stub")
    client.rank({"user_id": "u"}, ["a"])
    refused = []

    def refuse(*args):
        refused.append(args)
        raise BadRequestError("k above the exported maximum")

    stub.predict = refuse
    with pytest.raises(BadRequestError, match="k above"):
        client.rank({"user_id": "u"}, ["a"])
    assert len(refused) == 1


def test_a_refusal_is_told_also_when_the_server_goes_before_it_is_looked_into(monkeypatch):
    stub = StubTransport()
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    client = RecommenderClient("stub", retry=RetryPolicy(max_attempts=1))
    client.rank({"user_id": "u"}, ["a"])

    def gone(*args):
        raise client_module.ServerUnavailableError("gone")

    stub.signatures = gone
    with pytest.raises(BadRequestError, match="unknown query feature 'age'"):
        client.rank({"user_id": "u", "age": 3.0}, ["a"])


def test_a_refused_request_leaves_what_is_known_of_its_models(pre_ranking):
    client, stub, ranked = pre_ranking
    assert ranked() == "cde"
    with pytest.raises(BadRequestError, match="unknown query feature 'age'"):
        client.recommend({"user_id": "u", "age": 3.0}, k=1)
    sizes = []
    predict = stub.predict
    stub.predict = lambda model, inputs, *args: sizes.append(inputs.get("k")) or predict(model, inputs, *args)
    assert ranked() == "cde"
    assert [3] in sizes, "it is asked for three candidates at once, not for all of them"


class OfRuns(StubTransport):
    """The ranker may be of another run; answers tell the version given here."""

    def __init__(self, version):
        super().__init__()
        self.version = version
        self.catalogue_of_ranker = "c1"

    def signatures(self, model, timeout_s):
        specs = {"user_id": InputSpec("string", "DT_STRING", 1)}
        if model == "ranking":
            specs["candidate_item_ids"] = InputSpec("string", "DT_STRING", 2)
        return {"serving_default": specs, "fingerprint": {"parts": InputSpec("string", "DT_STRING", 1)}}

    def predict(self, model, inputs, specs, timeout_s, signature="serving_default"):
        return dataclasses.replace(
            super().predict(model, inputs, specs, timeout_s, signature), version=self.version
        )

    def fingerprints(self, model, version, parts, timeout_s):
        catalogue = self.catalogue_of_ranker if model == "ranking" else "c1"
        return [catalogue if part == "catalogue" else "" for part in parts]


@pytest.fixture
def mismatch_at(monkeypatch):
    """Returns the mismatch some seconds after the first call, of a ranker that has the catalogue."""
    stub = OfRuns(version=None)
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    client = RecommenderClient("stub", layouts=(TwoCalls(),))
    now = time.monotonic()

    def ask(seconds, catalogue, version=None):
        stub.version, stub.catalogue_of_ranker = version, catalogue
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
        return client.recommend({"user_id": "u"}, k=1).mismatch

    return ask


def test_models_that_tell_no_version_are_compared_again_after_a_minute(mismatch_at, caplog):
    assert mismatch_at(0, "c2") == "catalogue", "in the middle of a swap"
    assert mismatch_at(59, "c1") == "catalogue"
    assert mismatch_at(61, "c1") == ""
    assert mismatch_at(100, "c2") == ""
    assert mismatch_at(122, "c2") == "catalogue", "after a bad push"
    assert mismatch_at(183, "c2") == "catalogue"
    assert caplog.text.count("models of different runs answer together") == 2, "once for each change"


def test_versions_that_are_told_are_compared_once(mismatch_at):
    assert mismatch_at(0, "c2", version=1) == "catalogue"
    assert mismatch_at(1000, "c1", version=1) == "catalogue"
    assert mismatch_at(1000, "c1", version=2) == ""


def test_a_score_that_is_not_a_number_is_an_error_not_an_order(monkeypatch):
    monkeypatch.setattr(client_module, "open_transport", lambda *args: StubTransport(score=math.nan))
    with pytest.raises(ServingError, match="one number per candidate"):
        RecommenderClient("stub").rank({"user_id": "u"}, ["a"])


def test_the_deadline_covers_retrieval_and_ranking_together(monkeypatch):
    stub = StubTransport()
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    client = RecommenderClient("stub", timeout_s=10)
    client.recommend({"user_id": "u"}, k=1)
    first, *_, last = stub.timeouts_s
    assert first <= 10
    assert last <= first - 0.05
    with pytest.raises(DeadlineExceededError, match="raise timeout_s"):
        RecommenderClient("stub", timeout_s=0.04).recommend({"user_id": "u"}, k=1)


class WeighingFunnel(StubTransport):
    """A funnel of the tasks a and b, whose order a newer version may have changed."""

    tasks = ("a", "b")
    predictions: Mapping[str, float] = {"a": 1.0, "b": 10.0}

    def signatures(self, model, timeout_s):
        weights = InputSpec("float", "DT_FLOAT", 2, width=len(self.tasks))
        columns = {"columns": InputSpec("integer", "DT_INT32", 1)}
        return {"serving_default": {"score_weights": weights}, "score_tasks": columns}

    def predict(self, model, inputs, specs, timeout_s, signature="serving_default"):
        self.num_predictions += 1
        if signature == "score_tasks":
            return Prediction({"tasks": list(self.tasks), "weights": [1.0] * len(self.tasks)}, 1)
        if len(inputs["score_weights"][0]) != len(self.tasks):
            raise BadRequestError("score_weights must have a column for each task")
        weights = [1.0 if math.isnan(weight) else weight for weight in inputs["score_weights"][0]]
        if any(w < 0 for w, task in zip(weights, self.tasks, strict=True) if task != "dislike"):
            raise BadRequestError("score_weights must be >= 0")
        score = sum(w * self.predictions[task] for w, task in zip(weights, self.tasks, strict=True))
        lists = {"item_ids": [["x"]], "reason_item_ids": [[""]], "item_is_known": [[1]], "score": [[score]]}
        tasks = {task: [[value]] for task, value in self.predictions.items()}
        user = {"user_is_known": [1], "history_length": [0], "exact_fallback": [0]}
        return Prediction({**lists, **tasks, "retrieval_score": [[1.0]], **user}, 1)


def test_weights_follow_their_tasks_when_a_newer_model_has_them_in_another_order(monkeypatch):
    stub = WeighingFunnel()
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    client = RecommenderClient("stub", layouts=(OneCall(),))

    def score():
        return client.recommend({}, k=1, score_weights={"a": 100.0}).items[0].score

    assert score() == 110
    assert score() == 110 and stub.num_predictions == 3, "the order is asked for once"
    stub.tasks = ("b", "a")
    assert score() == 110 and stub.num_predictions == 6
    stub.tasks, stub.predictions = ("b", "c"), {"b": 10.0, "c": 1.0}
    assert client.recommend({}, k=1, score_weights={"c": 7.0}).items[0].score == 17
    stub.tasks, stub.predictions = ("b", "c", "d"), {"b": 10.0, "c": 1.0, "d": 0.5}
    assert client.recommend({}, k=1, score_weights={"c": 7.0}).items[0].score == 17.5
    stub.tasks, stub.predictions = ("b", "c"), {"b": 10.0, "c": 1.0}
    with pytest.raises(BadRequestError, match="name 'a', which is no task; the model weighs: b, c"):
        score()


def test_a_weight_that_a_newer_model_would_take_for_another_task_follows_its_own(monkeypatch):
    stub = WeighingFunnel()
    stub.tasks, stub.predictions = ("like", "dislike"), {"like": 10.0, "dislike": 1.0}
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    client = RecommenderClient("stub", layouts=(OneCall(),))
    for stub.tasks in (("like", "dislike"), ("dislike", "like")):
        assert client.recommend({}, k=1, score_weights={"dislike": -3.0}).items[0].score == 7
    with pytest.raises(BadRequestError, match="must be >= 0"):
        client.recommend({}, k=1, score_weights={"like": -3.0})


def test_a_score_that_the_weights_do_not_make_is_an_error(monkeypatch):
    stub = WeighingFunnel()
    stub.predictions = {"a": 1.0, "b": 10.0, "score": 1.0}
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    with pytest.raises(ServingError, match="scores that are not the sum of its predictions"):
        RecommenderClient("stub", layouts=(OneCall(),)).recommend({}, k=1, score_weights={"a": 2.0})


class FunnelThatGoes(StubTransport):
    """Serves `funnel` at first, then retrieval and ranking; none of them tells a fingerprint."""

    one_call = True

    def available_versions(self, model, timeout_s):
        if self.one_call != (model == "funnel") or model.endswith("_exact"):
            raise ModelNotFoundError(model)
        return [1]

    def predict(self, model, inputs, specs, timeout_s, signature="serving_default"):
        if self.one_call != (model == "funnel"):
            raise ModelNotFoundError(model)
        if model != "funnel":
            return super().predict(model, inputs, specs, timeout_s)
        self.num_predictions = 0
        lists = {"item_ids": [["a"]], "reason_item_ids": [[""]], "item_is_known": [[1]], "score": [[0.5]]}
        user = {"user_is_known": [1], "history_length": [0], "exact_fallback": [0]}
        return Prediction({**lists, "retrieval_score": [[1.0]], **user}, 1)


def test_a_layout_that_is_gone_is_looked_for_again(monkeypatch):
    stub = FunnelThatGoes()
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    client = RecommenderClient("stub")
    assert set(client.recommend({"user_id": "u"}, k=1).stage_seconds) == {"funnel"}
    stub.one_call = False
    answer = client.recommend({"user_id": "u"}, k=1)
    assert set(answer.stage_seconds) == {"retrieve", "rank"}
    assert answer.mismatch == "", "models that tell no fingerprint cannot differ"


class LabelledLater(FunnelThatGoes):
    """Serves `funnel` without labels, and `funnel_exact`, which gets its label after some looks."""

    def __init__(self, num_looks):
        super().__init__()
        self.num_looks = num_looks
        self.asked = []

    def available_versions(self, model, timeout_s):
        if not model.startswith("funnel"):
            raise ModelNotFoundError(model)
        self.num_looks -= model == "funnel_exact"
        if model == "funnel" or self.num_looks >= 0:
            raise BadRequestError("Unrecognized servable version label: canary")
        return [1]

    def predict(self, model, *args):
        self.asked.append(model)
        return super().predict("funnel", *args)


def test_a_layout_without_the_label_is_passed_over_and_its_label_waited_for(monkeypatch):
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    stub = LabelledLater(num_looks=0)
    assert RecommenderClient("stub", version_label="canary").recommend({"user_id": "u"}, k=1).items
    assert stub.asked == ["funnel_exact"]
    stub = LabelledLater(num_looks=2)
    client = RecommenderClient("stub", version_label="canary")
    with pytest.raises(ModelNotFoundError, match="funnel_exact has no version with label 'canary'"):
        client.recommend({"user_id": "u"}, k=1)
    client.wait_until_ready(timeout_s=10)
    assert stub.num_looks == -1
    with pytest.raises(BadRequestError, match="Unrecognized"):
        RecommenderClient("stub").wait_until_ready(timeout_s=10)


class Loading(StubTransport):
    """Both models are known, and become available after some looks."""

    def __init__(self, num_looks):
        super().__init__()
        self.num_looks = num_looks

    def available_versions(self, model, timeout_s):
        if model not in ("retrieval", "ranking"):
            raise ModelNotFoundError(model)
        self.num_looks -= 1
        return [1] if self.num_looks < 0 else []


def test_models_that_are_loading_are_waited_for_a_little_and_then_told(monkeypatch):
    monkeypatch.setattr(client_module, "open_transport", lambda *args: stub)
    stub = Loading(num_looks=2)
    policy = RetryPolicy(max_attempts=3, initial_backoff_s=0.001)
    assert RecommenderClient("stub", retry=policy).recommend({"user_id": "u"}, k=1).items
    stub = Loading(num_looks=100)
    with pytest.raises(ServerUnavailableError, match=r"yet: .*retrieval has no available version"):
        RecommenderClient("stub", retry=policy).recommend({"user_id": "u"}, k=1)


class HttpServer(ThreadingHTTPServer):
    request_queue_size = 128  # connections at once; a further one tries again a second later


@contextmanager
def http_server(handler):
    with HttpServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Together(BaseHTTPRequestHandler):
    """Answers once as many ask as are to be in flight, and counts connections."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    opened: ClassVar[list[object]] = []
    closed: ClassVar[list[object]] = []
    all_asked: ClassVar[threading.Barrier]

    def setup(self):
        super().setup()
        self.opened.append(self.client_address)

    def finish(self):
        super().finish()
        self.closed.append(self.client_address)

    def do_GET(self):
        self.all_asked.wait()
        body = b'{"model_version_status": [{"version": "1", "state": "AVAILABLE"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Not to the terminal."""


@pytest.fixture
def ask_together():
    """Sends as many requests at once as it is told."""
    Together.opened, Together.closed = [], []
    with http_server(Together) as target, ThreadPoolExecutor(128) as pool:
        rest = transport.open_transport(target)

        def ask(num_requests, times=1):
            Together.all_asked = threading.Barrier(num_requests, timeout=20)
            for versions in pool.map(
                lambda _: [rest.available_versions("retrieval", 30.0) for _ in range(times)],
                range(num_requests),
            ):
                assert versions == [[1]] * times

        yield ask
        rest.close()


def test_every_call_in_flight_has_a_connection_which_the_next_one_takes_over(ask_together):
    ask_together(128, times=2)  # the default of `funnel loadtest --max-in-flight`
    assert len(Together.opened) == 128


def test_connections_that_a_peak_needed_are_closed_after_a_minute_without_use(ask_together, monkeypatch):
    for now in (0, 50, 70):
        monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda now=now: now))
        ask_together(1 if now else 4)
    wait_for(lambda: len(Together.closed) >= 3, timeout_s=10)
    assert (len(Together.opened), len(Together.closed)) == (4, 3)


class Full(BaseHTTPRequestHandler):
    """Answers everything with HTTP 429, and counts."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        body = b'{"error": "no room"}'
        self.send_response(429)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
        """Not to the terminal."""


class FullOverGrpc(grpc.GenericRpcHandler):
    """Answers every call with RESOURCE_EXHAUSTED, and counts."""

    def __init__(self):
        self.asked = []

    def service(self, handler_call_details):
        def refuse(request, context):
            self.asked.append(handler_call_details.method)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")

        return grpc.unary_unary_rpc_method_handler(refuse)


@contextmanager
def full_over_rest():
    Full.asked = []
    with http_server(Full) as target:
        yield target, Full.asked


@contextmanager
def full_over_grpc():
    handler = FullOverGrpc()
    server = grpc.server(ThreadPoolExecutor(1), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}", handler.asked
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("full", [full_over_rest, full_over_grpc], ids=["429", "RESOURCE_EXHAUSTED"])
def test_a_server_without_room_is_told_and_not_asked_again(full):
    with full() as (target, asked), RecommenderClient(target, timeout_s=10) as client:
        with pytest.raises(OverloadedError, match="no room; send less, or let more servers share the load"):
            client.recommend({"user_id": "u"}, k=1)
        assert len(asked) == 1


def test_layouts_prefer_one_call_and_scann():
    assert [layout.models for layout in LAYOUTS] == [
        ("funnel",),
        ("funnel_exact",),
        ("retrieval", "ranking"),
        ("retrieval_exact", "ranking"),
    ]
