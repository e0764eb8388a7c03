"""Service level objective: what a server must hold at a rate."""

from __future__ import annotations

from pathlib import Path

import pydantic

from schema.contract import parse_model, read_yaml

# With fewer requests, the 99th percentile hangs on one or two of them.
_MIN_REQUESTS = 200


class Slo(pydantic.BaseModel):
    """What must hold, and for how long it is looked at.

    Attributes:
      rate_per_s: Poisson arrivals per second, in the mean.
      duration_s: seconds of load.
      p99_ms: 99 of 100 answered requests must take at most this, from their scheduled time.
      error_budget: share of the requests that may fail, from 0 to below 1.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    rate_per_s: float = pydantic.Field(gt=0)
    duration_s: float = pydantic.Field(gt=0)
    p99_ms: float = pydantic.Field(gt=0)
    error_budget: float = pydantic.Field(ge=0, lt=1)

    @pydantic.model_validator(mode="after")
    def _enough_requests(self) -> Slo:
        expected = self.rate_per_s * self.duration_s
        if expected < _MIN_REQUESTS:
            raise ValueError(
                f"rate_per_s × duration_s is {expected:g} requests, too few for a 99th percentile; "
                f"give {_MIN_REQUESTS} or more"
            )
        return self


def load_slo(path: Path) -> Slo:
    """Reads an objective. Raises ConfigError: no such file, an unknown or missing key, a wrong value."""
    return parse_model(Slo, read_yaml(path), source=str(path))
