"""Clients of TensorFlow Serving that nobody here wrote, against the local server and the pushed models.

NVIDIA's perf_analyzer in its TensorFlow Serving mode (C++, GetModelMetadata and Predict) comes from the
tritonclient 2.44.0 wheel: perf-analyzer wheels of today need glibc 2.38. It sends shapes without values,
which count as zeros, so it can ask the ranking model and not the retrieval model, whose k may not be zero.
ovmsclient 2023.1 is Intel's client for servers with TensorFlow Serving's API: status, metadata and Predict
over gRPC and REST, and gRPC with TLS. min-tfs-client 1.0.2 asks for predictions; what it calls classification
and regression are Predict calls, too. No client was found that calls Classify, Regress or MultiInference, so
the stubs of min-tfs-client's protos, compiled by its authors, call them, on a small model made for it.

All are installed into --folder, never into the project's environment. perf_analyzer needs libb64
(`apt-get install libb64-0d`). What cannot be run is said, and makes the exit code 1.

Example:
  python -m benchmarks.public_clients --output-dir runs/demo --folder /tmp/public-clients
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.served_models import save_half_plus_three
from serving.process import ModelServerProcess

_PERF_ANALYZER: Final = ("tritonclient==2.44.0", "nvidia-cuda-runtime-cu12==12.4.127")
# With copies of what they import: one has a `tensorflow` package of protos, which must not meet the real one.
_GRPC: Final = ("grpcio==1.65.5", "protobuf==3.20.3", "numpy==1.26.4", "six==1.17.0")
_MIN_TFS_CLIENT: Final = ("min-tfs-client==1.0.2", *_GRPC)
_OVMSCLIENT: Final = (
    "ovmsclient==2023.1", *_GRPC,
    "requests==2.34.2", "urllib3==2.8.0", "idna==3.20", "certifi==2026.10.19.post1",
    "charset-normalizer==3.5.3",
)  # fmt: skip
_TIMEOUT_S: Final = 120
_EXAMPLES: Final = "half_plus_three"

# Arguments of all scripts: the client's folder, both addresses, certificate or "", version, model, inputs.
_BEGIN: Final = """
import json, sys
folder, address, rest, certificate, version, model, inputs = sys.argv[1:]
sys.path.insert(0, folder)
import numpy as np
dtypes = {"DT_STRING": np.str_, "DT_FLOAT": np.float32, "DT_INT64": np.int64, "DT_INT32": np.int32}
arrays = {
    n: np.array(i["content"], dtypes[i["dtype"]]).reshape(i["shape"]) for n, i in json.loads(inputs).items()
}
"""
_ASK_MIN_TFS_CLIENT: Final = (
    _BEGIN
    + """
import grpc
from min_tfs_client.requests import TensorServingClient
from min_tfs_client.tensors import tensor_proto_to_ndarray
host, port = address.split(":")
credentials = grpc.ssl_channel_credentials(open(certificate, "rb").read()) if certificate else None
answer = TensorServingClient(host, int(port), credentials).predict_request(model, arrays)
outputs = {name: list(tensor_proto_to_ndarray(proto).shape) for name, proto in answer.outputs.items()}
assert answer.model_spec.version.value == int(version)
print("result:", json.dumps(outputs))
"""
)
_ASK_OVMSCLIENT: Final = (
    _BEGIN
    + """
from ovmsclient import make_grpc_client, make_http_client
version = int(version)
if certificate:
    clients = {"grpc": make_grpc_client(address, {"server_cert_path": certificate})}
else:
    clients = {"grpc": make_grpc_client(address), "rest": make_http_client(rest)}
answers = {}
for name, client in clients.items():
    status = client.get_model_status(model, version)[version]
    assert (status["state"], int(status["error_code"])) == ("AVAILABLE", 0), status
    assert client.get_model_metadata(model, version)
    outputs = client.predict(arrays, model, version, 60.0)
    answers[name] = outputs if isinstance(outputs, dict) else {"the only output": outputs}
