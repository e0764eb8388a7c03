"""One loaded model version: its signatures, its input checks, and the call."""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt
import scann  # noqa: F401  registers the ScaNN ops, without which a retrieval model does not load
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import graph_pb2
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2, saved_model_pb2
from tensorflow.python.framework import op_def_registry

from schema.errors import ServingError
from serving import metrics
from serving.status import RequestError, code_from_number, invalid_argument
from trainer.fingerprint import FINGERPRINT_FILE, Fingerprint

logger = logging.getLogger(__name__)

DEFAULT_SIGNATURE: Final = "serving_default"
_SERVE_TAG: Final = "serve"
# Not for requests: the operation that the loader runs to set the model up.
_INIT_SIGNATURE: Final = "__saved_model_init_op"
_OLD_CONTROL_FLOW: Final = frozenset({"Switch", "Merge", "Enter", "Exit", "NextIteration"})


def read_signature_defs(path: Path) -> dict[str, meta_graph_pb2.SignatureDef]:
    """Reads all signatures of a SavedModel's `serve` graph.

    Raises:
      ServingError: `saved_model.pb` is not a SavedModel, or has no graph tagged `serve`.
    """
    return dict(_read_meta_graph(path).signature_def)


def _read_meta_graph(path: Path) -> meta_graph_pb2.MetaGraphDef:
    file = path / "saved_model.pb"
    try:
        saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except DecodeError as error:
        raise ServingError(f"{file} is not a SavedModel; it is damaged or cut short") from error
    for meta_graph in saved_model.meta_graphs:
        if _SERVE_TAG in meta_graph.meta_info_def.tags:
            return meta_graph
    raise ServingError(
        f"{file} is not a SavedModel with a graph tagged 'serve'; it is damaged or not for serving"
    )


@dataclass(frozen=True)
class _InputSpec:
    """What a signature says of an input; in `shape` None is a size that requests choose, alone: any shape."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None

    @classmethod
    def of(cls, info: meta_graph_pb2.TensorInfo) -> _InputSpec:
        shape = tf.TensorShape(info.tensor_shape)
        return cls(
            np.dtype(tf.as_dtype(info.dtype).as_numpy_dtype),
            None if shape.rank is None else tuple(shape.as_list()),
        )

    def fits(self, array: npt.NDArray[Any]) -> bool:
        """Whether the signature takes the array."""
        return array.dtype == self.dtype and (
            self.shape is None
            or (
                len(self.shape) == array.ndim
                and all(size in (None, given) for size, given in zip(self.shape, array.shape, strict=True))
            )
        )


def _session_config(graph: graph_pb2.GraphDef) -> tf.compat.v1.ConfigProto:
    """Runs a call in the thread that makes it, unless more threads were asked for.

    Requests run in parallel anyway. Handing operations to a pool costs a small model more than it gains: 1.90
    instead of 1.65 ms of CPU for a retrieval request over gRPC. So does splitting an operation: the whole
    funnel in one call takes 4.4 ms with one thread and 5.1 to 6.1 with two, on an idle machine. The executor
    that is made for one thread keeps no account of which operation may run next: .2 of 4.6 ms.
    """
    threading = tf.config.threading
    num_threads = threading.get_inter_op_parallelism_threads()
    config = tf.compat.v1.ConfigProto(
        inter_op_parallelism_threads=num_threads or -1,
        intra_op_parallelism_threads=threading.get_intra_op_parallelism_threads() or 1,
        allow_soft_placement=True,
    )
    # It takes neither operations of TensorFlow 1 nor transfers between devices.
    if not (num_threads or tf.config.list_physical_devices("GPU") or _is_old(graph)):
        config.experimental.executor_type = "SINGLE_THREADED_EXECUTOR"
    return config


def _is_old(graph: graph_pb2.GraphDef) -> bool:
    """Whether a graph has control flow or variables in the form of TensorFlow 1."""
    nodes = itertools.chain(graph.node, *(function.node_def for function in graph.library.function))
    names = {node.op for node in nodes}
    definitions = filter(None, map(op_def_registry.get, names))  # calls of functions have none
    return not _OLD_CONTROL_FLOW.isdisjoint(names) or any(
        output.is_ref for definition in definitions for output in definition.output_arg
    )


class _Signature:
    """One signature of a loaded model, ready to be called and checked against."""

    def __init__(self, definition: meta_graph_pb2.SignatureDef, session: tf.compat.v1.Session) -> None:
        self.definition = definition
        self.inputs = {name: _InputSpec.of(info) for name, info in definition.inputs.items()}
        self._outputs = {name: tf.as_dtype(info.dtype) for name, info in definition.outputs.items()}
        self._session = session
        for info in (*definition.inputs.values(), *definition.outputs.values()):
            session.graph.get_tensor_by_name(info.name)  # what the graph does not have must not load

    def __call__(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Returns all outputs by name."""
        values = self._run(*(inputs[name] for name in self.inputs))
        return {
            # A scalar comes back as a number or bytes; NumPy would cut zero bytes from the end of the latter.
            name: np.asarray(value, dtype=object if dtype == tf.string else None)
            for (name, dtype), value in zip(self._outputs.items(), values, strict=True)
        }

    # Made by the first call: it prunes and optimises the graph, which takes seconds for a large one.
    @functools.cached_property
    def _run(self) -> Callable[..., Sequence[Any]]:
        options = config_pb2.CallableOptions(
            feed=[info.name for info in self.definition.inputs.values()],
            fetch=[info.name for info in self.definition.outputs.values()],
        )
        # The public make_callable() is run() once there are feeds, which looks all tensors up again: 0.3 ms a
        # call. Keras calls its models by this method, too.
        run: Callable[..., Sequence[Any]] = self._session._make_callable_from_options(options)
        return run


