"""Metrics against hand calculations, slow oracles and the laws that they must obey."""

import dataclasses
import doctest
import importlib
import math
import pkgutil
import time

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from schema.contract import TaskKind
from schema.errors import ConfigError, DataError, ShapeError
from tests import oracles
from trainer import metrics

ITEMS = st.sampled_from(["", "a", "b", "c", "d", "e", "f"])
LISTS = st.integers(1, 8).flatmap(
    lambda k: st.lists(
        st.tuples(st.lists(ITEMS, min_size=k, max_size=k), st.lists(ITEMS, max_size=6)),
        min_size=1,
        max_size=6,
    )
)
# Few distinct values, so that ties are common.
SCORES = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0])
BINARY_ROWS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), SCORES, st.sampled_from("uvw")), max_size=30)
REAL_ROWS = st.lists(st.tuples(st.sampled_from([0.0, 1.5, 2.0, 7.0, 60.0]), st.integers(-3, 9)), max_size=40)


def columns(rows, width):
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]


def test_worked_examples_in_the_docstrings_hold():
    names = [module.name for module in pkgutil.iter_modules(metrics.__path__, "trainer.metrics.")]
    outcomes = [doctest.testmod(importlib.import_module(name)) for name in names]
    assert sum(outcome.attempted for outcome in outcomes) >= 14
    assert sum(outcome.failed for outcome in outcomes) == 0


@pytest.mark.parametrize("name", metrics.RETRIEVAL_METRICS)
@given(queries=LISTS, data=st.data())
def test_retrieval_metrics_equal_the_oracle(name, queries, data):
    ranked, positives = columns(queries, 2)
    k = data.draw(st.integers(1, len(ranked[0])))
    hits, num_positives = metrics.match_positives(ranked, positives)
    values = metrics.retrieval_metrics(hits, num_positives, [k])[f"{name}_at_{k}"]
    oracle = getattr(oracles, f"{name}_at_k")
    expected = [oracle(row, wanted, k) for row, wanted in queries]
    np.testing.assert_allclose(values, expected, rtol=1e-12)  # a few float64 additions
    np.testing.assert_allclose(metrics.macro_mean(values), oracles.macro_mean(expected), rtol=1e-12)


@given(queries=LISTS, data=st.data())
def test_distinct_items_equal_the_oracle(queries, data):
    ranked, _ = columns(queries, 2)
    k = data.draw(st.integers(1, len(ranked[0])))
    assert metrics.distinct_items_at_k(ranked, k) == oracles.distinct_items_at_k(ranked, k)


@given(queries=LISTS)
def test_ids_as_bytes_or_integers_match_as_strings_do(queries):
    ranked, positives = columns(queries, 2)
    hits, num_positives = metrics.match_positives(ranked, positives)
    number = {"": -1, **{item: code for code, item in enumerate("fedcba")}}
    for convert in (str.encode, number.__getitem__):
        other_hits, other_num = metrics.match_positives(
            [[convert(item) for item in row] for row in ranked],
            [[convert(item) for item in row] for row in positives],
        )
        np.testing.assert_array_equal(other_hits, hits)
        np.testing.assert_array_equal(other_num, num_positives)


def test_perfect_ranking_scores_one_and_useless_ranking_zero():
    hits, num_positives = metrics.match_positives([["a", "b", "c"], ["x", "y", "z"]], [["b", "a"], ["a"]])
    for name, values in metrics.retrieval_metrics(hits, num_positives, [1, 2, 3]).items():
        perfect = {"recall_at_1": 1 / 2, "precision_at_3": 2 / 3}.get(name, 1.0)
        assert values.tolist() == [perfect, 0.0], name


def test_average_precision_worked_by_hand_at_two_cut_offs():
    # Hits at ranks 1, 3 and 4; of 5 positives, 4 could stand among the first 4, and 2 among the first 2.
    hits, num_positives = metrics.match_positives([["a", "x", "b", "c"]], [["a", "b", "c", "d", "e"]])
    assert metrics.map_at_k(hits, num_positives, 4)[0] == pytest.approx((1 + 2 / 3 + 3 / 4) / 4, abs=1e-12)
    assert metrics.map_at_k(hits, num_positives, 2)[0] == pytest.approx(1 / 2, abs=1e-12)


