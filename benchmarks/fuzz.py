"""Malformed and hostile requests to a real server for some time: what it answers, and what it costs it.

Clients in threads send, over REST and gRPC, whole requests, requests with random bytes changed, values and
shapes made to hurt, made-up models, and connections that say nothing, stop half way or are reset. The command
fails when the server ends, does not answer a whole request in time, answers with an error of its own
(INTERNAL, 500), logs a stack trace, or when its memory, files or threads grew over the second half.

Example:
  python -m benchmarks.fuzz --minutes 10
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import random
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import grpc
import psutil
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    predict_pb2,
    regression_pb2,
)

from benchmarks.served_models import save_half_plus_three
from serving.process import ModelServerProcess

_MODEL: Final = "half_plus_three"
_SAMPLES: Final = 10
_TIMEOUT_S: Final = 20.0
_SLOW_S: Final = 5.0
# What the server may grow by over the second half: a leak of .4 kB a request would be more in ten minutes.
_MAX_GROWTH_MB: Final = 30.0
_MAX_MORE_FILES: Final = 10
_MAX_MORE_THREADS: Final = 4
# Codes that a request may end with.
_GRPC_CODES: Final = frozenset(
    {
        "OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "UNIMPLEMENTED",
        "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED",
    }
)  # fmt: skip
_REST_CODES: Final = frozenset({200, 400, 404, 405, 408, 413, 415, 429, 501})
_METHODS: Final = {
    "PredictionService/Predict": predict_pb2.PredictRequest,
    "PredictionService/Classify": classification_pb2.ClassificationRequest,
    "PredictionService/Regress": regression_pb2.RegressionRequest,
    "PredictionService/MultiInference": inference_pb2.MultiInferenceRequest,
    "PredictionService/GetModelMetadata": get_model_metadata_pb2.GetModelMetadataRequest,
    "ModelService/GetModelStatus": get_model_status_pb2.GetModelStatusRequest,
}


class Client:
    """One hostile client: its random numbers, its connections, and what it was answered."""

    def __init__(self, server: ModelServerProcess, seed: int) -> None:
        self._random = random.Random(seed)
        host, _, port = server.rest_target.removeprefix("http://").rpartition(":")
        self._rest = (host, int(port))
        self._grpc_address = server.grpc_target.removeprefix("grpc://")
        self._slow: list[tuple[float, socket.socket]] = []
        self.answers: Counter[str] = Counter()

    def run(self, until: float) -> None:
        """Attacks until a time of the monotonic clock."""
        attacks: list[Callable[[], None]] = [self._ask_rest] * 4 + [self._ask_grpc] * 4
        attacks += [self._break_off, self._say_nothing, self._garble_grpc]
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self._grpc_address, options) as self._channel:
            while time.monotonic() < until:
                self._random.choice(attacks)()
                while self._slow and self._slow[0][0] < time.monotonic():
                    self._slow.pop(0)[1].close()
        for _, connection in self._slow:
            connection.close()

    def _changed(self, message: bytes) -> bytes:
        """The bytes with some of them changed, doubled or left out; sometimes as they are."""
        for _ in range(self._random.choice((0, 1, 3, 10))):
            place = self._random.randrange(len(message) + 1)
            middle = self._random.choice((b"", self._random.randbytes(2), message[place : place + 20] * 2))
            message = message[:place] + middle + message[place + self._random.randrange(3) :]
        return message

    def _body(self) -> bytes:
        nested, digits = self._random.choice((10, 40, 100_000)), self._random.choice((10, 400, 100_000))
        value = self._random.choice(
            (
                b"1.0", b"NaN", b"1e999", b"-Infinity", b"null", b"true", b'{"b64": "AA"}', b'"\xff\xfe"',
                b'"\\ud800"', b"9" * digits, b"[" * nested + b"]" * nested, b'{"a":' * nested, b"[]",
            )
        )  # fmt: skip
        body = self._random.choice(
            (
                b'{"instances": [%s]}',
                b'{"inputs": {"x": [1.0, %s]}}',
                b'{"signature_name": "regress", "examples": [{"x": %s}]}',
                b'{"signature_name": "classify", "context": {"y": %s}, "examples": [{"x": 1.0}]}',
                b'{"signature_name": %s, "inputs": []}',
            )
        )
        return self._changed(body % value)

    def _ask_rest(self) -> None:
        model = self._random.choice((_MODEL, _MODEL, _MODEL, f"made-up-{self._random.random()}", "%ff", ""))
        version = self._random.choice(("", "", "/versions/1", "/versions/99999999999999999999", "/labels/x"))
        method = self._random.choice((":predict", ":predict", ":classify", ":regress", ":run", "/metadata"))
        body, headers = self._body(), {}
        if self._random.random() < 0.2:
            packed = gzip.compress(self._random.choice((body, b" " * 10_000_000)), 1)
            body, headers = self._changed(packed), {"Content-Encoding": self._random.choice(("gzip", "br"))}
        connection = http.client.HTTPConnection(*self._rest, timeout=_TIMEOUT_S)
        try:
            verb = self._random.choice(("POST", "POST", "POST", "GET", "PUT"))
            connection.request(verb, f"/v1/models/{model}{version}{method}", body, headers)
            answer = connection.getresponse()
            answer.read()
            self.answers[f"rest {answer.status}"] += 1
        except ConnectionError:  # refused while it was sending
            self.answers["rest connection closed"] += 1
        finally:
            connection.close()

    def _ask_grpc(self) -> None:
        method, kind = self._random.choice(list(_METHODS.items()))
        request = kind()
        spec = request.tasks.add().model_spec if hasattr(request, "tasks") else request.model_spec
        spec.name = self._random.choice((_MODEL, _MODEL, f"made-up-{self._random.random()}", ""))
        spec.signature_name = self._random.choice(("", "regress", "classify", "x" * 100_000))
        if self._random.random() < 0.2:
            spec.version.value = self._random.choice((0, 1, -1, 2**63 - 1))
        if isinstance(request, predict_pb2.PredictRequest):
            tensor = request.inputs["x"]
            tensor.dtype = self._random.choice((1, 1, 1, *range(30)))
            tensor.float_val.extend([1.0] * self._random.choice((0, 1, 3, 100_000)))
            for _ in range(self._random.choice((0, 1, 1, 2, 70))):
                tensor.tensor_shape.dim.add(size=self._random.choice((0, 1, 3, -1, 2**27, 2**62)))
        elif hasattr(request, "input"):
            for _ in range(self._random.choice((0, 1, 3))):
                feature = request.input.example_list.examples.add().features.feature["x"]
                feature.float_list.value.extend([1.0] * self._random.choice((0, 1, 2)))
        call = self._channel.unary_unary(
            f"/tensorflow.serving.{method}", request_serializer=bytes, response_deserializer=bytes
        )
        message = self._changed(request.SerializeToString())
        future = call.future(message, timeout=self._random.choice((0.001, _TIMEOUT_S, _TIMEOUT_S)))
        if self._random.random() < 0.1:
            future.cancel()
        try:
            future.result()
            self.answers["grpc OK"] += 1
        except grpc.FutureCancelledError:
            self.answers["grpc CANCELLED"] += 1
        except grpc.RpcError as error:
            self.answers[f"grpc {error.code().name}"] += 1

    def _break_off(self) -> None:
        """A request whose connection is half closed, closed or reset at some place."""
        body = self._body()
        claimed = self._random.choice((len(body), len(body) + 1000, 5_000_000_000))
        head = f"POST /v1/models/{_MODEL}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {claimed}\r\n\r\n"
        request = head.encode() + body
        with socket.create_connection(self._rest, timeout=1) as connection:
            try:
                connection.sendall(request[: self._random.randrange(len(request) + 1)])
                end = self._random.choice(("half close", "close", "reset"))
                if end == "half close":
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1000)
                elif end == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except (ConnectionError, TimeoutError):  # the server closed first, or waits for the rest
                pass
        self.answers["rest broken off"] += 1

    def _say_nothing(self) -> None:
        """A connection that stays open for a while, with a request that does not go on."""
        connection = socket.create_connection(self._rest, timeout=_TIMEOUT_S)
        connection.sendall(b"POST /v1/models/x:predict HTTP/1.1\r\nContent-Length: 9\r\n\r\n"[
            : self._random.randrange(60)
        ])  # fmt: skip
        self._slow.append((time.monotonic() + _SLOW_S, connection))
        self.answers["rest left waiting"] += 1

    def _garble_grpc(self) -> None:
        host, _, port = self._grpc_address.rpartition(":")
        start = self._random.choice((b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"))
        with socket.create_connection((host, int(port)), timeout=1) as connection:
            try:
                connection.sendall(start + self._random.randbytes(self._random.randrange(1000)))
                connection.shutdown(self._random.choice((socket.SHUT_WR, socket.SHUT_RDWR)))
            except OSError:  # the server closed first
                pass
        self.answers["grpc garbage"] += 1


def _probe(server: ModelServerProcess) -> float:
    """Seconds for a whole request over REST, asked beside the hostile ones."""
    started = time.perf_counter()
    host, _, port = server.rest_target.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=_TIMEOUT_S)
    connection.request("POST", f"/v1/models/{_MODEL}:predict", b'{"instances": [1.0]}')
    answer = json.loads(connection.getresponse().read())
    connection.close()
    if answer != {"predictions": [3.5]}:
        raise click.ClickException(f"a whole request was answered with {answer}")
    return time.perf_counter() - started


@click.command(help=__doc__)
@click.option("--minutes", default=10.0, show_default=True, help="How long.")
@click.option("--clients", "num_clients", default=8, show_default=True, help="Hostile clients at once.")
@click.option("--seed", default=0, show_default=True, help="Of what they send.")
def main(minutes: float, num_clients: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base_path = save_half_plus_three(Path(folder) / _MODEL / "1").parent
        with ModelServerProcess({_MODEL: base_path}) as server:
            process = psutil.Process(server.pid)
            clients = [Client(server, seed + number) for number in range(num_clients)]
            rows: list[tuple[float, int, int]] = []
            click.echo("seconds  MB  files  threads  requests  ms of a whole request")
            for number in range(1, _SAMPLES + 1):
                # Between two samples everybody rests, so that what is open is what is left.
                until = time.monotonic() + 60 * minutes / _SAMPLES
                threads = [threading.Thread(target=client.run, args=(until,)) for client in clients]
                for thread in threads:
                    thread.start()
                time.sleep(max(0.0, until - time.monotonic()) / 2)
                probe_ms = 1000 * _probe(server)
                for thread in threads:
                    thread.join()
                time.sleep(2)
                rows.append((process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()))
                total = sum(sum(client.answers.values()) for client in clients)
                cells = "{:.0f}  {}  {}".format(*rows[-1])
                click.echo(f"{60 * minutes / _SAMPLES * number:7.0f}  {cells}  {total:,}  {probe_ms:.1f}")
            log = server.log
    answers: Counter[str] = sum((client.answers for client in clients), Counter())
    click.echo(", ".join(f"{answer} {count:,}" for answer, count in sorted(answers.items())))
    if problems := _problems(answers, rows, log):
        raise click.ClickException("; ".join(problems))


def _problems(answers: Counter[str], rows: list[tuple[float, int, int]], log: str) -> list[str]:
    allowed = {f"grpc {code}" for code in _GRPC_CODES} | {f"rest {code}" for code in _REST_CODES}
    allowed |= {"grpc garbage", "rest broken off", "rest left waiting", "rest connection closed"}
    problems = [f"{answer}: {count}" for answer, count in answers.items() if answer not in allowed]
    if "Traceback" in log:
        problems.append("the server logged an exception:\n" + log[log.index("Traceback") :][:2000])
    for name, before, after, most in zip(
        ("MB", "files", "threads"), rows[_SAMPLES // 2 - 1], rows[-1],
        (_MAX_GROWTH_MB, _MAX_MORE_FILES, _MAX_MORE_THREADS), strict=True,
    ):  # fmt: skip
        if after - before > most:
            problems.append(f"{after - before:.0f} more {name} than at half of the time")
    return problems


if __name__ == "__main__":
    main()
