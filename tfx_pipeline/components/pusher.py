"""TFX's Pusher, made atomic: a version folder appears complete or not at all."""

from __future__ import annotations

import logging
from typing import Any

from tfx.components.pusher import component
from tfx.components.pusher import executor as pusher_executor
from tfx.dsl.components.base import executor_spec
from tfx.dsl.io import fileio
from tfx.proto import pusher_pb2
from tfx.utils import io_utils, proto_utils

from trainer.checkpoint import CHECKPOINT_DIR

_LOGGER = logging.getLogger(__name__)

_STAGING = ".staging"
_FINGERPRINT = "fingerprint.pb"
# Only in versions that tfx_pipeline.refresh made: the fingerprint of the model that was given new items.
REFRESHED_FINGERPRINT = "assets.extra/refreshed_fingerprint.pb"


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
        newest = newest_version(base)
        if newest and self.CheckBlessing(input_dict) and self._is_model(f"{base}/{newest}", input_dict):
            _LOGGER.info("version %s at %s is this model already", newest, base)
            (pushed,) = output_dict["pushed_model"]
            self._MarkPushed(pushed, pushed_destination=f"{base}/{newest}", pushed_version=newest)
            return
        staging = f"{base}/{_STAGING}"
        _remove(staging)
        destination.filesystem.base_directory = staging
        try:
            super().Do(
                input_dict,
                output_dict,
                {**exec_properties, "push_destination": proto_utils.proto_to_json(destination)},
            )
            for name in fileio.listdir(staging) if fileio.exists(staging) else ():
                version = name.rstrip("/")
                self._copy_checkpoint(input_dict, f"{staging}/{version}")
                fileio.rename(f"{staging}/{version}", f"{base}/{version}")
        finally:
            _remove(staging)
        for pushed in output_dict["pushed_model"]:
            version = pushed.get_string_custom_property("pushed_version")
            if version:
                pushed.set_string_custom_property("pushed_destination", f"{base}/{version}")

    def _copy_checkpoint(self, input_dict: Any, version_dir: str) -> None:
        """Copies the checkpoint whole: TFX drops every saved_model.pb, that of the Transform graph too."""
        checkpoint = f"{self.GetModelPath(input_dict)}/{CHECKPOINT_DIR}"
        if fileio.exists(checkpoint):
            io_utils.copy_dir(checkpoint, f"{version_dir}/{CHECKPOINT_DIR}")

    def _is_model(self, version_dir: str, input_dict: Any) -> bool:
        """Whether a pushed version is the model to push, or that model refreshed with newer items.

        Every export has a fingerprint of its own.
        """
        candidate = f"{self.GetModelPath(input_dict)}/{_FINGERPRINT}"
        pushed = (f"{version_dir}/{name}" for name in (_FINGERPRINT, REFRESHED_FINGERPRINT))
        return fileio.exists(candidate) and any(
            fileio.exists(path) and _read(path) == _read(candidate) for path in pushed
        )


def newest_version(base: str) -> str:
    """The newest version folder below `base`; "" when there is none."""
    names = (name.rstrip("/") for name in (fileio.listdir(base) if fileio.exists(base) else ()))
    return max((name for name in names if name.isdigit()), key=int, default="")


def _read(path: str) -> bytes:
    with fileio.open(path, "rb") as file:
        content: bytes = file.read()
    return content


def _remove(folder: str) -> None:
    if fileio.exists(folder):
        fileio.rmtree(folder)


class AtomicPusher(component.Pusher):
    """Pusher with AtomicPusherExecutor."""

    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(AtomicPusherExecutor)
