"""Judges the simple baselines on the test split, with the metrics that judge the models."""

# No postponed annotations here: TFX reads the types of the component function.
import json
from pathlib import Path

import polars as pl
from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.types.artifact import Artifact
from tfx.types.standard_artifacts import Examples

from schema.contract import DatasetSpec, dataset_spec_from_json
from schema.tables import INTERACTIONS, ITEMS
from tfx_pipeline.examples import ExampleSettings, user_state_columns
from trainer import features
from trainer.baselines import evaluate_ranking_baselines, evaluate_retrieval_baselines

BASELINES_FILE = "baselines.json"


class BaselineMetrics(Artifact):
    """A folder with baselines.json.

    {"retrieval": {name: {key: value}}, "ranking": {task: {name: {key: value}}}}, and under
    "retrieval_cold_users" the figures of "retrieval" on users without a history, {} when there is none.
    """

    TYPE_NAME = "funnel.BaselineMetrics"


@component
def BaselineEvaluator(
    examples: InputArtifact[Examples],
    baselines: OutputArtifact[BaselineMetrics],
    tables_dir: Parameter[str],
    dataset: Parameter[str],
    cutoffs: Parameter[str],
    code_version: Parameter[str],
) -> None:
    """Writes the metrics of the baselines; `examples` only puts it after the check of the interactions."""
    spec = dataset_spec_from_json(dataset)
    values = evaluate_baselines(Path(tables_dir), spec, json.loads(cutoffs))
    folder = Path(baselines.uri)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BASELINES_FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")


def evaluate_baselines(tables_dir: Path, spec: DatasetSpec, ks: list[int]) -> dict[str, object]:
    """Metrics of every baseline of both stages, fitted on the train split, judged on the test split.

    Args:
      tables_dir: contract tables.
      spec: the declaration.
      ks: cut-offs of the retrieval metrics.
    """
    interactions = pl.read_parquet(tables_dir / INTERACTIONS)
    catalogue = pl.read_parquet(tables_dir / ITEMS).unique("item_id", keep="first", maintain_order=True)
    train = interactions.filter(pl.col("split") == "train")
    test = interactions.filter(pl.col("split") == "test")
    positives = train.filter(pl.col(spec.positive).fill_null(0) > 0)
    nobody = pl.DataFrame({"user_id": []}, schema={"user_id": pl.String})
    states = user_state_columns(
        interactions, nobody, spec, ExampleSettings(0, 1), None, train["item_id"].unique()
    )
    states = states.filter(pl.col(features.TEST_ITEMS).list.len() > 0)

    def judge(users: pl.DataFrame) -> dict[str, dict[str, float]]:
        return evaluate_retrieval_baselines(
            train_item_ids=positives["item_id"].to_list(),
            train_event_time_unix_s=positives["event_time_unix_s"].to_numpy(),
            catalogue_item_ids=catalogue["item_id"].to_list(),
            upload_time_unix_s=(
                catalogue[features.UPLOAD_TIME].fill_null(-1).to_numpy()
                if features.UPLOAD_TIME in catalogue.columns
                else None
            ),
            seen_item_ids=users[features.SEEN_ITEMS].fill_null([]).to_list(),
            positive_item_ids=users[features.TEST_ITEMS].to_list(),
            cold_positive_item_ids=users[features.COLD_TEST_ITEMS].to_list(),
            ks=ks,
        )

    ranking = {
        task.name: evaluate_ranking_baselines(
            task=task.name,
            kind=task.kind,
            train_item_ids=train["item_id"].to_list(),
            train_labels=train[task.label].fill_null(float("nan")).to_numpy(),
            eval_item_ids=test["item_id"].to_list(),
            eval_labels=test[task.label].fill_null(float("nan")).to_numpy(),
            eval_user_ids=test["user_id"].to_list(),
        )
        for task in spec.tasks
    }
    cold_users = states.filter(pl.col(features.USER_TYPE) == features.COLD)
    return {
        "retrieval": judge(states),
        "retrieval_cold_users": judge(cold_users) if len(cold_users) else {},
        "ranking": ranking,
    }
