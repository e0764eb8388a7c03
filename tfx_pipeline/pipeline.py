"""The pipeline: one pure function from a configuration to the graph of components."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

# Not tfx.v1: it also imports the Google Cloud extensions, a third of TFX's import time.
from tfx.components import Evaluator, ExampleValidator, StatisticsGen, Transform
from tfx.components.schema_gen.import_schema_gen.component import ImportSchemaGen
from tfx.dsl.components.base.base_node import BaseNode
from tfx.dsl.components.common.resolver import Resolver, ResolverStrategy
from tfx.dsl.input_resolution.strategies.latest_artifact_strategy import LatestArtifactStrategy
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy
from tfx.orchestration import metadata
from tfx.orchestration.pipeline import Pipeline
from tfx.proto import pusher_pb2, transform_pb2
from tfx.types import BaseChannel, Channel
from tfx.types.standard_artifacts import ExampleStatistics, Model, ModelBlessing

from tfx_pipeline.components.blessed_resolver import (
    CURRENT,
    STATISTICS,
    LatestBlessedModelOfOtherExamplesStrategy,
    LatestOtherBlessedModelStrategy,
    LatestOtherStatisticsStrategy,
)
from tfx_pipeline.components.bundle_builder import BundleBuilder
from tfx_pipeline.components.drift_validator import DriftValidator
from tfx_pipeline.components.example_gen import ExampleKind, contract_example_gen
from tfx_pipeline.components.funnel_waterfall import FunnelWaterfall
from tfx_pipeline.components.infra_validator import ServingValidator
from tfx_pipeline.components.leakage_linter import LeakageLinter
from tfx_pipeline.components.model_comparison import ModelComparison, settings_json
from tfx_pipeline.components.model_validator import ModelValidator
from tfx_pipeline.components.off_policy import OffPolicy
from tfx_pipeline.components.pusher import AtomicPusher
from tfx_pipeline.components.report_writer import ReportWriter
from tfx_pipeline.components.trainer import ModelTrainer
from tfx_pipeline.config import BUNDLES, CUTOFFS, MODELS, RANKING, RETRIEVAL, RunConfig
from tfx_pipeline.evaluation import evaluation_settings
from tfx_pipeline.tfma_metrics import ranking_eval_config, retrieval_eval_config
from trainer import features

PIPELINE_NAME = "funnel"
# Beam starts no process of its own: importing TFX in every worker costs more than the work on one machine.
# No container is started either: unless one is named, TFX packs itself up for one, 2 s for each component.
LOCAL_BEAM_ARGS = (
    "--direct_running_mode=in_memory",
    "--direct_num_workers=1",
    "--sdk_container_image=none",
)


@dataclasses.dataclass(frozen=True)
class PipelineLocations:
    """Where the pipeline reads and writes; local folders or cloud storage.

    Attributes:
      tables_dir: contract tables, with schema.pbtxt beside them.
      train_end_unix_s: end of training, from the tables' summary.
      pipeline_root: TFX artifacts.
      serving_models: base folder of the pushed models.
      code_version: changes with the code, so that no component reuses what older code made.
      released: per model, the newest pushed version, "" before the first; a Pusher whose released version
        is gone or no longer the newest pushes again.
      failed_infra: the latest refusal of infra validation, "" before the first; a new one makes it ask again.
    """

    tables_dir: str
    train_end_unix_s: int
    pipeline_root: str
    serving_models: str
    code_version: str
    released: Mapping[str, str]
    failed_infra: str = ""


def create_pipeline(
    config: RunConfig,
    locations: PipelineLocations,
    beam_args: Sequence[str] = LOCAL_BEAM_ARGS,
    metadata_path: str | None = None,
) -> Pipeline:
    """Builds the graph; reads and writes nothing.

    Args:
      config: what to run.
      locations: where.
      beam_args: Beam options of every Beam component.
      metadata_path: SQLite file of ML Metadata for local runs; None where the orchestrator brings its own.
    """
    spec = config.dataset
    dataset = spec.model_dump_json()

    def example_gen(kind: ExampleKind) -> BaseNode:
        return contract_example_gen(
            kind,
            locations.tables_dir,
            spec,
            config.examples.max_positives_per_user,
            locations.code_version,
        )

    interactions = example_gen(ExampleKind.INTERACTIONS)
    user_states = example_gen(ExampleKind.USER_STATES)
    catalogue = example_gen(ExampleKind.CATALOGUE)
    examples = interactions.outputs["examples"]

    statistics = StatisticsGen(examples=examples)
    schema = ImportSchemaGen(schema_file=f"{locations.tables_dir}/schema.pbtxt")
    validator = ExampleValidator(statistics=statistics.outputs["statistics"], schema=schema.outputs["schema"])
    transform = Transform(
        examples=examples,
        schema=schema.outputs["schema"],
        preprocessing_fn="trainer.preprocessing.preprocessing_fn",
        splits_config=transform_pb2.SplitsConfig(analyze=["train"], transform=[]),
        # The trainers run the graph on the raw examples as they read them: trainer.input_pipeline.windows.
        materialize=False,
        # StatisticsGen has seen the raw examples; doing it again would take a third of this component's time.
        disable_statistics=True,
        custom_config={
            "dataset": dataset,
            "train_end_unix_s": locations.train_end_unix_s,
            "code_version": locations.code_version,
        },
    )
    last_statistics = _last_statistics(statistics, local=metadata_path is not None)
    drift = DriftValidator(
        statistics=statistics.outputs["statistics"],
        last_statistics=last_statistics.outputs[STATISTICS],
        schema=schema.outputs["schema"],
        dataset=dataset,
        config=config.validation.drift.model_dump_json() if config.validation.drift else "",
        code_version=locations.code_version,
    )
    linter = LeakageLinter(
        interactions=examples,
        user_states=user_states.outputs["examples"],
        catalogue=catalogue.outputs["examples"],
        transform_graph=transform.outputs["transform_graph"],
        tables_dir=locations.tables_dir,
        dataset=dataset,
        max_positives_per_user=config.examples.max_positives_per_user,
        settings=config.validation.leakage.model_dump_json() if config.validation.leakage else "",
        code_version=locations.code_version,
    )
    nodes: list[BaseNode] = [
        interactions, user_states, catalogue, statistics, schema, validator, transform,
        last_statistics, drift, linter,
    ]  # fmt: skip

    trainers, evaluators, comparisons = {}, {}, {}
    # Without slices: the comparison has them, and each would cost Beam as much as the whole split.
    eval_configs = {
        RETRIEVAL: retrieval_eval_config(features.TEST_ITEMS, CUTOFFS),
        RANKING: ranking_eval_config(spec.tasks, spec.positive),
    }
    judged_on = {RETRIEVAL: user_states.outputs["examples"], RANKING: examples}
    judged_splits = {RETRIEVAL: list(ExampleKind.USER_STATES.splits), RANKING: ["test"]}
    base_models = {}
    if config.retrieval.warm_start:
        base = _base_model(RETRIEVAL, examples, local=metadata_path is not None)
        base_models[RETRIEVAL] = base.outputs["model"]
        nodes.append(base)
    for model in (RETRIEVAL, RANKING):
        trainers[model] = ModelTrainer(
            run_fn=f"trainer.run_{model}.run_fn",
            examples=examples,
            transform_graph=transform.outputs["transform_graph"],
            catalogue=catalogue.outputs["examples"],
            user_states=user_states.outputs["examples"],
            custom_config={
                "dataset": dataset,
                "config": getattr(config, model).model_dump_json(),
                "model_name": model,
                "train_end_unix_s": locations.train_end_unix_s,
                "code_version": locations.code_version,
            },
            base_model=base_models.get(model),
        ).with_id(f"Trainer.{model}")
        resolver = _last_blessed(model, trainers[model], local=metadata_path is not None)
        evaluators[model] = Evaluator(
            examples=judged_on[model],
            example_splits=judged_splits[model],
            model=trainers[model].outputs["model"],
            eval_config=eval_configs[model],
            module_path="tfx_pipeline.tfma_metrics",
        ).with_id(f"Evaluator.{model}")
        comparisons[model] = ModelComparison(
            model=trainers[model].outputs["model"],
            last_blessed=resolver.outputs["model"],
            examples=judged_on[model],
            model_name=model,
            tables_dir=locations.tables_dir,
            dataset=dataset,
            settings=settings_json(evaluation_settings(config)),
            code_version=locations.code_version,
        ).with_id(f"Comparison.{model}")
        nodes += [trainers[model], resolver, evaluators[model], comparisons[model]]

    builder = BundleBuilder(
        retrieval_model=trainers[RETRIEVAL].outputs["model"],
        ranking_model=trainers[RANKING].outputs["model"],
        user_states=user_states.outputs["examples"],
        dataset=dataset,
        code_version=locations.code_version,
    )
    bundles = {model: trainers[model].outputs["model"] for model in MODELS}
    bundles |= {name: builder.outputs[name] for name in BUNDLES if name not in MODELS}
    infra = ServingValidator(
        **{f"{name}_model": bundle for name, bundle in bundles.items()},
        user_states=user_states.outputs["examples"],
        dataset=dataset,
        slo=config.slo.model_dump_json() if config.slo else "",
        failed_before=locations.failed_infra,
        code_version=locations.code_version,
    )
    nodes += [builder, infra]
    waterfall = FunnelWaterfall(
        retrieval_model=trainers[RETRIEVAL].outputs["model"],
        ranking_model=trainers[RANKING].outputs["model"],
        user_states=user_states.outputs["examples"],
        tables_dir=locations.tables_dir,
        dataset=dataset,
        depth=config.retrieval.max_k,
        code_version=locations.code_version,
    )
    off_policy = OffPolicy(
        ranking_model=trainers[RANKING].outputs["model"],
        tables_dir=locations.tables_dir,
        dataset=dataset,
        max_positives_per_user=config.examples.max_positives_per_user,
        code_version=locations.code_version,
    )
    nodes += [waterfall, off_policy]
    gates = config.model_dump_json(include={"dataset", "gates", "validation", "slo"})
    validators, pushers = {}, {}
    for model in MODELS:
        validators[model] = ModelValidator(
            model=trainers[model].outputs["model"],
            comparison=comparisons[model].outputs["comparison"],
            evaluation=evaluators[model].outputs["evaluation"],
            infra_blessing=infra.outputs["blessing"],
            anomalies=validator.outputs["anomalies"],
            drift=drift.outputs["drift_facts"],
            leakage=linter.outputs["leakage"],
            model_name=model,
            gates=gates,
            code_version=locations.code_version,
        ).with_id(f"ModelValidator.{model}")
        nodes.append(validators[model])
    for name, bundle in bundles.items():
        pushers[name] = AtomicPusher(
            model=bundle,
            model_blessing=validators[RETRIEVAL].outputs["blessing"],
            partner_blessing=validators[RANKING].outputs["blessing"],
            infra_blessing=infra.outputs["blessing"],
            custom_config={"released": locations.released[name]},
            push_destination=pusher_pb2.PushDestination(
                filesystem=pusher_pb2.PushDestination.Filesystem(
                    base_directory=f"{locations.serving_models}/{name}"
                )
            ),
        ).with_id(f"Pusher.{name}")
        nodes.append(pushers[name])
    nodes.append(
        ReportWriter(
            statistics=statistics.outputs["statistics"],
            anomalies=validator.outputs["anomalies"],
            retrieval_comparison=comparisons[RETRIEVAL].outputs["comparison"],
            ranking_comparison=comparisons[RANKING].outputs["comparison"],
            drift=drift.outputs["drift_facts"],
            leakage=linter.outputs["leakage"],
            waterfall=waterfall.outputs["waterfall"],
            off_policy=off_policy.outputs["policies"],
            retrieval_model=trainers[RETRIEVAL].outputs["model"],
            ranking_model=trainers[RANKING].outputs["model"],
            retrieval_run=trainers[RETRIEVAL].outputs["model_run"],
            ranking_run=trainers[RANKING].outputs["model_run"],
            retrieval_blessing=validators[RETRIEVAL].outputs["blessing"],
            ranking_blessing=validators[RANKING].outputs["blessing"],
            infra_blessing=infra.outputs["blessing"],
            retrieval_pushed=pushers[RETRIEVAL].outputs["pushed_model"],
            ranking_pushed=pushers[RANKING].outputs["pushed_model"],
            tables_dir=locations.tables_dir,
            config=config.model_dump_json(),
            code_version=locations.code_version,
        )
    )
    return Pipeline(
        pipeline_name=PIPELINE_NAME,
        pipeline_root=locations.pipeline_root,
        components=nodes,
        enable_cache=True,
        beam_pipeline_args=list(beam_args),
        metadata_connection_config=(
            metadata.sqlite_metadata_connection_config(metadata_path) if metadata_path else None
        ),
    )


def _last_blessed(model: str, trainer: BaseNode, local: bool) -> BaseNode:
    """The model that a candidate is compared with. Vertex AI knows only TFX's own strategies."""
    channels = _blessed_models(model)
    strategy: type[ResolverStrategy] = LatestBlessedModelStrategy
    if local:
        strategy = LatestOtherBlessedModelStrategy
        channels["candidate"] = trainer.outputs["model"]
    return Resolver(strategy_class=strategy, **channels).with_id(f"LatestBlessed.{model}")


