"""Writes the report of a run from the artifacts of the other components."""

# No postponed annotations here: TFX reads the types of the component function.
from pathlib import Path

from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.artifact import Artifact
from tfx.types.standard_artifacts import (
    ExampleAnomalies,
    ExampleStatistics,
    InfraBlessing,
    Model,
    ModelBlessing,
    ModelEvaluation,
    ModelRun,
    PushedModel,
)

from tfx_pipeline.components.baseline_evaluator import BASELINES_FILE, BaselineMetrics
from tfx_pipeline.components.infra_validator import REASON_FILE, RECOMMENDATIONS_FILE
from tfx_pipeline.config import RANKING, RETRIEVAL
from tfx_pipeline.report.collect import ReportSources, collect
from tfx_pipeline.report.render import write_report
from trainer.version import __version__


class Report(Artifact):
    """A folder with index.html, metrics.json and model_card.md."""

    TYPE_NAME = "funnel.Report"


@component
def ReportWriter(
    statistics: InputArtifact[ExampleStatistics],
    anomalies: InputArtifact[ExampleAnomalies],
    baselines: InputArtifact[BaselineMetrics],
    retrieval_model: InputArtifact[Model],
    ranking_model: InputArtifact[Model],
    retrieval_run: InputArtifact[ModelRun],
    ranking_run: InputArtifact[ModelRun],
    retrieval_evaluation: InputArtifact[ModelEvaluation],
    ranking_evaluation: InputArtifact[ModelEvaluation],
    retrieval_blessing: InputArtifact[ModelBlessing],
    ranking_blessing: InputArtifact[ModelBlessing],
    infra_blessing: InputArtifact[InfraBlessing],
    retrieval_pushed: InputArtifact[PushedModel],
    ranking_pushed: InputArtifact[PushedModel],
    report: OutputArtifact[Report],
    tables_dir: Parameter[str],
    config: Parameter[str],
    code_version: Parameter[str],
) -> None:
    """Writes the report as an artifact; `tfx_pipeline.report.history` shows it to people."""
    infra_reason = Path(infra_blessing.uri) / REASON_FILE
    facts = collect(
        ReportSources(
            tables_dir=tables_dir,
            statistics_uri=statistics.uri,
            anomalies_uri=anomalies.uri,
            retrieval_evaluation_uri=retrieval_evaluation.uri,
            ranking_evaluation_uri=ranking_evaluation.uri,
            retrieval_blessed=retrieval_blessing.get_int_custom_property("blessed") == 1,
            ranking_blessed=ranking_blessing.get_int_custom_property("blessed") == 1,
            infra_blessed=infra_blessing.get_int_custom_property("blessed") == 1,
            infra_reason=infra_reason.read_text(encoding="utf-8"),
            pushed={
                RETRIEVAL: retrieval_pushed.get_string_custom_property("pushed_version") or None,
                RANKING: ranking_pushed.get_string_custom_property("pushed_version") or None,
            },
            baselines_path=Path(baselines.uri) / BASELINES_FILE,
            retrieval_run_uri=retrieval_run.uri,
            ranking_run_uri=ranking_run.uri,
            retrieval_model_uri=retrieval_model.uri,
            recommendations_path=Path(infra_blessing.uri) / RECOMMENDATIONS_FILE,
            config_json=config,
            funnel_version=__version__,
            code_version=code_version,
        )
    )
    write_report(facts, Path(report.uri))
