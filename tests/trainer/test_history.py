"""What the history layers read of a list of events: against slow NumPy versions, and what must not matter."""

import math

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import ConfigError
from trainer.config import HistoryConfig
from trainer.history import (
    AttentionHistory,
    CausalTransformer,
    MeanHistory,
    TransformerHistory,
    history_layer,
)

WIDTH = 8
SMALL = {"max_events": 4, "attention_width": 5, "num_blocks": 2, "num_heads": 2, "dropout_fraction": 0.5}
TRANSFORMER = HistoryConfig(encoder="transformer", **SMALL)
ATTENTION = HistoryConfig(encoder="attention", **SMALL)
ALL = {
    "mean": HistoryConfig(encoder="mean", **SMALL),
    "attention": ATTENTION,
    "transformer": TRANSFORMER,
    "interests": HistoryConfig(interests=3, **SMALL),
}
# float32 sums of a few dozen terms around 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def events(length: int, users: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(users, length, WIDTH)).astype(np.float32)


def moved(layer: tf.keras.layers.Layer, *inputs: np.ndarray) -> tf.keras.layers.Layer:
    """The layer with weights away from where they start: zeros would hide what they are multiplied with."""
    tf.keras.utils.set_random_seed(1)
    layer(*inputs)
    for variable in layer.weights:
        variable.assign_add(tf.random.normal(variable.shape, stddev=0.4))
    return layer


def transformer(config: HistoryConfig = TRANSFORMER) -> CausalTransformer:
    times = np.arange(5, dtype=np.int64)[np.newaxis]
    layer: CausalTransformer = moved(
        CausalTransformer(config, WIDTH, has_times=True), events(5, users=1), times
    )
    return layer


def _normalised(x: np.ndarray, norm: tf.keras.layers.LayerNormalization) -> np.ndarray:
    scaled = (x - x.mean()) / math.sqrt(x.var() + 1e-6)
    return scaled * norm.gamma.numpy() + norm.beta.numpy()


def _dense(x: np.ndarray, layer: tf.keras.layers.Dense) -> np.ndarray:
    return x @ layer.kernel.numpy() + (layer.bias.numpy() if layer.use_bias else 0.0)


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def _softmax(logits: list[float]) -> np.ndarray:
    exp = np.exp(np.array(logits) - max(logits))
    return exp / exp.sum()


def transformer_oracle(
    layer: CausalTransformer, sequence: np.ndarray, times_s: np.ndarray | None
) -> np.ndarray:
    """One user's states, event by event and head by head; every event sees itself and those before it."""
    head_width = WIDTH // TRANSFORMER.num_heads
    states = [event * math.sqrt(WIDTH) for event in sequence]
    for block in layer.blocks:
        by_distance = block.by_distance.numpy()
        projected = [
            _dense(_normalised(state, block.attention_norm), block.projection).reshape(3, -1, head_width)
            for state in states
        ]
        after = []
        for now, (query, _, _) in enumerate(projected):
            heads = []
            for head in range(TRANSFORMER.num_heads):
                logits = []
                for then in range(now + 1):
                    logit = query[head] @ projected[then][1][head] / math.sqrt(head_width)
                    logit += by_distance[min(now - then, SMALL["max_events"] - 1), head]
                    if times_s is not None:
                        e_folds = math.log(1 + times_s[now] - times_s[then])
                        logit += block.by_time.numpy()[min(int(3 * e_folds), 63), head]
                    logits.append(logit)
                weights = _softmax(logits)
                heads.append(sum(w * projected[then][2][head] for then, w in enumerate(weights)))
            middle = states[now] + _dense(np.concatenate(heads), block.merge)
            first, second = block.network.layers
            hidden = _normalised(middle, block.network_norm)
            inner = _gelu(hidden @ first.kernel.numpy() + first.bias.numpy())
            after.append(middle + _dense(inner, second))
        states = after
    return np.array([_normalised(state, layer.norm) for state in states])


