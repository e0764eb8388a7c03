"""The bodies of the ranker against slow versions, and which loss reaches which expert."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydantic
import pytest
import tensorflow as tf

from schema.errors import ConfigError
from trainer.body_config import ExpertsConfig
from trainer.experts import MultiGate, ProgressiveExtraction, SharedBottom, experts

TASKS = ("click", "like", "watch")
WIDTH = 5
SMALL = {"hidden_layers": (6, 4), "dropout_fraction": 0.5, "num_experts": 3, "task_experts": 2}
BODIES = {
    "shared_bottom": ExpertsConfig(kind="shared_bottom", **SMALL),
    "mmoe": ExpertsConfig(kind="mmoe", **SMALL),
    "ple": ExpertsConfig(kind="ple", num_levels=3, **SMALL),
    "ple-one-level": ExpertsConfig(kind="ple", num_levels=1, **SMALL),
    "ple-one-expert": ExpertsConfig(kind="ple", **{**SMALL, "task_experts": 1, "shared_experts": 1}),
}
WITH_TASK_LAYERS = {
    name: ExpertsConfig(**{**config.model_dump(), "task_layers": (7, 3)}) for name, config in BODIES.items()
}
ALL = {**BODIES, **{f"{name}-task-layers": config for name, config in WITH_TASK_LAYERS.items()}}
# float32 sums of a few dozen terms around 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

each_body = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())


def rows(count: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def moved(config: ExpertsConfig) -> tf.keras.layers.Layer:
    """A body with weights away from where they start: gates of zeros would hide what they read."""
    tf.keras.utils.set_random_seed(1)
    body = experts(config, TASKS)
    body(rows())
    for variable in body.weights:
        variable.assign_add(tf.random.normal(variable.shape, stddev=0.5))
    return body


def moved_and_open(config: ExpertsConfig) -> tf.keras.layers.Layer:
    """As `moved`, but every rectifier lets something through, as no narrow random network promises."""
    body = moved(config)
    for variable in body.weights:
        variable.assign(tf.ones_like(variable) if "bias" in variable.name else 0.1 * variable)
    return body


def _network(networks: tf.keras.layers.Layer, number: int, x: np.ndarray) -> np.ndarray:
    for kernel, bias in zip(networks.kernels, networks.biases, strict=True):
        x = np.maximum(x @ kernel.numpy()[number] + bias.numpy()[number, 0], 0.0)
    return x


def _gate(gates: tf.keras.layers.Layer, number: int, x: np.ndarray) -> np.ndarray:
    exp = np.exp(x @ gates.kernel.numpy()[number])
    return exp / exp.sum()


def shared_bottom_oracle(body: SharedBottom, x: np.ndarray) -> list[np.ndarray]:
    return [_network(body.network, 0, x)] * len(TASKS)


def multi_gate_oracle(body: MultiGate, x: np.ndarray) -> list[np.ndarray]:
    return [
        sum(w * _network(body.experts, e, x) for e, w in enumerate(_gate(body.gates, task, x)))
        for task in range(len(TASKS))
    ]


def progressive_oracle(body: ProgressiveExtraction, x: np.ndarray) -> list[np.ndarray]:
    """One row, task by task and expert by expert."""
    of_task, shared = [x] * len(TASKS), x
    for level in body.levels:
        per_task = level.per_task
        own = [
            [_network(level.task_experts, task * per_task + e, of_task[task]) for e in range(per_task)]
            for task in range(len(TASKS))
        ]
        common = [_network(level.shared_experts, e, shared) for e in range(level.shared_experts.count)]
        after = []
        for task in range(len(TASKS)):
            weights = _gate(level.gates, task, of_task[task])
            after.append(sum(w * e for w, e in zip(weights, own[task] + common, strict=True)))
        if level is not body.levels[-1]:
            everyone = [expert for experts_of_one in own for expert in experts_of_one] + common
            weights = _gate(level.shared_gate, 0, shared)
            shared = sum(w * e for w, e in zip(weights, everyone, strict=True))
        of_task = after
    return of_task


@each_body
def test_body_against_a_slow_version(config: ExpertsConfig) -> None:
    body = moved(config)
    oracle: Callable[..., list[np.ndarray]] = {
        "shared_bottom": shared_bottom_oracle,
        "mmoe": multi_gate_oracle,
        "ple": progressive_oracle,
    }[config.kind]
    found = body(rows())
    assert tuple(found) == TASKS
    for row, x in enumerate(rows()):
        for number, (task, expected) in enumerate(zip(TASKS, oracle(body, x), strict=True)):
            expected = _network(body.task_networks, number, expected)
            np.testing.assert_allclose(found[task][row], expected, **CLOSE)


def test_multi_gate_by_hand() -> None:
    body = MultiGate(ExpertsConfig(kind="mmoe", hidden_layers=(1,), num_experts=2), ["click", "like"])
    body(tf.ones([1, 2]))
    # Expert 0 says the first input, expert 1 ten times the second.
    body.experts.kernels[0].assign([[[1.0], [0.0]], [[0.0], [10.0]]])
    # Gate of the likes: odds of 3 for expert 0 where the first input is 1, of 9 where it is 2.
    body.gates.kernel.assign([[[0.0, 0.0], [0.0, 0.0]], [[np.log(3.0), 0.0], [0.0, 0.0]]])
    found = body(tf.constant([[1.0, 2.0], [2.0, -1.0]]))
    np.testing.assert_allclose(found["click"], [[10.5], [1.0]], rtol=1e-6)
    np.testing.assert_allclose(found["like"], [[0.75 * 1 + 0.25 * 20], [0.9 * 2]], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in BODIES if name != "shared_bottom"])
def test_gates_sum_to_one_and_say_what_a_call_uses(name: str) -> None:
    body = moved(BODIES[name])
    weights = body.gate_weights(rows())
    assert tuple(weights) == TASKS
    for task in TASKS:
        assert weights[task].shape == (8, 3 if name == "mmoe" else 2 if name == "ple-one-expert" else 4)
        np.testing.assert_allclose(np.sum(weights[task], axis=1), 1.0, rtol=1e-6)
        assert np.min(weights[task]) > 0
    # Experts of the last level that all say the number of their place: the output is the mean place.
    if name == "mmoe":
        places = {task: np.arange(3.0) for task in TASKS}
        last = [(body.experts, np.arange(3.0))]
    else:
        level = body.levels[-1]
        own, common = np.arange(float(level.task_experts.count)), np.arange(level.shared_experts.count) + 50.0
        places = {
            task: np.concatenate([np.split(own, len(TASKS))[number], common])
            for number, task in enumerate(TASKS)
        }
        last = [(level.task_experts, own), (level.shared_experts, common)]
    for networks, values in last:
        networks.kernels[-1].assign(tf.zeros_like(networks.kernels[-1]))
        networks.biases[-1].assign(np.tile(values[:, np.newaxis, np.newaxis], (1, 1, 4)))
    found = body(rows())
    for task in TASKS:
        expected = weights[task].numpy() @ places[task]
        np.testing.assert_allclose(found[task], np.tile(expected[:, np.newaxis], (1, 4)), rtol=1e-5)


@pytest.mark.parametrize("kind", ["mmoe", "ple"])
def test_experts_start_with_equal_shares_and_different_weights(kind: str) -> None:
    tf.keras.utils.set_random_seed(3)
    body = experts(BODIES[kind], TASKS)
    body(rows())
    for weights in body.gate_weights(rows()).values():
        np.testing.assert_allclose(weights, 1.0 / weights.shape[1], rtol=1e-6)
    kernels = (body.experts if kind == "mmoe" else body.levels[0].task_experts).kernels
    for kernel in kernels:
        count, num_inputs, width = kernel.shape
        flat = np.reshape(kernel, [count, -1])
        assert len(np.unique(flat)) == flat.size
        # Uniform in the Glorot bound of one network, and not of all together.
        bound = np.sqrt(6 / (num_inputs + width))
        assert 0.8 * bound < np.abs(flat).max() <= bound


def test_experts_of_random_initial_weights_depend_on_the_seed_alone() -> None:
    def answer(seed: int) -> np.ndarray:
        tf.keras.utils.set_random_seed(seed)
        return experts(BODIES["ple"], TASKS)(rows())["like"].numpy()

    np.testing.assert_array_equal(answer(1), answer(1))
    assert np.abs(answer(1) - answer(2)).max() > 1e-3


@each_body
def test_gradients_reach_every_weight(config: ExpertsConfig) -> None:
    body = moved_and_open(config)
    with tf.GradientTape() as tape:
        loss = tf.add_n([tf.reduce_sum(tf.sin(vectors)) for vectors in body(rows()).values()])
    gradients = tape.gradient(loss, body.trainable_variables)
    assert len(body.trainable_variables) == len(body.weights)
    for variable, gradient in zip(body.trainable_variables, gradients, strict=True):
        # Every network and gate has its own slice.
        per_network = np.abs(gradient.numpy()).reshape(variable.shape[0], -1)
        assert (per_network.max(axis=1) > 0).all(), variable.name


def reached(body: ProgressiveExtraction, task: str) -> list[dict[str, np.ndarray]]:
    """Per level, which experts and gates of the tasks the loss of one task moves, by number."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.sin(body(rows())[task]))
    parts = [{"experts": level.task_experts.kernels[0], "gates": level.gates.kernel} for level in body.levels]
    gradients = tape.gradient(loss, parts)
    return [
        {name: np.abs(g.numpy()).max(axis=(1, 2)) > 0 for name, g in level.items()} for level in gradients
    ]


