"""Item vectors to start from: items that the same users choose lie close to each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features


def positives(windows: Iterable[Mapping[str, tf.Tensor]], spec: DatasetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Transformed user and item id of every positive, int32 [n] each.

    Args:
      windows: transformed training examples.
      spec: the declaration of the dataset.
    """
    space = features.feature_space(spec)
    user_id, item_id = (space.find(name).id_name for name in (features.USER_ID, features.ITEM_ID))
    users, items = [], []
    for window in windows:
        positive = window[spec.positive].numpy() > 0
        users.append(window[user_id].numpy()[positive])
        items.append(window[item_id].numpy()[positive])
    return np.concatenate(users), np.concatenate(items)


def cooccurrence_vectors(
    user_ids: np.ndarray, item_ids: np.ndarray, num_ids: int, width: int, seed: int
) -> np.ndarray:
    """Right singular vectors of the user × item matrix, scaled to a mean square length of 1.

    Formula: X[u, i] = 1 / sqrt(n_u n_i) if user u chose item i, n = number of choices; X ≈ U S V^T; vectors =
    V sqrt(S). The truncated decomposition is the pure SVD of Cremonesi et al. (RecSys 2010, section 3.2) on a
    matrix in which heavy users and popular items weigh less.

    Args:
      user_ids: int [n], of each positive; not negative.
      item_ids: int [n], transformed ids.
      num_ids: ids of the item vocabulary, padding and OOV included.
      width: of a vector; must be below the number of users and of items for all of it to be used.
      seed: of the solver's start vector.

    Returns:
      float32 [num_ids, width]; zeros for padding, OOV, items without positives, and columns that the matrix
      has no rank for.
    """
    pairs = np.unique(np.stack([user_ids, item_ids], axis=1).astype(np.int64), axis=0)
    pairs = pairs[pairs[:, 1] >= features.FIRST_VOCABULARY_ID]
    users, items = pairs[:, 0], pairs[:, 1]
    num_users = int(users.max()) + 1
    per_user, per_item = np.bincount(users, minlength=num_users), np.bincount(items, minlength=num_ids)
    values = 1.0 / np.sqrt(per_user[users] * per_item[items].astype(np.float64))
    matrix = scipy.sparse.csr_matrix((values, (users, items)), shape=(num_users, num_ids), dtype=np.float64)
    rank = min(width, min(matrix.shape) - 1)
    _, singular, rows = scipy.sparse.linalg.svds(matrix, k=rank, random_state=seed)
    # The solver leaves the sign of each direction open.
    signs = np.sign(rows[np.arange(rank), np.abs(rows).argmax(axis=1)])
    vectors = np.zeros((num_ids, width), np.float32)
    vectors[:, :rank] = (rows * (signs * np.sqrt(singular))[:, np.newaxis]).T
    chosen = per_item > 0
    vectors[~chosen] = 0.0
    vectors[chosen] /= np.sqrt(np.mean(np.sum(vectors[chosen] ** 2, axis=1)))
    return vectors
