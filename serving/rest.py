"""REST: TensorFlow Serving's HTTP API on the loaded models, over aiohttp."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
import numpy as np
import tensorflow as tf
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from google.protobuf import json_format
from google.protobuf.message import Message
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    regression_pb2,
)

from serving import inference, metrics
from serving.batching import Batcher
from serving.grpc_service import SIGNATURE_FIELD, model_metadata, model_status
from serving.inference import Call
from serving.json_body import encode_error
from serving.json_codec import decode_predict_request, encode_predict_response
from serving.json_examples import (
    decode_examples_request,
    encode_classifications,
    encode_regressions,
)
from serving.manager import ModelManager
from serving.servable import Servable
from serving.status import RequestError, deadline_exceeded, invalid_argument
from serving.thread_pool import ThreadPool

logger = logging.getLogger(__name__)

_MODEL: Final = r"/v1/models/{model:[^/:]+}"
_CHOICES: Final = ("", r"/versions/{version:\d{1,19}}", r"/labels/{label:[^/:]+}")
_GZIP: Final = 31  # zlib's number for it
# Bytes that are unpacked in one go: at the end of a member zlib copies what is left of them.
_PIECE_BYTES: Final = 2**16
_MAX_GZIP_MEMBERS: Final = 10_000  # an empty one has 20 bytes, and takes microseconds
_INT64_MAX: Final = 2**63 - 1
# How long the rest of a refused body is read and dropped, so that the client gets to see the refusal.
_LINGERING_S: Final = 1.0
_CORS_HEADERS: Final = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST, GET",
    "Access-Control-Allow-Headers": "Content-Type",
}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _is_ours(record: logging.LogRecord) -> bool:
    """False for the stack trace that aiohttp logs of bytes that are no HTTP: it would fill the disk."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


_http_logger = logging.getLogger(f"{__name__}.http")
_http_logger.addFilter(_is_ours)


@dataclass(frozen=True)
class RestSettings:
    """How REST answers, and its limits.

    Args:
      timeout_s: time for one call, then 504; None for no limit.
      check_method_name: see `inference.classify`.
      enable_cors: whether browsers of other sites may ask.
      metrics_path: URL path of the Prometheus metrics, None for none.
      max_concurrent_requests: requests to a model that are read, wait or run at the same time; more get 429.
      max_body_bytes: size of a request body, unpacked; more is 413.
      body_timeout_s: time in which a request body must be there, else 408.
      idle_timeout_s: time in which a connection must send a whole request head, else it is closed.
    """

    timeout_s: float | None = 30.0
    check_method_name: bool = False
    enable_cors: bool = False
    metrics_path: str | None = None
    max_concurrent_requests: int = 1000
    max_body_bytes: int = 2**27
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0


def create_runner(
    models: ModelManager,
    threads: ThreadPool,
    settings: RestSettings,
    shutdown_timeout_s: float,
    batcher: Batcher | None = None,
) -> web.AppRunner:
    """Returns what runs the REST API.

    Args:
      models: the loaded models.
      threads: decode, run and encode requests, so that a slow one does not hold up the others.
      settings: limits and options.
      shutdown_timeout_s: time for requests in flight to finish, once it is asked to stop.
      batcher: runs requests together; None runs each alone.
    """
    handlers = _Handlers(models, threads, settings, batcher)
    middlewares = [_errors_as_json]
    if settings.enable_cors:
        middlewares.insert(0, _with_cors_headers)
    app = web.Application(client_max_size=settings.max_body_bytes, middlewares=middlewares)
    if settings.metrics_path is not None:
        app.router.add_get(settings.metrics_path, handlers.metrics)
    app.router.add_get("/v1/models", handlers.no_model)
    for choice in _CHOICES:
        prefix = _MODEL + choice
        app.router.add_post(prefix + ":{method:predict|classify|regress}", handlers.infer)
        app.router.add_get(prefix, handlers.status)
        app.router.add_get(prefix + "/metadata", handlers.metadata)
    return web.AppRunner(
        app,
        access_log=None,
        logger=_http_logger,
        shutdown_timeout=shutdown_timeout_s,
        keepalive_timeout=settings.idle_timeout_s,  # aiohttp holds a head that does not end to it as well
        lingering_time=_LINGERING_S,
        auto_decompress=False,  # it unpacks a body of megabytes into gigabytes before anybody can refuse it
    )


