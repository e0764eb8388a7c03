"""Builds the bundles that are made of both trained models, with warm-up requests."""

# No postponed annotations here: TFX reads the types of the component function.
from pathlib import Path

from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.standard_artifacts import Examples, Model
from tfx.utils import path_utils

from schema.contract import dataset_spec_from_json
from tfx_pipeline.config import FUNNEL, FUNNEL_EXACT, RETRIEVAL_EXACT
from tfx_pipeline.warmup import add_warmup_requests
from trainer.run_bundles import BundleFolders, build


@component
def BundleBuilder(
    retrieval_model: InputArtifact[Model],
    ranking_model: InputArtifact[Model],
    user_states: InputArtifact[Examples],
    retrieval_exact: OutputArtifact[Model],
    funnel: OutputArtifact[Model],
    funnel_exact: OutputArtifact[Model],
    dataset: Parameter[str],
    code_version: Parameter[str],
) -> None:
    """Builds `retrieval_exact`, `funnel` and `funnel_exact`; see trainer.run_bundles."""
    states = [f"{user_states.uri}/Split-user_states/*.gz"]
    folders = {
        RETRIEVAL_EXACT: model_folder(retrieval_exact),
        FUNNEL: model_folder(funnel),
        FUNNEL_EXACT: model_folder(funnel_exact),
    }
    build(model_folder(retrieval_model), model_folder(ranking_model), states, BundleFolders(**folders))
    for name, folder in folders.items():
        add_warmup_requests(folder, name, states, dataset_spec_from_json(dataset))


def model_folder(artifact: Model) -> Path:
    """Folder of the SavedModel of a model artifact."""
    return Path(path_utils.serving_model_dir(artifact.uri))
