"""How a user's impressions went, for many candidates of a request: `PastOutcomes` in another order.

The layer compares every candidate with every impression, which is fine for the one candidate of a training
row. Here impressions are first grouped by each value of a key, and candidates look the groups of their values
up. Where items have one value, the groups are added up before. Where they have several, an impression that
shares two of them counts once: the groups of a candidate's values are joined, and then added up.

Letters: U = requests, N = candidates per request, L = impressions, T = values of a key per item, V = values
of all keys per item, C = what is summed, P = places of values: L times V, and one more that no impression
has.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import tensorflow as tf

from trainer import features as ft
from trainer.impressions import Impressions, PastOutcomes


def request_outcomes(
    layer: PastOutcomes,
    impressions: Impressions,
    surface: tf.Tensor | None,
    candidates: Mapping[str, tf.Tensor],
    label_means: tf.Tensor,
) -> tf.Tensor:
    """As `layer(impressions, surface, candidates, label_means)`, up to rounding.

    Run eagerly it is the layer itself: so golden requests compare the two forms. So it is for the one
    candidate of a training row, for which nothing needs to be grouped, and for candidates that a request
    describes, which have any number of values.

    Args:
      layer: of the model.
      impressions: see `PastOutcomes.call`, as the following ones.
      surface: int [U] or None.
      candidates: int [U, N, T] by key.
      label_means: float32 [U, N, S].

    Returns:
      float32 [U, N, D].
    """
    is_grouped = label_means.shape[1] != 1 and all(ids.shape[2] is not None for ids in candidates.values())
    if tf.executing_eagerly() or not is_grouped:
        return layer(impressions, surface, candidates, label_means)
    return layer.describe(
        impressions, surface, _of_keys(impressions, layer.summands(impressions), candidates), label_means
    )


def _of_keys(impressions: Impressions, summands: tf.Tensor, candidates: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """What `PastOutcomes.describe` reads of the impressions that share a key with a candidate.

    Args:
      impressions: of U users.
      summands: float32 [U, L, C].
      candidates: int [U, N, T] by key, K keys.

    Returns:
      float32 [U, N, K, C + 1].
    """
    shown = [impressions.keys[key] for key in candidates]
    theirs, mine = _coded(shown), _coded(list(candidates.values()))
    num_users, length = tf.unstack(tf.shape(theirs)[:2])
    # No candidate has the value -1, and no impression that of the last place.
    theirs = tf.where(theirs >= ft.FIRST_VOCABULARY_ID * len(candidates), theirs, -1)
    listed = tf.reshape(theirs, [num_users, length * theirs.shape[2]])
    ordered = tf.pad(tf.sort(listed), [[0, 0], [0, 1]], constant_values=tf.int32.max)
    # The place of a value is the first one that holds it.
    places = tf.reshape(tf.searchsorted(ordered, listed), tf.shape(theirs))
    nowhere = length * theirs.shape[2]
    found = tf.searchsorted(ordered, tf.reshape(mine, [num_users, tf.shape(mine)[1] * mine.shape[2]]))
    found = tf.reshape(found, tf.shape(mine))
    found = tf.where(tf.gather(ordered, found, batch_dims=1) == mine, found, nowhere)

    # Places of different requests are told apart.
    places += (nowhere + 1) * tf.range(num_users)[:, tf.newaxis, tf.newaxis]
    shape = [num_users, nowhere + 1]
    of_values = tf.gather(_added_up(impressions, summands, places, shape), found, batch_dims=1)
    their_widths, my_widths = ([v.shape[2] for v in keys] for keys in (shown, candidates.values()))
    by_key = zip(
        tf.split(places, their_widths, axis=2),
        tf.split(found, my_widths, axis=2),
        tf.split(of_values, my_widths, axis=2),
        strict=True,
    )
    of_keys = []
    for key_places, key_found, of_key in by_key:
        if key_places.shape[2] == key_found.shape[2] == 1:
            of_keys.append(of_key[:, :, 0])
        else:
            sums = tf.matmul(_joined(key_places, key_found, shape), summands)
            of_keys.append(tf.concat([sums, tf.reduce_max(of_key[..., -1:], axis=2)], axis=-1))
    return tf.stack(of_keys, axis=2)


def _coded(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Ids of each key, int [U, X, T], side by side, int32 [U, X, V]; those of different keys differ."""
    coded = [tf.cast(ids, tf.int32) * len(values) + number for number, ids in enumerate(values)]
    return tf.concat(coded, axis=2)


def _added_up(
    impressions: Impressions, summands: tf.Tensor, places: tf.Tensor, shape: Sequence[tf.Tensor]
) -> tf.Tensor:
    """The impressions of each value, added up: float32 [U, P, C + 1].

    Args:
      impressions: of U users.
      summands: float32 [U, L, C].
      places: int32 [U, L, V], counted over all users.
      shape: U and P.
    """
    num_values, num_sums = places.shape[2], summands.shape[2]
    segments, count = tf.reshape(places, [-1]), shape[0] * shape[1]
    summands = tf.reshape(tf.repeat(summands, num_values, axis=1), [tf.size(segments), num_sums])
    recency = tf.reshape(tf.repeat(1.0 - impressions.log_age, num_values, axis=1), [-1, 1])
    sums = tf.math.unsorted_segment_sum(summands, segments, count)
    # The largest of nothing is far below 0.
    latest = tf.maximum(tf.math.unsorted_segment_max(recency, segments, count), 0.0)
    return tf.reshape(tf.concat([sums, latest], axis=1), [*shape, num_sums + 1])


def _joined(places: tf.Tensor, found: tf.Tensor, shape: Sequence[tf.Tensor]) -> tf.Tensor:
    """Which impressions have one of the values of a candidate: float32 [U, N, L], 0 or 1.

    Args:
      places: int32 [U, L, T], of the values of the impressions, counted over all users.
      found: int32 [U, N, T], of the values of the candidates, counted for each user.
      shape: U and P.
    """
    length = tf.shape(places)[1]
    numbers = tf.broadcast_to(tf.range(length)[:, tf.newaxis], tf.shape(places))
    members = tf.scatter_nd(
        tf.reshape(tf.stack([places, numbers], axis=-1), [-1, 2]),
        tf.ones([tf.size(places)]),
        [shape[0] * shape[1], length],
    )
    # An item may name a value twice.
    members = tf.reshape(tf.minimum(members, 1.0), [*shape, length])
    # Value by value: a reduction over an axis in the middle takes several times as long.
    groups = (tf.gather(members, place, batch_dims=1) for place in tf.unstack(found, axis=2))
    return functools.reduce(tf.maximum, groups)
