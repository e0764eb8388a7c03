"""The wire format written by hand, against protobuf's own."""

import pytest
from tensorflow.core.framework import tensor_pb2

from serving import wire


@pytest.mark.parametrize("size", [1, 127, 128, 2**14 - 1, 2**14, 2**21])
def test_a_field_is_what_protobuf_writes(size):
    content = b"x" * size
    assert wire.field(4, content) == tensor_pb2.TensorProto(tensor_content=content).SerializeToString()


def test_a_field_with_a_number_above_15_is_what_protobuf_writes():
    assert wire.field(17, b"\x01\x02") == tensor_pb2.TensorProto(uint64_val=[1, 2]).SerializeToString()


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**63, 2**64 - 1])
def test_numbers_are_what_protobuf_wrote(number):
    message = tensor_pb2.TensorProto(uint64_val=[number, 5]).SerializeToString()
    assert wire.varints(message[3:]) == [number, 5]  # behind a tag of two bytes and the size


def test_a_message_is_split_into_its_fields_by_tag():
    proto = tensor_pb2.TensorProto(dtype=7, string_val=[b"a", b"", b"x" * 200])
    proto.tensor_shape.dim.add(size=3)
    strings, shape = wire.tag(8, wire.LENGTH_DELIMITED), wire.tag(2, wire.LENGTH_DELIMITED)
    fields = wire.fields(proto.SerializeToString())
    assert fields == {
        wire.tag(1, wire.VARINT): [7],
        shape: [proto.tensor_shape.SerializeToString()],
        strings: [b"a", b"", b"x" * 200],
    }
    assert wire.fields(b"") == {}


@pytest.mark.parametrize(
    "message",
    [
        b"\x42",
        b"\x42\x02a",
        b"\x08\xff",
        b"\x08" + b"\xff" * 10,
        b"\x25\x00\x00\x00\x00",
        b"\x82\x01\x01",
        b"\x02\x00",
        b"\x2a\x84\x80\x80\x80\x80\x00" + b"abcd",
        b"\x2a\x84\x80\x80\x80\x80\x80\x80\x80\x80\x7e" + b"abcd",
    ],
    ids=[
        "no size", "cut short", "number cut short", "number too long", "fixed width", "number above 15",
        "number 0", "length of six bytes", "length of 64 bits",
    ],
)  # fmt: skip
def test_what_is_damaged_or_of_another_kind_is_refused(message):
    with pytest.raises(ValueError, match=r"field|number"):
        wire.fields(message)
