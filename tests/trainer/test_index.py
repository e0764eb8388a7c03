"""The candidate index: ScaNN against exact search, exclusions, short catalogues, and bad input."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import IndexBuildError
from trainer.config import IndexConfig
from trainer.index import NO_ROW, CandidateIndex, IndexFacts, ScannIndex, ScannSettings, build_index

SMALL, LARGE = 40, 2_500


def _vectors(num_items: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_items, dim)).astype(np.float32)


def _queries(num_queries: int = 32, dim: int = 8) -> np.ndarray:
    return _vectors(num_queries, dim, seed=1)


def _build(num_items: int, max_k: int = 20, min_recall: float = 0.95) -> tuple[CandidateIndex, IndexFacts]:
    ids = [f"i{row}" for row in range(num_items)]
    config = IndexConfig(min_recall=min_recall)
    return build_index(ids, _vectors(num_items), _queries(), config, max_k)


@pytest.fixture(scope="module")
def small() -> CandidateIndex:
    return _build(SMALL)[0]


@pytest.fixture(scope="module")
def large() -> CandidateIndex:
    return _build(LARGE)[0]


def _excluded(*lists: list[int]) -> tf.Tensor:
    width = max(len(rows) for rows in lists)
    return tf.constant(
        [rows + [NO_ROW] * (width - len(rows)) for rows in lists], tf.int32, [len(lists), width]
    )


def _best(query: np.ndarray, num_items: int, excluded: list[int], k: int) -> list[int]:
    """Slow oracle: sort everything, leave out the excluded."""
    order = np.argsort(-(_vectors(num_items) @ query), kind="stable")
    return [int(row) for row in order if row not in set(excluded)][:k]


def test_exact_search_equals_sorting_with_exclusions(large: CandidateIndex) -> None:
    queries = _queries(3)
    excluded = [_best(queries[0], LARGE, [], 7), [], [5, 5, 6]]
    rows, scores = large.search_exact(queries, tf.constant([4, 2, 6]), _excluded(*excluded))
    assert rows.shape == (3, 6) and rows.dtype == tf.int32 and scores.dtype == tf.float32
    for b, k in enumerate((4, 2, 6)):
        query, found, score = queries[b], rows.numpy()[b], scores.numpy()[b]
        expected = _best(query, LARGE, excluded[b], k)
        assert list(found[:k]) == expected
        assert (found[k:] == NO_ROW).all() and (score[k:] == 0).all()
        np.testing.assert_allclose(score[:k], _vectors(LARGE)[expected] @ query, rtol=1e-5)


def test_scann_reaches_the_required_recall_and_says_so() -> None:
    index, facts = _build(LARGE, min_recall=0.9)
    assert facts.num_items == LARGE and facts.k == 20 and facts.recall >= 0.9
    assert facts.settings.num_leaves == 50
    queries = _queries()
    k, nothing = tf.fill([len(queries)], 20), tf.zeros([len(queries), 0], tf.int32)
    rows, scores = index.search(queries, k, nothing)
    exact = index.search_exact(queries, k, nothing)[0]
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(rows.numpy(), exact.numpy(), strict=True)])
    assert recall == pytest.approx(facts.recall)
    # Reordering computes true dot products.
    np.testing.assert_allclose(
        scores, np.einsum("bkd,bd->bk", _vectors(LARGE)[rows.numpy()], queries), rtol=1e-4, atol=1e-4
    )


def test_recall_grows_with_effort_and_searching_everything_is_exact() -> None:
    queries = _queries()
    recalls = []
    index = ScannIndex(_vectors(LARGE), ScannSettings(50, 1, 20), 20)
    exact = [set(_best(query, LARGE, [], 20)) for query in queries]
    for settings in (ScannSettings(50, 1, 20), ScannSettings(50, 10, 60), ScannSettings(50, 50, LARGE)):
        index.settings = settings
        rows = index.search(tf.constant(queries), tf.constant(20))[0].numpy()
        recalls.append(np.mean([len(set(row) & best) / 20 for row, best in zip(rows, exact, strict=True)]))
    assert recalls[0] < recalls[1] < recalls[2] == 1.0


@pytest.mark.parametrize("num_items", [SMALL, LARGE])
def test_excluded_items_are_never_returned(num_items: int, request: pytest.FixtureRequest) -> None:
    index = request.getfixturevalue("small" if num_items == SMALL else "large")
    queries = _queries(2)
    excluded = [_best(query, num_items, [], num_items // 2) for query in queries]
    rows, _ = index.search(queries, tf.constant([20, 20]), _excluded(*excluded))
    for query, out, found in zip(queries, excluded, rows.numpy(), strict=True):
        assert not set(found) & set(out) and len(set(found) - {NO_ROW}) == 20
        if num_items == SMALL:
            assert list(found) == _best(query, num_items, out, 20)


def test_all_but_a_few_excluded_gives_these_few(large: CandidateIndex) -> None:
    left = [3, 700, 2_400]
    excluded = [row for row in range(LARGE) if row not in left]
    rows, scores = large.search(_queries(1), tf.constant([10]), _excluded(excluded))
    assert set(rows.numpy()[0, :3]) == set(left)
    assert (rows.numpy()[0, 3:] == NO_ROW).all() and (scores.numpy()[0, 3:] == 0).all()


def test_everything_excluded_gives_nothing(small: CandidateIndex) -> None:
    rows, scores = small.search(_queries(2), tf.constant([5, 1]), _excluded(list(range(SMALL)), []))
    assert (rows.numpy()[0] == NO_ROW).all() and (scores.numpy()[0] == 0).all()
    assert (rows.numpy()[1] != NO_ROW).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("num_items", [1, 3, 999, 1_000])
def test_catalogues_smaller_than_k_and_around_the_partition_limit(num_items: int) -> None:
    index, facts = _build(num_items, max_k=1_200)
    assert facts.k == num_items and facts.recall >= 0.95
    rows, _ = index.search(_queries(2), tf.constant([1_200, 1]), tf.zeros([2, 0], tf.int32))
    assert rows.shape == (2, 1_200)
    assert set(rows.numpy()[0]) - {NO_ROW} == set(range(num_items))


def test_saved_index_answers_the_same(large: CandidateIndex, tmp_path: Path) -> None:
    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 8]),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, None], tf.int32),
        ]
    )
    def search(queries: tf.Tensor, k: tf.Tensor, excluded: tf.Tensor) -> dict[str, tf.Tensor]:
        rows, scores = large.search(queries, k, excluded)
        return {"rows": rows, "scores": scores}

    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    tf.saved_model.save(large, str(tmp_path), signatures={"search": search}, options=options)
    arguments = {"queries": tf.constant(_queries(4)), "k": tf.constant([3, 9, 1, 5])}
    arguments["excluded"] = _excluded([1, 2], [], [3], [4, 4])
    saved = tf.saved_model.load(str(tmp_path)).signatures["search"](**arguments)
    np.testing.assert_array_equal(saved["rows"], search(*arguments.values())["rows"])


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
    with pytest.raises(IndexBuildError, match=r"no sample query"):
        build_index(["a", "b", "c"], vectors, _queries(0), config, 2)


def test_recall_below_the_required_one_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.index._efforts", lambda *_: [ScannSettings(50, 1, 20)])
    with pytest.raises(
        IndexBuildError, match=r"finds 0\.\d+ of the exact top 20 of 2,500 items .* min_recall 0\.95"
    ):
        _build(LARGE)
