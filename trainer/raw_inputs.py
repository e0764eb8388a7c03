"""Raw features as tensors: from serialized examples and requests to the Transform graph and out of it.

Dense everywhere outside: absent strings are "", absent integers -1, absent floats NaN, lists padded on the
right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tensorflow as tf

from schema.contract import DatasetSpec
from schema.point_in_time import count_names
from trainer import features
from trainer.features import RawInput

_DTYPES = {"string": tf.string, "int64": tf.int64, "float32": tf.float32}
_COUNTS = RawInput(features.ITEM_COUNTS, "float32", True)
MISSING: Mapping[str, Any] = {"string": "", "int64": -1, "float32": float("nan")}


def query_signature(spec: DatasetSpec) -> dict[str, tf.TensorSpec]:
    """Tensor specs of the raw query features of a request: [B], or [B, L] for lists."""
    return {
        raw.name: tf.TensorSpec([None, None] if raw.is_list else [None], _DTYPES[raw.dtype], name=raw.name)
        for raw in features.raw_query_inputs(spec)
    }


def transform_query(layer: Any, raw: Mapping[str, tf.Tensor], spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """Raw query features of a request to transformed ones.

    Args:
      layer: `trainer.transform_graph.TransformGraph`.
      raw: tensors as in `query_signature`.
      spec: the declaration.

    Returns:
      Transformed query features by name; lists dense [B, L], padded with 0.
    """
    return _transform(layer, raw, features.raw_query_inputs(spec), features.feature_space(spec).query)


def transform_candidates(layer: Any, raw: Mapping[str, tf.Tensor], spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """Raw candidate features (see `trainer.features.raw_candidate_inputs`) to transformed ones."""
    inputs = [r for r in features.raw_candidate_inputs(spec) if r.name != features.UPLOAD_TIME]
    return _transform(layer, raw, inputs, features.feature_space(spec).candidate)


def candidate_signature(spec: DatasetSpec) -> dict[str, tf.TensorSpec]:
    """Tensor specs of described candidates: [B, N], lists [B, N, L], and ITEM_COUNTS [B, N, C].

    C, the number of `count_names`, is part of the signature: a server that merges requests would make zeros
    of no counts at all, which say that the log was empty, where NaN says that the item was never shown.
    """
    shapes: dict[RawInput, list[int | None]] = {
        raw: [None] * (3 if raw.is_list else 2) for raw in features.raw_candidate_inputs(spec)
    }
    shapes[_COUNTS] = [None, None, len(count_names(spec))]
    return {
        raw.name: tf.TensorSpec(shape, _DTYPES[raw.dtype], name=raw.name) for raw, shape in shapes.items()
    }


def candidate_rows(raw: Mapping[str, tf.Tensor], spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """Described candidates, see `candidate_signature`, one below the other: [B * N], lists [B * N, L].

    Fails where a feature describes another number of candidates than ITEM_ID names.
    """
    shape = tf.shape(raw[features.ITEM_ID])
    rows = {}
    for name in candidate_signature(spec):
        sizes = tf.shape(raw[name])
        check = tf.debugging.assert_equal(
            sizes[:2], shape, f"{name} must describe the candidates that {features.ITEM_ID} names, one each"
        )
        with tf.control_dependencies([check]):
            rows[name] = tf.reshape(raw[name], tf.concat([[shape[0] * shape[1]], sizes[2:]], axis=0))
    return rows


def ranking_signature(spec: DatasetSpec) -> dict[str, tf.TensorSpec]:
    """Tensor specs of a request to the ranker: `query_signature`, and the impressions, lists [B, L]."""
    impressions = {
        raw.name: tf.TensorSpec([None, None], _DTYPES[raw.dtype], name=raw.name)
        for raw in features.raw_impression_inputs(spec)
    }
    return {**query_signature(spec), **impressions}


def transform_request(layer: Any, raw: Mapping[str, tf.Tensor], spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """Raw features of a request to the ranker to transformed ones, by one run of the graph.

    Args:
      layer: `trainer.transform_graph.TransformGraph`.
      raw: tensors as in `ranking_signature`; the impressions' other lists count only where IMPRESSION_ITEMS
        is not "".
      spec: the declaration.

    Returns:
      As `transform_query`; and the user's latest impressions as of the event time, [B, L] each.
    """
    impressions = features.raw_impression_inputs(spec)
    checks = [
        tf.debugging.assert_equal(
            tf.shape(raw[other.name]),
            tf.shape(raw[features.IMPRESSION_ITEMS]),
            f"{other.name} and {features.IMPRESSION_ITEMS} must be lists of the same length",
        )
        for other in impressions[1:]
    ]
    inputs = (*features.raw_query_inputs(spec), *impressions)
    # Else whoever reads the lists side by side may fail first, with an error that does not name them.
    with tf.control_dependencies(checks):
        is_shown = tf.not_equal(raw[features.IMPRESSION_ITEMS], "")
    later = tf.cumsum(tf.cast(is_shown, tf.int32), axis=1, reverse=True)
    places = _places(is_shown & (later <= spec.max_impressions))
    raw = {**raw, **{r.name: _at(places, raw[r.name], r) for r in impressions}}
    transformed = layer({r.name: _to_sparse(raw[r.name], r) for r in inputs})
    query = [name for feature in features.feature_space(spec).query for name in feature.transformed_names]
    return {name: to_dense(transformed[name]) for name in (*query, *features.impression_names(spec))}


def _places(counts: tf.Tensor) -> tf.Tensor:
    """Where the values that count stand in lists, bool [B, L]: int64 [B, W] from 1, 0 behind the last one.

    The ranker compares impressions in time and memory that grow with the square of W. So W is the largest
    number of values that count, however far from one another they stand in what a request sends.
    """
    found = tf.where(counts)
    before = tf.gather_nd(tf.cumsum(tf.cast(counts, tf.int64), axis=1, exclusive=True), found)
    number = tf.math.count_nonzero(counts, axis=1)
    # Of no requests at all there is no largest number.
    width = tf.maximum(tf.reduce_max(number), 0)
    shape = tf.stack([tf.size(number, tf.int64), width])
    return tf.scatter_nd(tf.stack([found[:, 0], before], axis=1), found[:, 1] + 1, shape)


def _at(places: tf.Tensor, values: tf.Tensor, raw: RawInput) -> tf.Tensor:
    """The values of lists, [B, L], that stand at the places, [B, W]."""
    behind_missing = tf.pad(values, [[0, 0], [1, 0]], constant_values=MISSING[raw.dtype])
    return tf.gather(behind_missing, places, batch_dims=1)


def transform_counts(layer: Any, counts: tf.Tensor) -> dict[str, tf.Tensor]:
    """Counters and label means of raw counts, float32 [M, C], NaN where a row has none."""
    transformed = layer({_COUNTS.name: _to_sparse(counts, _COUNTS)})
    return {name: to_dense(transformed[name]) for name in features.COUNTER_NAMES}


def transform_cross(
    layer: Any, event_time_unix_s: tf.Tensor, upload_time_unix_s: tf.Tensor, spec: DatasetSpec
) -> dict[str, tf.Tensor]:
    """Features of item and request time together, both int64 [M]; none if the dataset has no upload time."""
    space = features.feature_space(spec)
    if not space.cross:
        return {}
    inputs = (RawInput(features.EVENT_TIME, "int64", False), RawInput(features.UPLOAD_TIME, "int64", False))
    raw = {features.EVENT_TIME: event_time_unix_s, features.UPLOAD_TIME: upload_time_unix_s}
    return _transform(layer, raw, inputs, space.cross)


def compiled(
    transform: Callable[[Any, Mapping[str, tf.Tensor], DatasetSpec], dict[str, tf.Tensor]],
    layer: Any,
    spec: DatasetSpec,
) -> Callable[[Mapping[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """`transform_query` or `transform_candidates` as one graph, for many batches outside a model."""
    return tf.function(lambda raw: transform(layer, raw, spec), autograph=False, reduce_retracing=True)


def _transform(
    layer: Any, raw: Mapping[str, tf.Tensor], inputs: Iterable[RawInput], wanted: Iterable[features.Feature]
) -> dict[str, tf.Tensor]:
    transformed = layer({r.name: _to_sparse(raw[r.name], r) for r in inputs})
    names = [name for feature in wanted for name in feature.transformed_names]
    return {name: to_dense(transformed[name]) for name in names}


def to_dense(tensor: tf.Tensor | tf.SparseTensor) -> tf.Tensor:
    """A transformed feature as a dense tensor, lists padded with 0."""
    return tf.sparse.to_dense(tensor) if isinstance(tensor, tf.SparseTensor) else tensor


def _to_sparse(values: tf.Tensor, raw: RawInput) -> tf.SparseTensor:
    """Drops the values that stand for absence, and of a list all but the latest `raw.max_values`."""
    matrix = values if raw.is_list else values[:, tf.newaxis]
    if raw.dtype == "string":
        present = tf.not_equal(matrix, "")
    elif raw.dtype == "int64":
        present = matrix >= 0
    else:
        present = ~tf.math.is_nan(matrix)
    if raw.max_values is not None:
        present &= tf.cumsum(tf.cast(present, tf.int32), axis=1, reverse=True) <= raw.max_values
    places = tf.where(present)
    return tf.SparseTensor(places, tf.gather_nd(matrix, places), tf.shape(matrix, out_type=tf.int64))


def parse_interaction_examples(serialized: tf.Tensor, spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """Raw features of serialized interaction examples, string [B], as in a request to the ranker.

    Those of query and candidate, the impressions, and ITEM_COUNTS float32 [B, C].
    """
    query = (*features.raw_query_inputs(spec), *features.raw_impression_inputs(spec))
    return _parse(serialized, (*query, *features.raw_candidate_inputs(spec), _COUNTS))


def parse_candidate_examples(serialized: tf.Tensor, spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """Raw candidate features of serialized catalogue examples, string [B], and ITEM_COUNTS float32 [B, C]."""
    return _parse(serialized, (*features.raw_candidate_inputs(spec), _COUNTS))


def parse_user_state_examples(serialized: tf.Tensor, spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """Raw query features and held-out and seen ids (string [B, L]) of serialized user states, string [B]."""
    held_out = (features.EVAL_ITEMS, features.TEST_ITEMS, features.SEEN_ITEMS)
    return _parse(
        serialized, (*features.raw_query_inputs(spec), *(RawInput(name, "string", True) for name in held_out))
    )


def parse_users(serialized: tf.Tensor, spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """What serialized user states, string [B], say for a request; and the ids seen, string [B, L]."""
    seen = RawInput(features.SEEN_ITEMS, "string", True)
    query = (*features.raw_query_inputs(spec), *features.raw_impression_inputs(spec))
    return _parse(serialized, (*query, seen))


def _parse(serialized: tf.Tensor, inputs: Iterable[RawInput]) -> dict[str, tf.Tensor]:
    inputs = list(inputs)
    parsed = tf.io.parse_example(serialized, {r.name: tf.io.VarLenFeature(_DTYPES[r.dtype]) for r in inputs})
    outputs = {}
    for raw in inputs:
        sparse = parsed[raw.name]
        if not raw.is_list:
            # At most one value: the first, as Transform takes it.
            sparse = tf.sparse.slice(
                tf.sparse.reset_shape(sparse, tf.maximum(sparse.dense_shape, [1, 1])),
                [0, 0],
                [sparse.dense_shape[0], 1],
            )
            outputs[raw.name] = tf.squeeze(
                tf.sparse.to_dense(sparse, default_value=MISSING[raw.dtype]), axis=1
            )
        else:
            outputs[raw.name] = tf.sparse.to_dense(sparse, default_value=MISSING[raw.dtype])
    return outputs
