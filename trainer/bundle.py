"""Bundles: exported SavedModels with what travels in them beside the graph."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainer.fingerprint import FINGERPRINT, Fingerprint
from trainer.golden import GoldenRequest, write_golden_requests

Tensors = Mapping[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a signature does, before it is traced.

    Attributes:
      function: inputs by name to outputs by name; the batch is the first dimension of each.
      inputs: tensor specs of the inputs.
    """

    function: Callable[[Tensors], dict[str, tf.Tensor]]
    inputs: Mapping[str, tf.TensorSpec]

    def traced(self) -> Any:
        """The concrete function to be saved."""

        def call(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            return self.function(inputs)

        return tf.function(call, autograph=False).get_concrete_function(**self.inputs)


class ServedModel(tf.Module):
    """A trained model with the signatures that it is exported with."""

    def calls(self) -> dict[str, Signature]:
        """The signatures by name, as documented in docs/architecture.md."""
        raise NotImplementedError

    def signatures(self) -> dict[str, Any]:
        """The signatures, traced."""
        return {name: signature.traced() for name, signature in self.calls().items()}


def input_specs(signature: Any) -> dict[str, tf.TensorSpec]:
    """Inputs of a signature of a SavedModel by name, from its SignatureDef."""
    return {
        name: tf.TensorSpec(tf.TensorShape(info.tensor_shape), tf.as_dtype(info.dtype), name=name)
        for name, info in signature.inputs.items()
    }


@contextlib.contextmanager
def appearing_whole(model_dir: Path | str) -> Iterator[Path]:
    """A folder to write to, which appears under its name complete or not at all.

    Raises:
      OSError: `model_dir` cannot be written or is not empty.
    """
    target = Path(model_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        os.chmod(partial, 0o755)  # mkdtemp makes folders that only their owner can read
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_bundle(
    served: ServedModel, folder: Path, fingerprint: Fingerprint, golden: Sequence[GoldenRequest]
) -> None:
    """Writes the SavedModel with its fingerprint and its golden requests into an empty folder."""
    # ScaNN's operations are in a namespace that TensorFlow does not save unasked.
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    signatures = {**served.signatures(), FINGERPRINT: fingerprint.signature()}
    tf.saved_model.save(served, str(folder), signatures=signatures, options=options)
    fingerprint.write(folder)
    write_golden_requests(folder, golden)
