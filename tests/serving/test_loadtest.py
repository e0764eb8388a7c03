"""The load generator: the same seed asks the same, and nobody's wait is left out of the figures."""

import gc
import json
import socket
import threading
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

import serving.slo
from schema.errors import ConfigError
from serving.client import OneCall, RecommenderClient, TwoCalls
from serving.loadtest import (
    LoadRequest,
    Sample,
    ask_for_recommendations,
    asking,
    measure,
    poisson_arrivals,
    run_load,
    slo_misses,
    summarize,
)
from serving.loadtest_plot import plot_load
from serving.slo import Slo, load_slo
from serving.transport import DeadlineExceededError, ServerUnavailableError
from tests.serving.test_client import QUERY

SLO = Slo(rate_per_s=100, duration_s=2, p99_ms=50, error_budget=0.01)


def test_arrivals_are_those_of_a_poisson_process_and_repeat_with_the_seed():
    arrivals = poisson_arrivals(rate_per_s=200, duration_s=50, seed=3)
    np.testing.assert_array_equal(arrivals, poisson_arrivals(200, 50, seed=3))
    assert not np.array_equal(arrivals[:10], poisson_arrivals(200, 50, seed=4)[:10])
    # 10,000 expected; four standard deviations of a Poisson count are 400.
    assert 9_600 < len(arrivals) < 10_400
    gaps = np.diff(arrivals)
    assert gaps.min() > 0 and arrivals[-1] < 50
    # An exponential's standard deviation is its mean, and 1 - 1/e of it lies below the mean.
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.04)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.04)
    assert np.mean(gaps < gaps.mean()) == pytest.approx(1 - np.exp(-1), abs=0.02)


@pytest.mark.parametrize(
    ("rate", "duration", "complaint"),
    [(0, 1, "above 0"), (1, -1, "above 0"), (1e-9, 1, "drew no request")],
)
def test_a_load_of_nothing_is_refused(rate, duration, complaint):
    with pytest.raises(ConfigError, match=complaint):
        poisson_arrivals(rate, duration, seed=1)


def test_the_wait_behind_slow_requests_counts():
    # A server that answers one request at a time, 30 ms each, asked every 20 ms: request n waits 10 n ms.
    # A closed loop would report 30 ms for each.
    def ask(i):
        time.sleep(0.03)
        return {}

    samples = run_load(ask, np.arange(10) * 0.02, max_in_flight=1)
    waits_ms = [1e3 * (sample.done_s - sample.scheduled_s) for sample in samples]
    # A busy machine makes sleeps longer, never shorter.
    assert all(wait > 30 + 10 * n - 1 for n, wait in enumerate(waits_ms))


def test_requests_leave_on_time_while_earlier_ones_are_open():
    release, open_now, most = threading.Event(), [], []

    def ask(i):
        open_now.append(i)
        most.append(len(open_now))
        if len(open_now) == 8:
            release.set()
        assert release.wait(10), "the eighth request never left: the loop is closed"
        return {}

    samples = run_load(ask, np.arange(8) * 0.005, max_in_flight=8)
    assert max(most) == 8
    assert [sample.scheduled_s for sample in samples] == pytest.approx(np.arange(8) * 0.005)


def test_users_are_drawn_by_the_seed_and_keep_their_excluded_items():
    asked = []

    class Client:
        def recommend(self, query, k, exclude_item_ids, num_candidates):
            asked.append((query["user_id"], exclude_item_ids, k, num_candidates))
            return type("Answer", (), {"stage_seconds": {"funnel": 0.001}})

    requests = [LoadRequest({"user_id": str(u)}, (f"seen-by-{u}",)) for u in range(5)]
    for _ in range(2):
        ask = ask_for_recommendations(Client(), requests, k=3, num_candidates=7, seed=9)
        assert [ask(i) for i in range(40)] == [{"funnel": 0.001}] * 40
    assert asked[:40] == asked[40:]
    assert {user for user, *_ in asked} == set("01234")
    assert all(call[1:] == ((f"seen-by-{call[0]}",), 3, 7) for call in asked)


def samples_of(latencies_ms, errors=()):
    good = [Sample(0.0, 0.001, ms / 1e3, {"retrieve": ms / 2e3, "rank": ms / 4e3}) for ms in latencies_ms]
    return good + [Sample(0.0, 0.002, 0.5, {}, kind) for kind in errors]


def test_percentiles_are_measured_values_of_answered_requests():
    kinds = ["DeadlineExceededError", "DeadlineExceededError", "ServerUnavailableError"]
    result = summarize(samples_of(range(1, 98), kinds), rate_per_s=50, duration_s=2.0, generator_cpu_s=0.1)
    # 97 answers of 1 to 97 ms: half of them is 48.5, so the 49th; 95 % is 92.15, the 93rd; 99 % the 97th.
    assert astuple(result.latency_ms["total"]) == pytest.approx((49, 93, 97, 97))
    assert astuple(result.latency_ms["retrieve"]) == pytest.approx((24.5, 46.5, 48.5, 48.5))
    assert result.latency_ms["rank"].p50 == pytest.approx(12.25)
    assert result.errors == {"DeadlineExceededError": 2, "ServerUnavailableError": 1}
    assert (result.num_requests, result.error_share) == (100, 0.03)
    assert result.achieved_rate_per_s == pytest.approx(97 / 2.0)
    assert result.generator_cpu_ms_per_request == pytest.approx(1.0)
    assert result.generator_cores == pytest.approx(0.05)
    assert astuple(result.late_ms) == pytest.approx((1, 1, 2, 2))
    assert result.warnings == []