@pytest.mark.parametrize(
    "times", [None, [0, 0, 7, 3_600, 3_605, 10**9, 10**9 + 86_400]], ids=["order", "time"]
)
def test_transformer_states_against_a_slow_version(times: list[int] | None) -> None:
    # Seven events, of which the first and the last are further apart than max_events.
    layer, sequence = transformer(), events(7)
    times_s = None if times is None else np.tile(np.array(times, np.int64), (3, 1))
    states = layer(sequence, times_s).numpy()
    for user in range(3):
        expected = transformer_oracle(layer, sequence[user], None if times_s is None else times_s[user])
        np.testing.assert_allclose(states[user], expected, **CLOSE)


def test_a_later_event_never_changes_an_earlier_state() -> None:
    layer, sequence = transformer(), events(6)
    times = np.cumsum(np.full((3, 6), 100, np.int64), axis=1)
    before = layer(sequence, times).numpy()
    changed, changed_times = sequence.copy(), times.copy()
    changed[:, 3:] += 10.0
    changed_times[:, 3:] += 10**7
    after = layer(changed, changed_times).numpy()
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert (np.abs(after[:, 3:] - before[:, 3:]).max(axis=2) > 1e-3).all()


def test_padding_on_the_right_changes_no_state() -> None:
    layer, sequence = transformer(), events(4)
    padded = np.concatenate([sequence, np.full((3, 5, WIDTH), 1e6, np.float32)], axis=1)
    np.testing.assert_allclose(layer(padded)[:, :4], layer(sequence), **CLOSE)


def test_only_distances_in_time_count() -> None:
    layer, sequence = transformer(), events(4)
    times = np.tile(np.array([0, 10, 20, 5_000], np.int64), (3, 1))
    np.testing.assert_allclose(layer(sequence, times + 10**9), layer(sequence, times), **CLOSE)
    assert np.abs(layer(sequence, times * 100) - layer(sequence, times)).max() > 1e-3


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    config = TRANSFORMER.model_copy(update={"num_heads": 3})
    with pytest.raises(ConfigError, match=r"num_heads is 3, but the embeddings of items are 8 wide"):
        history_layer(config, WIDTH)


@pytest.mark.parametrize("name", ALL)
def test_nothing_watched_is_zeros(name: str) -> None:
    mask = np.zeros((3, 5), bool)
    layer = moved(history_layer(ALL[name], WIDTH), events(5), ~mask)
    shape = (3, 3, WIDTH) if name == "interests" else (3, WIDTH)
    np.testing.assert_array_equal(layer(events(5), mask), np.zeros(shape))
    # A batch in which nobody has a history.
    np.testing.assert_array_equal(layer(events(0), np.zeros((3, 0), bool)), np.zeros(shape))


@pytest.mark.parametrize("name", ALL)
def test_gaps_and_padding_do_not_matter(name: str) -> None:
    sequence = events(4)
    layer = moved(history_layer(ALL[name], WIDTH), sequence, np.ones((3, 4), bool))
    expected = layer(sequence, np.ones((3, 4), bool))
    spread, mask = np.full((3, 9, WIDTH), 7.0, np.float32), np.zeros((3, 9), bool)
    for user, places in enumerate([[0, 1, 2, 3], [5, 6, 7, 8], [0, 3, 4, 7]]):
        spread[user, places], mask[user, places] = sequence[user], True
    np.testing.assert_allclose(layer(spread, mask), expected, **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_a_history_longer_than_max_events_is_read(name: str) -> None:
    sequence, mask = events(20), np.ones((3, 20), bool)
    layer = moved(history_layer(ALL[name], WIDTH), sequence, mask)
    assert np.isfinite(layer(sequence, mask)).all()
    changed = sequence.copy()
    changed[:, 0] += 5.0
    assert np.abs(layer(changed, mask) - layer(sequence, mask)).max() > 1e-4  # also its first event


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mean", MeanHistory),
        ("attention", AttentionHistory),
        ("transformer", TransformerHistory),
        ("interests", AttentionHistory),
    ],
)
def test_the_settings_name_the_layer(name: str, kind: type) -> None:
    assert type(history_layer(ALL[name], WIDTH)) is kind


def test_mean_by_hand() -> None:
    vectors = np.array([[[1.0, 2.0], [100.0, 100.0], [3.0, 6.0]]], np.float32)
    mean = MeanHistory()(vectors, np.array([[True, False, True]]))
    np.testing.assert_array_equal(mean, [[2.0, 4.0]])