def test_retrieval_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(20)
    hits = rng.random((50, 12)) < 0.3
    hits[:, 0] |= ~hits.any(axis=1)  # scikit-learn has no answer for a query without positives
    # All positives stand in the list, and the list is in the order of the scores.
    num_positives, scores = hits.sum(axis=1), -np.arange(12.0)
    ndcg, precision = metrics.ndcg_at_k(hits, num_positives, 5), metrics.map_at_k(hits, num_positives, 12)
    for row in range(50):
        assert ndcg[row] == pytest.approx(sklearn.metrics.ndcg_score([hits[row]], [scores], k=5), abs=1e-12)
        theirs = sklearn.metrics.average_precision_score(hits[row], scores)
        assert precision[row] == pytest.approx(theirs, abs=1e-12)


def test_ndcg_worked_by_hand_over_three_queries():
    # Hits at ranks 1 and 3 of 4 positives; hit at rank 2 of 1 positive; no positives at all.
    ranked = [["a", "x", "b"], ["x", "a", "y"], ["a", "b", "c"]]
    values = metrics.ndcg_at_k(*metrics.match_positives(ranked, [["a", "b", "c", "d"], ["a"], []]), k=3)
    ideal = 1 + 0.6309297535714575 + 0.5
    np.testing.assert_allclose(values, [1.5 / ideal, 0.6309297535714575, np.nan], rtol=1e-12)


def test_query_without_positives_is_left_out_of_the_mean_not_counted_as_zero():
    values = metrics.recall_at_k(*metrics.match_positives([["a"], ["a"]], [["a"], []]), k=1)
    assert metrics.macro_mean(values) == 1.0
    assert math.isnan(metrics.macro_mean(values[1:]))


def test_repeated_item_neither_gains_twice_nor_hides_a_later_item():
    hits, num_positives = metrics.match_positives([["a", "a", "b"]], [["a", "b"]])
    assert hits.tolist() == [[True, False, True]]
    assert metrics.recall_at_k(hits, num_positives, 3).tolist() == [1.0]


def test_k_beyond_the_list_is_refused_since_it_would_be_a_smaller_k_in_disguise():
    with pytest.raises(ShapeError, match="k is 3"):
        metrics.recall_at_k(*metrics.match_positives([["a", "b"]], [["a"]]), k=3)


@pytest.mark.parametrize(
    ("ranked", "positives"),
    [
        pytest.param(["a", "b"], [["a"]], id="one-dimensional"),
        pytest.param([["a"], ["b"]], [["a"]], id="other-number-of-queries"),
        pytest.param([["a"]], [[1]], id="strings-against-integers"),
        pytest.param([["a"]], [[b"a"]], id="strings-against-bytes"),
        pytest.param([[0.5]], [[0.5]], id="floats"),
    ],
)
def test_bad_rankings_are_refused(ranked, positives):
    with pytest.raises(ShapeError):
        metrics.match_positives(ranked, positives)


@given(rows=BINARY_ROWS)
def test_binary_metrics_equal_the_oracles(rows):
    labels, predictions, users = columns(rows, 3)
    assert metrics.auc(labels, predictions) == pytest.approx(
        oracles.xauc(labels, predictions), abs=1e-12, nan_ok=True
    )
    assert metrics.gauc(labels, predictions, users) == pytest.approx(
        oracles.gauc(labels, predictions, users), abs=1e-12, nan_ok=True
    )
    assert metrics.log_loss(labels, predictions) == pytest.approx(
        oracles.log_loss(labels, predictions), abs=1e-9, nan_ok=True
    )


@given(rows=BINARY_ROWS)
def test_normalised_entropy_equals_the_oracle(rows):
    labels, predictions, _ = columns(rows, 3)
    expected = oracles.normalised_entropy(labels, predictions)
    found = metrics.normalised_entropy(labels, predictions)
    assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_normalised_entropy_of_the_mean_label_is_one_however_rare_positives_are():
    for rate in (0.01, 0.3, 0.9):
        labels = (np.arange(1000) < 1000 * rate).astype(float)
        assert metrics.normalised_entropy(labels, np.full(1000, rate)) == pytest.approx(1.0, abs=1e-12)