first = answers["grpc"]
for name, values in first.items():
    other = answers.get("rest", first)[name]
    if values.dtype.kind == "f":
        np.testing.assert_allclose(other, values, rtol=1e-5)
    else:
        np.testing.assert_array_equal(other, values.astype(other.dtype))
print("result:", ", ".join(clients), {name: list(np.shape(values)) for name, values in first.items()})
"""
)
# The model of `save_half_plus_three`; the answers are worked out by hand.
_ASK_EXAMPLES: Final = (
    _BEGIN
    + """
import grpc
from tensorflow_serving.apis import classification_pb2, inference_pb2, prediction_service_pb2_grpc
from tensorflow_serving.apis import regression_pb2
if certificate:
    channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(open(certificate, "rb").read()))
else:
    channel = grpc.insecure_channel(address)
stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

def filled(request, signature):
    request.model_spec.name, request.model_spec.signature_name = model, signature
    for x in (1.0, 4.0):
        request.input.example_list.examples.add().features.feature["x"].float_list.value.append(x)
    return request

regression = stub.Regress(filled(regression_pb2.RegressionRequest(), "regress"), 60)
assert [r.value for r in regression.result.regressions] == [3.5, 5.0]
classification = stub.Classify(filled(classification_pb2.ClassificationRequest(), "classify"), 60)
assert [[c.score for c in row.classes] for row in classification.result.classifications] == [[3.5], [5.0]]
both = inference_pb2.MultiInferenceRequest()
both.input.CopyFrom(filled(regression_pb2.RegressionRequest(), "").input)
for method in ("regress", "classify"):
    task = both.tasks.add(method_name="tensorflow/serving/" + method)
    task.model_spec.name, task.model_spec.signature_name = model, method
results = stub.MultiInference(both, 60).results
assert [r.value for r in results[0].regression_result.regressions] == [3.5, 5.0]
assert results[1].classification_result.classifications[1].classes[0].score == 5.0
assert regression.model_spec.version.value == int(version)
print("result: Regress, Classify, MultiInference")
"""
)


def main() -> int:
    """Runs all clients against every pushed model; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="a finished run")
    parser.add_argument("--folder", type=Path, required=True, help="where the clients are installed")
    parser.add_argument("--concurrency", default="1:4:3", help="start:end:step, as perf_analyzer takes it")
    options = parser.parse_args()
    pushed = {
        path.name: path for path in sorted((options.output_dir / "serving_models").iterdir()) if path.is_dir()
    }
    perf_analyzer = _install(options.folder / "perf_analyzer", _PERF_ANALYZER)
    min_tfs_client = _install(options.folder / "min_tfs_client", _MIN_TFS_CLIENT)
    ovmsclient = _install(options.folder / "ovmsclient", _OVMSCLIENT)
    passed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        examples = {_EXAMPLES: save_half_plus_three(folder / _EXAMPLES / "1").parent}
        with ModelServerProcess(pushed | examples) as server:
            for model in pushed:
                inputs = _request(httpx.get(f"{server.rest_target}/v1/models/{model}/metadata").json())
                ask = _Asked(server, model, inputs)
                passed.append(_report(model, "min-tfs-client", ask.by(_ASK_MIN_TFS_CLIENT, min_tfs_client)))
                passed.append(_report(model, "ovmsclient", ask.by(_ASK_OVMSCLIENT, ovmsclient)))
                if "k" not in inputs:
                    done = _run_perf_analyzer(
                        perf_analyzer, ask.grpc_address, model, inputs, options.concurrency
                    )
                    passed.append(_report(model, "perf_analyzer", done))
            ask = _Asked(server, _EXAMPLES)
            passed.append(_report(_EXAMPLES, "min-tfs-client's stubs", ask.by(_ASK_EXAMPLES, min_tfs_client)))
        certificate, config = _make_certificate(folder)
        with ModelServerProcess(examples, flags=[f"--ssl_config_file={config}"]) as server:
            ask = _Asked(server, _EXAMPLES, {}, certificate)
            passed.append(_report(_EXAMPLES, "stubs, TLS", ask.by(_ASK_EXAMPLES, min_tfs_client)))
            x = {"x": {"content": [1.0, 4.0], "shape": [2], "dtype": "DT_FLOAT"}}
            ask = _Asked(server, _EXAMPLES, x, certificate)
            passed.append(
                _report(_EXAMPLES, "min-tfs-client, TLS", ask.by(_ASK_MIN_TFS_CLIENT, min_tfs_client))
            )
            passed.append(_report(_EXAMPLES, "ovmsclient, TLS", ask.by(_ASK_OVMSCLIENT, ovmsclient)))
    return int(not all(passed))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A model on a server, and what it is asked; `certificate`: of a server that speaks TLS."""

    server: ModelServerProcess
    model: str
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    certificate: Path | None = None

    @property
    def grpc_address(self) -> str:
        return self.server.grpc_target.removeprefix("grpc://")

    def by(self, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Runs a script with the client in `folder`."""
        # -S leaves out the environment's packages, so that the client meets only its own.
        command = [sys.executable, "-I", "-S", "-c", script, str(folder)]
        command += [self.grpc_address, self.server.rest_target.removeprefix("http://")]
        command += [str(self.certificate or ""), str(self.server.versions[self.model]), self.model]
        return _run([*command, json.dumps(self.inputs)], dict(os.environ))


