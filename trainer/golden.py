"""Golden requests: what a trained model answers, written beside its export, to be asked again elsewhere.

The file is a TFRecord of PredictionLog, as TensorFlow Serving logs requests and reads them for warm-up: each
record holds a PredictRequest and the PredictResponse of the trained Keras model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from schema.errors import BundleError, ServingError

GOLDEN_FILE = Path("assets.extra") / "golden_requests"
# A float32 sum differs in its last digits between an eager and a compiled graph, batch sizes and processors.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-4, 1e-5

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class GoldenRequest:
    """A request and its answer.

    Attributes:
      signature: name of the signature that is asked.
      inputs: array by input name.
      outputs: what the trained model answers, by output name; strings as bytes.
    """

    signature: str
    inputs: Arrays
    outputs: Arrays


def answered(
    signature: str, inputs: Arrays, function: Callable[[Mapping[str, tf.Tensor]], Mapping[str, tf.Tensor]]
) -> GoldenRequest:
    """A golden request with the answer of a function that runs the trained model."""
    outputs = function({name: tf.constant(array) for name, array in inputs.items()})
    return GoldenRequest(signature, inputs, {name: value.numpy() for name, value in outputs.items()})


def write_golden_requests(model_dir: Path | str, requests: Sequence[GoldenRequest]) -> None:
    """Adds golden requests to an exported model, in place of any that it had."""
    path = Path(model_dir) / GOLDEN_FILE
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for golden in requests:
            log = prediction_log_pb2.PredictionLog().predict_log
            log.request.model_spec.signature_name = golden.signature
            for name, array in golden.inputs.items():
                log.request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
            for name, array in golden.outputs.items():
                log.response.outputs[name].CopyFrom(tf.make_tensor_proto(array))
            writer.write(prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString())


def read_golden_requests(model_dir: Path | str) -> list[GoldenRequest]:
    """Reads the golden requests of an exported or pushed model.

    Raises:
      BundleError: it has none.
    """
    path = Path(model_dir) / GOLDEN_FILE
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) if path.is_file() else []
    if not records:
        raise BundleError(
            f"{model_dir} has no golden requests ({path}): an older version of Funnel exported it; "
            "'funnel run' makes a bundle that has"
        )
    requests = []
    for record in records:
        log = prediction_log_pb2.PredictionLog.FromString(record).predict_log
        inputs = {name: tf.make_ndarray(proto) for name, proto in log.request.inputs.items()}
        outputs = {name: tf.make_ndarray(proto) for name, proto in log.response.outputs.items()}
        requests.append(GoldenRequest(log.request.model_spec.signature_name, inputs, outputs))
    return requests


def check_answer(golden: GoldenRequest, outputs: Arrays, who: str) -> None:
    """Checks an answer against the golden one.

    Ids and flags must be the same; numbers may differ by RELATIVE_TOLERANCE of the golden one and
    ABSOLUTE_TOLERANCE.

    Args:
      golden: what was asked, and the answer of the trained model.
      outputs: the answer to check, by output name; strings as bytes.
      who: names what answered, for the error.

    Raises:
      ServingError: the answers differ; the text says where.
    """
    if outputs.keys() != golden.outputs.keys():
        raise ServingError(
            f"{who}: {golden.signature} answers with {sorted(outputs)}, expected {sorted(golden.outputs)}"
        )
    for name, expected in golden.outputs.items():
        got = np.asarray(outputs[name])
        if got.shape != expected.shape:
            raise ServingError(
                f"{who}: {golden.signature} answers {name!r} of shape {got.shape}, expected {expected.shape}"
            )
        if np.issubdtype(expected.dtype, np.floating):
            same = np.isclose(got, expected, RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE, equal_nan=True)
        else:
            same = got == expected
        if not np.all(same):
            place = tuple(int(axis[0]) for axis in np.nonzero(~same))
            raise ServingError(
                f"{who}: {golden.signature} answers a golden request with other {name!r} than the trained "
                f"model in {np.sum(~same)} of {same.size} places, the first is {place}: "
                f"{got[place]!r}, expected {expected[place]!r}"
            )
