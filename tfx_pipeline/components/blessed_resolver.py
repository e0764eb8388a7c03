"""Finds the model that a candidate is compared with."""

from __future__ import annotations

from typing import Any

from tfx.dsl.components.common.resolver import ResolverStrategy
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy

_CANDIDATE = "candidate"
_MODEL = "model"


class LatestOtherBlessedModelStrategy(ResolverStrategy):
    """The latest blessed model other than the candidate.

    With TFX's own strategy, a repeated run meets its own model as the last blessed one and judges it against
    itself, which tells nothing and keeps the first judgement from being reused.
    """

    def resolve_artifacts(self, store: Any, input_dict: dict[str, list[Any]]) -> dict[str, list[Any]] | None:
        """Resolves the inputs `model` and `model_blessing`; `candidate` passes through.

        Args:
          store: of ML Metadata.
          input_dict: all models and blessings so far, and the candidate.

        Returns:
          At most one model and its blessing.
        """
        inputs = dict(input_dict)
        candidate = inputs.pop(_CANDIDATE)
        itself = {artifact.id for artifact in candidate}
        inputs[_MODEL] = [model for model in inputs[_MODEL] if model.id not in itself]
        resolved = LatestBlessedModelStrategy().resolve_artifacts(store, inputs)
        return None if resolved is None else {**resolved, _CANDIDATE: candidate}