class Servable:
    """A loaded SavedModel. Safe to call from several threads.

    It is loaded into a session, as TensorFlow Serving does: a call takes and gives arrays, and costs 0.2 to
    0.5 ms less than a call of the function that tf.saved_model.load returns, which makes an eager tensor of
    every input and output.

    Args:
      name: model name in requests.
      version: number of the version directory.
      path: the version directory itself.

    Attributes:
      fingerprint: hashes of the bundle's parts; None for a model that is no bundle of Funnel's.

    Raises:
      BundleError: the file with the fingerprint is damaged.
      ServingError, OSError, ValueError, tf.errors.OpError: the SavedModel cannot be loaded.
    """

    def __init__(self, name: str, version: int, path: Path) -> None:
        self.name = name
        self.version = version
        self.path = path
        self.fingerprint = Fingerprint.read(path) if (path / FINGERPRINT_FILE).exists() else None
        meta_graph = _read_meta_graph(path)
        self.signature_defs = dict(meta_graph.signature_def)
        with tf.Graph().as_default():
            session = tf.compat.v1.Session(config=_session_config(meta_graph.graph_def))
            tf.compat.v1.saved_model.load(session, [_SERVE_TAG], str(path))
            self._signatures = {
                signature_name: _Signature(definition, session)
                for signature_name, definition in self.signature_defs.items()
                if signature_name != _INIT_SIGNATURE
            }
        if not self._signatures:
            raise ServingError(f"{path} has no signature to call; export it with signatures={{...}}")

    def signature(self, name: str) -> meta_graph_pb2.SignatureDef:
        """Returns the signature of that name (`""` means `serving_default`).

        Raises:
          RequestError: FAILED_PRECONDITION, there is none; the text lists those there are.
        """
        return self._signature(name).definition

    def predict(
        self, signature_name: str, inputs: Mapping[str, npt.NDArray[Any]], output_filter: Sequence[str] = ()
    ) -> dict[str, npt.NDArray[Any]]:
        """Runs one signature.

        Args:
          signature_name: `""` means `serving_default`.
          inputs: exactly the signature's inputs, with their dtypes and compatible shapes; strings as object
            arrays of bytes.
          output_filter: names of the outputs to return; all when empty.

        Returns:
          Outputs by name; strings as object arrays of bytes.

        Raises:
          RequestError: INVALID_ARGUMENT for inputs or a filter that do not fit the signature,
            FAILED_PRECONDITION for an unknown signature, and whatever code an op of the graph raised.
        """
        signature = self._signature(signature_name)
        self.check(signature_name, inputs, output_filter)
        started = time.perf_counter()
        try:
            outputs = signature(inputs)
        except tf.errors.OpError as error:
            raise RequestError(code_from_number(error.error_code), _short_message(error)) from error
        metrics.record_graph_run(time.perf_counter() - started)
        return {name: outputs[name] for name in output_filter or outputs}

    def check(
        self, signature_name: str, inputs: Mapping[str, npt.NDArray[Any]], output_filter: Sequence[str] = ()
    ) -> None:
        """Raises what `predict` raises for inputs or a filter that do not fit the signature."""
        signature = self._signature(signature_name)
        _check_inputs(signature.inputs, inputs)
        if output_filter:
            _check_output_filter(signature.definition, output_filter)

    def _signature(self, name: str) -> _Signature:
        name = name or DEFAULT_SIGNATURE
        signature = self._signatures.get(name)
        if signature is None:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f'Serving signature "{name}" not found in model {self.name} version {self.version}; '
                f"it has: {', '.join(sorted(self._signatures))}",
            )
        return signature


def _check_inputs(specs: Mapping[str, _InputSpec], inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    if specs.keys() != inputs.keys():
        missing = sorted(specs.keys() - inputs.keys())
        extra = sorted(inputs.keys() - specs.keys())
        raise invalid_argument(
            f"inputs do not match the signature. Missing: {', '.join(missing) or 'none'}. "
            f"Not in the signature: {', '.join(extra) or 'none'}. "
            f"Expected: {', '.join(sorted(specs))}"
        )
    for name, array in inputs.items():
        spec = specs[name]
        if not spec.fits(array):
            raise invalid_argument(
                f"input {name!r} must be {tf.as_dtype(spec.dtype).name} {tf.TensorShape(spec.shape)}, "
                f"got {tf.as_dtype(array.dtype).name} {tf.TensorShape(array.shape)}"
            )


def _check_output_filter(signature: meta_graph_pb2.SignatureDef, output_filter: Sequence[str]) -> None:
    for name in output_filter:
        if name not in signature.outputs:
            raise invalid_argument(
                f"output_filter: no output {name!r}; there are: {', '.join(sorted(signature.outputs))}"
            )
    if len(set(output_filter)) != len(output_filter):
        raise invalid_argument(f"output_filter names an output twice: {', '.join(output_filter)}")


def _short_message(error: tf.errors.OpError) -> str:
    """Drops the paragraph about Python stack traces that TensorFlow puts before an op's own message."""
    return str(error.message).split("<stack traces unavailable>\n")[-1].strip()
