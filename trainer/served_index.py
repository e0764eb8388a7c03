"""The searching part of an exported model: query vectors in, item ids out.

Letters: B = requests, D = width of a vector, E = excluded items, K = results per request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from schema.errors import IndexBuildError
from trainer.bundle import Signature, Tensors
from trainer.index import NO_ROW, CandidateIndex, Found, Restriction

K = "k"
EXCLUDED = "exclude_item_ids"
# Signature that tells what the index holds under an id.
LOOKUP = "lookup_items"
# Items looked up at a time.
_LOOKUP_ITEMS = 65_536


class ServedIndex(tf.Module):
    """A candidate index that is asked by item id."""

    def __init__(self, index: CandidateIndex, item_ids: Sequence[str] | np.ndarray, max_k: int) -> None:
        """Adds the ids.

        Args:
          index: over all items.
          item_ids: str [I], the id of each row of the index.
          max_k: the largest k of a request.
        """
        super().__init__()
        self.index = index
        self.max_k = max_k
        ids = tf.constant(list(item_ids), tf.string)
        self.rows = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(ids, tf.range(len(item_ids), dtype=tf.int32)),
            default_value=NO_ROW,
        )
        # Shifted by one, so that NO_ROW reads as "".
        self.item_ids = tf.Variable(tf.concat([[""], ids], axis=0), trainable=False)

    @property
    def vectors(self) -> tf.Variable:
        """The vector of every row, float32 [I, D]."""
        return self.index.exact.vectors

    def request_signature(self) -> dict[str, tf.TensorSpec]:
        """The inputs of a request beside its query, by name."""
        return {
            K: tf.TensorSpec([None], tf.int32, name=K),
            EXCLUDED: tf.TensorSpec([None, None], tf.string, name=EXCLUDED),
            **self.index.allow_lists.signature(),
        }

    def request(self, k: tf.Tensor, excluded: tf.Tensor) -> dict[str, tf.Tensor]:
        """A request that allows all attribute values: k int32 [B], excluded item ids string [B, E]."""
        return {K: k, EXCLUDED: excluded, **self.index.allow_lists.empty_lists(tf.size(k))}

    def search(self, queries: tf.Tensor, request: Mapping[str, tf.Tensor], exact: bool = False) -> Found:
        """Finds the best items that requests may get.

        Args:
          queries: float32 [B, D] or [B, M, D].
          request: `k` int32 [B], items wanted, 1 to max_k; `exclude_item_ids` string [B, E], where "" is
            padding and unknown ids are ignored; for each attribute with an allow-list a string [B, L], where
            "" is padding and an empty list allows everything.
          exact: score every item.

        Returns:
          The results as catalogue rows; `ids` makes item ids of them.

        Raises:
          InvalidArgumentError: a k is below 1 or above max_k.
        """
        k = request[K]
        allowed = f"k must be between 1 and {self.max_k}, the largest k that this model was exported for"
        checks = [
            tf.debugging.assert_positive(k, allowed),
            tf.debugging.assert_less_equal(k, self.max_k, allowed),
        ]
        with tf.control_dependencies(checks):
            k = tf.identity(k)
        restriction = Restriction(
            self.rows.lookup(request[EXCLUDED]), self.index.allow_lists.allowed_values(request)
        )
        search = self.index.search_exact if exact else self.index.search
        return search(queries, k, restriction)

    def ids(self, rows: tf.Tensor) -> tf.Tensor:
        """Item ids of catalogue rows, string in the shape of `rows`; "" for NO_ROW."""
        return tf.gather(self.item_ids, rows - NO_ROW)

    def vectors_of(self, rows: tf.Tensor) -> tf.Tensor:
        """The vectors of catalogue rows, float32 in the shape of `rows` and [D]; of NO_ROW, any item's."""
        # tf.gather of a variable marks it as one that is accessed sparsely: from then on each read of it is a
        # copy, and ScaNN reads all of it with every request (18 ms at 200,000 x 128).
        return tf.gather(tf.convert_to_tensor(self.vectors), tf.maximum(rows, 0))

    def reasons(self, rows: tf.Tensor, history_item_ids: tf.Tensor) -> tf.Tensor:
        """The watched item that is most like each result.

        Args:
          rows: int32 [B, K], catalogue rows of results.
          history_item_ids: string [B, L], watched items; "" and ids outside the catalogue count for nothing.

        Returns:
          string [B, K]: the id with the largest cosine; "" without history or result.
        """
        # One more column makes an empty history a list too.
        history = tf.pad(self.rows.lookup(history_item_ids), [[0, 0], [0, 1]], constant_values=NO_ROW)
        cosine = tf.matmul(self._directions(rows), self._directions(history), transpose_b=True)
        cosine = tf.where(history[:, tf.newaxis, :] == NO_ROW, -2.0, cosine)
        nearest = tf.gather(history, tf.argmax(cosine, axis=2), batch_dims=1)
        return self.ids(tf.where(rows == NO_ROW, NO_ROW, nearest))

    def _directions(self, rows: tf.Tensor) -> tf.Tensor:
        """Unit candidate vectors without the item bias, which says nothing about likeness."""
        return tf.math.l2_normalize(self.vectors_of(rows)[..., :-1], axis=-1)

    def lookup_signature(self) -> Signature:
        """What the index holds under an id.

        In: `item_ids` string [B]. Out: `item_ids` string [B], the ids of the rows found, "" for an unknown
        one; `vectors` float32 [B, D], zeros for an unknown one.
        """

        def lookup(inputs: Tensors) -> dict[str, tf.Tensor]:
            rows = self.rows.lookup(inputs["item_ids"])
            known = (rows != NO_ROW)[:, tf.newaxis]
            return {"item_ids": self.ids(rows), "vectors": tf.where(known, self.vectors_of(rows), 0.0)}

        return Signature(lookup, {"item_ids": tf.TensorSpec([None], tf.string, name="item_ids")})


def check_round_trip(model_dir: str, item_ids: Sequence[str] | np.ndarray, vectors: np.ndarray) -> None:
    """Looks every item up in a written model, by its LOOKUP signature.

    Args:
      model_dir: SavedModel.
      item_ids: str [I], every item of the catalogue.
      vectors: float32 [I, D], of the items.

    Raises:
      IndexBuildError: an id does not lead back to itself, or not to the vector of its item.
    """
    lookup = tf.saved_model.load(model_dir).signatures[LOOKUP]
    for start in range(0, len(item_ids), _LOOKUP_ITEMS):
        ids = list(item_ids[start : start + _LOOKUP_ITEMS])
        found = lookup(item_ids=tf.constant(ids))
        right = found["item_ids"].numpy() == np.array([item_id.encode() for item_id in ids], object)
        right &= np.all(found["vectors"].numpy() == vectors[start : start + len(ids)], axis=1)
        if not right.all():
            first = int(np.argmin(right))
            raise IndexBuildError(
                f"{np.sum(~right):,} of {len(ids):,} items of the exported index have another id or "
                f"vector; item {ids[first]!r} came back as {found['item_ids'].numpy()[first].decode()!r}. "
                "The catalogue and the vectors of the index must have the same order."
            )
