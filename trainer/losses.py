"""Losses of the retrieval model.

The softmax over the whole catalogue is estimated on a set of distinct items. With p_c the chance that a step
draws item c into the set,

    loss = -log( exp(s_t) / p_t / Σ_c exp(s_c) / p_c ),  c over the set, t the positive, always in the set.

A duplicate of the positive (an accidental hit) cannot be a negative, because an item is in the set once. For
rare items p is the batch size times the sampling probability q, so this is the logQ correction of Yi et al.
(RecSys 2019, doi:10.1145/3298689.3346996, section 3). For frequent ones p saturates at 1: where everything is
drawn, the loss is the full softmax. And at any batch size the gradient is zero on average at the true scores
s = log P(item | query), as that of the full softmax is. (With every copy of an item as a negative of its own,
log(q) in place of log(p) and accidental hits masked, it is not: frequent items are overrated.)
"""

from __future__ import annotations

import tensorflow as tf

# Log weight of a column that is no negative; exp of it is 0 in float32.
NOT_SAMPLED = -1e9
# Logits computed at a time: 8 MB of them stay in a processor's cache on their way from product to gradient.
_CHUNK_LOGITS = 1 << 21


def sampled_softmax_loss(
    queries: tf.Tensor,
    candidates: tf.Tensor,
    positives: tf.Tensor,
    log_weights: tf.Tensor,
    temperature: float = 1.0,
    sample_weight: tf.Tensor | None = None,
    hard_negatives: tf.Tensor | None = None,
) -> tf.Tensor:
    """Softmax cross-entropy over a set of candidates, each weighted by the inverse of its sampling chance.

    Letters: B = queries, D = width of a vector, C = candidates (columns), H = hard negatives per query.
    Formula: logits[b, c] = queries[b] · candidates[c] / temperature + log_weights[c];
    loss = Σ_b w[b] × -log softmax(logits[b])[positives[b]] / Σ_b w[b].

    A query's hard negatives were looked for, not drawn: they are in its set for certain (p = 1), so their log
    weight is 0 for this query whatever `log_weights` says.

    The matrix of logits exists in chunks of rows only, and each chunk's gradient is computed along with its
    loss. The result has a first derivative by queries and candidates, no second one.

    Args:
      queries: float32 [B, D].
      candidates: float32 [C, D], distinct items.
      positives: int32 [B], the column of each query's positive.
      log_weights: float32 [C], -log of the chance that the column is in the set, see
        `log_inclusion_probability`; NOT_SAMPLED for a column that is only somebody's hard negative.
      temperature: above 0, no unit; divides the scores.
      sample_weight: float32 [B], at least 0; None weighs all rows alike. A batch of weight 0 has loss 0.
      hard_negatives: int32 [B, H], columns; an entry equal to the query's positive stands for none.

    Returns:
      float32 scalar, at least 0.
    """
    num_rows = tf.shape(queries)[0]
    if sample_weight is None:
        sample_weight = tf.ones([num_rows])
    weights = tf.math.divide_no_nan(sample_weight, tf.reduce_sum(sample_weight))[:, tf.newaxis]
    chunk_rows = tf.clip_by_value(_CHUNK_LOGITS // tf.shape(candidates)[0], 1, num_rows)

    @tf.custom_gradient
    def total_loss(queries: tf.Tensor, candidates: tf.Tensor) -> tuple[tf.Tensor, object]:
        # One more dimension adds log_weights within a product, another sums exp(logits) within the next.
        weighted = tf.concat([tf.transpose(candidates), log_weights[tf.newaxis, :]], axis=0)
        counted = tf.concat([candidates, tf.ones_like(candidates[:, :1])], axis=1)

        def add_chunk(
            start: tf.Tensor, loss: tf.Tensor, by_queries: tf.TensorArray, by_candidates: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.TensorArray, tf.Tensor]:
            rows = slice(start, start + chunk_rows)
            query, positive, weight = queries[rows], positives[rows], weights[rows]
            logits = tf.matmul(tf.concat([query, tf.ones_like(query[:, :1])], axis=1), weighted)
            if hard_negatives is not None:
                logits = _with_certain(logits, query, candidates, positive, hard_negatives[rows])
            largest = tf.reduce_max(logits, axis=1, keepdims=True)
            exp = tf.exp(logits - largest)
            sums = tf.matmul(exp, counted)
            vectors, partition = sums[:, :-1], sums[:, -1:]
            positive_logit = tf.gather(logits, positive[:, tf.newaxis], batch_dims=1)
            loss += tf.reduce_sum(weight * (tf.math.log(partition) + largest - positive_logit))
            # d loss / d logits = weight × (softmax - one-hot); the one-hot parts are gathers and scatters.
            scale = weight / partition
            by_query = scale * vectors - weight * tf.gather(candidates, positive)
            by_candidates += tf.matmul(exp, scale * query, transpose_a=True)
            return start + chunk_rows, loss, by_queries.write(start // chunk_rows, by_query), by_candidates

        num_chunks = (num_rows + chunk_rows - 1) // chunk_rows
        chunks = tf.TensorArray(
            tf.float32, num_chunks, infer_shape=False, element_shape=[None, queries.shape[1]]
        )
        _, loss, chunks, by_candidates = tf.while_loop(
            lambda start, *_: start < num_rows,
            add_chunk,
            (0, 0.0, chunks, tf.zeros_like(candidates)),
            parallel_iterations=1,
        )
        by_queries = chunks.concat()
        by_candidates -= tf.math.unsorted_segment_sum(weights * queries, positives, tf.shape(candidates)[0])
        return loss, lambda upstream: (upstream * by_queries, upstream * by_candidates)

    return total_loss(queries / temperature, candidates)


def _with_certain(
    logits: tf.Tensor, query: tf.Tensor, candidates: tf.Tensor, positive: tf.Tensor, hard: tf.Tensor
) -> tf.Tensor:
    """The logits [R, C] of R queries with log weight 0 at their hard negatives [R, H]."""
    scores = tf.linalg.matvec(tf.gather(candidates, hard), query)
    is_none = tf.equal(hard, positive[:, tf.newaxis])
    scores = tf.where(is_none, tf.gather(logits, hard, batch_dims=1), scores)
    rows = tf.broadcast_to(tf.range(tf.shape(hard)[0])[:, tf.newaxis], tf.shape(hard))
    return tf.tensor_scatter_nd_update(logits, tf.stack([rows, hard], axis=-1), scores)


def log_inclusion_probability(log_absence: tf.Tensor) -> tf.Tensor:
    """Log of the chance that an item is in a set: log(1 - exp(log_absence)).

    Draws multiply their chances of absence. For an item of sampling probability q in a batch of B positives
    and M uniform draws out of I items, log_absence = (B - 1) log(1 - q) + M log(1 - 1/I): one place of the
    batch is the query's own. For rare items the result is log((B - 1) q + M / I), which up to a constant is
    the joint correction of mixed negative sampling (Yang et al., WWW 2020 companion,
    doi:10.1145/3366424.3386195, section 3).

    Args:
      log_absence: float32, below 0; -inf for an item that is always in the set.

    Returns:
      float32, at most 0, of the same shape. Tiny chances are kept: nothing is clipped.
    """
    return tf.math.log(-tf.math.expm1(log_absence))


def log_sampling_probability(counts: tf.Tensor) -> tf.Tensor:
    """Natural log of each item's share of the training positives, smoothed so that it is always finite.

    Args:
      counts: float or int [I], positives per item, at least 0.

    Returns:
      float32 [I], below 0 when there are two or more items: log((count + 0.5) / (sum of counts + 0.5 I)).
    """
    smoothed = tf.cast(counts, tf.float32) + 0.5
    return tf.math.log(smoothed / tf.reduce_sum(smoothed))
