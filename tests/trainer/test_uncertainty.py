"""Intervals over users: against slow resampling, against SciPy, and as often right as they say."""

import dataclasses
import doctest
import math
import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from schema.contract import TaskKind
from schema.errors import ConfigError, DataError, ShapeError
from trainer import metrics, uncertainty
from trainer.uncertainty import (
    PairedDifference,
    intervals,
    mean_over_users,
    no_worse,
    paired_differences,
    ranking_sums,
    ratio_of_sums,
    retrieval_sums,
)

ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.sampled_from("uvw")
    ),
    max_size=25,
)


def log_of(rng, num_users, rows_per_user=6.0):
    """Clicks of users who differ: user codes, labels, two predictions, neither perfect nor calibrated."""
    num_rows = 1 + rng.poisson(rng.gamma(1.0, rows_per_user, size=num_users))
    users = np.repeat(np.arange(num_users), num_rows)
    person, item = rng.normal(size=num_users)[users], rng.normal(size=len(users))
    labels = (rng.random(len(users)) < 1 / (1 + np.exp(1 - person - item))).astype(float)
    first = 1 / (1 + np.exp(-(0.3 * person + 1.5 * item + rng.normal(size=len(users)))))
    second = 1 / (1 + np.exp(-(0.6 * person + 0.5 * item + rng.normal(size=len(users)))))
    return users, labels, first, second


def test_worked_examples_in_the_docstrings_hold():
    outcome = doctest.testmod(uncertainty)
    assert outcome.attempted >= 4
    assert outcome.failed == 0


@pytest.mark.parametrize("kind", TaskKind)
@given(rows=ROWS)
def test_sums_over_all_users_give_the_metric_itself(kind, rows):
    labels, predictions, users = (list(c) for c in zip(*rows, strict=True)) if rows else ([], [], [])
    clicks = [math.nan if p == 0.9 else y for y, p in zip(labels, predictions, strict=True)]
    expected = metrics.ranking_metrics(kind, labels, predictions, users, clicks)
    found = ranking_sums(kind, labels, predictions, users, clicks)
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(
        expected, abs=1e-12, nan_ok=True
    )


def test_interval_of_a_mean_and_of_a_ratio_agrees_with_scipy():
    rng = np.random.default_rng(1)
    rows = 1 + rng.poisson(4, size=300)
    costs = rows * rng.gamma(2.0, 1.0, size=300)
    found = intervals({"mean": mean_over_users(costs), "ratio": ratio_of_sums(costs, rows)})
    options = dict(paired=True, n_resamples=4_000, method="percentile", random_state=2)
    statistics = {
        "mean": lambda c, r, axis: c.mean(axis),
        "ratio": lambda c, r, axis: c.sum(axis) / r.sum(axis),
    }
    for name, statistic in statistics.items():
        theirs = scipy.stats.bootstrap((costs, rows), statistic, **options).confidence_interval
        # 2,000 resamples place a bound to about 5 % of the interval's width.
        width = theirs.high - theirs.low
        assert found[name].low == pytest.approx(theirs.low, abs=0.07 * width)
        assert found[name].high == pytest.approx(theirs.high, abs=0.07 * width)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auc", TaskKind.BINARY),
        ("gauc", TaskKind.BINARY),
        ("xauc", TaskKind.WATCH_TIME),
        ("mae", TaskKind.WATCH_TIME),
        ("weighted_pairwise_loss", TaskKind.WATCH_TIME),
    ],
)
def test_interval_agrees_with_resampling_the_rows_of_users_one_draw_at_a_time(name, kind):
    rng = np.random.default_rng(3)
    users, clicks, predictions, _ = log_of(rng, 150)
    labels = clicks
    if kind is TaskKind.WATCH_TIME:
        labels = clicks * rng.gamma(1.0, 20.0, size=len(labels)).round()
    rows_of = [np.flatnonzero(users == user) for user in range(150)]
    draws = []
    for _ in range(600):
        drawn = [rows_of[user] for user in rng.integers(150, size=150)]
        rows = np.concatenate(drawn)
        copies = np.repeat(np.arange(150), [len(rows) for rows in drawn])
        drawn_metrics = metrics.ranking_metrics(kind, labels[rows], predictions[rows], copies, clicks[rows])
        draws.append(drawn_metrics[name])
    low, high = np.quantile(draws, [0.025, 0.975])
    found = intervals(ranking_sums(kind, labels, predictions, users, clicks))[name]
    # 600 draws place a bound to about 8 % of the width; repeated users also pair with themselves in theirs.
    assert found.low == pytest.approx(low, abs=0.12 * (high - low))
    assert found.high == pytest.approx(high, abs=0.12 * (high - low))


