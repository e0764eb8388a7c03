"""Mean and spread over seeds."""

import pytest

from benchmarks.seeds import summary


def test_the_summary_is_mean_and_standard_deviation_over_seeds():
    by_seed = [{"auc": 0.1, "mae": 3.0}, {"auc": 0.3, "mae": 3.0}]
    assert summary(by_seed) == {
        "auc": {"mean": pytest.approx(0.2), "std": pytest.approx(0.02**0.5)},
        "mae": {"mean": 3.0, "std": 0.0},
    }


def test_one_seed_has_no_standard_deviation():
    assert summary([{"auc": 0.1}]) == {"auc": {"mean": 0.1, "std": None}}
