"""The TFX schema, derived from the dataset declaration."""

from __future__ import annotations

from tensorflow_metadata.proto.v0 import schema_pb2

from schema.contract import WATCH_TIME, DatasetSpec, TaskKind
from schema.point_in_time import count_names
from trainer import features

SERVING = "SERVING"
_TYPES = {"string": schema_pb2.BYTES, "int64": schema_pb2.INT, "float32": schema_pb2.FLOAT}
_ALWAYS_PRESENT = frozenset({features.USER_ID, features.ITEM_ID, features.EVENT_TIME})


def interactions_schema(spec: DatasetSpec) -> schema_pb2.Schema:
    """Schema of the interaction examples: types, presence, number of values, label ranges.

    Labels, retrieval_weight and how the impression came about are absent in the SERVING environment.
    """
    schema = schema_pb2.Schema(default_environment=["TRAINING", SERVING])
    inputs = (*features.raw_query_inputs(spec), *features.raw_candidate_inputs(spec))
    for raw in inputs:
        feature = schema.feature.add(name=raw.name, type=_TYPES[raw.dtype])
        if not raw.is_list:
            feature.value_count.max = 1
        if raw.name in _ALWAYS_PRESENT:
            feature.presence.min_fraction = 1.0
            feature.value_count.min = 1
    for raw in features.raw_impression_inputs(spec):
        schema.feature.add(name=raw.name, type=_TYPES[raw.dtype])
    counts = schema.feature.add(name=features.ITEM_COUNTS, type=schema_pb2.FLOAT)
    counts.value_count.min = counts.value_count.max = len(count_names(spec))
    for label in (*features.feature_space(spec).labels, features.RETRIEVAL_WEIGHT):
        feature = schema.feature.add(name=label, type=schema_pb2.FLOAT, not_in_environment=[SERVING])
        feature.value_count.max = 1
        if label in _binary_labels(spec) or label == features.RETRIEVAL_WEIGHT:
            feature.float_domain.min, feature.float_domain.max = 0.0, 1.0
        elif label == WATCH_TIME:
            feature.float_domain.min = 0.0
    for raw in features.raw_logged_inputs(spec):
        logged = schema.feature.add(name=raw.name, type=_TYPES[raw.dtype], not_in_environment=[SERVING])
        logged.value_count.max = 1
    if spec.session_gap_hours is not None:
        prior = schema.feature.add(name=features.PRIOR_SESSIONS, type=schema_pb2.BYTES)
        prior.not_in_environment.append(SERVING)
    return schema


def _binary_labels(spec: DatasetSpec) -> set[str]:
    return {task.label for task in spec.tasks if task.kind is TaskKind.BINARY}
