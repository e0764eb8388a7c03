"""How far data moved: TFDV's skew comparators between train and eval, its drift comparators between two runs.

Categorical features are compared by the L-infinity distance, the largest change of the share of one value.
Numbers are compared by the Jensen-Shannon divergence of TFDV's histograms, 0 to 1; their bins are equally
wide, so that a few far outliers can move it without a change: such features are named in `ignored`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_data_validation as tfdv
from tensorflow_metadata.proto.v0 import anomalies_pb2, schema_pb2, statistics_pb2

from schema.contract import DatasetSpec, FeatureKind
from tfx_pipeline.config import DriftConfig
from tfx_pipeline.drift_facts import TRAIN_TO_EVAL, DriftFacts, FeatureDrift
from trainer import features
from trainer.comparison import defined
from trainer.facts_file import read_facts, write_facts

DRIFT_FILE = "drift.json"
# TFDV's findings, beside DRIFT_FILE, as binary protos of tensorflow_metadata: <comparison>.Anomalies.pb.
ANOMALIES_FILE = "{}.Anomalies.pb"


def compared_features(spec: DatasetSpec, config: DriftConfig) -> dict[str, bool]:
    """Features that are compared, each once: name -> whether it is categorical.

    The declared features of users and items that have one value, the surface, and the labels of tasks.
    """
    single = (FeatureKind.CATEGORICAL, FeatureKind.CONTINUOUS)
    declared = [f for f in (*spec.users.features, *spec.items.features) if f.kind in single]
    found = {f.name: f.kind is FeatureKind.CATEGORICAL for f in declared}
    found |= {features.SURFACE: True} if spec.surface_is_mapped else {}
    found |= dict.fromkeys(spec.task_labels, False)
    return {name: kind for name, kind in found.items() if name not in config.ignored}


def drift(
    train: statistics_pb2.DatasetFeatureStatisticsList,
    others: Mapping[str, statistics_pb2.DatasetFeatureStatisticsList],
    schema: schema_pb2.Schema,
    spec: DatasetSpec,
    config: DriftConfig,
    absent: Mapping[str, str],
) -> tuple[DriftFacts, dict[str, anomalies_pb2.Anomalies]]:
    """Compares the train split with others.

    Args:
      train: its statistics.
      others: comparison -> statistics of the other side.
      schema: of the interactions.
      spec: the dataset.
      config: limits, and what is ignored.
      absent: see `DriftFacts`.

    Returns:
      The facts, and TFDV's own findings by comparison.
    """
    compared = compared_features(spec, config)
    found, anomalies = {}, {}
    for name, other in others.items():
        is_skew = name == TRAIN_TO_EVAL
        with_limits = schema_pb2.Schema()
        with_limits.CopyFrom(schema)
        for feature in with_limits.feature:
            if feature.name in compared:
                comparator = feature.skew_comparator if is_skew else feature.drift_comparator
                if compared[feature.name]:
                    comparator.infinity_norm.threshold = config.max_share_change
                else:
                    comparator.jensen_shannon_divergence.threshold = config.max_divergence
        side: dict[str, Any] = {"serving_statistics" if is_skew else "previous_statistics": other}
        anomalies[name] = tfdv.validate_statistics(train, with_limits, **side)
        measured = [
            FeatureDrift(info.path.step[0], defined(measurement.value), measurement.threshold)
            for info in anomalies[name].drift_skew_info
            for measurement in (info.skew_measurements if is_skew else info.drift_measurements)
        ]
        found[name] = tuple(sorted(measured, key=_distance_for_its_limit, reverse=True))
    return DriftFacts(found, absent), anomalies


def _distance_for_its_limit(found: FeatureDrift) -> float:
    return math.inf if found.distance is None else found.distance / found.limit


def write_drift(facts: DriftFacts, anomalies: Mapping[str, anomalies_pb2.Anomalies], folder: Path) -> None:
    """Writes drift.json, and TFDV's findings beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in anomalies.items():
        (folder / ANOMALIES_FILE.format(name)).write_bytes(found.SerializeToString())
    write_facts(facts, folder / DRIFT_FILE)


def read_drift(folder: Path) -> DriftFacts:
    """Reads drift.json.

    Raises:
      DataError: there is none, or it has another form.
    """
    return read_facts(DriftFacts, folder / DRIFT_FILE)
