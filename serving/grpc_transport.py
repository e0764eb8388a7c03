"""The gRPC transport of the client. Importing it imports TensorFlow, as TensorFlow Serving's protos do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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
    BadRequestError,
    InputSpec,
    ModelNotFoundError,
    OverloadedError,
    Prediction,
    deadline_exceeded,
    input_spec,
    unavailable,
)

_Answer = TypeVar("_Answer")


class GrpcTransport:
    """TensorFlow Serving's PredictionService and ModelService over one channel."""

    def __init__(self, address: str) -> None:
        self._target = f"grpc://{address}"
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.enable_http_proxy", 0),
                # serving.retries repeats what is safe to repeat; by default a channel whose connection was
                # refused fails every call for a whole second before it looks again.
                ("grpc.enable_retries", 0),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 5_000),
            ],
        )
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._model = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def input_specs(self, model: str, timeout_s: float) -> dict[str, InputSpec]:
        """See Transport."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = model
        response = self._call(self._prediction.GetModelMetadata, request, timeout_s)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        if "serving_default" not in signatures.signature_def:
            raise ServingError(f"{self._target}: model {model!r} has no signature serving_default")
        return {
            name: input_spec(name, types_pb2.DataType.Name(info.dtype), len(info.tensor_shape.dim))
            for name, info in signatures.signature_def["serving_default"].inputs.items()
        }

    def predict(
        self, model: str, inputs: Mapping[str, Any], specs: Mapping[str, InputSpec], timeout_s: float
    ) -> Prediction:
        """See Transport."""
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model
        for name, value in inputs.items():
            dtype = types_pb2.DataType.Value(specs[name].dtype)
            try:
                request.inputs[name].CopyFrom(tf.make_tensor_proto(value, dtype))
            except (ValueError, TypeError, OverflowError) as error:
                raise BadRequestError(f"{name!r} does not fit {specs[name].dtype}: {error}") from error
        response = self._call(self._prediction.Predict, request, timeout_s)
        outputs = {name: _as_lists(proto) for name, proto in response.outputs.items()}
        return Prediction(outputs, response.model_spec.version.value)

    def available_versions(self, model: str, timeout_s: float) -> list[int]:
        """See Transport."""
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = model
        response = self._call(self._model.GetModelStatus, request, timeout_s)
        available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
        return [status.version for status in response.model_version_status if status.state == available]

    def close(self) -> None:
        """See Transport."""
        self._channel.close()

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


def _as_lists(proto: Any) -> Any:
    array = tf.make_ndarray(proto)
    if array.dtype != object:
        return array.tolist()
    return _decode(array.tolist())


def _decode(value: Any) -> Any:
    return [_decode(item) for item in value] if isinstance(value, list) else value.decode(errors="replace")