@pytest.mark.parametrize("number", range(len(TASKS)), ids=TASKS)
def test_loss_of_a_task_never_reaches_experts_of_another_in_the_last_level(number: int) -> None:
    own_gate = np.arange(len(TASKS)) == number
    for name in ("ple-one-level", "ple"):
        last = reached(moved_and_open(BODIES[name]), TASKS[number])[-1]
        np.testing.assert_array_equal(last["experts"], np.repeat(own_gate, 2))
        np.testing.assert_array_equal(last["gates"], own_gate)


def test_levels_before_the_last_share_experts_of_all_tasks_through_the_shared_gate_only() -> None:
    first, second, _ = reached(moved_and_open(BODIES["ple"]), "like")
    for level in (first, second):
        assert level["experts"].all()
    # A task's gate feeds its own experts of the next level, whose outputs the shared gate reads from level 2
    # on; the gates of the other tasks in level 2 feed nobody but their own last level.
    assert first["gates"].all()
    np.testing.assert_array_equal(second["gates"], [False, True, False])


def test_every_task_reaches_every_expert_of_a_mixture() -> None:
    body = moved_and_open(BODIES["mmoe"])
    for task in TASKS:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(body(rows())[task]))
        gradient = tape.gradient(loss, body.experts.kernels[0]).numpy()
        assert (np.abs(gradient).max(axis=(1, 2)) > 0).all()


