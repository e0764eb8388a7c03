"""Asks a model server the golden requests of a bundle, over gRPC and over REST."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc
import httpx
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from schema.errors import ServingError
from trainer.golden import GoldenRequest, check_answer

_TIMEOUT_S: Final = 60.0
_UNLIMITED: Final = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


def check_golden_requests(
    model: str, requests: Sequence[GoldenRequest], grpc_target: str, rest_target: str
) -> None:
    """Asks a server the golden requests of a model, over both protocols.

    Args:
      model: name of the model on the server.
      requests: see `trainer.golden.read_golden_requests`.
      grpc_target: `grpc://host:port`.
      rest_target: `http://host:port`.

    Raises:
      ServingError: the server does not answer, or not as the trained model did.
    """
    with (
        grpc.insecure_channel(grpc_target.removeprefix("grpc://"), options=_UNLIMITED) as channel,
        httpx.Client(base_url=rest_target, timeout=_TIMEOUT_S, trust_env=False) as rest,
    ):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for golden in requests:
            check_answer(golden, _ask_grpc(stub, model, golden), f"model {model!r} over gRPC")
            check_answer(golden, _ask_rest(rest, model, golden), f"model {model!r} over REST")


def _ask_grpc(
    stub: prediction_service_pb2_grpc.PredictionServiceStub, model: str, golden: GoldenRequest
) -> dict[str, npt.NDArray[Any]]:
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = model, golden.signature
    for name, array in golden.inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    try:
        response = stub.Predict(request, timeout=_TIMEOUT_S)
    except grpc.RpcError as error:
        raise ServingError(f"model {model!r} over gRPC refuses a golden request: {error}") from error
    return {name: tf.make_ndarray(proto) for name, proto in response.outputs.items()}


def _ask_rest(rest: httpx.Client, model: str, golden: GoldenRequest) -> dict[str, npt.NDArray[Any]]:
    inputs = {name: _to_json(array) for name, array in golden.inputs.items()}
    # httpx' own encoder refuses NaN, which stands for a missing number and goes as a bare token.
    body = json.dumps({"signature_name": golden.signature, "inputs": inputs})
    try:
        response = rest.post(f"/v1/models/{model}:predict", content=body)
    except httpx.HTTPError as error:
        raise ServingError(f"model {model!r} over REST does not answer a golden request: {error}") from error
    if response.is_error:
        raise ServingError(f"model {model!r} over REST refuses a golden request: {response.text}")
    outputs: Mapping[str, Any] = response.json()["outputs"]
    return {name: _from_json(value, golden.outputs.get(name)) for name, value in outputs.items()}


def _to_json(array: npt.NDArray[Any]) -> Any:
    if array.dtype == object:
        return np.vectorize(lambda text: text.decode() if isinstance(text, bytes) else text, [object])(
            array
        ).tolist()
    return array.tolist()


def _from_json(value: Any, like: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    array = np.array(value)
    if like is None or like.dtype != object:
        return array
    return np.char.encode(array.astype(str), "utf-8").astype(object)
