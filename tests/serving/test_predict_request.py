"""Predict requests split without protobuf, against protobuf's own reading."""

import random
from collections import Counter

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import predict_pb2

from serving import predict_request, wire
from serving.predict_request import PredictRequest
from serving.tensors import encode_tensor


def request(**inputs):
    proto = predict_pb2.PredictRequest(output_filter=["scores", "ids"])
    proto.model_spec.name, proto.model_spec.signature_name = "retrieval", "serving_default"
    proto.model_spec.version.value = 3
    for name, array in inputs.items():
        proto.inputs[name].ParseFromString(encode_tensor(array))
    return proto


PROTO = request(history=np.array([[b"i1", b"i2" * 80]], object), k=np.array([5], np.int32))


def parts(read):
    return read.model_spec, dict(read.inputs), list(read.output_filter)


def parts_by_protobuf(message):
    proto = predict_pb2.PredictRequest.FromString(message)
    inputs = {name: tensor.SerializeToString() for name, tensor in proto.inputs.items()}
    return proto.model_spec, inputs, list(proto.output_filter)


def is_tensor(message):
    try:
        predict_pb2.PredictRequest.FromString(wire.field(2, wire.field(2, message)))
    except DecodeError:
        return False
    return True


def test_a_request_is_split_without_protobuf(monkeypatch):
    expected, message = parts_by_protobuf(PROTO.SerializeToString()), PROTO.SerializeToString()
    monkeypatch.setattr(predict_request, "predict_pb2", None)
    read = PredictRequest.FromString(message)
    assert parts(read) == expected
    assert 0.5 * len(message) < read.ByteSize() <= len(message)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        # The second replaces one input and adds another, and the two model specs are merged.
        PROTO.SerializeToString() + request(k=np.array([6], np.int32), x=np.array([1.0])).SerializeToString(),
        PROTO.SerializeToString() + b"\x38\x01",  # a field of a later version
        b"\x12\x03\x0a\x01x\x12\x06\x0a\x00\x12\x02\x08\x07",
        b"\x12\x00",  # a map entry without key and value
        b"\x12\x0a\x12\x02\x08\x07\x0a\x04name",  # value before key
        b"\x12\x0a\x0a\x01x\x12\x02\x08\x07\x12\x01",  # damaged
        b"\x0a\xd8\x04\x0a\xd5\x04" + b"x" * 597,  # a long name
        b"\x0a\x04\x0a\x05ab\x0a\x03cde",  # two model specs, which would be sound if they were joined
        b"\x12\x84\x80\x80\x80\x80\x00\x0a\x02ab",  # a length of six bytes
    ],
    ids=[
        "empty", "twice", "unknown field", "inputs without values", "empty entry", "value first", "damaged",
        "long name", "cut in two", "long length",
    ],
)  # fmt: skip
def test_unusual_requests_are_read_as_protobuf_reads_them(message):
    try:
        expected = parts_by_protobuf(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            PredictRequest.FromString(message)
    else:
        assert parts(PredictRequest.FromString(message)) == expected


# Of the bytes behind one protobuf warns, and drops them.
@pytest.mark.filterwarnings("ignore:Unexpected end-group tag:RuntimeWarning")
def test_damaged_requests_are_split_as_protobuf_splits_them_or_not_at_all():
    rng, message = random.Random(0), PROTO.SerializeToString()
    outcomes = Counter()
    for _ in range(3_000):
        changed = bytearray(message)
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.randrange(len(changed))
            changed[place : place + rng.randrange(3)] = rng.choice((b"", rng.randbytes(1), rng.randbytes(2)))
        try:
            spec, inputs, output_filter = PredictRequest._split(bytes(changed))
        except (ValueError, DecodeError):
            outcomes["left to protobuf"] += 1
            continue
        outcomes["split"] += 1
        try:
            expected = parts_by_protobuf(bytes(changed))
        except DecodeError:  # of an input, which is read by itself
            outcomes["damaged in a part"] += 1
            assert not all(map(is_tensor, inputs.values())), bytes(changed)
            continue
        assert (spec, list(output_filter)) == (expected[0], expected[2]), bytes(changed)
        assert inputs.keys() == expected[1].keys(), bytes(changed)
    assert all(count > 20 for count in outcomes.values()) and len(outcomes) == 3
