"""Which earlier model a run begins from or is compared with."""

from collections.abc import Sequence
from typing import Any

import pytest
from ml_metadata.metadata_store import metadata_store
from ml_metadata.proto import metadata_store_pb2 as pb
from tfx.types import standard_artifacts

from tfx_pipeline.components.blessed_resolver import (
    LatestBlessedModelOfOtherExamplesStrategy,
    LatestOtherStatisticsStrategy,
)


class Runs:
    """Trainings recorded in ML Metadata."""

    def __init__(self) -> None:
        connection = pb.ConnectionConfig()
        connection.fake_database.SetInParent()
        self.store = metadata_store.MetadataStore(connection)
        self.type_id = self.store.put_artifact_type(pb.ArtifactType(name="Any"))
        self.trainer = self.store.put_execution_type(pb.ExecutionType(name="Trainer"))
        self.models: list[Any] = []
        self.blessings: list[Any] = []

    def examples(self) -> int:
        (artifact_id,) = self.store.put_artifacts([pb.Artifact(type_id=self.type_id)])
        return artifact_id

    def train(self, examples: int, blessed: bool = True, model: int | None = None) -> int:
        """Records a training; one that was reused has the model of an earlier one."""
        (execution,) = self.store.put_executions([pb.Execution(type_id=self.trainer)])
        made = self.examples() if model is None else model
        self.store.put_events(
            [
                pb.Event(artifact_id=examples, execution_id=execution, type=pb.Event.INPUT),
                pb.Event(artifact_id=made, execution_id=execution, type=pb.Event.OUTPUT),
            ]
        )
        if model is None:
            self.models.append(_artifact(standard_artifacts.Model(), made))
            blessing = _artifact(standard_artifacts.ModelBlessing(), self.examples())
            blessing.set_int_custom_property("blessed", int(blessed))
            blessing.set_int_custom_property("current_model_id", made)
            self.blessings.append(blessing)
        return made

    def base_for(self, examples: int) -> Sequence[int]:
        inputs = {
            "model": list(self.models),
            "model_blessing": list(self.blessings),
            "examples": [_artifact(standard_artifacts.Examples(), examples)],
        }
        resolved = LatestBlessedModelOfOtherExamplesStrategy().resolve_artifacts(self.store, inputs)
        assert resolved is not None and resolved["examples"][0].id == examples
        return [model.id for model in resolved["model"]]


def _artifact(artifact: Any, artifact_id: int) -> Any:
    artifact.id = artifact_id
    return artifact


@pytest.fixture
def runs() -> Runs:
    return Runs()


def test_the_first_run_has_nothing_to_begin_from(runs: Runs) -> None:
    assert runs.base_for(runs.examples()) == []


def test_new_data_begin_from_the_latest_blessed_model(runs: Runs) -> None:
    runs.train(runs.examples())
    blessed = runs.train(runs.examples())
    runs.train(runs.examples(), blessed=False)
    assert runs.base_for(runs.examples()) == [blessed]


def test_the_same_data_begin_from_the_same_model_again(runs: Runs) -> None:
    """Otherwise a repeated run would train on and could never be reused."""
    first, second = runs.examples(), runs.examples()
    assert runs.base_for(first) == []
    model = runs.train(first)
    assert runs.base_for(first) == []
    assert runs.base_for(second) == [model]
    runs.train(second)
    assert runs.base_for(second) == [model]


def test_a_model_that_was_reused_counts_as_trained_on_its_examples(runs: Runs) -> None:
    examples = runs.examples()
    model = runs.train(examples)
    runs.train(examples, model=model)
    assert runs.base_for(examples) == []


@pytest.mark.parametrize(
    ("known", "current", "expected"),
    [
        pytest.param([7], 7, [], id="first-run"),
        pytest.param([3, 7], 7, [3], id="second-run"),
        pytest.param([3, 7, 9], 7, [9], id="older-data-again"),
    ],
)
def test_statistics_of_the_last_run_are_those_of_other_examples(
    known: list[int], current: int, expected: list[int]
) -> None:
    """A repeated run meets its own statistics, from which nothing drifted."""
    statistics = [_artifact(standard_artifacts.ExampleStatistics(), number) for number in known]
    mine = [artifact for artifact in statistics if artifact.id == current]
    inputs = {"statistics": statistics, "current": mine}
    resolved = LatestOtherStatisticsStrategy().resolve_artifacts(None, inputs)
    assert resolved is not None and resolved["current"] == mine
    assert [artifact.id for artifact in resolved["statistics"]] == expected
