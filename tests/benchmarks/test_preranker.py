"""The benchmark of the pre-ranker: what is asked, timed and counted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import preranker as benchmark
from benchmarks.preranker import Exported, latency, speed, survivors, to_markdown, without_users
from schema.errors import DataError

ITEMS = np.array(["a", "b", "c", "d"], object)
# What the ranker gives two users; "d" is the best of both, and "a" and "b" change places.
SCORES = {"u1": {"a": 3.0, "b": 2.0, "c": 1.0, "d": 4.0}, "u2": {"a": 2.0, "b": 3.0, "c": 1.0, "d": 4.0}}
# The pre-ranker finds the best of u1 and misses "d" of u2.
FOUND = {"u1": ["d", "b", "a", "c"], "u2": ["b", "a", "d", "c"]}
EXPORTED = Exported(
    Path("model"),
    ITEMS,
    np.float32([0.1, 0.2, 0.9, 0.8]),
    [{"user_id": np.array([user], object)} for user in SCORES],
    {},
)


class Signatures:
    """Stands for the exported model, and remembers what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, bool]] = []

    def load(self, path: str) -> Any:
        assert path == "model"
        return SimpleNamespace(signatures={"rank": self.rank, "pre_rank": self.pre_rank})

    def rank(self, user_id: tf.Tensor, candidate_item_ids: tf.Tensor) -> dict[str, tf.Tensor]:
        names = [name.decode() for name in candidate_item_ids.numpy()[0]]
        self.asked.append(("rank", len(names), False))
        return {"score": tf.constant([[SCORES[user_id.numpy()[0].decode()][name] for name in names]])}

    def pre_rank(
        self, user_id: tf.Tensor, candidate_item_ids: tf.Tensor, k: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        self.asked.append(("pre_rank", candidate_item_ids.shape[1], k.dtype == tf.int32))
        return {"item_ids": tf.constant([FOUND[user_id.numpy()[0].decode()][: int(k[0])]])}


@pytest.fixture
def signatures(monkeypatch: pytest.MonkeyPatch) -> Signatures:
    stub = Signatures()
    monkeypatch.setattr(tf.saved_model, "load", stub.load)
    monkeypatch.setattr(benchmark, "NUM_CANDIDATES", 4)
    monkeypatch.setattr(benchmark, "NUM_KEPT", 3)
    monkeypatch.setattr(benchmark, "KEPT", (1, 2, 3))
    monkeypatch.setattr(benchmark, "BEST", (1, 2))
    return stub


def test_survival_is_counted_in_the_answers_of_both_signatures(signatures: Signatures) -> None:
    found = survivors(EXPORTED, seed=1)
    assert (found["num_requests"], found["num_candidates"]) == (2, 4)
    # The best of u1 and of u2 is "d", then "a" and "b"; the pre-ranker's first two are d, b and b, a.
    assert found["survival"]["pre-ranker"] == {
        "1": {"1": 0.5, "2": 0.5},
        "2": {"1": 0.5, "2": 0.5},
        "3": {"1": 1.0, "2": 1.0},
    }
    # Values 0 and 1: standard deviation .7071, over the root of 2.
    assert found["standard_error"]["1"]["1"] == pytest.approx(0.5)
    # By mean score d is first, a and b are equal; by popularity the order is c, d, b, a.
    assert found["survival"]["the same for all"]["1"] == {"1": 1.0, "2": 0.5}
    assert found["survival"]["popularity"]["1"] == {"1": 0.0, "2": 0.0}
    assert found["survival"]["popularity"]["3"] == {"1": 1.0, "2": 0.75}
    assert set(found["survival"]) == {"pre-ranker", "the same for all", "popularity", "random"}


def test_pre_ranker_is_timed_on_all_and_ranker_on_the_kept_candidates(signatures: Signatures) -> None:
    found = speed(EXPORTED, seed=1)
    assert list(found) == ["pre_rank 4 candidates", "rank 3 candidates"]
    # Two requests, a round to warm up and five that count.
    assert signatures.asked == [("pre_rank", 4, True)] * 12 + [("rank", 3, False)] * 12
    for row in found.values():
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p95_ms"]


def test_latency_leaves_the_first_round_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Seconds that each call takes: two to warm up, then one of 3 ms and one of 1 ms, five times.
    durations = iter([9.0, 9.0, *[0.003, 0.001] * 5])
    clock = {"now": 0.0}

    def ask(**inputs: Any) -> None:
        clock["now"] += next(durations)

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock["now"] / 2)
    found = latency(ask, [{"x": 1}, {"x": 2}])
    assert found == pytest.approx({"p50_ms": 2.0, "p95_ms": 3.0, "min_ms": 1.0, "cpu_p50_ms": 1.0})


def test_rows_of_the_users_who_are_asked_are_left_out_of_distillation() -> None:
    window = {"user_id_id": tf.constant([5, 6, 7, 5]), "x": tf.constant([[1, 0], [2, 0], [3, 3], [4, 0]])}
    left = without_users(window, "user_id_id", [5, 9])
    assert left["user_id_id"].numpy().tolist() == [6, 7]
    assert left["x"].numpy().tolist() == [[2, 0], [3, 3]]


def test_run_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="examples are gone"):
        benchmark._latest(tmp_path)
    for number in ("9", "10"):
        (tmp_path / number).mkdir()
    assert benchmark._latest(tmp_path).name == "10"


def test_table_holds_every_figure(signatures: Signatures) -> None:
    text = to_markdown({"speed": speed(EXPORTED, seed=1), "survival": survivors(EXPORTED, seed=1)})
    assert "| pre_rank 4 candidates |" in text and "| order of 4 candidates | best 1 in 1 |" in text
    assert "| pre-ranker | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 1.0000 | 1.0000 |" in text
