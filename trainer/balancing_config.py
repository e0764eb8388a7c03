"""Settings of how task losses are summed."""

from __future__ import annotations

from typing import Literal

import pydantic


class BalancingConfig(pydantic.BaseModel):
    """How task losses are summed.

    Attributes:
      method: "fixed", by the declared loss weights; "uncertainty", also by a learnt variance of each task
        (Kendall et al., CVPR 2018); "gradnorm", so that each task pulls at the shared layers in proportion to
        its loss weight (Chen et al., ICML 2018).
      asymmetry: of gradnorm, the paper's α: at 0 all tasks learn at equal pull, above it the pull of a task
        whose loss has fallen less than that of the others grows.
      memory_steps: of gradnorm, steps over which gradient norms and losses are averaged.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    method: Literal["fixed", "uncertainty", "gradnorm"] = "fixed"
    asymmetry: float = pydantic.Field(default=1.5, ge=0)
    memory_steps: int = pydantic.Field(default=100, ge=1)
