"""Off-policy estimates by hand, their laws, how often intervals hold the truth, and when they are refused."""

import dataclasses
import doctest
import math

import numpy as np
import pytest

from schema.errors import ConfigError, DataError, PoorSupportError, ShapeError
from trainer import off_policy
from trainer.off_policy import (
    DOUBLY_ROBUST,
    IPS,
    SNIPS,
    LoggedActions,
    evaluate_policy,
    greedy_probabilities,
)

NUM_ACTIONS = 4
# Reward rates of four actions in two contexts; the log prefers what the target does not.
RATES = np.array([[0.1, 0.3, 0.5, 0.7], [0.6, 0.2, 0.4, 0.1]])
LOGGING = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.2, 0.3]])
TARGET = np.array([[0.1, 0.1, 0.2, 0.6], [0.6, 0.1, 0.2, 0.1]])
TRUTH = float((TARGET * RATES).sum(axis=1).mean())


def played(seed, num_users=150, model=None, target=TARGET):
    """A log of users with a few rows each; contexts are equally likely."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), 1 + rng.poisson(4, size=num_users))
    context = rng.integers(2, size=len(users))
    action = (rng.random(len(users))[:, None] > LOGGING[context].cumsum(axis=1)).sum(axis=1)
    rewards = (rng.random(len(users)) < RATES[context, action]).astype(float)
    table = (
        {}
        if model is None
        else {
            "predicted": model[context, action],
            "predicted_target": (target * model).sum(axis=1)[context],
        }
    )
    return LoggedActions(rewards, target[context, action], LOGGING[context, action], users, **table)


def test_worked_examples_in_the_docstrings_hold():
    outcome = doctest.testmod(off_policy)
    assert outcome.attempted >= 3
    assert outcome.failed == 0


def test_estimates_worked_by_hand():
    users = np.repeat(np.arange(60), 4)  # all alike
    logged = LoggedActions(
        rewards=np.tile([1.0, 0.0, 3.0, 1.0], 60),
        target=np.tile([0.8, 0.1, 0.2, 0.5], 60),
        logging=np.tile([0.4, 0.2, 0.4, 0.5], 60),  # weights 2, .5, .5, 1: mean 1
        user_ids=users,
        predicted=np.tile([0.5, 0.5, 2.0, 1.0], 60),
        predicted_target=np.full(240, 0.8),
    )
    estimate = evaluate_policy(logged)
    # (2 * 1 + .5 * 0 + .5 * 3 + 1 * 1) / 4; as the weights sum to 4, SNIPS is the same.
    assert estimate.values[IPS].value == pytest.approx(4.5 / 4)
    assert estimate.values[SNIPS].value == pytest.approx(4.5 / 4)
    # .8 + (2 * .5 − .5 * .5 + .5 * 1 + 0) / 4
    assert estimate.values[DOUBLY_ROBUST].value == pytest.approx(0.8 + 1.25 / 4)
    assert estimate.logged.value == pytest.approx(5 / 4)
    assert estimate.gains[IPS].value == pytest.approx(-0.5 / 4)
    # (60 * 4)² / (60 * (4 + .25 + .25 + 1))
    assert estimate.support.effective_samples == pytest.approx(60 * 16 / 5.5)
    # Cut at 1.5: (1.5 + 1.5 + 1) / 4 and (1.5 + 1.5 + 1) / 3.5.
    cut = evaluate_policy(logged, clip=1.5)
    assert cut.values[IPS].value == pytest.approx(4 / 4)
    assert cut.values[SNIPS].value == pytest.approx(4 / 3.5)
    assert cut.support.num_clipped == 60
    assert cut.support.max_weight == 2.0


def test_intervals_hold_the_truth_that_the_mean_of_the_log_misses():
    model = RATES * 0.7 + 0.1
    held = {name: [] for name in (IPS, SNIPS, DOUBLY_ROBUST, "log")}
    for seed in range(60):
        estimate = evaluate_policy(played(seed, model=model))
        for name, interval in [*estimate.values.items(), ("log", estimate.logged)]:
            held[name].append(interval.low <= TRUTH <= interval.high)
    # 95 % of 60 with a standard error of 3 %: below 88 % would be a rare accident.
    for name in (IPS, SNIPS, DOUBLY_ROBUST):
        assert np.mean(held[name]) >= 0.88, name
    assert np.mean(held["log"]) < 0.1


def test_a_reward_model_narrows_the_interval_and_a_wrong_one_does_no_harm():
    good, wrong = (evaluate_policy(played(1, 1500, model)) for model in (RATES, np.ones_like(RATES)))
    width = {name: i.high - i.low for name, i in good.values.items()}
    assert width[DOUBLY_ROBUST] < 0.9 * width[IPS]
    assert wrong.values[DOUBLY_ROBUST].low < TRUTH < wrong.values[DOUBLY_ROBUST].high


def test_the_logging_policy_itself_has_weight_one_everywhere_and_the_mean_of_the_log():
    logged = played(2, target=LOGGING)
    estimate = evaluate_policy(logged)
    assert estimate.support.effective_samples == pytest.approx(len(logged.rewards))
    assert estimate.values[IPS] == estimate.values[SNIPS] == estimate.logged
    assert estimate.gains[IPS].value == 0.0
    assert estimate.gains[IPS].p_value == 1.0


def test_snips_moves_with_a_constant_and_ips_does_not():
    logged = played(3)
    shifted = dataclasses.replace(logged, rewards=logged.rewards + 10)
    first, second = (evaluate_policy(each).values for each in (logged, shifted))
    assert second[SNIPS].value == pytest.approx(first[SNIPS].value + 10, abs=1e-9)
    assert second[IPS].value != pytest.approx(first[IPS].value + 10, abs=1e-3)


def test_without_a_reward_model_there_is_no_doubly_robust_estimate():
    assert list(evaluate_policy(played(4)).values) == [IPS, SNIPS]


@pytest.mark.parametrize(
    ("logged", "reason"),
    [
        pytest.param(played(5, num_users=6), "weigh as much as", id="few-rows"),
        pytest.param(
            LoggedActions(np.ones(0), np.ones(0), np.ones(0), np.ones(0)),
            "weigh as much as nan",
            id="no-rows",
        ),
        pytest.param(
            LoggedActions(
                np.ones(300), np.full(300, 0.5), np.full(300, 0.5), np.minimum(np.arange(300), 200)
            ),
            "one of 201 users has 33%",
            id="one-user-decides",
        ),
        pytest.param(
            dataclasses.replace(played(6), logging=played(6).logging * 0.7), "not 1", id="wrong-propensities"
        ),
        pytest.param(
            # The target mostly does what the log never did, and so never meets it.
            dataclasses.replace(played(7), target=played(7).logging * 0.4),
            "log never did",
            id="no-overlap",
        ),
        pytest.param(
            dataclasses.replace(played(8), target=np.zeros_like(played(8).target)), "as nan", id="no-weight"
        ),
    ],
)
def test_poor_support_is_refused_with_the_reason(logged, reason):
    with pytest.raises(PoorSupportError, match=reason):
        evaluate_policy(logged)


def test_greedy_probabilities_share_ties_and_sum_to_one():
    rng = np.random.default_rng(9)
    slates = np.sort(rng.integers(40, size=300))
    slates = np.unique(slates, return_inverse=True)[1]
    scores = rng.integers(4, size=300).astype(float)
    for epsilon in (0.0, 0.25, 1.0):
        probabilities = greedy_probabilities(scores, slates, epsilon)
        for slate in np.unique(slates):
            mine, ours = scores[slates == slate], probabilities[slates == slate]
            best = (mine == mine.max()) / (mine == mine.max()).sum()
            np.testing.assert_allclose(ours, (1 - epsilon) * best + epsilon / len(mine), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        pytest.param({"target": np.full(3, 1.1)}, DataError, "3 of 3 target", id="no-probability"),
        pytest.param({"logging": np.array([0.5, 0.0, 1.0])}, DataError, r"\(0, 1\]", id="never-logged"),
        pytest.param({"rewards": np.array([1.0, math.nan, 0.0])}, DataError, "1 of rewards", id="nan"),
        pytest.param({"user_ids": np.arange(2)}, ShapeError, "user_ids", id="other-length"),
        pytest.param({"predicted": np.ones(3)}, ConfigError, "together", id="half-a-model"),
    ],
)
def test_bad_logs_are_refused(change, error, text):
    columns = {"rewards": np.ones(3), "target": np.ones(3), "logging": np.ones(3), "user_ids": np.arange(3)}
    with pytest.raises(error, match=text):
        LoggedActions(**columns | change)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="clip"):
        evaluate_policy(played(1), clip=1.0)
    with pytest.raises(ConfigError, match="epsilon"):
        greedy_probabilities(np.ones(2), np.zeros(2, int), epsilon=-0.1)
