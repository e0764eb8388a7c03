"""Compiles the pipeline for Vertex AI with TFX's Kubeflow V2 runner."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from schema.errors import ConfigError
from tfx_pipeline.components.model_validator import MODEL_NAME
from tfx_pipeline.config import BUNDLES, MODELS, RunConfig
from tfx_pipeline.local_runner import code_version
from tfx_pipeline.pipeline import PipelineLocations, create_pipeline


def compile_for_vertex(
    config: RunConfig, tables_dir: str, train_end_unix_s: int, pipeline_root: str, image: str, out: Path
) -> None:
    """Writes the pipeline specification that Vertex AI Pipelines runs.

    Args:
      config: what to run.
      tables_dir: contract tables in cloud storage, with schema.pbtxt.
      train_end_unix_s: end of training, from the tables' summary.
      pipeline_root: artifacts in cloud storage; pushed models go below it.
      image: container image with this repository installed.
      out: JSON file to write, whole or not at all.

    Raises:
      ConfigError: the `vertex` extra is not installed.
    """
    try:
        from tfx.orchestration.kubeflow.v2 import kubeflow_v2_dag_runner
    except ImportError as error:
        raise ConfigError(
            "compiling for Vertex needs the extra: pip install 'funnel-recommender[vertex]'"
        ) from error
    locations = PipelineLocations(
        tables_dir=tables_dir,
        train_end_unix_s=train_end_unix_s,
        pipeline_root=pipeline_root,
        serving_models=f"{pipeline_root}/serving_models",
        code_version=code_version(),
        released=dict.fromkeys(BUNDLES, ""),
    )
    pipeline = create_pipeline(config, locations)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        runner_config = kubeflow_v2_dag_runner.KubeflowV2DagRunnerConfig(default_image=image)
        runner = kubeflow_v2_dag_runner.KubeflowV2DagRunner(
            config=runner_config, output_dir=folder, output_filename="pipeline.json"
        )
        runner.run(pipeline, write_out=True)
        compiled = Path(folder) / "pipeline.json"
        specification = json.loads(compiled.read_text(encoding="utf-8"))
        _look_for_own_blessings(specification["pipelineSpec"]["deploymentSpec"]["executors"])
        compiled.write_text(json.dumps(specification, indent=2, sort_keys=True), encoding="utf-8")
        os.replace(compiled, out)


def _look_for_own_blessings(executors: dict[str, Any]) -> None:
    """Makes each lookup of a blessed model ask for blessings of its kind: TFX's compiler asks for any.

    Args:
      executors: of the compiled pipeline, by name; changed in place.
    """
    for name, executor in executors.items():
        for model in MODELS:
            if name.partition("-")[0] in (f"LatestBlessed.{model}", f"BaseModel.{model}"):
                query = executor["resolver"]["outputArtifactQueries"].get("model_blessing")
                if query is not None:
                    query["filter"] += f' AND metadata.{MODEL_NAME}.string_value="{model}"'