def test_intervals_hold_the_truth_as_often_as_they_say():
    kind = TaskKind.BINARY
    users, labels, first, second = log_of(np.random.default_rng(4), 60_000)
    truth = {name: metric.value for name, metric in ranking_sums(kind, labels, first, users).items()}
    other = {name: metric.value for name, metric in ranking_sums(kind, labels, second, users).items()}
    held, differences_held = {name: [] for name in truth}, {name: [] for name in truth}
    for replication in range(200):
        users, labels, first, second = log_of(np.random.default_rng(100 + replication), 150)
        sums, other_sums = (ranking_sums(kind, labels, p, users) for p in (first, second))
        for name, interval in intervals(sums, num_resamples=300).items():
            held[name].append(interval.low <= truth[name] <= interval.high)
        for name, change in paired_differences(sums, other_sums, num_resamples=300).items():
            differences_held[name].append(change.low <= truth[name] - other[name] <= change.high)
    # 95 % with a standard error of 1.5 %; 150 users and 300 resamples cost another percent or two.
    for name in truth:
        assert np.mean(held[name]) >= 0.90, name
        assert 0.90 <= np.mean(differences_held[name]) <= 0.99, name


def test_a_task_of_too_few_users_leaves_the_calibration_error_of_the_next_one_alone():
    rng = np.random.default_rng(12)
    users, labels, predictions, _ = log_of(rng, 60)
    ece = ranking_sums(TaskKind.BINARY, labels, predictions, users)["ece"]
    # The same users, of whom only the first five have a label of the other task.
    sums = np.where(np.arange(60)[:, None] < 5, ece.sums, 0.0)
    few = dataclasses.replace(ece, sums=sums)
    alone = intervals({"ece": ece})["ece"]
    found = intervals({"few": few, "ece": ece})
    assert math.isnan(found["few"].low)
    assert dataclasses.astuple(found["ece"]) == pytest.approx(dataclasses.astuple(alone), abs=1e-12)


def test_interval_of_the_calibration_error_of_a_calibrated_model_starts_at_zero():
    rng = np.random.default_rng(12)
    predictions = rng.random(2000)
    labels = (rng.random(2000) < predictions).astype(float)
    interval = intervals(ranking_sums(TaskKind.BINARY, labels, predictions, np.arange(2000)))["ece"]
    # The truth is 0; what is measured, and every percentile of its resamples, is noise above it.
    assert interval.low == 0.0 < interval.value < interval.high


def test_pairing_takes_out_what_both_models_share():
    rng = np.random.default_rng(5)
    hard = rng.random(400)
    ours, theirs = (mean_over_users(np.clip(hard + shift, 0, 1)) for shift in (0.01, 0.0))
    change = paired_differences({"recall": ours}, {"recall": theirs})["recall"]
    alone = intervals({"recall": ours})["recall"]
    assert change.low > 0
    assert change.high - change.low < (alone.high - alone.low) / 10
    assert change.num_users == 400


