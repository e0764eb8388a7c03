"""The Transform graph as exported models hold it: cut down to what the inputs at hand are turned into.

TensorFlow Transform's own layer runs the whole graph whatever it is given, with nothing where an input is
missing: a request, which knows no item, would pay for every item feature too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
import tensorflow_transform as tft

SparseFeatures = Mapping[str, tf.SparseTensor]
Transformed = dict[str, tf.Tensor | tf.SparseTensor]


class TransformGraph(tf.Module):
    """Raw features in, any subset; those transformed features out that depend on no others."""

    def __init__(self, transform_output: tft.TFTransformOutput) -> None:
        """Loads the graph with its vocabularies.

        Args:
          transform_output: of the Transform component.
        """
        super().__init__()
        # Holds the tables and their files, which an exported model brings along.
        self.loaded = tf.saved_model.load(transform_output.transform_savedmodel_dir)
        # A closure keeps the functions out of the object graph that is saved.
        apply = _application(self.loaded.transform_fn)
        traced = tf.function(apply, autograph=False, reduce_retracing=True)
        self._apply: Callable[[], Any] = lambda: traced if tf.executing_eagerly() else apply

    def __call__(self, raw: SparseFeatures) -> Transformed:
        """Sparse raw features by name, [B, L] each, to dense or sparse transformed ones by name."""
        return dict(self._apply()(raw))


def _application(function: Any) -> Callable[[SparseFeatures], Transformed]:
    """What adds the part of a loaded function that some inputs need to the graph that is being traced."""
    graph = function.graph.as_graph_def()
    for node in graph.node:
        # Outputs wait for the checks of all features, which would keep the whole graph in.
        node.input[:] = [name for name in node.input if not name.startswith("^")]
    (specs,), _ = function.structured_input_signature
    count = len(_flat(specs))
    inputs = tf.nest.pack_sequence_as(specs, function.inputs[:count], expand_composites=True)
    captured = list(zip(function.inputs[count:], function.captured_inputs, strict=True))
    outputs = tf.nest.pack_sequence_as(function.structured_outputs, function.outputs, expand_composites=True)
    sources = {name: {node.name for node in _part(graph, output).node} for name, output in outputs.items()}

    def apply(raw: SparseFeatures) -> Transformed:
        missing = {tensor.op.name for name in inputs.keys() - raw for tensor in _flat(inputs[name])}
        wanted = {name: output for name, output in outputs.items() if missing.isdisjoint(sources[name])}
        part = _part(graph, wanted)
        given = [*zip(_flat({name: inputs[name] for name in raw}), _flat(dict(raw)), strict=True), *captured]
        nodes = {node.name for node in part.node}
        values = {tensor.name: _local(value) for tensor, value in given if tensor.op.name in nodes}
        # The inputs wait for whatever the caller has checked; an import cannot.
        with tf.control_dependencies(None):
            names = [tensor.name for tensor in _flat(wanted)]
            found = tf.graph_util.import_graph_def(part, values, names, name="transform")
        return dict(tf.nest.pack_sequence_as(wanted, found, expand_composites=True))

    return apply


def _part(graph: Any, outputs: Any) -> Any:
    """The nodes of a graph that some of its tensors depend on."""
    nodes = sorted({tensor.op.name for tensor in _flat(outputs)})
    return tf.compat.v1.graph_util.extract_sub_graph(graph, nodes)


def _local(value: tf.Tensor) -> tf.Tensor:
    """A tensor in the graph that is being traced; learnt numbers become constants, which can be folded."""
    if isinstance(value, tf.__internal__.EagerTensor) and value.dtype != tf.resource:
        return tf.constant(value.numpy())
    return tf.identity(value)


def _flat(structure: Any) -> list[Any]:
    """The tensors of a structure; of a mapping, in the order of its keys."""
    return list(tf.nest.flatten(structure, expand_composites=True))
