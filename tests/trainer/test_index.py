"""Search: ScaNN against exact search, restrictions of requests, several query vectors, short catalogues."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from trainer import index as index_module
from trainer.allow_lists import AllowLists
from trainer.index import (
    NO_ROW,
    CandidateIndex,
    Effort,
    ExactIndex,
    ExactItems,
    Restriction,
    ScannIndex,
)

SMALL, LARGE = 40, 2_500
LANGUAGES = ("de", "en", "fi")


def _vectors(num_items: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_items, dim)).astype(np.float32)


def _queries(num_queries: int = 32, dim: int = 8) -> np.ndarray:
    return _vectors(num_queries, dim, seed=1)


def _language(row: int) -> str:
    """Item 0 has no language, the others take turns; one item in 500 is in Swedish."""
    return "" if row == 0 else "sv" if row % 500 == 7 else LANGUAGES[row % 3]


def _regions(row: int) -> list[str]:
    """Even items are for everybody in the north, every fourth item for the south too."""
    return [*(["north"] if row % 2 == 0 else []), *(["south"] if row % 4 == 0 else [])]


def _build(num_items: int) -> CandidateIndex:
    vectors = _vectors(num_items)
    regions = [_regions(row) for row in range(num_items)]
    allow_lists = AllowLists(
        {
            "language": np.array([_language(row) for row in range(num_items)]),
            "region": np.array([[*values, "", ""][:2] for values in regions]),
        }
    )
    approximate = ScannIndex.build(vectors, 50 if num_items == LARGE else 0)
    approximate.efforts = [Effort(5, 20, 40), Effort(20, 35, 100)]
    return CandidateIndex(ExactIndex(approximate.vectors), approximate, allow_lists)


@pytest.fixture(scope="module")
def small() -> CandidateIndex:
    return _build(SMALL)


@pytest.fixture(scope="module")
def large() -> CandidateIndex:
    return _build(LARGE)


@pytest.fixture(params=[SMALL, LARGE])
def index(request: pytest.FixtureRequest) -> CandidateIndex:
    return request.getfixturevalue("small" if request.param == SMALL else "large")


def _texts(lists: list[list[str]]) -> tf.Tensor:
    width = max(map(len, lists))
    return tf.constant(
        [values + [""] * (width - len(values)) for values in lists], tf.string, [len(lists), width]
    )


def _restriction(
    index: CandidateIndex, excluded: list[list[int]], allowed: Mapping[str, list[list[str]]] | None = None
) -> Restriction:
    width = max(len(rows) for rows in excluded)
    rows = [rows + [NO_ROW] * (width - len(rows)) for rows in excluded]
    lists = {
        f"allow_{name}": _texts((allowed or {}).get(name, [[]] * len(excluded)))
        for name in ("language", "region")
    }
    return Restriction(
        tf.constant(rows, tf.int32, [len(rows), width]), index.allow_lists.allowed_values(lists)
    )


def _best(query: np.ndarray, candidates: list[int], num_items: int, k: int) -> list[int]:
    """Slow oracle: sorts every item by its best score, and keeps the candidates."""
    scores = (_vectors(num_items) @ np.atleast_2d(query).T).max(axis=1)
    wanted = set(candidates)
    return [int(row) for row in np.argsort(-scores, kind="stable") if row in wanted][:k]


def _all_but(excluded: list[int], num_items: int) -> list[int]:
    unwanted = set(excluded)
    return [row for row in range(num_items) if row not in unwanted]


def test_exact_search_equals_sorting_with_exclusions(large: CandidateIndex) -> None:
    queries = _queries(3)
    excluded = [_best(queries[0], _all_but([], LARGE), LARGE, 7), [], [5, 5, 6]]
    found = large.search_exact(queries, tf.constant([4, 2, 6]), _restriction(large, excluded))
    assert found.rows.shape == (3, 6) and found.rows.dtype == tf.int32
    assert found.scores.dtype == tf.float32
    for b, k in enumerate((4, 2, 6)):
        rows, scores = found.rows.numpy()[b], found.scores.numpy()[b]
        expected = _best(queries[b], _all_but(excluded[b], LARGE), LARGE, k)
        assert list(rows[:k]) == expected
        assert (rows[k:] == NO_ROW).all() and (scores[k:] == 0).all()
        np.testing.assert_allclose(scores[:k], _vectors(LARGE)[expected] @ queries[b], rtol=1e-5)
    assert not found.exact_fallback.numpy().any()


@pytest.mark.parametrize("dim", [2, 3], ids=["one vector", "several vectors"])
def test_exact_search_in_chunks_equals_exact_search_at_once(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whole numbers: their products are exact on any CPU, wherever in a chunk an item stands.
    queries = np.round(64 * _queries(6))
    queries = queries if dim == 2 else queries.reshape(2, 3, 8)
    # Equal vectors in different chunks: the item that comes first in the catalogue wins.
    vectors = np.tile(np.round(64 * _vectors(100)), (7, 1))
    whole = ExactIndex(vectors).search(tf.constant(queries), tf.constant(150))
    # Of 6 query vectors 600 scores are 100 items, and 2,880 bytes are 90 items of 8 numbers.
    monkeypatch.setattr(index_module, "_MAX_SCORES", 600)
    monkeypatch.setattr(index_module, "_MAX_CHUNK_BYTES", 2_880)
    monkeypatch.setattr(index_module, "_MIN_CHUNK_ITEMS", 1)
    chunked = ExactIndex(vectors).search(tf.constant(queries), tf.constant(150))
    np.testing.assert_array_equal(whole[0], chunked[0])
    np.testing.assert_array_equal(whole[1], chunked[1])
    assert (np.diff(whole[0].numpy()[:, :7], axis=1) == 100).all()


def test_recall_grows_with_effort_and_searching_everything_is_exact() -> None:
    queries = _queries()
    index = ScannIndex.build(_vectors(LARGE), 50)
    exact = [set(_best(query, _all_but([], LARGE), LARGE, 20)) for query in queries]
    recalls = []
    for effort in (Effort(20, 1, 20), Effort(20, 10, 60), Effort(20, 50, LARGE)):
        index.efforts = [effort]
        rows = index.search(tf.constant(queries), tf.constant(20))[0].numpy()
        recalls.append(np.mean([len(set(row) & best) / 20 for row, best in zip(rows, exact, strict=True)]))
    assert recalls[0] < recalls[1] < recalls[2] == 1.0


def test_scann_scores_are_dot_products_best_first(large: CandidateIndex) -> None:
    rows, scores = large.approximate.search(tf.constant(_queries()), tf.constant(20))
    np.testing.assert_allclose(
        scores, np.einsum("bkd,bd->bk", _vectors(LARGE)[rows.numpy()], _queries()), rtol=1e-4, atol=1e-4
    )
    assert (np.diff(scores.numpy(), axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("k", "leaves", "candidates"),
    [(1, 20, 40), (5, 20, 40), (6, 35, 100), (20, 35, 100), (30, 50, 150), (600, 50, LARGE)],
)
def test_a_search_takes_the_effort_that_its_k_needs(
    k: int, leaves: int, candidates: int, large: CandidateIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def search_with(queries: tf.Tensor, *numbers: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        asked.extend(int(number) for number in numbers)
        return tf.zeros([1, 1], tf.int32), tf.zeros([1, 1])

    monkeypatch.setattr(large.approximate, "search_with", search_with)
    large.approximate.search(tf.constant(_queries(1)), tf.constant(k))
    assert asked == [k, leaves, candidates]


def test_excluded_items_are_never_returned(index: CandidateIndex) -> None:
    num_items = index.exact.num_items
    queries = _queries(2)
    excluded = [_best(query, _all_but([], num_items), num_items, num_items // 2) for query in queries]
    found = index.search(queries, tf.constant([20, 20]), _restriction(index, excluded))
    for query, out, rows in zip(queries, excluded, found.rows.numpy(), strict=True):
        assert not set(rows) & set(out) and len(set(rows) - {NO_ROW}) == 20
        if num_items == SMALL:
            assert list(rows) == _best(query, _all_but(out, num_items), num_items, 20)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exact", [True, False])
def test_whatever_k_and_exclusions_nothing_excluded_comes_back_and_nothing_left_is_withheld(
    exact: bool, seed: int, index: CandidateIndex
) -> None:
    rng = np.random.default_rng(seed)
    num_items, ks = index.exact.num_items, [1, 2, 7, 20, 39, 100]
    queries = _vectors(len(ks), seed=seed)
    # None, one, the best ones, anything, all but one, and all; some twice.
    lengths = rng.permutation([0, 1, 5, num_items // 3, num_items - 1, num_items])
    excluded = [
        _best(query, _all_but([], num_items), num_items, n) for query, n in zip(queries, lengths, strict=True)
    ]
    excluded = [[*rows, *rows[:3]] for rows in excluded]
    search = index.search_exact if exact else index.search
    found = search(queries, tf.constant(ks), _restriction(index, excluded))
    for query, k, out, rows in zip(queries, ks, excluded, found.rows.numpy(), strict=True):
        got = [row for row in rows if row != NO_ROW]
        left = _all_but(out, num_items)
        assert not set(got) & set(out) and len(set(got)) == len(got) == min(k, len(left))
        if exact:
            assert got == _best(query, left, num_items, k)


def test_all_but_a_few_excluded_gives_these_few_and_says_that_search_was_exact(large: CandidateIndex) -> None:
    left = [3, 700, 2_400]
    restriction = _restriction(large, [_all_but(left, LARGE), [], [9]])
    # One leaf holds too little for the first request only; how much it holds differs from build to build.
    large.approximate.efforts, before = [Effort(LARGE * 10, 1, LARGE)], large.approximate.efforts
    found = large.search(_queries(3), tf.constant([10, 2, 2]), restriction)
    large.approximate.efforts = before
    assert list(found.rows.numpy()[0, :3]) == _best(_queries(3)[0], left, LARGE, 3)
    assert (found.rows.numpy()[0, 3:] == NO_ROW).all() and (found.scores.numpy()[0, 3:] == 0).all()
    assert found.exact_fallback.numpy().tolist() == [True, False, False]
    assert (found.rows.numpy()[1:, :2] != NO_ROW).all()


def test_everything_excluded_gives_nothing(index: CandidateIndex) -> None:
    everything = list(range(index.exact.num_items))
    found = index.search(_queries(2), tf.constant([5, 1]), _restriction(index, [everything, []]))
    assert (found.rows.numpy()[0] == NO_ROW).all() and (found.scores.numpy()[0] == 0).all()
    assert (found.rows.numpy()[1] != NO_ROW).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("k", [3, 200])
def test_more_wanted_than_there_are_gives_all(k: int) -> None:
    vectors = _vectors(3)
    approximate = ScannIndex.build(vectors, 0)
    approximate.efforts = [Effort(200, 0, 3)]
    found = CandidateIndex(ExactIndex(vectors), approximate).search(
        _queries(2), tf.constant([k, 1]), Restriction(tf.zeros([2, 0], tf.int32))
    )
    assert found.rows.shape == (2, k) and set(found.rows.numpy()[0]) - {NO_ROW} == {0, 1, 2}
    assert not found.exact_fallback.numpy().any()


@pytest.mark.parametrize("exact", [True, False])
def test_only_items_with_an_allowed_value_of_every_attribute_are_returned(
    exact: bool, index: CandidateIndex
) -> None:
    num_items = index.exact.num_items
    allowed = {
        "language": [["en"], ["en", "fi", "martian"], [], ["de"], []],
        "region": [[], ["south"], ["north", "south"], ["south"], []],
    }
    excluded = [[1, 4], [], [2], [], []]
    search = index.search_exact if exact else index.search
    found = search(_queries(5), tf.fill([5], 10), _restriction(index, excluded, allowed))
    for b in range(5):
        passing = [
            row
            for row in _all_but(excluded[b], num_items)
            if (not allowed["language"][b] or _language(row) in allowed["language"][b])
            and (not allowed["region"][b] or set(_regions(row)) & set(allowed["region"][b]))
        ]
        rows = [row for row in found.rows.numpy()[b] if row != NO_ROW]
        assert set(rows) <= set(passing) and len(rows) == min(10, len(passing))
        if exact or found.exact_fallback.numpy()[b] or num_items == SMALL:
            assert rows == _best(_queries(5)[b], passing, num_items, 10)


def test_rare_values_are_found_by_exact_search_and_unknown_ones_give_nothing(large: CandidateIndex) -> None:
    restriction = _restriction(large, [[], [], []], {"language": [["sv"], ["martian"], []]})
    found = large.search(_queries(3), tf.fill([3], 20), restriction)
    swedish = [row for row in range(LARGE) if _language(row) == "sv"]
    assert list(found.rows.numpy()[0, :5]) == _best(_queries(3)[0], swedish, LARGE, 5)
    assert (found.rows.numpy()[0, 5:] == NO_ROW).all() and (found.rows.numpy()[1] == NO_ROW).all()
    assert found.exact_fallback.numpy().tolist() == [True, True, False]


def test_a_list_that_many_items_pass_at_random_needs_no_exact_search() -> None:
    """To find just k / share items is too few for about every second request."""
    vectors = _vectors(LARGE)
    rng = np.random.default_rng(2)
    shelves = [
        np.where(rng.random(LARGE) < share, name, "") for name, share in (("half", 0.5), ("tenth", 0.1))
    ]
    approximate = ScannIndex.build(vectors, 0)
    approximate.efforts = [Effort(LARGE, 0, LARGE)]
    index = CandidateIndex(ExactIndex(vectors), approximate, AllowLists({"shelf": np.stack(shelves, axis=1)}))
    for name, excluded in (("half", 0), ("tenth", 0), ("half", 50)):
        allowed = index.allow_lists.allowed_values({"allow_shelf": tf.fill([300, 1], name)})
        restriction = Restriction(tf.tile(tf.range(excluded)[tf.newaxis], [300, 1]), allowed)
        found = index.search(_queries(300), tf.fill([300], 20), restriction)
        assert (found.rows.numpy() != NO_ROW).all()
        assert found.exact_fallback.numpy().mean() < 0.02, name


def test_shares_estimate_how_many_items_pass(small: CandidateIndex) -> None:
    allowed = {"language": [["de"], ["en", "fi"], []], "region": [["north"], ["north", "south"], []]}
    restriction = _restriction(small, [[], [], []], allowed)
    count = {name: sum(_language(row) == name for row in range(SMALL)) / SMALL for name in LANGUAGES}
    expected = [count["de"] * 0.5, (count["en"] + count["fi"]) * 0.75, 1.0]
    shares = small.allow_lists.shares(restriction.allowed_values, tf.constant(3))
    np.testing.assert_allclose(shares, expected, rtol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_several_query_vectors_give_each_item_its_best_score_once(exact: bool, index: CandidateIndex) -> None:
    num_items = index.exact.num_items
    queries = _queries(12).reshape(4, 3, 8)
    # A user whose interests are nearly the same finds the same items with each of them.
    queries[0, 1:] = queries[0, 0] * [[1.01], [0.99]]
    excluded = [[], _best(queries[1], _all_but([], num_items), num_items, 5), [], []]
    if not exact:
        index.approximate.efforts, before = [Effort(10, 50, num_items)], index.approximate.efforts
    search = index.search_exact if exact else index.search
    found = search(queries, tf.fill([4], 10), _restriction(index, excluded))
    if not exact:
        index.approximate.efforts = before
    for b in range(4):
        expected = _best(queries[b], _all_but(excluded[b], num_items), num_items, 10)
        assert list(found.rows.numpy()[b]) == expected
        scores = (_vectors(num_items)[expected] @ queries[b].T).max(axis=1)
        np.testing.assert_allclose(found.scores.numpy()[b], scores, rtol=1e-4)


def test_one_vector_of_several_is_one_vector(large: CandidateIndex) -> None:
    restriction = _restriction(large, [[1], [], [3]])
    k = tf.constant([3, 9, 20])
    one = large.search(_queries(3), k, restriction)
    several = large.search(_queries(3)[:, np.newaxis, :], k, restriction)
    np.testing.assert_array_equal(one.rows, several.rows)


@pytest.mark.parametrize("num_vectors", [1, 3], ids=["one vector", "several vectors"])
def test_exact_items_are_found_once_with_the_others_however_little_is_searched(num_vectors: int) -> None:
    vectors, queries = _vectors(LARGE), _queries(12).reshape(-1, num_vectors, 8)
    rows = np.arange(0, LARGE, 5)
    index = ScannIndex.build(vectors, 50)
    index.efforts = [Effort(20, 2, 30)]
    # What ScaNN finds by each vector alone: an item has the scores of the vectors that found it, not of all.
    by_vector = [
        index.search(tf.constant(queries[:, v]), tf.constant(20))[0].numpy() for v in range(num_vectors)
    ]
    index.exact_items = ExactItems(rows, vectors)
    asked = tf.constant(queries[:, 0] if num_vectors == 1 else queries)
    found, scores = (tensor.numpy() for tensor in index.search(asked, tf.constant(20)))
    for b in range(len(queries)):
        best: dict[int, float] = {}
        for v in range(num_vectors):
            for row in {*by_vector[v][b], *rows} - {NO_ROW}:
                best[row] = max(best.get(row, -math.inf), float(vectors[row] @ queries[b, v]))
        expected = sorted(best, key=lambda row: -best[row])[:20]
        assert list(found[b]) == expected
        np.testing.assert_allclose(scores[b], [best[row] for row in expected], rtol=1e-4)
    # And ScaNN alone would have missed some.
    assert set(found.ravel()) - {row for of_vector in by_vector for row in of_vector.ravel()}


def test_more_wanted_than_scann_and_the_exact_items_give_is_a_short_result() -> None:
    index = ScannIndex.build(_vectors(LARGE), 50)
    index.efforts, index.exact_items = (
        [Effort(LARGE, 1, LARGE)],
        ExactItems(np.array([7, 9]), _vectors(LARGE)),
    )
    rows, scores = (tensor.numpy() for tensor in index.search(tf.constant(_queries(2)), tf.constant(LARGE)))
    for of_query, of_rows in zip(rows, scores, strict=True):
        kept = of_query[of_query != NO_ROW]
        assert {7, 9} <= set(kept) and len(set(kept)) == len(kept) < LARGE
        assert (np.diff(of_rows[: len(kept)]) <= 0).all()


def test_saved_index_answers_the_same(large: CandidateIndex, tmp_path: Path) -> None:
    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 8]),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, None], tf.int32),
        ]
    )
    def search(queries: tf.Tensor, k: tf.Tensor, excluded: tf.Tensor) -> dict[str, tf.Tensor]:
        everything = large.allow_lists.allowed_values(large.allow_lists.empty_lists(tf.size(k)))
        found = large.search(queries, k, Restriction(excluded, everything))
        return {"rows": found.rows, "exact_fallback": found.exact_fallback}

    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    tf.saved_model.save(large, str(tmp_path), signatures={"search": search}, options=options)
    excluded = tf.constant([[1, 2], [NO_ROW, NO_ROW], [3, NO_ROW], [4, 4]])
    arguments = {"queries": tf.constant(_queries(4)), "k": tf.constant([3, 9, 1, 5]), "excluded": excluded}
    saved = tf.saved_model.load(str(tmp_path)).signatures["search"](**arguments)
    np.testing.assert_array_equal(saved["rows"], search(*arguments.values())["rows"])
