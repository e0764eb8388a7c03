"""Figures of several trainings: their mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt


def mean_and_std(values: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float | None]:
    """`mean` over seeds, and `std`, the standard deviation with n - 1, None for one seed."""
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def summary(by_seed: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Metric -> its `mean_and_std`; the metrics are those of the first seed."""
    return {name: mean_and_std([values[name] for values in by_seed]) for name in by_seed[0]}
