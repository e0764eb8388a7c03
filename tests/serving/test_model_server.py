"""The real server in a process of its own, asked over real gRPC and REST."""

import base64
import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import psutil
import pytest
import scann
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2  # noqa: F401  the protos load side by side

from schema.errors import ServingError
from serving import model_server
from serving.flags import parse_flags
from serving.model_server import main
from serving.process import ModelServerProcess
from serving.warmup import WARMUP_FILE, write_warmup_requests
from tests.serving import models
from tests.serving.waiting import wait_for

State = get_model_status_pb2.ModelVersionStatus


@pytest.fixture(scope="module")
def channel(server):
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://"), options) as channel:
        yield channel


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.rest_target, timeout=30) as http:
        yield http


def test_it_listens_on_this_machine_alone_unless_told_otherwise(server):
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)  # gRPC listens by IPv6
        for connection in psutil.Process(server.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    targets = (server.grpc_target.removeprefix("grpc://"), server.rest_target.removeprefix("http://"))
    assert listening == {("127.0.0.1", int(target.rpartition(":")[2])) for target in targets}


def request_of(model, inputs, signature="", version=None, output_filter=()):
    request = predict_pb2.PredictRequest(output_filter=output_filter)
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def predict(channel, *args, **kwargs):
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    return stub.Predict(request_of(*args, **kwargs), timeout=30)


def echo_inputs(num=2):
    return {
        "text": [f"t{i}".encode() for i in range(num)],
        "number": np.arange(num, dtype=np.int64),
        "floats": np.arange(num * 2, dtype=np.float32).reshape(num, 2),
    }


def statuses(channel, model, version=None):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = model
    if version is not None:
        request.model_spec.version.value = version
    response = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(request, timeout=30)
    return {status.version: status for status in response.model_version_status}


# Predict


def test_grpc_rest_and_in_process_give_the_same_answer(channel, http, base_paths):
    inputs = {
        "user_id": [b"known1", b"other"],
        "age": np.array([3.5, np.nan], np.float32),
        "event_time_unix_s": np.array([2**53 + 1, -1], np.int64),
        "history_item_ids": [[b"item2", b"item5"], [b"", b""]],
        "k": np.array([3, 2], np.int32),
        "exclude_item_ids": [[b"item0"], [b""]],
        "allow_parity": [[b""], [b""]],
    }
    loaded = tf.saved_model.load(str(base_paths["retrieval"] / "1"))
    in_process = loaded.signatures["serving_default"](**{n: tf.constant(v) for n, v in inputs.items()})
    expected = {name: tensor.numpy().tolist() for name, tensor in in_process.items()}
    assert expected["item_ids"] == [[b"item1", b"item2", b"item3"], [b"item0", b"item1", b""]]

    over_grpc = predict(channel, "retrieval", inputs).outputs
    assert {name: tf.make_ndarray(proto).tolist() for name, proto in over_grpc.items()} == expected

    columns = json.loads(
        json.dumps({n: np.array(v).tolist() for n, v in inputs.items()}, default=bytes.decode)
    )
    over_rest = http.post("/v1/models/retrieval:predict", content=json.dumps({"inputs": columns})).json()
    as_text = json.loads(json.dumps(expected, default=bytes.decode))
    assert over_rest == {"outputs": as_text}

    rows = [{name: values[i] for name, values in columns.items()} for i in range(2)]
    by_rows = http.post("/v1/models/retrieval:predict", content=json.dumps({"instances": rows})).json()
    assert by_rows == {
        "predictions": [{name: values[i] for name, values in as_text.items()} for i in range(2)]
    }


def test_predict_names_the_version_and_signature_that_answered(channel):
    spec = predict(channel, "echo", echo_inputs()).model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("echo", 1, "serving_default")
    spec = predict(channel, "echo", {"x": np.zeros(1, np.float32)}, "half", version=1).model_spec
    assert (spec.version.value, spec.signature_name) == (1, "half")


def test_answers_use_the_typed_fields_that_clients_of_the_official_server_read(channel):
    outputs = predict(channel, "echo", echo_inputs()).outputs
    assert list(outputs["floats"].float_val) == [0, 1, 2, 3]
    assert list(outputs["number"].int64_val) == [0, 1]
    assert list(outputs["text"].string_val) == [b"t0", b"t1"]


def test_output_filter_chooses_outputs(channel):
    outputs = predict(channel, "echo", echo_inputs(), output_filter=["number"]).outputs
    assert list(outputs) == ["number"]


def test_rest_unwraps_a_single_output_and_reads_signature_name(http):
    body = {"signature_name": "half", "instances": [1.0, 3.0]}
    assert http.post("/v1/models/echo:predict", json=body).json() == {"predictions": [0.5, 1.5]}
    body = {"signature_name": "half", "inputs": {"x": [1.0, 3.0]}}
    answer = http.post("/v1/models/echo/versions/1:predict", json=body)
    assert answer.json() == {"outputs": [0.5, 1.5]}
    assert answer.headers["content-type"].startswith("application/json")


def test_rest_carries_binary_text_exact_integers_and_nan(http):
    blob = base64.b64encode(b"\x41\x00").decode()
    body = b'{"inputs": {"text": [{"b64": "%s"}], "number": [9007199254740993], "floats": [[NaN]]}}'
    answer = http.post("/v1/models/echo:predict", content=body % blob.encode()).content
    outputs = json.loads(answer)["outputs"]
    assert outputs["text_bytes"] == [{"b64": blob}]
    assert outputs["number"] == [9007199254740993]
    assert b"[[NaN]]" in answer


def test_messages_above_the_grpc_default_of_4_mb_pass(channel):
    inputs = echo_inputs(num=1)
    inputs["floats"] = np.zeros((1, 2_000_000), np.float32)
    assert predict(channel, "echo", inputs).outputs["floats"].tensor_shape.dim[1].size == 2_000_000


def test_a_scann_model_is_served_until_sigint(tmp_path):
    vectors = np.eye(16, 8, dtype=np.float32)
    vectors[8:] = -vectors[:8]

    class Searcher(tf.Module):
        def __init__(self):
            super().__init__()
            builder = scann.scann_ops.builder(vectors, 2, "dot_product")
            self.state = builder.score_brute_force().build().serialize_to_module()

        @tf.function(input_signature=[tf.TensorSpec([None, 8], tf.float32, name="query")])
        def serve(self, query):
            searcher = scann.scann_ops.searcher_from_module(self.state)
            return {"rows": searcher.search_batched(query)[0]}

    model = Searcher()
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    path = tmp_path / "index" / "1"
    tf.saved_model.save(model, str(path), signatures={"serving_default": model.serve}, options=options)
    with ModelServerProcess({"index": path.parent}) as server:
        body = {"instances": [vectors[3].tolist(), vectors[11].tolist()]}
        answer = httpx.post(f"{server.rest_target}/v1/models/index:predict", json=body, timeout=30).json()
        os.kill(server.pid, signal.SIGINT)
        assert server.wait(timeout_s=30) == 0
    assert [row[0] for row in answer["predictions"]] == [3, 11]


# Errors


@pytest.mark.parametrize(
    ("kwargs", "code", "complaint"),
    [
        ({"model": "nothing"}, "NOT_FOUND", "no model nothing; served: echo, "),
        ({"model": ""}, "INVALID_ARGUMENT", "no model name"),
        ({"version": 7}, "NOT_FOUND", "version 7 of model echo; loaded: 1"),
        ({"signature": "thirds"}, "FAILED_PRECONDITION", '"thirds" not found.*half'),
        ({"inputs": {}}, "INVALID_ARGUMENT", "Missing: floats, number, text"),
        ({"inputs": {**echo_inputs(), "extra": 1}}, "INVALID_ARGUMENT", "Not in the signature: extra"),
        ({"inputs": {**echo_inputs(), "number": [0.5]}}, "INVALID_ARGUMENT", "'number' must be int64"),
        ({"inputs": {**echo_inputs(), "text": b"a"}}, "INVALID_ARGUMENT", "'text' must be string"),
        ({"output_filter": ["nothing"]}, "INVALID_ARGUMENT", "no output 'nothing'"),
        ({"output_filter": ["text", "text"]}, "INVALID_ARGUMENT", "twice"),
    ],
    ids=str,
)
def test_a_wrong_predict_request_gets_its_code_and_a_reason(channel, kwargs, code, complaint):
    with pytest.raises(grpc.RpcError, match=complaint) as caught:
        predict(channel, **{"model": "echo", "inputs": echo_inputs(), **kwargs})
    assert caught.value.code().name == code


def test_an_error_of_the_graph_keeps_its_code_and_text(channel, http):
    inputs = {
        "user_id": ["u"],
        "age": [1.0],
        "event_time_unix_s": [1],
        "history_item_ids": [[""]],
        "k": [models.MAX_K + 1],
        "exclude_item_ids": [[""]],
        "allow_parity": [[""]],
    }
    answer = http.post("/v1/models/retrieval:predict", json={"inputs": inputs})
    assert answer.status_code == 400
    assert "k above the exported maximum" in answer.json()["error"]


@pytest.mark.parametrize("dims", [[2**40], [-1], [3, -1]], ids=str)
def test_a_tensor_that_claims_an_impossible_shape_is_refused(channel, dims):
    request = request_of("echo", {"x": np.zeros(1, np.float32)}, "half")
    del request.inputs["x"].tensor_shape.dim[:]
    for size in dims:
        request.inputs["x"].tensor_shape.dim.add(size=size)
    with pytest.raises(grpc.RpcError) as caught:
        prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("method", "path", "body", "http_code"),
    [
        ("POST", "/v1/models/nothing:predict", b'{"instances": [1]}', 404),
        ("POST", "/v1/models/echo/versions/7:predict", b'{"instances": [1]}', 404),
        ("GET", "/v1/models/nothing", None, 404),
        ("GET", "/v1/models/echo/versions/7", None, 404),
        ("GET", "/v1/models/nothing/metadata", None, 404),
        ("POST", "/v1/models/echo:predict", b"{", 400),
        ("POST", "/v1/models/echo:predict", b'{"instances": [{"text": "a"}]}', 400),
        ("POST", "/v1/models/echo:predict", b'{"signature_name": "thirds", "instances": [1]}', 400),
        ("GET", "/v1/models/echo:predict", None, 400),
        ("GET", "/v1/nothing", None, 400),
        ("GET", "/", None, 404),
    ],
)
def test_every_rest_error_has_its_code_and_the_documented_body(http, method, path, body, http_code):
    answer = http.request(method, path, content=body)
    assert answer.status_code == http_code
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"]