def test_a_generator_at_its_limit_says_so():
    late = [Sample(0.0, 0.011, 0.02, {}) for _ in range(5)]
    result = summarize(late, rate_per_s=5, duration_s=1.0, generator_cpu_s=0.9)
    assert len(result.warnings) == 2
    assert "left 11 ms late" in result.warnings[0]
    assert "used 0.90 of the one core" in result.warnings[1]


@pytest.mark.parametrize(
    ("latencies_ms", "errors", "misses"),
    [
        ([50] * 200, [], []),
        ([50] * 197 + [51] * 3, [], ["p99 was 51.0 ms at 100/s, the limit is 50 ms"]),
        ([50] * 198 + [51] * 2, [], []),
        ([10] * 198, ["ServingError"] * 2, []),
        ([10] * 197, ["A"] * 3, ["1.50% of 200 requests failed, the budget is 1.00% (A: 3)"]),
        ([], ["ServingError"], ["100.00% of 1 requests failed, the budget is 1.00% (ServingError: 1)"]),
    ],
    ids=["met", "slow", "one-per-cent-may-be-slow", "errors-within-budget", "errors", "nothing-answered"],
)  # fmt: skip
def test_an_objective_is_missed_by_latency_or_by_errors(latencies_ms, errors, misses):
    result = summarize(samples_of(latencies_ms, errors), 100, 2.0, 0.1)
    assert slo_misses(SLO, result) == misses


def test_the_objective_of_the_repository_loads_and_wrong_ones_are_refused(tmp_path):
    assert load_slo(Path(serving.slo.__file__).with_name("slo.yaml")).p99_ms > 0
    wrong = tmp_path / "slo.yaml"
    wrong.write_text("{rate_per_s: 10, duration_s: 19, p99_ms: 5, error_budget: 0}")
    with pytest.raises(ConfigError, match="190 requests, too few for a 99th percentile"):
        load_slo(wrong)
    wrong.write_text("{rate_per_s: 10, duration_s: 20, p99: 5, error_budget: 0}")
    with pytest.raises(ConfigError, match="p99_ms"):
        load_slo(wrong)


def test_errors_are_counted_by_kind_and_a_fault_of_the_generator_is_none():
    def ask(i):
        raise (DeadlineExceededError if i % 2 else ServerUnavailableError)("no")

    samples = run_load(ask, np.zeros(4), max_in_flight=2)
    assert [s.error for s in samples] == ["ServerUnavailableError", "DeadlineExceededError"] * 2
    with pytest.raises(ZeroDivisionError):
        run_load(lambda i: {"x": 1 / 0}, np.zeros(1), max_in_flight=1)


@pytest.mark.parametrize(
    ("layout", "stages"),
    [(OneCall("one_call"), {"funnel", "total"}), (TwoCalls(), {"retrieve", "rank", "total"})],
    ids=["one-call", "two-calls"],
)
def test_a_real_server_is_measured_by_stage(server, layout, stages):
    with RecommenderClient(server.grpc_target, timeout_s=10, layouts=(layout,)) as client:
        ask = ask_for_recommendations(client, [LoadRequest(QUERY)], k=2, num_candidates=4, seed=1)
        result, samples = measure(ask, 40, 0.5, 1, max_in_flight=16)
    assert result.num_requests == len(samples) == len(poisson_arrivals(40, 0.5, seed=1))
    assert result.errors == {} and set(result.latency_ms) == stages
    parts = sum(result.latency_ms[stage].p50 for stage in stages - {"total"})
    assert 0 < parts < result.latency_ms["total"].max
    assert json.loads(json.dumps(result.as_json()))["latency_ms"]["total"]["p99"] > 0


def test_the_collector_does_not_walk_the_users_while_the_load_runs(server):
    requests = [LoadRequest(QUERY)]

    def is_walked() -> bool:
        return any(each is requests for each in gc.get_objects())

    assert is_walked()
    with asking(server.grpc_target, requests, k=2, num_candidates=4, timeout_s=10):
        assert not is_walked()
    assert is_walked()


def test_a_server_that_is_down_is_a_count_of_errors():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        target = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with RecommenderClient(target, timeout_s=1, layouts=(TwoCalls(),)) as client:
        ask = ask_for_recommendations(client, [LoadRequest(QUERY)], k=2, num_candidates=4, seed=1)
        result, _ = measure(ask, 20, 0.3, 1, max_in_flight=16)
    assert result.errors == {"ServerUnavailableError": result.num_requests}
    assert result.latency_ms == {} and result.achieved_rate_per_s == 0


@pytest.mark.parametrize("latencies_ms", [range(1, 300), []], ids=["answers", "only-errors"])
def test_a_figure_is_drawn_of_one_rate_and_of_several(latencies_ms, tmp_path):
    samples = samples_of(latencies_ms, ["ServingError"])
    results = [(summarize(samples, rate, 2.0, 0.1), samples) for rate in (50, 100)]
    for name, chosen in (("rates.svg", results), ("one.svg", results[:1])):
        plot_load(chosen, "50 users", tmp_path / name)
        text = (tmp_path / name).read_text()
        assert "50 users" in text and "failed: 1" in text
        assert ("total by rate" in text) == (name == "rates.svg")
