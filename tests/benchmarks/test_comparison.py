import numpy as np
import pytest
import scipy.sparse as sp

from benchmarks import comparison
from benchmarks.comparison import Judged, judge, judge_all, paired_difference, recommend
from benchmarks.protocols import EvaluationUsers
from schema.errors import ShapeError


def lists(*rows):
    """Ranked lists, padded to their length."""
    table = np.full((len(rows), comparison.LIST_LENGTH), -1, np.int64)
    for row, codes in enumerate(rows):
        table[row, : len(codes)] = codes
    return table


def codes(*values):
    return np.array(values, np.int64)


def test_metrics_equal_a_hand_calculation():
    # Hits at ranks 1 and 12, of three positives; the first of them in time stands at 12.
    ranked = lists([7, *range(20, 30), 5])
    values = {name: value[0] for name, value in judge(ranked, [codes(5, 7, 99)]).items()}
    discount = 1 / np.log2(np.arange(1, 13) + 1)
    ideal = discount[:3].sum()
    assert values["recall_at_10"] == pytest.approx(1 / 3)
    assert values["recall_at_100"] == pytest.approx(2 / 3)
    assert values["ndcg_at_10"] == pytest.approx(discount[0] / ideal)
    assert values["ndcg_at_100"] == pytest.approx((discount[0] + discount[11]) / ideal)
    assert values["next_item_hit_rate_at_10"] == 0.0


def test_next_item_is_the_first_positive_in_time_order():
    ranked = lists([7])
    assert judge(ranked, [codes(7, 5)])["next_item_hit_rate_at_10"].tolist() == [1.0]
    assert judge(ranked, [codes(5, 7)])["next_item_hit_rate_at_10"].tolist() == [0.0]


def test_seen_items_are_never_recommended_and_short_lists_are_padded(monkeypatch):
    monkeypatch.setattr(comparison, "LIST_LENGTH", 3)
    history = sp.csr_matrix(np.array([[0, 1, 0, 0], [1, 1, 0, 0]], np.float32))
    users = EvaluationUsers(("u", "v"), history, (codes(0), codes(2)))
    ranked = recommend(lambda h: np.tile([1.0, 9.0, 2.0, 2.0], (h.shape[0], 1)), users)
    assert ranked.tolist() == [[2, 3, 0], [2, 3, -1]]


def test_summary_is_the_mean_over_users_and_the_spread_over_seeds():
    values = Judged({"recall_at_10": np.array([[0.0, 1.0], [1.0, 1.0]])}, np.array([0.5, 0.5])).summary()
    assert values["recall_at_10"]["mean"] == pytest.approx(0.75)
    assert values["recall_at_10"]["std"] == pytest.approx(np.std([0.5, 1.0], ddof=1))
    assert values["coverage_at_10"] == {"mean": 0.5, "std": 0.0}


def test_spread_of_one_seed_is_undefined():
    users = EvaluationUsers(("u",), sp.csr_matrix((1, 200), dtype=np.float32), (codes(1),))
    judged = judge_all([lists([1, 2])], users, num_items=200)
    assert judged.summary()["recall_at_10"]["std"] is None
    assert judged.coverage.tolist() == [2 / 200]


def test_paired_test_sees_a_small_steady_gain_that_an_unpaired_one_would_miss():
    rng = np.random.default_rng(0)
    theirs = rng.random((1, 400))
    ours = theirs + 0.01 + rng.normal(0, 0.02, (1, 400))
    result = paired_difference(ours, theirs)
    assert 0 < result.low < result.difference < result.high
    assert result.difference == pytest.approx(float((ours - theirs).mean()))
    assert result.p_value < 1e-6


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    differences = np.random.default_rng(1).normal(0.0, 1.0, (1, 900))
    result = paired_difference(differences, np.zeros((1, 900)))
    half_width = 1.96 * differences.std(ddof=1) / 30
    # 10,000 resamples give the percentiles to a few percent of the width.
    assert result.high - result.low == pytest.approx(2 * half_width, rel=0.05)


def test_paired_test_takes_each_users_mean_over_seeds():
    ours = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    result = paired_difference(ours, np.array([[0.5, 0.5, 0.0]]))
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_paired_test_refuses_different_users():
    with pytest.raises(ShapeError, match="same users"):
        paired_difference(np.zeros((1, 3)), np.zeros((2, 4)))
