"""The Transform graph: the only place where raw values are changed.

It runs in Beam over the training examples and, unchanged, inside every exported model.
"""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf
import tensorflow_transform as tft

from schema.contract import DatasetSpec, FeatureKind, dataset_spec_from_json
from schema.point_in_time import count_names
from trainer import features

_SECONDS_PER_HOUR = 3_600
_SECONDS_PER_DAY = 86_400
_HOURS = 24
_DAYS = 7
# 1970-01-01 was a Thursday; Monday is day 0.
_EPOCH_DAY_OF_WEEK = 3
# Rank error of the quantile sketch relative to the number of rows.
_QUANTILE_EPSILON = 0.001


def preprocessing_fn(
    inputs: Mapping[str, tf.SparseTensor], custom_config: Mapping[str, object]
) -> dict[str, tf.Tensor | tf.SparseTensor]:
    """Raw example columns to model inputs.

    Args:
      inputs: every raw feature as a sparse [B, L] tensor; an absent value has no entry.
      custom_config: "dataset", the declaration as JSON, and "train_end_unix_s", the end of training.

    Returns:
      For each feature its transformed names (see trainer.features.Feature); for each label and for
      retrieval_weight a float32 [B] with NaN where absent; DAYS_TO_END int64 [B]; PRIOR_SESSIONS_IDS, as the
      history, for datasets with session_gap_hours; what is logged of the impression (position int64 [B], -1
      where absent; exploration and propensity float32 [B], NaN where absent); COUNTERS and LABEL_MEANS,
      float32 [B, C] and [B, L]; the impressions, sparse: ids, ages in seconds (int64) and labels (float32, 0
      where missing).
    """
    spec = dataset_spec_from_json(str(custom_config["dataset"]))
    space = features.feature_space(spec)
    outputs: dict[str, tf.Tensor | tf.SparseTensor] = {}

    event_time = _scalar(inputs[features.EVENT_TIME], -1)
    outputs.update(_clock(event_time, spec, int(str(custom_config["train_end_unix_s"]))))
    if space.cross:
        upload_time = _scalar(inputs[features.UPLOAD_TIME], -1)
        known = (event_time >= 0) & (upload_time >= 0)
        age = tf.cast(tf.maximum(event_time - upload_time, 0), tf.float32) / _SECONDS_PER_DAY
        outputs.update(
            _quantile_normalised(tf.where(known, age, float("nan")), space.find(features.ITEM_AGE))
        )

    clock = {f.name for f in features.CLOCK_FEATURES}
    # A space is learnt from its first feature, candidates before queries.
    learnt_spaces: dict[str, str] = {}
    # The candidate side is first: the item vocabulary is learnt from shown items and shared with histories.
    for feature in space.candidate + space.query:
        if feature.name in clock:
            continue
        raw = inputs[feature.name]
        if feature.kind is FeatureKind.CONTINUOUS:
            outputs.update(_quantile_normalised(_scalar(raw, float("nan")), feature))
            continue
        if feature.kind is FeatureKind.TEXT:
            raw = _words(raw)
        if feature.space not in learnt_spaces:
            learnt_spaces[feature.space] = tft.vocabulary(raw, vocab_filename=feature.space)
        ids = _ids(raw, learnt_spaces[feature.space])
        outputs[feature.id_name] = ids if feature.is_list else _scalar(ids, features.PADDING_ID)

    if spec.session_gap_hours is not None:
        item_vocabulary = learnt_spaces[features.ITEM_SPACE]
        outputs[features.PRIOR_SESSIONS_IDS] = _ids(inputs[features.PRIOR_SESSIONS], item_vocabulary)
    for label in (*space.labels, features.RETRIEVAL_WEIGHT):
        outputs[label] = _scalar(inputs[label], float("nan"))
    for logged in features.raw_logged_inputs(spec):
        missing = -1 if logged.dtype == "int64" else float("nan")
        outputs[logged.name] = _scalar(inputs[logged.name], missing)
    outputs.update(_counters(inputs[features.ITEM_COUNTS], spec))
    surfaces = learnt_spaces.get(features.SURFACE)
    outputs.update(_impressions(inputs, event_time, learnt_spaces[features.ITEM_SPACE], surfaces, spec))
    return outputs


