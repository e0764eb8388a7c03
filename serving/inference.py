"""Predict, Classify, Regress and MultiInference on one loaded version: what gRPC, REST and warm-up share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

from serving import metrics
from serving.batching import Batcher
from serving.servable import DEFAULT_SIGNATURE, Servable, decode_inputs
from serving.status import failed_precondition, invalid_argument, unimplemented
from serving.tensors import encode_tensor

CLASSIFY_METHOD: Final = "tensorflow/serving/classify"
REGRESS_METHOD: Final = "tensorflow/serving/regress"

# Names that such signatures have by definition (tf.saved_model constants CLASSIFY_INPUTS, ...).
_INPUTS: Final = "inputs"
_CLASSES: Final = "classes"
_SCORES: Final = "scores"
_OUTPUTS: Final = "outputs"

_INLINE_BYTES: Final = 50_000

_Result = TypeVar("_Result")


def predict(servable: Servable, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
    """Answers Predict; the answer names the version and signature that gave it.

    Raises:
      RequestError: see Servable.predict.
    """
    outputs = timed(servable.name, "Predict", lambda: servable.predict_request(request))
    return predict_response(servable, request, outputs)


async def predict_batched(
    servable: Servable, request: predict_pb2.PredictRequest, batcher: Batcher
) -> predict_pb2.PredictResponse:
    """Answers Predict together with requests that arrive at the same time; errors as in Batcher.predict."""
    inputs = await small_inline(request.ByteSize(), decode_inputs, request)
    outputs = await timed_batch(
        batcher, servable, request.model_spec.signature_name, inputs, request.output_filter
    )
    return await small_inline(num_bytes(outputs), predict_response, servable, request, outputs)


def predict_response(
    servable: Servable, request: predict_pb2.PredictRequest, outputs: Mapping[str, npt.NDArray[Any]]
) -> predict_pb2.PredictResponse:
    """Returns the answer to Predict that holds these outputs."""
    response = predict_pb2.PredictResponse()
    _fill_model_spec(response.model_spec, servable, request.model_spec)
    for name, array in outputs.items():
        encode_tensor(array, response.outputs[name])
    return response


def classify(
    servable: Servable, request: classification_pb2.ClassificationRequest, *, check_method_name: bool
) -> classification_pb2.ClassificationResponse:
    """Answers Classify.

    Args:
      servable: the version to ask.
      request: tf.Examples, and the signature.
      check_method_name: whether the signature's method_name must be that of a classification.

    Raises:
      RequestError: INVALID_ARGUMENT for no examples or a signature or an output that is none of a
        classification, FAILED_PRECONDITION for other names than `inputs`, `classes`, `scores`, and whatever
        code an op of the graph raised.
    """
    _classification(servable, request.model_spec.signature_name, check_method_name)
    examples = _examples(servable, request.input)
    outputs = _run(servable, "Classify", request.model_spec.signature_name, examples)
    response = classification_pb2.ClassificationResponse()
    _fill_model_spec(response.model_spec, servable, request.model_spec)
    _fill_classes(response.result, outputs, len(examples))
    return response


def regress(
    servable: Servable, request: regression_pb2.RegressionRequest, *, check_method_name: bool
) -> regression_pb2.RegressionResponse:
    """Answers Regress; arguments and errors as in `classify`, with the names `inputs` and `outputs`."""
    _regression(servable, request.model_spec.signature_name, check_method_name)
    examples = _examples(servable, request.input)
    outputs = _run(servable, "Regress", request.model_spec.signature_name, examples)
    response = regression_pb2.RegressionResponse()
    _fill_model_spec(response.model_spec, servable, request.model_spec)
    _fill_regressions(response.result, outputs, len(examples))
    return response


def multi_inference(
    servable: Servable, request: inference_pb2.MultiInferenceRequest, *, check_method_name: bool
) -> inference_pb2.MultiInferenceResponse:
    """Answers MultiInference: classifications and regressions of one model on the same examples.

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
    response = inference_pb2.MultiInferenceResponse()
    for task, name in zip(request.tasks, signature_names, strict=True):
        outputs = _run(servable, "MultiInference", name, examples)
        result = response.results.add()
        _fill_model_spec(result.model_spec, servable, task.model_spec)
        if task.method_name == CLASSIFY_METHOD:
            _fill_classes(result.classification_result, outputs, len(examples))
        else:
            _fill_regressions(result.regression_result, outputs, len(examples))
    return response


def timed(
    model: str, api: str, run: Callable[[], dict[str, npt.NDArray[Any]]]
) -> dict[str, npt.NDArray[Any]]:
    """Runs a signature and counts it with the time that it took."""
    started = time.perf_counter()
    outputs = run()
    metrics.record_run(model, api, time.perf_counter() - started)
    return outputs


async def timed_batch(
    batcher: Batcher,
    servable: Servable,
    signature_name: str,
    inputs: Mapping[str, npt.NDArray[Any]],
    output_filter: Sequence[str] = (),
) -> dict[str, npt.NDArray[Any]]:
    """Runs a signature in a batch and counts it with the time that it took, waiting included."""
    started = time.perf_counter()
    outputs = await batcher.predict(servable, signature_name, inputs, output_filter)
    metrics.record_run(servable.name, "Predict", time.perf_counter() - started)
    return outputs


async def small_inline(size_bytes: int, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Decodes or encodes a message: a small one at once, a large one in a thread, where it holds up nobody.

    Going to a thread and back costs about 0.1 ms, as much as a message of 50 kB takes.
    """
    if size_bytes <= _INLINE_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def num_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> int:
    """About how large arrays are; a string counts as a pointer."""
    return sum(array.nbytes for array in arrays.values())


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


def _run(
    servable: Servable, api: str, signature_name: str, examples: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    return timed(servable.name, api, lambda: servable.predict(signature_name, {_INPUTS: examples}))


def _fill_classes(
    result: classification_pb2.ClassificationResult,
    outputs: dict[str, npt.NDArray[Any]],
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


def _fill_regressions(
    result: regression_pb2.RegressionResult, outputs: dict[str, npt.NDArray[Any]], num_examples: int
) -> None:
    array = outputs[_OUTPUTS]
    if array.dtype != np.float32 or array.shape not in ((num_examples,), (num_examples, 1)):
        raise invalid_argument(
            f"Expected output {_OUTPUTS!r} to be DT_FLOAT [{num_examples}] or [{num_examples}, 1], "
            f"got {array.dtype} {list(array.shape)}"
        )
    for value in array.ravel().tolist():
        result.regressions.add(value=value)


def _fill_model_spec(spec: model_pb2.ModelSpec, servable: Servable, requested: model_pb2.ModelSpec) -> None:
    spec.name = servable.name
    spec.version.value = servable.version
    spec.signature_name = requested.signature_name or DEFAULT_SIGNATURE
