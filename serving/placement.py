"""Which operations of an exported model a GPU could run, and what share of its arithmetic they are.

Operations are those of all functions that a signature reaches, as exported. Whether there is a GPU kernel for
a node, with its types, is read from the kernels that the installed TensorFlow has registered. Arithmetic is
counted in one real run on the CPU: a golden request of the bundle.

Floating-point operations (FLOPs): 2 m n k of a product of matrices [m, k] and [k, n]; one per output value of
an elementwise operation and one per input value of a reduction, in float types. ScaNN's own arithmetic is not
counted: its operations are listed as what they are, of the CPU alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import scann  # noqa: F401  registers the ops of the index
import tensorflow as tf
from tensorflow.core.framework import function_pb2, graph_pb2, kernel_def_pb2, node_def_pb2
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2, rewriter_config_pb2, saved_model_pb2
from tensorflow.python.framework import kernels, op_def_registry

from schema.errors import ServingError
from trainer.golden import GoldenRequest, read_golden_requests

PRODUCTS: Final = frozenset({"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"})
_ELEMENTWISE: Final = frozenset(
    {
        "Add", "AddV2", "AddN", "BiasAdd", "Sub", "Mul", "RealDiv", "DivNoNan", "Maximum", "Minimum", "Neg",
        "Abs",
        "Square", "Sqrt", "Rsqrt", "Exp", "Log", "Log1p", "Pow", "Sigmoid", "Tanh", "Relu", "Elu", "Softplus",
        "Softmax", "Floor", "Ceil", "SquaredDifference",
    }
)  # fmt: skip
_REDUCTIONS: Final = frozenset({"Sum", "Mean", "Max", "Min", "Prod", "L2Loss"})
# What a graph is made of beside computation; it costs no arithmetic on any device.
_STRUCTURE: Final = frozenset({"Placeholder", "NoOp", "Const", "_Arg", "_Retval"})
_FLOATS: Final = frozenset({tf.float16, tf.bfloat16, tf.float32, tf.float64})


@dataclasses.dataclass(frozen=True)
class OpPlacement:
    """One kind of operation in a signature.

    Attributes:
      op: type of the operation.
      nodes: how many there are.
      gpu_nodes: for how many of them, with their types, a GPU kernel is registered.
      flops: in one run; 0 for what is not arithmetic on float numbers.
    """

    op: str
    nodes: int
    gpu_nodes: int
    flops: int

    @property
    def has_gpu_kernel(self) -> bool:
        """Whether a GPU could run all of them."""
        return self.gpu_nodes == self.nodes


@dataclasses.dataclass(frozen=True)
class Placement:
    """The operations of a signature, those with most arithmetic first."""

    bundle: str
    signature: str
    ops: tuple[OpPlacement, ...]

    def gpu_share(self, ops: Iterable[str] | None = None) -> float:
        """Share of the FLOPs that a GPU could do, 0 to 1; of some kinds of operations, or of all."""
        wanted = None if ops is None else set(ops)
        counted = [op for op in self.ops if wanted is None or op.op in wanted]
        total = sum(op.flops for op in counted)
        return sum(op.flops for op in counted if op.has_gpu_kernel) / total if total else math.nan


def audit(model_dir: Path | str) -> list[Placement]:
    """Audits every signature of a bundle that it has golden requests of.

    Raises:
      BundleError: the bundle has no golden requests.
      ServingError: there is no SavedModel.
    """
    golden: dict[str, GoldenRequest] = {}
    for request in read_golden_requests(model_dir):
        golden.setdefault(request.signature, request)
    meta_graph = _meta_graph(Path(model_dir))
    placements = []
    with _as_exported(Path(model_dir)) as (session, signatures):
        for name, request in golden.items():
            nodes = list(_reachable(meta_graph, name))
            flops = _count_flops(session, signatures[name], request)
            counts = Counter(node.op for node in nodes)
            gpu_counts = Counter(node.op for node in nodes if _has_gpu_kernel(node))
            ops = [OpPlacement(op, counts[op], gpu_counts[op], flops.get(op, 0)) for op in counts]
            ops.sort(key=lambda op: (-op.flops, op.op))
            placements.append(Placement(Path(model_dir).parent.name, name, tuple(ops)))
    return placements


def _meta_graph(model_dir: Path) -> meta_graph_pb2.MetaGraphDef:
    file = model_dir / "saved_model.pb"
    if not file.is_file():
        raise ServingError(f"{model_dir} holds no saved_model.pb; give the folder of a version")
    return saved_model_pb2.SavedModel.FromString(file.read_bytes()).meta_graphs[0]


def _reachable(meta_graph: meta_graph_pb2.MetaGraphDef, signature: str) -> Iterator[node_def_pb2.NodeDef]:
    """Nodes of the graph that the outputs of a signature need, and of all functions that these call."""
    graph: graph_pb2.GraphDef = meta_graph.graph_def
    by_name = {node.name: node for node in graph.node}
    functions: dict[str, function_pb2.FunctionDef] = {f.signature.name: f for f in graph.library.function}
    outputs = meta_graph.signature_def[signature].outputs.values()
    waiting = [_node_name(info.name) for info in outputs]
    called: list[str] = []
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        node = by_name[name]
        yield from _computing(node)
        called += _called(node)
        waiting += map(_node_name, node.input)
    seen_functions: set[str] = set()
    while called:
        function = called.pop()
        if function in seen_functions:
            continue
        seen_functions.add(function)
        for node in functions[function].node_def:
            yield from _computing(node)
            called += _called(node)


def _node_name(tensor: str) -> str:
    return tensor.removeprefix("^").partition(":")[0]


def _computing(node: node_def_pb2.NodeDef) -> Iterator[node_def_pb2.NodeDef]:
    if node.op not in _STRUCTURE:
        yield node


def _called(node: node_def_pb2.NodeDef) -> list[str]:
    """Names of the functions that a node calls."""
    names = []
    for value in node.attr.values():
        if value.HasField("func"):
            names.append(value.func.name)
        names += [function.name for function in value.list.func]
    return names


@functools.cache
def _registered_kernels(op: str) -> tuple[kernel_def_pb2.KernelDef, ...]:
    return tuple(kernels.get_registered_kernels_for_op(op).kernel)


def _has_gpu_kernel(node: node_def_pb2.NodeDef) -> bool:
    return any(
        # A kernel of the device "DEFAULT" is one for every device.
        kernel.device_type in ("GPU", "DEFAULT")
        and all(
            not constraint.allowed_values.list.type
            or _type(node, constraint.name) in constraint.allowed_values.list.type
            for constraint in kernel.constraint
        )
        for kernel in _registered_kernels(node.op)
    )


def _type(node: node_def_pb2.NodeDef, name: str) -> int:
    """A type attribute of a node; an exported graph leaves out those that are the default."""
    if name in node.attr:
        return int(node.attr[name].type)
    attributes = op_def_registry.get(node.op).attr
    return int(next(attr.default_value.type for attr in attributes if attr.name == name))


@contextlib.contextmanager
def _as_exported(model_dir: Path) -> Iterator[tuple[tf.compat.v1.Session, Mapping[str, Any]]]:
    """A session of the bundle on the CPU, and its signatures by name."""
    # As exported: what the optimiser would fuse or fold is counted too, in the same way on every machine.
    off = rewriter_config_pb2.RewriterConfig.OFF
    rewrites = rewriter_config_pb2.RewriterConfig(
        remapping=off, constant_folding=off, arithmetic_optimization=off, layout_optimizer=off
    )
    config = config_pb2.ConfigProto(
        graph_options=config_pb2.GraphOptions(rewrite_options=rewrites), device_count={"GPU": 0}
    )
    with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
        yield session, tf.compat.v1.saved_model.load(session, ["serve"], str(model_dir)).signature_def


def _count_flops(session: tf.compat.v1.Session, signature: Any, request: GoldenRequest) -> dict[str, int]:
    """FLOPs of one run by type of operation; loops count as often as they turn."""
    fetches = [info.name for info in signature.outputs.values()]
    inputs = {signature.inputs[name].name: array for name, array in request.inputs.items()}
    trace = config_pb2.RunMetadata()
    options = config_pb2.RunOptions(
        trace_level=config_pb2.RunOptions.FULL_TRACE, output_partition_graphs=True
    )
    session.run(fetches, inputs, options=options, run_metadata=trace)
    return _flops_of_trace(trace)


def _flops_of_trace(trace: Any) -> dict[str, int]:
    nodes: dict[str, Any] = {node.name: node for graph in trace.partition_graphs for node in graph.node}
    shapes: dict[str, dict[int, list[int]]] = {}
    runs: Counter[str] = Counter()
    for device in trace.step_stats.dev_stats:
        for executed in device.node_stats:
            runs[executed.node_name] += 1
            places = shapes.setdefault(executed.node_name, {})
            for output in executed.output:
                dims = output.tensor_description.shape.dim
                places[output.slot] = [dim.size for dim in dims]
    flops: Counter[str] = Counter()
    for name, count in runs.items():
        node = nodes.get(name)
        if node is None or tf.as_dtype(node.attr["T"].type or 1) not in _FLOATS:
            continue
        inputs = [_shape_of(tensor, shapes) for tensor in node.input if not tensor.startswith("^")]
        output = shapes[name].get(0)
        if output is None:
            continue
        op = _without_library(node.op)
        flops[op] += count * _flops(op, node, inputs, output)
    return dict(flops)


def _shape_of(tensor: str, shapes: Mapping[str, Mapping[int, list[int]]]) -> list[int] | None:
    name, _, slot = tensor.partition(":")
    return shapes.get(name, {}).get(int(slot or 0))


def _without_library(op: str) -> str:
    """The operation as exported: on a CPU TensorFlow puts those of oneDNN in the place of some."""
    return op.removeprefix("_MklNative").removeprefix("_Mkl")


def _flops(op: str, node: Any, inputs: list[list[int] | None], output: list[int]) -> int:
    if op in _ELEMENTWISE:
        return math.prod(output)
    if op in _REDUCTIONS:
        return math.prod(inputs[0] or [])
    if op not in PRODUCTS:
        return 0
    if op == "Einsum":
        equation = node.attr["equation"].s.decode()
        terms, _, result = equation.partition("->")
        sizes = {
            letter: size
            for term, shape in zip(terms.split(","), inputs, strict=True)
            for letter, size in zip(term, shape or [], strict=True)
        }
        summed = set(terms) - set(result) - {","}
        return 2 * math.prod(output) * math.prod(sizes[letter] for letter in summed)
    left = inputs[0]
    if left is None:
        raise ServingError(f"the trace lacks the shape of the inputs of {node.name!r}")
    transposed = node.attr["transpose_a"].b or node.attr["adj_x"].b
    return 2 * math.prod(output) * (left[-2] if transposed else left[-1])
