"""Compares a trained model with the last blessed one and with the baselines, on the test split."""

# No postponed annotations here: TFX reads the types of the component function.
import json
from pathlib import Path

from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.artifact import Artifact
from tfx.types.standard_artifacts import Examples, Model

from schema.contract import dataset_spec_from_json
from tfx_pipeline.config import RETRIEVAL
from tfx_pipeline.evaluation import EvaluationSettings, judge_ranking, judge_retrieval, read_tables
from trainer.comparison import BootstrapSettings


class ModelComparisonFacts(Artifact):
    """A folder with comparison.json, and the Parquet files that its numbers come from."""

    TYPE_NAME = "funnel.ModelComparison"


@component
def ModelComparison(
    model: InputArtifact[Model],
    examples: InputArtifact[Examples],
    comparison: OutputArtifact[ModelComparisonFacts],
    model_name: Parameter[str],
    tables_dir: Parameter[str],
    dataset: Parameter[str],
    settings: Parameter[str],
    code_version: Parameter[str],
    last_blessed: InputArtifact[Model] = None,
) -> None:
    """Writes the comparison.

    Args:
      model: the candidate.
      examples: user states (retrieval) or interactions (ranking).
      comparison: the result.
      model_name: `retrieval` or `ranking`.
      tables_dir: contract tables, which the baselines are fitted on.
      dataset: the declaration, as JSON.
      settings: see `settings_json`.
      code_version: not read: it is there for the cache.
      last_blessed: the model that was blessed last; None when there is none.
    """
    tables = read_tables(Path(tables_dir), dataset_spec_from_json(dataset))
    candidate = Path(model.uri) / "Format-Serving"
    blessed = None if last_blessed is None else Path(last_blessed.uri) / "Format-Serving"
    chosen = _settings(settings)
    if model_name == RETRIEVAL:
        states = [f"{examples.uri}/Split-user_states/*.gz"]
        judgement = judge_retrieval(tables, states, candidate, blessed, chosen)
    else:
        rows = [f"{examples.uri}/Split-test/*.gz"]
        judgement = judge_ranking(tables, rows, candidate, blessed, chosen)
    judgement.write(Path(comparison.uri))


def settings_json(settings: EvaluationSettings) -> str:
    """The settings as a component parameter."""
    return json.dumps(
        {
            "cutoffs": settings.cutoffs,
            "slices": settings.slices,
            "confidence": settings.bootstrap.confidence,
            "num_resamples": settings.bootstrap.num_resamples,
        }
    )


def _settings(text: str) -> EvaluationSettings:
    values = json.loads(text)
    return EvaluationSettings(
        tuple(values["cutoffs"]),
        tuple(map(tuple, values["slices"])),
        BootstrapSettings(values["confidence"], values["num_resamples"]),
    )
