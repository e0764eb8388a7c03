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
    ModelRun,
    PushedModel,
)

from tfx_pipeline.components.drift_validator import Drift
from tfx_pipeline.components.funnel_waterfall import WaterfallFacts
from tfx_pipeline.components.infra_validator import LOAD_FILE, REASON_FILE, RECOMMENDATIONS_FILE
from tfx_pipeline.components.leakage_linter import LeakageFindings
from tfx_pipeline.components.model_comparison import ModelComparisonFacts
from tfx_pipeline.components.off_policy import OffPolicyFacts
from tfx_pipeline.config import MODELS, RANKING, RETRIEVAL
from tfx_pipeline.drift import DRIFT_FILE
from tfx_pipeline.leakage.findings import LEAKAGE_FILE
from tfx_pipeline.report.collect import ModelSources, ReportSources, collect
from tfx_pipeline.report.render import write_report
from trainer.version import __version__


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
    leakage: InputArtifact[LeakageFindings],
    waterfall: InputArtifact[WaterfallFacts],
    off_policy: InputArtifact[OffPolicyFacts],
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
    infra = Path(infra_blessing.uri)
    comparisons = {RETRIEVAL: retrieval_comparison, RANKING: ranking_comparison}
    blessings = {RETRIEVAL: retrieval_blessing, RANKING: ranking_blessing}
    runs = {RETRIEVAL: retrieval_run, RANKING: ranking_run}
    models = {RETRIEVAL: retrieval_model, RANKING: ranking_model}
    pushed = {RETRIEVAL: retrieval_pushed, RANKING: ranking_pushed}
    facts = collect(
        ReportSources(
            tables_dir=tables_dir,
            statistics_uri=statistics.uri,
            anomalies_uri=anomalies.uri,
            drift_path=Path(drift.uri) / DRIFT_FILE,
            leakage_path=Path(leakage.uri) / LEAKAGE_FILE,
            waterfall_uri=waterfall.uri,
            off_policy_uri=off_policy.uri,
            infra_blessed=infra_blessing.get_int_custom_property("blessed") == 1,
            infra_reason=(infra / REASON_FILE).read_text(encoding="utf-8"),
            recommendations_path=infra / RECOMMENDATIONS_FILE,
            load_path=infra / LOAD_FILE,
            models={
                name: ModelSources(
                    comparison_uri=comparisons[name].uri,
                    blessing_uri=blessings[name].uri,
                    run_uri=runs[name].uri,
                    model_uri=models[name].uri,
                    blessed=blessings[name].get_int_custom_property("blessed") == 1,
                    pushed_version=pushed[name].get_string_custom_property("pushed_version") or None,
                )
                for name in MODELS
            },
            config_json=config,
            funnel_version=__version__,
            code_version=code_version,
        )
    )
    write_report(facts, Path(report.uri))
