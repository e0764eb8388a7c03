"""What a candidate reads of a history: by hand, against slow versions, and what must not matter."""

import math
from pathlib import Path

import numpy as np
import pydantic
import pytest
import tensorflow as tf

from schema.errors import ConfigError
from trainer.behaviour import MeanBehaviour, SessionTransformer, TargetAttention, behaviour
from trainer.body_config import BehaviourConfig

WIDTH, FEATURES, MAX_EVENTS = 8, 3, 5
SMALL = {"max_events": MAX_EVENTS, "num_heads": 2, "dropout_fraction": 0.5}
ALL = {
    "mean": BehaviourConfig(kind="mean", **SMALL),
    "din": BehaviourConfig(kind="din", attention_layers=(6,), **SMALL),
    "din-deep": BehaviourConfig(kind="din", attention_layers=(6, 4), **SMALL),
    "din-softmax": BehaviourConfig(kind="din", attention_layers=(6, 4), softmax=True, **SMALL),
    "causal": BehaviourConfig(kind="transformer", num_blocks=2, **SMALL),
    "bidirectional": BehaviourConfig(kind="transformer", num_blocks=3, causal=False, **SMALL),
    "one-block": BehaviourConfig(kind="transformer", num_blocks=1, **SMALL),
}
# float32 sums of a few dozen terms around 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# Users whose events have gaps, fill the places from the left, are all there, one, and none.
MASK = np.array(
    [[1, 0, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=bool
)
USERS = len(MASK)

each_kind = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())
with_and_without_features = pytest.mark.parametrize("featured", [False, True], ids=["items", "features"])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


CANDIDATES, EVENTS, EVENT_FEATURES = normal(USERS, WIDTH), normal(USERS, 5, WIDTH), normal(USERS, 5, FEATURES)


def moved(config: BehaviourConfig, featured: bool = True, seed: int = 1) -> tf.keras.layers.Layer:
    """A layer with weights away from where they start: zeros would hide what they are multiplied with."""
    tf.keras.utils.set_random_seed(seed)
    layer = behaviour(config, WIDTH)
    layer(CANDIDATES, EVENTS, MASK, EVENT_FEATURES if featured else None)
    for variable in layer.weights:
        variable.assign_add(tf.random.normal(variable.shape, stddev=0.3))
    return layer


def _dense(x: np.ndarray, layer: tf.keras.layers.Dense) -> np.ndarray:
    return x @ layer.kernel.numpy() + (layer.bias.numpy() if layer.use_bias else 0.0)


def _softmax(logits: list[float]) -> np.ndarray:
    exp = np.exp(np.array(logits) - max(logits))
    return exp / exp.sum()


def _normalised(x: np.ndarray, norm: tf.keras.layers.LayerNormalization) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + 1e-6) * norm.gamma.numpy() + norm.beta.numpy()


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def attention_oracle(
    layer: TargetAttention, candidate: np.ndarray, events: list[np.ndarray], features: list[np.ndarray] | None
) -> np.ndarray:
    """One candidate and the events that count, one by one."""
    if not events:
        return np.zeros(WIDTH)
    scores = []
    for place, event in enumerate(events):
        inputs = np.concatenate([event, candidate, event - candidate, event * candidate])
        hidden = inputs @ layer.kernel.numpy() + layer.bias.numpy()
        if features is not None:
            hidden = hidden + features[place] @ layer.feature_layer.kernel.numpy()
        hidden = np.maximum(hidden, 0.0)
        for further in layer.further_layers:
            hidden = np.maximum(_dense(hidden, further), 0.0)
        scores.append(_dense(hidden, layer.score)[0])
    weights = _softmax(scores) if layer.softmax else scores
    return sum(w * event for w, event in zip(weights, events, strict=True))