def test_ranking_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(21)
    predictions = rng.random(2000).round(2)  # ties, and probabilities of exactly 0 and 1
    labels = (rng.random(2000) < predictions).astype(float)
    assert metrics.auc(labels, predictions) == pytest.approx(
        sklearn.metrics.roc_auc_score(labels, predictions), abs=1e-12
    )
    clipped = np.clip(predictions, 1e-7, 1 - 1e-7)  # where ours keeps them
    assert metrics.log_loss(labels, predictions) == pytest.approx(
        sklearn.metrics.log_loss(labels, clipped), abs=1e-12
    )
    assert metrics.mae(labels, predictions) == pytest.approx(
        sklearn.metrics.mean_absolute_error(labels, predictions), abs=1e-12
    )


@given(rows=REAL_ROWS)
def test_concordance_of_a_row_counts_the_others_that_stand_right_to_it(rows):
    labels, predictions = columns(rows, 2)
    num_right, num_different = metrics.concordance(labels, predictions)
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if labels[j] != labels[i]]
        product = [(labels[i] - labels[j]) * (predictions[i] - predictions[j]) for j in others]
        assert num_different[i] == len(others)
        assert num_right[i] == sum(p > 0 for p in product) + sum(p == 0 for p in product) / 2


@given(rows=BINARY_ROWS, num_bins=st.integers(1, 12))
def test_ece_equals_the_oracle(rows, num_bins):
    labels, predictions, _ = columns(rows, 3)
    assert metrics.ece(labels, predictions, num_bins) == pytest.approx(
        oracles.ece(labels, predictions, num_bins), abs=1e-12, nan_ok=True
    )


