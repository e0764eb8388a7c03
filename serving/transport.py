"""How the client reaches a server: one interface, and the REST side of it. Imports no TensorFlow."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import httpx

from schema.errors import ConfigError, ServingError

Kind = Literal["string", "integer", "float"]


DEFAULT_SIGNATURE: Final = "serving_default"
# As `serving_default` of a ranking model, with `score_weights` float32 [B, T].
WEIGHTED_SIGNATURE: Final = "serving_weighted"
# Cuts candidates before they are ranked.
PRE_RANK_SIGNATURE: Final = "pre_rank"
# In: `columns` int32 [B], out: `tasks` string [B] and `weights` float32 [B]; see trainer.ranking_export.
TASKS_SIGNATURE: Final = "score_tasks"
# In: `parts` string [B], out: `fingerprints` string [B].
FINGERPRINT_SIGNATURE: Final = "fingerprint"
# What the client may ask of a model.
_SIGNATURES: Final = (
    DEFAULT_SIGNATURE, WEIGHTED_SIGNATURE, PRE_RANK_SIGNATURE, TASKS_SIGNATURE, FINGERPRINT_SIGNATURE,
)  # fmt: skip

# A connection idle for longer is closed: after 75 s the server does so (RestSettings.idle_timeout_s), perhaps
# just as a request is sent on it.
_MAX_IDLE_S: Final = 60.0


class ServerUnavailableError(ServingError):
    """Nothing answers at the target, or the server refuses work for now."""


class OverloadedError(ServerUnavailableError):
    """The server answers, and says that it takes no more of this for now."""


class DeadlineExceededError(ServingError):
    """The time given for a call was over before the answer."""


class ModelNotFoundError(ServingError):
    """The server does not serve this model or version."""


class BadRequestError(ServingError):
    """The request does not fit the model: wrong feature, type or value."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a signature.

    Attributes:
      kind: what Python values it takes.
      dtype: name in the protos, such as `DT_FLOAT`.
      rank: dimensions, the batch included.
      width: size of the second dimension, None where it is free or absent.
    """

    kind: Kind
    dtype: str
    rank: int
    width: int | None = None


@dataclass(frozen=True)
class Prediction:
    """Outputs as nested lists, and the version that gave them (None over REST, whose answers do not tell)."""

    outputs: Mapping[str, Any]
    version: int | None


# Inputs by name, of each signature that a model has and the client may ask.
Signatures = Mapping[str, Mapping[str, InputSpec]]


class Transport(Protocol):
    """One way to call a server. All methods raise the errors of this module and take the seconds left."""

    def signatures(self, model: str, timeout_s: float) -> Signatures:
        """Returns what the model can be asked, `serving_default` at least."""

    def predict(
        self,
        model: str,
        inputs: Mapping[str, Any],
        specs: Mapping[str, InputSpec],
        timeout_s: float,
        signature: str = DEFAULT_SIGNATURE,
    ) -> Prediction:
        """Runs a signature of several outputs on nested lists."""

    def fingerprints(
        self, model: str, version: int | None, parts: Sequence[str], timeout_s: float
    ) -> Sequence[str]:
        """Runs `fingerprint`: hashes of parts, "" for those that the model does not hold.

        `version` None asks the one that has the transport's label, or the newest.
        """

    def available_versions(self, model: str, timeout_s: float) -> list[int]:
        """Returns the versions in state AVAILABLE."""

    def close(self) -> None:
        """Releases the connection."""


def open_transport(target: str, version_label: str | None = None) -> Transport:
    """Returns the transport of a target: `grpc://`, `grpcs://`, `http://` or `https://` and `host:port`.

    With a version label, it asks the version of each model that has it; otherwise the newest one. gRPC with
    TLS trusts the usual certificate authorities, or those in the file named by the environment variable
    GRPC_DEFAULT_SSL_ROOTS_FILE_PATH.

    Raises:
      ConfigError: any other form.
    """
    scheme, separator, address = target.partition("://")
    if separator and address and scheme in ("http", "https"):
        return RestTransport(target, version_label)
    if separator and address and scheme in ("grpc", "grpcs"):
        # The generated gRPC code imports TensorFlow, seconds of start-up that a REST user need not pay.
        from serving.grpc_transport import GrpcTransport

        return GrpcTransport(address, version_label, tls=scheme == "grpcs")
    raise ConfigError(
        f"target {target!r}: expected grpc://host:port or http://host:port, with TLS grpcs:// or https://, "
        "e.g. grpc://127.0.0.1:8500"
    )


def unavailable(target: str, reason: object) -> ServerUnavailableError:
    """Returns the error of a server that cannot be reached."""
    return ServerUnavailableError(
        f"no model server takes requests at {target} ({reason}); start one with `funnel serve`, or check the "
        "target"
    )


def deadline_exceeded(target: str, call: str) -> DeadlineExceededError:
    """Returns the error of a call that took too long."""
    return DeadlineExceededError(
        f"{call} at {target} did not answer in time; raise timeout_s, or look at the server's load and log"
    )


_KINDS: Final[dict[str, Kind]] = {
    "DT_STRING": "string",
    "DT_FLOAT": "float",
    "DT_DOUBLE": "float",
    **dict.fromkeys(("DT_INT64", "DT_INT32", "DT_INT16", "DT_INT8", "DT_UINT8"), "integer"),
}


def read_signatures(inputs: Mapping[str, Mapping[str, tuple[str, Sequence[int]]]], source: str) -> Signatures:
    """Describes the signatures that the client may ask.

    Args:
      inputs: dtype and sizes of the dimensions, see `input_spec`, of each input of each signature.
      source: names server and model in errors.

    Raises:
      ServingError: there is no `serving_default`, or an input that no feature could be.
    """
    if DEFAULT_SIGNATURE not in inputs:
        raise ServingError(f"{source} has no signature {DEFAULT_SIGNATURE}")
    return {
        signature: {
            name: input_spec(name, dtype, sizes) for name, (dtype, sizes) in inputs[signature].items()
        }
        for signature in _SIGNATURES
        if signature in inputs
    }


def input_spec(name: str, dtype: str, sizes: Sequence[int]) -> InputSpec:
    """Describes an input by the name of its dtype in the protos, and the sizes of its dimensions (-1: free).

    Raises:
      ServingError: a dtype that no feature has.
    """
    if dtype not in _KINDS:
        raise ServingError(
            f"input {name!r} of the model has dtype {dtype}; expected text, a float or an integer"
        )
    width = sizes[1] if len(sizes) > 1 and sizes[1] >= 0 else None
    return InputSpec(_KINDS[dtype], dtype, len(sizes), width)


class RestTransport:
    """TensorFlow Serving's REST API, over as many connections as there are calls in flight.

    Requests run on an event loop in a thread of its own: only there can a whole call, and not just each read
    of it, be given a deadline.

    Each connection is the only one of an httpx client. One client for all of them, with its default limits,
    opens a connection for nearly every call once 20 are in flight, and lets calls above 100 wait. Without
    limits it looks at each pair of idle connections for each call (httpcore 1.0.9): 64 cost 11 ms of CPU, 128
    cost 34 ms, and here nothing. aiohttp's client keeps as many as needed, but repeats GET requests on its
    own, outside RetryPolicy.
    """

    def __init__(self, target: str, version_label: str | None = None) -> None:
        self._target = target.rstrip("/")
        self._label_path = f"/labels/{version_label}" if version_label else ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rest-transport", daemon=True)
        self._thread.start()
        self._tls = httpx.create_ssl_context(trust_env=False)  # takes longer than all the rest of a client
        # With the time.monotonic() since which each is idle; the last one is taken first, so that others age.
        self._idle: deque[tuple[float, httpx.AsyncClient]] = deque()

    def signatures(self, model: str, timeout_s: float) -> Signatures:
        """See Transport."""
        metadata = self._call("GET", f"{self._path(model)}/metadata", None, timeout_s)
        try:
            inputs = {
                signature: {
                    name: (info["dtype"], [int(dim["size"]) for dim in info["tensor_shape"]["dim"]])
                    for name, info in definition["inputs"].items()
                }
                for signature, definition in metadata["metadata"]["signature_def"]["signature_def"].items()
                if signature in _SIGNATURES
            }
        except (KeyError, TypeError) as error:
            raise ServingError(f"{self._target}: metadata of model {model!r} lack {error}") from error
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
        body = {"signature_name": signature, "inputs": inputs}
        answer = self._call("POST", f"{self._path(model)}:predict", body, timeout_s)
        outputs = answer.get("outputs")
        if not isinstance(outputs, dict):
            raise ServingError(f"{self._target}: model {model!r} answered without named outputs")
        return Prediction(outputs, version=None)

    def fingerprints(
        self, model: str, version: int | None, parts: Sequence[str], timeout_s: float
    ) -> Sequence[str]:
        """See Transport."""
        path = self._path(model) if version is None else f"/v1/models/{model}/versions/{version}"
        body = {"signature_name": FINGERPRINT_SIGNATURE, "inputs": {"parts": list(parts)}}
        hashes = self._call("POST", f"{path}:predict", body, timeout_s).get("outputs")
        # A single output comes without its name.
        if not isinstance(hashes, list) or len(hashes) != len(parts):
            raise ServingError(f"{self._target}: model {model!r} does not tell its fingerprint as it should")
        return [str(value) for value in hashes]

    def available_versions(self, model: str, timeout_s: float) -> list[int]:
        """See Transport."""
        answer = self._call("GET", self._path(model), None, timeout_s)
        statuses = answer.get("model_version_status", [])
        return [int(status["version"]) for status in statuses if status["state"] == "AVAILABLE"]

    def close(self) -> None:
        """See Transport."""
        asyncio.run_coroutine_threadsafe(self._close_idle(since=math.inf), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _path(self, model: str) -> str:
        return f"/v1/models/{model}{self._label_path}"

    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> dict[str, Any]:
        # json.dumps writes NaN, which means "missing" here; the JSON writer of httpx refuses it.
        content = None if body is None else json.dumps(body).encode()
        request = self._request(method, path, content)
        try:
            response = asyncio.run_coroutine_threadsafe(
                asyncio.wait_for(request, timeout_s), self._loop
            ).result()
        except asyncio.TimeoutError as error:
            raise deadline_exceeded(self._target, f"{method} {path}") from error
        except httpx.HTTPError as error:
            raise unavailable(self._target, repr(error)) from error
        try:
            answer = json.loads(response.content)
        except ValueError as error:
            raise ServingError(
                f"{method} {path} at {self._target}: the answer is not JSON: {error}"
            ) from error
        if response.status_code == httpx.codes.OK and isinstance(answer, dict):
            return answer
        message = answer.get("error") if isinstance(answer, dict) else answer
        raise _error_of(response.status_code, f"{method} {path} at {self._target}: {message}")

    async def _request(self, method: str, path: str, content: bytes | None) -> httpx.Response:
        await self._close_idle(since=time.monotonic() - _MAX_IDLE_S)
        http = self._idle.pop()[1] if self._idle else self._new_http()
        try:
            return await http.request(method, path, content=content)
        finally:  # after an error as well, which closes the connection but not the client
            self._idle.append((time.monotonic(), http))

    async def _close_idle(self, since: float) -> None:
        while self._idle and self._idle[0][0] <= since:
            await self._idle.popleft()[1].aclose()

    def _new_http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(keepalive_expiry=None)  # _close_idle sees to that
        return httpx.AsyncClient(
            base_url=self._target, timeout=None, trust_env=False, verify=self._tls, limits=limits
        )


def _error_of(http_code: int, message: str) -> ServingError:
    if http_code == httpx.codes.BAD_REQUEST:
        return BadRequestError(message)
    if http_code == httpx.codes.NOT_FOUND:
        return ModelNotFoundError(f"{message}; check the model name and what the server serves")
    if http_code == httpx.codes.GATEWAY_TIMEOUT:
        return DeadlineExceededError(message)
    if http_code == httpx.codes.SERVICE_UNAVAILABLE:
        return ServerUnavailableError(f"{message}; try again later")
    if http_code == httpx.codes.TOO_MANY_REQUESTS:
        return OverloadedError(f"{message}; send less, or let more servers share the load")
    return ServingError(f"{message} (HTTP {http_code}); look at the server's log")
