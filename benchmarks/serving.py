"""Speed of the local model server beside its floors, in one run: gRPC and REST, alone and under load.

The model is the trainer's own ScaNN index behind a small query tower (benchmarks/served_models.py). The
floors: the signature called in this process, and an echo of messages of the same size over the same RPC and
HTTP libraries. Load comes from h2load (Debian: nghttp2-client) and wrk, which are written in C and take
little of the cores that they share with the server. Every scenario first compares one answer with that of the
signature called in this process, and afterwards the bytes that came back with what so many answers have.

Example:
  python -m benchmarks.serving --quick
  python -m benchmarks.serving --items 200000 --width 128 --workers 2 --seconds 10 --json serving.json
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import grpc
import httpx
import numpy as np
import psutil
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from benchmarks import echo, served_models
from serving.process import ModelServerProcess
from serving.servable import Servable
from serving.tensors import decode_tensor, encode_tensor

HISTORY = 20
LARGE_ROWS = 32
_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_GRPC_PREFIX_BYTES = 5
_WARM_UP_CALLS = 50


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
      cpu_ms: CPU of the server's processes per request.
      client_cpu_ms: that of the load generator, which shares the cores with the server; 0 in process.
      target: in words.
    """

    name: str
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    client_cpu_ms: float = 0.0
    target: str = ""


@dataclass(frozen=True)
class Load:
    """What a load generator reports."""

    num_requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float


def h2load(target: str, path: str, message: bytes, answer: bytes, clients: int, seconds: int) -> Load:
    """Calls a gRPC method from `clients` connections, each with one call at a time."""
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        body.write_bytes(b"\0" + struct.pack(">I", len(message)) + message)
        address = target.removeprefix("grpc://")
        command = [
            "h2load",
            f"--duration={seconds}",
            f"--clients={clients}",
            "--threads=1",
        ]
        command += ["--max-concurrent-streams=1", f"--data={body}", f"--log-file={log}"]
        command += ["--header=content-type: application/grpc", "--header=te: trailers"]
        output = _output([*command, f"http://{address}{path}"])
        done = _number(r"(\d+) succeeded", output)
        _check_bytes(_number(r"\((\d+)\) data", output), done, len(answer) + _GRPC_PREFIX_BYTES, output)
        times_ms = [int(line.split("\t")[2]) / 1000 for line in log.read_text().splitlines()]
    return Load(done, done / seconds, *_percentiles(times_ms))


def wrk(target: str, path: str, body: bytes, answer: bytes, connections: int, seconds: int) -> Load:
    """Posts a body from keep-alive connections, each with one request at a time."""
    with tempfile.TemporaryDirectory() as folder:
        data, script = Path(folder, "body"), Path(folder, "post.lua")
        data.write_bytes(body)
        script.write_text(_WRK_SCRIPT.format(body=data, size=len(answer)))
        command = ["wrk", f"--duration={seconds}s", f"--connections={connections}", "--threads=1"]
        output = _output([*command, f"--script={script}", f"{target}{path}"])
    if wrong := _number(r"wrong (\d+)", output):
        raise click.ClickException(f"{wrong} answers of {target}{path} were not as expected:\n{output}")
    done = _number(r"done (\d+)", output)
    p50_ms, p99_ms = (_number(rf"{name} (\d+)", output) / 1000 for name in ("p50", "p99"))
    return Load(done, done / seconds, p50_ms, p99_ms)


_WRK_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = io.open("{body}", "rb"):read("*a")
threads, wrong = {{}}, 0
function setup(thread) table.insert(threads, thread) end
function response(status, headers, body)
  -- The last digits of a score depend on the batch.
  if status ~= 200 or math.abs(string.len(body) / {size} - 1) > 0.02 then wrong = wrong + 1 end
end
function done(summary, latency)
  local bad = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  for _, thread in ipairs(threads) do bad = bad + thread:get("wrong") end
  print(string.format("wrong %d", bad))
  print(string.format("done %d", summary.requests))
  print(string.format("p50 %d", latency:percentile(50)))
  print(string.format("p99 %d", latency:percentile(99)))
