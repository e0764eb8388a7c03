"""Item factors of an implicit-feedback matrix factorisation, and how a history is folded into them.

Letters: I = item ids, F = factors, B = users, L = events of a history.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import tensorflow as tf
from implicit.als import AlternatingLeastSquares
from threadpoolctl import threadpool_limits

from trainer import features
from trainer.config import FactorsConfig

_ITERATIONS = 15


def fitted_ials(
    choices: sp.csr_matrix, num_factors: int, alpha: float, ridge: float, seed: int
) -> AlternatingLeastSquares:
    """Fits iALS with the library `implicit`.

    Args:
      choices: float32 [users, items], 1 where a user chose an item.
      num_factors: F.
      alpha: weight of a chosen item, that of the others being 1.
      ridge: of both kinds of factors.
      seed: of the first factors.

    Source: Hu, Koren and Volinsky, ICDM 2008, doi:10.1109/ICDM.2008.22.
    """
    # The library runs its own threads; those of BLAS below them only get in their way.
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(
            num_factors, alpha=alpha, regularization=ridge, iterations=_ITERATIONS, random_state=seed,
            use_gpu=False,
        )  # fmt: skip
        model.fit(choices, show_progress=False)
    return model


def item_factors(
    user_ids: np.ndarray, item_ids: np.ndarray, num_ids: int, config: FactorsConfig, seed: int
) -> np.ndarray:
    """Factors of the items that the training positives tell of.

    Args:
      user_ids: int [n], of each positive; not negative.
      item_ids: int [n], transformed ids.
      num_ids: I, padding and OOV included.
      config: of the fit.
      seed: of the first factors.

    Returns:
      float32 [I, F]; zeros for padding, OOV and items without positives.
    """
    in_vocabulary = item_ids >= features.FIRST_VOCABULARY_ID
    pairs = np.unique(np.stack([user_ids, item_ids], axis=1)[in_vocabulary].astype(np.int64), axis=0)
    users, items = pairs.T
    ones = np.ones(len(pairs), np.float32)
    choices = sp.csr_matrix((ones, (users, items)), (int(user_ids.max()) + 1, num_ids))
    factors = fitted_ials(choices, config.num_factors, config.alpha, config.ridge, seed).item_factors
    factors = np.asarray(factors, np.float32)
    factors[np.bincount(items, minlength=num_ids) == 0] = 0.0
    return factors


class ItemFactors(tf.keras.layers.Layer):
    """The factors as further dimensions of both towers; they are data, and are not trained.

    The factors of a user with the history h are a linear map of it, so that a query stays one vector:
    weight × alpha × (Y'Y + ridge × 1)^-1 × Σ_h y_h / √L. This is the fold-in of iALS (Hu et al. 2008,
    equation 4) to first order in the history: what is left out is the change of the matrix by the user's own
    items. The root keeps long histories from drowning what the towers say.
    """

    def __init__(
        self, num_ids: int, config: FactorsConfig, factors: np.ndarray | None, **kwargs: object
    ) -> None:
        """Makes the layer.

        Args:
          num_ids: I.
          config: of the factors.
          factors: float32 [I, F], from `item_factors`; None = zeros, for a checkpoint to fill.
          **kwargs: passed to the Keras layer.
        """
        super().__init__(**kwargs)
        width = config.num_factors
        if factors is None:
            factors = np.zeros((num_ids, width), np.float32)
        exact = factors.astype(np.float64)
        fold_in = np.linalg.inv(exact.T @ exact + config.ridge * np.eye(width))
        fold_in *= config.weight * config.alpha
        self.factors = self._constant("factors", factors)
        self.fold_in = self._constant("fold_in", fold_in)

    def _constant(self, name: str, value: np.ndarray) -> tf.Variable:
        return self.add_weight(
            name, value.shape, initializer=tf.keras.initializers.Constant(value), trainable=False
        )

    def of_items(self, ids: tf.Tensor) -> tf.Tensor:
        """Transformed item ids of any shape to float32 [..., F]; zeros where nothing is known of the item."""
        return tf.gather(self.factors, ids)

    def of_history(self, ids: tf.Tensor) -> tf.Tensor:
        """Transformed ids of watched items, int [B, L] with any padding, to float32 [B, F]."""
        length = tf.math.count_nonzero(ids != features.PADDING_ID, axis=1, keepdims=True, dtype=tf.float32)
        # Padding has factors 0.
        total = tf.reduce_sum(self.of_items(ids), axis=1) / tf.sqrt(tf.maximum(length, 1.0))
        return tf.matmul(total, self.fold_in)
