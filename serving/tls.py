"""TLS of the gRPC port: the `SSLConfig` text proto of TensorFlow Serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, message_factory

from schema.errors import ConfigError
from serving.config import read_text_proto

_FLAG: Final = "--ssl_config_file"


def read_server_credentials(path: Path) -> grpc.ServerCredentials:
    """Reads an `ssl.config`: `server_key`, `server_cert` and `custom_ca` as PEM texts, and `client_verify`.

    Returns:
      Credentials with which a server proves who it is and, with `client_verify`, takes only clients whose
      certificate `custom_ca` has signed.

    Raises:
      ConfigError: not readable, not an SSLConfig text proto, or without what it needs.
    """
    config = read_text_proto(path, _SSL_CONFIG(), _FLAG)
    for name in ("server_key", "server_cert", *(["custom_ca"] if config.client_verify else [])):
        if "-----BEGIN " not in getattr(config, name):
            raise ConfigError(f"{_FLAG} {path}: {name} must be a PEM text, -----BEGIN ..., not a file name")
    return grpc.ssl_server_credentials(
        [(config.server_key.encode(), config.server_cert.encode())],
        root_certificates=config.custom_ca.encode() or None,
        require_client_auth=config.client_verify,
    )


def _ssl_config_class() -> Any:
    """The SSLConfig proto, which the tensorflow-serving-api package leaves out."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="ssl_config.proto", package="tensorflow.serving", syntax="proto3"
    )
    message = file.message_type.add(name="SSLConfig")
    for number, name in enumerate(("server_key", "server_cert", "custom_ca"), start=1):
        message.field.add(name=name, number=number, type=kind.TYPE_STRING, label=kind.LABEL_OPTIONAL)
    message.field.add(name="client_verify", number=4, type=kind.TYPE_BOOL, label=kind.LABEL_OPTIONAL)
    return message_factory.GetMessages([file])["tensorflow.serving.SSLConfig"]


_SSL_CONFIG: Final = _ssl_config_class()
