"""The retrieval model's `run_fn` for the TFX Trainer component: config, data, model, fit, index, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import dataset_spec_from_json
from trainer import features
from trainer.config import RetrievalConfig
from trainer.index import build_index
from trainer.input_pipeline import load_catalogue, shuffled_batches, windows
from trainer.preprocessing import vocabulary_sizes
from trainer.retrieval import RetrievalModel, count_positives, fit, is_positive, item_log_q
from trainer.retrieval_export import ServedRetrieval, export
from trainer.retrieval_validation import load_validation_users

TRAINING_LOG = "training_log.json"
# Queries on which ScaNN is compared with exact search: enough for a mean to within a percent.
_SAMPLE_QUERIES = 256


def run_fn(fn_args: Any) -> None:
    """Trains the retrieval model, builds the index and exports both.

    Args:
      fn_args: TFX's FnArgs; `custom_config` holds `dataset` and `config` as JSON, `catalogue` and
        `user_states` as file patterns.

    Writes the SavedModel to `serving_model_dir`, and `training_log.json` (a list of one record per epoch, see
    `trainer.retrieval.fit`) to `model_run_dir`.

    Raises:
      DataError: there is nothing to train or to validate on, or the loss is no longer finite.
      IndexBuildError: the index does not reach the required recall.
    """
    spec = dataset_spec_from_json(fn_args.custom_config["dataset"])
    config = RetrievalConfig.model_validate_json(fn_args.custom_config["config"])
    transform_output = tft.TFTransformOutput(fn_args.transform_output)
    layer = transform_output.transform_features_layer()
    sizes = vocabulary_sizes(transform_output, spec)
    catalogue = load_catalogue(fn_args.custom_config["catalogue"], transform_output, spec)
    user_states = fn_args.custom_config["user_states"]
    users = load_validation_users(user_states, layer, catalogue, spec, config.max_validation_users)
    train_windows = windows(fn_args.train_files, spec, transform_output)

    tf.keras.utils.set_random_seed(config.seed)
    counts = count_positives(train_windows, sizes[features.ITEM_SPACE])
    model = RetrievalModel(config, features.feature_space(spec), sizes, item_log_q(counts, catalogue))
    batches = shuffled_batches(train_windows, config.batch_size, config.seed, keep=is_positive)
    log_file = Path(fn_args.model_run_dir) / TRAINING_LOG
    fit(model, batches, int(counts.sum()), catalogue, users, config, log_file)

    sample_queries = model.encode_users(users.query)[:_SAMPLE_QUERIES]
    vectors = model.encode_catalogue(catalogue)
    index, facts = build_index(catalogue.item_ids, vectors, sample_queries, config.index, config.max_k)
    served = ServedRetrieval(model, index, layer, catalogue, spec, config.max_k)
    export(served, facts, fn_args.serving_model_dir)
