"""Jackknife intervals by hand, against the t-test, and where a few users decide."""

import math

import numpy as np
import pytest
from scipy import stats

from schema.errors import ConfigError, ShapeError
from trainer.jackknife import jackknife_differences, jackknife_intervals
from trainer.uncertainty import mean_over_users, ratio_of_sums


def test_of_a_mean_it_is_the_interval_of_the_t_test() -> None:
    """Values alike in their distance from the mean: all 9 degrees of freedom count."""
    values = [0.0, 1.0] * 5
    found = jackknife_intervals({"mean": mean_over_users(values)})["mean"]
    expected = stats.ttest_1samp(values, 0.5).confidence_interval(0.95)
    assert (found.value, found.confidence, found.num_users) == (0.5, 0.95, 10)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_user_who_makes_the_variance_leaves_few_degrees_of_freedom() -> None:
    """Nine zeros and a one: mean .1, squares .01 and .81 on the scale of the values, their sum .9, mean .09.

    ν = 2 × .9² / (9 × .08² + .72²) = 2.8125; the standard error of the mean is √(.9 / 9 / 10) = .1.
    """
    found = jackknife_intervals({"mean": mean_over_users([0.0] * 9 + [1.0])})["mean"]
    assert found.high - found.value == pytest.approx(0.1 * stats.t.ppf(0.975, 2.8125))
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_of_a_ratio_each_user_is_left_out_once() -> None:
    rng = np.random.default_rng(0)
    numerators, denominators = rng.random(40), rng.random(40) + 0.5
    found = jackknife_intervals({"ratio": ratio_of_sums(numerators, denominators)}, confidence=0.9)["ratio"]
    without = np.array(
        [np.delete(numerators, user).sum() / np.delete(denominators, user).sum() for user in range(40)]
    )
    error = math.sqrt(39 / 40 * ((without - without.mean()) ** 2).sum())
    # Light tails: all 39 degrees of freedom count.
    assert found.high - found.value == pytest.approx(error * stats.t.ppf(0.95, 39))


def test_the_difference_is_that_of_the_same_users() -> None:
    rng = np.random.default_rng(1)
    ours, gain = rng.random(30), rng.normal(0.1, 0.05, 30)
    found = jackknife_differences(
        {"mean": mean_over_users(ours + gain), "alone": mean_over_users(ours)},
        {"mean": mean_over_users(ours)},
    )
    assert list(found) == ["mean"]
    alone = jackknife_intervals({"mean": mean_over_users(gain)})["mean"]
    change = found["mean"]
    assert (change.value, change.low, change.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert change.p_value < 1e-4


def test_the_p_value_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(2)
    zero = {"mean": mean_over_users(np.zeros(25))}
    for shift in (0.0, 0.2, 0.4, 0.6):
        change = jackknife_differences({"mean": mean_over_users(rng.normal(shift, 1, 25))}, zero)["mean"]
        assert (change.p_value < 0.05) == (change.low > 0 or change.high < 0)


def test_equal_sums_differ_by_nothing_surely() -> None:
    same = {"mean": mean_over_users(np.arange(20.0))}
    change = jackknife_differences(same, same)["mean"]
    assert (change.value, change.low, change.high, change.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_users_too_few_to_tell_have_no_bounds() -> None:
    found = jackknife_intervals({"mean": mean_over_users([1.0, math.nan] * 9)})["mean"]
    assert (found.value, found.num_users) == (1.0, 9)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_bad_input_is_refused() -> None:
    ten, nine = ({"mean": mean_over_users(np.ones(size))} for size in (10, 9))
    with pytest.raises(ShapeError, match="10 and 9 users"):
        jackknife_differences(ten, nine)
    with pytest.raises(ConfigError, match="confidence"):
        jackknife_intervals(ten, confidence=1.0)
