"""What a run decided, read from ML Metadata: blessings, pushes and the reasons against them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_metadata as mlmd
from ml_metadata.proto import metadata_store_pb2

from schema.errors import DataError
from tfx_pipeline.config import MODELS
from tfx_pipeline.gates import why_held_back

# TFX's name of the artifact; importing its class takes ten seconds.
_INFRA_BLESSING = "InfraBlessing"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The newest run's decisions.

    Attributes:
      user_states_uri: Examples artifact.
      report_uri: Report artifact.
      blessed: per model, whether it met every gate.
      pushed: per model, the version that was pushed, or None.
      reasons: per model that was not pushed, why.
    """

    user_states_uri: str
    report_uri: str
    blessed: dict[str, bool]
    pushed: dict[str, str | None]
    reasons: dict[str, str]


def read_outcome(metadata_path: Path) -> Outcome:
    """Reads the outcome of the newest pipeline run.

    Raises:
      DataError: the database holds no finished run.
    """
    outputs = _newest_outputs(metadata_path)
    blessed, pushed, reasons = {}, {}, {}
    for model in MODELS:
        blessing = outputs[f"ModelValidator.{model}", "blessing"]
        blessed[model] = blessing.custom_properties["blessed"].int_value == 1
        version = outputs[f"Pusher.{model}", "pushed_model"].custom_properties["pushed_version"].string_value
        pushed[model] = version or None
        if not blessed[model]:
            reasons[model] = blessing.custom_properties["reason"].string_value
    for model in MODELS:
        if held_back := why_held_back(model, blessed):
            reasons[model] = held_back
    return Outcome(
        user_states_uri=outputs["UserStateGen", "examples"].uri,
        report_uri=outputs["ReportWriter", "report"].uri,
        blessed=blessed,
        pushed=pushed,
        reasons=reasons,
    )


def latest_failed_infra(metadata_path: Path) -> str:
    """The id of the latest refusal of infra validation; "" when there was none."""
    if not metadata_path.is_file():
        return ""
    store = _open(metadata_path)
    blessings = store.get_artifacts_by_type(_INFRA_BLESSING)
    # What has no verdict is of a run that was broken off.
    verdicts = {
        b.id: b.custom_properties["blessed"].int_value for b in blessings if "blessed" in b.custom_properties
    }
    return str(max((i for i, is_blessed in verdicts.items() if not is_blessed), default=""))


def read_artifact_uris(metadata_path: Path) -> dict[tuple[str, str], str]:
    """Where the newest run's artifacts are, by (component id, output key).

    Raises:
      DataError: there is no database, or it holds no run.
    """
    return {key: artifact.uri for key, artifact in _newest_outputs(metadata_path).items()}


def _newest_outputs(metadata_path: Path) -> dict[tuple[str, str], metadata_store_pb2.Artifact]:
    if not metadata_path.is_file():
        raise DataError(f"{metadata_path} is gone; 'funnel run' with the same settings makes it again")
    store = _open(metadata_path)
    runs = store.get_contexts_by_type("pipeline_run")
    if not runs:
        raise DataError(f"{metadata_path} holds no pipeline run")
    return _outputs(store, max(runs, key=lambda run: run.id))


def _open(metadata_path: Path) -> mlmd.MetadataStore:
    connection = metadata_store_pb2.ConnectionConfig()
    connection.sqlite.filename_uri = str(metadata_path)
    connection.sqlite.connection_mode = metadata_store_pb2.SqliteMetadataSourceConfig.READONLY
    return mlmd.MetadataStore(connection)


def _outputs(
    store: mlmd.MetadataStore, run: metadata_store_pb2.Context
) -> dict[tuple[str, str], metadata_store_pb2.Artifact]:
    """Output artifacts of a run by (component id, output key); a reused component's are its cached ones."""
    node_types = {}
    executions = {}
    for execution in store.get_executions_by_context(run.id):
        for context in store.get_contexts_by_execution(execution.id):
            if store.get_context_types_by_id([context.type_id])[0].name == "node":
                node_types[execution.id] = context.name.split(".", 1)[1]
        executions[execution.id] = execution
    found = {}
    # What a resolver looked up is an internal output.
    made = (metadata_store_pb2.Event.OUTPUT, metadata_store_pb2.Event.INTERNAL_OUTPUT)
    finished = (metadata_store_pb2.Execution.COMPLETE, metadata_store_pb2.Execution.CACHED)
    for event in store.get_events_by_execution_ids(list(executions)):
        if event.type in made and executions[event.execution_id].last_known_state in finished:
            key = next(step.key for step in event.path.steps if step.WhichOneof("value") == "key")
            (artifact,) = store.get_artifacts_by_id([event.artifact_id])
            found[node_types[event.execution_id], key] = artifact
    return found
