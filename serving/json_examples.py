"""JSON of the REST API's `:classify` and `:regress`: tf.Examples in, results out, by `api_rest.md`."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import classification_pb2, input_pb2, regression_pb2

from serving.json_body import (
    decode_base64,
    dump,
    encode_text,
    is_base64,
    overflowed,
    parse_body,
    show,
    signature_name_of,
)
from serving.status import invalid_argument

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1


def decode_examples_request(body: bytes) -> tuple[str, input_pb2.Input]:
    """Decodes the body of a `:classify` or `:regress` call.

    Args:
      body: UTF-8 JSON with `examples`, a list of objects that give each feature a value or a list of values,
        maybe `context`, one such object for what all examples share, and maybe `signature_name`.

    Returns:
      Signature name (`""`: the default one), and the examples.

    Raises:
      RequestError: INVALID_ARGUMENT, with the place in the body that is wrong.
    """
    document = parse_body(body)
    examples = document.get("examples")
    if not isinstance(examples, list) or not examples:
        raise invalid_argument(f"expected 'examples', a list with at least one object, got {show(examples)}")
    decoded = [_example(f"'examples': element {i}", example) for i, example in enumerate(examples)]
    result = input_pb2.Input()
    if "context" in document:
        result.example_list_with_context.context.CopyFrom(_example("'context'", document["context"]))
        result.example_list_with_context.examples.extend(decoded)
    else:
        result.example_list.examples.extend(decoded)
    return signature_name_of(document), result


def encode_classifications(result: classification_pb2.ClassificationResult) -> bytes:
    """Encodes `{"results": [[[label, score], ...], ...]}`, one list for each example."""
    return dump(
        {
            "results": [
                [[entry.label, _shortest(entry.score)] for entry in classifications.classes]
                for classifications in result.classifications
            ]
        }
    )


def encode_regressions(result: regression_pb2.RegressionResult) -> bytes:
    """Encodes `{"results": [value, ...]}`, one value for each example."""
    return dump({"results": [_shortest(regression.value) for regression in result.regressions]})


def _example(place: str, features: object) -> tf.train.Example:
    if not isinstance(features, dict):
        raise invalid_argument(f"{place}: expected an object, one key for each feature, got {show(features)}")
    example = tf.train.Example()
    for name, values in features.items():
        feature = example.features.feature[name]
        for value in values if isinstance(values, list) else [values]:
            _add_value(f"{place}, feature {name!r}", feature, value)
    return example


def _add_value(place: str, feature: tf.train.Feature, given: Any) -> None:
    kind: str
    value = given
    if isinstance(value, str):
        kind, value = "bytes_list", encode_text(place, value)
    elif is_base64(value):
        kind, value = "bytes_list", decode_base64(place, value)
    elif isinstance(value, int):  # true and false count as 1 and 0
        kind, value = "int64_list", _int64(place, value)
    elif isinstance(value, float):
        kind, value = "float_list", _float32(place, value)
    else:
        raise invalid_argument(f'{place}: expected a number, text or {{"b64": ...}}, got {show(value)}')
    if feature.WhichOneof("kind") not in (None, kind):
        raise invalid_argument(f"{place}: values must be of one kind, got {show(given)} among others")
    getattr(feature, kind).value.append(value)


def _int64(place: str, value: int) -> int:
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise invalid_argument(f"{place}: {show(value)} is not an int64")
    return int(value)


def _float32(place: str, value: float) -> float:
    if overflowed(value) or (math.isfinite(value) and abs(value) > _FLOAT32_MAX):
        raise invalid_argument(f"{place}: {show(value)} is beyond the range of float32")
    return value


def _shortest(value: float) -> float:
    """The double with the fewest digits that reads back as the same float32."""
    return float(str(np.float32(value)))