def _base_model(model: str, examples: BaseChannel, local: bool) -> BaseNode:
    """The model that a warm start begins from; none in the first run."""
    channels = _blessed_models(model)
    strategy: type[ResolverStrategy] = LatestBlessedModelStrategy
    if local:
        strategy = LatestBlessedModelOfOtherExamplesStrategy
        channels["examples"] = examples
    return Resolver(strategy_class=strategy, **channels).with_id(f"BaseModel.{model}")


def _blessed_models(model: str) -> dict[str, BaseChannel]:
    return {
        "model": Channel(type=Model, producer_component_id=f"Trainer.{model}"),
        "model_blessing": Channel(type=ModelBlessing, producer_component_id=f"ModelValidator.{model}"),
    }


def _last_statistics(statistics: BaseNode, local: bool) -> BaseNode:
    """Statistics of the last run. Vertex AI knows only TFX's own strategies."""
    channels: dict[str, BaseChannel] = {
        STATISTICS: Channel(type=ExampleStatistics, producer_component_id=statistics.id)
    }
    strategy: type[ResolverStrategy] = LatestArtifactStrategy
    if local:
        strategy = LatestOtherStatisticsStrategy
        channels[CURRENT] = statistics.outputs["statistics"]
    return Resolver(strategy_class=strategy, **channels).with_id("LastStatistics")
