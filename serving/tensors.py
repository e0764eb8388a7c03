"""Tensor protos of requests and answers to NumPy arrays and back; strings are object arrays of bytes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import tensor_pb2, types_pb2

from serving import wire
from serving.status import invalid_argument

# A tensor proto may declare a large shape and hold one value; the shape alone must not exhaust the memory.
_MAX_TENSOR_ELEMENTS: Final = 2**27
_MAX_REPEATED_ELEMENTS: Final = 2**20
_MAX_RANK: Final = 32  # what a NumPy array can have

# The field that holds one value per element, for the types where element and value are the same number.
_VALUE_FIELDS: Final[dict[int, tuple[np.dtype[Any], str]]] = {
    types_pb2.DT_FLOAT: (np.dtype(np.float32), "float_val"),
    types_pb2.DT_DOUBLE: (np.dtype(np.float64), "double_val"),
    types_pb2.DT_INT32: (np.dtype(np.int32), "int_val"),
    types_pb2.DT_INT64: (np.dtype(np.int64), "int64_val"),
    types_pb2.DT_UINT32: (np.dtype(np.uint32), "uint32_val"),
    types_pb2.DT_UINT64: (np.dtype(np.uint64), "uint64_val"),
    types_pb2.DT_BOOL: (np.dtype(np.bool_), "bool_val"),
    types_pb2.DT_STRING: (np.dtype(object), "string_val"),
}
_NUMBERS: Final = {field.name: field.number for field in tensor_pb2.TensorProto.DESCRIPTOR.fields}
_DATA_TYPES: Final = {dtype: data_type for data_type, (dtype, _) in _VALUE_FIELDS.items()}

_DTYPE: Final = wire.tag(_NUMBERS["dtype"], wire.VARINT)
_SHAPE: Final = wire.tag(_NUMBERS["tensor_shape"], wire.LENGTH_DELIMITED)
_DIM: Final = wire.tag(2, wire.LENGTH_DELIMITED)
_SIZE: Final = wire.tag(1, wire.VARINT)
# By the type of a tensor, the field of its values that is read without protobuf.
_PLAIN: Final = {
    data_type: wire.tag(_NUMBERS[_VALUE_FIELDS[data_type][1]], wire.LENGTH_DELIMITED)
    for data_type in (types_pb2.DT_STRING, types_pb2.DT_FLOAT, types_pb2.DT_INT32, types_pb2.DT_INT64)
}
# Several numbers of one width, as tf.make_tensor_proto writes them.
_CONTENT: Final = wire.tag(_NUMBERS["tensor_content"], wire.LENGTH_DELIMITED)
_CONTENT_TYPES: Final = {types_pb2.DT_FLOAT: "<f4", types_pb2.DT_INT32: "<i4", types_pb2.DT_INT64: "<i8"}
# Of more, protobuf is faster.
_MAX_PLAIN_BYTES: Final = 2000
_MAX_PLAIN_INTEGERS_BYTES: Final = 40


def decode_tensor(name: str, message: bytes) -> npt.NDArray[Any]:
    """Decodes one request tensor.

    Args:
      name: of the input, for the error text.
      message: a TensorProto, with its values in a typed field (`float_val`, ...; one value may stand for all)
        or in `tensor_content`.

    Raises:
      RequestError: INVALID_ARGUMENT when the message is damaged or contradicts itself, declares more than
        2**27 elements, more than 2**20 by repeating one value, or more than 32 dimensions.
    """
    if len(message) <= _MAX_PLAIN_BYTES:
        with contextlib.suppress(ValueError):
            return _read_plain(message)
    try:
        return _decode_proto(name, tensor_pb2.TensorProto.FromString(message))
    except DecodeError as error:
        raise invalid_argument(f"input {name!r} is not a TensorProto: {error}") from error


def _read_plain(message: bytes) -> npt.NDArray[Any]:
    """A tensor of strings, floats or a few integers, or of numbers in one piece.

    Raises:
      ValueError: protobuf must read it.
    """
    fields = wire.fields(message)
    data_type, shape = fields.pop(_DTYPE, [0])[-1], fields.pop(_SHAPE, [b""])
    is_content = _CONTENT in fields and data_type in _CONTENT_TYPES
    contents = fields.pop(_CONTENT if is_content else _PLAIN.get(data_type, -1), [])
    if fields or len(shape) > 1 or not contents or (is_content and len(contents) > 1):
        raise ValueError("not a plain tensor")
    if is_content:
        array = np.frombuffer(contents[0], _CONTENT_TYPES[data_type])
        return array.astype(_VALUE_FIELDS[data_type][0]).reshape(_read_sizes(shape[0]))
    if data_type == types_pb2.DT_STRING:
        return np.fromiter(contents, object, len(contents)).reshape(_read_sizes(shape[0]))
    content = b"".join(contents)
    if data_type == types_pb2.DT_FLOAT:
        return np.frombuffer(content, "<f4").astype(np.float32).reshape(_read_sizes(shape[0]))
    if len(content) > _MAX_PLAIN_INTEGERS_BYTES:
        raise ValueError("many integers")
    numbers = np.array(wire.varints(content), np.uint64).astype(np.int64)
    return numbers.astype(_VALUE_FIELDS[data_type][0]).reshape(_read_sizes(shape[0]))


@functools.lru_cache(maxsize=1024)
def _read_sizes(message: bytes) -> tuple[int, ...]:
    """The sizes of a TensorShapeProto, all above 0; ValueError for another one."""
    fields = wire.fields(message)
    dims = [wire.fields(dim) for dim in fields.pop(_DIM, [])]
    sizes = [dim.pop(_SIZE, [0])[-1] for dim in dims]
    if fields or any(dims) or any(not 0 < size <= _MAX_TENSOR_ELEMENTS for size in sizes):
        raise ValueError("a shape without known sizes")
    return tuple(sizes)


def _num_elements(name: str, shape: Sequence[int]) -> int:
    """Checks the shape that a tensor declares; see decode_tensor."""
    if min(shape, default=0) < 0:
        raise invalid_argument(f"input {name!r}: a tensor needs a known shape, got {shape}")
    if len(shape) > _MAX_RANK:
        raise invalid_argument(
            f"input {name!r}: a tensor has at most {_MAX_RANK} dimensions, got {len(shape)}"
        )
    num_elements = math.prod(shape)
    # Without the zeros as well: NumPy refuses [0, 2**60], too.
    if (num_elements or math.prod(filter(None, shape))) > _MAX_TENSOR_ELEMENTS:
        raise invalid_argument(f"input {name!r}: shape {shape} has more than {_MAX_TENSOR_ELEMENTS} elements")
    return num_elements


def _decode_proto(name: str, proto: tensor_pb2.TensorProto) -> npt.NDArray[Any]:
    if proto.tensor_shape.unknown_rank:
        raise invalid_argument(f"input {name!r}: a tensor needs a known shape")
    shape = [dim.size for dim in proto.tensor_shape.dim]
    num_elements = _num_elements(name, shape)
    # tf.make_ndarray knows every type and the protos that repeat their last value, and takes five times as
    # long.
    if not proto.tensor_content:
        dtype, field = _VALUE_FIELDS.get(proto.dtype, (None, ""))
        if dtype is not None and len(values := getattr(proto, field)) == num_elements:
            return np.fromiter(values, dtype, num_elements).reshape(shape)
        if num_elements > _MAX_REPEATED_ELEMENTS:
            raise invalid_argument(
                f"input {name!r}: shape {shape} has more than {_MAX_REPEATED_ELEMENTS} elements, so every "
                f"value must be given; of types such as int8 and half, in tensor_content"
            )
    try:
        return tf.make_ndarray(proto)
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise invalid_argument(f"input {name!r}: tensor cannot be decoded: {error}") from error


def encode_tensor(array: npt.NDArray[Any]) -> bytes:
    """Returns a serialized TensorProto, with the values in the typed field, as TensorFlow Serving has them.

    Strings and floats, which are what models answer with, are written here: filling a proto with a hundred
    strings and scores and serializing it takes three times as long.
    """
    data_type = _DATA_TYPES.get(array.dtype)
    if data_type is None:
        return bytes(tf.make_tensor_proto(array).SerializeToString())
    header, field = _header(data_type, array.shape), _VALUE_FIELDS[data_type][1]
    if array.dtype == object:
        return header + _encode_strings(array.ravel().tolist())
    if array.dtype.kind == "f":
        return header + wire.field(_NUMBERS[field], array.tobytes())
    return header + bytes(tensor_pb2.TensorProto(**{field: array.ravel().tolist()}).SerializeToString())


@functools.lru_cache(maxsize=1024)
def _header(data_type: int, shape: tuple[int, ...]) -> bytes:
    """Type and shape of a TensorProto."""
    proto = tensor_pb2.TensorProto(dtype=data_type)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    return bytes(proto.SerializeToString())


def _encode_strings(values: Sequence[bytes]) -> bytes:
    parts = [b""] * (2 * len(values))
    parts[::2] = map(_string_prefix, map(len, values))
    parts[1::2] = values
    return b"".join(parts)


@functools.lru_cache(maxsize=1024)
def _string_prefix(size: int) -> bytes:
    return wire.prefix(_NUMBERS["string_val"], size)
