"""Crosses and dot products by hand and against slow versions, their sizes, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import ConfigError, ShapeError
from trainer.body_config import InteractionConfig
from trainer.interactions import CrossNetwork, DotProducts, interaction

WIDTHS = (4, 7, 1, 8)
SETTINGS = {
    "dcn": InteractionConfig(kind="dcn", num_layers=3),
    "dcn_low_rank": InteractionConfig(kind="dcn_low_rank", num_layers=2, rank=3),
    "dlrm": InteractionConfig(kind="dlrm", projection_width=5),
}
# float32 products of a few sums around 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

each_kind = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())


def features(count: int = 6, widths: tuple[int, ...] = WIDTHS) -> list[tf.Tensor]:
    rng = np.random.default_rng(0)
    return [tf.constant(rng.normal(size=(count, width)), tf.float32) for width in widths]


def moved(config: InteractionConfig, seed: int = 1) -> tf.keras.layers.Layer:
    """A layer whose biases are not zero, which would hide where they are added."""
    tf.keras.utils.set_random_seed(seed)
    layer = interaction(config)
    assert layer is not None
    layer(features())
    for variable in layer.weights:
        variable.assign_add(tf.random.normal(variable.shape, stddev=0.2))
    return layer


def cross_oracle(layer: CrossNetwork, x: np.ndarray) -> np.ndarray:
    """One row, written from equations 1 and 2 of Wang et al. 2021."""
    crossed = x
    for cross in layer.crosses:
        if layer.rank is None:
            kernel, bias = (weight.numpy() for weight in cross.weights)
        else:
            down, up, bias = (weight.numpy() for weight in cross.weights)
            kernel = down @ up
        crossed = x * (crossed @ kernel + bias) + crossed
    return crossed


def dot_oracle(layer: DotProducts, parts: list[np.ndarray]) -> np.ndarray:
    """One row, pair by pair."""
    projected = [
        part @ project.kernel.numpy() + project.bias.numpy()
        for part, project in zip(parts, layer.projections, strict=True)
    ]
    products = [projected[i] @ projected[j] for i in range(len(parts)) for j in range(i)]
    return np.concatenate([*parts, products])


@each_kind
def test_interactions_against_a_slow_version(config: InteractionConfig) -> None:
    layer = moved(config)
    found = layer(features()).numpy()
    for row in range(6):
        parts = [part.numpy()[row] for part in features()]
        if config.kind == "dlrm":
            expected = dot_oracle(layer, parts)
        else:
            expected = cross_oracle(layer, np.concatenate(parts))
        np.testing.assert_allclose(found[row], expected, **CLOSE)


def test_two_crosses_by_hand() -> None:
    layer = CrossNetwork(InteractionConfig(kind="dcn", num_layers=2))
    inputs = [tf.constant([[2.0]]), tf.constant([[3.0]])]
    layer(inputs)
    for cross in layer.crosses:
        kernel, bias = cross.weights
        # Each half reads the other, and 1 is added to the second.
        kernel.assign([[0.0, 1.0], [1.0, 0.0]])
        bias.assign([0.0, 1.0])
    # x1 = (2 · 3 + 2, 3 · (2 + 1) + 3) = (8, 12); x2 = (2 · 12 + 8, 3 · (8 + 1) + 12).
    np.testing.assert_allclose(layer(inputs), [[32.0, 39.0]])


def test_dot_products_by_hand() -> None:
    layer = DotProducts(InteractionConfig(kind="dlrm", projection_width=2))
    inputs = [tf.constant([[1.0, 2.0]]), tf.constant([[3.0]]), tf.constant([[5.0, 7.0]])]
    layer(inputs)
    for project, kernel in zip(
        layer.projections, [[[1, 0], [0, 1]], [[1, 1]], [[0, 1], [1, 0]]], strict=True
    ):
        project.kernel.assign(np.array(kernel, np.float32))
    # Projected (1, 2), (3, 3), (7, 5): pairs (1, 0), (2, 0), (2, 1).
    np.testing.assert_allclose(layer(inputs), [[1, 2, 3, 5, 7, 9, 17, 36]])


@each_kind
def test_interactions_know_their_width_before_they_see_rows(config: InteractionConfig) -> None:
    layer = moved(config)
    width = 20 if config.kind != "dlrm" else 20 + 6
    traced = tf.function(
        lambda *parts: layer(list(parts)),
        input_signature=[tf.TensorSpec([None, w]) for w in WIDTHS],
        autograph=False,
    )
    assert traced.get_concrete_function().structured_outputs.shape.as_list() == [None, width]
    np.testing.assert_allclose(traced(*features()), layer(features()), **CLOSE)
    assert layer(features(0)).shape == (0, width)
    np.testing.assert_allclose(layer(features())[2:3], layer([p[2:3] for p in features()]), **CLOSE)


@pytest.mark.parametrize("kind", ["dcn", "dcn_low_rank"])
def test_crosses_take_the_concatenated_vector_too(kind: str) -> None:
    layer = moved(SETTINGS[kind])
    np.testing.assert_array_equal(layer([tf.concat(features(), axis=-1)]), layer(features()))


@each_kind
def test_gradients_reach_every_weight_and_feature(config: InteractionConfig) -> None:
    layer, inputs = moved(config), [tf.Variable(part) for part in features()]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.sin(layer(inputs)))
    targets = layer.trainable_variables + inputs
    for variable, gradient in zip(targets, tape.gradient(loss, targets), strict=True):
        assert (gradient.numpy() != 0).all(), variable.name


def test_low_rank_crosses_are_smaller_than_full_ones() -> None:
    full, low = moved(SETTINGS["dcn"]), moved(SETTINGS["dcn_low_rank"])
    assert full.count_params() == 3 * (20 * 20 + 20)
    assert low.count_params() == 2 * (2 * 20 * 3 + 20)


def test_crosses_of_wide_inputs_do_not_grow() -> None:
    tf.keras.utils.set_random_seed(1)
    layer = CrossNetwork(InteractionConfig(kind="dcn", num_layers=1))
    wide = tf.random.normal([64, 4000])
    # x ⊙ W x has the variance of W x, about 1 where W has a Glorot spread: 1 + 1 with the inputs.
    assert float(tf.math.reduce_variance(layer([wide]))) == pytest.approx(2.0, rel=0.05)


@each_kind
def test_weights_survive_save_and_restore(config: InteractionConfig, tmp_path: Path) -> None:
    layer, other = moved(config), moved(config, seed=2)
    assert np.abs(other(features()) - layer(features())).max() > 1e-3
    path = tf.train.Checkpoint(layer=layer).write(str(tmp_path / "layer"))
    tf.train.Checkpoint(layer=other).read(path).assert_consumed()
    np.testing.assert_array_equal(other(features()), layer(features()))


def test_the_settings_name_the_layer() -> None:
    assert interaction(InteractionConfig(kind="none")) is None
    assert [type(interaction(config)) for config in SETTINGS.values()] == [
        CrossNetwork,
        CrossNetwork,
        DotProducts,
    ]


@pytest.mark.parametrize("rank", [10, 11, 200])
def test_a_rank_that_saves_nothing_is_refused(rank: int) -> None:
    layer = CrossNetwork(InteractionConfig(kind="dcn_low_rank", rank=rank))
    with pytest.raises(ConfigError, match=rf"rank is {rank}, but the features are 20 wide.*less than 10"):
        layer(features())


def test_dot_products_of_a_single_vector_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"at least two features, got 1 of shape \[\(6, 20\)\]"):
        DotProducts(SETTINGS["dlrm"])([tf.concat(features(), axis=-1)])
