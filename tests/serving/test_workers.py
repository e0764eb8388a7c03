"""Two real workers behind one pair of ports."""

import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import psutil
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from schema.errors import ServingError
from serving.process import ModelServerProcess
from serving.workers import reserve_port

MANY = 24  # connections; that the kernel deals them all to one of two workers has a chance of 1 in 8 million


@pytest.fixture(scope="module")
def base_path(tmp_path_factory, echo_versions):
    path = tmp_path_factory.mktemp("workers") / "echo"
    shutil.copytree(echo_versions / "1", path / "1")
    return path


@pytest.fixture(scope="module")
def server(base_path):
    monitoring = base_path.parent / "monitoring.config"
    monitoring.write_text('prometheus_config { enable: true path: "/metrics" }')
    flags = ["--num_workers=2", f"--monitoring_config_file={monitoring}"]
    with ModelServerProcess({"echo": base_path}, poll_wait_s=0.1, flags=flags) as server:
        yield server


def which_version(server, model="echo"):
    """Version and number of calls so far of the worker that a new connection is given to."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = model, "which_version"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.zeros(1, np.float32)))
    # Channels with the same arguments share a connection within a process, unless told otherwise.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://"), options) as channel:
        response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=30)
    return response.outputs["version"].int64_val[0], response.outputs["calls"].int64_val[0]


def reload(server, base_paths):
    request = model_management_pb2.ReloadConfigRequest()
    for name, path in base_paths.items():
        request.config.model_config_list.config.add(name=name, base_path=str(path))
    with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://")) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        return stub.HandleReloadConfigRequest(request, timeout=60)


def workers_of(server):
    return [
        child.pid
        for child in psutil.Process(server.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]


def wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.1)


def test_new_connections_are_dealt_out_among_the_workers_and_metrics_are_summed(server):
    calls = [which_version(server)[1] for _ in range(MANY)]
    assert len(set(calls)) < MANY  # each worker counts for itself
    metrics = httpx.get(f"{server.rest_target}/metrics", timeout=30).text
    counted = re.search(r'request_count\{model_name="echo",status="OK"\} (\S+)', metrics)
    assert float(counted.group(1)) == MANY


def test_all_workers_take_up_a_new_version(server, base_path, echo_versions):
    shutil.copytree(echo_versions / "2", base_path / ".2")
    (base_path / ".2").rename(base_path / "2")
    wait_for(lambda: all(which_version(server)[0] == 2 for _ in range(MANY)))


def test_a_reload_reaches_all_workers_before_it_is_answered(server, base_path, tmp_path):
    with pytest.raises(grpc.RpcError) as caught:
        reload(server, {"": base_path})
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    reload(server, {"echo": base_path, "second": base_path})
    assert [which_version(server, "second")[0] for _ in range(MANY)] == [2] * MANY


def test_a_worker_that_dies_is_replaced_and_has_the_config_of_the_others(server, base_path):
    reload(server, {"echo": base_path, "third": base_path})
    before = workers_of(server)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: re.search(r"worker pid=\d+ serves", server.log))
    after = workers_of(server)
    assert len(after) == 2
    assert before[1] in after
    assert f"worker pid={before[0]} ended with exit code -9: starting another" in server.log
    assert [which_version(server, "third")[0] for _ in range(MANY)] == [2] * MANY


def test_sigterm_lets_requests_in_flight_finish_and_leaves_no_process(server):
    children = [psutil.Process(pid) for pid in workers_of(server)]
    body = {"signature_name": "sleep", "inputs": {"seconds": 1.5}}
    with ThreadPoolExecutor() as pool:
        url = f"{server.rest_target}/v1/models/third:predict"
        asked = [pool.submit(httpx.post, url, json=body, timeout=30) for _ in range(4)]
        time.sleep(0.7)
        os.kill(server.pid, signal.SIGTERM)
        assert [answer.result().json() for answer in asked] == [{"outputs": 1.5}] * 4
    assert server.wait(timeout_s=30) == 0
    assert not any(child.is_running() for child in children)


def test_a_model_that_does_not_load_is_told_once_and_ends_the_server(tmp_path, echo_versions):
    shutil.copytree(echo_versions / "1", tmp_path / "1")
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"damaged")
    flags = ["--num_workers=2", "--max_num_load_retries=0"]
    with (
        pytest.raises(ServingError, match=r"(?s)exit code 1.*error: .*is not a SavedModel") as caught,
        ModelServerProcess({"m": tmp_path}, flags=flags),
    ):
        pass
    assert str(caught.value).count("error: ") == 1


def test_a_port_that_somebody_has_cannot_be_reserved():
    with reserve_port("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            reserve_port("127.0.0.1", port)
