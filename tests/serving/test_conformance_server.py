"""What the server's flags and files promise: config reload, labels, metrics, timeouts, CORS, draining."""

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from prometheus_client.parser import text_string_to_metric_families
from tensorflow_serving.apis import (
    classification_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from schema.errors import ConfigError, ServingError
from serving.inference import CLASSIFY_METHOD, REGRESS_METHOD
from serving.metrics import read_metrics_path
from serving.process import ModelServerProcess
from serving.servable import Servable
from serving.transport import BadRequestError, open_transport
from serving.warmup import WARMUP_FILE, replay_warmup_requests
from tests.serving import models
from tests.serving.waiting import wait_for

METRICS_PATH = "/monitoring/prometheus/metrics"
CONFIG = """
model_config_list {
  config {
    name: "echo" base_path: "%s" model_platform: "tensorflow"
    model_version_policy { specific { versions: 1 versions: 2 } }
    version_labels { key: "stable" value: %d }
    version_labels { key: "canary" value: 2 }
  }
  config { name: "examples" base_path: "%s" }
}
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, echo_versions, base_paths):
    path = tmp_path_factory.mktemp("config") / "models.config"
    path.write_text(CONFIG % (echo_versions, 1, base_paths["examples"]))
    return path


@pytest.fixture(scope="module")
def configured(config_file):
    """A server with every flag set that another server of these tests leaves alone."""
    folder = config_file.parent
    monitoring = folder / "monitoring.config"
    monitoring.write_text(f'prometheus_config {{ enable: true path: "{METRICS_PATH}" }}')
    flags = [
        "--model_config_file_poll_wait_seconds=0.1",
        "--allow_version_labels_for_unavailable_models=true",
        f"--monitoring_config_file={monitoring}",
        "--rest_api_timeout_in_ms=2000",
        "--rest_api_enable_cors_support",
        "--enable_signature_method_name_check",
        "--grpc_max_threads=2",
        "--grpc_channel_arguments=grpc.max_connection_age_ms=600000",
        f"--grpc_socket_path={folder / 'grpc.sock'}",
        "--tensorflow_session_parallelism=2",
    ]
    with ModelServerProcess(config_file, flags=flags) as process:
        yield process


@pytest.fixture(scope="module")
def channel(configured):
    with grpc.insecure_channel(configured.grpc_target.removeprefix("grpc://")) as channel:
        yield channel


@pytest.fixture(scope="module")
def http(configured):
    with httpx.Client(base_url=configured.rest_target, timeout=30) as client:
        yield client


def version_of(http, path=""):
    body = {"signature_name": "which_version", "inputs": [0.0]}
    answer = http.post(f"/v1/models/echo{path}:predict", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"]["version"][0]


def request_of(signature, **inputs):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "echo"
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def sleep_request(seconds):
    return request_of("sleep", seconds=np.float32(seconds))


def fast_request(signature="half"):
    return request_of(signature, x=np.zeros(1, np.float32))


# Versions and labels


def test_several_versions_answer_by_number_and_by_label_over_both_apis(http, channel):
    assert version_of(http) == 2
    assert version_of(http, "/versions/1") == 1
    assert version_of(http, "/labels/stable") == 1
    assert version_of(http, "/labels/canary") == 2
    (status,) = http.get("/v1/models/echo/labels/stable").json()["model_version_status"]
    assert (status["version"], status["state"]) == ("1", "AVAILABLE")
    assert http.get("/v1/models/echo/labels/canary/metadata").json()["model_spec"]["version"] == "2"

    request = fast_request()
    request.model_spec.version_label = "stable"
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=30)
    assert response.model_spec.version.value == 1
    assert response.model_spec.WhichOneof("version_choice") == "version"


@pytest.mark.parametrize(("label", "version"), [("stable", 1), ("canary", 2)])
def test_the_client_asks_the_version_that_has_its_label(configured, label, version):
    for target, told in ((configured.grpc_target, version), (configured.rest_target, None)):
        transport = open_transport(target, label)
        specs = transport.signatures("echo", 30)["serving_default"]
        inputs = {"text": ["a"], "number": [1], "floats": [[1.0]]}
        assert transport.predict("echo", inputs, specs, 30).version == told
        assert transport.available_versions("echo", 30) == [version]
        transport.close()
    with pytest.raises(BadRequestError, match="label: nobody"):
        open_transport(configured.rest_target, "nobody").signatures("echo", 30)


def test_a_changed_config_file_is_taken_over_and_a_wrong_one_is_not(
    http, configured, config_file, echo_versions, base_paths
):
    config_file.write_text(CONFIG % (echo_versions, 2, base_paths["examples"]))
    wait_for(lambda: version_of(http, "/labels/stable") == 2)
    config_file.write_text("model_config_list {")
    wait_for(lambda: "is not a ModelServerConfig text proto" in configured.log)
    config_file.write_text(CONFIG % (echo_versions, 9, base_paths["examples"]))
    wait_for(lambda: "Request to assign label stable to version 9" in configured.log)
    assert version_of(http, "/labels/stable") == 2
    config_file.write_text(CONFIG % (echo_versions, 1, base_paths["examples"]))
    wait_for(lambda: version_of(http, "/labels/stable") == 1)


def test_a_reload_request_serves_what_it_names(base_paths, tmp_path):
    with (
        ModelServerProcess({"swapped": base_paths["swapped"]}, flags=["--rest_api_port=0"]) as server,
        grpc.insecure_channel(server.grpc_target.removeprefix("grpc://")) as channel,
    ):
        assert server.rest_target == "http://off"
        reload = model_service_pb2_grpc.ModelServiceStub(channel).HandleReloadConfigRequest
        predict = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict
        request = model_management_pb2.ReloadConfigRequest()
        request.config.model_config_list.config.add(name="echo", base_path=str(base_paths["echo"]))
        assert reload(request, timeout=60).status.error_code == 0
        assert predict(sleep_request(0.0), timeout=30).model_spec.name == "echo"

        request.config.model_config_list.config.add(name="missing", base_path=str(tmp_path))
        with pytest.raises(grpc.RpcError, match="'missing'") as caught:
            reload(request, timeout=60)
        assert caught.value.code() == grpc.StatusCode.UNKNOWN
        assert predict(sleep_request(0.0), timeout=30).model_spec.name == "echo"


# Flags


def test_method_names_are_checked_when_asked_for(channel):
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    for call, kind, signature in [
        (stub.Regress, regression_pb2.RegressionRequest, "native"),
        (stub.Classify, classification_pb2.ClassificationRequest, "regress"),
    ]:
        request = kind()
        request.model_spec.name = "examples"
        request.model_spec.signature_name = signature
        request.input.example_list.examples.add().features.feature["x"].float_list.value.append(1.0)
        with pytest.raises(grpc.RpcError, match="method_name") as caught:
            call(request, timeout=30)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_grpc_is_served_on_the_socket_file_too(configured, config_file):
    with grpc.insecure_channel(f"unix:{config_file.parent / 'grpc.sock'}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        assert stub.Predict(sleep_request(0.0), timeout=30).model_spec.version.value == 2


def test_a_rest_call_that_takes_too_long_is_504(http):
    body = {"signature_name": "sleep", "inputs": 4.0}
    started = time.monotonic()
    answer = http.post("/v1/models/echo:predict", json=body)
    assert answer.status_code == 504
    assert "no answer after 2 s" in answer.json()["error"]
    assert time.monotonic() - started < 4


def test_browsers_of_other_sites_may_ask_when_cors_is_enabled(http, server):
    answer = http.get("/v1/models/nothing", headers={"Origin": "http://elsewhere"})
    assert answer.status_code == 404
    assert answer.headers["access-control-allow-origin"] == "*"
    preflight = http.options("/v1/models/echo:predict")
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-methods"] == "POST, GET"
    assert "access-control-allow-origin" not in httpx.get(f"{server.rest_target}/v1/models/echo").headers


def test_a_call_whose_deadline_passes_while_it_waits_for_a_thread_never_runs(channel):
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    counted = fast_request("which_version")

    def num_calls():
        return stub.Predict(counted, timeout=30).outputs["calls"].int64_val[0]

    def times_out(request):
        try:
            stub.Predict(request, timeout=0.3)
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        return False

    before = num_calls()
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(stub.Predict, sleep_request(1.5), timeout=30) for _ in range(2)]
        wait_for(lambda: times_out(fast_request()))  # both threads of this server are taken now
        assert times_out(counted)
        assert not any(call.done() for call in running)
        assert [call.result().outputs["done"].float_val[0] for call in running] == [1.5] * 2
    assert num_calls() == before + 1


# Metrics


def samples_of(http):
    answer = http.get(METRICS_PATH)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        # This parser, unlike Prometheus, gives the name of every counter the suffix _total.
        (sample.name.removesuffix("_total"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value_of(samples, name, **labels):
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


def test_metrics_have_the_official_names_labels_and_units(http, channel):
    before = samples_of(http)
    version_of(http)
    http.post("/v1/models/echo:predict", json={"instances": []})
    http.post("/v1/models/made-up-by-a-client:predict", json={"instances": [1]})
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    stub.Predict(sleep_request(0.01), timeout=30)
    request = regression_pb2.RegressionRequest()
    request.model_spec.name = "examples"
    request.model_spec.signature_name = "regress"
    for _ in range(3):
        request.input.example_list.examples.add().features.feature["x"].float_list.value.append(1.0)
    stub.Regress(request, timeout=30)
    after = samples_of(http)

    def added(name, **labels):
        return value_of(after, name, **labels) - value_of(before, name, **labels)

    serving = ":tensorflow:serving:"
    assert added(f"{serving}request_count", model_name="echo", status="OK") == 2
    assert added(f"{serving}request_count", model_name="echo", status="INVALID_ARGUMENT") == 1
    assert added(f"{serving}request_count", model_name="", status="NOT_FOUND") == 1
    rest = {"model_name": "echo", "API": "predict", "entrypoint": "REST"}
    over_grpc = {"model_name": "echo", "API": "Predict", "entrypoint": "GRPC"}
    assert added(f"{serving}request_latency_count", **rest) == 1
    assert added(f"{serving}request_latency_count", **over_grpc) == 1
    assert added(f"{serving}request_latency_sum", **over_grpc) >= 10_000  # microseconds
    assert added(f"{serving}request_latency_bucket", le="10", **over_grpc) == 0
    assert added(f"{serving}request_latency_bucket", le="+Inf", **over_grpc) == 1
    runtime = {"model_name": "echo", "API": "Predict", "runtime": "TF1"}
    assert added(f"{serving}runtime_latency_count", **runtime) == 2
    assert added(f"{serving}request_example_count", model="examples") == 3
    assert added(f"{serving}request_example_counts_bucket", model="examples", le="2") == 0
    assert added(f"{serving}request_example_counts_bucket", model="examples", le="4") == 1
    assert added(":tensorflow:core:graph_runs") == 3
    assert added(":tensorflow:core:graph_run_time_usecs") >= 10_000
    loads = [key for key in after if key[0] == ":tensorflow:cc:saved_model:load_attempt_count"]
    assert {dict(labels)["status"] for _, labels in loads} == {"success"}
    assert not any("made-up" in str(key) for key in after)


def test_the_metrics_page_is_written_as_prometheus_expects_it(http):
    text = http.get(METRICS_PATH).text
    assert "# TYPE :tensorflow:serving:request_count counter\n" in text
    assert "# TYPE :tensorflow:serving:request_example_count_total counter\n" in text
    assert "# TYPE :tensorflow:serving:request_latency histogram\n" in text
    assert re.search(r'^:tensorflow:serving:request_count\{model_name="echo",status="OK"\} \d+$', text, re.M)
    limits = re.findall(
        r'request_latency_bucket\{model_name="echo",API="Predict",entrypoint="GRPC",le="(.*?)"', text
    )
    assert limits[:6] == ["10", "18", "32.4", "58.32", "104.976", "188.957"]
    assert limits[-1] == "+Inf"


def test_without_a_monitoring_config_there_are_no_metrics(server):
    assert httpx.get(f"{server.rest_target}{METRICS_PATH}").status_code == 404


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prometheus_config { enable: true path: '/m' }", "/m"),
        ("prometheus_config { enable: true }", "/monitoring/prometheus/metrics"),
        ("prometheus_config { path: '/m' }", None),
        ("", None),
    ],
)
def test_a_monitoring_config_tells_where_the_metrics_are(tmp_path, text, expected):
    (tmp_path / "monitoring.config").write_text(text)
    assert read_metrics_path(tmp_path / "monitoring.config") == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prometheus_config { enable: true path: 'm' }", "must start with '/'"),
        ("prometheus_config { enabled: true }", "is not a MonitoringConfig"),
    ],
)
def test_a_wrong_monitoring_config_is_refused(tmp_path, text, complaint):
    (tmp_path / "monitoring.config").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_metrics_path(tmp_path / "monitoring.config")


# Warm-up


def write_logs(path: Path, *logs):
    (path / WARMUP_FILE).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path / WARMUP_FILE)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())


def test_warmup_replays_records_of_every_api_as_often_as_asked(tmp_path):
    path = models.save_examples_model(tmp_path / "1")
    regress, classify, both, predict = (prediction_log_pb2.PredictionLog() for _ in range(4))
    for spec in (
        regress.regress_log.request.model_spec,
        predict.predict_log.request.model_spec,
        both.multi_inference_log.request.tasks.add(method_name=REGRESS_METHOD).model_spec,
    ):
        spec.signature_name = "regress"
    for spec in (
        classify.classify_log.request.model_spec,
        both.multi_inference_log.request.tasks.add(method_name=CLASSIFY_METHOD).model_spec,
    ):
        spec.signature_name = "classify"
    example = tf.train.Example()
    example.features.feature["x"].float_list.value.append(1.0)
    for log in (regress.regress_log, classify.classify_log, both.multi_inference_log):
        log.request.input.example_list.examples.append(example)
    predict.predict_log.request.inputs["inputs"].CopyFrom(tf.make_tensor_proto([example.SerializeToString()]))
    write_logs(path, regress, classify, both, predict)
    servable = Servable("examples", 1, path)
    assert replay_warmup_requests(servable, num_iterations=2) == 8
    assert replay_warmup_requests(servable, num_iterations=0) == 0

    session_run = prediction_log_pb2.PredictionLog()
    session_run.session_run_log.SetInParent()
    write_logs(path, session_run)
    with pytest.raises(ServingError, match="of type session_run_log"):
        replay_warmup_requests(servable)


# Draining; the last test of this module, since it stops its server


def test_sigterm_answers_what_is_in_flight_and_refuses_what_comes(configured, channel):
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    with ThreadPoolExecutor() as pool:
        in_flight = pool.submit(stub.Predict, sleep_request(4.0), timeout=30)
        time.sleep(1.0)
        os.kill(configured.pid, signal.SIGTERM)

        def refused():
            try:
                stub.Predict(fast_request(), timeout=5)
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE
                return True
            return False

        wait_for(refused)
        assert not in_flight.done()
        assert in_flight.result().outputs["done"].float_val[0] == 4.0
    assert configured.wait(timeout_s=30) == 0
