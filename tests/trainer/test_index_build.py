"""Building and tuning: recall that is required and reported, least work, and bad input."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import IndexBuildError
from trainer import index_tuning
from trainer.config import IndexConfig
from trainer.index import CandidateIndex, Effort, ExactIndex, Restriction, ScannIndex
from trainer.index_build import build_index
from trainer.index_facts import IndexFacts
from trainer.index_tuning import (
    ExactResults,
    RequiredRecall,
    WorkModel,
    levels,
    recall_by_slice,
    tuned_index,
)

LARGE = 2_500


def _vectors(num_items: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_items, dim)).astype(np.float32)


def _queries(num_queries: int = 32) -> np.ndarray:
    return _vectors(num_queries, seed=1)


def _build(
    num_items: int, max_k: int = 20, config: IndexConfig | None = None, queries: np.ndarray | None = None
) -> tuple[CandidateIndex, IndexFacts]:
    ids = [f"i{row}" for row in range(num_items)]
    config = config or IndexConfig(min_recall=0.95)
    return build_index(ids, _vectors(num_items), _queries() if queries is None else queries, config, max_k)


def _recall(index: CandidateIndex, k: int) -> float:
    """Slow oracle: compares sets."""
    nothing = Restriction(tf.zeros([len(_queries()), 0], tf.int32))
    rows = index.search(_queries(), tf.fill([len(_queries())], k), nothing).rows.numpy()
    scores = _queries() @ _vectors(index.exact.num_items).T
    best = np.argsort(-scores, axis=1)[:, :k]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(rows, best, strict=True)]))


@pytest.fixture(scope="module")
def partitioned() -> tuple[CandidateIndex, IndexFacts]:
    """The work of a partition is worth it only from some thousand items on: here it always is."""
    with pytest.MonkeyPatch.context() as patch:
        work = WorkModel.work
        patch.setattr(
            WorkModel, "work", lambda model, leaves, effort: work(model, leaves, effort) if leaves else 1e12
        )
        return _build(LARGE)


def test_every_level_of_k_reaches_the_required_recall_and_the_facts_say_so(
    partitioned: tuple[CandidateIndex, IndexFacts],
) -> None:
    index, facts = partitioned
    assert (facts.num_items, facts.vector_width, facts.k) == (LARGE, 8, 20)
    assert facts.settings["num_leaves"] in (50, 100, 200)
    assert [effort.k for effort in facts.efforts] == [10, 20]
    for effort in facts.efforts:
        assert effort.recall >= 0.95 and effort.recall == pytest.approx(_recall(index, effort.k))
    assert facts.recall == facts.efforts[-1].recall
    assert json.loads(json.dumps(dataclasses.asdict(facts)))["efforts"][0]["k"] == 10


def test_less_is_searched_when_less_recall_is_required(
    partitioned: tuple[CandidateIndex, IndexFacts],
) -> None:
    model = WorkModel(LARGE, 8)
    exact = ExactResults.of(ExactIndex(_vectors(LARGE)), _queries(), 20)
    index = ScannIndex.build(_vectors(LARGE), 50)
    work = [
        model.work(50, index_tuning._cheapest(index, model, exact, 20, RequiredRecall(recall)))
        for recall in (0.6, 0.9, 0.99)
    ]
    assert work[0] < work[1] < work[2]


def test_the_cheapest_of_all_sufficient_efforts_is_taken() -> None:
    model = WorkModel(LARGE, 8)
    exact = ExactResults.of(ExactIndex(_vectors(LARGE)), _queries(), 20)
    index = ScannIndex.build(_vectors(LARGE), 50)
    required = RequiredRecall(0.9)
    sufficient = [
        effort
        for multiple in index_tuning._REORDERING
        for leaves in index_tuning._leaf_ladder(50)
        for effort in [Effort(20, leaves, int(multiple * 20))]
        if required.is_met(index_tuning._found(index, effort, exact), exact.rows)
    ]
    chosen = index_tuning._cheapest(index, model, exact, 20, required)
    assert model.work(50, chosen) == min(model.work(50, effort) for effort in sufficient)


def test_the_sampling_error_of_recall_is_kept_as_a_margin() -> None:
    """Of ten results 8, 9, 9, 10 are found: mean .9, standard error .0707 / 2; less 1.64 of it, .842."""
    found = np.arange(10) < np.array([[8], [9], [9], [10]])
    rows = np.zeros((4, 10), int)
    assert RequiredRecall(0.842).is_met(found, rows)
    assert not RequiredRecall(0.843).is_met(found, rows)


def test_a_slice_of_items_has_to_be_found_too_where_there_are_enough_results_to_tell() -> None:
    """Item 1 is found in half of the lists, item 0 in all."""
    rows = np.tile([0, 1], (30, 1))
    found = np.stack([np.ones(30, bool), np.arange(30) % 2 == 0], axis=1)
    slices = {"one": np.array([False, True])}
    assert RequiredRecall(0.6, 0.5, slices).is_met(found, rows)
    assert not RequiredRecall(0.6, 0.51, slices).is_met(found, rows)
    # 29 results of it say too little.
    assert RequiredRecall(0.6, 0.51, slices).is_met(found[1:], rows[1:])


def _few_among_many() -> tuple[np.ndarray, ExactResults, RequiredRecall]:
    """Among 20,000 items that are much alike 60 that are not, of which many queries want some."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20_000, 16)) * np.repeat([0.3, 0.006], 8)
    vectors[:, 0] += 2
    vectors[:60] = rng.normal(size=(60, 16)) * 2
    vectors[:60, 0] += 1
    queries = rng.normal(size=(64, 16))
    queries[:, 0] = np.abs(queries[:, 0]) + 0.5
    vectors, is_few = vectors.astype(np.float32), np.arange(20_000) < 60
    exact = ExactResults.of(ExactIndex(vectors), queries, 20)
    return vectors, exact, RequiredRecall(0.95, 0.9, {"many": ~is_few, "few": is_few})


