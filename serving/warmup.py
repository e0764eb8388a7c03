"""Warm-up requests: written beside an exported model, replayed by the server before it takes traffic."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy.typing as npt
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import prediction_log_pb2

from schema.errors import ServingError
from serving.predict_request import PredictRequest

if TYPE_CHECKING:
    from serving.servable import Servable

WARMUP_FILE: Final = Path("assets.extra") / "tf_serving_warmup_requests"
MAX_WARMUP_REQUESTS: Final = 1000  # TensorFlow Serving refuses a model with more


def write_warmup_requests(
    saved_model_dir: Path | str,
    model_name: str,
    requests: Mapping[str, Sequence[Mapping[str, npt.NDArray[Any]]]],
) -> Path:
    """Writes `assets.extra/tf_serving_warmup_requests` of a SavedModel, replacing an older one.

    Args:
      saved_model_dir: folder with `saved_model.pb`.
      model_name: name under which the model will be served.
      requests: 1 to 1000 in all, by name of the signature that they call; each maps every input name of the
        signature to its array, batch first (strings as object or bytes arrays).

    Returns:
      Path of the file: a TFRecord of PredictionLog.

    Raises:
      ServingError: no SavedModel there, no request, or too many of them.
    """
    saved_model_dir = Path(saved_model_dir)
    if not (saved_model_dir / "saved_model.pb").is_file():
        raise ServingError(f"no saved_model.pb in {saved_model_dir}; write warm-up requests after the export")
    number = sum(map(len, requests.values()))
    if not 1 <= number <= MAX_WARMUP_REQUESTS:
        raise ServingError(f"expected 1 to {MAX_WARMUP_REQUESTS} warm-up requests, got {number}")
    path = saved_model_dir / WARMUP_FILE
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with tf.io.TFRecordWriter(str(partial)) as writer:
        for signature_name, request in ((name, one) for name, many in requests.items() for one in many):
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.model_spec.name = model_name
            log.predict_log.request.model_spec.signature_name = signature_name
            for name, array in request.items():
                log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
            writer.write(log.SerializeToString())
    partial.replace(path)
    return path


def replay_warmup_requests(servable: Servable, num_iterations: int = 1) -> int:
    """Runs the warm-up requests that travel with a model version, if there are any.

    Args:
      servable: the loaded version.
      num_iterations: how often each record is run; 0 runs none.

    Returns:
      Number of requests run.

    Raises:
      ServingError: the file is damaged, holds too many records or one that cannot be replayed, or a request
        fails: like TensorFlow Serving, the server then does not serve this version.
    """
    path = servable.path / WARMUP_FILE
    if num_iterations == 0 or not path.is_file():
        return 0
    logs = _read_logs(path)
    for log in logs:
        for _ in range(num_iterations):
            _replay(servable, log, path)
    return len(logs) * num_iterations


def _replay(servable: Servable, log: prediction_log_pb2.PredictionLog, path: Path) -> None:
    from serving import inference  # it imports ScaNN; the exporter, which only writes, need not wait for it

    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        request = PredictRequest.FromString(log.predict_log.request.SerializeToString())
        inference.predict(servable, request).run()
    elif kind == "classify_log":
        inference.classify(servable, log.classify_log.request, check_method_name=False).run()
    elif kind == "regress_log":
        inference.regress(servable, log.regress_log.request, check_method_name=False).run()
    elif kind == "multi_inference_log":
        inference.multi_inference(servable, log.multi_inference_log.request, check_method_name=False).run()
    else:
        raise ServingError(
            f"{path} holds a record of type {kind or 'unknown'}; "
            f"expected predict_log, classify_log, regress_log or multi_inference_log"
        )


def _read_logs(path: Path) -> list[prediction_log_pb2.PredictionLog]:
    try:
        records = list(tf.data.TFRecordDataset(str(path)).take(MAX_WARMUP_REQUESTS + 1).as_numpy_iterator())
        logs = [prediction_log_pb2.PredictionLog.FromString(record) for record in records]
    except (tf.errors.DataLossError, DecodeError) as error:
        raise ServingError(f"{path} is not a TFRecord of PredictionLog: {error}") from error
    if len(logs) > MAX_WARMUP_REQUESTS:
        raise ServingError(f"{path} has more than {MAX_WARMUP_REQUESTS} records; keep the first ones")
    return logs