def vocabulary_sizes(transform_output: tft.TFTransformOutput, spec: DatasetSpec) -> dict[str, int]:
    """Number of ids per vocabulary space, padding and OOV included."""
    sizes = {
        features.HOUR_OF_DAY: _HOURS + features.FIRST_VOCABULARY_ID,
        features.DAY_OF_WEEK: _DAYS + features.FIRST_VOCABULARY_ID,
    }
    for feature in features.feature_space(spec).all:
        if feature.is_categorical and feature.space not in sizes:
            size = transform_output.vocabulary_size_by_name(feature.space)
            sizes[feature.space] = size + features.FIRST_VOCABULARY_ID
    return sizes


def _scalar(values: tf.SparseTensor, missing: float | int | str) -> tf.Tensor:
    """Dense [B] from sparse [B, <=1]; rows without a value get `missing`."""
    narrow = tf.SparseTensor(values.indices, values.values, [values.dense_shape[0], 1])
    return tf.squeeze(tf.sparse.to_dense(narrow, default_value=missing), axis=1)


def _clock(event_time: tf.Tensor, spec: DatasetSpec, train_end_unix_s: int) -> dict[str, tf.Tensor]:
    """Hour of day and day of week of the users' local time, and the example's age."""
    hour_of_day, day_of_week, example_age = features.CLOCK_FEATURES
    local = event_time + int(spec.utc_offset_hours * _SECONDS_PER_HOUR)
    hour = (local // _SECONDS_PER_HOUR) % _HOURS
    day = (local // _SECONDS_PER_DAY + _EPOCH_DAY_OF_WEEK) % _DAYS
    known = event_time >= 0
    seconds_to_end = tf.where(known, tf.maximum(train_end_unix_s - event_time, 0), 0)
    # Zero for every request after training: the model is asked about the end of its window (Covington, 3.3).
    age = tf.cast(seconds_to_end, tf.float32) / _SECONDS_PER_DAY
    outputs = {
        features.DAYS_TO_END: (seconds_to_end + _SECONDS_PER_DAY - 1) // _SECONDS_PER_DAY,
        hour_of_day.id_name: tf.where(known, hour + features.FIRST_VOCABULARY_ID, features.PADDING_ID),
        day_of_week.id_name: tf.where(known, day + features.FIRST_VOCABULARY_ID, features.PADDING_ID),
    }
    outputs.update(_quantile_normalised(age, example_age))
    return outputs


def _counters(counts: tf.SparseTensor, spec: DatasetSpec) -> dict[str, tf.Tensor]:
    """Impressions and smoothed rates of counts, each as the share of training values at or below.

    A rate is (sum + s * mean) / (impressions + s), where the mean is that of the log so far and s the
    smoothing: what few impressions say is drawn to what is usual.
    """
    names = count_names(spec)
    dense = tf.sparse.to_dense(
        tf.SparseTensor(counts.indices, counts.values, [counts.dense_shape[0], len(names)])
    )
    table = tf.reshape(dense, [-1, len(names) // (1 + len(spec.task_labels)), 1 + len(spec.task_labels)])
    log, impressions, sums = table[:, :1], table[:, 1:, :1], table[:, 1:, 1:]
    means = log[..., 1:] / tf.maximum(log[..., :1], 1.0)
    smoothing = spec.counters.smoothing
    rates = (sums + smoothing * means) / (impressions + smoothing)
    width = len(names) - (1 + len(spec.task_labels))
    values = tf.reshape(tf.concat([impressions, rates], axis=-1), [-1, width])
    boundaries = tft.quantiles(
        values, features.NUM_BUCKETS, _QUANTILE_EPSILON, reduce_instance_dims=False, name="counter_quantiles"
    )
    return {
        features.COUNTERS: _interpolated_cdf(values, tf.reshape(boundaries, [width, -1])),
        features.LABEL_MEANS: tf.squeeze(means, axis=1),
    }


def _interpolated_cdf(values: tf.Tensor, boundaries: tf.Tensor) -> tf.Tensor:
    """The share of training values at or below each value, linear between the quantiles of its column.

    Args:
      values: float32 [B, C].
      boundaries: float32 [C, Q], the inner quantiles of each column, ascending.

    Returns:
      float32 [B, C]: 0 below the first quantile, 1 from the last on.
    """
    last = tf.shape(boundaries)[1] - 1
    columns = tf.transpose(values)
    above = tf.searchsorted(boundaries, columns, side="right")
    upper = tf.clip_by_value(above, 1, tf.maximum(last, 1))
    low = tf.gather(boundaries, tf.minimum(upper - 1, last), batch_dims=1)
    high = tf.gather(boundaries, tf.minimum(upper, last), batch_dims=1)
    within = tf.math.divide_no_nan(columns - low, high - low)
    position = tf.cast(upper - 1, tf.float32) + tf.clip_by_value(within, 0.0, 1.0)
    share = position / tf.cast(tf.maximum(last, 1), tf.float32)
    return tf.transpose(tf.where(above == 0, 0.0, tf.where(above > last, 1.0, share)))


def _impressions(
    inputs: Mapping[str, tf.SparseTensor],
    event_time: tf.Tensor,
    item_vocabulary: str,
    surface_vocabulary: str | None,
    spec: DatasetSpec,
) -> dict[str, tf.SparseTensor]:
    """The user's latest impressions: ids, seconds before the example's event, and labels."""
    outputs = {features.IMPRESSION_IDS: _ids(inputs[features.IMPRESSION_ITEMS], item_vocabulary)}
    if surface_vocabulary is not None:
        surfaces = inputs[features.IMPRESSION_SURFACES]
        ids = _ids(surfaces, surface_vocabulary)
        given = tf.where(tf.equal(surfaces.values, ""), tf.zeros_like(ids.values), ids.values)
        outputs[features.IMPRESSION_SURFACE_IDS] = ids.with_values(given)
    times = inputs[features.IMPRESSION_TIMES]
    ages = tf.maximum(tf.gather(event_time, times.indices[:, 0]) - times.values, 0)
    outputs[features.IMPRESSION_AGES] = times.with_values(ages)
    for label in spec.task_labels:
        name = features.impression_label(label)
        values = inputs[name].values
        outputs[name] = inputs[name].with_values(tf.where(tf.math.is_nan(values), 0.0, values))
    return outputs


def _words(text: tf.SparseTensor) -> tf.SparseTensor:
    """Lower-case words of a sparse [B, <=1] text as sparse [B, L]."""
    dense = tf.strings.lower(_scalar(text, ""), encoding="utf-8")
    cleaned = tf.strings.regex_replace(dense, r"[^\pL\pN]+", " ")
    return tf.strings.split(tf.strings.strip(cleaned)).to_sparse()


def _ids(values: tf.SparseTensor, vocabulary: str) -> tf.SparseTensor:
    """Vocabulary ids of sparse strings: OOV_ID if unknown; the vocabulary starts at FIRST_VOCABULARY_ID."""
    index = tft.apply_vocabulary(
        values, vocabulary, default_value=features.OOV_ID - features.FIRST_VOCABULARY_ID
    )
    return tf.SparseTensor(index.indices, index.values + features.FIRST_VOCABULARY_ID, index.dense_shape)


def _quantile_normalised(x: tf.Tensor, feature: features.Feature) -> dict[str, tf.Tensor]:
    """The share of training values at or below x, and x's quantile bucket.

    Args:
      x: float32 [B]; NaN is missing.
      feature: names the outputs.

    Returns:
      cdf float32 [B] in [0, 1], 0 where missing; bucket int64 [B] in 1..NUM_BUCKETS, 0 where missing.
    """
    finite = tf.math.is_finite(x)
    boundaries = tft.quantiles(
        tf.boolean_mask(x, finite),
        features.NUM_BUCKETS,
        epsilon=_QUANTILE_EPSILON,
        name=f"{feature.name}_quantiles",
    )
    value = tf.where(finite, x, 0.0)
    cdf = tft.apply_buckets_with_interpolation(value, boundaries)
    bucket = tft.apply_buckets(value, boundaries) + 1
    return {
        feature.cdf_name: tf.where(finite, tf.clip_by_value(cdf, 0.0, 1.0), 0.0),
        feature.bucket_name: tf.where(finite, bucket, 0),
    }