# Status and metadata


def test_status_over_rest_has_the_official_form(http):
    expected = {
        "model_version_status": [
            {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    }
    assert http.get("/v1/models/echo").json() == expected
    assert http.get("/v1/models/echo/versions/1").json() == expected


def test_status_over_grpc(channel):
    assert statuses(channel, "echo")[1].state == State.AVAILABLE
    assert statuses(channel, "echo", version=1)[1].status.error_message == ""
    with pytest.raises(grpc.RpcError) as caught:
        statuses(channel, "echo", version=7)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_metadata_over_rest_has_the_official_form(http):
    answer = http.get("/v1/models/echo/metadata").json()
    assert answer["model_spec"] == {"name": "echo", "version": "1", "signature_name": ""}
    signature = answer["metadata"]["signature_def"]["signature_def"]["half"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    assert signature["inputs"]["x"]["dtype"] == "DT_FLOAT"
    assert signature["inputs"]["x"]["tensor_shape"] == {
        "dim": [{"size": "-1", "name": ""}],
        "unknown_rank": False,
    }


def test_metadata_over_grpc_holds_the_signatures(channel):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "echo"
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    response = stub.GetModelMetadata(request, timeout=30)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert set(signatures.signature_def["serving_default"].inputs) == {"text", "number", "floats"}
    assert response.model_spec.version.value == 1

    request.metadata_field[:] = ["nothing"]
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetModelMetadata(request, timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


# Versions


def version_served(channel):
    outputs = predict(channel, "swapped", {"x": np.zeros(1, np.float32)}, "which_version").outputs
    return outputs["version"].int64_val[0]


def test_newer_versions_replace_older_ones_and_a_corrupt_one_replaces_none(channel, http, base_paths, server):
    base_path = base_paths["swapped"]
    assert version_served(channel) == 1

    failures = []
    stop = threading.Event()

    def ask_all_the_time():
        while not stop.is_set():
            try:
                version_served(channel)
            except grpc.RpcError as error:
                failures.append(error)

    with ThreadPoolExecutor() as pool:
        asking = pool.submit(ask_all_the_time)
        models.save_echo(base_path / "2", version=2)
        wait_for(lambda: version_served(channel) == 2)
        (base_path / "partial").mkdir()
        (base_path / "4").mkdir()  # no saved_model.pb: not a version yet

        shutil.copytree(base_path / "2", base_path / ".3")
        (base_path / ".3" / "variables" / "variables.index").write_bytes(b"damaged")
        (base_path / ".3").rename(base_path / "3")
        wait_for(lambda: statuses(channel, "swapped").get(3, State()).status.error_code != 0)
        stop.set()
        asking.result()
    assert failures == []
    assert version_served(channel) == 2
    seen = statuses(channel, "swapped")
    assert list(seen) == [3, 2, 1]
    # Version 3 will be tried again in a minute, and has not ended before the last try.
    assert [seen[v].state for v in (1, 2, 3)] == [State.END, State.AVAILABLE, State.LOADING]
    assert seen[1].status.error_message == ""
    assert seen[3].status.error_message
    assert "model=swapped version=3 cannot be loaded, still serving=[2], next try in 60 s" in server.log
    answer = http.post("/v1/models/swapped/versions/1:predict", json={"instances": [1.0]})
    assert answer.status_code == 404

    # Repaired files are tried at once; taking a version away goes back to the one before.
    shutil.copy(base_path / "2" / "variables" / "variables.index", base_path / "3" / "variables")
    wait_for(lambda: statuses(channel, "swapped")[3].state == State.AVAILABLE)
    shutil.rmtree(base_path / "3")
    wait_for(lambda: statuses(channel, "swapped")[2].state == State.AVAILABLE)
    assert version_served(channel) == 2
    wait_for(lambda: list(statuses(channel, "swapped")) == [2, 1])


def test_warmup_requests_have_run_before_the_first_request(channel):
    # Three warm-up requests in conftest.py call this signature, and this is its only other call.
    outputs = predict(channel, "echo", {"x": np.zeros(1, np.float32)}, "which_version").outputs
    assert outputs["calls"].int64_val[0] == 4


def test_warmup_file_is_replaced_whole_and_refuses_nonsense(tmp_path):
    with pytest.raises(ServingError, match=r"no saved_model\.pb"):
        write_warmup_requests(tmp_path, "m", {"serving_default": [{}]})
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(ServingError, match=r"1 to 1000.*got 0"):
        write_warmup_requests(tmp_path, "m", {})
    path = write_warmup_requests(tmp_path, "m", {"serving_default": [{"x": np.zeros(1)}]})
    assert path == tmp_path / WARMUP_FILE
    write_warmup_requests(tmp_path, "m", {"serving_default": [{"x": np.zeros(1)}] * 2})
    assert len(list(tf.data.TFRecordDataset(str(path)))) == 2
    assert [file.name for file in path.parent.iterdir()] == ["tf_serving_warmup_requests"]


# The process


def test_a_slow_request_does_not_hold_up_others(channel, http):
    slow = {"seconds": np.float32(2.0)}
    with ThreadPoolExecutor() as pool:
        body = {"signature_name": "sleep", "inputs": {"seconds": 2.0}}
        pending = [
            pool.submit(predict, channel, "echo", slow, "sleep"),
            pool.submit(http.post, "/v1/models/echo:predict", json=body),
        ]
        time.sleep(0.3)
        predict(channel, "echo", {"x": np.zeros(1, np.float32)}, "half")
        http.get("/v1/models/echo").raise_for_status()
        http.post(
            "/v1/models/echo:predict", json={"signature_name": "half", "instances": [1.0]}
        ).raise_for_status()
        assert not any(future.done() for future in pending)
        assert pending[1].result().json() == {"outputs": 2.0}


def test_sigterm_lets_requests_in_flight_finish(base_paths):
    with ModelServerProcess({"echo": base_paths["echo"]}) as server, ThreadPoolExecutor() as pool:
        url = f"{server.rest_target}/v1/models/echo:predict"
        body = {"signature_name": "sleep", "inputs": {"seconds": 1.5}}
        rest = pool.submit(httpx.post, url, json=body, timeout=30)
        with grpc.insecure_channel(server.grpc_target.removeprefix("grpc://")) as channel:
            over_grpc = pool.submit(predict, channel, "echo", {"seconds": np.float32(1.5)}, "sleep")
            time.sleep(0.5)
            os.kill(server.pid, signal.SIGTERM)
            time.sleep(0.5)
            assert not rest.done()
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{server.rest_target}/v1/models/echo", timeout=5)
            assert rest.result().json() == {"outputs": 1.5}
            assert over_grpc.result().outputs["done"].float_val[0] == 1.5
        assert server.wait(timeout_s=30) == 0


@pytest.mark.parametrize("flag", ["--port", "--rest_api_port"])
def test_a_taken_port_is_named_with_the_flag_that_changes_it(base_paths, flag, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = {"--port": "--rest_api_port", "--rest_api_port": "--port"}[flag]
        arguments = [
            f"{flag}={port}",
            f"{other}=auto",
            "--model_name=echo",
            f"--model_base_path={base_paths['echo']}",
        ]
        assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"port {port}" in error
    assert f"with {flag} " in error


def test_a_second_server_cannot_share_the_ports_of_the_first(server, base_paths, capsys):
    port = server.grpc_target.rpartition(":")[2]
    arguments = [f"--port={port}", "--rest_api_port=auto", f"--model_base_path={base_paths['echo']}"]
    assert main(arguments) == 1
    assert f"gRPC port {port}" in capsys.readouterr().err


def test_a_model_without_version_is_an_error_that_says_what_was_expected(tmp_path, base_paths, capsys):
    for path, complaint in [
        (tmp_path / "absent", "is not a folder"),
        (tmp_path, "no version under"),
        (base_paths["echo"] / "1", "is itself a SavedModel"),
    ]:
        assert (
            main(["--port=auto", "--rest_api_port=auto", "--model_name=m", f"--model_base_path={path}"]) == 1
        )
        assert complaint in capsys.readouterr().err


def test_a_model_whose_only_version_is_damaged_is_an_error_with_the_reason(tmp_path, base_paths, capsys):
    (tmp_path / "1").mkdir()
    whole = (base_paths["echo"] / "1" / "saved_model.pb").read_bytes()
    (tmp_path / "1" / "saved_model.pb").write_bytes(whole[: len(whole) // 2])
    assert (
        main(["--port=auto", "--rest_api_port=auto", "--model_name=m", f"--model_base_path={tmp_path}"]) == 1
    )
    assert "version 1" in (error := capsys.readouterr().err)
    assert "is not a SavedModel" in error


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("text", [None, "prometheus_config { enabled: true }"], ids=["missing", "wrong"])
def test_a_mistake_in_the_monitoring_config_shows_before_models_are_loaded(
    tmp_path, base_paths, monkeypatch, capsys, text, num_workers
):
    monitoring = tmp_path / "monitoring.config"
    if text is not None:
        monitoring.write_text(text)
    for name in ("_load_models", "Supervisor"):
        monkeypatch.setattr(model_server, name, lambda *_: pytest.fail("the models load"))
    flags = [f"--num_workers={num_workers}", f"--monitoring_config_file={monitoring}"]
    model = f"--model_base_path={base_paths['echo']}"
    assert main(["--port=auto", "--rest_api_port=auto", model, *flags]) == 1
    assert f"--monitoring_config_file {monitoring}" in capsys.readouterr().err


def test_a_server_process_that_does_not_start_raises_with_the_end_of_its_log(tmp_path):
    with (
        pytest.raises(ServingError, match=r"(?s)exit code 1.*model 'm'.*is not a folder"),
        ModelServerProcess({"m": tmp_path / "absent"}),
    ):
        pass


def test_a_server_process_that_takes_too_long_is_stopped(base_paths):
    server = ModelServerProcess({"echo": base_paths["echo"]}, startup_timeout_s=0.2)
    with pytest.raises(ServingError, match=r"not ready after 0\.2 s"), server:
        pass
    with pytest.raises(ServingError, match="not running"):
        _ = server.pid


def test_a_start_that_was_stopped_for_a_while_is_not_given_up(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 0.2\necho ready grpc=g rest=r models=m:1\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr("serving.process.sys.executable", str(python))
    monotonic, leap = time.monotonic, iter(range(0, 10**9, 1000))
    monkeypatch.setattr("serving.process.time.monotonic", lambda: monotonic() + next(leap))
    with ModelServerProcess({"m": tmp_path}, startup_timeout_s=30) as server:
        assert server.versions == {"m": 1}


def test_ready_line_tells_the_versions(server, base_paths):
    assert server.versions == dict.fromkeys(base_paths, 1)


def test_a_pinned_worker_has_threads_for_its_own_cpus_not_for_those_of_the_machine(monkeypatch):
    """16 of them with 16 threads each would take turns on 16 cores."""
    usable, served = set(range(16)), []

    async def serve(flags, link):
        served.append((model_server._batching_parameters(flags), model_server._default_num_threads()))
        return 0

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: usable.intersection_update(cpus))
    monkeypatch.setattr(model_server, "_serve", serve)
    for name in ("_quiet_libraries", "_log", "_exit"):  # they are for a process that ends with the worker
        monkeypatch.setattr(model_server, name, lambda *_: None)
    flags = parse_flags(["--num_workers=16", "--pin_workers", "--enable_batching"])
    assert (flags.grpc_max_threads, flags.rest_api_num_threads) == (None, None)  # told before it is pinned
    for cpus, num_batch_threads, num_api_threads in ([], 16, 64), ([4, 12, 5], 3, 12), ([5], 1, 8):
        model_server._run_worker(flags, cpus, connection=None, config=None, check_labels=True)
        parameters, num_threads = served.pop()
        assert (parameters.num_batch_threads, num_threads) == (num_batch_threads, num_api_threads)