class _Handlers:
    def __init__(
        self, models: ModelManager, threads: ThreadPool, settings: RestSettings, batcher: Batcher | None
    ) -> None:
        self._models = models
        self._batcher = batcher
        self._threads = threads
        self._settings = settings
        self._num_requests = 0
        self._methods = {"predict": _predict, "classify": self._classify, "regress": self._regress}

    async def infer(self, request: web.Request) -> web.Response:
        # Before the body is read: it is what holds memory.
        if self._num_requests >= self._settings.max_concurrent_requests:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the server has {self._num_requests} requests at once, its limit; try again later",
            )
        self._num_requests += 1
        try:
            return await self._infer(request)
        finally:
            self._num_requests -= 1

    async def _infer(self, request: web.Request) -> web.Response:
        method, spec = request.match_info["method"], _model_spec(request)
        body = await self._read(request)
        started = time.perf_counter()
        code = grpc.StatusCode.INTERNAL
        try:
            answer = await self._within_timeout(self._run(self._methods[method], spec, body))
            code = grpc.StatusCode.OK
            return _json_response(answer)
        except RequestError as error:
            code = error.code
            raise
        finally:
            model = spec.name if self._models.is_served(spec.name) else ""
            metrics.record_request(model, method, "REST", code, time.perf_counter() - started)

    async def status(self, request: web.Request) -> web.Response:
        status_request = get_model_status_pb2.GetModelStatusRequest(model_spec=_model_spec(request))
        return _json_response(_dump(_message_as_dict(model_status(self._models, status_request))))

    async def metadata(self, request: web.Request) -> web.Response:
        metadata_request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=_model_spec(request), metadata_field=[SIGNATURE_FIELD]
        )
        response = model_metadata(self._models, metadata_request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata[SIGNATURE_FIELD].Unpack(signatures)
        # The official server prints the packed message in place, without an "@type".
        return _json_response(
            _dump(
                {
                    "model_spec": _message_as_dict(response.model_spec),
                    "metadata": {SIGNATURE_FIELD: _message_as_dict(signatures)},
                }
            )
        )

    async def no_model(self, request: web.Request) -> web.Response:
        raise invalid_argument("Missing model name in request.")

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _read(self, request: web.Request) -> bytes:
        limit = self._settings.max_body_bytes
        if request.content_length is not None and request.content_length > limit:
            raise web.HTTPRequestEntityTooLarge(limit, request.content_length)
        try:
            body = await asyncio.wait_for(request.read(), self._settings.body_timeout_s)
        except asyncio.TimeoutError as error:
            raise web.HTTPRequestTimeout(
                text=f"the request body was not complete after {self._settings.body_timeout_s:g} s"
            ) from error
        except ConnectionError as error:
            raise RequestError(grpc.StatusCode.CANCELLED, "the client has gone") from error

        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding == "identity":
            return body
        if encoding != "gzip":
            raise web.HTTPUnsupportedMediaType(text=f"Content-Encoding must be gzip, got {encoding!r}")
        return await asyncio.to_thread(_unpack, body, limit)

    async def _within_timeout(self, call: Awaitable[bytes]) -> bytes:
        try:
            # One that still waits for a thread is dropped; one that runs goes on, for nobody.
            return await asyncio.wait_for(call, self._settings.timeout_s)
        except asyncio.TimeoutError as error:
            raise deadline_exceeded(f"no answer after {self._settings.timeout_s:g} s") from error

    async def _run(
        self, read: Callable[[Servable, model_pb2.ModelSpec, bytes], Call[bytes]],
        spec: model_pb2.ModelSpec, body: bytes,
    ) -> bytes:  # fmt: skip
        if self._batcher is None:
            return await self._threads.submit(lambda: read(self._models.servable(spec), spec, body).run())
        servable = self._models.servable(spec)
        call = await inference.small_inline(len(body), read, servable, spec, body)
        return await call.run_batched(self._batcher)

    def _classify(self, servable: Servable, spec: model_pb2.ModelSpec, body: bytes) -> Call[bytes]:
        signature_name, examples = decode_examples_request(body)
        request = classification_pb2.ClassificationRequest(model_spec=spec, input=examples)
        request.model_spec.signature_name = signature_name
        call = inference.classify(servable, request, check_method_name=self._settings.check_method_name)
        return call.then(lambda response: encode_classifications(response.result))

    def _regress(self, servable: Servable, spec: model_pb2.ModelSpec, body: bytes) -> Call[bytes]:
        signature_name, examples = decode_examples_request(body)
        request = regression_pb2.RegressionRequest(model_spec=spec, input=examples)
        request.model_spec.signature_name = signature_name
        call = inference.regress(servable, request, check_method_name=self._settings.check_method_name)
        return call.then(lambda response: encode_regressions(response.result))


def _predict(servable: Servable, spec: model_pb2.ModelSpec, body: bytes) -> Call[bytes]:
    request = decode_predict_request(body, lambda signature_name: _input_dtypes(servable, signature_name))
    return Call(
        servable, "Predict", [request.signature_name], request.inputs,
        lambda outputs: encode_predict_response(outputs[0], request.format),
    )  # fmt: skip


def _unpack(body: bytes, limit: int) -> bytes:
    """Unpacks the gzip members of a body, of which there may be several (RFC 1952), and joins them."""
    packed, start = memoryview(body), 0
    parts: list[bytes] = []
    room = limit
    for number in range(1, _MAX_GZIP_MEMBERS + 1):
        unpacker = zlib.decompressobj(wbits=_GZIP)
        while not unpacker.eof:
            piece = packed[start : start + _PIECE_BYTES]
            if not piece:
                raise invalid_argument(f"the body is not gzip: member {number}: it is cut short")
            try:
                parts.append(unpacker.decompress(piece, room + 1))
            except zlib.error as error:
                raise invalid_argument(f"the body is not gzip: member {number}: {error}") from error
            room -= len(parts[-1])
            if room < 0:
                raise web.HTTPRequestEntityTooLarge(limit, limit - room)
            start += len(piece) - len(unpacker.unused_data)
        if start == len(body):
            return b"".join(parts)
    raise invalid_argument(f"the body has more than {_MAX_GZIP_MEMBERS:,} gzip members")


def _input_dtypes(servable: Servable, signature_name: str) -> Mapping[str, np.dtype[Any]]:
    inputs = servable.signature(signature_name).inputs
    return {name: np.dtype(tf.as_dtype(info.dtype).as_numpy_dtype) for name, info in inputs.items()}


def _model_spec(request: web.Request) -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=request.match_info["model"])
    if "version" in request.match_info:
        version = int(request.match_info["version"])
        if version > _INT64_MAX:
            raise invalid_argument(f"Failed to convert version: {version} to numeric.")
        spec.version.value = version
    if "label" in request.match_info:
        spec.version_label = request.match_info["label"]
    return spec