end
"""


def _output(command: Sequence[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise click.ClickException(f"{command[0]} failed:\n{run.stdout}{run.stderr}")
    return run.stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise click.ClickException(f"no {pattern!r} in:\n{text}")
    return int(match.group(1))


def _check_bytes(got: int, num_answers: int, size: int, output: str) -> None:
    # Over gRPC an error is HTTP 200 as well, only shorter. Calls in flight when the time is over may count.
    if num_answers == 0 or not 0 <= got - num_answers * size <= 64 * size:
        raise click.ClickException(
            f"expected {num_answers} answers of {size} bytes, got {got} bytes:\n{output}"
        )


def _percentiles(times_ms: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(times_ms)
    return ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _cpu_s(pid: int) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _family(pid))


def _children_cpu_s() -> float:
    """CPU of the processes that this one has started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory_mb(pid: int) -> dict[str, float]:
    """Memory of a server with its workers: `rss` counts shared pages once per process, `pss` once in all."""
    infos = [process.memory_full_info() for process in _family(pid)]
    return {"rss": sum(info.rss for info in infos) / 2**20, "pss": sum(info.pss for info in infos) / 2**20}


class Bench:
    """One model on disk, one request to it, and the rows measured with it."""

    def __init__(
        self, base_path: Path, inputs: Mapping[str, np.ndarray], results: list[Result], seconds: int
    ) -> None:
        self.models = {base_path.name: base_path}
        self.results, self._seconds, self._model = results, seconds, base_path.name
        self.servable = Servable(self._model, 1, base_path / "1")
        self.inputs = inputs
        self.message = _message(self._model, inputs)
        self.answer = b""

    def in_process(self) -> None:
        """The signature called here, with and without decoding and encoding."""
        for rows in (1, 8, 32):
            inputs = {name: np.concatenate([array] * rows) for name, array in self.inputs.items()}
            self.servable.predict("", inputs)
            times, cpu_s = [], -time.process_time()
            deadline = time.perf_counter() + self._seconds / 2
            while time.perf_counter() < deadline:
                started = time.perf_counter()
                self.servable.predict("", inputs)
                times.append((time.perf_counter() - started) * 1000)
            cpu_s += time.process_time()
            self._add(
                f"floor: {self._model} in process, batch {rows}", len(times) * 1000 / sum(times), times, cpu_s
            )

    def echoes(self) -> None:
        """gRPC and REST servers that do nothing, with messages of the same size."""
        body, rest_answer = self._rest_body(self.inputs), self._rest_answer(self.inputs)
        with _echo_server(len(self.answer), len(rest_answer)) as (process, grpc_target, rest_target):
            for clients in (1, 64):
                self._load(
                    f"floor: gRPC echo, {clients} clients", process.pid, h2load, grpc_target, "/echo/Echo",
                    self.message, b"x" * len(self.answer), clients,
                )  # fmt: skip
            for connections in (1, 16):
                self._load(
                    f"floor: REST echo, {connections} connections", process.pid, wrk, rest_target, "/echo",
                    body, b"x" * len(rest_answer), connections,
                )  # fmt: skip

    def grpc(self, server: ModelServerProcess, name: str, clients: int, target: str = "") -> None:
        """Predict over gRPC."""
        self._check(server)
        self._load(
            f"gRPC {name}, {clients} clients", server.pid, h2load, server.grpc_target, _PREDICT,
            self.message, self.answer, clients, target=target,
        )  # fmt: skip

    def rest(self, server: ModelServerProcess, name: str, connections: int, target: str = "") -> None:
        """:predict over REST."""
        self._rest(server, name, self.inputs, connections, target)

    def large_rest(self, server: ModelServerProcess) -> None:
        """:predict over REST with an answer above 64 kB, on one keep-alive connection."""
        inputs = {name: np.concatenate([array] * LARGE_ROWS) for name, array in self.inputs.items()}
        name = f"answers of {len(self._rest_answer(inputs)) / 1000:.0f} kB"
        self._rest(server, name, inputs, 1, "no 44 ms stall")

    def _rest(
        self,
        server: ModelServerProcess,
        name: str,
        inputs: Mapping[str, np.ndarray],
        connections: int,
        target: str,
    ) -> None:
        path, body = f"/v1/models/{self._model}:predict", self._rest_body(inputs)
        answer = httpx.post(server.rest_target + path, content=body, timeout=30).content
        outputs, expected = json.loads(answer)["outputs"], json.loads(self._rest_answer(inputs))["outputs"]
        for output, values in expected.items():
            _assert_close(np.array(outputs[output]), np.array(values))
        self._load(
            f"REST {name}, {connections} connections", server.pid, wrk, server.rest_target, path,
            body, answer, connections, target=target,
        )  # fmt: skip

    def _check(self, server: ModelServerProcess) -> None:
        with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://")) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            request = predict_pb2.PredictRequest.FromString(self.message)
            for _ in range(_WARM_UP_CALLS):
                response = stub.Predict(request, timeout=30)
        self.answer = response.SerializeToString()
        expected = self.servable.predict("", self.inputs)
        for name, proto in response.outputs.items():
            _assert_close(decode_tensor(name, proto.SerializeToString()), expected[name])

    def _load(self, name: str, pid: int, generator: Any, *arguments: Any, target: str = "") -> None:
        cpu_s, client_cpu_s = -_cpu_s(pid), -_children_cpu_s()
        load = generator(*arguments, self._seconds)
        cpu_s, client_cpu_s = cpu_s + _cpu_s(pid), client_cpu_s + _children_cpu_s()
        cpu_ms, client_cpu_ms = (1000 * seconds / load.num_requests for seconds in (cpu_s, client_cpu_s))
        self._record(
            Result(name, load.requests_per_s, load.p50_ms, load.p99_ms, cpu_ms, client_cpu_ms, target)
        )

    def _add(self, name: str, rate: float, times_ms: Sequence[float], cpu_s: float) -> None:
        self._record(Result(name, rate, *_percentiles(times_ms), cpu_s / len(times_ms) * 1000))

    def _record(self, result: Result) -> None:
        self.results.append(result)
        click.echo(
            f"{result.name:<52} {result.requests_per_s:>9,.0f} {result.p50_ms:>8.2f} {result.p99_ms:>8.2f} "
            f"{result.cpu_ms:>8.3f} {result.client_cpu_ms:>8.3f}  {result.target}"
        )

    def _rest_body(self, inputs: Mapping[str, np.ndarray]) -> bytes:
        columns = {name: array.tolist() for name, array in inputs.items()}
        return json.dumps({"inputs": columns}, default=bytes.decode).encode()

    def _rest_answer(self, inputs: Mapping[str, np.ndarray]) -> bytes:
        from serving.json_codec import encode_predict_response

        return encode_predict_response(self.servable.predict("", inputs), "column")


