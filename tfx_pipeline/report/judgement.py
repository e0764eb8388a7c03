"""What the comparison and the gates found, in the form of the report's facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tfx_pipeline.config import RETRIEVAL
from tfx_pipeline.gates import Verdict, read_validation
from tfx_pipeline.report.facts import COLD_USERS, Evaluation, Figure, GateFailure
from trainer.comparison import LAST_BLESSED, Comparison, SliceResult, read_comparison


def read_evaluation(comparison: Path, blessing: Path) -> Evaluation:
    """Figures of the candidate and of the last blessed model, and the gates that failed.

    Args:
      comparison: folder of comparison.json.
      blessing: folder of gates.json.

    Raises:
      DataError: one of them is absent or broken.
    """
    found, validation = read_comparison(comparison), read_validation(blessing)
    candidate = [
        Figure(part.name, metric.key, metric.value, metric.low, metric.high)
        for part in found.slices
        for metric in part.metrics
    ]
    blessed = [
        Figure(part.name, metric.key, metric.against[LAST_BLESSED].value)
        for part in found.slices
        for metric in part.metrics
        if LAST_BLESSED in metric.against
    ]
    failures = [
        GateFailure(gate.metric or gate.name, gate.value, gate.kind == "no_worse", gate.limit)
        for gate in validation.gates
        if gate.verdict is Verdict.FAILED
    ]
    return Evaluation(tuple(candidate), tuple(blessed), tuple(failures))


def write_baselines(comparisons: Mapping[str, Path], tasks: tuple[str, ...], path: Path) -> None:
    """Writes the figures of the baselines as `tfx_pipeline.report.collect` reads them."""
    retrieval = read_comparison(comparisons[RETRIEVAL])
    (ranking,) = (read_comparison(folder) for name, folder in comparisons.items() if name != RETRIEVAL)
    cold = [part for part in retrieval.slices if part.name == COLD_USERS]
    values = {
        "retrieval": _baselines(retrieval, retrieval.whole),
        "retrieval_cold_users": _baselines(retrieval, cold[0]) if cold else {},
        "ranking": {
            task: {
                name: {key: value for key, value in figures.items() if f"/{task}/" in key}
                for name, figures in _baselines(ranking, ranking.whole).items()
            }
            for task in tasks
        },
    }
    path.write_text(json.dumps(values), encoding="utf-8")


def _baselines(comparison: Comparison, part: SliceResult) -> dict[str, dict[str, float | None]]:
    """Baseline -> metric key -> value, of the metrics that it has."""
    return {
        rival.name: {
            metric.key: metric.against[rival.name].value
            for metric in part.metrics
            if rival.name in metric.against
        }
        for rival in comparison.rivals
        if rival.name != LAST_BLESSED
    }
