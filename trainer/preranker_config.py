"""Settings of the pre-ranker: its size, and how it is distilled from the ranker."""

from __future__ import annotations

from typing import Literal

import pydantic


class PrerankerConfig(pydantic.BaseModel):
    """The pre-ranker, which cuts the candidates of retrieval to those that the ranker scores.

    Attributes:
      num_kept: candidates that the ranker scores, at most, of those that retrieval finds for `funnel`.
      vector_width: of the user and item vectors.
      tower_width: hidden width of the networks that make these vectors; they run once per request and once
        per item, never per pair.
      hidden_layers: widths of the network that judges a pair; all of the time of a request is spent here.
      loss: "listwise", the cross-entropy between two distributions over the candidates of a request, the
        softmax of the ranker's scores and that of the pre-ranker's; "squared", the squared difference to the
        ranker's scores, standardised within the request.
      temperature: of the ranker's softmax, in standard deviations of its scores among the candidates of a
        request; the lower, the more only its very best count. "squared" has none.
      num_queries: requests that the ranker labels, at most; each costs the ranker `num_candidates` scores.
      num_candidates: items drawn for each of these requests.
      popular_fraction: share of them that is drawn by popularity; the rest is drawn uniformly.
      num_validation_users: users held out, at most; after every epoch loss and survival are measured on
        them. Never more than half of the users.
      batch_queries: requests per step.
      learning_rate: Adam's, at first; it falls to zero along half a cosine.
      max_epochs: passes over the labelled requests.
      patience_epochs: epochs without a lower loss on the held-out users before training stops.
      seed: of initial weights, of the users held out, of the candidates and of the order.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    num_kept: pydantic.PositiveInt = 500
    vector_width: pydantic.PositiveInt = 64
    tower_width: pydantic.PositiveInt = 128
    hidden_layers: tuple[pydantic.PositiveInt, ...] = pydantic.Field(default=(128, 64, 64), min_length=1)
    loss: Literal["listwise", "squared"] = "listwise"
    temperature: pydantic.PositiveFloat = 0.5
    num_queries: pydantic.PositiveInt = 4_000
    num_candidates: int = pydantic.Field(default=256, ge=2)
    popular_fraction: float = pydantic.Field(default=0.5, ge=0, le=1)
    num_validation_users: pydantic.PositiveInt = 200
    batch_queries: pydantic.PositiveInt = 32
    learning_rate: pydantic.PositiveFloat = 2e-3
    max_epochs: pydantic.PositiveInt = 10
    patience_epochs: pydantic.PositiveInt = 3
    seed: int = 42
