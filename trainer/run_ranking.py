"""The ranking model's `run_fn` for the TFX Trainer component: read, count, build, train, export.

And the same export without training, over another catalogue.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import DatasetSpec, TaskSpec, dataset_spec_from_json
from schema.errors import CheckpointError
from trainer import features
from trainer.calibration import Calibrator
from trainer.catalogue import Catalogue
from trainer.checkpoint import (
    Checkpoint,
    Network,
    differences,
    probe_rows,
    read_checkpoint,
    write_checkpoint,
)
from trainer.config import RankingConfig
from trainer.debiasing import PositionStatistics, position_statistics
from trainer.debiasing_config import has_position_bias
from trainer.distillation import distil, latest_requests
from trainer.encoder import embedding_width
from trainer.fingerprint import (
    CATALOGUE,
    RANKER,
    TRANSFORM,
    Fingerprint,
    hash_arrays,
    hash_catalogue,
    hash_folder,
)
from trainer.impressions import ItemAttributes
from trainer.input_pipeline import load_catalogue, ordered_batches, windows
from trainer.item_vectors import cooccurrence_vectors, positives
from trainer.label_statistics import LabelStatistics, label_statistics
from trainer.log_requirements import check_log
from trainer.preprocessing import vocabulary_sizes
from trainer.preranker import (
    PreRanker,
    PreRanking,
    ServedPreRanker,
    catalogue_features,
    describe_items,
    describe_query,
)
from trainer.preranker_config import PrerankerConfig
from trainer.ranking import RankingModel, calibrate, train
from trainer.ranking_export import ServedRanker, export
from trainer.row_weights import training_batches
from trainer.sample_requests import golden_requests, sample_items, sample_users
from trainer.transform_graph import TransformGraph

TRAINING_LOG = "training_log.json"
# How the pre-ranker was distilled, beside the log of the ranker.
PRERANKER_LOG = "preranker.json"
# Prefix of the pre-ranker's weights among the arrays of a checkpoint.
_PRERANKER = "preranker/"
# What the pre-ranker said of the rows that the checkpoint keeps, among its arrays.
_PRERANKER_SCORES = "preranker_scores"
# About so many candidates in a golden request.
_GOLDEN_ITEMS = 20

_logger = logging.getLogger(__name__)


def run_fn(fn_args: Any) -> None:
    """Trains the ranker and exports it.

    Args:
      fn_args: TFX's FnArgs; `custom_config` holds `dataset` and `config` as JSON, `catalogue` and
        `user_states` as file patterns, and `train_end_unix_s`.

    Writes the SavedModel with its checkpoint to `serving_model_dir`, and `training_log.json` (a list of one
    record per epoch, see `trainer.ranking.train`; undefined metrics are null) to `model_run_dir`; with a
    pre-ranker also `preranker.json` (`log` and `survival`, see `trainer.distillation.Distilled`).

    Raises:
      ConfigError: the settings need what the dataset does not log, or suit none of its tasks.
      DataError: a task cannot be learnt from its training labels, the eval split is empty, or the loss
      diverged.
    """
    spec = dataset_spec_from_json(fn_args.custom_config["dataset"])
    config = RankingConfig.model_validate_json(fn_args.custom_config["config"])
    check_log(config, spec)
    transform_output = tft.TFTransformOutput(fn_args.transform_output)
    item_files = fn_args.custom_config["catalogue"]
    catalogue = load_catalogue(item_files, transform_output, spec)
    train_windows = windows(fn_args.train_files, transform_output)
    eval_windows = windows(fn_args.eval_files, transform_output)

    statistics = read_statistics(train_windows, transform_output, spec)
    positions = read_positions(train_windows, transform_output, spec, config)
    tf.keras.utils.set_random_seed(config.seed)
    vectors = item_vectors(train_windows, transform_output, spec, config)
    model = build(spec, transform_output, catalogue, statistics, config, positions, vectors)
    eval_batches = ordered_batches(eval_windows, config.batch_size)
    log = train(model, training_batches(train_windows, spec, config), eval_batches, config)
    calibrate(model, eval_batches, config.calibration)
    run_dir = Path(fn_args.model_run_dir)
    _write_json([_finite(record) for record in log], run_dir / TRAINING_LOG)
    layer = TransformGraph(transform_output)
    served = ServedRanker(model, layer, catalogue, spec)
    probe = probe_rows(next(iter(train_windows)), spec)
    moment, arrays = fn_args.custom_config["train_end_unix_s"], {}
    if config.preranker is not None:
        requests = latest_requests(
            train_windows.as_numpy_iterator(),
            config.preranker.num_queries + config.preranker.num_validation_users,
            config.seed,
        )
        items = catalogue_features(served.ranker, layer, spec, moment)
        distilled = distil(model, requests, items, spec, config.preranker)
        facts = {"log": [_finite(record) for record in distilled.log], "survival": distilled.survival}
        _write_json(facts, run_dir / PRERANKER_LOG)
        preranking = PreRanking(distilled.student, moment, config.preranker.num_kept)
        served.preranker = ServedPreRanker(preranking, served, layer, spec)
        arrays = {
            _PRERANKER + path: variable.numpy()
            for path, variable in distilled.student.get_weight_paths().items()
        }
        arrays[_PRERANKER_SCORES] = _pair_scores(model, distilled.student, probe)
    user_states = fn_args.custom_config["user_states"]
    _export(served, transform_output, catalogue, item_files, spec, user_states, fn_args.serving_model_dir)
    write_checkpoint(
        fn_args.serving_model_dir,
        _network(model),
        probe,
        spec=spec,
        config=config,
        transform_output=transform_output,
        catalogue=item_files,
        settings={
            "statistics": {name: dataclasses.asdict(value) for name, value in statistics.items()},
            "calibrators": {name: dataclasses.asdict(value) for name, value in model.calibrators.items()},
            "positions": {name: dataclasses.asdict(value) for name, value in (positions or {}).items()},
            "train_end_unix_s": moment,
        },
        arrays=arrays,
    )


def refresh(model_dir: Path, catalogue: Sequence[str], user_states: Sequence[str], target: Path) -> None:
    """Exports a trained ranker over another catalogue, without training.

    Args:
      model_dir: exported or pushed ranking model.
      catalogue: gzipped TFRecord files of the new catalogue's examples.
      user_states: file patterns of user-state examples, for golden requests.
      target: local folder of the new SavedModel; absent or empty.

    Raises:
      CheckpointError: the model has no checkpoint, or one that does not fit the code.
      DataError: the catalogue is empty, or its ids are.
    """
    checkpoint = read_checkpoint(model_dir)
    spec, transform_output = checkpoint.spec, checkpoint.transform_output
    config = checkpoint.read_config(RankingConfig)
    model = restore(checkpoint)
    # Both models are checked over the items that they were trained with.
    preranking = None
    if config.preranker is not None:
        student = restore_preranker(checkpoint, config.preranker, model)
        preranking = PreRanking(student, checkpoint.settings["train_end_unix_s"], config.preranker.num_kept)
    items = load_catalogue(catalogue, transform_output, spec)
    model.attributes = _attributes(items, transform_output, spec)
    layer = TransformGraph(transform_output)
    served = ServedRanker(model, layer, items, spec)
    if preranking is not None:
        served.preranker = ServedPreRanker(preranking, served, layer, spec)
    _export(served, transform_output, items, catalogue, spec, user_states, target)
    checkpoint.copy_to(target, catalogue)


def restore(checkpoint: Checkpoint) -> RankingModel:
    """The trained model of a checkpoint, over its catalogue.

    Raises:
      CheckpointError: it does not fit the code.
    """
    spec, transform_output, settings = checkpoint.spec, checkpoint.transform_output, checkpoint.settings
    statistics = {name: LabelStatistics(**v) for name, v in settings["statistics"].items()}
    positions = {name: PositionStatistics(**v) for name, v in settings["positions"].items()}
    trained_on = load_catalogue(checkpoint.catalogue_files(), transform_output, spec)
    config = checkpoint.read_config(RankingConfig)
    model = build(spec, transform_output, trained_on, statistics, config, positions or None)
    checkpoint.restore(_network(model))
    model.calibrators = {name: Calibrator.from_dict(v) for name, v in settings["calibrators"].items()}
    return model


def _export(
    served: ServedRanker,
    transform_output: tft.TFTransformOutput,
    catalogue: Catalogue,
    item_files: Sequence[str],
    spec: DatasetSpec,
    user_states: Sequence[str],
    model_dir: Path | str,
) -> None:
    """Exports the ranker with its fingerprint and golden requests."""
    fingerprint = Fingerprint(
        {
            TRANSFORM: hash_folder(transform_output.transform_savedmodel_dir),
            CATALOGUE: hash_catalogue(catalogue),
            RANKER: _hash_ranker(served.ranker.model),
        }
    )
    items = sample_items(item_files, spec, step=max(1, len(catalogue) // _GOLDEN_ITEMS))
    golden = golden_requests(served.calls(), sample_users(user_states, spec), items)
    export(served, model_dir, fingerprint, golden)


def _hash_ranker(model: RankingModel) -> str:
    """One hash of weights and calibration."""
    calibrators = {name: dataclasses.asdict(value) for name, value in model.calibrators.items()}
    weights = {path: variable.numpy() for path, variable in _network(model).variables().items()}
    return hash_arrays({**weights, "calibrators": np.array(json.dumps(calibrators, sort_keys=True))})


def restore_preranker(checkpoint: Checkpoint, config: PrerankerConfig, model: RankingModel) -> PreRanker:
    """The pre-ranker whose weights a checkpoint keeps.

    Args:
      checkpoint: of the ranker.
      config: of the pre-ranker.
      model: the ranker, restored: the pre-ranker reads what it knows.

    Raises:
      CheckpointError: it does not fit the code.
    """
    weights = {
        name.removeprefix(_PRERANKER): value
        for name, value in checkpoint.arrays.items()
        if name.startswith(_PRERANKER)
    }
    query_width, item_width = (len(weights[f"{side}_inputs.mean"]) for side in ("query", "item"))
    student = PreRanker(query_width, item_width, config)
    variables = student.get_weight_paths()
    built = {path: tuple(variable.shape) for path, variable in variables.items()}
    saved = {path: value.shape for path, value in weights.items()}
    if built != saved:
        raise CheckpointError(
            f"the code builds another pre-ranker than the one that was trained: {differences(saved, built)}; "
            "train anew with this code ('funnel run'), or use the code that exported it."
        )
    for path, variable in variables.items():
        variable.assign(weights[path])
    if _PRERANKER_SCORES not in checkpoint.arrays:
        raise CheckpointError(
            "the checkpoint is of an older version, which kept no scores to check the pre-ranker by; train "
            "anew with this code ('funnel run'), or use the code that exported it."
        )
    scores = _pair_scores(model, student, checkpoint.probe())
    checkpoint.check_answers(
        {_PRERANKER_SCORES: scores}, {_PRERANKER_SCORES: checkpoint.arrays[_PRERANKER_SCORES]}
    )
    return student


def _pair_scores(model: RankingModel, student: PreRanker, rows: Mapping[str, Any]) -> np.ndarray:
    """What the pre-ranker says of B transformed rows, one candidate each: float32 [B, 1]."""
    rows = {name: tf.constant(column) for name, column in rows.items()}
    users = student.user_vectors(describe_query(model, model.encode_query(rows)))
    items = student.item_vectors(describe_items(model, rows))
    scores: np.ndarray = student.score_pairs(users, items[:, tf.newaxis]).numpy()
    return scores


def build(
    spec: DatasetSpec,
    transform_output: tft.TFTransformOutput,
    catalogue: Catalogue,
    statistics: Mapping[str, LabelStatistics],
    config: RankingConfig,
    positions: Mapping[str, PositionStatistics] | None,
    item_vectors: np.ndarray | None = None,
) -> RankingModel:
    """An untrained ranker over a Transform graph; arguments as of `RankingModel`."""
    attributes = _attributes(catalogue, transform_output, spec)
    sizes = vocabulary_sizes(transform_output, spec)
    return RankingModel(spec, sizes, statistics, attributes, config, positions, item_vectors)


def item_vectors(
    windows: tf.data.Dataset,
    transform_output: tft.TFTransformOutput,
    spec: DatasetSpec,
    config: RankingConfig,
) -> np.ndarray | None:
    """What item embeddings start from; None is random."""
    if config.item_vectors == "random":
        return None
    num_ids = vocabulary_sizes(transform_output, spec)[features.ITEM_SPACE]
    users, items = positives(windows, spec)
    width = embedding_width(num_ids, config.max_embedding_width)
    return cooccurrence_vectors(users, items, num_ids, width, config.seed)


def read_positions(
    train_windows: tf.data.Dataset,
    transform_output: tft.TFTransformOutput,
    spec: DatasetSpec,
    config: RankingConfig,
) -> dict[str, PositionStatistics] | None:
    """The training labels by position, by task with a position tower; None where positions are not used."""
    if config.position.kind == "none":
        return None
    tasks = position_tasks(spec, config)
    return position_statistics(
        train_windows.as_numpy_iterator(), tasks, config.position, *_surfaces(transform_output, spec)
    )


def position_tasks(spec: DatasetSpec, config: RankingConfig) -> list[TaskSpec]:
    """The tasks that get a position tower; warns of those that a tower has no place in."""
    tasks = [task for task in spec.tasks if has_position_bias(config.position, task)]
    others = [task.name for task in spec.tasks if task not in tasks]
    if others:
        _logger.warning(
            "ranking.position.kind %r has no place in the tasks %s: they learn without the position; see "
            "docs/debiasing.md.",
            config.position.kind,
            ", ".join(others),
        )
    return tasks


def read_statistics(
    train_windows: tf.data.Dataset, transform_output: tft.TFTransformOutput, spec: DatasetSpec
) -> dict[str, LabelStatistics]:
    """The statistics of the training labels, by task, with those of contexts."""
    return label_statistics(train_windows.as_numpy_iterator(), spec.tasks, *_surfaces(transform_output, spec))


def _surfaces(transform_output: tft.TFTransformOutput, spec: DatasetSpec) -> tuple[int, str | None]:
    """Number of ids of surfaces, padding and OOV included, and their feature; 1 and None without surfaces."""
    if not spec.surface_is_mapped:
        return 1, None
    name = features.feature_space(spec).find(features.SURFACE).id_name
    return vocabulary_sizes(transform_output, spec)[features.SURFACE], name


def _attributes(
    catalogue: Catalogue, transform_output: tft.TFTransformOutput, spec: DatasetSpec
) -> ItemAttributes:
    return ItemAttributes(catalogue, vocabulary_sizes(transform_output, spec)[features.ITEM_SPACE], spec)


def _network(model: RankingModel) -> Network:
    return Network(model, [model], model)


def _finite(record: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: undefined metrics become null."""
    return {key: value if math.isfinite(value) else None for key, value in record.items()}


def _write_json(value: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
