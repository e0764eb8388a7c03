"""gRPC: PredictionService and ModelService on the loaded models."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Final, NoReturn, Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc._cython import cygrpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from schema.errors import ConfigError
from serving import inference, metrics
from serving.batching import Batcher
from serving.config import parse_model_config
from serving.inference import Call
from serving.manager import ModelManager
from serving.predict_request import PredictRequest
from serving.servable import Servable
from serving.status import RequestError, deadline_exceeded, invalid_argument, short_text
from serving.thread_pool import ThreadPool

logger = logging.getLogger(__name__)


def _is_ours(record: logging.LogRecord) -> bool:
    """False for the stack trace that grpc logs where a client has gone: they would fill the disk."""
    return record.exc_info is None or not isinstance(record.exc_info[1], cygrpc.ExecuteBatchError)


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)

SIGNATURE_FIELD: Final = "signature_def"

Reload: TypeAlias = Callable[
    [model_management_pb2.ReloadConfigRequest], Awaitable[model_management_pb2.ReloadConfigResponse]
]


class _Sized(Protocol):
    """A protobuf message, or PredictRequest."""

    def ByteSize(self) -> int:
        """Bytes that it takes, or about as many."""


_Request = TypeVar("_Request", bound=_Sized)
_Answer = TypeVar("_Answer")


def add_services(
    server: grpc.aio.Server,
    models: ModelManager,
    threads: ThreadPool,
    loader: Executor,
    *,
    batcher: Batcher | None = None,
    reload: Reload | None = None,
    check_method_name: bool = False,
    stopping: asyncio.Event | None = None,
    max_calls: int = 1000,
    max_control_calls: int = 100,
    message_timeout_s: float = 60.0,
) -> None:
    """Registers both services. Methods not defined here, such as PredictStreamed, answer UNIMPLEMENTED.

    Args:
      server: not started yet.
      models: the loaded models.
      threads: run models. A call that still waits for one when its deadline passes, or when the
        client has gone, is dropped; one that runs goes on, for nobody.
      loader: the thread that loads configs, which takes seconds and must not keep requests waiting.
      batcher: runs requests together; None runs each alone.
      reload: has a config loaded; by default by `models` alone.
      check_method_name: see `inference.classify`.
      stopping: once set, calls that come are refused with UNAVAILABLE.
      max_calls: calls that are read, wait for a thread, run or are being sent; others get RESOURCE_EXHAUSTED.
      max_control_calls: the same for ModelService and GetModelMetadata, which have places of their own: a
        server full of requests still answers probes, and can be rolled back.
      message_timeout_s: time in which the message of a call must be there, else DEADLINE_EXCEEDED: a client
        without a deadline would otherwise hold its place among the calls at once for ever.
    """
    stopping = stopping or asyncio.Event()
    bounded = functools.partial(_method, stopping=stopping, message_timeout_s=message_timeout_s)
    method = functools.partial(bounded, places=_Places(max_calls))
    control = functools.partial(bounded, places=_Places(max_control_calls))
    prediction = PredictionService(models, threads, batcher, check_method_name)
    model = ModelService(models, loader, reload)
    for service, methods in (
        (
            "tensorflow.serving.PredictionService",
            [
                method(prediction.Predict, PredictRequest.FromString),
                method(prediction.Classify, classification_pb2.ClassificationRequest.FromString),
                method(prediction.Regress, regression_pb2.RegressionRequest.FromString),
                method(prediction.MultiInference, inference_pb2.MultiInferenceRequest.FromString),
                control(
                    prediction.GetModelMetadata, get_model_metadata_pb2.GetModelMetadataRequest.FromString
                ),
            ],
        ),
        (
            "tensorflow.serving.ModelService",
            [
                control(model.GetModelStatus, get_model_status_pb2.GetModelStatusRequest.FromString),
                control(model.HandleReloadConfigRequest, model_management_pb2.ReloadConfigRequest.FromString),
            ],
        ),
    ):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, dict(methods)),))


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predict, Classify, Regress, MultiInference and GetModelMetadata."""

    def __init__(
        self, models: ModelManager, threads: ThreadPool, batcher: Batcher | None, check_method_name: bool
    ) -> None:
        self._models = models
        self._threads = threads
        self._batcher = batcher
        self._classify = functools.partial(inference.classify, check_method_name=check_method_name)
        self._regress = functools.partial(inference.regress, check_method_name=check_method_name)
        self._multi_inference = functools.partial(
            inference.multi_inference, check_method_name=check_method_name
        )

    async def Predict(self, request: PredictRequest, context: grpc.aio.ServicerContext) -> bytes:
        """Runs a signature; the answer, a serialized PredictResponse, names the version and signature."""
        return await self._infer(context, "Predict", request, request.model_spec, inference.predict)

    async def Classify(
        self, request: classification_pb2.ClassificationRequest, context: grpc.aio.ServicerContext
    ) -> classification_pb2.ClassificationResponse:
        """Gives classes and scores for tf.Examples."""
        return await self._infer(context, "Classify", request, request.model_spec, self._classify)

    async def Regress(
        self, request: regression_pb2.RegressionRequest, context: grpc.aio.ServicerContext
    ) -> regression_pb2.RegressionResponse:
        """Gives one number for each tf.Example."""
        return await self._infer(context, "Regress", request, request.model_spec, self._regress)

    async def MultiInference(
        self, request: inference_pb2.MultiInferenceRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.MultiInferenceResponse:
        """Runs several classifications and regressions of one model on the same tf.Examples."""
        spec = request.tasks[0].model_spec if request.tasks else model_pb2.ModelSpec()
        return await self._infer(context, "MultiInference", request, spec, self._multi_inference)

    async def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Returns the signatures of a model."""
        return await _answer(context, _at_once(model_metadata, self._models, request))

    async def _infer(
        self,
        context: grpc.aio.ServicerContext,
        api: str,
        request: _Request,
        spec: model_pb2.ModelSpec,
        read: Callable[[Servable, _Request], Call[_Answer]],
    ) -> _Answer:
        started = time.perf_counter()
        code = grpc.StatusCode.CANCELLED
        try:
            answer = await self._run(request, spec, read)
            code = grpc.StatusCode.OK
            return answer
        except Exception as error:
            code = error.code if isinstance(error, RequestError) else grpc.StatusCode.INTERNAL
            await _abort(context, error)
        finally:
            model = spec.name if self._models.is_served(spec.name) else ""
            metrics.record_request(model, api, "GRPC", code, time.perf_counter() - started)

    async def _run(
        self,
        request: _Request,
        spec: model_pb2.ModelSpec,
        read: Callable[[Servable, _Request], Call[_Answer]],
    ) -> _Answer:
        if self._batcher is None:
            return await self._threads.submit(lambda: read(self._models.servable(spec), request).run())
        servable = self._models.servable(spec)
        call = await inference.small_inline(request.ByteSize(), read, servable, request)
        return await call.run_batched(self._batcher)


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus and HandleReloadConfigRequest."""

    def __init__(self, models: ModelManager, loader: Executor, reload: Reload | None) -> None:
        self._models = models
        self._loader = loader
        self._reload = reload or self._reload_here

    async def GetModelStatus(
        self, request: get_model_status_pb2.GetModelStatusRequest, context: grpc.aio.ServicerContext
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """Returns the state of one version, or of all versions of a model."""
        # Not in a thread: a probe must not wait behind what is slow.
        return await _answer(context, _at_once(model_status, self._models, request))

    async def HandleReloadConfigRequest(
        self, request: model_management_pb2.ReloadConfigRequest, context: grpc.aio.ServicerContext
    ) -> model_management_pb2.ReloadConfigResponse:
        """Serves what the config in the request names, and only that; answers when it is loaded."""
        return await _answer(context, self._reload(request))

    async def _reload_here(
        self, request: model_management_pb2.ReloadConfigRequest
    ) -> model_management_pb2.ReloadConfigResponse:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader, reload_config, self._models, request)


def model_metadata(
    models: ModelManager, request: get_model_metadata_pb2.GetModelMetadataRequest
) -> get_model_metadata_pb2.GetModelMetadataResponse:
    """Answers GetModelMetadata; shared with REST.

    Raises:
      RequestError: INVALID_ARGUMENT for a field other than `signature_def`, NOT_FOUND for a model not loaded.
    """
    if not request.metadata_field or set(request.metadata_field) != {SIGNATURE_FIELD}:
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


def reload_config(
    models: ModelManager, request: model_management_pb2.ReloadConfigRequest, check_labels: bool = True
) -> model_management_pb2.ReloadConfigResponse:
    """Answers HandleReloadConfigRequest; `check_labels` as in ModelManager.load.

    Raises:
      RequestError: INVALID_ARGUMENT for a config that is refused, or one that is no model_config_list; and
        whatever ModelManager.load raises.
    """
    if request.config.WhichOneof("config") != "model_config_list":
        raise invalid_argument("the config of a reload request must be a model_config_list")
    try:
        configs = parse_model_config(request.config)
    except ConfigError as error:
        raise invalid_argument(str(error)) from error
    models.load(configs, check_labels=check_labels)
    return model_management_pb2.ReloadConfigResponse()


class _Places:
    """How many calls there may be at once; for the event loop alone.

    `maximum_concurrent_rpcs` of grpc.aio.server (1.65) does not hold: each refusal makes room for one more.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._num_taken = 0

    def take(self, context: grpc.aio.ServicerContext) -> None:
        """Takes a place until the answer is sent.

        Raises:
          RequestError: RESOURCE_EXHAUSTED, all are taken.
        """
        if self._num_taken >= self._number:
            full = f"{self._number} calls are being answered; try again later"
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, full)
        self._num_taken += 1
        context.add_done_callback(self._leave)

    def _leave(self, context: grpc.aio.ServicerContext) -> None:
        self._num_taken -= 1


def _method(
    answer: Callable[[_Request, grpc.aio.ServicerContext], Awaitable[Message | bytes]],
    read: Callable[[bytes], _Request],
    *,
    stopping: asyncio.Event,
    places: _Places,
    message_timeout_s: float,
) -> tuple[str, grpc.RpcMethodHandler]:
    """Name and handler of a method, as generated code registers it, but for two things.

    To bytes that are no such message gRPC would answer UNKNOWN, and log a stack trace for each. And it would
    wait for a message as long as the connection lasts: a method that takes a stream, which on the wire is the
    same, reads its one message itself.
    """

    async def call(
        messages: object, context: grpc.aio.ServicerContext[bytes, Message | bytes]
    ) -> Message | bytes:
        try:
            if stopping.is_set():
                raise RequestError(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
            places.take(context)
            request = read(await _read_message(context, message_timeout_s))
        except RequestError as error:
            await _abort(context, error)
        except DecodeError as error:
            await _abort(
                context, invalid_argument(f"the message is not one that {answer.__name__} takes: {error}")
            )
        return await answer(request, context)

    def encode(message: Message | bytes) -> bytes:
        return message if isinstance(message, bytes) else message.SerializeToString()

    return answer.__name__, grpc.stream_unary_rpc_method_handler(call, response_serializer=encode)


async def _read_message(context: grpc.aio.ServicerContext, timeout_s: float) -> bytes:
    """Returns the first message of a call.

    By a timer of its own, which takes 2 µs; `async_timeout` takes 5, and `asyncio.wait_for`, which makes a
    task, 7. The timer tells that it has run: by uvloop's clock it may do so a rounding before its time.

    Raises:
      RequestError: DEADLINE_EXCEEDED, it did not come in time; INVALID_ARGUMENT, the call ended without one.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = loop.call_later(timeout_s, expire)
    try:
        message = await context.read()
    except asyncio.CancelledError:
        if not expired:  # the client has gone
            raise
        raise deadline_exceeded(f"the message was not complete after {timeout_s:g} s") from None
    finally:
        timer.cancel()
    if not isinstance(message, bytes):
        raise invalid_argument("the call ended without a message")
    return message


async def _at_once(function: Callable[..., _Answer], *args: object) -> _Answer:
    return function(*args)


async def _answer(context: grpc.aio.ServicerContext, call: Awaitable[_Answer]) -> _Answer:
    try:
        return await call
    except Exception as error:
        await _abort(context, error)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    if isinstance(error, RequestError):
        await context.abort(error.code, str(error))
    else:
        logger.error("request failed", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, short_text(f"{type(error).__name__}: {error}"))
    raise AssertionError("unreachable: abort raises")
