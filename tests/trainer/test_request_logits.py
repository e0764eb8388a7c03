"""Logits of many candidates of a request: the same as those of the model itself, whatever its structure."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import ranking_world as world
from tests.trainer.funnel_world import random_weights
from trainer.body_config import BehaviourConfig, ExpertsConfig, InteractionConfig
from trainer.config import RankingConfig
from trainer.label_statistics import label_statistics
from trainer.ranking import RankingModel
from trainer.request_logits import request_logits

SPEC = world.spec()
USERS, CANDIDATES = 3, 4
CONFIGS = {
    "default": {},
    "one cross": {"interaction": InteractionConfig(num_layers=1)},
    "three crosses": {"interaction": InteractionConfig(num_layers=3)},
    "no hidden layer": {"experts": ExpertsConfig(hidden_layers=())},
    "one hidden layer": {"experts": ExpertsConfig(hidden_layers=(6,))},
    "attention": {"behaviour": BehaviourConfig(kind="din", attention_layers=(5,))},
    "surface crossed": {"crosses": (("surface", "tag"), ("surface", "length"))},
    "low rank": {"interaction": InteractionConfig(kind="dcn_low_rank", rank=3)},
    "stacked": {"interaction": InteractionConfig(structure="stacked")},
    "dot products": {"interaction": InteractionConfig(kind="dlrm")},
    "no interaction": {"interaction": InteractionConfig(kind="none")},
    "networks of the tasks": {"experts": ExpertsConfig(task_layers=(5,))},
    "experts": {"experts": ExpertsConfig(kind="mmoe", hidden_layers=(6,))},
}


def made(config: dict[str, Any]) -> tuple[RankingModel, list[tf.Tensor]]:
    """A model with random weights, and the parts of three requests with four candidates each."""
    tf.keras.utils.set_random_seed(1)
    rows = world.rows(USERS * CANDIDATES, seed=1)
    statistics = label_statistics([world.rows(64, seed=1)], SPEC.tasks)
    settings = RankingConfig(
        max_embedding_width=4, **{"experts": ExpertsConfig(hidden_layers=(6, 5)), **config}
    )
    model = RankingModel(SPEC, world.VOCABULARY_SIZES, statistics, world.attributes(SPEC), settings)
    model(rows)
    random_weights(model.trainable_weights)
    query = model.encode_query({name: column[::CANDIDATES] for name, column in rows.items()})

    def grouped(column: tf.Tensor) -> tf.Tensor:
        return tf.reshape(column, [USERS, CANDIDATES, *column.shape[1:]])

    items = tf.nest.map_structure(grouped, model.encode_items(rows))
    ages = {name: grouped(rows[name]) for f in model.cross_features for name in f.transformed_names}
    return model, model.parts(query, items, ages)


def graph_of(model: RankingModel, parts: list[tf.Tensor]) -> Any:
    """The logits as a graph that does not know how many requests and candidates there are."""
    specs = [tf.TensorSpec([None, 1 if part.shape[1] == 1 else None, part.shape[2]]) for part in parts]
    of_pairs = next(place for place, part in enumerate(parts) if part.shape[1] != 1)

    def run(given: list[tf.Tensor]) -> dict[str, tf.Tensor]:
        return request_logits(model, given, tf.unstack(tf.shape(given[of_pairs])[:2]))

    return tf.function(run, input_signature=[specs], autograph=False).get_concrete_function()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_of_a_request_are_those_of_the_model(config: dict[str, Any]) -> None:
    model, parts = made(config)
    expected = model.logits_of_parts(parts, [USERS, CANDIDATES])
    got = graph_of(model, parts)(*parts)
    assert got.keys() == expected.keys()
    for name, logits in expected.items():
        assert np.std(logits) > 0.01
        # Sums of some 100 float32 in another order.
        np.testing.assert_allclose(got[name], logits, rtol=1e-5, atol=1e-5)


def test_what_is_the_same_for_all_candidates_is_multiplied_once() -> None:
    model, parts = made({})
    width = sum(part.shape[2] for part in parts)
    wide = [
        op
        for op in graph_of(model, parts).graph.get_operations()
        if op.type == "MatMul" and width in op.inputs[1].shape
    ]
    assert not wide, "a product reads or makes all columns for every candidate"


def test_a_request_without_candidates_gets_no_logits() -> None:
    model, parts = made({})
    none = [part if part.shape[1] == 1 else part[:, :0] for part in parts]
    assert {name: logits.shape[0] for name, logits in graph_of(model, parts)(*none).items()} == {
        "click": 0,
        "stars": 0,
        "watch": 0,
    }
