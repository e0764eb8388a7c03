"""Two real workers behind one pair of ports, and the supervisor with made-up ones."""

import asyncio
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

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
from serving.cores import deal_out_cpus
from serving.process import ModelServerProcess
from serving.status import RequestError
from serving.workers import (
    Supervisor,
    WorkerLink,
    _Ready,
    _Reload,
    _Reloaded,
    reserve_port,
)
from tests.serving.waiting import wait_for

MANY = 24  # connections; that the kernel deals them all to one of two workers has a chance of 1 in 8 million
TWO_CORES = len(os.sched_getaffinity(0)) > 1


@pytest.fixture(scope="module")
def base_path(tmp_path_factory, echo_versions):
    path = tmp_path_factory.mktemp("workers") / "echo"
    shutil.copytree(echo_versions / "1", path / "1")
    return path


@pytest.fixture(scope="module")
def server(base_path):
    monitoring = base_path.parent / "monitoring.config"
    monitoring.write_text('prometheus_config { enable: true path: "/metrics" }')
    flags = ["--num_workers=2", f"--monitoring_config_file={monitoring}", *["--pin_workers"] * TWO_CORES]
    with ModelServerProcess({"echo": base_path}, poll_wait_s=0.1, flags=flags) as server:
        yield server


def which_version(server, model="echo", label=""):
    """Version and number of calls so far of the worker that a new connection is given to."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = model, "which_version"
    if label:
        request.model_spec.version_label = label
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.zeros(1, np.float32)))
    # Channels with the same arguments share a connection within a process, unless told otherwise.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://"), options) as channel:
        response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=30)
    return response.outputs["version"].int64_val[0], response.outputs["calls"].int64_val[0]


def reload(server, base_paths, labels=None):
    request = model_management_pb2.ReloadConfigRequest()
    for name, path in base_paths.items():
        request.config.model_config_list.config.add(
            name=name, base_path=str(path), version_labels=(labels or {}).get(name)
        )
    with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://")) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        return stub.HandleReloadConfigRequest(request, timeout=60)


def workers_of(server):
    return [
        child.pid
        for child in psutil.Process(server.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]


def cores_of(pid):
    """The cores that the threads of a process may use: a set of sets."""
    return {frozenset(os.sched_getaffinity(thread.id)) for thread in psutil.Process(pid).threads()}


def test_new_connections_are_dealt_out_among_the_workers_and_metrics_are_summed(server):
    calls = [which_version(server)[1] for _ in range(MANY)]
    assert len(set(calls)) < MANY  # each worker counts for itself
    metrics = httpx.get(f"{server.rest_target}/metrics", timeout=30).text
    counted = re.search(r'request_count\{model_name="echo",status="OK"\} (\S+)', metrics)
    assert float(counted.group(1)) == MANY


@pytest.mark.skipif(not TWO_CORES, reason="two workers need two cores to be kept apart")
def test_all_threads_of_a_pinned_worker_stay_on_its_share_of_the_cores(server):
    shares = deal_out_cpus(2)
    threads = [cores for pid in workers_of(server) for cores in cores_of(pid)]
    assert sorted(map(sorted, threads)) == sorted(map(sorted, shares))
    assert cores_of(server.pid) == {frozenset(itertools.chain(*shares))}
    for share in shares:
        assert f"runs on CPUs {','.join(map(str, share))}\n" in server.log


def test_all_workers_take_up_a_new_version(server, base_path, echo_versions):
    shutil.copytree(echo_versions / "2", base_path / ".2")
    (base_path / ".2").rename(base_path / "2")
    wait_for(lambda: all(which_version(server)[0] == 2 for _ in range(MANY)), timeout_s=60)


def test_a_reload_reaches_all_workers_before_it_is_answered(server, base_path, tmp_path):
    with pytest.raises(grpc.RpcError) as caught:
        reload(server, {"": base_path})
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    reload(server, {"echo": base_path, "second": base_path})
    assert [which_version(server, "second")[0] for _ in range(MANY)] == [2] * MANY


def test_a_worker_that_dies_is_replaced_and_has_the_config_of_the_others(server, base_path, tmp_path):
    """A config with labels, and with a model that none of them can load."""
    reload(server, {"echo": base_path, "third": base_path})
    with pytest.raises(grpc.RpcError) as caught:
        reload(server, {"third": base_path, "nowhere": tmp_path}, {"third": {"stable": 2}})
    assert caught.value.code() == grpc.StatusCode.UNKNOWN
    before = workers_of(server)
    assert len(before) == 2
    cores = cores_of(before[0])
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: re.search(r"worker pid=\d+ serves", server.log), timeout_s=60)
    after = workers_of(server)
    assert len(after) == 2
    assert before[1] in after
    (new,) = set(after) - {before[1]}
    assert cores_of(new) == cores
    assert f"worker pid={before[0]} ended with exit code -9: starting another" in server.log
    assert [which_version(server, "third", "stable")[0] for _ in range(MANY)] == [2] * MANY


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


class MadeUpProcess:
    """A worker that answers a config as `answers` says: None, (code, text), or "dies"."""

    def __init__(self, connection, config, answers):
        self.pid, self.exitcode, self.configs = id(self), -9, [config]
        self._connection = Connection(os.dup(connection.fileno()))
        self._answers = answers
        self.sentinel, self._end = os.pipe()

    def start(self):
        self._connection.send(_Ready("echo:1"))
        threading.Thread(target=self._run, daemon=True).start()

    def join(self):
        os.close(self.sentinel)

    def terminate(self):
        if self._end is not None:
            os.close(self._end)
            self._end = None

    def _run(self):
        while True:
            try:
                message = self._connection.recv()
            except EOFError:  # the supervisor is done
                return
            self.configs.append(message.config)
            answer = self._answers.get(message.config)
            if answer == "dies":
                self.terminate()
                return
            self._connection.send(_Reloaded(message.number, answer))


def reload_made_up(answers_by_worker, *configs):
    """Reloads one config after the other; returns the supervisor, all processes and the error of the last."""

    async def run():
        started = []

        def start(place, connection, config, check_labels):
            answers = answers_by_worker[len(started)] if len(started) < len(answers_by_worker) else {}
            started.append(MadeUpProcess(connection, config, answers))
            return started[-1]

        supervisor = Supervisor(len(answers_by_worker), start)
        workers = [supervisor._add_worker(check_labels=False) for _ in answers_by_worker]
        await asyncio.gather(*(worker.ready for worker in workers))
        told = []
        workers[0].connection = Recorder(workers[0].connection, told)
        for number, config in enumerate(configs):
            await supervisor._reload(workers[0], _Reload(number, config))
        await asyncio.gather(*supervisor._tasks)
        supervisor._stopping.set()
        await supervisor._stop_workers()
        return started, told[-1].error

    return asyncio.run(run())


class Recorder:
    """A connection that keeps what is sent to the worker that asked."""

    def __init__(self, connection, told):
        self._connection, self._told = connection, told

    def send(self, message):
        if isinstance(message, _Reloaded):
            self._told.append(message)
        else:
            self._connection.send(message)

    def __getattr__(self, name):
        return getattr(self._connection, name)


def test_a_config_that_one_worker_refuses_is_taken_back_from_all():
    refusal = ("FAILED_PRECONDITION", "label")
    processes, error = reload_made_up([{}, {b"new": refusal}], b"old", b"new")
    assert error == refusal
    assert [process.configs for process in processes] == [[None, b"old", b"new", b"old"]] * 2


def test_a_config_with_a_model_that_does_not_load_holds_for_the_others():
    processes, error = reload_made_up([{}, {b"new": ("UNKNOWN", "no version")}], b"new")
    assert error == ("UNKNOWN", "no version")
    assert [process.configs for process in processes] == [[None, b"new"]] * 2


def test_a_refusal_counts_more_than_a_model_that_does_not_load():
    answers = [{b"new": ("UNKNOWN", "no version")}, {b"new": ("INTERNAL", "oops")}]
    processes, error = reload_made_up(answers, b"new")
    assert error == ("INTERNAL", "oops")
    assert [process.configs for process in processes] == [[None, b"new", None]] * 2


def test_a_worker_that_dies_of_a_config_fails_the_reload_and_its_successor_has_the_config_before():
    processes, error = reload_made_up([{}, {b"new": "dies"}], b"old", b"new")
    assert error[0] == "UNAVAILABLE"
    assert "ended during the reload" in error[1]
    assert [process.configs for process in processes] == [
        [None, b"old", b"new", b"old"],
        [None, b"old", b"new"],
        [b"old"],
    ]


def test_an_answer_that_nobody_waits_for_any_more_does_no_harm():
    async def run():
        ours, theirs = multiprocessing.Pipe()
        link = WorkerLink(theirs, None, check_labels=True)
        link.listen(lambda *_: None, lambda: None)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(link.reload(b"first"), 0.01)
        asked = asyncio.ensure_future(link.reload(b"second"))
        await asyncio.sleep(0)
        first, second = ours.recv(), ours.recv()
        ours.send(_Reloaded(first.number, None))
        ours.send(_Reloaded(second.number, ("UNKNOWN", "no version")))
        with pytest.raises(RequestError, match="no version"):
            await asked
        asyncio.get_running_loop().remove_reader(theirs.fileno())

    asyncio.run(run())
