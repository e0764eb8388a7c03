"""Tells what the ranker's first choice would have earned, from the log's uniformly random screens."""

# No postponed annotations here: TFX reads the types of the component function.
import logging
from pathlib import Path

from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.artifact import Artifact
from tfx.types.standard_artifacts import Model

from schema.contract import dataset_spec_from_json
from tfx_pipeline.off_policy import NoScreensError, evaluate_ranker
from trainer.off_policy import PolicyFacts, write_policies

_LOGGER = logging.getLogger(__name__)


class OffPolicyFacts(Artifact):
    """A folder with off_policy.json, see `trainer.off_policy.PolicyFacts`."""

    TYPE_NAME = "funnel.OffPolicyFacts"


@component
def OffPolicy(
    ranking_model: InputArtifact[Model],
    policies: OutputArtifact[OffPolicyFacts],
    tables_dir: Parameter[str],
    dataset: Parameter[str],
    max_positives_per_user: Parameter[int],
    code_version: Parameter[str],
) -> None:
    """Writes what picks of the ranker are worth by the dataset's positive.

    Most logs do not know how likely their own choices were: that is a fact about the data for the report to
    tell, and no reason to stop a run.
    """
    spec = dataset_spec_from_json(dataset)
    try:
        found = evaluate_ranker(
            Path(tables_dir),
            spec,
            Path(ranking_model.uri) / "Format-Serving",
            max_positives_per_user=max_positives_per_user,
            reward=spec.positive,
        )
    except NoScreensError as error:
        _LOGGER.info("no off-policy evaluation: %s", error)
        found = PolicyFacts(spec.positive, 0.0, {}, {}, absent=str(error))
    write_policies(found, Path(policies.uri))
