"""Follows what test users went on to choose through both models, and writes where it was lost."""

# No postponed annotations here: TFX reads the types of the component function.
from pathlib import Path

from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.artifact import Artifact
from tfx.types.standard_artifacts import Examples, Model

from schema.contract import dataset_spec_from_json
from tfx_pipeline.config import RANKING, RETRIEVAL
from tfx_pipeline.waterfall import FunnelSettings, measure_waterfall
from trainer.waterfall import write_waterfall


class WaterfallFacts(Artifact):
    """A folder with waterfall.json, see `trainer.waterfall.Waterfall`."""

    TYPE_NAME = "funnel.WaterfallFacts"


@component
def FunnelWaterfall(
    retrieval_model: InputArtifact[Model],
    ranking_model: InputArtifact[Model],
    user_states: InputArtifact[Examples],
    waterfall: OutputArtifact[WaterfallFacts],
    tables_dir: Parameter[str],
    dataset: Parameter[str],
    depth: Parameter[int],
    code_version: Parameter[str],
) -> None:
    """Writes the waterfall of the two models of the run; `depth` is the retrieval model's max_k."""
    models = {
        name: Path(model.uri) / "Format-Serving"
        for name, model in ((RETRIEVAL, retrieval_model), (RANKING, ranking_model))
    }
    found = measure_waterfall(
        Path(tables_dir),
        f"{user_states.uri}/Split-user_states/*.gz",
        models,
        dataset_spec_from_json(dataset),
        FunnelSettings(depth),
    )
    write_waterfall(found, Path(waterfall.uri))
