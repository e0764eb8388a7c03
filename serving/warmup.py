"""Warm-up requests: written beside an exported model, replayed by the server before it takes traffic."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy.typing as npt
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from schema.errors import ServingError

if TYPE_CHECKING:
    from serving.servable import Servable

logger = logging.getLogger(__name__)

WARMUP_FILE: Final = Path("assets.extra") / "tf_serving_warmup_requests"
MAX_WARMUP_REQUESTS: Final = 1000  # TensorFlow Serving refuses a model with more


def write_warmup_requests(
    saved_model_dir: Path | str,
    model_name: str,
    requests: Sequence[Mapping[str, npt.NDArray[Any]]],
    signature_name: str = "serving_default",
) -> Path:
    """Writes `assets.extra/tf_serving_warmup_requests` of a SavedModel, replacing an older one.

    Args:
      saved_model_dir: folder with `saved_model.pb`.
      model_name: name under which the model will be served.
      requests: 1 to 1000 requests; each maps every input name of the signature to its array, batch first
        (strings as object or bytes arrays).
      signature_name: the signature that the requests call.

    Returns:
      Path of the file: a TFRecord of PredictionLog.

    Raises:
      ServingError: no SavedModel there, no request, or too many of them.
    """
    saved_model_dir = Path(saved_model_dir)
    if not (saved_model_dir / "saved_model.pb").is_file():
        raise ServingError(f"no saved_model.pb in {saved_model_dir}; write warm-up requests after the export")
    if not 1 <= len(requests) <= MAX_WARMUP_REQUESTS:
        raise ServingError(f"expected 1 to {MAX_WARMUP_REQUESTS} warm-up requests, got {len(requests)}")
    path = saved_model_dir / WARMUP_FILE
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with tf.io.TFRecordWriter(str(partial)) as writer:
        for request in requests:
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.model_spec.name = model_name
            log.predict_log.request.model_spec.signature_name = signature_name
            for name, array in request.items():
                log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
            writer.write(log.SerializeToString())
    partial.replace(path)
    return path


def replay_warmup_requests(servable: Servable) -> int:
    """Runs the warm-up requests that travel with a model version, if there are any.

    Returns:
      Number of requests run.

    Raises:
      ServingError: the file is damaged, holds too many records, or a request fails: like TensorFlow Serving,
        the server then does not serve this version.
    """
    path = servable.path / WARMUP_FILE
    if not path.is_file():
        return 0
    num_requests = 0
    for request in _read_requests(path):
        servable.predict_request(request)
        num_requests += 1
    return num_requests


def _read_requests(path: Path) -> list[predict_pb2.PredictRequest]:
    try:
        records = list(tf.data.TFRecordDataset(str(path)).take(MAX_WARMUP_REQUESTS + 1).as_numpy_iterator())
        logs = [prediction_log_pb2.PredictionLog.FromString(record) for record in records]
    except (tf.errors.DataLossError, DecodeError) as error:
        raise ServingError(f"{path} is not a TFRecord of PredictionLog: {error}") from error
    if len(logs) > MAX_WARMUP_REQUESTS:
        raise ServingError(f"{path} has more than {MAX_WARMUP_REQUESTS} records; keep the first ones")
    requests = [log.predict_log.request for log in logs if log.HasField("predict_log")]
    if len(requests) < len(logs):
        logger.warning(
            "skipped %d warm-up records that are not Predict requests: %s", len(logs) - len(requests), path
        )
    return requests
