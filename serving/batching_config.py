"""Settings of dynamic batching: the `BatchingParameters` text proto of TensorFlow Serving."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from google.protobuf import descriptor_pb2, message_factory, wrappers_pb2

from schema.errors import ConfigError
from serving.config import read_text_proto
from serving.cores import usable_cpus

_MICROSECONDS: Final = 1e6


@dataclass(frozen=True)
class BatchingParameters:
    """How requests are gathered; the defaults are those of the official server.

    Args:
      max_batch_size: most rows of a batch; a request with more is refused.
      batch_timeout_s: seconds that a batch waits for more rows while a thread is free.
      max_enqueued_batches: most batches of one signature that wait for a thread; requests beyond are refused.
      num_batch_threads: batches that run at the same time, over all models; one per usable CPU by default.
      allowed_batch_sizes: ascending, the last is max_batch_size; a batch is filled up to the next of them
        with copies of its first row, so that a model sees no other sizes. Empty: no filling up.
      pad_variable_length_inputs: whether requests whose arrays differ beyond the first dimension may share a
        batch; otherwise only requests of the same shape do. As in the official server, an array is padded at
        the end of each dimension with the first element of the whole array, which must so be a missing value
        where it counts. An empty array, which the official server refuses, is padded with "" or zero.
    """

    max_batch_size: int = 1000
    batch_timeout_s: float = 0.0
    max_enqueued_batches: int = 10
    num_batch_threads: int = field(default_factory=lambda: len(usable_cpus()))
    allowed_batch_sizes: tuple[int, ...] = ()
    pad_variable_length_inputs: bool = False

    def __post_init__(self) -> None:
        """Checks the values; ConfigError names the one that is wrong."""
        for name, low in (
            ("max_batch_size", 1),
            ("max_enqueued_batches", 1),
            ("num_batch_threads", 1),
            ("batch_timeout_s", 0),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}")
        sizes = self.allowed_batch_sizes
        if sizes and (sizes[0] < 1 or list(sizes) != sorted(set(sizes)) or sizes[-1] != self.max_batch_size):
            raise ConfigError(
                f"allowed_batch_sizes must be positive, ascend, and end with max_batch_size "
                f"{self.max_batch_size}, got {list(sizes)}"
            )

    def filled_up(self, num_rows: int) -> int:
        """Rows of a batch after filling up."""
        return next((size for size in self.allowed_batch_sizes if size >= num_rows), num_rows)


def read_batching_parameters(path: Path) -> BatchingParameters:
    """Reads a `batching.config`.

    Raises:
      ConfigError: not readable, not a BatchingParameters text proto, or a value that is wrong.
    """
    message = read_text_proto(path, _PARAMETERS(), "--batching_parameters_file")
    given: dict[str, Any] = {
        name: getattr(message, name).value
        for name in ("max_batch_size", "max_enqueued_batches", "num_batch_threads")
        if message.HasField(name)
    }
    if message.HasField("batch_timeout_micros"):
        given["batch_timeout_s"] = message.batch_timeout_micros.value / _MICROSECONDS
    try:
        return BatchingParameters(
            allowed_batch_sizes=tuple(message.allowed_batch_sizes),
            pad_variable_length_inputs=message.pad_variable_length_inputs,
            **given,
        )
    except ConfigError as error:
        raise ConfigError(f"--batching_parameters_file {path}: {error}") from error


def _parameters_class() -> Any:
    """The BatchingParameters proto, which the tensorflow-serving-api package leaves out."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="batching_parameters.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    message = file.message_type.add(name="BatchingParameters")
    optional = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")
    for number, (name, value) in enumerate(
        [*((name, "Int64Value") for name in optional), ("thread_pool_name", "StringValue")], start=1
    ):
        message.field.add(
            name=name,
            number=number,
            type=kind.TYPE_MESSAGE,
            type_name=f".google.protobuf.{value}",
            label=kind.LABEL_OPTIONAL,
        )
    message.field.add(name="allowed_batch_sizes", number=6, type=kind.TYPE_INT64, label=kind.LABEL_REPEATED)
    message.field.add(
        name="pad_variable_length_inputs", number=7, type=kind.TYPE_BOOL, label=kind.LABEL_OPTIONAL
    )
    wrappers = descriptor_pb2.FileDescriptorProto()
    wrappers_pb2.DESCRIPTOR.CopyToProto(wrappers)
    return message_factory.GetMessages([wrappers, file])["tensorflow.serving.BatchingParameters"]


_PARAMETERS: Final = _parameters_class()