def test_attention_starts_as_the_mean() -> None:
    sequence, mask = events(6), np.random.default_rng(2).random((3, 6)) < 0.7
    np.testing.assert_allclose(
        AttentionHistory(ATTENTION)(sequence, mask), MeanHistory()(sequence, mask), **CLOSE
    )


@pytest.mark.parametrize("num_heads", [1, 3])
def test_attention_against_a_slow_version(num_heads: int) -> None:
    sequence, mask = events(7), np.array([[1] * 7, [1, 0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1, 1]], bool)
    layer = moved(AttentionHistory(ATTENTION, num_heads), sequence, mask)
    recency = layer.recency.numpy()
    expected = np.zeros((3, num_heads, WIDTH))
    for user in range(3):
        watched = np.flatnonzero(mask[user])
        for head in range(num_heads):
            logits = []
            for rank, place in enumerate(watched):
                hidden = np.tanh(_dense(sequence[user, place], layer.hidden))
                # Events ago: only those that count; beyond max_events all are alike.
                events_ago = min(len(watched) - 1 - rank, SMALL["max_events"] - 1)
                logits.append(_dense(hidden, layer.score)[head] + recency[events_ago, head])
            weights = _softmax(logits)
            expected[user, head] = sum(
                w * sequence[user, place] for w, place in zip(weights, watched, strict=True)
            )
    pooled = layer(sequence, mask)
    assert pooled.shape == ((3, WIDTH) if num_heads == 1 else (3, num_heads, WIDTH))
    np.testing.assert_allclose(pooled, expected[:, 0] if num_heads == 1 else expected, **CLOSE)


def test_several_interests_differ_from_the_start() -> None:
    tf.keras.utils.set_random_seed(0)
    pooled = history_layer(ALL["interests"], WIDTH)(events(6), np.ones((3, 6), bool)).numpy()
    assert np.abs(pooled[:, 0] - pooled[:, 1]).max() > 0.01
    assert np.abs(pooled[:, 1] - pooled[:, 2]).max() > 0.01


@pytest.mark.parametrize("gate", ["mean", "latest", "open"])
def test_the_gate_goes_from_the_mean_to_the_latest_state(gate: str) -> None:
    sequence, mask = events(5), np.array([[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]], bool)
    layer = moved(TransformerHistory(TRANSFORMER, WIDTH), sequence, mask)
    layer.gate.kernel.assign(tf.zeros_like(layer.gate.kernel))
    layer.gate.bias.assign(tf.fill([WIDTH], {"mean": -50.0, "latest": 50.0, "open": 0.0}[gate]))
    mean = MeanHistory()(sequence, mask).numpy()
    latest = np.stack(
        [transformer_oracle(layer.transformer, sequence[u][mask[u]], None)[-1] for u in range(3)]
    )
    expected = {"mean": mean, "latest": latest, "open": (mean + latest) / 2}[gate]
    np.testing.assert_allclose(layer(sequence, mask), expected, **CLOSE)


def test_the_order_of_events_matters_to_the_transformer_alone() -> None:
    sequence, mask = events(4), np.ones((3, 4), bool)
    for name in ("mean", "transformer"):
        layer = moved(history_layer(ALL[name], WIDTH), sequence, mask)
        moves = np.abs(layer(sequence[:, ::-1], mask) - layer(sequence, mask)).max()
        assert (moves > 0.01) == (name == "transformer")


def test_dropout_acts_in_training_only() -> None:
    sequence, mask = events(4), np.ones((3, 4), bool)
    layer = moved(TransformerHistory(TRANSFORMER, WIDTH), sequence, mask)
    np.testing.assert_array_equal(layer(sequence, mask), layer(sequence, mask))
    assert np.abs(layer(sequence, mask, training=True) - layer(sequence, mask)).max() > 0.01


@pytest.mark.parametrize("name", ["attention", "transformer", "interests"])
def test_every_weight_is_trained(name: str) -> None:
    layer = moved(history_layer(ALL[name], WIDTH), events(4), np.ones([3, 4], bool))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(events(4), np.ones([3, 4], bool)) ** 2)
    weights = layer.trainable_weights
    gradients = tape.gradient(loss, weights)
    assert weights and not [w.name for w, g in zip(weights, gradients, strict=True) if g is None]