@each_body
def test_rows_are_judged_alike_alone_and_among_others(config: ExpertsConfig) -> None:
    body = moved(config)
    together = body(rows())
    for row in range(8):
        alone = body(rows()[row : row + 1])
        for task in TASKS:
            np.testing.assert_allclose(alone[task][0], together[task][row], **CLOSE)


@each_body
def test_no_rows_give_no_rows(config: ExpertsConfig) -> None:
    width = (config.task_layers or config.hidden_layers)[-1]
    for vectors in moved(config)(tf.zeros([0, WIDTH])).values():
        assert vectors.shape == (0, width)


@each_body
def test_weights_survive_save_and_restore(config: ExpertsConfig, tmp_path: Path) -> None:
    body = moved(config)
    path = tf.train.Checkpoint(body=body).write(str(tmp_path / "body"))
    tf.keras.utils.set_random_seed(2)
    other = experts(config, TASKS)
    other(rows())
    assert np.abs(other(rows())["like"] - body(rows())["like"]).max() > 1e-3
    tf.train.Checkpoint(body=other).read(path).assert_consumed()
    for task, vectors in body(rows()).items():
        np.testing.assert_array_equal(other(rows())[task], vectors)


@each_body
def test_body_traced_with_an_unknown_number_of_rows_says_the_same(config: ExpertsConfig) -> None:
    body = moved(config)
    traced = tf.function(
        lambda x: body(x, training=False), input_signature=[tf.TensorSpec([None, WIDTH])], autograph=False
    )
    for task, vectors in traced(rows()).items():
        np.testing.assert_allclose(vectors, body(rows())[task], **CLOSE)
        assert traced.get_concrete_function().structured_outputs[task].shape[1] == vectors.shape[1]


@each_body
def test_dropout_acts_in_training_only(config: ExpertsConfig) -> None:
    body = moved(config)
    first = body(rows())
    for task, vectors in body(rows(), training=False).items():
        np.testing.assert_array_equal(vectors, first[task])
    assert any(
        np.abs(vectors - first[task]).max() > 0.01 for task, vectors in body(rows(), training=True).items()
    )


def test_gate_dropout_renormalises_over_the_experts_that_are_left() -> None:
    config = ExpertsConfig(kind="mmoe", gate_dropout_fraction=0.5, **SMALL)
    gates = moved(config).gates
    inputs = tf.constant(rows(2000))[tf.newaxis]
    full, dropped = gates(inputs).numpy(), gates(inputs, training=True).numpy()
    np.testing.assert_allclose(dropped.sum(axis=-1), 1.0, rtol=1e-5)
    left = dropped > 0
    # 6000 gates over 3 experts: 1/8 lose all and are equal, so that 1/2 + 1/8 are kept; 4 standard errors.
    assert left.mean() == pytest.approx(0.625, abs=0.02)
    some = ~left.all(axis=-1)
    expected = np.where(left, full, 0.0)
    expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(dropped[some], expected[some], rtol=1e-4)
    np.testing.assert_array_equal(gates(inputs).numpy(), full)


def test_shared_bottom_without_layers_hands_its_inputs_on() -> None:
    body = experts(ExpertsConfig(hidden_layers=()), TASKS)
    for vectors in body(rows()).values():
        np.testing.assert_array_equal(vectors, rows())


def test_shared_bottom_has_the_weights_of_its_dense_layers() -> None:
    body = moved(BODIES["shared_bottom"])
    assert sum(variable.shape.num_elements() for variable in body.weights) == 5 * 6 + 6 + 6 * 4 + 4


@pytest.mark.parametrize("name", BODIES)
def test_the_settings_name_the_body(name: str) -> None:
    kinds = {"shared_bottom": SharedBottom, "mmoe": MultiGate, "ple": ProgressiveExtraction}
    assert type(experts(BODIES[name], TASKS)) is kinds[BODIES[name].kind]


@pytest.mark.parametrize("tasks", [(), ("click", "click")], ids=["none", "twice"])
def test_tasks_without_distinct_names_are_refused(tasks: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"tasks of different names, got \["):
        experts(BODIES["mmoe"], tasks)


def test_experts_without_layers_are_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="hidden_layers is empty"):
        ExpertsConfig(kind="mmoe", hidden_layers=())
