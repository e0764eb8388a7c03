"""The table of encoded items gives back what was put in, row by row."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from schema.errors import ShapeError
from trainer.item_table import ItemTable
from trainer.ranking import EncodedItems

ITEMS = EncodedItems(
    features=(tf.constant([[1.0], [2.0], [3.0]]), tf.constant([[4.0, 5.0], [6.0, 7.0], [8.0, 9.0]])),
    counters=tf.constant([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]),
    embedding=tf.constant([[-1.0], [-2.0], [-3.0]]),
    values={"tag": tf.constant([[2, 0], [3, 4], [5, 0]]), "creator": tf.constant([[7], [8], [9]], tf.int64)},
    key_embedding=tf.zeros([3, 0]),
    label_means=tf.constant([[0.5], [0.5], [0.0]]),
    ids={"length_bucket": tf.constant([11, 12, 13], tf.int64)},
)


def test_every_column_of_the_rows_asked_for_comes_back_in_its_shape() -> None:
    rows = np.array([[2, 0], [1, 1]])
    got = ItemTable(ITEMS).gather(tf.constant(rows))
    tf.nest.assert_same_structure(got, ITEMS)
    for column, expected in zip(tf.nest.flatten(got), tf.nest.flatten(ITEMS), strict=True):
        np.testing.assert_array_equal(column, expected.numpy()[rows])


def test_a_column_that_would_lose_its_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"shape \(3, 2, 4\); expected \[items\] or \[items, width\]"):
        ItemTable(ITEMS._replace(counters=tf.zeros([3, 2, 4])))


def test_table_is_two_matrices_in_an_exported_model(tmp_path: Path) -> None:
    table = ItemTable(ITEMS)
    tf.saved_model.save(table, str(tmp_path))
    saved = {
        name: shape for name, shape in tf.train.list_variables(str(tmp_path / "variables" / "variables"))
    }
    assert [3, 7] in saved.values() and [3, 4] in saved.values()
    assert len([shape for shape in saved.values() if len(shape) == 2]) == 2
