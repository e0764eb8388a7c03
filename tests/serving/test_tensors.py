"""Tensor protos to arrays and back, against TensorFlow's own conversions."""

import random
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import tensor_pb2, types_pb2

from serving import tensors
from serving.status import RequestError
from serving.tensors import decode_tensor, encode_tensor

ARRAYS = {
    "float32": np.array([[1.5, np.nan], [np.inf, -0.0]], np.float32),
    "float64": np.array([0.1, 1e300]),
    "int32": np.array([[-(2**31)], [2**31 - 1]], np.int32),
    "int64": np.array([2**53 + 1, -(2**63)], np.int64),
    "uint8": np.array([0, 255], np.uint8),
    "uint64": np.array([2**64 - 1], np.uint64),
    "bool": np.array([True, False]),
    "float16": np.array([0.5, 65504], np.float16),
    "string": np.array([[b"a\x00", b""]], object),
    "long strings": np.array([b"a" * size for size in (127, 128, 2**14 - 1, 2**14)], object),
    "every other row": np.arange(6, dtype=np.float32).reshape(3, 2)[::2],
    "scalar": np.array(7, np.int64),
    "scalar string": np.array(b"end\x00", object),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_an_array_survives_both_ways_and_as_tensor_content(array):
    encoded = tensor_pb2.TensorProto.FromString(encode_tensor(array))
    for proto in (encoded, tf.make_tensor_proto(array)):
        decoded = decode_tensor("x", proto.SerializeToString())
        assert decoded.dtype == array.dtype
        np.testing.assert_array_equal(decoded, array)
    np.testing.assert_array_equal(tf.make_ndarray(encoded), array)


def test_a_last_value_that_stands_for_the_rest_is_repeated():
    proto = tensor_pb2.TensorProto(dtype=tf.float32.as_datatype_enum, float_val=[1, 2])
    proto.tensor_shape.dim.add(size=4)
    assert decode_tensor("x", proto.SerializeToString()).tolist() == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("dims", "num_values"), [([2**40], 1), ([-1], 1), ([3, -1], 1), ([2], 3), ([2**14, 2**14], 1)], ids=str
)
def test_a_proto_that_contradicts_itself_or_claims_too_much_is_refused(dims, num_values):
    proto = tensor_pb2.TensorProto(dtype=tf.float32.as_datatype_enum, float_val=[0.0] * num_values)
    for size in dims:
        proto.tensor_shape.dim.add(size=size)
    with pytest.raises(RequestError, match="'x'") as caught:
        decode_tensor("x", proto.SerializeToString())
    assert caught.value.code.name == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "array",
    [
        np.array([[b"item1", b"", b"x" * 300]], object),
        np.array([0.5, np.nan, -3e38], np.float32),
        np.array([-1, 2**31 - 1], np.int32),
        np.array(-(2**63), np.int64),
    ],
    ids=["strings", "floats", "int32", "scalar int64"],
)
def test_what_requests_are_made_of_is_read_without_protobuf(array, monkeypatch):
    monkeypatch.setattr(tensors, "_decode_proto", None)
    for message in (encode_tensor(array), tf.make_tensor_proto(array).SerializeToString()):
        decoded = decode_tensor("x", message)
        assert (decoded.dtype, decoded.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(decoded, array)


def _numbers_given_one_by_one():
    proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_INT32, int_val=[-1, 300, 7])
    proto.tensor_shape.dim.add(size=3)
    return proto


SEEDS = [
    encode_tensor(np.array([[b"item1", b"i2"], [b"", b"x" * 200]], object)),
    encode_tensor(np.array([[0.5], [np.nan]], np.float32)),
    _numbers_given_one_by_one().SerializeToString(),
    encode_tensor(np.array([2**40, -5], np.int64)),
    encode_tensor(np.array([True, False])),
    tf.make_tensor_proto(np.array([[0.5], [np.nan]], np.float32)).SerializeToString(),
    tf.make_tensor_proto(np.array([2**40, -5, 7])).SerializeToString(),
]


# Of the bytes behind one protobuf warns, and drops them.
@pytest.mark.filterwarnings("ignore:Unexpected end-group tag:RuntimeWarning")
@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_damaged_tensors_are_read_as_protobuf_reads_them_or_not_at_all(seed):
    rng, message = random.Random(seed), SEEDS[seed]
    outcomes = Counter()
    for _ in range(2_000):
        changed = bytearray(message)
        for _ in range(rng.choice((1, 1, 2, 3))):
            place = rng.randrange(len(changed))
            end = place + rng.randrange(3)
            changed[place:end] = rng.choice((b"", rng.randbytes(1), rng.randbytes(1), changed[place:] * 2))
        try:
            plain = tensors._read_plain(bytes(changed))
        except ValueError:
            outcomes["left to protobuf"] += 1
            continue
        expected = tensors._decode_proto("x", tensor_pb2.TensorProto.FromString(bytes(changed)))
        assert (plain.dtype, plain.shape) == (expected.dtype, expected.shape), bytes(changed)
        np.testing.assert_array_equal(plain, expected, bytes(changed))
        outcomes["read"] += 1
    assert outcomes["left to protobuf"] > 100
    assert outcomes["read"] > 100 or seed == 4, "of booleans protobuf reads all"


@pytest.mark.parametrize(
    "dim",
    [b"\x08\x03\x82\x01\x02\x08\x05", b"\x08\x03\x12\x01b", b"\x08\x03\x00\x00", b"\x08\x03\x12\x01\xff"],
    ids=["unknown field", "name", "number 0", "name that is no text"],
)
def test_a_dimension_with_more_than_its_size_is_left_to_protobuf(dim):
    shape = b"\x12" + bytes([len(dim)]) + dim
    message = b"\x08\x03\x12" + bytes([len(shape)]) + shape + b"\x3a\x03\x01\x02\x03"
    with pytest.raises(ValueError, match=r"shape|field"):
        tensors._read_plain(message)
    try:
        tensor_pb2.TensorProto.FromString(message)
    except DecodeError:
        with pytest.raises(RequestError, match="input 'x' is not a TensorProto"):
            decode_tensor("x", message)
    else:
        np.testing.assert_array_equal(decode_tensor("x", message), np.array([1, 2, 3], np.int32))


def test_bytes_that_are_no_tensor_are_refused_by_name():
    with pytest.raises(RequestError, match="input 'x' is not a TensorProto") as caught:
        decode_tensor("x", b"\x42\xff")
    assert caught.value.code.name == "INVALID_ARGUMENT"
