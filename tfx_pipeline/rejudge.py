"""Judges the models of a finished run again, from its artifacts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from schema.errors import DataError
from tfx_pipeline.config import CUTOFFS, RETRIEVAL, RunPaths
from tfx_pipeline.evaluation import (
    EvaluationSettings,
    Judgement,
    evaluation_settings,
    judge_ranking,
    judge_retrieval,
    read_tables,
)
from tfx_pipeline.evidence import EvidenceSources, read_evidence
from tfx_pipeline.gates import Validation, judge
from tfx_pipeline.outcome import read_artifact_uris
from tfx_pipeline.retraining import retrained
from tfx_pipeline.run_result import RunResult
from trainer.comparison import Comparison

_SAVED_MODEL = "Format-Serving"


def judge_again(model: str, run: RunResult, paths: RunPaths) -> tuple[Comparison, Validation]:
    """Compares a model of the last run once more, and applies the gates of its configuration.

    Args:
      model: `retrieval` or `ranking`.
      run: the finished run.
      paths: its folders.

    Raises:
      DataError: an artifact is gone.
      ServingError: the model does not answer.
    """
    uris = _uris(paths)
    candidate = Path(uris[f"Trainer.{model}", "model"]) / _SAVED_MODEL
    blessed = uris.get((f"LatestBlessed.{model}", "model"))
    settings = evaluation_settings(run.config)
    last_blessed = None if blessed is None else Path(blessed) / _SAVED_MODEL
    judgement = _judge(model, run, uris, candidate, last_blessed, settings, with_baselines=True)
    evidence = read_evidence(
        model,
        run.config.dataset.tasks,
        run.config.slo,
        EvidenceSources(
            comparison=Path(uris[f"Comparison.{model}", "comparison"]),
            evaluation=uris[f"Evaluator.{model}", "evaluation"],
            model=candidate,
            infra_blessing=Path(uris["ServingValidator", "blessing"]),
            anomalies=Path(uris["ExampleValidator", "anomalies"]),
            drift=Path(uris["DriftValidator", "drift_facts"]),
            leakage=Path(uris["LeakageLinter", "leakage"]),
        ),
    )
    evidence = dataclasses.replace(evidence, comparison=judgement.comparison)
    config = run.config
    return judgement.comparison, judge(evidence, config.gates, config.validation, config.dataset.tasks)


def figures_of_seed(model: str, run: RunResult, paths: RunPaths, seed: int) -> dict[str, float | None]:
    """Metric key -> value on the whole test split of a model trained on the run's examples with a seed."""
    settings = EvaluationSettings(CUTOFFS)
    with retrained(model, run, paths, {"seed": seed}) as (folder, _):
        judgement = _judge(model, run, _uris(paths), folder, None, settings, with_baselines=False)
    return {metric.key: metric.value for metric in judgement.comparison.whole.metrics}


def _judge(
    model: str,
    run: RunResult,
    uris: dict[tuple[str, str], str],
    candidate: Path,
    last_blessed: Path | None,
    settings: EvaluationSettings,
    with_baselines: bool,
) -> Judgement:
    tables = read_tables(Path(run.tables_dir), run.config.dataset)
    if model == RETRIEVAL:
        states = [f"{uris['UserStateGen', 'examples']}/Split-user_states/*.gz"]
        return judge_retrieval(tables, states, candidate, last_blessed, settings, with_baselines)
    rows = [f"{uris['InteractionGen', 'examples']}/Split-test/*.gz"]
    return judge_ranking(tables, rows, candidate, last_blessed, settings, with_baselines)


def _uris(paths: RunPaths) -> dict[tuple[str, str], str]:
    uris = read_artifact_uris(paths.metadata)
    # Of all that is read here, what pipelines came to make last.
    if ("LeakageLinter", "leakage") not in uris:
        raise DataError(
            f"the last run in {paths.output_dir} is of an older version of Funnel; "
            "'funnel run' with the same settings renews it"
        )
    return uris