def transformer_oracle(
    layer: SessionTransformer,
    candidate: np.ndarray,
    events: list[np.ndarray],
    features: list[np.ndarray] | None,
) -> np.ndarray:
    """One candidate at the end of the events that count; token by token and head by head."""
    if not events:
        return np.zeros(WIDTH)
    places, size = layer.places.numpy(), WIDTH // 2
    states = [event + places[len(events) - place] for place, event in enumerate(events)]
    if features is not None:
        states = [s + f @ layer.feature_layer.kernel.numpy() for s, f in zip(states, features, strict=True)]
    states = [_normalised(s, layer.input_norm) for s in [*states, candidate + places[0]]]
    for block in layer.blocks:
        projected = [
            _dense(_normalised(state, block.attention_norm), block.projection).reshape(3, 2, size)
            for state in states
        ]
        after = []
        for place, (query, _, _) in enumerate(projected):
            seen = range(len(events)) if not layer.causal else range(place + 1)
            seen = range(len(states)) if place == len(events) else seen
            heads = []
            for head in range(2):
                weights = _softmax([query[head] @ projected[p][1][head] / math.sqrt(size) for p in seen])
                heads.append(sum(w * projected[p][2][head] for w, p in zip(weights, seen, strict=True)))
            middle = states[place] + _dense(np.concatenate(heads), block.merge)
            inner, outer = block.network.layers
            hidden = _normalised(middle, block.network_norm)
            hidden = _gelu(hidden @ inner.kernel.numpy() + inner.bias.numpy())
            after.append(middle + _dense(hidden, outer))
        states = after
    return _normalised(states[-1], layer.output_norm)


def mean_oracle(
    layer: MeanBehaviour, candidate: np.ndarray, events: list[np.ndarray], features: list[np.ndarray] | None
) -> np.ndarray:
    return sum(events) / len(events) if events else np.zeros(WIDTH)


ORACLES = {"mean": mean_oracle, "din": attention_oracle, "transformer": transformer_oracle}


@each_kind
@with_and_without_features
def test_layer_against_a_slow_version(config: BehaviourConfig, featured: bool) -> None:
    layer = moved(config, featured)
    found = layer(CANDIDATES, EVENTS, MASK, EVENT_FEATURES if featured else None).numpy()
    for user in range(USERS):
        features = list(EVENT_FEATURES[user][MASK[user]]) if featured else None
        expected = ORACLES[config.kind](layer, CANDIDATES[user], list(EVENTS[user][MASK[user]]), features)
        np.testing.assert_allclose(found[user], expected, **CLOSE)


@each_kind
@with_and_without_features
def test_many_candidates_of_a_user_are_judged_as_one_by_one(config: BehaviourConfig, featured: bool) -> None:
    layer, candidates = moved(config, featured), normal(USERS, 4, WIDTH)
    features = EVENT_FEATURES if featured else None
    together = layer.match(candidates, EVENTS, MASK, features)
    assert together.shape == (USERS, 4 if layer.reads_candidates else 1, WIDTH)
    together = np.broadcast_to(together, [USERS, 4, WIDTH])
    repeated = layer(
        candidates.reshape(-1, WIDTH),
        np.repeat(EVENTS, 4, axis=0),
        np.repeat(MASK, 4, axis=0),
        np.repeat(features, 4, axis=0) if features is not None else None,
    )
    np.testing.assert_allclose(np.reshape(together, [-1, WIDTH]), repeated, rtol=1e-6, atol=1e-6)


