"""Compares the train split's statistics with those of eval, and with those of the last run's train split."""

# No postponed annotations here: TFX reads the types of the component function.
from pathlib import Path

import tensorflow_data_validation as tfdv
from tensorflow_metadata.proto.v0 import statistics_pb2
from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.artifact import Artifact
from tfx.types.standard_artifacts import ExampleStatistics, Schema

from schema.contract import dataset_spec_from_json
from tfx_pipeline.config import DriftConfig
from tfx_pipeline.drift import drift, write_drift
from tfx_pipeline.drift_facts import LAST_RUN, TRAIN_TO_EVAL, DriftFacts


class Drift(Artifact):
    """A folder with drift.json, and TFDV's findings beside it."""

    TYPE_NAME = "funnel.Drift"


@component
def DriftValidator(
    statistics: InputArtifact[ExampleStatistics],
    schema: InputArtifact[Schema],
    drift_facts: OutputArtifact[Drift],
    dataset: Parameter[str],
    config: Parameter[str],
    code_version: Parameter[str],
    last_statistics: InputArtifact[ExampleStatistics] = None,
) -> None:
    """Writes how far the data moved.

    Args:
      statistics: of this run.
      schema: of the interactions.
      drift_facts: the result.
      dataset: the declaration, as JSON.
      config: a DriftConfig, as JSON; "" compares nothing.
      code_version: not read: it is there for the cache.
      last_statistics: of the last run on other examples; None when there is none.
    """
    if not config:
        off = dict.fromkeys((TRAIN_TO_EVAL, LAST_RUN), "switched off")
        write_drift(DriftFacts({}, off), {}, Path(drift_facts.uri))
        return
    train = _load(statistics, "train")
    others, absent = {TRAIN_TO_EVAL: _load(statistics, "eval")}, {}
    if last_statistics is None:
        absent[LAST_RUN] = "there was no run on other data before"
    else:
        others[LAST_RUN] = _load(last_statistics, "train")
    declared = tfdv.load_schema_text(f"{schema.uri}/schema.pbtxt")
    settings = DriftConfig.model_validate_json(config)
    spec = dataset_spec_from_json(dataset)
    facts, anomalies = drift(train, others, declared, spec, settings, absent)
    write_drift(facts, anomalies, Path(drift_facts.uri))


def _load(statistics: ExampleStatistics, split: str) -> statistics_pb2.DatasetFeatureStatisticsList:
    return tfdv.load_stats_binary(f"{statistics.uri}/Split-{split}/FeatureStats.pb")
