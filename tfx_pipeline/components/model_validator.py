"""Applies every gate to a model and blesses it, or says why not."""

# No postponed annotations here: TFX reads the types of the component function.
import logging
from pathlib import Path

from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.standard_artifacts import (
    ExampleAnomalies,
    InfraBlessing,
    Model,
    ModelBlessing,
    ModelEvaluation,
)

from tfx_pipeline.components.drift_validator import Drift
from tfx_pipeline.components.leakage_linter import LeakageFindings
from tfx_pipeline.components.model_comparison import ModelComparisonFacts
from tfx_pipeline.config import RunConfig
from tfx_pipeline.evidence import EvidenceSources, read_evidence
from tfx_pipeline.gates import judge, write_validation

_LOGGER = logging.getLogger(__name__)
# Property of a blessing that says of which kind of model it is.
MODEL_NAME = "model_name"


@component
def ModelValidator(
    model: InputArtifact[Model],
    comparison: InputArtifact[ModelComparisonFacts],
    evaluation: InputArtifact[ModelEvaluation],
    infra_blessing: InputArtifact[InfraBlessing],
    anomalies: InputArtifact[ExampleAnomalies],
    drift: InputArtifact[Drift],
    leakage: InputArtifact[LeakageFindings],
    blessing: OutputArtifact[ModelBlessing],
    model_name: Parameter[str],
    gates: Parameter[str],
    code_version: Parameter[str],
) -> None:
    """Writes gates.json into the blessing, which is what Pusher and the resolvers of blessed models go by.

    Args:
      model: the candidate.
      comparison, evaluation, infra_blessing, anomalies, drift, leakage: what was found out about it and its
        data.
      blessing: the verdict.
      model_name: `retrieval` or `ranking`.
      gates: what of the RunConfig the gates read, as JSON: dataset, gates, validation,
        slo.
      code_version: not read: it is there for the cache.
    """
    config = RunConfig.model_validate_json(gates)
    evidence = read_evidence(
        model_name,
        config.dataset.tasks,
        config.slo,
        EvidenceSources(
            comparison=Path(comparison.uri),
            evaluation=evaluation.uri,
            model=Path(model.uri) / "Format-Serving",
            infra_blessing=Path(infra_blessing.uri),
            anomalies=Path(anomalies.uri),
            drift=Path(drift.uri),
            leakage=Path(leakage.uri),
        ),
    )
    result = judge(evidence, config.gates, config.validation, config.dataset.tasks)
    write_validation(result, Path(blessing.uri))
    (Path(blessing.uri) / ("BLESSED" if result.blessed else "NOT_BLESSED")).touch()
    # As TFX's Evaluator does: Pusher and the resolver strategies read these.
    blessing.set_string_custom_property("current_model", model.uri)
    blessing.set_int_custom_property("current_model_id", model.id)
    blessing.set_int_custom_property("blessed", int(result.blessed))
    blessing.set_string_custom_property("reason", result.reason)
    blessing.set_string_custom_property(MODEL_NAME, model_name)
    if not result.blessed:
        # The command says it to people, see `commands.pipeline.print_decision`.
        _LOGGER.info("model=%s blessed=False reason=%s", model_name, result.reason)