def test_target_attention_by_hand() -> None:
    layer = TargetAttention(BehaviourConfig(kind="din", attention_layers=(2,)), width=1)
    candidate, mask = tf.constant([[2.0]]), tf.constant([[True, True, False]])
    events = tf.constant([[[3.0], [-1.0], [100.0]]])
    layer(candidate, events, mask)
    # Hidden: the product h c, and the difference h - c, where they are positive.
    layer.kernel.assign([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    layer.score.kernel.assign([[0.5], [10.0]])
    # h = 3: 0.5 · 6 + 10 · 1 + 1 = 14; h = -1: neither is positive, which leaves the bias of 1.
    np.testing.assert_allclose(layer(candidate, events, mask), [[14 * 3 - 1]], rtol=1e-6)


def test_target_attention_starts_close_to_the_sum_and_with_softmax_to_the_mean() -> None:
    # As small as embeddings are at the start.
    candidates, events = 0.05 * CANDIDATES, 0.05 * EVENTS
    for name, scale in (("din", MASK.sum(axis=1, keepdims=True)), ("din-softmax", 1)):
        tf.keras.utils.set_random_seed(1)
        found = behaviour(ALL[name], WIDTH)(candidates, events, MASK)
        mean = MeanBehaviour(ALL["mean"])(candidates, events, MASK) * scale
        np.testing.assert_allclose(found, mean, atol=0.05 * np.abs(mean).max())


def test_weights_of_a_softmax_sum_to_one() -> None:
    same = np.tile(EVENTS[:, :1], (1, 5, 1))
    found = moved(ALL["din-softmax"])(CANDIDATES, same, MASK, EVENT_FEATURES)
    np.testing.assert_allclose(found[:4], same[:4, 0], **CLOSE)


@each_kind
def test_what_stands_at_masked_places_does_not_matter(config: BehaviourConfig) -> None:
    layer = moved(config)
    before = layer(CANDIDATES, EVENTS, MASK, EVENT_FEATURES)
    noise = np.where(MASK, 0.0, 1e4).astype(np.float32)[..., np.newaxis]
    after = layer(CANDIDATES, EVENTS + noise, MASK, EVENT_FEATURES - noise)
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)


@each_kind
def test_users_without_events_get_zeros_and_finite_gradients(config: BehaviourConfig) -> None:
    layer = moved(config)
    inputs = [tf.Variable(CANDIDATES), tf.Variable(EVENTS), tf.Variable(EVENT_FEATURES)]
    nothing = np.zeros_like(MASK)
    with tf.GradientTape() as tape:
        found = layer(inputs[0], inputs[1], nothing, inputs[2])
        loss = tf.reduce_sum(found)
    np.testing.assert_array_equal(found, np.zeros((USERS, WIDTH)))
    gradients = tape.gradient(loss, layer.trainable_variables + inputs, unconnected_gradients="zero")
    for gradient in gradients:
        gradient = tf.convert_to_tensor(gradient)
        np.testing.assert_array_equal(gradient, tf.zeros_like(gradient))


@each_kind
def test_empty_batches_candidate_lists_and_histories_of_no_places(config: BehaviourConfig) -> None:
    layer = moved(config)
    assert layer(CANDIDATES[:0], EVENTS[:0], MASK[:0], EVENT_FEATURES[:0]).shape == (0, WIDTH)
    no_candidates = layer.match(np.zeros((USERS, 0, WIDTH), np.float32), EVENTS, MASK, EVENT_FEATURES)
    assert no_candidates.shape == (USERS, 0 if layer.reads_candidates else 1, WIDTH)
    for_no_places = layer(CANDIDATES, EVENTS[:, :0], MASK[:, :0], EVENT_FEATURES[:, :0])
    np.testing.assert_array_equal(for_no_places, np.zeros((USERS, WIDTH)))


@each_kind
@pytest.mark.parametrize("length_is_known", [True, False])
def test_only_the_latest_events_are_read_wherever_they_stand(
    config: BehaviourConfig, length_is_known: bool
) -> None:
    layer, rng = moved(config), np.random.default_rng(3)
    events, features = normal(USERS, 12, WIDTH, seed=4), normal(USERS, 12, FEATURES, seed=4)
    mask = np.zeros((USERS, 12), bool)
    latest = np.zeros((USERS, MAX_EVENTS), int)
    for user in range(USERS):
        places = np.sort(rng.permutation(12)[: MAX_EVENTS + user])
        mask[user, places] = True
        latest[user] = places[-MAX_EVENTS:]
    length = 12 if length_is_known else None
    traced = tf.function(
        layer.match,
        input_signature=[
            tf.TensorSpec([None, None, WIDTH]),
            tf.TensorSpec([None, length, WIDTH]),
            tf.TensorSpec([None, length], tf.bool),
            tf.TensorSpec([None, length, FEATURES]),
        ],
        autograph=False,
    )
    assert traced.get_concrete_function().structured_outputs.shape[-1] == WIDTH
    found = traced(CANDIDATES[:, np.newaxis], events, mask, features)[:, 0]
    expected = layer(
        CANDIDATES,
        np.take_along_axis(events, latest[..., np.newaxis], axis=1),
        np.ones_like(latest, bool),
        np.take_along_axis(features, latest[..., np.newaxis], axis=1),
    )
    np.testing.assert_allclose(found, expected, **CLOSE)
    # Shorter histories than max_events go through the same function.
    short = traced(CANDIDATES[:, np.newaxis], events[:, :12], mask & (np.arange(12) < 3), features)
    assert np.isfinite(short).all()


@each_kind
def test_gradients_reach_every_weight(config: BehaviourConfig) -> None:
    layer = moved(config)
    candidates, events = tf.Variable(normal(60, WIDTH)), tf.Variable(normal(60, 5, WIDTH))
    features, mask = tf.Variable(normal(60, 5, FEATURES)), np.tile(MASK, (12, 1))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.sin(layer(candidates, events, mask, features)))
    assert len(layer.trainable_variables) == len(layer.weights)
    targets = [*layer.trainable_variables, events, *([] if config.kind == "mean" else [candidates, features])]
    gradients = tape.gradient(loss, targets)
    for variable, gradient in zip(targets, gradients, strict=True):
        # Far above rounding, which is all that a weight without effect gets.
        assert np.abs(tf.convert_to_tensor(gradient)).max() > 1e-4, variable.name