def test_a_small_slice_that_codes_do_not_fit_is_scored_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_tuning, "_LEAVES", (1.0,))
    vectors, exact, required = _few_among_many()
    index = tuned_index(vectors, exact, required)
    assert index.num_leaves == 141 and index.exact_items is not None
    assert index.exact_items.rows.numpy().tolist() == list(range(60))
    found = index_tuning._found(index, index.efforts[-1], exact)
    assert required.is_met(found, exact.rows)
    assert recall_by_slice(found, exact.rows, required.slices)["few"] == 1.0
    # Without them not even all leaves and hundreds of candidates are enough.
    index.exact_items = None
    assert not required.is_met(index_tuning._found(index, Effort(20, 141, 400), exact), exact.rows)


def test_no_item_is_scored_exactly_where_codes_fit_or_it_would_cost_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_tuning, "_LEAVES", (1.0,))
    vectors, queries = _vectors(10_000, 16), _vectors(32, 16, seed=1)
    exact = ExactResults.of(ExactIndex(vectors), queries, 20)
    slices = {"few": np.arange(10_000) < 60, "many": np.arange(10_000) >= 60}
    assert tuned_index(vectors, exact, RequiredRecall(0.5, 0.5, slices)).exact_items is None
    monkeypatch.setattr(WorkModel, "exact_work", lambda model, num_exact_items, k: 1e9 * num_exact_items)
    index = tuned_index(*_few_among_many())
    assert index.exact_items is None and index.num_leaves == 0


def test_recall_by_slice_counts_exact_results_not_queries() -> None:
    rows = np.tile([[0, 1], [0, 2]], (15, 1))
    found = np.tile([[True, False], [True, True]], (15, 1))
    slices = {"head": np.array([True, False, False]), "tail": np.array([False, True, True])}
    # Item 2 alone stands in half of the lists: 15 results are too few to tell.
    slices |= {"two": np.array([False, False, True]), "cold": np.zeros(3, bool)}
    assert recall_by_slice(found, rows, slices) == {"head": 1.0, "tail": 0.5, "two": None, "cold": None}


def test_levels_halve_from_the_largest_k() -> None:
    assert levels(500) == [15, 31, 62, 125, 250, 500]
    assert levels(100) == [12, 25, 50, 100]
    assert levels(7) == [7]


def test_work_of_exact_items_grows_with_them_and_with_k() -> None:
    model = WorkModel(1_000_000, 64)
    assert model.exact_work(0, 100) == 0
    assert 0 < model.exact_work(100, 100) < model.exact_work(101, 100) < model.exact_work(101, 101)


def test_work_grows_with_each_part_of_the_effort() -> None:
    model = WorkModel(1_000_000, 64)
    base = model.work(1_000, Effort(100, 20, 200))
    assert model.work(1_000, Effort(100, 21, 200)) > base
    assert model.work(1_000, Effort(100, 20, 201)) > base
    assert model.work(1_001, Effort(100, 20, 200)) != base
    assert model.work(0, Effort(100, 0, 0)) > 30 * base


@pytest.mark.parametrize("num_items", [1, 3, 1_999])
def test_catalogues_too_small_to_partition_are_scored_whole(num_items: int) -> None:
    index, facts = _build(num_items, max_k=1_200)
    assert facts.settings == {"num_leaves": 0} and facts.recall == 1.0
    assert facts.k == min(num_items, 1_200)
    found = index.search(_queries(2), tf.constant([1_200, 1]), Restriction(tf.zeros([2, 0], tf.int32)))
    assert len(set(found.rows.numpy()[0]) - {-1}) == min(num_items, 1_200)


