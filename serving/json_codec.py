"""JSON of the REST API's `:predict`, by `api_rest.md`: requests to arrays, arrays to answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from serving.json_body import (
    decode_base64,
    dump,
    dump_arrays,
    encode_base64,
    encode_text,
    is_base64,
    overflowed,
    parse_body,
    show,
    signature_name_of,
)
from serving.status import invalid_argument

RequestFormat = Literal["row", "column"]

_MAX_RANK: Final = 32  # what a NumPy array can have
_BYTES_SUFFIX: Final = "_bytes"


@dataclass(frozen=True)
class JsonPredictRequest:
    """A decoded `:predict` body. `inputs` are arrays by input name; strings are object arrays of bytes."""

    signature_name: str
    format: RequestFormat
    inputs: Mapping[str, npt.NDArray[Any]]


def decode_predict_request(
    body: bytes, input_dtypes: Callable[[str], Mapping[str, np.dtype[Any]]]
) -> JsonPredictRequest:
    """Decodes the body of a `:predict` call.

    Args:
      body: UTF-8 JSON with `instances` (row format) or `inputs` (column format), and maybe `signature_name`.
      input_dtypes: given a signature name (`""`: the default one), returns the dtype of each input; object
        dtype stands for strings.

    Raises:
      RequestError: INVALID_ARGUMENT, with the place in the body that is wrong.
    """
    document = parse_body(body)
    signature_name = signature_name_of(document)
    dtypes = input_dtypes(signature_name)

    if ("instances" in document) == ("inputs" in document):
        raise invalid_argument(
            "expected either 'instances' (row format) or 'inputs' (column format) in the body"
        )
    columns: dict[str, Any]
    if "instances" in document:
        request_format: RequestFormat = "row"
        columns = _columns_of_instances(document["instances"], dtypes)
    else:
        request_format = "column"
        columns = _columns_of_inputs(document["inputs"], dtypes)
    inputs = {name: _decode_array(name, value, dtypes[name]) for name, value in columns.items()}
    return JsonPredictRequest(signature_name, request_format, inputs)


def encode_predict_response(outputs: Mapping[str, npt.NDArray[Any]], request_format: RequestFormat) -> bytes:
    """Encodes outputs in the format of the request: `predictions` for rows, `outputs` for columns.

    One output is written without its name. Strings of outputs whose name ends in `_bytes` become
    `{"b64": ...}`. Floats get the fewest digits that read back as the same value of their dtype; NaN and
    infinities are bare tokens.

    Raises:
      RequestError: INVALID_ARGUMENT, when row format is asked for and outputs differ in their first
        dimension, or an output has no JSON form.
    """
    # orjson writes arrays fifteen times as fast as json writes lists, but null for what is not finite.
    is_finite = all(array.dtype.kind != "f" or np.isfinite(array).all() for array in outputs.values())
    encode, write = (_encode_finite, dump_arrays) if is_finite else (_encode_array, dump)
    if request_format == "column":
        values = {name: encode(name, array) for name, array in outputs.items()}
        return write({"outputs": next(iter(values.values())) if len(values) == 1 else values})
    sizes = {name: array.shape[:1] for name, array in outputs.items()}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise invalid_argument(
            "row format needs outputs with one common first dimension, got "
            + ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
            + "; ask in column format ('inputs')"
        )
    values = {name: encode(name, array) for name, array in outputs.items()}
    if len(values) == 1:
        return write({"predictions": next(iter(values.values()))})
    return write(
        {"predictions": [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]}
    )


def _columns_of_instances(instances: object, dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, Any]:
    if not isinstance(instances, list) or not instances:
        raise invalid_argument(f"'instances' must be a list with at least one element, got {show(instances)}")
    if not _is_named(instances[0]):
        return {_only_input("instances", dtypes): instances}
    for position, instance in enumerate(instances):
        if not _is_named(instance):
            raise invalid_argument(f"'instances': element {position} must be an object, got {show(instance)}")
        _check_names(f"'instances': element {position}", instance, dtypes)
    return {name: [instance[name] for instance in instances] for name in dtypes}


def _columns_of_inputs(inputs: object, dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, Any]:
    if not isinstance(inputs, dict) or not _is_named(inputs):
        return {_only_input("inputs", dtypes): inputs}
    _check_names("'inputs'", inputs, dtypes)
    return inputs


def _is_named(value: object) -> bool:
    """Whether a JSON value holds inputs by name: an object that is not an encoded binary string."""
    return isinstance(value, dict) and set(value) != {"b64"}


def _only_input(key: str, dtypes: Mapping[str, np.dtype[Any]]) -> str:
    if len(dtypes) != 1:
        raise invalid_argument(
            f"'{key}' holds plain values, which needs a signature with one input; "
            f"this one has: {', '.join(sorted(dtypes)) or 'none'}"
        )
    return next(iter(dtypes))


def _check_names(place: str, given: Mapping[str, Any], dtypes: Mapping[str, np.dtype[Any]]) -> None:
    missing = sorted(set(dtypes) - set(given))
    extra = sorted(set(given) - set(dtypes))
    if missing or extra:
        raise invalid_argument(
            f"{place}: inputs do not match the signature. Missing: {', '.join(missing) or 'none'}. "
            f"Not in the signature: {', '.join(extra) or 'none'}. Expected: {', '.join(sorted(dtypes))}"
        )


def _decode_array(name: str, value: object, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    shape: list[int] = []
    first = value
    while isinstance(first, list):
        shape.append(len(first))
        if len(shape) > _MAX_RANK:
            raise invalid_argument(f"input {name!r}: lists nested deeper than {_MAX_RANK}")
        if not first:
            break
        first = first[0]
    leaves = [value]
    for depth, size in enumerate(shape):
        for position, item in enumerate(leaves):
            if not isinstance(item, list) or len(item) != size:
                got = f"{len(item)} values" if isinstance(item, list) else show(item)
                raise invalid_argument(
                    f"input {name!r}: list {position} at level {depth} must have {size} values like the "
                    f"first one, got {got}; all lists of a tensor have one length, so pad the shorter ones"
                )
        leaves = [leaf for item in leaves for leaf in item]  # type: ignore[attr-defined]
    array = np.empty(len(leaves), dtype)
    array[:] = _decode_leaves(name, leaves, dtype)
    return array.reshape(shape)


def _decode_leaves(name: str, leaves: list[Any], dtype: np.dtype[Any]) -> list[Any]:
    if dtype.kind == "O":
        return [_decode_string(name, leaf) for leaf in leaves]
    if dtype.kind == "b":
        return [leaf if type(leaf) is bool else _wrong_type(name, leaf, dtype) for leaf in leaves]
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        return [
            leaf if type(leaf) is int and low <= leaf <= high else _wrong_type(name, leaf, dtype)
            for leaf in leaves
        ]
    if dtype.kind == "f":
        return [_decode_float(name, leaf, dtype) for leaf in leaves]
    raise invalid_argument(f"input {name!r}: dtype {dtype} has no JSON form; ask over gRPC")


def _decode_float(name: str, leaf: object, dtype: np.dtype[Any]) -> float:
    """Takes any number in the range of the dtype and, as TensorFlow Serving does, rounds to what it holds."""
    largest = float(np.finfo(dtype).max)
    if type(leaf) is int and abs(leaf) <= largest:
        return float(leaf)
    if type(leaf) is float and not (largest < abs(leaf) < np.inf or overflowed(leaf)):
        return leaf
    return _wrong_type(name, leaf, dtype)


def _decode_string(name: str, leaf: object) -> bytes:
    if is_base64(leaf):
        return decode_base64(f"input {name!r}", leaf)
    if not isinstance(leaf, str):
        return _wrong_type(name, leaf, np.dtype(object))
    return encode_text(f"input {name!r}", leaf)


def _wrong_type(name: str, leaf: object, dtype: np.dtype[Any]) -> Any:
    expected = {"O": 'a string or {"b64": ...}', "b": "true or false"}.get(
        dtype.kind,
        f"a number that {dtype} holds exactly" if dtype.kind in "iu" else f"a number in {dtype}'s range",
    )
    raise invalid_argument(f"input {name!r} takes {expected}, got {show(leaf)}")


def _encode_finite(name: str, array: npt.NDArray[Any]) -> Any:
    if array.dtype.kind not in "biuf" or array.dtype == np.float16:
        return _encode_array(name, array)
    return np.ascontiguousarray(array) if array.ndim else array[()]


def _encode_array(name: str, array: npt.NDArray[Any]) -> Any:
    if array.dtype.kind == "O":
        flat = np.empty(array.size, object)
        values = array.ravel().tolist()
        if name.endswith(_BYTES_SUFFIX):
            flat[:] = [encode_base64(value) for value in values]
        else:
            flat[:] = [_encode_text(name, value) for value in values]
        return flat.reshape(array.shape).tolist()
    if array.dtype in (np.float16, np.float32):
        # Through the shortest text: 0.2 stays 0.2, where widening to double would print 0.20000000298.
        return array.astype(str).astype(np.float64).tolist()
    if array.dtype.kind in "biuf":
        return array.tolist()
    raise invalid_argument(f"output {name!r}: dtype {array.dtype} has no JSON form; ask over gRPC")


def _encode_text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise invalid_argument(
            f"output {name!r} is not UTF-8 text; export it with a name that ends in '{_BYTES_SUFFIX}' "
            f"to get base64, or ask over gRPC"
        ) from error
