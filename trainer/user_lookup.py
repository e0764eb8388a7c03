"""What is known of every user, inside an exported model: a request then names the user and no more."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from schema.contract import DatasetSpec
from trainer import features as ft
from trainer import raw_inputs
from trainer.features import RawInput
from trainer.input_pipeline import expand


class UserLookup(tf.Module):
    """Features, history and impressions of all users as of the end of training, as serialized examples.

    Examples keep the raw values: the graph that reads a request reads them, and nothing is transformed
    twice. A few kB per user.
    """

    def __init__(self, user_states: Sequence[str], spec: DatasetSpec) -> None:
        """Reads the users.

        Args:
          user_states: file patterns of user-state examples.
          spec: the declaration.
        """
        super().__init__()
        self._spec = spec
        ids, examples = _read(user_states, spec)
        self.rows = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(ids, tf.range(len(ids), dtype=tf.int64)),
            default_value=len(ids),
        )
        # The last one is that of everybody else.
        self.examples = tf.Variable([*examples, b""], trainable=False, dtype=tf.string)

    def context(self) -> tuple[RawInput, ...]:
        """What a request says of the moment: the query features that are not of the user."""
        declared = {feature.name for feature in self._spec.users.features}
        of_user = {ft.USER_ID, ft.HISTORY, *declared}
        return tuple(raw for raw in ft.raw_query_inputs(self._spec) if raw.name not in of_user)

    def lookup(self, user_ids: tf.Tensor, context: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Raw query features and impressions of B users at B moments.

        Args:
          user_ids: string [B]; an id that is not known has no features, history or impressions.
          context: by name, see `context`; where a value is missing, it is the one that the user had at the
            end of training.

        Returns:
          Tensors as in `raw_inputs.ranking_signature`.
        """
        users = raw_inputs.parse_users(tf.gather(self.examples, self.rows.lookup(user_ids)), self._spec)
        users[ft.USER_ID] = user_ids
        for raw in self.context():
            given, known = context[raw.name], users[raw.name]
            if raw.is_list:
                is_given = tf.reduce_any(given != "", axis=1, keepdims=True)
                width = tf.maximum(tf.shape(given)[1], tf.shape(known)[1])
                given, known = (
                    tf.pad(values, [[0, 0], [0, width - tf.shape(values)[1]]]) for values in (given, known)
                )
            else:
                is_given = tf.not_equal(given, raw_inputs.MISSING[raw.dtype])
            users[raw.name] = tf.where(is_given, given, known)
        del users[ft.SEEN_ITEMS]
        return users


def _read(user_states: Sequence[str], spec: DatasetSpec) -> tuple[list[bytes], list[bytes]]:
    """Ids and examples of all users, without what only the evaluation reads."""
    inputs = (*ft.raw_query_inputs(spec), *ft.raw_impression_inputs(spec))
    read = {raw.name for raw in inputs} - {ft.USER_ID}
    ids, examples = [], []
    for record in tf.data.TFRecordDataset(
        expand(user_states), compression_type="GZIP", num_parallel_reads=1
    ).as_numpy_iterator():
        example = tf.train.Example.FromString(record)
        (user_id,) = example.features.feature[ft.USER_ID].bytes_list.value
        for name in example.features.feature.keys() - read:
            del example.features.feature[name]
        ids.append(user_id)
        examples.append(example.SerializeToString(deterministic=True))
    return ids, examples
