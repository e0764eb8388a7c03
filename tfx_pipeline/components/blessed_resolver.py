"""Finds what of earlier runs this one needs: the last blessed model, a model to begin from, statistics."""

from __future__ import annotations

from typing import Any

from ml_metadata.proto import metadata_store_pb2
from tfx.dsl.components.common.resolver import ResolverStrategy
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy

_CANDIDATE = "candidate"
_MODEL = "model"
_EXAMPLES = "examples"
STATISTICS = "statistics"
CURRENT = "current"


class _LatestBlessedModelWithout(ResolverStrategy):
    """The latest blessed model that has nothing to do with a further input."""

    # Name of the further input.
    further = ""

    def resolve_artifacts(self, store: Any, input_dict: dict[str, list[Any]]) -> dict[str, list[Any]] | None:
        """Resolves the inputs `model` and `model_blessing`; the further input passes through.

        Args:
          store: of ML Metadata.
          input_dict: all models and blessings so far, and the further input.

        Returns:
          At most one model and its blessing.
        """
        inputs = dict(input_dict)
        further = inputs.pop(self.further)
        ids = {artifact.id for artifact in further}
        inputs[_MODEL] = [model for model in inputs[_MODEL] if not ids & self.related(store, model.id)]
        resolved = LatestBlessedModelStrategy().resolve_artifacts(store, inputs)
        return None if resolved is None else {**resolved, self.further: further}

    def related(self, store: Any, model_id: int) -> set[int]:
        """Ids of the artifacts whose presence in the further input rules the model out."""
        raise NotImplementedError


class LatestOtherBlessedModelStrategy(_LatestBlessedModelWithout):
    """The latest blessed model other than the input `candidate`.

    With TFX's own strategy, a repeated run meets its own model as the last blessed one and judges it against
    itself, which tells nothing and keeps the first judgement from being reused.
    """

    further = _CANDIDATE

    def related(self, store: Any, model_id: int) -> set[int]:
        """The model itself."""
        return {model_id}


class LatestBlessedModelOfOtherExamplesStrategy(_LatestBlessedModelWithout):
    """The latest blessed model that was not trained on the input `examples`.

    With TFX's own strategy, a repeated run would start from its own model: it would train once more on the
    same examples, and could never be reused.
    """

    further = _EXAMPLES

    def related(self, store: Any, model_id: int) -> set[int]:
        """What the model was trained on."""
        return _trained_on(store, model_id)


class LatestOtherStatisticsStrategy(ResolverStrategy):
    """The latest statistics other than the input `current`: those of the last run on other examples."""

    def resolve_artifacts(self, store: Any, input_dict: dict[str, list[Any]]) -> dict[str, list[Any]] | None:
        """Resolves the input `statistics` to at most one artifact; `current` passes through."""
        current = input_dict[CURRENT]
        ids = {artifact.id for artifact in current}
        others = [artifact for artifact in input_dict[STATISTICS] if artifact.id not in ids]
        latest = max(others, key=lambda artifact: artifact.id, default=None)
        return {STATISTICS: [] if latest is None else [latest], CURRENT: current}


def _trained_on(store: Any, model_id: int) -> set[int]:
    """Ids of all artifacts that the executions with this output read."""
    made = [
        e for e in store.get_events_by_artifact_ids([model_id]) if e.type == metadata_store_pb2.Event.OUTPUT
    ]
    events = store.get_events_by_execution_ids([event.execution_id for event in made])
    return {event.artifact_id for event in events if event.type == metadata_store_pb2.Event.INPUT}
