"""What the warm-up requests of a bundle are, read from its file."""

import re
from pathlib import Path

import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

import serving
from serving.warmup import WARMUP_FILE

_SETTINGS = Path(serving.__file__).parent / "settings" / "batching.config"


def allowed_batch_sizes() -> list[int]:
    """Those of the settings that the repository ships."""
    (sizes,) = re.findall(r"^allowed_batch_sizes: \[(.+)\]", _SETTINGS.read_text(), re.MULTILINE)
    return [int(size) for size in sizes.split(",")]


def expected_sizes(bundle: str) -> dict[str, list[int]]:
    """What `warmed_up_sizes` finds in a bundle that is whole: all sizes that a server may make."""
    signatures = ["serving_default", *(["serving_user"] if bundle.startswith("funnel") else [])]
    return dict.fromkeys(signatures, allowed_batch_sizes())


def warmed_up_sizes(folder: Path) -> dict[str, list[int]]:
    """Batch sizes of the Predict requests by signature; every input of one must have that many rows."""
    sizes: dict[str, list[int]] = {}
    for record in tf.data.TFRecordDataset(str(folder / WARMUP_FILE)).as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        (size,) = {tensor.tensor_shape.dim[0].size for tensor in request.inputs.values()}
        sizes.setdefault(request.model_spec.signature_name, []).append(size)
    return sizes
