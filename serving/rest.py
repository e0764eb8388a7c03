"""REST: predict, status and metadata of TensorFlow Serving's HTTP API, over aiohttp."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Final

import numpy as np
import tensorflow as tf
from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import Message
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2

from serving.grpc_service import SIGNATURE_FIELD, model_metadata, model_status
from serving.json_codec import decode_predict_request, encode_error, encode_predict_response
from serving.loader import ModelManager
from serving.servable import Servable
from serving.status import RequestError

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES: Final = 2**30
_MODEL: Final = r"/v1/models/{model:[^/:]+}"
_VERSION: Final = r"/versions/{version:\d{1,18}}"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(models: ModelManager, executor: Executor) -> web.Application:
    """Returns the REST application.

    Args:
      models: loaded models.
      executor: threads that decode, run and encode a request, so that a slow one does not hold up the others.
    """
    handlers = _Handlers(models, executor)
    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_errors_as_json])
    for prefix in (_MODEL, _MODEL + _VERSION):
        app.router.add_post(prefix + ":predict", handlers.predict)
        app.router.add_post(prefix + ":{method:classify|regress}", handlers.not_built)
        app.router.add_get(prefix, handlers.status)
        app.router.add_get(prefix + "/metadata", handlers.metadata)
    return app


class _Handlers:
    def __init__(self, models: ModelManager, executor: Executor) -> None:
        self._models = models
        self._executor = executor

    async def predict(self, request: web.Request) -> web.Response:
        spec, body = _model_spec(request), await request.read()
        loop = asyncio.get_running_loop()
        return _json_response(await loop.run_in_executor(self._executor, self._predict, spec, body))

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

    async def not_built(self, request: web.Request) -> web.Response:
        method = request.match_info["method"]
        raise web.HTTPNotImplemented(
            text=f"{method} is not built into this server; call a signature with :predict"
        )

    def _predict(self, spec: model_pb2.ModelSpec, body: bytes) -> bytes:
        servable = self._models.servable(spec)
        request = decode_predict_request(body, lambda signature_name: _input_dtypes(servable, signature_name))
        return encode_predict_response(
            servable.predict(request.signature_name, request.inputs), request.format
        )


def _input_dtypes(servable: Servable, signature_name: str) -> Mapping[str, np.dtype[Any]]:
    inputs = servable.signature(signature_name).inputs
    return {name: np.dtype(tf.as_dtype(info.dtype).as_numpy_dtype) for name, info in inputs.items()}


def _model_spec(request: web.Request) -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=request.match_info["model"])
    if "version" in request.match_info:
        spec.version.value = int(request.match_info["version"])
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
