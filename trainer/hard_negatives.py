"""Hard negatives: items that the model ranks high for a query and that the user is not known to like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from schema.contract import FeatureKind
from trainer import features
from trainer.catalogue import Catalogue
from trainer.config import LossConfig
from trainer.index import NO_ROW, Effort, ExactIndex, Index, ScannIndex

_USER_ID = features.Feature(features.USER_ID, FeatureKind.CATEGORICAL, features.USER_ID).id_name
_ITEM_ID = features.Feature(features.ITEM_ID, FeatureKind.CATEGORICAL, features.ITEM_SPACE).id_name
_HISTORY = features.Feature(features.HISTORY, FeatureKind.MULTI_CATEGORICAL, features.ITEM_SPACE).id_name

# Below, scoring every item costs less than the partition that spares it. Above, ScaNN reads a share of its
# leaves only: a hard negative that it misses is replaced by the next, so recall matters little here.
_MIN_ITEMS_FOR_SCANN = 50_000
_SHARE_OF_LEAVES = 0.05


class HardNegativeMiner:
    """Searches an index of the model's own, slightly stale candidate vectors with the queries of a batch.

    The index is rebuilt while the model trains, as in Xiong et al., ICLR 2021, arXiv:2007.00808, section 4.
    False negatives are kept out twice: the user's training positives and the query's history do not count,
    and of the ranks that remain the first `hard_negative_skip` are passed over, for they are what the user is
    most likely to like without having met it.
    """

    def __init__(
        self,
        config: LossConfig,
        catalogue: Catalogue,
        known_positives: np.ndarray,
    ) -> None:
        """Makes a miner; `refresh` must be called before the first `mine`.

        Args:
          config: how many, and from which ranks.
          catalogue: every item.
          known_positives: from `known_positives`.
        """
        self.config = config
        self.known_positives = tf.constant(known_positives, tf.int64)
        item_ids = catalogue.transformed[_ITEM_ID]
        # New items are no negatives, see CataloguePool. Boosted as they may be, they would crowd others out.
        self.rows = np.flatnonzero(item_ids > features.OOV_ID)
        # The last entry is that of NO_ROW.
        self.item_ids = tf.constant(np.append(item_ids[self.rows], features.OOV_ID), tf.int32)
        self.search: Callable[..., tuple[tf.Tensor, tf.Tensor]] | None = None

    def refresh(self, candidate_vectors: np.ndarray) -> None:
        """Builds the index anew, from float32 [I, D] in the order of the catalogue."""
        index = mining_index(candidate_vectors[self.rows], self.config.hard_negative_search)
        # Compiled, for ScaNN's searcher is set up at every call otherwise.
        self.search = tf.function(index.search, autograph=False)

    def mine(self, queries: tf.Tensor, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Looks for each query's hard negatives.

        Args:
          queries: float32 [B, D].
          inputs: transformed features of the same examples; user, item and history are read.

        Returns:
          Transformed item ids int32 [B, H], best ranked first. H <= `hard_negatives`; where fewer are found,
          the query's own positive fills the row.
        """
        positives = tf.cast(inputs[_ITEM_ID], tf.int32)[:, tf.newaxis]
        # Not part of the graph: the index is another object after each refresh.
        rows = tf.numpy_function(self._search, [queries], tf.int32)
        rows = tf.ensure_shape(rows, [None, None])
        items = tf.gather(self.item_ids, tf.where(rows == NO_ROW, tf.size(self.item_ids) - 1, rows))
        history = tf.cast(inputs[_HISTORY], tf.int32)
        allowed = (
            (items != features.OOV_ID)
            & (items != positives)
            & ~tf.reduce_any(items[:, :, tf.newaxis] == history[:, tf.newaxis, :], axis=2)
            & ~self._is_known(inputs[_USER_ID], items)
        )
        skipped, wanted = self.config.hard_negative_skip, self.config.hard_negatives
        rank = tf.cumsum(tf.cast(allowed, tf.int32), axis=1)
        chosen = allowed & (rank > skipped) & (rank <= skipped + wanted)
        order = tf.argsort(tf.cast(~chosen, tf.int32), axis=1, stable=True)[:, :wanted]
        is_found = tf.gather(chosen, order, batch_dims=1)
        return tf.where(is_found, tf.gather(items, order, batch_dims=1), positives)

    def _search(self, queries: np.ndarray) -> np.ndarray:
        if self.search is None:
            raise RuntimeError("HardNegativeMiner.refresh must be called before mine")
        rows, _ = self.search(tf.constant(queries), tf.constant(self.config.hard_negative_search))
        return rows.numpy().astype(np.int32)

    def _is_known(self, user_ids: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
        """Whether the items [B, N] are training positives of the users [B]."""
        keys = pair_keys(tf.cast(user_ids, tf.int64)[:, tf.newaxis], tf.cast(items, tf.int64))
        places = tf.searchsorted(self.known_positives, tf.reshape(keys, [-1]))
        places = tf.reshape(tf.minimum(places, tf.size(self.known_positives) - 1), tf.shape(keys))
        return tf.gather(self.known_positives, places) == keys


class RefreshHardNegatives(tf.keras.callbacks.Callback):
    """Rebuilds a miner's index before the first training step and every so many steps after it."""

    def __init__(self, miner: HardNegativeMiner, encode: Callable[[], np.ndarray]) -> None:
        """Makes the callback.

        Args:
          miner: whose index to rebuild.
          encode: makes the candidate vectors of every item as of now, float32 [I, D].
        """
        super().__init__()
        self.miner = miner
        self.encode = encode
        self.step = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Called by Keras before each step."""
        if self.step % self.miner.config.hard_negative_refresh_steps == 0:
            self.miner.refresh(self.encode())
        self.step += 1


def mining_index(vectors: np.ndarray, k: int) -> Index:
    """An index to find k hard negatives in: exact for a small catalogue, ScaNN for a large one.

    Args:
      vectors: float32 [I, D].
      k: neighbours per search.
    """
    if len(vectors) < _MIN_ITEMS_FOR_SCANN:
        return ExactIndex(vectors)
    num_leaves = round(math.sqrt(len(vectors)))
    index = ScannIndex.build(vectors, num_leaves)
    index.efforts = (Effort(k, math.ceil(_SHARE_OF_LEAVES * num_leaves), 2 * k),)
    return index


def pair_keys(user_ids: Any, item_ids: Any) -> Any:
    """One int64 per pair of a user id and an item id below 2^31, as arrays or tensors."""
    return user_ids * 2**31 + item_ids


def known_positives(windows: Iterable[Mapping[str, tf.Tensor]], positive: str) -> np.ndarray:
    """What the users are known to like.

    Args:
      windows: training windows.
      positive: label that makes an example a positive.

    Returns:
      int64 [P], sorted: the distinct `pair_keys` of all training positives, also of those beyond the cap.
    """
    keys = []
    for window in windows:
        is_positive = window[positive].numpy() > 0
        users, items = (window[name].numpy()[is_positive].astype(np.int64) for name in (_USER_ID, _ITEM_ID))
        keys.append(np.unique(pair_keys(users, items)))
    return np.unique(np.concatenate(keys))
