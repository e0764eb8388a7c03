"""Items as the exported ranker holds them: all that it knows of an item whoever asks, one row each.

A request gathers the rows of its candidates; nothing of an item is looked up, embedded or summed anew.

Letters: I = items, U = requests, N = candidates per request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from schema.errors import ShapeError
from trainer.ranking import EncodedItems


class ItemTable(tf.Module):
    """Encoded items."""

    def __init__(self, items: EncodedItems) -> None:
        """Copies the items.

        Args:
          items: I encoded items, each column [I] or [I, W].

        Raises:
          ShapeError: a column has more dimensions.
        """
        super().__init__()
        columns = tf.nest.flatten(items)
        for column in columns:
            if column.shape.rank not in (1, 2):
                raise ShapeError(
                    f"a column of the encoded items has shape {column.shape}; expected [items] or "
                    "[items, width]: flatten it in RankingModel.encode_items."
                )
        self.numbers = _Matrix([column for column in columns if column.dtype.is_floating], tf.float32)
        self.ids = _Matrix([column for column in columns if not column.dtype.is_floating], tf.int32)
        specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, items)
        # A closure, since a module would track the structure.
        self._specs: Callable[[], EncodedItems] = lambda: specs

    def gather(self, rows: tf.Tensor) -> EncodedItems:
        """The items of some rows, int [U, N]: [U, N, ...] for each [I, ...]; ids are int32."""
        numbers, ids = iter(self.numbers.gather(rows)), iter(self.ids.gather(rows))

        def take(spec: tf.TensorSpec) -> tf.Tensor:
            column = next(numbers if spec.dtype.is_floating else ids)
            return column if spec.shape.rank == 2 else column[..., 0]

        return tf.nest.map_structure(take, self._specs())


class _Matrix(tf.Module):
    """Columns of one type side by side, so that a row is one piece of memory."""

    def __init__(self, columns: Sequence[tf.Tensor], dtype: tf.DType) -> None:
        """Takes columns [I] or [I, W]."""
        super().__init__()
        parts = [tf.cast(tf.reshape(column, [column.shape[0], -1]), dtype) for column in columns]
        self.widths = [part.shape[1] for part in parts]
        self.rows = tf.Variable(tf.concat(parts, axis=1), trainable=False)

    def gather(self, rows: tf.Tensor) -> list[tf.Tensor]:
        """The columns [U, N, W] of rows int [U, N]."""
        return list(tf.split(tf.gather(self.rows, rows), self.widths, axis=-1))
