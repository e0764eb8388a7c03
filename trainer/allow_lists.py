"""Allow-lists: a request names values of an item attribute, and gets only items that have one of them.

Letters: B = requests, I = items, V = distinct values of an attribute, W = values of an item, L = values of a
list.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from trainer.allow_list_inputs import input_name

# Code of "no value" in an item's values; real values start at 1.
_NO_VALUE = 0


class AllowLists(tf.Module):
    """The values of every item in each attribute, and which of them requests allow."""

    def __init__(self, attributes: Mapping[str, np.ndarray]) -> None:
        """Codes the values.

        Args:
          attributes: values of all items by attribute, str [I], or [I, W] where an item has any number of
            values; "" where there is none.
        """
        super().__init__()
        self.attributes = tuple(attributes)
        self._codes: list[tf.Variable] = []
        self._tables: list[tf.lookup.StaticHashTable] = []
        self._shares: list[tf.Variable] = []
        for values in attributes.values():
            matrix = np.asarray(values, dtype=str)
            matrix = matrix[:, np.newaxis] if matrix.ndim == 1 else matrix
            # The first distinct value, "", is no value and gets code 0.
            distinct, codes = np.unique(np.concatenate([[""], matrix.ravel()]), return_inverse=True)
            codes = codes[1:].reshape(matrix.shape).astype(np.int32)
            per_item = np.unique(codes + len(distinct) * np.arange(len(codes))[:, np.newaxis])
            counts = np.bincount(per_item % len(distinct), minlength=len(distinct))
            self._codes.append(tf.Variable(codes, trainable=False))
            keys = tf.lookup.KeyValueTensorInitializer(
                tf.constant(distinct), tf.range(len(distinct), dtype=tf.int32)
            )
            self._tables.append(tf.lookup.StaticHashTable(keys, default_value=_NO_VALUE))
            self._shares.append(tf.Variable((counts / len(codes)).astype(np.float32), trainable=False))

    @property
    def max_values(self) -> int:
        """Values of an item in the attribute that has most of them; 1 without attributes."""
        return max((codes.shape[1] for codes in self._codes), default=1)

    def signature(self) -> dict[str, tf.TensorSpec]:
        """The request inputs: string [B, L] by name."""
        names = map(input_name, self.attributes)
        return {name: tf.TensorSpec([None, None], tf.string, name=name) for name in names}

    def empty_lists(self, num_requests: tf.Tensor) -> dict[str, tf.Tensor]:
        """Inputs that allow everything, for so many requests."""
        return {name: tf.zeros([num_requests, 0], tf.string) for name in map(input_name, self.attributes)}

    def allowed_values(self, lists: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
        """Which values each request allows.

        Args:
          lists: string [B, L] by input name; "" is padding, and a list without any value allows everything. A
            value that no item has allows nothing.

        Returns:
          bool [B, V + 1] for each attribute, by code; code 0 = an item without a value.
        """
        allowed = []
        for attribute, table, shares in zip(self.attributes, self._tables, self._shares, strict=True):
            wanted = lists[input_name(attribute)]
            is_free = tf.reduce_all(wanted == "", axis=1)
            codes = table.lookup(wanted)
            requests = tf.broadcast_to(tf.range(tf.shape(codes)[0])[:, tf.newaxis], tf.shape(codes))
            named = tf.scatter_nd(
                tf.stack([requests, codes], axis=-1),
                tf.cast(codes != _NO_VALUE, tf.int32),
                tf.stack([tf.shape(codes)[0], tf.size(shares)]),
            )
            allowed.append((named > 0) | is_free[:, tf.newaxis])
        return tuple(allowed)

    def passes(self, allowed_values: tuple[tf.Tensor, ...], rows: tf.Tensor) -> tf.Tensor:
        """Whether items have an allowed value in every attribute.

        Args:
          allowed_values: of B requests.
          rows: int32 catalogue rows, [B, N] of each request or [N] for all of them.

        Returns:
          bool [B, N]; without attributes True, in the shape of `rows`.
        """
        passes = tf.ones_like(rows, tf.bool)
        for codes, allowed in zip(self._codes, allowed_values, strict=True):
            values = tf.gather(codes, rows)
            if rows.shape.rank == 1:
                has_allowed = tf.gather(allowed, values, axis=1)
            else:
                has_allowed = tf.gather(allowed, values, batch_dims=1)
            passes &= tf.reduce_any(has_allowed, axis=-1)
        return passes

    def shares(self, allowed_values: tuple[tf.Tensor, ...], num_requests: tf.Tensor) -> tf.Tensor:
        """About which share of the items passes each request's lists: float32 [B], 0 to 1; 1 without lists.

        Values of one attribute are added and attributes are taken as independent.
        """
        shares = tf.ones([num_requests])
        for value_shares, allowed in zip(self._shares, allowed_values, strict=True):
            share = tf.minimum(1.0, tf.linalg.matvec(tf.cast(allowed, tf.float32), value_shares))
            shares *= tf.where(tf.reduce_all(allowed, axis=1), 1.0, share)
        return shares
