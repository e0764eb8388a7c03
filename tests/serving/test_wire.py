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
