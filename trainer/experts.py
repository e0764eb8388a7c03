"""The body of the ranker: what all tasks share, and what each has of its own.

Every body is called as `body(inputs, training)` with float32 [B, D] and returns task name -> float32 [B, W].

Letters: B = rows, D = width of the inputs, W = width of the outputs, T = tasks, E = experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from schema.errors import ConfigError
from trainer.body_config import ExpertsConfig


class _Networks(tf.keras.layers.Layer):
    """Networks of the same shape side by side, each with weights of its own, as batched matrix products."""

    def __init__(self, count: int, widths: Sequence[int], dropout_fraction: float) -> None:
        super().__init__()
        self.count = count
        self.widths = tuple(widths)
        self.dropout = tf.keras.layers.Dropout(dropout_fraction)

    def build(self, input_shape: tf.TensorShape) -> None:
        num_inputs = input_shape[-1]
        self.kernels, self.biases = [], []
        for place, width in enumerate(self.widths):
            # Glorot and Bengio 2010, for each network; Keras would count the networks as inputs.
            limit = math.sqrt(6.0 / (num_inputs + width))
            uniform = tf.keras.initializers.RandomUniform(-limit, limit)
            self.kernels.append(
                self.add_weight(f"kernel_{place}", [self.count, num_inputs, width], initializer=uniform)
            )
            self.biases.append(self.add_weight(f"bias_{place}", [self.count, 1, width], initializer="zeros"))
            num_inputs = width
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """[count, B, D], or [1, B, D] for all, to [count, B, W]; to the inputs where there are no layers.

        Dropout comes before each layer; where all networks read the same inputs, they miss the same ones.
        """
        hidden = inputs
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            hidden = tf.nn.relu(tf.matmul(self.dropout(hidden, training=training), kernel) + bias)
        return hidden


class _Gates(tf.keras.layers.Layer):
    """Softmax gates (Ma et al., KDD 2018, equation 8): each gives all experts of a row a share of 1.

    They start equal, so that all experts learn from the first step on.
    """

    def __init__(self, count: int, num_experts: int, dropout_fraction: float) -> None:
        super().__init__()
        self.count = count
        self.num_experts = num_experts
        self.dropout_fraction = dropout_fraction

    def build(self, input_shape: tf.TensorShape) -> None:
        self.kernel = self.add_weight(
            "kernel", [self.count, input_shape[-1], self.num_experts], initializer="zeros"
        )
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """[count, B, D], or [1, B, D] for all, to [count, B, E]."""
        logits = tf.matmul(inputs, self.kernel)
        if training and self.dropout_fraction:
            # As in Zhao et al., RecSys 2019. A gate that loses all of its experts weighs them equally.
            keep = tf.random.uniform(tf.shape(logits)) >= self.dropout_fraction
            logits = tf.where(keep, logits, -1e9)
        return tf.nn.softmax(logits)


def _mix(weights: tf.Tensor, experts: tf.Tensor) -> tf.Tensor:
    """Sums experts [E, B, W] weighted by gates [T, B, E]: [T, B, W]."""
    # Row by row: an einsum over these axes takes twice as long.
    by_row = tf.matmul(tf.transpose(weights, [1, 0, 2]), tf.transpose(experts, [1, 0, 2]))
    return tf.transpose(by_row, [1, 0, 2])


class _Body(tf.keras.layers.Layer):
    """Networks of the tasks' own on top of what they share."""

    def __init__(self, config: ExpertsConfig, tasks: Sequence[str], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.tasks = tuple(tasks)
        self.task_networks = _Networks(len(self.tasks), config.task_layers, config.dropout_fraction)

    def _by_task(self, vectors: tf.Tensor, training: bool) -> dict[str, tf.Tensor]:
        return dict(zip(self.tasks, tf.unstack(self.task_networks(vectors, training=training)), strict=True))


class SharedBottom(_Body):
    """One network for all tasks (Caruana, Machine Learning 1997)."""

    def __init__(self, config: ExpertsConfig, tasks: Sequence[str], **kwargs: object) -> None:
        """Makes the layer.

        Args:
          config: `hidden_layers`, `task_layers`, `dropout_fraction`.
          tasks: names.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(config, tasks, **kwargs)
        self.network = _Networks(1, config.hidden_layers, config.dropout_fraction)

    def call(self, inputs: tf.Tensor, training: bool = False) -> dict[str, tf.Tensor]:
        """Float32 [B, D] to task name -> float32 [B, W]; all the same without `task_layers`."""
        shared = self.network(inputs[tf.newaxis], training=training)
        return self._by_task(tf.repeat(shared, len(self.tasks), axis=0), training)


class MultiGate(_Body):
    """Multi-gate mixture of experts: f_k(x) = Σ_e softmax(x G_k)_e · expert_e(x) for task k.

    Source: Ma et al., KDD 2018, section 4.2.
    """

    def __init__(self, config: ExpertsConfig, tasks: Sequence[str], **kwargs: object) -> None:
        """Makes the layer.

        Args:
          config: `hidden_layers`, `task_layers`, `num_experts`, and the dropouts.
          tasks: names.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(config, tasks, **kwargs)
        self.experts = _Networks(config.num_experts, config.hidden_layers, config.dropout_fraction)
        self.gates = _Gates(len(self.tasks), config.num_experts, config.gate_dropout_fraction)

    def call(self, inputs: tf.Tensor, training: bool = False) -> dict[str, tf.Tensor]:
        """Float32 [B, D] to task name -> float32 [B, W]."""
        inputs = inputs[tf.newaxis]
        experts = self.experts(inputs, training=training)
        return self._by_task(_mix(self.gates(inputs, training=training), experts), training)

    def gate_weights(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        """Share of every expert in each row, as served.

        Experts have collapsed where a task gives one of them nearly all weight in all rows, or where all
        tasks give the same weights.

        Args:
          inputs: float32 [B, D], as in a call.

        Returns:
          Task name -> float32 [B, E]; rows sum to one.
        """
        return dict(zip(self.tasks, tf.unstack(self.gates(inputs[tf.newaxis])), strict=True))


class _Extraction(tf.keras.layers.Layer):
    """One level of extraction: customised gate control (Tang et al., RecSys 2020, section 4.1)."""

    def __init__(self, config: ExpertsConfig, num_tasks: int, is_last: bool) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.per_task = config.task_experts
        num_own, num_shared = num_tasks * config.task_experts, config.shared_experts
        self.task_experts = _Networks(num_own, config.hidden_layers, config.dropout_fraction)
        self.shared_experts = _Networks(num_shared, config.hidden_layers, config.dropout_fraction)
        fraction = config.gate_dropout_fraction
        self.gates = _Gates(num_tasks, config.task_experts + num_shared, fraction)
        # Nobody reads what the tasks share after the last level.
        self.shared_gate = None if is_last else _Gates(1, num_own + num_shared, fraction)

    def call(
        self, by_task: tf.Tensor, shared: tf.Tensor, training: bool = False
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """What the level before made for the tasks and for all of them, to what this one makes.

        Args:
          by_task: float32 [T, B, D]; [1, B, D] where it is the same for all tasks.
          shared: float32 [1, B, D].
          training: whether dropout acts.

        Returns:
          float32 [T, B, W] and float32 [1, B, W], None after the last level.
        """
        own_inputs = by_task if by_task.shape[0] == 1 else tf.repeat(by_task, self.per_task, axis=0)
        own = self.task_experts(own_inputs, training=training)
        common = self.shared_experts(shared, training=training)
        weights = self.gates(by_task, training=training)
        own_weights, common_weights = weights[..., : self.per_task], weights[..., self.per_task :]
        rows, width = tf.shape(own)[1], own.shape[-1]
        of_task = tf.reshape(own, [self.num_tasks, self.per_task, rows, width])
        mixed = tf.einsum("tbe,tebw->tbw", own_weights, of_task) + _mix(common_weights, common)
        if self.shared_gate is None:
            return mixed, None
        return mixed, _mix(self.shared_gate(shared, training=training), tf.concat([own, common], axis=0))


class ProgressiveExtraction(_Body):
    """Progressive layered extraction: levels of experts that belong to one task or to all.

    In each level a task's gate weighs its own experts and the shared ones; a shared gate weighs all, for the
    shared experts of the next level. In the last level, or with one level only, the experts of a task learn
    from its loss alone; in levels before, other tasks reach them through the shared gate.

    Source: Tang et al., RecSys 2020, section 4.2.
    """

    def __init__(self, config: ExpertsConfig, tasks: Sequence[str], **kwargs: object) -> None:
        """Makes the layer.

        Args:
          config: `hidden_layers`, `task_layers`, `task_experts`, `shared_experts`, `num_levels`, and the
            dropouts.
          tasks: names.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(config, tasks, **kwargs)
        last = config.num_levels - 1
        self.levels = [
            _Extraction(config, len(self.tasks), is_last=level == last) for level in range(config.num_levels)
        ]

    def call(self, inputs: tf.Tensor, training: bool = False) -> dict[str, tf.Tensor]:
        """Float32 [B, D] to task name -> float32 [B, W]."""
        by_task = shared = inputs[tf.newaxis]
        for level in self.levels:
            by_task, shared = level(by_task, shared, training=training)
        return self._by_task(by_task, training)

    def gate_weights(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        """As `MultiGate.gate_weights`, of the last level: the task's own experts, then the shared ones."""
        by_task = shared = inputs[tf.newaxis]
        for level in self.levels[:-1]:
            by_task, shared = level(by_task, shared)
        return dict(zip(self.tasks, tf.unstack(self.levels[-1].gates(by_task)), strict=True))


def experts(config: ExpertsConfig, tasks: Sequence[str]) -> tf.keras.layers.Layer:
    """The body that the settings name.

    Args:
      config: of the body.
      tasks: names, the keys of what the body returns.

    Raises:
      ConfigError: there is no task, or two have the same name.
    """
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(f"the body of the ranker needs tasks of different names, got {list(tasks)}")
    if config.kind == "shared_bottom":
        return SharedBottom(config, tasks)
    return MultiGate(config, tasks) if config.kind == "mmoe" else ProgressiveExtraction(config, tasks)
