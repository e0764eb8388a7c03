"""A Predict request, split into its parts: what is a tensor in it is read by whoever runs it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from tensorflow_serving.apis import model_pb2, predict_pb2

from serving import wire

_MODEL_SPEC: Final = wire.tag(1, wire.LENGTH_DELIMITED)
_INPUTS: Final = wire.tag(2, wire.LENGTH_DELIMITED)
_OUTPUT_FILTER: Final = wire.tag(3, wire.LENGTH_DELIMITED)
# Of an entry of the map `inputs`.
_ENTRY: Final = (wire.tag(1, wire.LENGTH_DELIMITED), wire.tag(2, wire.LENGTH_DELIMITED))
# What a model is asked by in earnest is shorter; texts that somebody made up are not kept.
_MAX_KEPT_SPEC_BYTES: Final = 200


class PredictRequest(NamedTuple):
    """The fields of a PredictRequest, with each input as the bytes of its TensorProto."""

    model_spec: model_pb2.ModelSpec
    inputs: Mapping[str, bytes]
    output_filter: Sequence[str]

    @classmethod
    def FromString(cls, message: bytes) -> PredictRequest:
        """Reads a message, as protobuf's classes do.

        Raises:
          DecodeError: it is no PredictRequest.
        """
        try:
            return cls._split(message)
        except ValueError:
            request = predict_pb2.PredictRequest.FromString(message)
            inputs = {name: proto.SerializeToString() for name, proto in request.inputs.items()}
            return cls(request.model_spec, inputs, request.output_filter)

    @classmethod
    def _split(cls, message: bytes) -> PredictRequest:
        """As FromString; ValueError for what protobuf must read."""
        fields = wire.fields(message)
        specs = fields.pop(_MODEL_SPEC, [b""])
        if len(specs) > 1:
            raise ValueError("two model specs, which protobuf merges")
        output_filter = [name.decode() for name in fields.pop(_OUTPUT_FILTER, [])]
        inputs = {}
        for entry in fields.pop(_INPUTS, []):
            (key_tag, [key]), (value_tag, [value]) = wire.fields(entry).items()
            if (key_tag, value_tag) != _ENTRY:
                raise ValueError("an entry of a map that is not key and value")
            inputs[key.decode()] = value
        if fields:
            raise ValueError("a field that a PredictRequest does not have")
        read = _kept_spec if len(specs[0]) <= _MAX_KEPT_SPEC_BYTES else _read_spec
        return cls(read(specs[0]), inputs, output_filter)

    def ByteSize(self) -> int:
        """Bytes of the inputs, which are nearly all of the message."""
        return sum(map(len, self.inputs.values()))


def _read_spec(message: bytes) -> model_pb2.ModelSpec:
    """Reads a ModelSpec; ValueError for what protobuf must read in its place within the request."""
    # The end of a group that never began is an error within a message, and forgiven behind a whole one.
    wire.fields(message)
    return model_pb2.ModelSpec.FromString(message)


# Requests for a model begin with the same bytes. Nobody may change what is returned.
_kept_spec: Final = functools.lru_cache(maxsize=256)(_read_spec)
