"""Writes the report of a run from the artifacts of the other components."""

# No postponed annotations here: TFX reads the types of the component function.
import os
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
    ModelRun,
    PushedModel,
)

from tfx_pipeline.components.drift_validator import Drift
from tfx_pipeline.components.infra_validator import REASON_FILE, RECOMMENDATIONS_FILE
from tfx_pipeline.components.model_comparison import ModelComparisonFacts
from tfx_pipeline.config import RANKING, RETRIEVAL, RunConfig
from tfx_pipeline.report.collect import ReportSources, collect
from tfx_pipeline.report.judgement import read_evaluation, write_baselines
from tfx_pipeline.report.render import write_report
from trainer.version import __version__

_BASELINES_FILE = "baselines.json"


class Report(Artifact):
    """A folder with index.html, metrics.json and model_card.md."""

    TYPE_NAME = "funnel.Report"


@component
def ReportWriter(
    statistics: InputArtifact[ExampleStatistics],
    anomalies: InputArtifact[ExampleAnomalies],
    retrieval_model: InputArtifact[Model],
    ranking_model: InputArtifact[Model],
    retrieval_run: InputArtifact[ModelRun],
    ranking_run: InputArtifact[ModelRun],
    retrieval_comparison: InputArtifact[ModelComparisonFacts],
    ranking_comparison: InputArtifact[ModelComparisonFacts],
    drift: InputArtifact[Drift],
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
    comparisons = {RETRIEVAL: Path(retrieval_comparison.uri), RANKING: Path(ranking_comparison.uri)}
    blessings = {RETRIEVAL: Path(retrieval_blessing.uri), RANKING: Path(ranking_blessing.uri)}
    os.makedirs(report.uri, exist_ok=True)
    baselines = Path(report.uri) / _BASELINES_FILE
    tasks = RunConfig.model_validate_json(config).dataset.tasks
    write_baselines(comparisons, tuple(task.name for task in tasks), baselines)
    facts = collect(
        ReportSources(
            tables_dir=tables_dir,
            statistics_uri=statistics.uri,
            anomalies_uri=anomalies.uri,
            retrieval_blessed=retrieval_blessing.get_int_custom_property("blessed") == 1,
            ranking_blessed=ranking_blessing.get_int_custom_property("blessed") == 1,
            infra_blessed=infra_blessing.get_int_custom_property("blessed") == 1,
            infra_reason=infra_reason.read_text(encoding="utf-8"),
            pushed={
                RETRIEVAL: retrieval_pushed.get_string_custom_property("pushed_version") or None,
                RANKING: ranking_pushed.get_string_custom_property("pushed_version") or None,
            },
            baselines_path=baselines,
            retrieval_run_uri=retrieval_run.uri,
            ranking_run_uri=ranking_run.uri,
            retrieval_model_uri=retrieval_model.uri,
            recommendations_path=Path(infra_blessing.uri) / RECOMMENDATIONS_FILE,
            config_json=config,
            funnel_version=__version__,
            code_version=code_version,
        ),
        lambda model: read_evaluation(comparisons[model], blessings[model]),
    )
    write_report(facts, Path(report.uri))
