"""The retrieval model's `run_fn` for the TFX Trainer component: config, data, model, fit, index, export.

And the same export without training, over another catalogue.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import DatasetSpec, dataset_spec_from_json
from schema.errors import ConfigError
from trainer import features
from trainer.allow_list_inputs import check_attributes
from trainer.catalogue import Catalogue
from trainer.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from trainer.config import RetrievalConfig
from trainer.fingerprint import (
    CATALOGUE,
    INDEX,
    TOWERS,
    TRANSFORM,
    Fingerprint,
    hash_arrays,
    hash_catalogue,
    hash_folder,
    hash_variables,
)
from trainer.hard_negatives import known_positives
from trainer.index_build import build_index
from trainer.index_facts import IndexFacts
from trainer.input_pipeline import expand, load_catalogue, rows_of_surfaces, shuffled_batches, windows
from trainer.item_factors import item_factors
from trainer.item_vectors import cooccurrence_vectors, positives
from trainer.popularity import daily_popularity
from trainer.preprocessing import vocabulary_sizes
from trainer.raw_inputs import parse_candidate_examples
from trainer.retrieval import (
    RetrievalModel,
    count_positives,
    fit,
    is_positive,
    item_log_q,
    rolled_back,
    unread_features,
)
from trainer.retrieval_export import ServedRetrieval, export
from trainer.retrieval_validation import ValidationUsers, load_validation_users
from trainer.sample_requests import golden_requests, sample_users
from trainer.slices import popularity_masks
from trainer.transform_graph import TransformGraph
from trainer.warm_start import check_no_future, towers, vocabularies, warm_start

TRAINING_LOG = "training_log.json"
# Queries on which ScaNN is compared with exact search: enough for a mean to within a percent.
_SAMPLE_QUERIES = 256
# Of a checkpoint: what streaming sampling probabilities go on from.
_LOG_ABSENCE = "log_absence"

_logger = logging.getLogger(__name__)


def run_fn(fn_args: Any) -> None:
    """Trains the retrieval model, builds the index and exports both.

    Args:
      fn_args: TFX's FnArgs; `custom_config` holds `dataset` and `config` as JSON, `train_end_unix_s`,
        and `catalogue` and `user_states` as file patterns; `base_model` is the exported model to start from,
        or None.

    Writes the SavedModel with its checkpoint to `serving_model_dir`, and `training_log.json` (a list of one
    record per epoch, see `trainer.retrieval.fit`) to `model_run_dir`.

    Raises:
      DataError: there is nothing to train or to validate on, or the loss is no longer finite.
      CollapsedModelError: the model says the same to everybody.
      IndexBuildError: the index does not reach the required recall.
      CheckpointError, ConfigError: the base model does not fit the code, or this run's model, or it was
        trained on what is the future of this run.
    """
    spec = dataset_spec_from_json(fn_args.custom_config["dataset"])
    config = RetrievalConfig.model_validate_json(fn_args.custom_config["config"])
    train_end_unix_s = int(fn_args.custom_config["train_end_unix_s"])
    transform_output = tft.TFTransformOutput(fn_args.transform_output)
    layer = TransformGraph(transform_output)
    sizes = vocabulary_sizes(transform_output, spec)
    catalogue_files = fn_args.custom_config["catalogue"]
    catalogue = load_catalogue(catalogue_files, transform_output, spec)
    user_states = fn_args.custom_config["user_states"]
    users = load_validation_users(user_states, layer, catalogue, spec, config.max_validation_users)
    unread = unread_features(spec, config)
    train_windows = windows(fn_args.train_files, transform_output, unread=unread)
    if config.surfaces:
        train_windows = rows_of_surfaces(train_windows, config.surfaces, spec, transform_output)

    tf.keras.utils.set_random_seed(config.seed)
    counts = count_positives(train_windows, sizes[features.ITEM_SPACE])
    log_q = item_log_q(counts, catalogue)
    popularity = daily_popularity(
        train_windows, sizes[features.ITEM_SPACE], spec.positive, config.popularity_half_lives_days
    )
    factors = _item_factors(train_windows, sizes[features.ITEM_SPACE], spec, config)
    # Of some surfaces a window may hold no row.
    probe = rolled_back(next(rows for rows in train_windows if len(next(iter(rows.values())))), config)
    if config.warm_start and fn_args.base_model:
        model = _started_from(
            fn_args.base_model,
            train_end_unix_s,
            config,
            spec,
            transform_output,
            log_q,
            popularity,
            factors,
            probe,
        )
    else:
        _logger.info("phase=start kind=cold warm_start=%s", config.warm_start)
        item_vectors = _item_vectors(train_windows, sizes[features.ITEM_SPACE], spec, config)
        model = RetrievalModel(
            config, features.feature_space(spec), sizes, log_q, popularity, item_vectors, factors
        )
    batches = shuffled_batches(train_windows, config.batch_size, config.seed, keep=is_positive)
    log_file = Path(fn_args.model_run_dir) / TRAINING_LOG
    known = known_positives(train_windows, spec.positive) if config.loss.hard_negatives else None
    fit(model, batches, int(counts.sum()), catalogue, users, config, log_file, known)

    arrays = {
        "log_q": log_q,
        "popularity": popularity[:, :1],
        "num_positives": counts,
        "sample_queries": model.encode_users(_sample(users, config.seed)),
    }
    if config.loss.sampling_probability == "streaming":
        arrays[_LOG_ABSENCE] = model.sampling_probability.log_absence(tf.range(len(log_q))).numpy()
    _export(
        model,
        transform_output,
        catalogue,
        catalogue_files,
        user_states,
        spec,
        config,
        arrays,
        fn_args.serving_model_dir,
    )
    write_checkpoint(
        fn_args.serving_model_dir,
        towers(model),
        probe,
        spec=spec,
        config=config,
        transform_output=transform_output,
        catalogue=catalogue_files,
        settings={
            "embedding_widths": dict(model.embedding_widths),
            "train_end_unix_s": train_end_unix_s,
        },
        arrays=arrays,
    )


def refresh(
    model_dir: Path, catalogue: Sequence[str], user_states: Sequence[str], target: Path
) -> IndexFacts:
    """Exports a trained model over another catalogue, without training.

    Items outside the training vocabulary get their vectors from their content.

    Args:
      model_dir: exported or pushed retrieval model.
      catalogue: gzipped TFRecord files of the new catalogue's examples.
      user_states: file patterns of user-state examples, for golden requests.
      target: local folder of the new SavedModel; absent or empty.

    Returns:
      What was built.

    Raises:
      CheckpointError: the model has no checkpoint, or one that does not fit the code.
      DataError: the catalogue is empty, or its ids are.
      IndexBuildError: the index does not reach the required recall.
    """
    checkpoint = read_checkpoint(model_dir)
    model = restore(checkpoint)
    items = load_catalogue(catalogue, checkpoint.transform_output, checkpoint.spec)
    facts = _export(
        model,
        checkpoint.transform_output,
        items,
        catalogue,
        user_states,
        checkpoint.spec,
        checkpoint.read_config(RetrievalConfig),
        checkpoint.arrays,
        target,
    )
    checkpoint.copy_to(target, catalogue)
    return facts


def restore(checkpoint: Checkpoint) -> RetrievalModel:
    """The trained model of a checkpoint. Raises CheckpointError when it does not fit the code."""
    model = RetrievalModel(
        checkpoint.read_config(RetrievalConfig),
        features.feature_space(checkpoint.spec),
        vocabulary_sizes(checkpoint.transform_output, checkpoint.spec),
        checkpoint.arrays["log_q"],
        checkpoint.arrays["popularity"],
        embedding_widths=checkpoint.settings["embedding_widths"],
    )
    checkpoint.restore(towers(model))
    if _LOG_ABSENCE in checkpoint.arrays:
        log_absence = checkpoint.arrays[_LOG_ABSENCE]
        model.sampling_probability.start_from(np.arange(len(log_absence)), log_absence)
    return model


def _started_from(
    base_dir: str,
    train_end_unix_s: int,
    config: RetrievalConfig,
    spec: DatasetSpec,
    transform_output: tft.TFTransformOutput,
    log_q: np.ndarray,
    popularity: np.ndarray,
    factors: np.ndarray | None,
    probe: Mapping[str, tf.Tensor],
) -> RetrievalModel:
    """A new model with the weights of an exported one."""
    checkpoint = read_checkpoint(base_dir)
    check_no_future(checkpoint.settings.get("train_end_unix_s"), train_end_unix_s)
    space, base_space = features.feature_space(spec), features.feature_space(checkpoint.spec)
    if (space.query, space.candidate) != (base_space.query, base_space.candidate):
        changed = {*space.all} ^ {*base_space.all}
        raise ConfigError(
            "retrieval.warm_start: the features of the dataset are not those of the last blessed model "
            f"({', '.join(sorted({f.name for f in changed})) or 'another order'}); start anew with "
            "--set retrieval.warm_start=false"
        )
    base = restore(checkpoint)
    sizes = vocabulary_sizes(transform_output, spec)
    model = RetrievalModel(
        config,
        space,
        sizes,
        log_q,
        popularity,
        item_factors=factors,
        embedding_widths=base.embedding_widths,
    )
    towers(model).answer({name: column[:1] for name, column in probe.items()})
    values = vocabularies(transform_output, spec)
    kept = warm_start(model, base, values, vocabularies(checkpoint.transform_output, checkpoint.spec))
    _logger.info(
        "phase=start kind=warm base=%s kept=%s",
        base_dir,
        " ".join(f"{name}:{count}/{len(values[name])}" for name, count in kept.items()),
    )
    return model


def _sample(users: ValidationUsers, seed: int) -> dict[str, np.ndarray]:
    """Query features of _SAMPLE_QUERIES users drawn at random, or of all where there are fewer."""
    size = min(_SAMPLE_QUERIES, len(users))
    chosen = np.random.default_rng(seed).choice(len(users), size, replace=False)
    return {name: column[chosen] for name, column in users.query.items()}


def _item_vectors(
    windows: tf.data.Dataset, num_ids: int, spec: DatasetSpec, config: RetrievalConfig
) -> np.ndarray | None:
    """What item embeddings start from; None is random."""
    if config.item_vectors == "random":
        return None
    users, items = positives(windows, spec)
    return cooccurrence_vectors(users, items, num_ids, config.embedding_dim, config.seed)


def _item_factors(
    windows: tf.data.Dataset, num_ids: int, spec: DatasetSpec, config: RetrievalConfig
) -> np.ndarray | None:
    """Item factors that are not trained; None where the model has none."""
    if config.factors is None:
        return None
    users, items = positives(windows, spec)
    return item_factors(users, items, num_ids, config.factors, config.seed)


def _export(
    model: RetrievalModel,
    transform_output: tft.TFTransformOutput,
    catalogue: Catalogue,
    catalogue_files: Sequence[str],
    user_states: Sequence[str],
    spec: DatasetSpec,
    config: RetrievalConfig,
    arrays: Mapping[str, np.ndarray],
    model_dir: Path | str,
) -> IndexFacts:
    """Builds the index and exports it with the model; `arrays` are those of the checkpoint."""
    ids = catalogue.transformed[features.feature_space(spec).find(features.ITEM_ID).id_name]
    index, facts = build_index(
        catalogue.item_ids,
        model.encode_catalogue(catalogue),
        arrays["sample_queries"],
        config.index,
        config.max_k,
        slices=popularity_masks(arrays["num_positives"][ids], ids > features.OOV_ID),
        attributes=attributes(catalogue_files, spec, config.index.allow_list),
    )
    layer = TransformGraph(transform_output)
    served = ServedRetrieval(model, index, layer, catalogue, spec, config.max_k)
    fingerprint = Fingerprint(
        {
            TRANSFORM: hash_folder(transform_output.transform_savedmodel_dir),
            CATALOGUE: hash_catalogue(catalogue),
            TOWERS: hash_variables(towers(model).variables()),
            INDEX: hash_arrays({"vectors": served.index.vectors.numpy()}),
        }
    )
    golden = golden_requests(served.calls(), sample_users(user_states, spec))
    export(served, facts, model_dir, fingerprint, golden)
    return facts


def attributes(
    catalogue_files: Sequence[str], spec: DatasetSpec, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Raw values of all items by attribute: str [I], or [I, W] where an item has any number of them."""
    if not names:
        return {}
    check_attributes(names, spec)
    records = tf.data.TFRecordDataset(expand(catalogue_files), compression_type="GZIP")
    raw = parse_candidate_examples(tf.constant(list(records.as_numpy_iterator())), spec)
    return {name: np.char.decode(raw[name].numpy().astype(bytes), "utf-8") for name in names}
