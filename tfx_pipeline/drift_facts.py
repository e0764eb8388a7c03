"""What was found out about drift, as data; `tfx_pipeline.drift` measures it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

TRAIN_TO_EVAL, LAST_RUN = "train_to_eval", "last_run"


@dataclasses.dataclass(frozen=True)
class FeatureDrift:
    """How far one feature moved.

    Attributes:
      feature: its name.
      distance: 0 to 1; None where the data do not define it.
      limit: the largest distance that is near enough.
    """

    feature: str
    distance: float | None
    limit: float

    @property
    def is_too_far(self) -> bool:
        """Whether the distance is above the limit, or cannot be told."""
        return self.distance is None or not self.distance <= self.limit


@dataclasses.dataclass(frozen=True)
class DriftFacts:
    """What was compared.

    Attributes:
      found: comparison (`train_to_eval`, `last_run`) -> features, the farthest for its limit first.
      absent: comparison that was not made -> why.
    """

    found: Mapping[str, tuple[FeatureDrift, ...]]
    absent: Mapping[str, str]
