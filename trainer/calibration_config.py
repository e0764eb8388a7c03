"""Settings of the calibration of task outputs."""

from __future__ import annotations

from typing import Literal

import pydantic

CalibrationMethod = Literal["none", "platt", "isotonic"]

# Rows with a label below which an output is left as it is.
MIN_ROWS = 100


class CalibrationConfig(pydantic.BaseModel):
    """How task outputs are calibrated on the eval split.

    Attributes:
      method: "none"; "platt", two numbers for a probability, a scale or a line for other tasks; or
        "isotonic", any increasing shape, which wants some ten thousand rows.
      slice_feature: a single-valued categorical query feature, such as `surface`, whose values get curves of
        their own, shrunk towards that of all rows; null for one curve per task.
      min_slice_rows: eval rows with a label below which a slice uses the curve of all rows. With exactly as
        many, both curves count the same.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    method: CalibrationMethod = "platt"
    slice_feature: str | None = None
    min_slice_rows: int = pydantic.Field(default=1000, ge=MIN_ROWS)

    @pydantic.model_validator(mode="after")
    def _check(self) -> CalibrationConfig:
        if self.slice_feature is not None and self.method == "none":
            raise ValueError(
                f"slice_feature is {self.slice_feature!r}, but method is 'none', so that nothing is "
                "calibrated; choose a method, or remove slice_feature"
            )
        return self
