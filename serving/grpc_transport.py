"""The gRPC transport of the client. Importing it imports TensorFlow, as TensorFlow Serving's protos do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import grpc
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from schema.errors import ServingError
from serving.transport import (
    DEFAULT_SIGNATURE,
    FINGERPRINT_SIGNATURE,
    BadRequestError,
    InputSpec,
    ModelNotFoundError,
    OverloadedError,
    Prediction,
    Signatures,
    deadline_exceeded,
    read_signatures,
    unavailable,
)

_Answer = TypeVar("_Answer")
_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    # serving.retries repeats what is safe to repeat; by default a channel whose connection was refused fails
    # every call for a whole second before it looks again.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


class GrpcTransport:
    """TensorFlow Serving's PredictionService and ModelService over one channel."""

    def __init__(self, address: str, version_label: str | None = None, *, tls: bool = False) -> None:
        self._target = f"{'grpcs' if tls else 'grpc'}://{address}"
        self._version_label = version_label
        if tls:
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(), _CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(address, _CHANNEL_OPTIONS)
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._model = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def signatures(self, model: str, timeout_s: float) -> Signatures:
        """See Transport."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        self._address(request, model)
        response = self._call(self._prediction.GetModelMetadata, request, timeout_s)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        inputs = {
            signature: {
                name: (types_pb2.DataType.Name(info.dtype), [dim.size for dim in info.tensor_shape.dim])
                for name, info in definition.inputs.items()
            }
            for signature, definition in signatures.signature_def.items()
        }
        return read_signatures(inputs, f"{self._target}: model {model!r}")

    def predict(
        self,
        model: str,
        inputs: Mapping[str, Any],
        specs: Mapping[str, InputSpec],
        timeout_s: float,
        signature: str = DEFAULT_SIGNATURE,
    ) -> Prediction:
        """See Transport."""
        request = predict_pb2.PredictRequest()
        self._address(request, model)
        request.model_spec.signature_name = signature
        for name, value in inputs.items():
            try:
                _fill(request.inputs[name], value, specs[name])
            except (ValueError, TypeError, OverflowError) as error:
                raise BadRequestError(f"{name!r} does not fit {specs[name].dtype}: {error}") from error
        response = self._call(self._prediction.Predict, request, timeout_s)
        outputs = {name: _as_lists(proto) for name, proto in response.outputs.items()}
        return Prediction(outputs, response.model_spec.version.value)

    def fingerprints(
        self, model: str, version: int | None, parts: Sequence[str], timeout_s: float
    ) -> Sequence[str]:
        """See Transport."""
        request = predict_pb2.PredictRequest()
        self._address(request, model)
        request.model_spec.signature_name = FINGERPRINT_SIGNATURE
        if version is not None:  # replaces the label: a model spec has one of the two
            request.model_spec.version.value = version
        _fill(request.inputs["parts"], list(parts), InputSpec("string", "DT_STRING", 1))
        response = self._call(self._prediction.Predict, request, timeout_s)
        hashes: list[str] = _as_lists(response.outputs["fingerprints"])
        return hashes

    def available_versions(self, model: str, timeout_s: float) -> list[int]:
        """See Transport."""
        request = get_model_status_pb2.GetModelStatusRequest()
        self._address(request, model)
        response = self._call(self._model.GetModelStatus, request, timeout_s)
        available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
        return [status.version for status in response.model_version_status if status.state == available]

    def close(self) -> None:
        """See Transport."""
        self._channel.close()

    def _address(self, request: Any, model: str) -> None:
        request.model_spec.name = model
        if self._version_label:
            request.model_spec.version_label = self._version_label

    def _call(self, method: Callable[..., _Answer], request: Any, timeout_s: float) -> _Answer:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._error_of(error, type(request).__name__) from error

    def _error_of(self, error: grpc.RpcError, call: str) -> ServingError:
        code, message = error.code(), f"{call} at {self._target}: {error.details()}"
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return deadline_exceeded(self._target, call)
        if code == grpc.StatusCode.UNAVAILABLE:
            return unavailable(self._target, error.details())
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OverloadedError(f"{message}; send less, or let more servers share the load")
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
            return BadRequestError(message)
        if code == grpc.StatusCode.NOT_FOUND:
            return ModelNotFoundError(f"{message}; check the model name and what the server serves")
        return ServingError(f"{message} ({code.name}); look at the server's log")


# The field of a TensorProto that holds values of a dtype.
_FIELDS: Final = {
    "DT_STRING": "string_val",
    "DT_FLOAT": "float_val",
    "DT_DOUBLE": "double_val",
    "DT_INT64": "int64_val",
    **dict.fromkeys(("DT_INT32", "DT_INT16", "DT_INT8", "DT_UINT8"), "int_val"),
}


def _fill(proto: Any, value: list[Any], spec: InputSpec) -> None:
    """Writes a batch of values (rank 1) or of lists of equal length (rank 2) into a TensorProto.

    TensorFlow's make_tensor_proto first finds out shape and dtype, which are known here. It takes ten times
    as long, more than all else that a request costs the client.
    """
    proto.dtype = types_pb2.DataType.Value(spec.dtype)
    proto.tensor_shape.dim.add(size=len(value))
    if spec.rank == 2:
        proto.tensor_shape.dim.add(size=len(value[0]))
        value = [item for row in value for item in row]
    values = [item.encode() for item in value] if spec.kind == "string" else value
    getattr(proto, _FIELDS[spec.dtype]).extend(values)


def _as_lists(proto: Any) -> Any:
    array = tf.make_ndarray(proto)
    if array.dtype != object:
        return array.tolist()
    return _decode(array.tolist())


def _decode(value: Any) -> Any:
    return [_decode(item) for item in value] if isinstance(value, list) else value.decode(errors="replace")