def slow_reliability_table(labels, predictions, num_bins):
    """Rows (count, mean prediction, mean label, low, high) by loops over the examples."""
    bins = {}
    for i, prediction in enumerate(predictions):
        below = sum(other < prediction for other in predictions)
        same = sum(other == prediction for other in predictions)
        bins.setdefault((2 * below + same) * num_bins // (2 * len(predictions)), []).append(i)
    rows, z = [], 1.96
    for _, mine in sorted(bins.items()):
        n, values = len(mine), [labels[i] for i in mine]
        mean = math.fsum(values) / n
        if set(labels) <= {0.0, 1.0}:
            # The roots of (mean - p)^2 = z^2 p (1 - p) / n, which is Wilson's interval.
            low, high = np.roots([1 + z * z / n, -(2 * mean + z * z / n), mean * mean]).real[::-1]
        elif n == 1:
            low = high = math.nan
        else:
            spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
            low, high = mean - z * spread, mean + z * spread
        rows.append((n, math.fsum(predictions[i] for i in mine) / n, mean, low, high))
    return rows


@given(
    rows=st.one_of(BINARY_ROWS.map(lambda rows: [row[:2] for row in rows]), REAL_ROWS),
    num_bins=st.integers(1, 9),
)
def test_reliability_table_equals_the_oracle(rows, num_bins):
    labels, predictions = columns(rows, 2)
    table = [dataclasses.astuple(row) for row in metrics.reliability_table(labels, predictions, num_bins)]
    expected = slow_reliability_table(labels, predictions, num_bins)
    assert len(table) == len(expected)
    # The roots of a polynomial are good to half the digits where they meet.
    np.testing.assert_allclose(table, expected, atol=1e-7)


@pytest.mark.parametrize(("rate", "num_examples"), [(0.4, 5_000), (0.0015, 10_000)])
def test_true_probabilities_have_the_ece_of_chance(rate, num_examples):
    rng = np.random.default_rng(0)
    # Nearly alike, so that every bin has the rate, and distinct, so that every bin has its examples.
    probabilities = rate * rng.uniform(0.99, 1.01, num_examples)
    drawn = [metrics.ece(rng.random(num_examples) < probabilities, probabilities) for _ in range(50)]
    # The standard error of the mean is below 2.5 %, and 15 positives in 20 bins are no normal variables.
    assert np.mean(drawn) == pytest.approx(metrics.chance_ece(rate, num_examples), rel=0.07)


@given(rows=BINARY_ROWS, num_bins=st.integers(1, 9))
def test_calibration_error_of_the_table_is_the_ece(rows, num_bins):
    labels, predictions, _ = columns(rows, 3)
    table = metrics.reliability_table(labels, predictions, num_bins)
    gap = sum(row.count * abs(row.mean_label - row.mean_prediction) for row in table)
    expected = gap / len(rows) if rows else float("nan")
    assert metrics.ece(labels, predictions, num_bins) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_interval_of_the_mean_label_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(8)
    rates = np.repeat([0.02, 0.3], 200)
    held = []
    for _ in range(300):
        clicks = (rng.random(400) < rates).astype(float)
        seconds = rng.exponential(50 * rates)
        for labels, truth in ((clicks, [0.02, 0.3]), (seconds, [1.0, 15.0])):
            bins = metrics.reliability_table(labels, rates, num_bins=2)
            held.append(
                [row.label_low <= mean <= row.label_high for row, mean in zip(bins, truth, strict=True)]
            )
    # 95 %, less what is lost to skewed labels; 600 draws have a standard error of 1 %.
    assert 0.92 < np.mean(held) < 0.98


@given(rows=REAL_ROWS)
def test_regression_metrics_equal_the_oracles(rows):
    labels, predictions = columns(rows, 2)
    assert metrics.xauc(labels, predictions) == pytest.approx(
        oracles.xauc(labels, predictions), abs=1e-12, nan_ok=True
    )
    assert metrics.mae(labels, predictions) == pytest.approx(
        oracles.mae(labels, predictions), abs=1e-12, nan_ok=True
    )


@given(rows=BINARY_ROWS, data=st.data())
def test_weighted_pairwise_loss_equals_the_oracle(rows, data):
    clicks, predictions, users = columns(rows, 3)
    seconds = st.sampled_from([0.0, 1.0, 7.5, 60.0])
    watched = data.draw(st.lists(seconds, min_size=len(rows), max_size=len(rows)))
    expected = oracles.weighted_pairwise_loss(clicks, watched, predictions, users)
    found = metrics.weighted_pairwise_loss(clicks, watched, predictions, users)
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_rows_of_which_a_click_is_not_known_are_in_no_pair():
    clicks, watched, predictions = [1, 0, math.nan, 1], [30.0, 0.0, 90.0, 10.0], [1.0, 2.0, 3.0, 4.0]
    # Only (30 s, 0 s), in the wrong order, and (10 s, 0 s), in the right one.
    users = ["u"] * 4
    found = metrics.ranking_metrics(TaskKind.WATCH_TIME, watched, predictions, users, clicks)
    assert found["weighted_pairwise_loss"] == 0.75
    nothing = metrics.ranking_metrics(TaskKind.WATCH_TIME, watched, predictions, users)
    assert math.isnan(nothing["weighted_pairwise_loss"]) and nothing["mae"] == found["mae"]


def test_weighted_pairwise_loss_of_equal_weights_in_one_group_is_what_auc_leaves():
    rng = np.random.default_rng(11)
    clicks, predictions = rng.integers(0, 2, 500), rng.normal(size=500).round(1)
    loss = metrics.weighted_pairwise_loss(clicks, np.full(500, 3.0), predictions, np.zeros(500))
    assert loss == pytest.approx(1 - metrics.auc(clicks, predictions), abs=1e-12)


@given(rows=BINARY_ROWS, seed=st.integers(0, 2**32 - 1))
def test_order_of_the_rows_does_not_matter(rows, seed):
    table = np.array(rows, dtype=object).reshape(-1, 3)
    shuffled = np.random.default_rng(seed).permutation(table)
    for kind in TaskKind:
        first, second = (
            metrics.ranking_metrics(
                kind, *(t[:, n].astype(float) for n in (0, 1)), t[:, 2].astype(str), t[:, 0].astype(float)
            )
            for t in (table, shuffled)
        )
        assert first == pytest.approx(second, abs=1e-12, nan_ok=True)


@given(rows=REAL_ROWS)
def test_order_metrics_ignore_increasing_maps_and_mirror_under_negation(rows):
    labels, predictions = (np.array(column, dtype=float) for column in columns(rows, 2))
    value = metrics.xauc(labels, predictions)
    assert metrics.xauc(labels**3, np.exp(predictions)) == pytest.approx(value, abs=1e-12, nan_ok=True)
    assert metrics.xauc(labels, -predictions) == pytest.approx(1 - value, abs=1e-12, nan_ok=True)


@given(rows=BINARY_ROWS)
def test_xauc_of_binary_labels_is_auc_and_gauc_of_one_user_is_auc(rows):
    labels, predictions, _ = columns(rows, 3)
    value = metrics.auc(labels, predictions)
    assert metrics.xauc(labels, predictions) == pytest.approx(value, abs=1e-12, nan_ok=True)
    assert metrics.gauc(labels, predictions, ["u"] * len(rows)) == pytest.approx(
        value, abs=1e-12, nan_ok=True
    )


def test_constant_predictions_order_nothing():
    labels = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert metrics.auc(labels, [0.6] * 5) == 0.5
    assert metrics.xauc([1.0, 2.0, 3.0], [4.0] * 3) == 0.5
    assert metrics.gauc(labels, [0.6] * 5, list("uuuvv")) == 0.5
    assert metrics.ece(labels, [0.6] * 5) == pytest.approx(0.0, abs=1e-12)
    assert metrics.normalised_entropy(labels, [0.6] * 5) == pytest.approx(1.0, abs=1e-12)
    assert metrics.weighted_pairwise_loss(labels, [9.0] * 5, [0.6] * 5, ["u"] * 5) == 0.5


def test_one_class_or_no_rows_give_nan_not_a_number_that_passes_a_gate():
    assert math.isnan(metrics.auc([1, 1], [0.2, 0.3]))
    assert math.isnan(metrics.gauc([1, 0], [0.2, 0.3], ["u", "v"]))
    assert math.isnan(metrics.xauc([2.0, 2.0], [0.2, 0.3]))
    for kind in TaskKind:
        assert all(math.isnan(value) for value in metrics.ranking_metrics(kind, [], [], []).values())


def test_order_metrics_equal_the_pairwise_definition_on_thousands_of_rows_and_stay_fast():
    rng = np.random.default_rng(7)
    labels, predictions = rng.gamma(1.0, 20.0, 3000).round(), rng.normal(size=3000).round(2)
    right = (labels[:, None] > labels) * (
        (predictions[:, None] > predictions) + 0.5 * (predictions[:, None] == predictions)
    )
    expected = right.sum() / (labels[:, None] > labels).sum()
    assert metrics.xauc(labels, predictions) == pytest.approx(expected, abs=1e-12)

    started = time.process_time()
    metrics.xauc(rng.gamma(1.0, 20.0, 200_000), rng.normal(size=200_000))
    # About 0.5 s; the pairwise definition would need 40 billion comparisons.
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        pytest.param(lambda: metrics.auc([0, 1], [0.5]), ShapeError, "must both be", id="lengths-differ"),
        pytest.param(lambda: metrics.mae([[1.0]], [[1.0]]), ShapeError, "must both be", id="two-dimensional"),
        pytest.param(
            lambda: metrics.mae([1.0, 2.0], [1.0, np.nan]),
            DataError,
            "1 of 2 predictions",
            id="nan-prediction",
        ),
        pytest.param(
            lambda: metrics.auc([0, 2], [0.5, 0.1]), DataError, "0 or 1; found 2", id="label-not-binary"
        ),
        pytest.param(
            lambda: metrics.log_loss([0, 1], [0.5, 3.0]), DataError, "sigmoid", id="logit-as-probability"
        ),
        pytest.param(lambda: metrics.ece([0], [0.5], num_bins=0), ConfigError, "num_bins", id="no-bins"),
        pytest.param(
            lambda: metrics.reliability_table([0], [0.5], num_bins=0), ConfigError, "num_bins", id="no-rows"
        ),
        pytest.param(
            lambda: metrics.gauc([0, 1], [0.5, 0.1], ["u"]), ShapeError, "user_ids", id="users-missing"
        ),
        pytest.param(
            lambda: metrics.weighted_pairwise_loss([0, 1], [0, 9], [0.5, 0.1], ["u"]),
            ShapeError,
            "group_ids",
            id="groups-missing",
        ),
        pytest.param(
            lambda: metrics.ranking_metrics(TaskKind.WATCH_TIME, [0, 9], [0.5, 0.1], ["u", "u"], [1]),
            ShapeError,
            "clicks has shape",
            id="clicks-missing",
        ),
    ],
)
def test_bad_ranking_input_is_refused_with_a_reason(call, error, text):
    with pytest.raises(error, match=text):
        call()
