"""Which models a server serves: the `ModelServerConfig` text proto of TensorFlow Serving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from schema.errors import ConfigError


def read_model_config(path: Path) -> dict[str, Path]:
    """Reads a `models.config`.

    Returns:
      Base path (the folder of the version directories) by model name.

    Raises:
      ConfigError: not readable, not a ModelServerConfig, a model without name or path, a name twice, or a
        setting that this server does not have: ignoring it would serve something else than was asked for.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--model_config_file {path} cannot be read: {error}") from error
    message = model_server_config_pb2.ModelServerConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise ConfigError(
            f"--model_config_file {path} is not a ModelServerConfig text proto: {error}"
        ) from error

    base_paths: dict[str, Path] = {}
    for model in message.model_config_list.config:
        if not model.name or not model.base_path:
            raise ConfigError(
                f"{path}: each config needs a name and a base_path, got {{{str(model).strip()}}}"
            )
        if model.name in base_paths:
            raise ConfigError(f"{path}: model {model.name!r} is configured twice; give each model one entry")
        if model.model_platform not in ("", "tensorflow"):
            raise ConfigError(f"{path}: model {model.name!r}: model_platform must be 'tensorflow'")
        for field in ("model_version_policy", "logging_config"):
            if model.HasField(field):
                raise ConfigError(
                    f"{path}: model {model.name!r}: this server does not have {field}; remove it"
                )
        if model.version_labels:
            raise ConfigError(
                f"{path}: model {model.name!r}: this server does not have version_labels; remove them"
            )
        base_paths[model.name] = Path(model.base_path)
    if not base_paths:
        raise ConfigError(f"{path} names no model; expected model_config_list {{ config {{ name: ... }} }}")
    return base_paths


def format_model_config(base_paths: Mapping[str, Path]) -> str:
    """Returns the `models.config` of these models, as this server and the official one read it."""
    message = model_server_config_pb2.ModelServerConfig()
    for name, base_path in base_paths.items():
        message.model_config_list.config.add(
            name=name, base_path=str(base_path.resolve()), model_platform="tensorflow"
        )
    return str(text_format.MessageToString(message))
