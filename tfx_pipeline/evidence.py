"""Reads what the components found out about a model, as the gates want it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from tensorflow_metadata.proto.v0 import anomalies_pb2

from schema.contract import TaskSpec
from schema.errors import DataError
from serving.loadtest import TOTAL
from serving.slo import Slo
from tfx_pipeline.components.infra_validator import LOAD_FILE, REASON_FILE
from tfx_pipeline.config import CUTOFFS, RETRIEVAL
from tfx_pipeline.drift import read_drift
from tfx_pipeline.gates import Evidence, Load
from tfx_pipeline.leakage.findings import LEAKAGE_FILE, LeakageReport, read_report
from tfx_pipeline.tfma_metrics import read_metrics
from trainer import ranking_comparison
from trainer.comparison import read_comparison
from trainer.metrics import metric_key, retrieval_metric_names

INDEX_FACTS = Path("assets.extra") / "index.json"


@dataclasses.dataclass(frozen=True)
class EvidenceSources:
    """Folders of the artifacts.

    Attributes:
      comparison: of ModelComparison.
      evaluation: URI of the Evaluator's evaluation.
      model: exported SavedModel of the candidate.
      infra_blessing: of ServingValidator.
      anomalies: of ExampleValidator, one folder per split.
      drift: of DriftValidator.
      leakage: of LeakageLinter.
    """

    comparison: Path
    evaluation: str
    model: Path
    infra_blessing: Path
    anomalies: Path
    drift: Path
    leakage: Path


def read_evidence(
    model: str, tasks: Sequence[TaskSpec], slo: Slo | None, sources: EvidenceSources
) -> Evidence:
    """Reads everything.

    Args:
      model: `retrieval` or `ranking`.
      tasks: of the ranker.
      slo: of the configuration.
      sources: where it is.

    Raises:
      DataError: comparison or drift are absent or broken.
    """
    load = read_load(sources.infra_blessing / LOAD_FILE)
    reason = (sources.infra_blessing / REASON_FILE).read_text(encoding="utf-8").strip()
    return Evidence(
        comparison=read_comparison(sources.comparison),
        evaluated=_evaluated(model, tasks),
        evaluator=_evaluator(model, sources.evaluation),
        index_recall=_index_recall(sources.model) if model == RETRIEVAL else None,
        # The load comes last: where there was one, all answers were in order.
        serving_reason="" if load else reason,
        slo=slo,
        load=load,
        anomalies={
            split.name.removeprefix("Split-"): _anomalies(split)
            for split in sorted(sources.anomalies.glob("Split-*"))
        },
        drift=read_drift(sources.drift),
        leakage=_leakage(sources.leakage / LEAKAGE_FILE),
    )


def _evaluated(model: str, tasks: Sequence[TaskSpec]) -> list[str]:
    """What the pipeline's `retrieval_eval_config` and `ranking_eval_config` ask for, but for counts."""
    if model == RETRIEVAL:
        return [metric_key(model, name) for name in retrieval_metric_names(CUTOFFS)]
    return ranking_comparison.metric_keys(tasks)


def _evaluator(model: str, evaluation: str) -> dict[str, float | None]:
    return {
        metric_key(model, figure.metric, task=figure.output or None): (
            figure.value if math.isfinite(figure.value) else None
        )
        for figure in read_metrics(evaluation)
        if not figure.slice
    }


def _index_recall(model: Path) -> dict[str, float | None] | None:
    path = model / INDEX_FACTS
    if not path.is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    return {"": facts["recall"], **facts["recall_by_slice"]}


def read_load(path: Path) -> Load | None:
    """Reads what `slo_gate.check_slo` wrote; None where no load was put on the models.

    Raises:
      DataError: an older version wrote it.
    """
    if not path.is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    if "misses" not in facts:
        raise DataError(
            f"{path} was written by an older version; 'funnel run' with the same settings renews it"
        )
    total = facts["result"]["latency_ms"].get(TOTAL)
    return Load(total and total["p99"], facts["misses"])


def _leakage(path: Path) -> LeakageReport | None:
    return read_report(path) if path.is_file() else None


def _anomalies(split: Path) -> list[str]:
    found = anomalies_pb2.Anomalies()
    found.ParseFromString((split / "SchemaDiff.pb").read_bytes())
    texts = [f"{name}: {info.short_description}" for name, info in sorted(found.anomaly_info.items())]
    if found.HasField("dataset_anomaly_info"):
        texts.append(found.dataset_anomaly_info.short_description)
    return texts
