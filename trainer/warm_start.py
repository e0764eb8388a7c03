"""Warm start: a retrieval model starts from the weights of an earlier one, matched by vocabulary value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import DatasetSpec
from schema.errors import CheckpointError, ConfigError
from trainer import features
from trainer.checkpoint import Network, differences
from trainer.encoder import EmbeddingTables
from trainer.retrieval import RetrievalModel

Vocabularies = Mapping[str, Sequence[bytes]]


def towers(model: RetrievalModel) -> Network:
    """What a checkpoint keeps of a retrieval model."""
    return Network(
        model,
        [model.query_tower, model.candidate_tower],
        lambda rows: {"query": model.query_tower(rows), "candidate": model.candidate_tower(rows)},
    )


def vocabularies(transform_output: tft.TFTransformOutput, spec: DatasetSpec) -> dict[str, list[bytes]]:
    """The values of every vocabulary that Transform learnt, by space, in the order of their ids."""
    clock = {feature.space for feature in features.CLOCK_FEATURES}
    spaces = {f.space for f in features.feature_space(spec).all if f.is_categorical} - clock
    return {space: transform_output.vocabulary_by_name(space) for space in sorted(spaces)}


def check_no_future(base_train_end_unix_s: int | None, train_end_unix_s: int) -> None:
    """Checks that a base model has learnt from nothing after the end of this run's training.

    What it had learnt from later interactions may be what this run is validated and tested on.

    Args:
      base_train_end_unix_s: end of the base's training, None where its checkpoint does not tell.
      train_end_unix_s: end of this run's training.

    Raises:
      CheckpointError: it is unknown when the base's training ended.
      ConfigError: the base's training ended later.
    """
    advice = "start anew with --set retrieval.warm_start=false"
    if base_train_end_unix_s is None:
        raise CheckpointError(
            "retrieval.warm_start: the checkpoint of the last blessed model, written by an older version of "
            f"Funnel, does not tell when its training ended, which may be after this run's; {advice}"
        )
    if base_train_end_unix_s > train_end_unix_s:
        raise ConfigError(
            f"retrieval.warm_start: the training of the last blessed model ended at {base_train_end_unix_s} "
            f"(unix seconds), this run's at {train_end_unix_s}: it may know what this run is judged on; "
            f"{advice}, or give later data"
        )


def warm_start(
    model: RetrievalModel, base: RetrievalModel, values: Vocabularies, base_values: Vocabularies
) -> dict[str, int]:
    """Gives a new model the weights of a trained one.

    Rows of embedding tables go by vocabulary value: a value that both vocabularies hold keeps its vector, a
    new value keeps its initial one, the rows of missing and of unknown values are kept. All other weights are
    copied, but for the item factors, which are data of the new model. The item bias starts from the
    popularity in the new training data, as in any new model, plus what the base had learnt on top of the
    popularity in its own. Streaming sampling probabilities go on from those of the base.

    Args:
      model: changed in place; its variables exist.
      base: trained.
      values: vocabularies of the model.
      base_values: vocabularies of the base.

    Returns:
      Number of values whose vectors were kept, by space.

    Raises:
      ConfigError: the two differ in more than the number of vocabulary values.
    """
    variables, trained = _learnt(model), _learnt(base)
    spaces = {path: space for path, space in _spaces(model).items() if space in values}
    widths, trained_widths = (
        {path: tuple(v.shape[1:] if path in spaces else v.shape) for path, v in weights.items()}
        for weights in (variables, trained)
    )
    if widths != trained_widths:
        raise ConfigError(
            "retrieval.warm_start: the model of this run differs from the last blessed one: "
            f"{differences(trained_widths, widths)}. Go back to its settings, or start anew with "
            "--set retrieval.warm_start=false"
        )
    rows = {space: _shared_rows(values[space], base_values[space]) for space in set(spaces.values())}
    bias = _bias(model)
    for path, variable in variables.items():
        value = trained[path].numpy()
        if path in spaces:
            new_rows, base_rows = rows[spaces[path]]
            start = variable.numpy()
            if variable is bias:
                start[new_rows] += (value - np.reshape(base.initial_bias, value.shape))[base_rows]
            else:
                start[new_rows] = value[base_rows]
            value = start
        variable.assign(value)
    new_rows, base_rows = rows[features.ITEM_SPACE]
    model.sampling_probability.start_from(
        new_rows, base.sampling_probability.log_absence(tf.constant(base_rows)).numpy()
    )
    return {space: len(new_rows) - features.FIRST_VOCABULARY_ID for space, (new_rows, _) in rows.items()}


def _learnt(model: RetrievalModel) -> dict[str, tf.Variable]:
    """The variables that a base has something to say about, by path."""
    data = set() if model.item_factors is None else {v.ref() for v in model.item_factors.variables}
    return {path: v for path, v in towers(model).variables().items() if v.ref() not in data}


def _bias(model: RetrievalModel) -> tf.Variable:
    return model.candidate_tower.bias.embeddings


def _spaces(model: RetrievalModel) -> dict[str, str]:
    """Vocabulary space of every weight that has a row per id of one, by path."""
    tables = [layer for layer in model.submodules if isinstance(layer, EmbeddingTables)]
    spaces = {table.embeddings.ref(): space for layer in tables for space, table in layer.tables.items()}
    spaces[_bias(model).ref()] = features.ITEM_SPACE
    return {path: spaces[v.ref()] for path, v in _learnt(model).items() if v.ref() in spaces}


def _shared_rows(values: Sequence[bytes], base_values: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the model and of the base with the same meaning, those of missing and unknown values first."""
    base_id = {value: id_ for id_, value in enumerate(base_values, features.FIRST_VOCABULARY_ID)}
    reserved = list(range(features.FIRST_VOCABULARY_ID))
    shared = [
        (id_, base_id[value])
        for id_, value in enumerate(values, features.FIRST_VOCABULARY_ID)
        if value in base_id
    ]
    pairs = np.array([*zip(reserved, reserved, strict=True), *shared], np.int64)
    return pairs[:, 0], pairs[:, 1]