def _assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    # The order of sums, and with it the last digits, depend on the size of the batch.
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    else:
        np.testing.assert_array_equal(got, expected)


def _message(model: str, inputs: Mapping[str, np.ndarray]) -> bytes:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    for name, array in inputs.items():
        request.inputs[name].ParseFromString(encode_tensor(array))
    return bytes(request.SerializeToString())


@contextmanager
def _echo_server(grpc_bytes: int, rest_bytes: int) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    command = [sys.executable, "-m", echo.__name__, str(grpc_bytes), str(rest_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grpc_port, rest_port = process.stdout.readline().split()
        yield process, f"grpc://127.0.0.1:{grpc_port}", f"http://127.0.0.1:{rest_port}"
        process.terminate()


@click.command(help=__doc__)
@click.option("--items", default=200_000, show_default=True, help="Items in the index.")
@click.option("--width", default=128, show_default=True, help="Width of a vector.")
@click.option("--models", type=click.Path(path_type=Path), help="Folder to keep the built model in.")
@click.option("--workers", default=2, show_default=True, help="Processes of the server with several.")
@click.option(
    "--batching-config",
    default=Path(__file__).parents[1] / "serving" / "settings" / "batching.config",
    type=click.Path(path_type=Path),
    help="Batching parameters.  [default: serving/settings/batching.config]",
)
@click.option("--seconds", default=10, show_default=True, help="Seconds of load per row.")
@click.option("--quick", is_flag=True, help="2,000 items, 1 second per row: to see that it works.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(
    items: int,
    width: int,
    models: Path | None,
    workers: int,
    batching_config: Path,
    seconds: int,
    quick: bool,
    json_file: Path | None,
) -> None:
    for tool, package in (("h2load", "nghttp2-client"), ("wrk", "wrk")):
        if shutil.which(tool) is None:
            raise click.ClickException(f"{tool} is not installed; it is in Debian's package {package}")
    if quick:
        items, width, seconds = 2_000, 32, 1
    # As the model server does.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = models or Path(temporary)
        retrieval, plain = folder / f"retrieval-{items}x{width}", folder / f"plain-{items // 2}x{width // 4}"
        if not (retrieval / "1").is_dir():
            served_models.save_retrieval_model(retrieval / "1", items, width)
        if not (plain / "1").is_dir():
            served_models.save_plain_model(plain / "1", items // 2, width // 4)
        results: list[Result] = []
        request = served_models.requests(1, served_models.MAX_K, HISTORY, items)
        bench = Bench(retrieval, request, results, seconds)
        query = {"queries": np.random.default_rng(0).standard_normal((1, width // 4), np.float32)}
        memory = _measure(bench, Bench(plain, query, results, seconds), workers, batching_config)
    click.echo("")
    for name, sizes in memory.items():
        click.echo(f"memory, {name}: RSS {sizes['rss']:,.0f} MB, PSS {sizes['pss']:,.0f} MB")
    _print_ratios(results)
    if json_file is not None:
        figures = {"results": [asdict(result) for result in results], "memory_mb": memory}
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _measure(bench: Bench, plain: Bench, workers: int, batching_config: Path) -> dict[str, dict[str, float]]:
    click.echo(f"{'':<52} {'req/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'CPU ms':>8} {'client':>8}  target")
    memory = {}
    bench.in_process()
    plain.in_process()
    models = {**bench.models, **plain.models}
    with ModelServerProcess(models) as server:
        memory["1 worker"] = memory_mb(server.pid)
        bench.grpc(server, "retrieval, 1 worker", 1, "p50 <= 1.2 ms, p99 <= 2.5 ms")
        bench.echoes()
        bench.grpc(server, "retrieval, 1 worker", 16)
        bench.rest(server, "retrieval, 1 worker", 1)
        bench.large_rest(server)
        plain.rest(server, "plain ScaNN, 1 worker", 1, ">= 1,250/s")
        plain.rest(server, "plain ScaNN, 1 worker", 16)
    several = f"{workers} workers"
    with ModelServerProcess(models, flags=[f"--num_workers={workers}"]) as server:
        memory[several] = memory_mb(server.pid)
        bench.grpc(server, f"retrieval, {several}", 16, ">= 1,500/s")
        plain.rest(server, f"plain ScaNN, {several}", 16, ">= 4,450/s")
    batching = ["--enable_batching=true", f"--batching_parameters_file={batching_config}"]
    with ModelServerProcess(models, flags=batching) as server:
        bench.grpc(server, "retrieval, 1 worker, batching", 1)
        bench.grpc(server, "retrieval, 1 worker, batching", 64, ">= 5,000/s")
        plain.rest(server, "plain ScaNN, 1 worker, batching", 16)
    for pinned in ([], ["--pin_workers"]):
        flags, name = [*batching, f"--num_workers={workers}", *pinned], ", pinned" if pinned else ""
        with ModelServerProcess(models, flags=flags) as server:
            bench.grpc(server, f"retrieval, {several}, batching{name}", 64, ">= 5,000/s")
            plain.rest(server, f"plain ScaNN, {several}, batching{name}", 16)
    return memory


def _print_ratios(results: Sequence[Result]) -> None:
    by_name = {result.name: result for result in results}
    for result in results:
        match = re.match(r"(gRPC|REST) .* (\d+) (clients|connections)$", result.name)
        if match is None:
            continue
        ratios = []
        echo_row = by_name.get(f"floor: {match.group(1)} echo, {match.group(2)} {match.group(3)}")
        if echo_row is not None:
            ratios.append(f"{result.requests_per_s / echo_row.requests_per_s:.2f} of the echo's rate")
        for name, floor in by_name.items():
            model = name.removeprefix("floor: ").partition("-")[0]
            if name.endswith("in process, batch 1") and model in result.name:
                ratios.append(f"{result.p50_ms / floor.p50_ms:.2f} times the p50 of the signature in process")
        click.echo(f"{result.name}: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
