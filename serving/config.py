"""Which models a server serves: the `ModelServerConfig` text proto of TensorFlow Serving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from google.protobuf import text_format
from google.protobuf.message import Message
from tensorflow_serving.config import model_server_config_pb2

from schema.errors import ConfigError

_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True)
class VersionPolicy:
    """Which of the versions on disk are served.

    Args:
      limit: the so many newest; None for all.
      only: the version numbers to choose from; None for whatever is there.
    """

    limit: int | None = 1
    only: frozenset[int] | None = None

    def candidates(self, found: Iterable[int]) -> list[int]:
        """Returns the versions to choose from, newest first."""
        return sorted((v for v in found if self.only is None or v in self.only), reverse=True)


@dataclass(frozen=True)
class ModelConfig:
    """One model: the folder of its version directories, what of it is served, and names for versions."""

    name: str
    base_path: Path
    policy: VersionPolicy = VersionPolicy()
    labels: Mapping[str, int] = field(default_factory=dict)


def read_model_config(path: Path) -> dict[str, ModelConfig]:
    """Reads a `models.config`.

    Returns:
      The models by name.

    Raises:
      ConfigError: not readable, not a ModelServerConfig, or refused by `parse_model_config`.
    """
    message = read_text_proto(path, model_server_config_pb2.ModelServerConfig(), "--model_config_file")
    try:
        return parse_model_config(message)
    except ConfigError as error:
        raise ConfigError(f"--model_config_file {path}: {error}") from error


def parse_model_config(message: model_server_config_pb2.ModelServerConfig) -> dict[str, ModelConfig]:
    """Checks a ModelServerConfig, from a file or from a reload request.

    Raises:
      ConfigError: no model, a model without name or path, a name twice, a wrong version policy, or a setting
        that this server does not have: ignoring it would serve something else than was asked for.
    """
    models: dict[str, ModelConfig] = {}
    for model in message.model_config_list.config:
        if not model.name or not model.base_path:
            raise ConfigError(f"each config needs a name and a base_path, got {{{str(model).strip()}}}")
        if model.name in models:
            raise ConfigError(f"model {model.name!r} is configured twice; give each model one entry")
        if model.model_platform not in ("", "tensorflow"):
            raise ConfigError(f"model {model.name!r}: model_platform must be 'tensorflow'")
        if model.HasField("logging_config"):
            raise ConfigError(f"model {model.name!r}: this server does not have logging_config; remove it")
        if any(not label for label in model.version_labels):
            raise ConfigError(f"model {model.name!r}: a version label must not be empty")
        models[model.name] = ModelConfig(
            model.name, Path(model.base_path), _policy(model), dict(model.version_labels)
        )
    if not models:
        raise ConfigError("names no model; expected model_config_list { config { name: ... } }")
    return models


def format_model_config(base_paths: Mapping[str, Path]) -> str:
    """Returns the `models.config` of these models, as this server and the official one read it."""
    message = model_server_config_pb2.ModelServerConfig()
    for name, base_path in base_paths.items():
        message.model_config_list.config.add(
            name=name, base_path=str(base_path.resolve()), model_platform="tensorflow"
        )
    return str(text_format.MessageToString(message))


def read_text_proto(path: Path, message: _M, flag: str) -> _M:
    """Fills `message` from a text proto; `flag` is named in errors.

    Raises:
      ConfigError: not readable or not such a message.
    """
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), message)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}") from error
    except text_format.ParseError as error:
        kind = message.DESCRIPTOR.name
        raise ConfigError(f"{flag} {path} is not a {kind} text proto: {error}") from error
    return message


def _policy(model: model_server_config_pb2.ModelConfig) -> VersionPolicy:
    policy = model.model_version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return VersionPolicy(limit=None)
    if choice == "specific":
        if not policy.specific.versions:
            raise ConfigError(f"model {model.name!r}: model_version_policy.specific names no version")
        return VersionPolicy(limit=None, only=frozenset(policy.specific.versions))
    # An unset number means one, as in the official server.
    return VersionPolicy(limit=policy.latest.num_versions or 1)
