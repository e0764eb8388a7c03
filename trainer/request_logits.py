"""The logits of the ranker for many candidates of a request: the same ones from less arithmetic.

The inputs of the body are x = [q, p]: q of the request, the same for all its candidates, and p of the pair.

- A product with x is taken apart, x W = q W_q + p W_p, and the half with q is computed once per request.
- The last cross of `trainer.interactions.CrossNetwork` is read by the heads alone, which are linear. With
  heads H, weights W and bias b of that cross, and z what comes before it,

      (x ⊙ (z W + b) + z) H = (p ⊙ (z W_p + b_p)) H_p + z (W_q (q ⊙ H_q) + H) + (q ⊙ b_q) H_q,

  where W_q and W_p are the columns of W that belong to q and p: those of q, too, are one small product per
  request.

Letters: U = requests, N = candidates per request, Q and P = widths of q and p, D = Q + P, T = logits of all
tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from trainer.experts import SharedBottom
from trainer.interactions import CrossNetwork
from trainer.ranking import RankingModel

FloatArray = npt.NDArray[np.float32]


class _Halves(NamedTuple):
    """What belongs to q and what to p, of inputs, weights or biases."""

    query: Any
    pair: Any

    @classmethod
    def of(cls, weights: FloatArray, is_query: npt.NDArray[np.bool_], axis: int = 0) -> _Halves:
        """The halves of weights along an axis of length D."""
        return cls(np.compress(is_query, weights, axis=axis), np.compress(~is_query, weights, axis=axis))


def request_logits(
    model: RankingModel, parts: Sequence[tf.Tensor], shape: Sequence[Any]
) -> dict[str, tf.Tensor]:
    """As `RankingModel.logits_of_parts`, up to rounding, where a graph is traced.

    Run eagerly it is the model's own: so golden requests compare the two forms. Bodies of another structure
    than the default one are not taken apart.
    """
    crosses = model.interaction
    if tf.executing_eagerly() or not isinstance(crosses, CrossNetwork) or not _is_default(model, crosses):
        return model.logits_of_parts(parts, shape)
    by_query = [part.shape[1] == 1 for part in parts]
    is_query = np.repeat(by_query, [part.shape[-1] for part in parts])
    x = _Halves(
        tf.concat([part for part, q in zip(parts, by_query, strict=True) if q], axis=-1),
        tf.concat([part for part, q in zip(parts, by_query, strict=True) if not q], axis=-1),
    )
    kernel = np.concatenate([_numbers(head.kernel) for head in model.heads.values()], axis=1)
    bias = np.concatenate([_numbers(head.bias) for head in model.heads.values()])
    num_shared = len(kernel) - len(is_query)
    logits = _product(_hidden(model.body, x, is_query), kernel[:num_shared], bias)
    logits += _crossed(crosses, x, is_query, kernel[num_shared:])
    sizes = [objective.num_logits for objective in model.objectives.values()]
    rows = tf.split(tf.reshape(logits, [-1, len(bias)]), sizes, axis=-1)
    return dict(zip(model.heads, rows, strict=True))


def _is_default(model: RankingModel, crosses: CrossNetwork) -> bool:
    """Whether the body is one network for all tasks beside full crosses."""
    return (
        model.is_parallel
        and crosses.rank is None
        and isinstance(model.body, SharedBottom)
        and bool(model.body.network.widths)
        and not model.body.task_networks.widths
    )


def _hidden(body: SharedBottom, x: _Halves, is_query: npt.NDArray[np.bool_]) -> tf.Tensor:
    """The shared network, float32 [U, N, W]."""
    kernels = [_numbers(kernel)[0] for kernel in body.network.kernels]
    biases = [_numbers(bias)[0, 0] for bias in body.network.biases]
    hidden = tf.nn.relu(_both(x, kernels[0], biases[0], is_query))
    for kernel, bias in zip(kernels[1:], biases[1:], strict=True):
        hidden = tf.nn.relu(_product(hidden, kernel, bias))
    return hidden


def _crossed(
    network: CrossNetwork, x: _Halves, is_query: npt.NDArray[np.bool_], heads: FloatArray
) -> tf.Tensor:
    """What the heads, float32 [D, T], read of the crosses, float32 [U, N, T]."""
    *before, (kernel, bias) = (map(_numbers, cross.weights) for cross in network.crosses)
    z = x
    for weights, biases in before:
        if z is x:
            # x ⊙ (x W + b) + x = x ⊙ (x W + b + 1): one sum less over all candidates.
            z = _Halves(*map(tf.multiply, x, _to_halves(x, weights, biases + 1.0, is_query)))
        else:
            product = _to_halves(z, weights, biases, is_query)
            z = _Halves(*(a * b + c for a, b, c in zip(x, product, z, strict=True)))
    columns, halves_of_bias = _Halves.of(kernel, is_query, axis=1), _Halves.of(bias, is_query)
    own = _Halves.of(heads, is_query)
    logits = _product(x.pair * _both(z, columns.pair, halves_of_bias.pair, is_query), own.pair)
    logits += _product(x.query * halves_of_bias.query, own.query)
    weighted = own.query.T * x.query
    for half, rows, head in zip(z, _Halves.of(columns.query, is_query), own, strict=True):
        logits += tf.matmul(half, _product(weighted, rows.T) + head.T, transpose_b=True)
    return logits


def _numbers(weight: tf.Variable) -> FloatArray:
    """The values of a weight, also while a graph is traced."""
    with tf.init_scope():
        return np.asarray(weight.numpy())


def _to_halves(x: _Halves, kernel: FloatArray, bias: FloatArray, is_query: npt.NDArray[np.bool_]) -> _Halves:
    """x W + b, W being [D, D], as halves float32 [U, N, Q] and [U, N, P]."""
    columns, biases = _Halves.of(kernel, is_query, axis=1), _Halves.of(bias, is_query)
    return _Halves(*(_both(x, *half, is_query) for half in zip(columns, biases, strict=True)))


def _both(x: _Halves, kernel: FloatArray, bias: FloatArray, is_query: npt.NDArray[np.bool_]) -> tf.Tensor:
    """x W + b, float32 [U, N, W]."""
    of_query, of_pair = _Halves.of(kernel, is_query)
    return _product(x.pair, of_pair) + _product(x.query, of_query, bias)


def _product(rows: tf.Tensor, kernel: FloatArray, bias: FloatArray | None = None) -> tf.Tensor:
    """Float32 [U, N, A] times [A, B], plus [B]: [U, N, B], as one product of matrices."""
    shape = tf.shape(rows)
    product = tf.matmul(tf.reshape(rows, [-1, kernel.shape[0]]), tf.constant(kernel))
    if bias is not None:
        product = tf.nn.bias_add(product, bias)
    return tf.reshape(product, [shape[0], shape[1], kernel.shape[1]])