def test_p_value_agrees_with_the_paired_t_test_and_with_its_own_interval():
    rng = np.random.default_rng(6)
    for shift in (0.0, 0.03, 0.06, 0.09):
        ours, theirs = rng.normal(shift, 0.5, size=400), rng.normal(0.0, 0.5, size=400)
        change = paired_differences(
            {"m": mean_over_users(ours)}, {"m": mean_over_users(theirs)}, num_resamples=10_000
        )["m"]
        expected = scipy.stats.ttest_rel(ours, theirs).pvalue
        assert change.p_value == pytest.approx(expected, abs=0.03)
        assert (change.p_value < 0.05) == (change.low > 0 or change.high < 0)


def test_models_that_do_not_differ_are_told_apart_as_rarely_as_the_level_says():
    rng = np.random.default_rng(7)
    p_values = []
    for _ in range(300):
        ours, theirs = rng.gamma(1.0, size=(2, 100))
        first, second = {"m": mean_over_users(ours)}, {"m": mean_over_users(theirs)}
        p_values.append(paired_differences(first, second, num_resamples=300)["m"].p_value)
    # 5 % with a standard error of 1.3 %.
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09


def test_identical_models_do_not_differ():
    users, labels, predictions, _ = log_of(np.random.default_rng(8), 50)
    sums = ranking_sums(TaskKind.BINARY, labels, predictions, users)
    for change in paired_differences(sums, sums).values():
        assert (change.value, change.low, change.high, change.p_value) == (0.0, 0.0, 0.0, 1.0)
        assert no_worse(change, margin=0.0, lower_is_better=True).holds


@pytest.mark.parametrize(
    ("num_differing", "is_known"),
    [
        pytest.param(0, True, id="none"),
        pytest.param(1, False, id="one"),
        pytest.param(9, False, id="nine"),
        pytest.param(10, True, id="ten"),
    ],
)
def test_models_that_differ_on_a_handful_of_users_have_no_interval(num_differing, is_known):
    theirs = np.linspace(0, 1, 200)
    ours = theirs + 0.1 * (np.arange(200) < num_differing)
    change = paired_differences({"m": mean_over_users(ours)}, {"m": mean_over_users(theirs)})["m"]
    assert change.value == pytest.approx(0.1 * num_differing / 200)
    assert math.isnan(change.low) is math.isnan(change.high) is math.isnan(change.p_value) is not is_known
    assert change.num_users == 200


@pytest.mark.parametrize(
    ("low", "high", "margin", "lower_is_better", "holds", "worst_loss"),
    [
        pytest.param(-0.003, 0.005, 0.003, False, True, 0.003, id="just-within"),
        pytest.param(-0.003, 0.005, 0.002, False, False, 0.003, id="could-lose-more"),
        pytest.param(0.001, 0.005, 0.0, False, True, -0.001, id="surely-better"),
        pytest.param(-0.003, 0.005, 0.003, True, False, 0.005, id="an-error-could-rise"),
        pytest.param(-0.006, -0.002, 0.0, True, True, -0.002, id="an-error-surely-falls"),
        pytest.param(math.nan, math.nan, 1.0, False, False, math.nan, id="unknown-never-holds"),
    ],
)
def test_no_worse_reads_the_bound_on_the_bad_side(low, high, margin, lower_is_better, holds, worst_loss):
    answer = no_worse(PairedDifference(0.001, low, high, 0.9, 0.5, 99), margin, lower_is_better)
    assert answer.holds is holds
    assert answer.worst_loss == pytest.approx(worst_loss, nan_ok=True)
    assert answer.confidence == pytest.approx(0.95)


def test_order_of_the_rows_and_names_of_the_users_in_order_do_not_matter_and_the_seed_does():
    users, labels, predictions, _ = log_of(np.random.default_rng(9), 40)
    first = intervals(ranking_sums(TaskKind.BINARY, labels, predictions, users))
    order = np.random.default_rng(0).permutation(len(users))
    names = np.array([f"user-{user:03}" for user in users])
    again = intervals(ranking_sums(TaskKind.BINARY, labels[order], predictions[order], names[order]))
    for name, interval in first.items():
        assert again[name].low == pytest.approx(interval.low, abs=1e-12)
        assert again[name].high == pytest.approx(interval.high, abs=1e-12)
    other_seed = intervals(ranking_sums(TaskKind.BINARY, labels, predictions, users), seed=1)
    assert other_seed["auc"].low != first["auc"].low