def _message_as_dict(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(  # type: ignore[call-arg]  # the stubs are of protobuf 5
        message, including_default_value_fields=True, preserving_proto_field_name=True
    )


def _dump(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def _json_response(body: bytes, http_code: int = 200) -> web.Response:
    return web.Response(body=body, status=http_code, content_type="application/json")


@web.middleware
async def _errors_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Gives every error the documented body, {"error": text}."""
    try:
        return await handler(request)
    except RequestError as error:
        return _json_response(encode_error(str(error)), error.http_code)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
        # Below /v1/ the official server calls a path that it does not know a malformed request.
        http_code = 400 if request.path.startswith("/v1/") else 404
        return _json_response(encode_error(f"Malformed request: {request.method} {request.path}"), http_code)
    except web.HTTPException as error:
        return _json_response(encode_error(error.text or error.reason), error.status)
    except Exception as error:
        logger.exception("request failed path=%s", request.path)
        return _json_response(encode_error(f"{type(error).__name__}: {error}"), 500)


@web.middleware
async def _with_cors_headers(request: web.Request, handler: _Handler) -> web.StreamResponse:
    if request.method == "OPTIONS" and request.path.startswith("/v1/"):
        return web.Response(headers=_CORS_HEADERS)
    response = await handler(request)
    response.headers.update(_CORS_HEADERS)
    return response
