"""What the server counts: the metrics of the official server, by name, label and unit, for Prometheus.

prometheus_client keeps and sums them. It cannot print them: a counter that it prints ends in `_total`, which
the official names do not; `render` writes the text format instead.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypeVar

import grpc
from google.protobuf import descriptor_pb2, message_factory
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

from schema.errors import ConfigError
from serving.config import read_text_proto
from serving.workers import METRICS_FOLDER_VARIABLE

_Metric = TypeVar("_Metric", Counter, Histogram)

REGISTRY: Final = CollectorRegistry()

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_DEFAULT_PATH: Final = "/monitoring/prometheus/metrics"  # the official server's
_MICROSECONDS: Final = 1e6
_LATENCY_BUCKETS: Final = tuple(10 * 1.8**i for i in range(33))  # microseconds, up to about 20 minutes
_QUEUING_BUCKETS: Final = tuple(100 * 1.2**i for i in range(52))  # microseconds, up to about a second
_COUNT_BUCKETS: Final = tuple(2.0**i for i in range(15))
_BATCH_SIZE_BUCKETS: Final = tuple(2.0**i for i in range(14))
_RUNTIME: Final = "TF1"  # what the official server calls the TensorFlow runtime, whatever the model's age
_THREAD_POOL: Final = ""  # what it calls the threads of batches, whatever their name in the file


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"{name}_total", text, labels, registry=REGISTRY)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    return Histogram(name, text, labels, buckets=buckets, registry=REGISTRY)


_REQUEST_COUNT = _counter(":tensorflow:serving:request_count", "Requests answered.", "model_name", "status")
_REQUEST_LATENCY = _histogram(
    ":tensorflow:serving:request_latency", "Wall time of requests in microseconds.", _LATENCY_BUCKETS,
    "model_name", "API", "entrypoint",
)  # fmt: skip
_RUNTIME_LATENCY = _histogram(
    ":tensorflow:serving:runtime_latency", "Wall time in TensorFlow in microseconds.", _LATENCY_BUCKETS,
    "model_name", "API", "runtime",
)  # fmt: skip
_EXAMPLE_COUNTS = _histogram(
    ":tensorflow:serving:request_example_counts", "tf.Examples per request.", _COUNT_BUCKETS, "model"
)
_EXAMPLE_COUNT_TOTAL = _counter(
    ":tensorflow:serving:request_example_count_total", "tf.Examples in all.", "model"
)
_QUEUING_LATENCY = _histogram(
    ":tensorflow:serving:batching_session:queuing_latency", "Microseconds that requests waited for a batch.",
    _QUEUING_BUCKETS, "thread_pool_name",
)  # fmt: skip
_PROCESSED_BATCH_SIZE = _histogram(
    ":tensorflow:serving:batching_session:processed_batch_size", "Rows of batches, those filled up included.",
    _BATCH_SIZE_BUCKETS,
)  # fmt: skip
_PADDING_SIZE = _histogram(
    ":tensorflow:serving:batching_session:padding_size", "Rows by which batches were filled up.",
    _BATCH_SIZE_BUCKETS, "execution_batch_size",
)  # fmt: skip
_WRAPPED_RUN_COUNT = _counter(":tensorflow:serving:batching_session:wrapped_run_count", "Batches run.")
_GRAPH_RUNS = _counter(":tensorflow:core:graph_runs", "Graphs run, each for one request or one batch.")
_GRAPH_RUN_TIME = _counter(":tensorflow:core:graph_run_time_usecs", "Microseconds in which graphs ran.")
_LOAD_ATTEMPTS = _counter(
    ":tensorflow:cc:saved_model:load_attempt_count", "Tries to load a SavedModel.", "model_path", "status"
)
_LOAD_LATENCY = _counter(
    ":tensorflow:cc:saved_model:load_latency", "Microseconds spent on loading.", "model_path"
)


@functools.cache
def _child(metric: _Metric, *labels: str) -> _Metric:
    """`metric.labels(...)`, which takes longer than to count. There are few labels, see `record_request`."""
    return metric.labels(*labels)


def record_request(model: str, api: str, entrypoint: str, code: grpc.StatusCode, duration_s: float) -> None:
    """Counts one answered request; only those that succeeded have a latency, as in the official server.

    Args:
      model: name of a served model; `""` for a name that is not served, which anybody could make up.
      api: `Predict`, `Classify`, ... over gRPC, `predict`, ... over REST.
      entrypoint: `GRPC` or `REST`.
      code: how it ended.
      duration_s: seconds from the decoded call to the answer.
    """
    _child(_REQUEST_COUNT, model, code.name).inc()
    if code == grpc.StatusCode.OK:
        _child(_REQUEST_LATENCY, model, api, entrypoint).observe(duration_s * _MICROSECONDS)


def record_run(model: str, api: str, duration_s: float) -> None:
    """Counts the time until a request had its outputs, which in a batch includes its wait for the batch."""
    _child(_RUNTIME_LATENCY, model, api, _RUNTIME).observe(duration_s * _MICROSECONDS)


def record_graph_run(duration_s: float) -> None:
    """Counts one run of a graph by TensorFlow, whether for one request or for a batch of them."""
    _GRAPH_RUNS.inc()
    _GRAPH_RUN_TIME.inc(duration_s * _MICROSECONDS)


def record_queuing(waits_s: Iterable[float]) -> None:
    """Counts the seconds for which each request of a batch has waited when it begins."""
    histogram = _child(_QUEUING_LATENCY, _THREAD_POOL)
    for wait_s in waits_s:
        histogram.observe(wait_s * _MICROSECONDS)


def record_batch(num_rows: int, size: int) -> None:
    """Counts one run of a batch of `num_rows` rows of requests, filled up to `size` rows."""
    _PROCESSED_BATCH_SIZE.observe(size)
    _child(_PADDING_SIZE, str(size)).observe(size - num_rows)
    _WRAPPED_RUN_COUNT.inc()


def record_examples(model: str, num_examples: int) -> None:
    """Counts the tf.Examples of one Classify, Regress or MultiInference request."""
    _EXAMPLE_COUNTS.labels(model).observe(num_examples)
    _EXAMPLE_COUNT_TOTAL.labels(model).inc(num_examples)


def record_load(path: Path, code: grpc.StatusCode, duration_s: float) -> None:
    """Counts one try to load the version in `path`."""
    status = "success" if code == grpc.StatusCode.OK else "fail"
    _LOAD_ATTEMPTS.labels(str(path), status).inc()
    _LOAD_LATENCY.labels(str(path)).inc(duration_s * _MICROSECONDS)


def read_metrics_path(path: Path) -> str | None:
    """Reads a `monitoring.config`, a MonitoringConfig text proto.

    Returns:
      The URL path of the metrics, by default that of the official server, or None when they are not enabled.

    Raises:
      ConfigError: not readable, not such a proto, or a path that does not start with a slash.
    """
    config = read_text_proto(path, _MONITORING_CONFIG(), "--monitoring_config_file").prometheus_config
    if not config.enable:
        return None
    url_path = str(config.path) or _DEFAULT_PATH
    if not url_path.startswith("/"):
        raise ConfigError(
            f"--monitoring_config_file {path}: prometheus_config.path must start with '/', got {url_path!r}; "
            f"the usual one is {_DEFAULT_PATH!r}"
        )
    return url_path


def render() -> bytes:
    """Writes all metrics in Prometheus' text format, those of several workers summed."""
    registry = REGISTRY
    if METRICS_FOLDER_VARIABLE in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    lines: list[str] = []
    for metric in registry.collect():
        lines += [f"# HELP {metric.name} {metric.documentation}", f"# TYPE {metric.name} {metric.type}"]
        for sample in metric.samples:
            if sample.name.endswith("_created"):
                continue
            name = metric.name if metric.type == "counter" else sample.name
            labels = ",".join(f'{key}="{_label(key, value)}"' for key, value in sample.labels.items())
            lines.append(f"{name}{{{labels}}} {_number(sample.value)}")
    return "".join(f"{line}\n" for line in lines).encode()


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _label(name: str, value: str) -> str:
    if name == "le" and value != "+Inf":
        return f"{float(value):g}"
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _monitoring_config_class() -> type:
    """The MonitoringConfig proto, which the tensorflow-serving-api package leaves out."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="monitoring_config.proto", package="tensorflow.serving", syntax="proto3"
    )
    prometheus = file.message_type.add(name="PrometheusConfig")
    prometheus.field.add(name="enable", number=1, type=field.TYPE_BOOL, label=field.LABEL_OPTIONAL)
    prometheus.field.add(name="path", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    monitoring = file.message_type.add(name="MonitoringConfig")
    monitoring.field.add(
        name="prometheus_config", number=1, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL,
        type_name=".tensorflow.serving.PrometheusConfig",
    )  # fmt: skip
    return message_factory.GetMessages([file])["tensorflow.serving.MonitoringConfig"]


_MONITORING_CONFIG: Final = _monitoring_config_class()
