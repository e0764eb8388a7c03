"""Clients of TensorFlow Serving that nobody here wrote, against the local server and the pushed models.

NVIDIA's perf_analyzer in its TensorFlow Serving mode (C++, GetModelMetadata and Predict) comes from the
tritonclient 2.44.0 wheel: perf-analyzer wheels of today need glibc 2.38. It sends shapes without values,
which count as zeros, so it can ask the ranking model and not the retrieval model, whose k may not be zero.
min-tfs-client 1.0.2 is Python with protos of its own, and asks both.

Both are installed into --folder, never into the project's environment. perf_analyzer needs libb64
(`apt-get install libb64-0d`). What cannot be run is said, and makes the exit code 1.

Example:
  python -m benchmarks.public_clients --output-dir runs/demo --folder /tmp/public-clients
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import httpx

from serving.process import ModelServerProcess

_PERF_ANALYZER: Final = ("tritonclient==2.44.0", "nvidia-cuda-runtime-cu12==12.4.127")
# With copies of what it imports: its `tensorflow` package, which holds protos, must not meet the real one.
_MIN_TFS_CLIENT: Final = ("min-tfs-client==1.0.2", "grpcio==1.65.5", "protobuf==3.20.3", "numpy==1.26.4")
_TIMEOUT_S: Final = 120

_ASK: Final = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from min_tfs_client.requests import TensorServingClient
from min_tfs_client.tensors import tensor_proto_to_ndarray
host, port = sys.argv[2].split(":")
model, inputs = sys.argv[3], json.loads(sys.argv[4])
dtypes = {"DT_STRING": np.str_, "DT_FLOAT": np.float32, "DT_INT64": np.int64, "DT_INT32": np.int32}
arrays = {n: np.array(i["content"], dtypes[i["dtype"]]).reshape(i["shape"]) for n, i in inputs.items()}
answer = TensorServingClient(host, int(port)).predict_request(model, arrays)
outputs = {name: list(tensor_proto_to_ndarray(proto).shape) for name, proto in answer.outputs.items()}
print("version", answer.model_spec.version.value, json.dumps(outputs))
"""


def main() -> int:
    """Runs both clients against every pushed model; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="a finished run")
    parser.add_argument("--folder", type=Path, required=True, help="where the clients are installed")
    parser.add_argument("--concurrency", default="1:4:3", help="start:end:step, as perf_analyzer takes it")
    options = parser.parse_args()
    bases = {
        path.name: path for path in sorted((options.output_dir / "serving_models").iterdir()) if path.is_dir()
    }
    perf_analyzer = _install(options.folder / "perf_analyzer", _PERF_ANALYZER)
    min_tfs_client = _install(options.folder / "min_tfs_client", _MIN_TFS_CLIENT)
    failed = False
    with ModelServerProcess(bases) as server:
        address = server.grpc_target.removeprefix("grpc://")
        for model in bases:
            inputs = _request(httpx.get(f"{server.rest_target}/v1/models/{model}/metadata").json())
            runs = {"min-tfs-client": _run_min_tfs_client(min_tfs_client, address, model, inputs)}
            if "k" not in inputs:
                runs["perf_analyzer"] = _run_perf_analyzer(
                    perf_analyzer, address, model, inputs, options.concurrency
                )
            for name, done in runs.items():
                print(f"\n{model}, {name}: {'passed' if done.returncode == 0 else 'FAILED'}")
                print(_summary(done))
                failed |= done.returncode != 0
    return int(failed)


def _install(folder: Path, packages: Sequence[str]) -> Path:
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, *packages, *(["six"] if "min" in packages[0] else [])], check=True)
    return folder


def _request(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """One row of empty values for each input of `serving_default`, and k = 10."""
    inputs = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]
    values = {"DT_STRING": "", "DT_FLOAT": 0.0, "DT_INT64": 0, "DT_INT32": 10}
    return {
        name: {
            "content": [values[info["dtype"]]],
            "shape": [1] * len(info["tensor_shape"]["dim"]),
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
    command += [
        "--input-data",
        str(data),
        "--measurement-interval",
        "2000",
        "--concurrency-range",
        concurrency,
    ]
    return _run(command, {**os.environ, "LD_LIBRARY_PATH": str(libraries)})


def _run_min_tfs_client(
    folder: Path, address: str, model: str, inputs: Mapping[str, Any]
) -> subprocess.CompletedProcess[str]:
    # -S leaves out the environment's packages, so that the client meets only its own.
    command = [sys.executable, "-I", "-S", "-c", _ASK, str(folder), address, model, json.dumps(inputs)]
    return _run(command, dict(os.environ))


def _run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, text=True, timeout=_TIMEOUT_S, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _summary(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode != 0:
        return "\n".join(f"  {line}" for line in done.stdout.splitlines()[-15:])
    wanted = re.compile(r"^(Request concurrency|\s+(Request count|Throughput|p50|p99)|version)")
    return "\n".join(f"  {line.strip()}" for line in done.stdout.splitlines() if wanted.match(line))


if __name__ == "__main__":
    sys.exit(main())
