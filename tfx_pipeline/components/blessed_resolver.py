"""Finds the model that a candidate is compared with, and the one that a warm start begins from."""

from __future__ import annotations

from typing import Any

from ml_metadata.proto import metadata_store_pb2
from tfx.dsl.components.common.resolver import ResolverStrategy
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy

_CANDIDATE = "candidate"
_MODEL = "model"
_EXAMPLES = "examples"


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


class LatestBlessedModelOfOtherExamplesStrategy(ResolverStrategy):
    """The latest blessed model that was not trained on the examples of this run.

    With TFX's own strategy, a repeated run would start from its own model: it would train once more on the
    same examples, and could never be reused.
    """

    def resolve_artifacts(self, store: Any, input_dict: dict[str, list[Any]]) -> dict[str, list[Any]] | None:
        """Resolves the inputs `model` and `model_blessing`; `examples` passes through.

        Args:
          store: of ML Metadata.
          input_dict: all models and blessings so far, and the examples.

        Returns:
          At most one model and its blessing.
        """
        inputs = dict(input_dict)
        examples = inputs.pop(_EXAMPLES)
        seen = {artifact.id for artifact in examples}
        inputs[_MODEL] = [model for model in inputs[_MODEL] if not seen & _trained_on(store, model.id)]
        resolved = LatestBlessedModelStrategy().resolve_artifacts(store, inputs)
        return None if resolved is None else {**resolved, _EXAMPLES: examples}


def _trained_on(store: Any, model_id: int) -> set[int]:
    """Ids of all artifacts that the executions with this output read."""
    made = [
        e for e in store.get_events_by_artifact_ids([model_id]) if e.type == metadata_store_pb2.Event.OUTPUT
    ]
    events = store.get_events_by_execution_ids([event.execution_id for event in made])
    return {event.artifact_id for event in events if event.type == metadata_store_pb2.Event.INPUT}
