"""The same pipeline compiles for Vertex AI, and building it is pure."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tfx_pipeline.config import BUNDLES, load_run_config
from tfx_pipeline.pipeline import PipelineLocations, create_pipeline
from tfx_pipeline.vertex_compiler import compile_for_vertex

IMAGE = "europe-docker.pkg.dev/project/repo/funnel:0.1.0"
TABLES, ROOT = "gs://bucket/tables", "gs://bucket/root"
# The data flow of docs/architecture.md. The runner makes two tasks of a resolver: blessing, then its model.
_RESOLVER = "LatestBlessed.{}-model-resolver"
# A push needs the blessing of both models.
_BLESSED = ("ModelValidator.retrieval", "ModelValidator.ranking", "ServingValidator")
_EVIDENCE = ("ServingValidator", "ExampleValidator", "DriftValidator", "LeakageLinter")
_JUDGES = ("Trainer", "Comparison", "Evaluator")
UPSTREAM: dict[str, set[str]] = {
    "InteractionGen": set(),
    "UserStateGen": set(),
    "CatalogueGen": set(),
    "ImportSchemaGen": set(),
    _RESOLVER.format("retrieval"): {"LatestBlessed.retrieval-model-blessing-resolver"},
    _RESOLVER.format("ranking"): {"LatestBlessed.ranking-model-blessing-resolver"},
    "Trainer.retrieval": {"InteractionGen", "Transform", "CatalogueGen", "UserStateGen"},
    "Trainer.ranking": {"InteractionGen", "Transform", "CatalogueGen", "UserStateGen"},
    "StatisticsGen": {"InteractionGen"},
    "ExampleValidator": {"StatisticsGen", "ImportSchemaGen"},
    "Transform": {"InteractionGen", "ImportSchemaGen"},
    "LastStatistics": set(),
    "DriftValidator": {"StatisticsGen", "ImportSchemaGen", "LastStatistics"},
    "LeakageLinter": {"InteractionGen", "UserStateGen", "CatalogueGen", "Transform"},
    "Evaluator.retrieval": {"UserStateGen", "Trainer.retrieval"},
    "Evaluator.ranking": {"InteractionGen", "Trainer.ranking"},
    "Comparison.retrieval": {"UserStateGen", "Trainer.retrieval", _RESOLVER.format("retrieval")},
    "Comparison.ranking": {"InteractionGen", "Trainer.ranking", _RESOLVER.format("ranking")},
    "ModelValidator.retrieval": {*_EVIDENCE, *(f"{kind}.retrieval" for kind in _JUDGES)},
    "ModelValidator.ranking": {*_EVIDENCE, *(f"{kind}.ranking" for kind in _JUDGES)},
    "FunnelWaterfall": {"Trainer.retrieval", "Trainer.ranking", "UserStateGen"},
    "OffPolicy": {"Trainer.ranking"},
    "BundleBuilder": {"Trainer.retrieval", "Trainer.ranking", "UserStateGen"},
    "ServingValidator": {"Trainer.retrieval", "Trainer.ranking", "BundleBuilder", "UserStateGen"},
    "Pusher.retrieval": {"Trainer.retrieval", *_BLESSED},
    "Pusher.ranking": {"Trainer.ranking", *_BLESSED},
    "Pusher.retrieval_exact": {"BundleBuilder", *_BLESSED},
    "Pusher.funnel": {"BundleBuilder", *_BLESSED},
    "Pusher.funnel_exact": {"BundleBuilder", *_BLESSED},
}


def test_a_warm_start_begins_from_the_last_blessed_model(tmp_path: Path) -> None:
    pytest.importorskip("kfp", reason="NOT TESTED: the 'vertex' extra is not installed")
    config = load_run_config("simulated", ["retrieval.warm_start=true"])
    compile_for_vertex(config, TABLES, 1_700_000_000, ROOT, IMAGE, tmp_path / "pipeline.json")
    tasks = json.loads((tmp_path / "pipeline.json").read_text())["pipelineSpec"]["root"]["dag"]["tasks"]
    base_models = {
        name: task["inputs"]["artifacts"]["base_model"]["taskOutputArtifact"]["producerTask"]
        for name, task in tasks.items()
        if "base_model" in task.get("inputs", {}).get("artifacts", {})
    }
    assert base_models == {"Trainer.retrieval": "BaseModel.retrieval-model-resolver"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    pytest.importorskip("kfp", reason="NOT TESTED: the 'vertex' extra is not installed")
    folder = tmp_path_factory.mktemp("vertex")
    out = folder / "new" / "pipeline.json"
    compile_for_vertex(load_run_config("simulated"), TABLES, 1_700_000_000, ROOT, IMAGE, out)
    assert os.listdir(out.parent) == ["pipeline.json"]
    yield json.loads(out.read_text(encoding="utf-8"))


def test_every_component_is_a_task_with_its_inputs(compiled: dict[str, Any]) -> None:
    tasks = compiled["pipelineSpec"]["root"]["dag"]["tasks"]
    wired = {
        name: {
            source["taskOutputArtifact"]["producerTask"]
            for source in task.get("inputs", {}).get("artifacts", {}).values()
        }
        for name, task in tasks.items()
    }
    # The report reads from all that judge, and from what only the report tells.
    judges = {"StatisticsGen", "ExampleValidator", "DriftValidator", "ServingValidator", "FunnelWaterfall"}
    judges |= {"LeakageLinter", "OffPolicy"}
    kinds = ("Trainer", "Comparison", "ModelValidator", "Pusher")
    judges |= {f"{kind}.{model}" for kind in kinds for model in ("retrieval", "ranking")}
    sources = {node for nodes in UPSTREAM.values() for node in nodes if node.endswith("blessing-resolver")}
    assert wired == UPSTREAM | {"ReportWriter": judges} | {node: set() for node in sources}


def test_components_run_in_the_given_image(compiled: dict[str, Any]) -> None:
    executors = compiled["pipelineSpec"]["deploymentSpec"]["executors"]
    images = {executor["container"]["image"] for executor in executors.values() if "container" in executor}
    assert images == {IMAGE}
    # All but the three resolvers, and the report.
    assert sum("container" in executor for executor in executors.values()) == len(UPSTREAM) - 3 + 1


def test_each_model_is_compared_with_a_blessed_one_of_its_kind(compiled: dict[str, Any]) -> None:
    executors = compiled["pipelineSpec"]["deploymentSpec"]["executors"]
    filters = {
        name: query["filter"]
        for name, executor in executors.items()
        for key, query in executor.get("resolver", {}).get("outputArtifactQueries", {}).items()
        if key == "model_blessing"
    }
    assert {name.partition("-")[0] for name in filters} == {
        "LatestBlessed.retrieval",
        "LatestBlessed.ranking",
    }
    for name, found in filters.items():
        model = name.partition("-")[0].partition(".")[2]
        assert (
            found.startswith('schema_title="tfx.ModelBlessing"')
            and "metadata.blessed.number_value=1" in found
        )
        assert found.endswith(f' AND metadata.model_name.string_value="{model}"')


def test_cloud_addresses_reach_the_components_unchanged(compiled: dict[str, Any]) -> None:
    text = json.dumps(compiled)
    assert f"{TABLES}/schema.pbtxt" in text
    assert f"{ROOT}/serving_models/retrieval" in text
    assert compiled["runtimeConfig"]["gcsOutputDirectory"] == ROOT
    # Path() would have made one slash of two.
    assert "gs:/b" not in text


def locations(tmp_path: Path) -> PipelineLocations:
    return PipelineLocations(
        str(tmp_path / "tables"),
        1,
        str(tmp_path / "root"),
        str(tmp_path / "models"),
        code_version="1",
        released={**dict.fromkeys(BUNDLES, ""), "ranking": "7"},
    )


def intermediate(tmp_path: Path, *overrides: str) -> Any:
    from tfx.dsl.compiler import compiler

    pipeline = create_pipeline(load_run_config("simulated", overrides), locations(tmp_path))
    return compiler.Compiler().compile(pipeline)


def test_the_same_config_gives_the_same_graph_and_touches_no_file(tmp_path: Path) -> None:
    first = intermediate(tmp_path)
    assert intermediate(tmp_path) == first
    assert not list(tmp_path.iterdir())


def test_a_setting_of_one_model_changes_that_model_and_what_reports_it(tmp_path: Path) -> None:
    before, after = intermediate(tmp_path), intermediate(tmp_path, "ranking.learning_rate=0.5")
    changed = {
        one.pipeline_node.node_info.id
        for one, other in zip(before.nodes, after.nodes, strict=True)
        if one != other
    }
    assert changed == {"Trainer.ranking", "ReportWriter"}
