"""What rebuilds a trained model from code: written beside its SavedModel, and pushed with it.

A SavedModel answers requests, but no code can train it on or give it another catalogue. The checkpoint can do
both: it holds the weights, the Transform graph with its vocabularies, the settings and the catalogue.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydantic
import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import DatasetSpec
from schema.errors import CheckpointError
from trainer import features
from trainer.input_pipeline import Window, expand
from trainer.version import __version__

# TensorFlow Serving leaves this folder of a SavedModel alone.
CHECKPOINT_DIR = Path("assets.extra") / "checkpoint"
# To be raised when older checkpoints can no longer be read.
_FORMAT = 2

_MANIFEST, _WEIGHTS, _ARRAYS = "manifest.json", "weights.npz", "arrays.npz"
_PROBE, _ANSWERS = "probe.npz", "answers.npz"
_TRANSFORM, _CATALOGUE = "transform", "catalogue"
# Training rows whose answers are kept; enough to meet every part of a model with real values.
_PROBE_ROWS = 32
# Between machines and library versions a float32 sum differs in its last digits, not in its third.
_RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE = 1e-3, 1e-4

_Config = TypeVar("_Config", bound=pydantic.BaseModel)


@dataclasses.dataclass(frozen=True)
class Network:
    """The part of a Keras model that a checkpoint keeps: what answers, not what trains.

    Attributes:
      model: that the layers are attributes of, at any depth.
      layers: whose weights count.
      answer: what they say about transformed rows, name to float tensor; creates all of their variables.
    """

    model: tf.keras.Model
    layers: Sequence[tf.keras.layers.Layer]
    answer: Callable[[Mapping[str, tf.Tensor]], Mapping[str, tf.Tensor]]

    def variables(self) -> dict[str, tf.Variable]:
        """The weights by attribute path; metrics are none.

        Paths are stable, the names that Keras makes up are not: they count the layers made before in the
        process.
        """
        weights = {weight.ref() for layer in self.layers for weight in layer.weights}
        weights -= {weight.ref() for metric in self.model.metrics for weight in metric.weights}
        return {path: v for path, v in self.model.get_weight_paths().items() if v.ref() in weights}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read; see `write_checkpoint` for what the parts are.

    Attributes:
      folder: where it lies.
      version: of the Funnel that wrote it.
      spec: the declaration of the dataset that the model was trained on.
      config: the model's settings as JSON.
      settings: what else, besides arrays, it takes to build the model or to train it on; JSON-able.
      arrays: arrays that are not weights.
      weights: value of every variable by its attribute path.
      transform_output: the Transform graph and its vocabularies.
    """

    folder: Path
    version: str
    spec: DatasetSpec
    config: str
    settings: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    transform_output: tft.TFTransformOutput

    def read_config(self, kind: type[_Config]) -> _Config:
        """The model's settings. Raises CheckpointError when this code has other ones."""
        try:
            return kind.model_validate_json(self.config)
        except pydantic.ValidationError as error:
            raise self._unfit(f"no meaning to its settings: {error}") from error

    def restore(self, network: Network) -> None:
        """Gives a model its trained weights and checks that it answers as it did when they were written.

        Args:
          network: built by the same code and settings; its variables need not exist yet.

        Raises:
          CheckpointError: the code builds other variables, or says something else with the same ones.
        """
        probe = self.probe()
        network.answer(probe)
        variables = network.variables()
        built = {path: tuple(variable.shape) for path, variable in variables.items()}
        saved = {path: value.shape for path, value in self.weights.items()}
        if built != saved:
            raise self._unfit(f"other weights: {differences(saved, built)}")
        for path, variable in variables.items():
            variable.assign(self.weights[path])
        self.check_answers(network.answer(probe), _load(self.folder / _ANSWERS))

    def probe(self) -> dict[str, tf.Tensor]:
        """Transformed rows of the training data whose answers are kept."""
        return {name: tf.constant(column) for name, column in _load(self.folder / _PROBE).items()}

    def check_answers(
        self, answers: Mapping[str, tf.Tensor | np.ndarray], expected: Mapping[str, np.ndarray]
    ) -> None:
        """Checks that a restored model says what the trained one said of the same rows.

        Weights of the right shapes are not enough: a model whose code reads its inputs in another order has
        weights of the same shapes.

        Raises:
          CheckpointError: it does not.
        """
        for name, values in expected.items():
            if not np.allclose(answers[name], values, _RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE):
                worst = float(np.max(np.abs(answers[name] - values)))
                raise self._unfit(
                    f"other outputs from the same weights: {name!r} is off by up to {worst:.3g}"
                )

    def catalogue_files(self) -> list[str]:
        """Gzipped TFRecord files of the catalogue examples."""
        return sorted(map(str, (self.folder / _CATALOGUE).glob("*.gz")))

    def copy_to(self, model_dir: Path | str, catalogue: Sequence[str]) -> None:
        """Adds this checkpoint to another export of the same model, over another catalogue.

        Args:
          model_dir: local folder of the SavedModel.
          catalogue: gzipped TFRecord files of its catalogue's examples.
        """
        folder = Path(model_dir) / CHECKPOINT_DIR
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(_CATALOGUE))
        _copy_catalogue(catalogue, folder)

    def _unfit(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the model in {self.folder.parents[1]} was exported by Funnel {self.version}; the code here, "
            f"{__version__}, gives {reason}.\nTrain anew with this code ('funnel run'), or use the code that "
            "exported it."
        )


