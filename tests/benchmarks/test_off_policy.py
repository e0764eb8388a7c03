"""The benchmark of off-policy estimates on a few replications: what it measures is what it says."""

import numpy as np
import pytest

from benchmarks import off_policy
from trainer.off_policy import DOUBLY_ROBUST, IPS, SNIPS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return off_policy.make_world(tmp_path_factory.mktemp("worlds") / "simulated", sharpness=1.0)


def test_weights_have_mean_one_and_rewards_follow_the_truth(world):
    log = off_policy.play(world, 3_000, np.random.default_rng(0))
    weights = log.target / log.logging
    # 54,000 rows with weights of a standard deviation of about 2.
    assert weights.mean() == pytest.approx(1.0, abs=0.04)
    assert (weights * log.rewards).mean() == pytest.approx(log.true_target.mean(), abs=0.03)


def test_weighted_estimates_hold_the_truth_and_naive_ones_do_not(world):
    _, found = off_policy.coverage(world, num_users=150, replications=15)
    for name in (IPS, SNIPS, DOUBLY_ROBUST, off_policy.POOR_MODEL):
        assert found[name].num_reported == 15
        assert found[name].share >= 0.8
    assert found[off_policy.NAIVE_MEAN].share == 0.0
    assert found[off_policy.NAIVE_MATCH].share <= 0.3
