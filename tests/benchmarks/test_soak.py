"""The verdict of the soak: what it measures, and that each way to fail is told."""

import re
from collections import Counter

import pytest

from benchmarks.soak import Outcome, _swap_times

# (s, MB): a start-up that ends before the half, then 1 MB a minute, with a peak at every third sample.
LEAK = [(0.0, 100.0), (60.0, 400.0), (120.0, 500.0)] + [
    (60.0 * minute, 500.0 + minute + (300.0 if minute % 3 == 0 else 0.0)) for minute in range(3, 12)
]


def good(**changed):
    parts = {
        "versions": Counter({1: 10, 2: 10}),
        "whole": {1, 2},
        "damaged": {3},
        "memory": [(0.0, 100.0), (60.0, 100.0), (120.0, 100.0)],
    }
    return Outcome(**(parts | changed))


def test_growth_is_that_of_the_second_half_and_overlooks_peaks():
    # Minutes 6 to 11 count: five minutes at 1 MB each.
    assert Outcome(memory=LEAK).growth_mb() == pytest.approx(5.0)


def test_a_good_run_has_no_problems():
    assert good().problems(2, 50.0) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"errors": Counter({"UNAVAILABLE": 2})}, "2 requests failed"),
        ({"damaged": set()}, "no damaged version"),
        ({"damaged": {3, 4}}, "3 versions appeared after the first, not 2"),
        ({"whole": {1, 2, 4}}, r"versions \[4\] never answered"),
        ({"versions": Counter({1: 10, 2: 10, 3: 1})}, "a damaged version answered"),
        ({"memory": LEAK}, "memory grew by 5 MB"),
    ],
    ids=["error", "no damage", "swaps", "silent", "damaged", "memory"],
)
def test_each_problem_is_told(changed, told):
    assert any(re.search(told, problem) for problem in good(**changed).problems(2, 4.0))


def test_memory_is_not_checked_without_a_limit():
    assert good(memory=LEAK).problems(2, None) == []


@pytest.mark.parametrize(("seconds", "times"), [(20.0, [5.0, 10.0, 15.0]), (21.0, [5.0, 10.0, 15.0, 20.0])])
def test_no_version_appears_when_the_time_is_over(seconds, times):
    assert _swap_times(seconds, 5.0) == times
