"""Losses of the retrieval model."""

from __future__ import annotations

import tensorflow as tf

# Added to the logit of an accidental hit; exp of it is 0 in float32.
_MASKED = -1e9


def in_batch_softmax_loss(
    scores: tf.Tensor,
    item_ids: tf.Tensor,
    log_q: tf.Tensor,
    temperature: float = 1.0,
    sample_weight: tf.Tensor | None = None,
) -> tf.Tensor:
    """Sampled softmax loss whose negatives are the other items of the batch.

    Letters: B = examples in the batch.
    Formula: logits[i, j] = scores[i, j] / temperature - log_q[j]; j != i with the item of i gets weight 0 (an
    accidental hit); loss = sum_i w[i] * -log softmax(logits[i])[i] / sum_i w[i].

    Dividing by the chance of being drawn makes the loss estimate the softmax over the whole catalogue. The
    scores therefore learn the true popularity of an item too, and are used as they are at serving time.

    Args:
      scores: float32 [B, B], dot products; row = query, column = item, the diagonal holds positives.
      item_ids: int [B], item of each column.
      log_q: float32 [B], natural log of the chance that the item of a column is drawn into a batch place.
      temperature: above 0, no unit.
      sample_weight: float32 [B], at least 0; None weighs all rows alike. A batch of weight 0 has loss 0.

    Returns:
      float32 scalar, at least 0.

    Source: Yi et al., RecSys 2019, doi:10.1145/3298689.3346996.
    """
    logits = scores / temperature - log_q[tf.newaxis, :]
    same_item = tf.equal(item_ids[:, tf.newaxis], item_ids[tf.newaxis, :])
    accidental_hits = tf.linalg.set_diag(same_item, tf.zeros_like(item_ids, dtype=tf.bool))
    logits = tf.where(accidental_hits, _MASKED, logits)
    # Sparse labels: dense [B, B] ones cost most of the step at large batches.
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.range(tf.shape(logits)[0]), logits=logits
    )
    if sample_weight is None:
        return tf.reduce_mean(losses)
    return tf.math.divide_no_nan(tf.reduce_sum(losses * sample_weight), tf.reduce_sum(sample_weight))


def log_sampling_probability(counts: tf.Tensor) -> tf.Tensor:
    """Natural log of each item's share of the training positives, smoothed so that it is always finite.

    Args:
      counts: float or int [I], positives per item, at least 0.

    Returns:
      float32 [I], below 0 when there are two or more items: log((count + 0.5) / (sum of counts + 0.5 I)).
    """
    smoothed = tf.cast(counts, tf.float32) + 0.5
    return tf.math.log(smoothed / tf.reduce_sum(smoothed))
