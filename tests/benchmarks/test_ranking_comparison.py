"""The bootstrap over users: a weighted metric is the metric of rows repeated, and differences are paired."""

import math

import numpy as np
import pytest

from benchmarks.ranking_comparison import (
    Difference,
    difference,
    resampled,
    weighted_auc,
    weighted_gauc,
    weighted_mae,
    weighted_xauc,
)
from schema.errors import ConfigError
from tests import oracles
from trainer import metrics


def rows(seed: int, binary: bool, num_users: int = 12, num_rows: int = 90):
    """Labels, predictions with ties, users, and how often each user is drawn."""
    rng = np.random.default_rng(seed)
    users = rng.integers(num_users, size=num_rows)
    labels = rng.integers(2, size=num_rows) if binary else rng.integers(9, size=num_rows)
    predictions = np.round(rng.random(num_rows) + 0.1 * labels, 1)
    return labels.astype(float), predictions, users, rng.integers(4, size=num_users)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("weighted", "metric", "binary"),
    [
        pytest.param(weighted_auc, metrics.auc, True, id="auc"),
        pytest.param(weighted_mae, metrics.mae, False, id="mae"),
        pytest.param(weighted_xauc, metrics.xauc, False, id="xauc"),
        pytest.param(weighted_xauc, metrics.xauc, True, id="xauc-of-binary-labels"),
    ],
)
def test_a_weighted_metric_is_that_of_rows_repeated(weighted, metric, binary, seed):
    labels, predictions, users, times = rows(seed, binary)
    repeated = np.repeat(np.arange(len(labels)), times[users])
    expected = metric(labels[repeated], predictions[repeated])
    assert weighted(labels, predictions, users)(times[users].astype(float)) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("seed", range(4))
def test_weighted_gauc_counts_a_user_drawn_twice_as_two_users(seed):
    labels, predictions, users, times = rows(seed, binary=True)
    repeated = np.repeat(np.arange(len(labels)), times[users])
    copies = np.concatenate([np.arange(number) for number in times[users]])
    of_copies = users[repeated] * 10 + copies
    expected = oracles.gauc(labels[repeated], predictions[repeated], of_copies)
    assert weighted_gauc(labels, predictions, users)(times[users].astype(float)) == pytest.approx(expected)


@pytest.mark.parametrize("weighted", [weighted_auc, weighted_gauc, weighted_xauc])
def test_a_draw_that_does_not_define_a_metric_gives_nan(weighted):
    labels, users = np.array([0.0, 1.0, 1.0]), np.array([0, 0, 1])
    assert math.isnan(weighted(labels, np.array([0.1, 0.2, 0.3]), users)(np.array([0.0, 0.0, 2.0])))


def test_draws_are_of_whole_users_and_average_the_seeds():
    labels = np.array([1.0, 2.0, 7.0])
    draws = resampled("mae", labels, [np.zeros(3), labels + 1.0], ["u", "u", "v"], 200)
    # Mean of the two seeds; u twice: (1.5 + 1) / 2, u and v: (10/3 + 1) / 2, v twice: (7 + 1) / 2.
    assert sorted(set(draws.round(6))) == pytest.approx([1.25, 13 / 6, 4.0], abs=1e-6)
    # Half of the draws of two users hold both.
    assert np.mean(np.isclose(draws, 13 / 6)) == pytest.approx(0.5, abs=0.1)


def test_models_meet_the_same_draws():
    labels, predictions, users, _ = rows(0, binary=False)
    ours, theirs = (resampled("mae", labels, [p], users, 100) for p in (labels - 1.0, labels + 2.0))
    assert difference(1.0, 2.0, ours, theirs) == Difference(-1.0, pytest.approx(-1.0), pytest.approx(-1.0))
    assert resampled("mae", labels, [predictions], users, 100).std() > 0


def test_interval_agrees_with_the_normal_approximation_of_user_means():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(400), 3)
    error = np.repeat(rng.exponential(size=400), 3)
    draws = resampled("mae", np.zeros(1200), [error], users, 2_000)
    low, high = np.percentile(draws, (2.5, 97.5))
    # The rows of a user err alike: there are 400 independent values, not 1200.
    assert high - low == pytest.approx(2 * 1.96 * error[::3].std() / 20, rel=0.08)


def test_an_interval_of_undefined_draws_is_nan():
    found = difference(0.6, 0.5, np.array([0.6, np.nan]), np.array([0.5, np.nan]))
    assert found.difference == pytest.approx(0.1)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ConfigError, match="unknown metric 'ece'; expected one of auc, gauc"):
        resampled("ece", np.zeros(1), [np.zeros(1)], ["u"], 1)
