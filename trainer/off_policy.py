"""What a policy that never ran would have earned, from a log that knows how likely each of its actions was.

    logged = LoggedActions(rewards, target, logging, user_ids)
    estimate = evaluate_policy(logged)        # PoorSupportError where the log cannot tell
    estimate.values["snips"]                  # Interval(value, low, high, confidence, num_users)
    estimate.gains["snips"].low > 0           # surely better than what was logged

The unit is a slot: an item that was shown, at its position, below what stood above it. The value is the mean
reward of the slots of the log if the target policy had filled each of them and all else had stayed. It is
not the value of whole lists: what an item does to those around it is left out. docs/off-policy.md says when
the estimates hold.

Letters: n = rows, w = target / logging probability of the action that was taken, r = its reward, q̂ = the
reward that a model predicts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from schema.errors import ConfigError, DataError, PoorSupportError, ShapeError
from trainer.facts_file import read_facts, write_facts
from trainer.jackknife import jackknife_differences, jackknife_intervals
from trainer.metrics import FloatArray, IntArray
from trainer.uncertainty import Interval, PairedDifference, UserSums, ratio_of_sums

IPS, SNIPS, DOUBLY_ROBUST = "ips", "snips", "doubly_robust"
OFF_POLICY_FILE = "off_policy.json"

# Where a few rows or users decide, they tell too little about those that were not logged.
MIN_EFFECTIVE_SAMPLES = 50
MAX_USER_SHARE = 0.1
# The mean weight is 1 where the propensities are right and the log holds all that the target would do. This
# many standard errors away, one of the two is wrong.
_MAX_WEIGHT_DEVIATION = 4.0
_ROUNDING = 0.01


@dataclasses.dataclass(frozen=True)
class LoggedActions:
    """Rows of a log, as two policies see them.

    Attributes:
      rewards: float [n], finite.
      target: float [n], probability with which the target policy takes the logged action, in [0, 1].
      logging: float [n], probability with which the logging policy took it, in (0, 1].
      user_ids: [n], any type that sorts; the rows of a user depend on each other.
      predicted: float [n], q̂ of the logged action; None for no reward model. The model must not have seen
        these rows.
      predicted_target: float [n], Σ_a target(a) q̂(a) over all actions of the row; None with `predicted`.
    """

    rewards: FloatArray
    target: FloatArray
    logging: FloatArray
    user_ids: npt.NDArray[np.generic]
    predicted: FloatArray | None = None
    predicted_target: FloatArray | None = None

    def __post_init__(self) -> None:
        if (self.predicted is None) != (self.predicted_target is None):
            raise ConfigError("predicted and predicted_target come together, or not at all.")
        for name, column in dataclasses.asdict(self).items():
            if column is None:
                continue
            if np.shape(column) != np.shape(self.rewards) or np.ndim(column) != 1:
                raise ShapeError(
                    f"{name} has shape {np.shape(column)}; expected {np.shape(self.rewards)}, [n]."
                )
            if name != "user_ids" and not np.isfinite(column).all():
                raise DataError(f"{np.count_nonzero(~np.isfinite(column))} of {name} are NaN or infinite.")
        for name, wrong in (
            ("target", (self.target < 0) | (self.target > 1)),
            ("logging", (self.logging <= 0) | (self.logging > 1)),
        ):
            if wrong.any():
                raise DataError(
                    f"{np.count_nonzero(wrong)} of {len(wrong)} {name} probabilities lie outside "
                    f"{'[' if name == 'target' else '('}0, 1], for instance {getattr(self, name)[wrong][0]}."
                )


@dataclasses.dataclass(frozen=True)
class Support:
    """How much the log says about the target policy.

    Attributes:
      num_rows: n.
      num_users: users of these rows.
      effective_samples: see `effective_sample_size`, of the weights.
      max_user_share: share of all weight that the user with most of it has.
      mean_weight, mean_weight_error: of the weights before the cut, and its standard error over users.
      max_weight: before the cut.
      num_clipped: rows whose weight was cut.
    """

    num_rows: int
    num_users: int
    effective_samples: float
    max_user_share: float
    mean_weight: float
    mean_weight_error: float
    max_weight: float
    num_clipped: int


@dataclasses.dataclass(frozen=True)
class OffPolicyEstimate:
    """The value of a target policy.

    Attributes:
      values: IPS, SNIPS and, with a reward model, DOUBLY_ROBUST -> value with interval over users.
      gains: the same, less the mean reward of the log.
      logged: the mean reward of the log, which is the value of the logging policy.
      support: how much the log says.
    """

    values: dict[str, Interval]
    gains: dict[str, PairedDifference]
    logged: Interval
    support: Support


@dataclasses.dataclass(frozen=True)
class PolicyFacts:
    """What was found out about several policies on one log.

    Attributes:
      reward: name of the label that they earn.
      epsilon: share of their picks that are uniformly random.
      estimates: policy -> its value.
      refused: policy -> why the log cannot tell its value.
      absent: why no policy was evaluated at all; "" where one was.
    """

    reward: str
    epsilon: float
    estimates: Mapping[str, OffPolicyEstimate]
    refused: Mapping[str, str]
    absent: str = ""


def evaluate_policy(
    logged: LoggedActions, *, clip: float | None = None, confidence: float = 0.95
) -> OffPolicyEstimate:
    """Estimates the mean reward per row that the target policy would have had.

    Formulas: IPS = mean(w r); SNIPS = Σ w r / Σ w; doubly robust = mean(q̂(target) + w (r − q̂(action))).
    IPS is unbiased; SNIPS stays within the range of the rewards and does not change when a constant is added
    to them; doubly robust is unbiased whatever the model, and the better the model, the less it varies.
    Intervals are those of `trainer.jackknife`, over users.

    Args:
      logged: the rows.
      clip: largest weight, above 1; None never cuts. The cut trades variance for a bias towards what the
        log did, which the interval does not know of.
      confidence: of the intervals.

    Raises:
      PoorSupportError: fewer than MIN_EFFECTIVE_SAMPLES effective rows, or one user with more than
        MAX_USER_SHARE of the weight, or a mean weight (before the cut) that is not 1.
      ConfigError: clip is not above 1, or confidence not a share.

    Source: Horvitz and Thompson, JASA 1952, doi:10.1080/01621459.1952.10483446 (IPS); Swaminathan and
    Joachims, NIPS 2015 (SNIPS); Dudík, Langford and Li, ICML 2011, arXiv:1103.4601 (doubly robust);
    Ionides, JCGS 2008, doi:10.1198/106186008X320456 (the cut).
    """
    if clip is not None and not clip > 1:
        raise ConfigError(f"clip is {clip}; expected more than 1, the mean weight, or None.")
    users = np.unique(logged.user_ids, return_inverse=True)[1]
    weights = logged.target / logged.logging
    clipped = weights if clip is None else np.minimum(weights, clip)
    support = _support(weights, clipped, users)
    _check_support(support)
    sums = {
        IPS: _mean_of_rows(clipped * logged.rewards, users),
        SNIPS: ratio_of_sums(np.bincount(users, clipped * logged.rewards), np.bincount(users, clipped)),
    }
    if logged.predicted is not None and logged.predicted_target is not None:
        corrected = logged.predicted_target + clipped * (logged.rewards - logged.predicted)
        sums[DOUBLY_ROBUST] = _mean_of_rows(corrected, users)
    of_log = _mean_of_rows(logged.rewards, users)
    found = jackknife_intervals(sums | {"logged": of_log}, confidence=confidence)
    return OffPolicyEstimate(
        values={name: found[name] for name in sums},
        gains=jackknife_differences(sums, dict.fromkeys(sums, of_log), confidence=confidence),
        logged=found["logged"],
        support=support,
    )


def write_policies(facts: PolicyFacts, folder: Path) -> None:
    """Writes off_policy.json."""
    write_facts(facts, folder / OFF_POLICY_FILE)


def read_policies(folder: Path) -> PolicyFacts:
    """Reads off_policy.json.

    Raises:
      DataError: there is none, or it has another form.
    """
    return read_facts(PolicyFacts, folder / OFF_POLICY_FILE)


def effective_sample_size(weights: npt.ArrayLike) -> float:
    """How many rows of equal weight would give a weighted mean of the same variance.

    Formula: (Σ w)² / Σ w². Range 1 (one row has all the weight) to n (equal weights); NaN without weight.
    Source: Kish, Survey Sampling, 1965, section 11.2.

    >>> effective_sample_size([1.0, 1.0, 2.0])
    2.6666666666666665
    """
    w = np.asarray(weights, np.float64)
    squares = float((w**2).sum())
    return float(w.sum() ** 2 / squares) if squares else math.nan


def greedy_probabilities(scores: FloatArray, slates: IntArray, epsilon: float = 0.0) -> FloatArray:
    """How likely an epsilon-greedy policy picks each item of a slate: the best one, or now and then any.

    Args:
      scores: float64 [n]; equally good best ones share.
      slates: int64 [n], 0 to S − 1, the slate of each row.
      epsilon: in [0, 1], share of the picks that are uniformly random.

    Returns:
      float64 [n], sums to 1 in each slate.

    >>> scores, slates = np.array([1.0, 3.0, 3.0, 9.0]), np.array([0, 0, 0, 1])
    >>> greedy_probabilities(scores, slates, epsilon=0.3).round(4).tolist()
    [0.1, 0.45, 0.45, 1.0]
    """
    if not 0 <= epsilon <= 1:
        raise ConfigError(f"epsilon is {epsilon}; expected a share between 0 and 1.")
    best = np.full(int(slates.max(initial=-1)) + 1, -np.inf)
    np.maximum.at(best, slates, scores)
    is_best = scores == best[slates]
    num_best, num_items = np.bincount(slates, is_best), np.bincount(slates)
    return np.asarray((1 - epsilon) * is_best / num_best[slates] + epsilon / num_items[slates])


def _mean_of_rows(values: FloatArray, users: IntArray) -> UserSums:
    return ratio_of_sums(np.bincount(users, values), np.bincount(users))


def _support(weights: FloatArray, clipped: FloatArray, users: IntArray) -> Support:
    num_rows, of_user = len(weights), np.bincount(users, clipped)
    mean = float(weights.mean()) if num_rows else math.nan
    # Of a ratio of sums over users, linearised.
    residuals = np.bincount(users, weights - mean)
    total = float(of_user.sum())
    return Support(
        num_rows=num_rows,
        num_users=len(of_user),
        effective_samples=effective_sample_size(clipped),
        max_user_share=float(of_user.max()) / total if total else math.nan,
        mean_weight=mean,
        mean_weight_error=math.sqrt(float((residuals**2).sum())) / num_rows if num_rows else math.nan,
        max_weight=float(weights.max(initial=0.0)),
        num_clipped=int(np.count_nonzero(clipped < weights)),
    )


def _check_support(support: Support) -> None:
    """Refuses to report on what the log does not know; see `evaluate_policy`."""
    reasons = []
    if not support.effective_samples >= MIN_EFFECTIVE_SAMPLES:
        reasons.append(
            f"{support.num_rows:,} rows weigh as much as {support.effective_samples:.1f} of equal weight, "
            f"fewer than {MIN_EFFECTIVE_SAMPLES}"
        )
    elif support.max_user_share > MAX_USER_SHARE:
        reasons.append(
            f"one of {support.num_users:,} users has {support.max_user_share:.0%} of the weight, more than "
            f"{MAX_USER_SHARE:.0%}"
        )
    deviation = abs(support.mean_weight - 1)
    if deviation > max(_ROUNDING, _MAX_WEIGHT_DEVIATION * support.mean_weight_error):
        reasons.append(
            f"the mean weight is {support.mean_weight:.3f} ± {support.mean_weight_error:.3f} and not 1, so "
            "that the propensities are wrong, or the target policy does what the log never did"
        )
    if reasons:
        raise PoorSupportError(
            f"the log cannot tell what the target policy is worth: {'; '.join(reasons)}. Take a longer log, "
            "one with more exploration, or a target policy that is nearer to what was logged."
        )
