"""TFX's Pusher, made atomic: a version folder appears complete or not at all."""

from __future__ import annotations

from typing import Any

from tfx.components.pusher import component
from tfx.components.pusher import executor as pusher_executor
from tfx.dsl.components.base import executor_spec
from tfx.dsl.io import fileio
from tfx.proto import pusher_pb2
from tfx.utils import proto_utils

_STAGING = ".staging"


class AtomicPusherExecutor(pusher_executor.Executor):
    """Pushes to a staging folder beside the versions and renames the result into place.

    TFX copies straight into the version folder, where a server that polls can meet half a model and a crash
    leaves it. A rename is atomic on a disk; on object storage it is a copy, but a short one.
    """

    def Do(self, input_dict: Any, output_dict: Any, exec_properties: dict[str, Any]) -> None:
        """See the base class."""
        destination = pusher_pb2.PushDestination()
        proto_utils.json_to_proto(exec_properties["push_destination"], destination)
        base = destination.filesystem.base_directory
        staging = f"{base}/{_STAGING}"
        _remove(staging)
        destination.filesystem.base_directory = staging
        try:
            super().Do(
                input_dict,
                output_dict,
                {**exec_properties, "push_destination": proto_utils.proto_to_json(destination)},
            )
            for version in fileio.listdir(staging) if fileio.exists(staging) else ():
                fileio.rename(f"{staging}/{version}", f"{base}/{version.rstrip('/')}")
        finally:
            _remove(staging)
        for pushed in output_dict["pushed_model"]:
            version = pushed.get_string_custom_property("pushed_version")
            if version:
                pushed.set_string_custom_property("pushed_destination", f"{base}/{version}")


def _remove(folder: str) -> None:
    if fileio.exists(folder):
        fileio.rmtree(folder)


class AtomicPusher(component.Pusher):
    """Pusher with AtomicPusherExecutor."""

    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(AtomicPusherExecutor)
