"""How likely an item is drawn into a place of a batch: counted beforehand, or followed while training."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import tensorflow as tf


class SamplingProbability(Protocol):
    """What both estimates can do."""

    def observe(self, item_ids: tf.Tensor) -> None:
        """Takes note of a batch of positives, int32 [B], before their probabilities are asked for."""
        ...

    def log_absence(self, item_ids: tf.Tensor) -> tf.Tensor:
        """Log of the chance that one place of a batch holds another item: log(1 - q), float32, at most 0."""
        ...

    def start_from(self, item_ids: np.ndarray, log_absence: np.ndarray) -> None:
        """Takes over what an earlier training knew.

        Args:
          item_ids: int [n], distinct.
          log_absence: float32 [n], see `log_absence`; 0 for an item that it never met.
        """
        ...


class CountedProbability(tf.Module):
    """Probabilities that are known before training."""

    def __init__(self, log_q: np.ndarray) -> None:
        """Takes them.

        Args:
          log_q: float32 [ids of the item vocabulary], natural log of the chance of each item.
        """
        super().__init__()
        self.table = tf.constant(np.log1p(-np.exp(np.asarray(log_q, np.float64))), tf.float32)

    def observe(self, item_ids: tf.Tensor) -> None:
        """Nothing to learn."""

    def log_absence(self, item_ids: tf.Tensor) -> tf.Tensor:
        """See `SamplingProbability.log_absence`."""
        return tf.gather(self.table, item_ids)

    def start_from(self, item_ids: np.ndarray, log_absence: np.ndarray) -> None:
        """The counts of this training stand."""


class StreamingProbability(tf.Module):
    """Probabilities estimated from the stream of batches, for data that cannot be counted beforehand.

    An item that is in a batch with chance p returns after 1/p batches on average. Array A (`last_step`) holds
    the batch in which an item was last seen, array B (`interval`) the moving average of the batches between
    its occurrences: B[i] = (1 - rate) × B[i] + rate × (step - A[i]). Vocabulary ids take the place of hashes,
    so there are no collisions. The first interval counts in full, which makes the expectation of B equal to
    1/p from the start; the probability 1/B is too large by about rate / 2 of itself.

    Source: Yi et al., RecSys 2019, doi:10.1145/3298689.3346996, section 4, algorithm 2.
    """

    def __init__(self, num_ids: int, batch_size: int, rate: float) -> None:
        """Makes an estimate that has seen nothing.

        Args:
          num_ids: ids of the item vocabulary, padding and OOV included.
          batch_size: positives per batch.
          rate: weight of the newest interval, above 0 and at most 1; large follows changes, small is precise.
        """
        super().__init__()
        self.batch_size = batch_size
        self.rate = rate
        self.step = tf.Variable(0, trainable=False, dtype=tf.int64, name="step")
        self.last_step = tf.Variable(tf.zeros([num_ids], tf.int64), trainable=False, name="last_step")
        self.interval = tf.Variable(tf.zeros([num_ids]), trainable=False, name="interval")

    def observe(self, item_ids: tf.Tensor) -> None:
        """See `SamplingProbability.observe`."""
        items = tf.unique(item_ids).y
        step = self.step.assign_add(1)
        newest = tf.cast(step - tf.gather(self.last_step, items), tf.float32)
        old = tf.gather(self.interval, items)
        average = tf.where(old > 0, old + self.rate * (newest - old), newest)
        self.interval.scatter_nd_update(items[:, tf.newaxis], average)
        self.last_step.scatter_nd_update(items[:, tf.newaxis], tf.fill(tf.shape(items), step))

    def log_absence(self, item_ids: tf.Tensor) -> tf.Tensor:
        """See `SamplingProbability.log_absence`. An item never seen has probability 0."""
        in_batch = tf.math.divide_no_nan(1.0, tf.gather(self.interval, item_ids))
        return tf.math.log1p(-in_batch) / self.batch_size

    def start_from(self, item_ids: np.ndarray, log_absence: np.ndarray) -> None:
        """See `SamplingProbability.start_from`.

        How long an item was not seen before the first batch does not matter: chance has no memory.
        """
        in_batch = -np.expm1(self.batch_size * np.asarray(log_absence, np.float64))
        interval = np.divide(1.0, in_batch, out=np.zeros_like(in_batch), where=in_batch > 0)
        self.interval.scatter_nd_update(item_ids[:, np.newaxis], interval.astype(np.float32))
