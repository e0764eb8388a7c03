"""Metrics of recommended lists against slow oracles, hand calculations and their limits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.errors import DataError, ShapeError
from tests import oracles
from trainer import metrics

NUM_ITEMS = 6
LISTS = st.integers(1, 5).flatmap(
    lambda k: st.lists(
        st.permutations(range(-3, NUM_ITEMS)).map(lambda rows: rows[:k]), min_size=1, max_size=6
    )
)
CHOOSERS = st.lists(st.integers(0, 9), min_size=NUM_ITEMS, max_size=NUM_ITEMS)
ATTRIBUTES = st.lists(st.sets(st.integers(0, 3)), min_size=NUM_ITEMS, max_size=NUM_ITEMS)
UPLOADS = st.lists(st.sampled_from([0.0, 86_400.0, 1e6, math.nan]), min_size=NUM_ITEMS, max_size=NUM_ITEMS)


def multi_hot(attributes):
    return np.array([[place in mine for place in range(4)] for mine in attributes])


@given(lists=LISTS, data=st.data())
def test_metrics_of_the_whole_equal_the_oracles(lists, data):
    k = data.draw(st.integers(1, len(lists[0])))
    found = metrics.aggregate_metrics(np.array(lists), k, NUM_ITEMS)
    expected = {
        f"coverage_at_{k}": oracles.coverage_at_k(lists, k, NUM_ITEMS),
        f"gini_at_{k}": oracles.gini_at_k(lists, k, NUM_ITEMS),
    }
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(lists=LISTS, choosers=CHOOSERS, attributes=ATTRIBUTES, uploads=UPLOADS, data=st.data())
def test_metrics_of_each_list_equal_the_oracles(lists, choosers, attributes, uploads, data):
    k = data.draw(st.integers(1, len(lists[0])))
    facts = metrics.CatalogueFacts(np.array(choosers), 9, np.array(uploads), multi_hot(attributes))
    now = [100_000.0 * place for place in range(len(lists))]
    found = metrics.list_metrics(np.array(lists), k, facts, now)
    expected = {
        "novelty": [oracles.novelty_at_k(items, k, choosers, 9) for items in lists],
        "mean_popularity": [oracles.mean_popularity_at_k(items, k, choosers) for items in lists],
        "intra_list_diversity": [oracles.attribute_diversity_at_k(items, k, attributes) for items in lists],
        "mean_age_days": [
            oracles.mean_age_days_at_k(items, k, uploads, time)
            for items, time in zip(lists, now, strict=True)
        ],
    }
    assert found.keys() == {f"{name}_at_{k}" for name in expected}
    for name, values in expected.items():
        # Similarities of attributes are float32.
        np.testing.assert_allclose(found[f"{name}_at_{k}"], values, atol=1e-6)


@given(lists=LISTS, seed=st.integers(0, 2**32 - 1))
def test_order_of_users_and_order_within_the_first_k_do_not_matter(lists, seed):
    rng = np.random.default_rng(seed)
    table = np.array(lists)
    k = table.shape[1]
    facts = metrics.CatalogueFacts(np.arange(NUM_ITEMS), NUM_ITEMS, np.arange(6) * 9e4, np.eye(6, 4) > 0)
    order = rng.permutation(len(table))
    shuffled = rng.permuted(table[order], axis=1)
    ours, theirs = (metrics.aggregate_metrics(lists, k, NUM_ITEMS) for lists in (shuffled, table))
    assert ours == pytest.approx(theirs, abs=0.0, nan_ok=True)
    ours, theirs = (metrics.list_metrics(lists, k, facts, 1e6) for lists in (shuffled, table))
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values[order], rtol=1e-12)


def test_attributes_of_many_lists_are_read_in_pieces_with_the_same_result(monkeypatch):
    rng = np.random.default_rng(1)
    lists = np.array([rng.permutation(40)[:5] for _ in range(30)])
    attributes = rng.random((40, 7)) < 0.3
    whole = metrics.attribute_diversity_at_k(lists, 5, attributes)
    monkeypatch.setattr("trainer.metrics.lists._CELLS_PER_CHUNK", 100)
    np.testing.assert_array_equal(metrics.attribute_diversity_at_k(lists, 5, attributes), whole)


def test_a_model_that_recommends_the_same_to_everybody_stands_out():
    same, spread = np.tile([0, 1], [50, 1]), np.arange(100).reshape(50, 2)
    assert metrics.coverage_at_k(same, 2, 100) == 0.02
    assert metrics.coverage_at_k(spread, 2, 100) == 1.0
    assert metrics.gini_at_k(spread, 2, 100) == pytest.approx(0.0, abs=1e-12)
    # Two of 100 items share all places: all pairs of one of them and one of the other 98 differ by 50.
    assert metrics.gini_at_k(same, 2, 100) == pytest.approx(2 * 98 * 50 / 4950 / 2, abs=1e-12)
    assert metrics.gini_at_k(same, 1, 100) == 1.0


def test_novelty_worked_by_hand():
    # 15 users: 15 of them chose item 0 (0 bits), 3 item 1 (2 bits), nobody item 2 (4 bits).
    lists, choosers = np.array([[0, 1, 2], [2, -1, -1]]), np.array([15, 3, 0])
    assert metrics.novelty_at_k(lists, 3, choosers, 15).tolist() == [2.0, 4.0]
    assert metrics.mean_popularity_at_k(lists, 3, choosers).tolist() == [6.0, 0.0]


def test_items_uploaded_after_the_request_are_new_not_of_negative_age():
    ages = metrics.mean_age_days_at_k(np.array([[0, 1]]), 2, np.array([0.0, 9e9]), 86_400.0)
    assert ages.tolist() == [0.5]


def test_empty_lists_and_an_empty_catalogue_have_no_value():
    lists = np.array([[-1, -1]])
    facts = metrics.CatalogueFacts(np.zeros(0, int), 0, np.zeros(0), np.zeros((0, 3), bool))
    for values in metrics.list_metrics(lists, 2, facts, 0.0).values():
        assert np.isnan(values).all()
    assert all(math.isnan(value) for value in metrics.aggregate_metrics(lists, 2, 0).values())
    assert metrics.aggregate_metrics(np.empty((0, 2), int), 2, 9)["coverage_at_2"] == 0.0


def test_what_is_not_known_of_the_catalogue_is_not_measured():
    facts = metrics.CatalogueFacts(np.array([1, 2]), 3)
    found = metrics.list_metrics(np.array([[0, 1]]), 2, facts, 0.0)
    assert list(found) == ["novelty_at_2", "mean_popularity_at_2"]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        pytest.param(lambda: metrics.coverage_at_k(np.array([[0]]), 2, 5), ShapeError, "k is 2", id="k"),
        pytest.param(
            lambda: metrics.gini_at_k(np.array([[7]]), 1, 5), DataError, "row 7 of a catalogue of 5", id="row"
        ),
        pytest.param(
            lambda: metrics.CatalogueFacts(np.array([4]), 3), DataError, "once per item", id="more-than-users"
        ),
        pytest.param(
            lambda: metrics.CatalogueFacts(np.array([1]), 3, np.zeros(2)), ShapeError, "upload", id="uploads"
        ),
    ],
)
def test_bad_input_is_refused_with_a_reason(call, error, text):
    with pytest.raises(error, match=text):
        call()
