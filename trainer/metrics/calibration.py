"""Whether predictions can be taken at their word.

Letters: n = rows, b = a bin of rows with like predictions.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from schema.errors import ConfigError
from trainer.metrics.arrays import FloatArray, IntArray, binary_pairs, check_probabilities, mid_ranks, pairs

# Bins of `ece`, unless told otherwise.
NUM_BINS = 20

# 97.5 % of a normal distribution lie below it.
_NORMAL_QUANTILE = 1.96


def ece(labels: npt.ArrayLike, predictions: npt.ArrayLike, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error over bins of equal mass.

    Formula: Σ_b n_b / n · |mean label of b − mean prediction of b|; the bin of an example is its mid-rank /
    n.
    Range 0 (calibrated, at this resolution) to 1. Ties share a bin, so that the order of the rows does not
    matter and bins of few distinct predictions can be uneven or empty. Empty input: NaN.
    Source: Nixon et al., CVPR workshops 2019, arXiv:1904.01685.

    Args:
      labels: [n], 0 or 1.
      predictions: [n], probabilities.
      num_bins: at least 1.

    Raises:
      ShapeError, DataError: as `log_loss`.
      ConfigError: num_bins is below 1.

    >>> # low bin: mean label 0, mean prediction .2; high bin: mean label .5, mean prediction .8
    >>> round(ece([0, 0, 1, 0], [0.1, 0.3, 0.7, 0.9], num_bins=2), 4)
    0.25
    """
    y, p = binary_pairs(labels, predictions)
    check_probabilities(p)
    _check_num_bins(num_bins)
    if not len(y):
        return float("nan")
    return float(np.abs(np.bincount(equal_mass_bins(p, num_bins), weights=y - p)).sum() / len(y))


def chance_ece(rate: float, num_examples: int, num_bins: int = NUM_BINS, deviations: float = 0.0) -> float:
    """The ECE that true probabilities would have by the chance of the labels alone.

    Formula: √(2 · num_bins · rate · (1 − rate) / (π n)): the mean absolute deviation of a normal variable is
    √(2 / π) of its standard deviation, and the mean label of a bin has one of √(rate · (1 − rate) · num_bins
    / n) where its examples are as likely as all. Likelihoods that differ give less, by Jensen. The standard
    deviation of such an ECE is √((π / 2 − 1) / num_bins) of its mean: the absolute value of a normal variable
    has √(1 − 2 / π) of the variable's, and the bins are independent.
    Range: 0 (rate 0 or 1) up. As a share of a small rate it is √(2 · num_bins / (π · positives)).

    Args:
      rate: share of positive labels.
      num_examples: n, at least 1.
      num_bins: as `ece`.
      deviations: how many of its standard deviations above its mean; 1.96 is met by 97.5 % of the draws.

    >>> round(chance_ece(0.5, 1_000, num_bins=10), 4)
    0.0399
    >>> round(chance_ece(0.5, 1_000, num_bins=10, deviations=1.96), 4)
    0.0586
    """
    mean = math.sqrt(2 * num_bins * rate * (1 - rate) / (math.pi * num_examples))
    return mean * (1 + deviations * math.sqrt((math.pi / 2 - 1) / num_bins))


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Examples of like predictions.

    Attributes:
      count: examples, at least 1.
      mean_prediction: of these, in the unit of the label.
      mean_label: of these; equal to the mean prediction where the model is calibrated.
      label_low, label_high: 95 % confidence interval of the mean label.
    """

    count: int
    mean_prediction: float
    mean_label: float
    label_low: float
    label_high: float


def reliability_table(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, num_bins: int = 15
) -> list[ReliabilityBin]:
    """Mean label by level of the prediction, in bins of equal mass; for labels of any kind.

    Bins: as `ece`, in ascending order of the prediction; empty ones are left out. No examples: no bins.
    Interval: Wilson's where all labels are 0 or 1 (JASA 1927, doi:10.1080/01621459.1927.10502953), which has
    a width also in a bin of one class; else mean ± 1.96 s / √n, s with n − 1, NaN for a single example.

    Args:
      labels, predictions: [n], same unit.
      num_bins: at least 1.

    Raises:
      ShapeError: the arrays are not one-dimensional or differ in length.
      DataError: a value is not finite.
      ConfigError: num_bins is below 1.

    >>> # low bin: 0 of 2; high bin: 1 of 2, between .0945 and .9055
    >>> for row in reliability_table([0, 0, 1, 0], [0.1, 0.3, 0.7, 0.9], num_bins=2):
    ...     print(row.count, row.mean_prediction, row.mean_label, round(row.label_low, 4))
    2 0.2 0.0 0.0
    2 0.8 0.5 0.0945
    """
    y, p = pairs(labels, predictions)
    _check_num_bins(num_bins)
    bins = equal_mass_bins(p, num_bins)
    is_binary = bool(((y == 0) | (y == 1)).all())
    table = []
    for place in np.unique(bins):
        mine = bins == place
        low, high = _mean_interval(y[mine], is_binary)
        table.append(
            ReliabilityBin(
                int(mine.sum()), float(p[mine].mean()), float(y[mine].mean()), float(low), float(high)
            )
        )
    return table


def _check_num_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ConfigError(f"num_bins is {num_bins}; expected at least 1.")


def equal_mass_bins(predictions: FloatArray, num_bins: int) -> IntArray:
    """Bin of each example, 0 to num_bins − 1: its mid-rank / n."""
    # In whole numbers (twice the mid-rank is one), so that no bin edge depends on rounding.
    ranks = mid_ranks(predictions, np.zeros(len(predictions), dtype=np.int64))
    doubled = (2 * ranks).astype(np.int64)
    return np.asarray((doubled - 1) * num_bins // max(2 * len(predictions), 1), dtype=np.int64)


def _mean_interval(values: FloatArray, is_binary: bool) -> tuple[float, float]:
    """95 % confidence interval of the mean of at least one value."""
    n, mean, z = len(values), values.mean(), _NORMAL_QUANTILE
    if is_binary:
        center = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        # The exact bound of a bin of one class is 0 or 1; rounding may miss it.
        return max(0.0, center - half), min(1.0, center + half)
    half = z * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return mean - half, mean + half
