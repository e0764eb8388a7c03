"""TFX's Pusher, made atomic, and joint: bundles of one run are pushed all or none, under one version."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from tfx.components.pusher import executor as pusher_executor
from tfx.components.util import model_utils
from tfx.dsl.components.base import base_component, executor_spec
from tfx.dsl.io import fileio
from tfx.proto import pusher_pb2
from tfx.types import BaseChannel, Channel, artifact_utils, standard_artifacts, standard_component_specs
from tfx.types.component_spec import ChannelParameter
from tfx.utils import io_utils, json_utils, proto_utils

from trainer.checkpoint import CHECKPOINT_DIR

_LOGGER = logging.getLogger(__name__)

_STAGING = ".staging"
_FINGERPRINT = "fingerprint.pb"
# Only in versions that tfx_pipeline.refresh made: the fingerprint of the model that was given new items.
REFRESHED_FINGERPRINT = "assets.extra/refreshed_fingerprint.pb"
_PARTNER_BLESSING = "partner_blessing"
# Of an infra blessing, which is one for all bundles of a run: when it was given. It becomes their version.
BLESSED_AT = "blessed_at_unix_s"


class AtomicPusherSpec(standard_component_specs.PusherSpec):
    """PusherSpec with a second model blessing."""

    INPUTS: ClassVar[dict[str, ChannelParameter]] = {
        **standard_component_specs.PusherSpec.INPUTS,
        _PARTNER_BLESSING: ChannelParameter(type=standard_artifacts.ModelBlessing),
    }


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
        (pushed,) = output_dict["pushed_model"]
        if newest and self.CheckBlessing(input_dict) and self._is_model(f"{base}/{newest}", input_dict):
            _LOGGER.info("version %s at %s is this model already", newest, base)
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
                staged = f"{staging}/{name.rstrip('/')}"
                self._copy_checkpoint(input_dict, staged)
                version = _version(input_dict, newest)
                fileio.rename(staged, f"{base}/{version}")
                self._MarkPushed(pushed, pushed_destination=f"{base}/{version}", pushed_version=version)
        finally:
            _remove(staging)

    def CheckBlessing(self, input_dict: Any) -> bool:
        """Whether the infra validation and both models' judges agree to a push."""
        partner = artifact_utils.get_single_instance(input_dict[_PARTNER_BLESSING])
        return bool(model_utils.is_model_blessed(partner)) and super().CheckBlessing(input_dict)

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


def _version(input_dict: Any, newest: str) -> str:
    """The time of the infra blessing; one more than the newest version where that is not older.

    TFX takes the second of each push, which differs from bundle to bundle.
    """
    blessing = artifact_utils.get_single_instance(input_dict["infra_blessing"])
    return str(max(blessing.get_int_custom_property(BLESSED_AT), int(newest or 0) + 1))


def _read(path: str) -> bytes:
    with fileio.open(path, "rb") as file:
        content: bytes = file.read()
    return content


def _remove(folder: str) -> None:
    if fileio.exists(folder):
        fileio.rmtree(folder)


class AtomicPusher(base_component.BaseComponent):
    """Pushes one bundle, if both models of the run are blessed."""

    SPEC_CLASS = AtomicPusherSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(AtomicPusherExecutor)

    def __init__(
        self,
        model: BaseChannel,
        model_blessing: BaseChannel,
        partner_blessing: BaseChannel,
        infra_blessing: BaseChannel,
        push_destination: pusher_pb2.PushDestination,
        custom_config: dict[str, Any],
    ) -> None:
        """Makes the component.

        Args:
          model: the bundle.
          model_blessing: of the one model.
          partner_blessing: of the other.
          infra_blessing: of all bundles.
          push_destination: folder of the versions.
          custom_config: JSON-able; a change of it makes the component run again.
        """
        spec = AtomicPusherSpec(
            model=model,
            model_blessing=model_blessing,
            partner_blessing=partner_blessing,
            infra_blessing=infra_blessing,
            push_destination=push_destination,
            custom_config=json_utils.dumps(custom_config),
            pushed_model=Channel(type=standard_artifacts.PushedModel),
        )
        super().__init__(spec=spec)
