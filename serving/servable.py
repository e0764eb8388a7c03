"""One loaded model version: its signatures, its input checks, and the call."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import grpc
import scann  # noqa: F401  registers the ScaNN ops, without which a retrieval model does not load
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import tensor_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow_serving.apis import predict_pb2

from schema.errors import ServingError
from serving.status import RequestError, code_from_number, invalid_argument

logger = logging.getLogger(__name__)

DEFAULT_SIGNATURE: Final = "serving_default"

# A tensor proto may declare a large shape and hold one value; the shape alone must not exhaust the memory.
_MAX_TENSOR_ELEMENTS: Final = 2**27

_VALUE_FIELDS: Final = {
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.int32: "int_val",
    tf.int64: "int64_val",
    tf.uint32: "uint32_val",
    tf.uint64: "uint64_val",
    tf.bool: "bool_val",
    tf.string: "string_val",
}


def tensor_from_proto(name: str, proto: tensor_pb2.TensorProto) -> tf.Tensor:
    """Decodes one request tensor.

    Raises:
      RequestError: INVALID_ARGUMENT when the proto contradicts itself or declares more than 2**27 elements.
    """
    dims = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in dims):
        raise invalid_argument(f"input {name!r}: a tensor needs a known shape, got {dims}")
    if math.prod(dims) > _MAX_TENSOR_ELEMENTS:
        raise invalid_argument(f"input {name!r}: shape {dims} has more than {_MAX_TENSOR_ELEMENTS} elements")
    try:
        return tf.constant(tf.make_ndarray(proto), dtype=tf.as_dtype(proto.dtype))
    except (ValueError, TypeError, IndexError) as error:
        raise invalid_argument(f"input {name!r}: tensor cannot be decoded: {error}") from error


def tensor_to_proto(tensor: tf.Tensor) -> tensor_pb2.TensorProto:
    """Encodes one answer tensor in the typed fields (`float_val`, ...), as TensorFlow Serving does."""
    field = _VALUE_FIELDS.get(tensor.dtype)
    if field is None:
        return tf.make_tensor_proto(tensor.numpy(), tensor.dtype)
    proto = tensor_pb2.TensorProto(dtype=tensor.dtype.as_datatype_enum, tensor_shape=tensor.shape.as_proto())
    getattr(proto, field).extend(tf.reshape(tensor, [-1]).numpy().tolist())
    return proto


def read_signature_defs(path: Path) -> dict[str, meta_graph_pb2.SignatureDef]:
    """Reads all signatures of a SavedModel's `serve` graph.

    Raises:
      ServingError: `saved_model.pb` is not a SavedModel, or has no graph tagged `serve`.
    """
    file = path / "saved_model.pb"
    try:
        saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except DecodeError as error:
        raise ServingError(f"{file} is not a SavedModel; it is damaged or cut short") from error
    for meta_graph in saved_model.meta_graphs:
        if "serve" in meta_graph.meta_info_def.tags:
            return dict(meta_graph.signature_def)
    raise ServingError(
        f"{file} is not a SavedModel with a graph tagged 'serve'; it is damaged or not for serving"
    )


class Servable:
    """A loaded SavedModel. Safe to call from several threads.

    Args:
      name: model name in requests.
      version: number of the version directory.
      path: the version directory itself.

    Raises:
      ServingError, OSError, ValueError, tf.errors.OpError: the SavedModel cannot be loaded.
    """

    def __init__(self, name: str, version: int, path: Path) -> None:
        self.name = name
        self.version = version
        self.path = path
        self.signature_defs = read_signature_defs(path)
        # The signatures hold their variables weakly: the model lives as long as this reference.
        self._model = tf.saved_model.load(str(path))
        self._functions = dict(self._model.signatures)
        if not self._functions:
            raise ServingError(f"{path} has no signature to call; export it with signatures={{...}}")

    def signature(self, name: str) -> meta_graph_pb2.SignatureDef:
        """Returns the signature of that name (`""` means `serving_default`).

        Raises:
          RequestError: FAILED_PRECONDITION, there is none; the text lists those there are.
        """
        name = name or DEFAULT_SIGNATURE
        if name not in self._functions:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f'Serving signature "{name}" not found in model {self.name} version {self.version}; '
                f"it has: {', '.join(sorted(self._functions))}",
            )
        return self.signature_defs[name]

    def predict(
        self, signature_name: str, inputs: Mapping[str, tf.Tensor], output_filter: Sequence[str] = ()
    ) -> dict[str, tf.Tensor]:
        """Runs one signature.

        Args:
          signature_name: `""` means `serving_default`.
          inputs: exactly the signature's inputs, with their dtypes and compatible shapes.
          output_filter: names of the outputs to return; all when empty.

        Returns:
          Output tensors by name.

        Raises:
          RequestError: INVALID_ARGUMENT for inputs or a filter that do not fit the signature,
            FAILED_PRECONDITION for an unknown signature, and whatever code an op of the graph raised.
        """
        signature = self.signature(signature_name)
        _check_inputs(signature, inputs)
        _check_output_filter(signature, output_filter)
        try:
            outputs = self._functions[signature_name or DEFAULT_SIGNATURE](**inputs)
        except tf.errors.OpError as error:
            raise RequestError(code_from_number(error.error_code), _short_message(error)) from error
        return {name: outputs[name] for name in output_filter or outputs}

    def predict_request(self, request: predict_pb2.PredictRequest) -> dict[str, tf.Tensor]:
        """Runs a Predict request: the same as `predict`, with the inputs as tensor protos."""
        inputs = {name: tensor_from_proto(name, proto) for name, proto in request.inputs.items()}
        return self.predict(request.model_spec.signature_name, inputs, request.output_filter)


def _check_inputs(signature: meta_graph_pb2.SignatureDef, inputs: Mapping[str, tf.Tensor]) -> None:
    missing = sorted(set(signature.inputs) - set(inputs))
    extra = sorted(set(inputs) - set(signature.inputs))
    if missing or extra:
        raise invalid_argument(
            f"inputs do not match the signature. Missing: {', '.join(missing) or 'none'}. "
            f"Not in the signature: {', '.join(extra) or 'none'}. "
            f"Expected: {', '.join(sorted(signature.inputs))}"
        )
    for name, tensor in inputs.items():
        info = signature.inputs[name]
        expected = tf.TensorSpec(tf.TensorShape(info.tensor_shape), tf.as_dtype(info.dtype))
        if tensor.dtype != expected.dtype or not expected.shape.is_compatible_with(tensor.shape):
            raise invalid_argument(
                f"input {name!r} must be {expected.dtype.name} {expected.shape}, "
                f"got {tensor.dtype.name} {tensor.shape}"
            )


def _check_output_filter(signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str]) -> None:
    for name in output_filter:
        if name not in signature.outputs:
            raise invalid_argument(
                f"output_filter: no output {name!r}; there are: {', '.join(sorted(signature.outputs))}"
            )
    if len(set(output_filter)) != len(output_filter):
        raise invalid_argument(f"output_filter names an output twice: {', '.join(output_filter)}")


def _short_message(error: tf.errors.OpError) -> str:
    """Drops the paragraph about Python stack traces that TensorFlow puts before an op's own message."""
    return str(error.message).split("<stack traces unavailable>\n")[-1].strip()
