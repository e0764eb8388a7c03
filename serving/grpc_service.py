"""gRPC: PredictionService (Predict, GetModelMetadata), ModelService (GetModelStatus) on the loaded models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, TypeVar

import grpc
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving.loader import ModelManager
from serving.servable import DEFAULT_SIGNATURE
from serving.status import RequestError, invalid_argument
from serving.tensors import encode_tensor

logger = logging.getLogger(__name__)

SIGNATURE_FIELD: Final = "signature_def"

_Answer = TypeVar("_Answer")


def add_services(server: grpc.aio.Server, models: ModelManager, executor: Executor) -> None:
    """Registers both services. Methods not defined here answer UNIMPLEMENTED.

    Args:
      server: its migration pool runs the methods that are not coroutines.
      models: loaded models.
      executor: threads that run Predict.
    """
    service = PredictionService(models, executor)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(models), server)


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predict and GetModelMetadata."""

    def __init__(self, models: ModelManager, executor: Executor) -> None:
        self._models = models
        self._executor = executor

    async def Predict(
        self, request: predict_pb2.PredictRequest, context: grpc.aio.ServicerContext
    ) -> predict_pb2.PredictResponse:
        """Runs a signature; the answer names the version and signature that gave it."""
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._executor, self._predict, request)
        except RequestError as error:
            return await context.abort(error.code, str(error))
        except Exception as error:
            logger.exception("request failed")
            return await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"[:1000])

    def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: grpc.ServicerContext
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Returns the signatures of a model."""
        return _answer(context, lambda: model_metadata(self._models, request))

    def _predict(self, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
        servable = self._models.servable(request.model_spec)
        outputs = servable.predict_request(request)
        response = predict_pb2.PredictResponse()
        response.model_spec.name = servable.name
        response.model_spec.version.value = servable.version
        response.model_spec.signature_name = request.model_spec.signature_name or DEFAULT_SIGNATURE
        for name, array in outputs.items():
            encode_tensor(array, response.outputs[name])
        return response


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus."""

    def __init__(self, models: ModelManager) -> None:
        self._models = models

    def GetModelStatus(
        self, request: get_model_status_pb2.GetModelStatusRequest, context: grpc.ServicerContext
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """Returns the state of one version, or of all versions of a model."""
        return _answer(context, lambda: model_status(self._models, request))


def model_metadata(
    models: ModelManager, request: get_model_metadata_pb2.GetModelMetadataRequest
) -> get_model_metadata_pb2.GetModelMetadataResponse:
    """Answers GetModelMetadata; shared with REST.

    Raises:
      RequestError: INVALID_ARGUMENT for a field other than `signature_def`, NOT_FOUND for a model not loaded.
    """
    if list(request.metadata_field) != [SIGNATURE_FIELD]:
        raise invalid_argument(
            f"metadata_field must be ['{SIGNATURE_FIELD}'], got {list(request.metadata_field)}"
        )
    servable = models.servable(request.model_spec)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    for name, signature in servable.signature_defs.items():
        signatures.signature_def[name].CopyFrom(signature)
    response = get_model_metadata_pb2.GetModelMetadataResponse()
    response.model_spec.name = servable.name
    response.model_spec.version.value = servable.version
    response.metadata[SIGNATURE_FIELD].Pack(signatures)
    return response


def model_status(
    models: ModelManager, request: get_model_status_pb2.GetModelStatusRequest
) -> get_model_status_pb2.GetModelStatusResponse:
    """Answers GetModelStatus; shared with REST.

    Raises:
      RequestError: NOT_FOUND for an unknown model or version.
    """
    response = get_model_status_pb2.GetModelStatusResponse()
    for version, status in models.statuses(request.model_spec).items():
        entry = response.model_version_status.add(version=version, state=status.state)
        entry.status.error_code = status.code.value[0]
        entry.status.error_message = status.message
    return response


def _answer(context: grpc.ServicerContext, call: Callable[[], _Answer]) -> _Answer:
    try:
        return call()
    except RequestError as error:
        context.abort(error.code, str(error))
    except Exception as error:
        logger.exception("request failed")
        context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"[:1000])
    raise AssertionError("unreachable: abort raises")
