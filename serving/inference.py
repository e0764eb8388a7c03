"""Predict, Classify, Regress and MultiInference on one loaded version: what gRPC, REST and warm-up share.

Each reads and checks its request and returns a Call, which then runs alone or in a batch.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, Final, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    model_pb2,
    regression_pb2,
)

from serving import metrics, wire
from serving.batching import Batcher
from serving.predict_request import PredictRequest
from serving.servable import DEFAULT_SIGNATURE, Servable
from serving.status import failed_precondition, invalid_argument, unimplemented
from serving.tensors import decode_tensor, encode_tensor

CLASSIFY_METHOD: Final = "tensorflow/serving/classify"
REGRESS_METHOD: Final = "tensorflow/serving/regress"

# Names that such signatures have by definition (tf.saved_model constants CLASSIFY_INPUTS, ...).
_INPUTS: Final = "inputs"
_CLASSES: Final = "classes"
_SCORES: Final = "scores"
_OUTPUTS: Final = "outputs"

_INLINE_BYTES: Final = 50_000

_Answer = TypeVar("_Answer")
_Other = TypeVar("_Other")
_Outputs: TypeAlias = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Call(Generic[_Answer]):
    """A request that has been read and checked: what to run, and how to answer.

    Args:
      servable: the version that answers.
      api: name of the call in the metrics, `Predict` or another.
      signature_names: signatures to run, all on the same inputs.
      inputs: of the signatures.
      encode: makes the answer of the outputs, which come in the order of the signatures.
      output_filter: names of the outputs to answer with; all when empty.
    """

    servable: Servable
    api: str
    signature_names: Sequence[str]
    inputs: Mapping[str, npt.NDArray[Any]]
    encode: Callable[[Sequence[_Outputs]], _Answer]
    output_filter: Sequence[str] = ()

    def run(self) -> _Answer:
        """Answers alone, in this thread; raises what Servable.predict raises."""
        return self.encode([self._run(name) for name in self.signature_names])

    async def run_batched(self, batcher: Batcher) -> _Answer:
        """Answers together with requests that arrive at the same time; raises what Batcher.submit raises."""
        started = time.perf_counter()
        if len(self.signature_names) == 1:
            answer = await batcher.submit(
                self.servable, self.signature_names[0], self.inputs, lambda outputs: self.encode([outputs]),
                self.output_filter,
            )  # fmt: skip
            metrics.record_run(self.servable.name, self.api, time.perf_counter() - started)
            return answer
        waiting: list[asyncio.Future[_Outputs]] = []
        try:
            for name in self.signature_names:
                waiting.append(batcher.submit(self.servable, name, self.inputs, lambda outputs: outputs))
            outputs = await asyncio.gather(*waiting)
        finally:
            # Where one is refused, nobody waits for the others; those that are done stay as they are.
            for task in waiting:
                task.cancel()
        for _ in outputs:
            metrics.record_run(self.servable.name, self.api, time.perf_counter() - started)
        return await small_inline(sum(map(_num_bytes, outputs)), self.encode, outputs)

    def then(self, encode: Callable[[_Answer], _Other]) -> Call[_Other]:
        """The same call with its answer encoded once more."""
        return Call(
            self.servable, self.api, self.signature_names, self.inputs,
            lambda outputs: encode(self.encode(outputs)), self.output_filter,
        )  # fmt: skip

    def _run(self, signature_name: str) -> _Outputs:
        started = time.perf_counter()
        outputs = self.servable.predict(signature_name, self.inputs, self.output_filter)
        metrics.record_run(self.servable.name, self.api, time.perf_counter() - started)
        return outputs


async def small_inline(size_bytes: int, function: Callable[..., _Answer], *arguments: Any) -> _Answer:
    """Decodes or encodes a message: a small one at once, a large one in a thread, where it holds up nobody.

    Going to a thread and back costs about 0.1 ms, as much as a message of 50 kB takes.
    """
    if size_bytes <= _INLINE_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def _num_bytes(arrays: _Outputs) -> int:
    """About how large arrays are; a string counts as a pointer."""
    return sum(array.nbytes for array in arrays.values())


def predict(servable: Servable, request: PredictRequest) -> Call[bytes]:
    """Reads a Predict request; its answer is a serialized PredictResponse.

    Raises:
      RequestError: see `decode_tensor`.
    """
    signature_name = request.model_spec.signature_name

    def encode(outputs: Sequence[_Outputs]) -> bytes:
        model_spec = _encode_model_spec(servable.name, servable.version, signature_name)
        return b"".join([model_spec, *starmap(_encode_output, outputs[0].items())])

    inputs = {name: decode_tensor(name, message) for name, message in request.inputs.items()}
    return Call(servable, "Predict", [signature_name], inputs, encode, request.output_filter)


def _encode_output(name: str, array: npt.NDArray[Any]) -> bytes:
    """One entry of the map `PredictResponse.outputs`, field 1: a message of key, 1, and value, 2."""
    return wire.field(1, wire.field(1, name.encode()) + wire.field(2, encode_tensor(array)))


@functools.lru_cache(maxsize=1024)
def _encode_model_spec(name: str, version: int, signature_name: str) -> bytes:
    """`PredictResponse.model_spec`, field 2."""
    return wire.field(2, _model_spec(name, version, signature_name).SerializeToString())


def classify(
    servable: Servable, request: classification_pb2.ClassificationRequest, *, check_method_name: bool
) -> Call[classification_pb2.ClassificationResponse]:
    """Reads a Classify request.

    Args:
      servable: the version to ask.
      request: tf.Examples, and the signature.
      check_method_name: whether the signature's method_name must be that of a classification.

    Raises:
      RequestError: INVALID_ARGUMENT for no examples or a signature that is none of a classification,
        FAILED_PRECONDITION for other names than `inputs`, `classes`, `scores`. The call itself also raises
        INVALID_ARGUMENT for outputs that are none of a classification.
    """

    def encode(outputs: Sequence[_Outputs]) -> classification_pb2.ClassificationResponse:
        response = classification_pb2.ClassificationResponse()
        _fill_model_spec(response.model_spec, servable, request.model_spec)
        _fill_classes(response.result, outputs[0], len(examples))
        return response

    _classification(servable, request.model_spec.signature_name, check_method_name)
    examples = _examples(servable, request.input)
    return Call(servable, "Classify", [request.model_spec.signature_name], {_INPUTS: examples}, encode)


def regress(
    servable: Servable, request: regression_pb2.RegressionRequest, *, check_method_name: bool
) -> Call[regression_pb2.RegressionResponse]:
    """Reads a Regress request: arguments and errors of `classify`, with the names `inputs` and `outputs`."""

    def encode(outputs: Sequence[_Outputs]) -> regression_pb2.RegressionResponse:
        response = regression_pb2.RegressionResponse()
        _fill_model_spec(response.model_spec, servable, request.model_spec)
        _fill_regressions(response.result, outputs[0], len(examples))
        return response

    _regression(servable, request.model_spec.signature_name, check_method_name)
    examples = _examples(servable, request.input)
    return Call(servable, "Regress", [request.model_spec.signature_name], {_INPUTS: examples}, encode)


def multi_inference(
    servable: Servable, request: inference_pb2.MultiInferenceRequest, *, check_method_name: bool
) -> Call[inference_pb2.MultiInferenceResponse]:
    """Reads a MultiInference request: classifications and regressions of one model on the same examples.

    Raises:
      RequestError: as `classify`; INVALID_ARGUMENT also for tasks of several models, a signature asked for
        twice, or signatures that do not read the same input tensor; UNIMPLEMENTED for another method.
    """
    signature_names = [task.model_spec.signature_name or DEFAULT_SIGNATURE for task in request.tasks]
    if len({task.model_spec.name for task in request.tasks}) > 1:
        raise invalid_argument("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
    if len(set(signature_names)) < len(signature_names):
        raise invalid_argument(f"Duplicate evaluation of signature: {', '.join(signature_names)}")
    signatures = [
        _task_signature(servable, task, name, check_method_name)
        for task, name in zip(request.tasks, signature_names, strict=True)
    ]
    # The official server runs all tasks in one pass over the graph, which needs this.
    if len({signature.inputs[_INPUTS].name for signature in signatures}) > 1:
        raise invalid_argument("Input tensor must be the same for all Signatures.")
    examples = _examples(servable, request.input)

    def encode(outputs: Sequence[_Outputs]) -> inference_pb2.MultiInferenceResponse:
        response = inference_pb2.MultiInferenceResponse()
        for task, task_outputs in zip(request.tasks, outputs, strict=True):
            result = response.results.add()
            _fill_model_spec(result.model_spec, servable, task.model_spec)
            if task.method_name == CLASSIFY_METHOD:
                _fill_classes(result.classification_result, task_outputs, len(examples))
            else:
                _fill_regressions(result.regression_result, task_outputs, len(examples))
        return response

    return Call(servable, "MultiInference", signature_names, {_INPUTS: examples}, encode)


def _task_signature(
    servable: Servable, task: inference_pb2.InferenceTask, name: str, check_method_name: bool
) -> meta_graph_pb2.SignatureDef:
    if task.method_name == CLASSIFY_METHOD:
        return _classification(servable, name, check_method_name)
    if task.method_name == REGRESS_METHOD:
        return _regression(servable, name, check_method_name)
    raise unimplemented(
        f"Unsupported signature method_name: {task.method_name!r}; "
        f"there are {CLASSIFY_METHOD} and {REGRESS_METHOD}"
    )


def _classification(servable: Servable, name: str, check_method_name: bool) -> meta_graph_pb2.SignatureDef:
    signature = _signature(servable, name, CLASSIFY_METHOD if check_method_name else None)
    if len(signature.outputs) > 2:
        raise invalid_argument(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    if _CLASSES not in signature.outputs and _SCORES not in signature.outputs:
        raise failed_precondition(
            f"Expected classification signature outputs to contain at least one of {_CLASSES!r} or "
            f"{_SCORES!r}, found {', '.join(sorted(signature.outputs))}"
        )
    return signature


def _regression(servable: Servable, name: str, check_method_name: bool) -> meta_graph_pb2.SignatureDef:
    signature = _signature(servable, name, REGRESS_METHOD if check_method_name else None)
    if len(signature.outputs) != 1:
        raise invalid_argument(f"Expected one output Tensor, found {len(signature.outputs)}")
    if _OUTPUTS not in signature.outputs:
        raise failed_precondition(
            f"Expected a regression signature with the output {_OUTPUTS!r}, "
            f"found {next(iter(signature.outputs))!r}"
        )
    return signature


def _signature(servable: Servable, name: str, method_name: str | None) -> meta_graph_pb2.SignatureDef:
    name = name or DEFAULT_SIGNATURE
    signature = servable.signature_defs.get(name)
    if signature is None:
        raise invalid_argument(
            f"No signature was found with the name: {name}; "
            f"there are: {', '.join(sorted(servable.signature_defs))}"
        )
    if method_name is not None and signature.method_name != method_name:
        raise invalid_argument(
            f"Expected signature method_name to be {method_name}. Was: {signature.method_name}"
        )
    if len(signature.inputs) != 1:
        raise invalid_argument(f"Expected one input Tensor, found {len(signature.inputs)}")
    if _INPUTS not in signature.inputs:
        raise failed_precondition(
            f"Expected a signature with the input {_INPUTS!r}, found {next(iter(signature.inputs))!r}"
        )
    return signature


def _examples(servable: Servable, request_input: input_pb2.Input) -> npt.NDArray[Any]:
    """Serialized tf.Examples [B]; a context is put before each, which merges the two messages."""
    prefix = b""
    if request_input.WhichOneof("kind") == "example_list_with_context":
        prefix = request_input.example_list_with_context.context.SerializeToString()
        examples = request_input.example_list_with_context.examples
    else:
        examples = request_input.example_list.examples
    if not examples:
        raise invalid_argument("Input is empty; expected at least one tf.Example")
    array = np.empty(len(examples), object)
    array[:] = [prefix + example.SerializeToString() for example in examples]
    metrics.record_examples(servable.name, len(examples))
    return array


def _fill_classes(
    result: classification_pb2.ClassificationResult,
    outputs: _Outputs,
    num_examples: int,
) -> None:
    classes, scores = outputs.get(_CLASSES), outputs.get(_SCORES)
    shapes = set()
    for name, array, dtype in (
        (_CLASSES, classes, np.dtype(object)),
        (_SCORES, scores, np.dtype(np.float32)),
    ):
        if array is None:
            continue
        if array.dtype != dtype or array.ndim != 2 or len(array) != num_examples:
            raise invalid_argument(
                f"Expected output {name!r} to be {'DT_STRING' if name == _CLASSES else 'DT_FLOAT'} "
                f"[{num_examples}, num_classes], got {array.dtype} {list(array.shape)}"
            )
        shapes.add(array.shape)
    if len(shapes) != 1:
        raise invalid_argument(f"Outputs {_CLASSES!r} and {_SCORES!r} differ in their shapes: {shapes}")
    num_classes = next(iter(shapes))[1]
    for row in range(num_examples):
        classifications = result.classifications.add()
        for column in range(num_classes):
            entry = classifications.classes.add()
            if classes is not None:
                entry.label = _label(classes[row, column])
            if scores is not None:
                entry.score = scores[row, column]


def _label(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise invalid_argument(f"Output {_CLASSES!r} holds a label that is not UTF-8: {error}") from error


def _fill_regressions(result: regression_pb2.RegressionResult, outputs: _Outputs, num_examples: int) -> None:
    array = outputs[_OUTPUTS]
    if array.dtype != np.float32 or array.shape not in ((num_examples,), (num_examples, 1)):
        raise invalid_argument(
            f"Expected output {_OUTPUTS!r} to be DT_FLOAT [{num_examples}] or [{num_examples}, 1], "
            f"got {array.dtype} {list(array.shape)}"
        )
    for value in array.ravel().tolist():
        result.regressions.add(value=value)


def _fill_model_spec(spec: model_pb2.ModelSpec, servable: Servable, requested: model_pb2.ModelSpec) -> None:
    spec.CopyFrom(_model_spec(servable.name, servable.version, requested.signature_name))


def _model_spec(name: str, version: int, signature_name: str) -> model_pb2.ModelSpec:
    """What an answer says of the version and signature that gave it."""
    spec = model_pb2.ModelSpec(name=name, signature_name=signature_name or DEFAULT_SIGNATURE)
    spec.version.value = version
    return spec
