"""The item catalogue as the models see it: string ids, transformed features, a row per item, never split."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Every candidate item.

    Letters: I = items.

    Attributes:
      item_ids: object array [I] of str, unique, never empty.
      transformed: transformed candidate features by name; int64 or float32 [I], lists [I, L], 0 pads.
      upload_time_unix_s: int64 [I], -1 where unknown; None when the dataset has no upload time.
      counters: COUNTERS and LABEL_MEANS as of the end of training, float32 [I + 1, ...]; the last row is that
        of an item without any event.
    """

    item_ids: np.ndarray
    transformed: Mapping[str, np.ndarray]
    upload_time_unix_s: np.ndarray | None
    counters: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.item_ids)
