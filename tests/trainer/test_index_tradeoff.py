"""Points of recall against time: around the chosen effort, by slice of items, beside exact search."""

import numpy as np
import pytest
import tensorflow as tf

from trainer import index_tradeoff
from trainer.index import CandidateIndex, Effort, ExactIndex, ScannIndex
from trainer.index_facts import SearchPoint
from trainer.index_tradeoff import search_points
from trainer.index_tuning import ExactResults

NUM_ITEMS, NUM_LEAVES, K = 2_500, 50, 20
EFFORTS = (Effort(10, 4, 30), Effort(20, 16, 40))


def normal(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def exact() -> ExactResults:
    return ExactResults.of(ExactIndex(normal(NUM_ITEMS, 0)), normal(32, 1), K)


@pytest.fixture(scope="module")
def scann_index() -> ScannIndex:
    index = ScannIndex.build(normal(NUM_ITEMS, 0), NUM_LEAVES)
    index.efforts = EFFORTS
    return index


@pytest.fixture(scope="module")
def points(exact: ExactResults, scann_index: ScannIndex) -> list[SearchPoint]:
    index = CandidateIndex(ExactIndex(scann_index.vectors), scann_index)
    is_even = np.arange(NUM_ITEMS) % 2 == 0
    return list(search_points(index, exact, {"even": is_even, "none": np.zeros(NUM_ITEMS, bool)}))


def test_efforts_around_the_chosen_one_come_before_exact_search_by_k(points: list[SearchPoint]) -> None:
    found = [(p.k, p.num_leaves_to_search, p.num_reordering_candidates, p.is_chosen) for p in points]
    assert found == [
        *((10, leaves, 30, leaves == 4) for leaves in (1, 2, 4, 8, 16)),
        (10, None, None, False),
        # Four times 16 leaves are more than there are.
        *((20, leaves, 40, leaves == 16) for leaves in (4, 8, 16, 32, 50)),
        (20, None, None, False),
    ]


def test_recall_is_that_of_sets_whatever_the_effort_and_exact_search_finds_all(
    points: list[SearchPoint], exact: ExactResults, scann_index: ScannIndex
) -> None:
    *approximate, last = [p for p in points if p.k == 20]
    even = [item for row in exact.rows for item in row if item % 2 == 0]
    for point in approximate:
        rows, _ = scann_index.search_with(
            exact.queries, *map(tf.constant, (20, point.num_leaves_to_search, 40))
        )
        hits = [set(a) & set(b) for a, b in zip(rows.numpy(), exact.rows, strict=True)]
        assert point.recall == pytest.approx(sum(map(len, hits)) / (32 * K))
        found = sum(item % 2 == 0 for row in hits for item in row)
        assert point.recall_by_slice == {"even": pytest.approx(found / len(even)), "none": None}
    # More leaves find more; not one by one, since of the 40 candidates that are kept some may be crowded out.
    assert approximate[0].recall < min(0.95, approximate[-1].recall)
    assert (last.recall, last.recall_by_slice) == (1.0, {"even": 1.0, "none": None})


def test_every_point_has_a_time(points: list[SearchPoint]) -> None:
    assert all(0 < p.p50_ms <= p.p95_ms for p in points)


def test_a_slow_search_is_timed_fewer_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is 50 ms after the last: .25 s are over after six queries; three count."""
    clock = iter(np.arange(1_000) * 0.05)
    monkeypatch.setattr(index_tradeoff.time, "perf_counter", lambda: next(clock))
    times = index_tradeoff._times_ms(lambda queries: (queries, queries), tf.zeros([2, 8]), [])
    assert times == pytest.approx([50.0] * 3)


def test_an_index_without_parts_has_one_way_and_an_exact_one_only_its_own(exact: ExactResults) -> None:
    whole = ScannIndex.build(normal(NUM_ITEMS, 0), 0)
    whole.efforts = [Effort(K, 0, NUM_ITEMS)]
    found = search_points(CandidateIndex(ExactIndex(whole.vectors), whole), exact, {})
    assert [(p.k, p.num_leaves_to_search, p.is_chosen, p.recall) for p in found] == [
        (10, 0, True, 1.0), (10, None, False, 1.0), (20, 0, True, 1.0), (20, None, False, 1.0),
    ]  # fmt: skip
    found = search_points(CandidateIndex(ExactIndex(normal(NUM_ITEMS, 0)), None), exact, {})
    assert [(p.k, p.num_leaves_to_search, p.is_chosen) for p in found] == [(10, None, True), (20, None, True)]
