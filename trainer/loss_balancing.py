"""How the losses of the tasks are summed into the one that is minimised.

The declared loss weights λ say what each task is worth. Summed as they are, they also have to make up for the
scales of the losses and for how hard each task pulls at the shared layers; the two other methods measure that
while training, so that λ is left to say what it says. Predictions are not concerned: this is for training.

Letters: T = tasks with a loss weight above 0, B = rows, D = width of a representation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tensorflow as tf

from schema.errors import ConfigError
from trainer.balancing_config import BalancingConfig

# Adam moves a variable by about its learning rate per step, whatever the gradient, and the ranker's is small.
# A log variance is this many times its variable, so that it gets where it belongs in that much less time.
_LOG_VARIANCE_SPEED = 10.0
# Range of a log variance: a loss near 0 must not get an unbounded weight.
_MAX_LOG_VARIANCE = 8.0
# Steps whose mean loss counts as that of the untrained model.
_INITIAL_STEPS = 10.0


class LossBalancer(tf.keras.layers.Layer):
    """Weighs the task losses of each training step.

    Usage, in training only:

        representation = balancer.probe(task, representation)   # what the task's head reads, per task
        loss = balancer.total(losses_by_task)
    """

    def __init__(
        self, loss_weights: Mapping[str, float], config: BalancingConfig, name: str = "balancer"
    ) -> None:
        """Makes the variables of the method.

        Args:
          loss_weights: declared weight of each task, at least 0; one of weight 0 is left out of everything.
          config: the method.
          name: of the layer.

        Raises:
          ConfigError: no task has a weight above 0.
        """
        super().__init__(name=name)
        self.tasks = tuple(task for task, weight in loss_weights.items() if weight > 0)
        if not self.tasks:
            raise ConfigError(
                f"every loss_weight of the tasks {', '.join(loss_weights) or '(none)'} is 0; "
                "expected one above 0: nothing would be learnt"
            )
        self.config = config
        self._declared = tf.constant([loss_weights[task] for task in self.tasks], tf.float32)
        if config.method == "uncertainty":
            self._log_variance = self._vector("log_variance", trainable=True)
        elif config.method == "gradnorm":
            self._applied = self._vector("applied_weight")
            self._norm, self._norm_count = self._vector("gradient_norm"), self._vector("norm_count")
            self._mean_loss, self._loss_count = self._vector("mean_loss"), self._vector("loss_count")
            self._initial_loss = self._vector("initial_loss")

    def probe(self, task: str, representation: tf.Tensor) -> tf.Tensor:
        """Notes, while gradients run back, how hard the task's loss pulls at what its head reads.

        GradNorm compares the gradients of the weighted losses at the last shared layer, which takes one more
        backward pass per task. The gradient at the input of each head passes by anyway, and what the shared
        layers get is that, times what is the same for all tasks in a shared bottom; the same stand-in serves
        Sener and Koltun (NeurIPS 2018, section 3.3).

        Args:
          task: name.
          representation: float32 [B, D], input of the task's head.

        Returns:
          The same values.
        """
        if self.config.method != "gradnorm" or task not in self.tasks:
            return representation
        index = self.tasks.index(task)

        @tf.custom_gradient
        def identity(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                norm = tf.norm(upstream) / self._applied[index]
                _average(self._norm, self._norm_count, index, norm, self.config.memory_steps)
                return upstream

            return tf.identity(x), gradient

        return identity(representation)

    def total(self, losses: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """The loss to minimise.

        fixed: Σ λ L.

        uncertainty: Σ λ (e^-s L + s / 2), where s, the log of the task's variance, is learnt along. At rest
        e^-s = 1 / (2 L): a task that stays hard is turned down. In the paper's loss (its equation 10,
        likewise e^-s L + s / 2 for a log likelihood) λ has no place; inside the brackets s would undo it.

        gradnorm: Σ w L with w ∝ λ r^α / g and Σ w = Σ λ. g is the norm of the gradient of L where `probe`
        stands; r is the loss relative to that of the untrained model, divided by the mean of this over the
        tasks. The paper takes a gradient step per batch towards equal w g / (λ r^α); this is where these
        steps lead for given g and r, averaged over `memory_steps` instead.

        Args:
          losses: mean loss of each task over the labelled rows of the batch, float32 [], at least 0; 0 where
            no row has the label: such a task is passed over.

        Returns:
          float32 [].

        Sources: Kendall, Gal and Cipolla, CVPR 2018, arXiv:1705.07115; Chen et al., ICML 2018,
        arXiv:1711.02257, section 3.
        """
        stacked = tf.stack([losses[task] for task in self.tasks])
        if self.config.method == "uncertainty":
            log_variance = self._log_variances()
            # Without a label nothing is known of the variance either.
            terms = tf.where(stacked > 0.0, tf.exp(-log_variance) * stacked + log_variance / 2.0, 0.0)
            return tf.reduce_sum(self._declared * terms)
        if self.config.method == "gradnorm":
            for index in range(len(self.tasks)):
                self._note_loss(index, tf.stop_gradient(stacked[index]))
            self._applied.assign(self._gradnorm_weights())
            return tf.reduce_sum(tf.convert_to_tensor(self._applied) * stacked)
        return tf.reduce_sum(self._declared * stacked)

    def weights_by_task(self) -> dict[str, tf.Tensor]:
        """Factor of each task's loss as of now, float32 []; for the log."""
        factors = self._declared
        if self.config.method == "uncertainty":
            factors = self._declared * tf.exp(-self._log_variances())
        elif self.config.method == "gradnorm":
            factors = self._gradnorm_weights()
        return dict(zip(self.tasks, tf.unstack(factors), strict=True))

    def _vector(self, name: str, trainable: bool = False) -> tf.Variable:
        return self.add_weight(name=name, shape=(len(self.tasks),), initializer="zeros", trainable=trainable)

    def _log_variances(self) -> tf.Tensor:
        return tf.clip_by_value(
            _LOG_VARIANCE_SPEED * self._log_variance, -_MAX_LOG_VARIANCE, _MAX_LOG_VARIANCE
        )

    def _note_loss(self, index: int, loss: tf.Tensor) -> None:
        is_early = self._loss_count[index] < _INITIAL_STEPS
        _average(self._mean_loss, self._loss_count, index, loss, self.config.memory_steps)
        initial = tf.where(is_early, self._mean_loss[index], self._initial_loss[index])
        self._initial_loss.scatter_nd_update([[index]], [initial])

    def _gradnorm_weights(self) -> tf.Tensor:
        relative_loss = tf.math.divide_no_nan(self._mean_loss, self._initial_loss)
        rate = tf.math.divide_no_nan(relative_loss, tf.reduce_mean(relative_loss))
        weights = self._declared * tf.math.divide_no_nan(rate**self.config.asymmetry, self._norm)
        weights *= tf.math.divide_no_nan(tf.reduce_sum(self._declared), tf.reduce_sum(weights))
        # Heads that start at zero pass no gradient on in the first step.
        return tf.where(tf.reduce_all(weights > 0.0), weights, self._declared)


def _average(mean: tf.Variable, count: tf.Variable, index: int, value: tf.Tensor, memory: int) -> None:
    """Updates a running mean: plain at first, exponential with rate 1 / memory later; 0 is no value."""
    # One infinite value would stay in the mean for good.
    is_value = tf.logical_and(value > 0.0, tf.math.is_finite(value))
    new_count = count[index] + tf.cast(is_value, tf.float32)
    rate = tf.where(is_value, 1.0 / tf.clip_by_value(new_count, 1.0, float(memory)), 0.0)
    step = tf.where(is_value, value - mean[index], 0.0)
    mean.scatter_nd_update([[index]], [mean[index] + rate * step])
    count.scatter_nd_update([[index]], [new_count])