def test_exact_kind_needs_stock_operations_only() -> None:
    index, facts = _build(LARGE, config=IndexConfig(kind="exact"))
    assert facts.recall == 1.0 and facts.settings == {} and facts.efforts == ()

    @tf.function(input_signature=[tf.TensorSpec([None, 8]), tf.TensorSpec([None], tf.int32)])
    def search(queries: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
        return index.search(queries, k, Restriction(tf.zeros([tf.shape(k)[0], 0], tf.int32))).rows

    graph = search.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    assert nodes and not [node.op for node in nodes if "Scann" in node.op]


def test_several_query_vectors_can_be_tuned_for() -> None:
    _, facts = _build(LARGE, queries=_queries(36).reshape(12, 3, 8))
    assert facts.recall >= 0.95 and facts.num_sample_queries == 12


def test_what_was_found_is_told_by_query_and_item() -> None:
    vectors, queries = np.eye(4, dtype=np.float32), np.array([[4, 3, 2, 1], [1, 2, 3, 4]], np.float32)
    exact = ExactResults.of(ExactIndex(vectors), queries, 2)
    assert exact.rows.tolist() == [[0, 1], [3, 2]]
    # The first query misses item 1; the second finds what exact search finds, in another order.
    found = exact.found_by(np.array([[0, 2], [2, 3]]), np.array([[4.0, 2.0], [3.0, 4.0]]), 2)
    assert found.tolist() == [[True, False], [True, True]]


def test_an_equally_good_item_is_not_a_miss() -> None:
    vectors = np.array([[1.0], [1.0], [1.0], [2.0]], np.float32)
    exact = ExactResults.of(ExactIndex(vectors), np.ones((1, 1), np.float32), 2)
    assert exact.rows.tolist() == [[3, 0]]
    assert exact.found_by(np.array([[3, 2]]), np.array([[2.0, 1.0]]), 2).all()
    # A better one is.
    assert exact.found_by(np.array([[1, 2]]), np.array([[1.0, 1.0]]), 2).tolist() == [[False, True]]


def test_what_a_short_result_lacks_was_not_found() -> None:
    vectors = np.array([[1.0], [1.0], [1.0], [2.0]], np.float32)
    exact = ExactResults.of(ExactIndex(vectors), np.ones((1, 1), np.float32), 3)
    assert exact.rows.tolist() == [[3, 0, 1]]
    assert exact.found_by(np.array([[3]]), np.array([[2.0]]), 3).tolist() == [[True, False, False]]


def test_a_catalogue_of_equal_vectors_can_be_indexed() -> None:
    ids = [f"i{row}" for row in range(LARGE)]
    _, facts = build_index(ids, np.ones((LARGE, 8), np.float32), _queries(), IndexConfig(), 20)
    assert facts.recall == 1.0


def test_recall_of_slices_stands_in_the_facts() -> None:
    vectors, ids = _vectors(40), [f"i{row}" for row in range(40)]
    slices = {"all": np.ones(40, bool), "none": np.zeros(40, bool)}
    _, facts = build_index(ids, vectors, _queries(), IndexConfig(), 5, slices)
    assert facts.recall_by_slice == {"all": 1.0, "none": None}


def test_bad_catalogues_are_refused() -> None:
    config, vectors = IndexConfig(), _vectors(3)
    with pytest.raises(IndexBuildError, match=r"'a' stands in 2 catalogue rows"):
        build_index(["a", "b", "a"], vectors, _queries(), config, 2)
    with pytest.raises(IndexBuildError, match=r"'' stands in 1 catalogue rows"):
        build_index(["a", "b", ""], vectors, _queries(), config, 2)
    with pytest.raises(IndexBuildError, match=r"2 item ids for item vectors of shape \(3, 8\)"):
        build_index(["a", "b"], vectors, _queries(), config, 2)
    with pytest.raises(IndexBuildError, match=r"0 item ids"):
        build_index([], vectors[:0], _queries(), config, 2)
    with pytest.raises(IndexBuildError, match=r"1 of 3 item vectors are not finite, .* item 'b'"):
        build_index(
            ["a", "b", "c"], np.where(np.arange(3)[:, None] == 1, np.nan, vectors), _queries(), config, 2
        )


def test_bad_sample_queries_are_refused() -> None:
    ids, vectors, config = ["a", "b", "c"], _vectors(3), IndexConfig()
    with pytest.raises(IndexBuildError, match=r"expected finite query vectors .*, got 0"):
        build_index(ids, vectors, _queries(0), config, 2)
    with pytest.raises(IndexBuildError, match=r"got 2, 8 of whose numbers are not finite"):
        build_index(ids, vectors, np.array([[np.nan] * 8, [1.0] * 8], np.float32), config, 2)


def test_an_allow_list_without_values_is_refused() -> None:
    config = IndexConfig(allow_list=("language",))
    with pytest.raises(IndexBuildError, match=r"'language': expected its values for 3 items, got none"):
        build_index(["a", "b", "c"], _vectors(3), _queries(), config, 2)
    with pytest.raises(IndexBuildError, match=r"got 2"):
        build_index(
            ["a", "b", "c"], _vectors(3), _queries(), config, 2, attributes={"language": np.array(["x", "y"])}
        )


def test_recall_below_the_required_one_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_little(vectors: np.ndarray, exact: ExactResults, required: RequiredRecall) -> ScannIndex:
        index = ScannIndex.build(vectors, 50)
        index.efforts = [Effort(20, 1, 20)]
        return index

    monkeypatch.setattr("trainer.index_build.tuned_index", too_little)
    with pytest.raises(IndexBuildError, match=r"finds 0\.\d+ of the exact results .* min_recall 0\.95"):
        _build(LARGE)