def write_checkpoint(
    model_dir: Path | str,
    network: Network,
    probe: Window,
    *,
    spec: DatasetSpec,
    config: pydantic.BaseModel,
    transform_output: tft.TFTransformOutput,
    catalogue: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Adds a checkpoint to an exported model.

    Args:
      model_dir: local folder of the SavedModel.
      network: trained.
      probe: transformed rows; the answers to the first few are kept, for `Checkpoint.restore`.
      spec: the declaration of the dataset.
      config: the model's settings.
      transform_output: the Transform graph and its vocabularies.
      catalogue: gzipped TFRecord files of the exported catalogue's examples.
      settings: what else, besides arrays, is needed to build the model or to train it on; JSON-able.
      arrays: arrays that are not weights.

    Raises:
      OSError: the folder cannot be written.
    """
    folder = Path(model_dir) / CHECKPOINT_DIR
    folder.mkdir(parents=True)
    rows = probe_rows(probe, spec)
    np.savez(folder / _PROBE, **{name: np.asarray(column) for name, column in rows.items()})
    np.savez(folder / _ANSWERS, **{name: np.asarray(value) for name, value in network.answer(rows).items()})
    np.savez(folder / _WEIGHTS, **{path: v.numpy() for path, v in network.variables().items()})
    np.savez(folder / _ARRAYS, **dict(arrays or {}))
    transform_fn = Path(transform_output.transform_savedmodel_dir)
    for part in (transform_output.TRANSFORM_FN_DIR, transform_output.TRANSFORMED_METADATA_DIR):
        shutil.copytree(transform_fn.parent / part, folder / _TRANSFORM / part)
    _copy_catalogue(catalogue, folder)
    # Last: a checkpoint without a manifest is none.
    manifest = {
        "format": _FORMAT,
        "version": __version__,
        "dataset": spec.model_dump_json(),
        "config": config.model_dump_json(),
        "settings": dict(settings or {}),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def probe_rows(window: Window, spec: DatasetSpec) -> Window:
    """What models read of the first few rows, which a checkpoint keeps answers about."""
    names = {name for feature in features.feature_space(spec).all for name in feature.transformed_names}
    names |= {*features.impression_names(spec), *features.COUNTER_NAMES}
    return {name: column[:_PROBE_ROWS] for name, column in window.items() if name in names}


def read_checkpoint(model_dir: Path | str) -> Checkpoint:
    """Reads the checkpoint of an exported or pushed model.

    Raises:
      CheckpointError: there is none, or it is of a format that this code does not read.
    """
    folder = Path(model_dir) / CHECKPOINT_DIR
    advice = "a model that 'funnel run' trains with this version has one that fits."
    if not (folder / _MANIFEST).is_file():
        raise CheckpointError(
            f"{model_dir} holds no checkpoint ({folder} is absent): it was exported by an older version of "
            f"Funnel; {advice}"
        )
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != _FORMAT:
        raise CheckpointError(
            f"the checkpoint {folder} has format {manifest['format']}, written by Funnel "
            f"{manifest['version']}; Funnel {__version__} reads format {_FORMAT}: {advice}"
        )
    try:
        spec = DatasetSpec.model_validate_json(manifest["dataset"])
    except pydantic.ValidationError as error:
        raise CheckpointError(
            f"the checkpoint {folder}, written by Funnel {manifest['version']}, declares its dataset in a "
            f"way that Funnel {__version__} does not read; {advice}\n{error}"
        ) from error
    return Checkpoint(
        folder,
        manifest["version"],
        spec,
        manifest["config"],
        manifest["settings"],
        _load(folder / _ARRAYS),
        _load(folder / _WEIGHTS),
        tft.TFTransformOutput(str(folder / _TRANSFORM)),
    )


def catalogue_files(model_dir: Path | str) -> list[str]:
    """Gzipped TFRecord files of the catalogue examples of a model; none when it has no checkpoint."""
    return sorted(map(str, (Path(model_dir) / CHECKPOINT_DIR / _CATALOGUE).glob("*.gz")))


def differences(saved: Mapping[str, tuple[int, ...]], built: Mapping[str, tuple[int, ...]]) -> str:
    """In words, how the shapes of two sets of weights differ; at most three examples."""
    texts = []
    for path in sorted({*saved, *built}):
        if saved.get(path) != built.get(path):
            texts.append(f"{path} is {built.get(path, 'absent')}, was {saved.get(path, 'absent')}")
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")


def _copy_catalogue(patterns: Sequence[str], folder: Path) -> None:
    (folder / _CATALOGUE).mkdir()
    for number, file in enumerate(expand(patterns)):
        tf.io.gfile.copy(file, str(folder / _CATALOGUE / f"{number:05d}.gz"))


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)