def test_users_without_a_value_have_no_part():
    values = np.r_[np.linspace(0, 1, 20), [math.nan] * 30]
    interval = intervals(retrieval_sums({"recall_at_5": values}))["recall_at_5"]
    assert interval.num_users == 20
    assert interval.value == pytest.approx(0.5)
    assert interval.low < 0.5 < interval.high


def test_interval_of_auc_stays_within_its_range_when_one_user_has_half_of_the_rows():
    rng = np.random.default_rng(13)
    users = np.repeat(np.arange(16), [120, *[8] * 15])
    labels = (rng.random(len(users)) < 0.5).astype(float)
    predictions = (rng.random(len(users)) + 0.4 * labels * (1 + (users == 0))) / 1.8
    interval = intervals(ranking_sums(TaskKind.BINARY, labels, predictions, users))["auc"]
    # A draw without that user leaves next to no pairs: its ratio is -0.16 and less.
    assert 0.0 <= interval.low < interval.value < interval.high <= 1.0


def test_few_users_no_users_or_one_class_leave_the_bounds_unknown():
    few = intervals({"m": mean_over_users(np.arange(9.0))})["m"]
    assert few.value == 4.0 and math.isnan(few.low) and math.isnan(few.high)
    nobody = intervals(ranking_sums(TaskKind.BINARY, [], [], []))
    assert all(math.isnan(i.value) and math.isnan(i.low) and i.num_users == 0 for i in nobody.values())
    one_class = ranking_sums(TaskKind.BINARY, np.zeros(40), np.full(40, 0.2), np.arange(40))
    assert math.isnan(intervals(one_class)["auc"].low)
    change = paired_differences(one_class, one_class)["auc"]
    assert math.isnan(change.value) and math.isnan(change.p_value)
    assert not no_worse(change, margin=1.0, lower_is_better=False).holds


def test_ten_thousand_users_take_seconds():
    users, labels, first, second = log_of(np.random.default_rng(10), 10_000)
    started = time.process_time()
    sums, other = (ranking_sums(TaskKind.BINARY, labels, p, users) for p in (first, second))
    intervals(sums)
    paired_differences(sums, other)
    # About 1 s of CPU; the bound leaves room for a machine that is busy.
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        pytest.param(lambda: intervals({}, confidence=95.0), ConfigError, "confidence", id="percent"),
        pytest.param(lambda: intervals({}, num_resamples=9), ConfigError, "num_resamples", id="few"),
        pytest.param(
            lambda: paired_differences({"m": mean_over_users([1.0])}, {"m": mean_over_users([1.0, 2.0])}),
            ShapeError,
            "same users",
            id="other-users",
        ),
        pytest.param(lambda: mean_over_users([[1.0]]), ShapeError, "one per user", id="two-dimensional"),
        pytest.param(
            lambda: ranking_sums(TaskKind.BINARY, [0, 1], [0.1, 0.2], ["u"]),
            ShapeError,
            "user_ids",
            id="users",
        ),
        pytest.param(
            lambda: ranking_sums(TaskKind.BINARY, [0, 1], [0.1, math.nan], ["u", "v"]),
            DataError,
            "NaN",
            id="nan-prediction",
        ),
        pytest.param(
            lambda: no_worse(PairedDifference(0, 0, 0, 0.9, 1, 9), -0.1, False),
            ConfigError,
            "margin",
            id="margin",
        ),
    ],
)
def test_bad_input_is_refused_with_a_reason(call, error, text):
    with pytest.raises(error, match=text):
        call()