def _make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of this machine, and the server's --ssl_config_file with it."""
    key, certificate, config = folder / "key.pem", folder / "certificate.pem", folder / "ssl.config"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    config.write_text(f"server_key: {key.read_text()!r} server_cert: {certificate.read_text()!r}")
    return certificate, config


def _report(model: str, client: str, done: subprocess.CompletedProcess[str]) -> bool:
    print(f"\n{model}, {client}: {'passed' if done.returncode == 0 else 'FAILED'}")
    print(_summary(done), flush=True)
    return done.returncode == 0


def _install(folder: Path, packages: Sequence[str]) -> Path:
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, *packages], check=True)
    return folder


def _request(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """One row of empty values for each input of `serving_default`; k and num_candidates are 10."""
    inputs = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]
    values = {"DT_STRING": "", "DT_FLOAT": 0.0, "DT_INT64": 0, "DT_INT32": 10}
    # A size that requests choose is -1 in the metadata.
    shapes = {
        name: [max(1, int(dim["size"])) for dim in info["tensor_shape"]["dim"]]
        for name, info in inputs.items()
    }
    return {
        name: {
            "content": [values[info["dtype"]]] * math.prod(shapes[name]),
            "shape": shapes[name],
            "dtype": info["dtype"],
        }
        for name, info in inputs.items()
    }


def _run_perf_analyzer(
    folder: Path, address: str, model: str, inputs: Mapping[str, Any], concurrency: str
) -> subprocess.CompletedProcess[str]:
    binary = next(folder.rglob("perf_analyzer"))
    binary.chmod(0o755)
    data = folder / f"{model}.json"
    rows = {name: {key: value[key] for key in ("content", "shape")} for name, value in inputs.items()}
    data.write_text(json.dumps({"data": [rows]}), encoding="utf-8")
    libraries = next(folder.rglob("libcudart.so.12")).parent
    command = [str(binary), "-m", model, "--service-kind", "tfserving", "-i", "grpc", "-u", address]
    # On a busy machine latencies never settle within the 10 % that it asks for; here it is to work at all.
    command += ["--input-data", str(data), "--measurement-interval", "2000", "--stability-percentage", "1000"]
    command += ["--concurrency-range", concurrency]
    return _run(command, {**os.environ, "LD_LIBRARY_PATH": str(libraries)})


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, text=True, timeout=_TIMEOUT_S, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _summary(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode != 0:
        return "\n".join(f"  {line}" for line in done.stdout.splitlines()[-15:])
    wanted = re.compile(r"^(Request concurrency|\s+(Request count|Throughput|p50|p99)|result:)")
    return "\n".join(f"  {line.strip()}" for line in done.stdout.splitlines() if wanted.match(line))


if __name__ == "__main__":
    sys.exit(main())
