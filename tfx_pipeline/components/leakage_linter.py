"""Looks for what nobody could have known at the time in the examples and the Transform graph of the run."""

# No postponed annotations here: TFX reads the types of the component function.
from pathlib import Path

from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.artifact import Artifact
from tfx.types.standard_artifacts import Examples, TransformGraph

from schema.contract import dataset_spec_from_json
from tfx_pipeline.config import LeakageConfig
from tfx_pipeline.leakage.findings import LEAKAGE_FILE, write_report
from tfx_pipeline.leakage.lint import LintSettings, RunData, lint


class LeakageFindings(Artifact):
    """A folder with leakage.json, see `tfx_pipeline.leakage.findings.LeakageReport`."""

    TYPE_NAME = "funnel.LeakageFindings"


@component
def LeakageLinter(
    interactions: InputArtifact[Examples],
    user_states: InputArtifact[Examples],
    catalogue: InputArtifact[Examples],
    transform_graph: InputArtifact[TransformGraph],
    leakage: OutputArtifact[LeakageFindings],
    tables_dir: Parameter[str],
    dataset: Parameter[str],
    max_positives_per_user: Parameter[int],
    settings: Parameter[str],
    code_version: Parameter[str],
) -> None:
    """Makes every check of `funnel lint-leakage`; what leaks would add to the figures is left to the command.

    Args:
      interactions, user_states, catalogue: examples.
      transform_graph: learnt on them.
      leakage: the findings; an empty folder where nobody is to look.
      tables_dir: contract tables.
      dataset: the declaration, as JSON.
      max_positives_per_user: see `tfx_pipeline.config.ExamplesConfig`.
      settings: a LeakageConfig, as JSON; "" does not look for leaks.
      code_version: not read: it is there for the cache.
    """
    Path(leakage.uri).mkdir(parents=True, exist_ok=True)
    if not settings:
        return
    asked = LeakageConfig.model_validate_json(settings)
    data = RunData(
        Path(tables_dir),
        Path(interactions.uri),
        Path(user_states.uri),
        Path(catalogue.uri),
        Path(transform_graph.uri),
    )
    found = lint(
        dataset_spec_from_json(dataset),
        max_positives_per_user,
        data,
        LintSettings(recomputed=asked.examples, max_auc=asked.max_auc, inflation=False),
    )
    write_report(found, Path(leakage.uri) / LEAKAGE_FILE)