def test_only_the_mean_is_the_same_for_every_candidate() -> None:
    for name, config in ALL.items():
        found = moved(config).match(normal(USERS, 3, WIDTH), EVENTS, MASK, EVENT_FEATURES).numpy()
        spread = np.abs(found[:4] - found[:4, :1]).max()
        assert (spread == 0) == (name == "mean")


def test_only_the_transformer_reads_the_order_of_the_events() -> None:
    mask = np.ones_like(MASK)
    for config in ALL.values():
        layer = moved(config)
        backwards = layer(CANDIDATES, EVENTS[:, ::-1], mask, EVENT_FEATURES[:, ::-1])
        change = np.abs(backwards - layer(CANDIDATES, EVENTS, mask, EVENT_FEATURES)).max()
        assert (change > 0.01) == (config.kind == "transformer")


@pytest.mark.parametrize(("name", "is_causal"), [("causal", True), ("bidirectional", False)])
def test_an_event_sees_later_ones_only_without_causality(name: str, is_causal: bool) -> None:
    layer = moved(ALL[name])
    seen: list[np.ndarray] = []
    block = layer.blocks[0]
    run = block.call

    def spy(*args: object, **kwargs: object) -> tuple[tf.Tensor, tf.Tensor]:
        candidates, events = run(*args, **kwargs)
        seen.append(events.numpy())
        return candidates, events

    block.call = spy
    changed = EVENTS.copy()
    changed[:, 3:] += 3.0
    for events in (EVENTS, changed):
        layer(CANDIDATES, events, np.ones_like(MASK), EVENT_FEATURES)
    same = np.abs(seen[0][:, :3] - seen[1][:, :3]).max() == 0
    assert same == is_causal


@each_kind
def test_dropout_acts_in_training_only(config: BehaviourConfig) -> None:
    layer, inputs = moved(config), (CANDIDATES, EVENTS, MASK, EVENT_FEATURES)
    np.testing.assert_array_equal(layer(*inputs), layer(*inputs, training=False))
    change = np.abs(layer(*inputs, training=True) - layer(*inputs)).max()
    assert (change > 0.01) == (config.kind == "transformer")


@each_kind
def test_weights_survive_save_and_restore(config: BehaviourConfig, tmp_path: Path) -> None:
    layer, other, inputs = moved(config), moved(config, seed=2), (CANDIDATES, EVENTS, MASK, EVENT_FEATURES)
    path = tf.train.Checkpoint(layer=layer).write(str(tmp_path / "layer"))
    tf.train.Checkpoint(layer=other).read(path).assert_consumed()
    np.testing.assert_array_equal(other(*inputs), layer(*inputs))


def test_the_settings_name_the_layer() -> None:
    kinds = {"mean": MeanBehaviour, "din": TargetAttention, "transformer": SessionTransformer}
    for config in ALL.values():
        assert type(behaviour(config, WIDTH)) is kinds[config.kind]


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_heads is 2.* are 7 wide"):
        behaviour(ALL["causal"], 7)


def test_attention_without_layers_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="attention_layers"):
        BehaviourConfig(kind="din", attention_layers=())
