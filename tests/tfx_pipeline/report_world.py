"""Small artifacts of one run, for the tests of the report."""

import dataclasses
import json

import polars as pl
from tensorflow_metadata.proto.v0 import anomalies_pb2, statistics_pb2

from schema.errors import DataError
from schema.tables import TablesSummary
from tfx_pipeline.report.collect import ReportSources
from tfx_pipeline.report.facts import Evaluation, Figure, GateFailure, ReliabilityBin, TaskScores
from tfx_pipeline.run_result import ComponentTiming

EVIL = '<script>alert(1)</script> & "Sons"'
CONFIG = {
    "dataset": {
        "name": "toy",
        "utc_offset_hours": 8.0,
        "tasks": [
            {"name": "click", "label": "click", "kind": "binary", "loss_weight": 1.0, "score_weight": 1.0},
            {
                "name": "watch_time",
                "label": "watch_time_s",
                "kind": "watch_time",
                "loss_weight": 0.1,
                "score_weight": 0.02,
            },
        ],
    },
    "retrieval": {"index": {"min_recall": 0.95}},
    "gates": [
        {"metric": "retrieval/recall_at_100", "min": 0.1, "max": None, "max_drop": 0.02},
        {"metric": "ranking/click/auc", "min": 0.6, "max": None, "max_drop": 0.01},
    ],
    "slices": ["surface"],
}
RETRIEVAL_VALUES = {
    "recall_at_10": 0.04,
    "recall_at_100": 0.2512,
    "ndcg_at_10": 0.21,
    "ndcg_at_100": 0.2234,
    "cold_item_recall_at_100": 0.0625,
    "distinct_items_at_10": 321.0,
    "num_queries": 1009,
    "num_cold_item_queries": 77,
    "num_positive_items": 1234,
}
RANKING_VALUES = {
    "click/auc": 0.7294,
    "click/log_loss": 0.51,
    "click/num_examples": 43268,
    "watch_time/mae": 18.64,
    "watch_time/xauc": 0.6819,
    "watch_time/num_examples": 43268,
}


def figures(stage, values, slice_name="", change=0.0):
    return tuple(
        Figure(slice_name, f"{stage}/{key}", value if "num_" in key else value + change)
        for key, value in values.items()
    )


EVALUATIONS = {
    "retrieval": Evaluation(
        candidate=(
            *figures("retrieval", RETRIEVAL_VALUES),
            *figures("retrieval", RETRIEVAL_VALUES, "surface = home", change=0.01),
            *figures("retrieval", RETRIEVAL_VALUES, "surface = search", change=-0.03),
            Figure("surface = empty", "retrieval/recall_at_100", None),
            *figures("retrieval", {"recall_at_100": 0.125, "num_queries": 42}, "user_type = cold"),
        ),
    ),
    "ranking": Evaluation(
        candidate=(
            *figures("ranking", RANKING_VALUES),
            *figures("ranking", RANKING_VALUES, "surface = home", change=0.01),
            *figures("ranking", RANKING_VALUES, "surface = search", change=-0.02),
        ),
        last_blessed=figures("ranking", RANKING_VALUES, change=0.05),
        failures=(
            GateFailure(
                "ranking/click/auc", -0.05, True, "change against the last blessed model at least -0.01"
            ),
        ),
    ),
}


def write_statistics(folder, split, num_examples):
    """50 examples: a text id, and an age of which every second list is empty."""
    proto = statistics_pb2.DatasetFeatureStatisticsList()
    dataset = proto.datasets.add(num_examples=num_examples)
    user = dataset.features.add(type=statistics_pb2.FeatureNameStatistics.STRING)
    user.path.step.append("user_id")
    user.string_stats.unique = 7
    user.string_stats.common_stats.num_non_missing = num_examples
    user.string_stats.common_stats.max_num_values = 1
    user.string_stats.common_stats.tot_num_values = num_examples
    user.string_stats.top_values.add(value=EVIL, frequency=9)
    user.string_stats.rank_histogram.buckets.add(label=EVIL, sample_count=9)
    age = dataset.features.add(type=statistics_pb2.FeatureNameStatistics.FLOAT)
    age.path.step.append("age")
    numbers = age.num_stats
    numbers.common_stats.num_non_missing = num_examples
    numbers.common_stats.max_num_values = 1
    numbers.common_stats.tot_num_values = num_examples // 2
    numbers.mean, numbers.std_dev, numbers.min, numbers.median, numbers.max = 34.5, 3.25, 18, 33, 12345
    numbers.num_zeros = 0
    histogram = numbers.histograms.add(type=statistics_pb2.Histogram.STANDARD)
    for count in (1, 5, 0, 2):
        histogram.buckets.add(sample_count=count)
    path = folder / f"Split-{split}" / "FeatureStats.pb"
    path.parent.mkdir(parents=True)
    path.write_bytes(proto.SerializeToString())


def write_anomalies(folder, split, feature=None):
    proto = anomalies_pb2.Anomalies()
    if feature:
        info = proto.anomaly_info[feature]
        info.severity = anomalies_pb2.AnomalyInfo.ERROR
        info.short_description = "Unexpected string values"
        info.description = "Examples contain values missing from the schema: tv (~3%)."
    path = folder / f"Split-{split}" / "SchemaDiff.pb"
    path.parent.mkdir(parents=True)
    path.write_bytes(proto.SerializeToString())


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def make_sources(tmp_path):
    """Artifacts of a run whose retrieval model was released and whose ranker was rejected."""
    summary = TablesSummary(
        dataset="toy",
        rows={"train": 1_234_567, "eval": 1000, "test": 2000},
        positives={"train": 500_000, "eval": 400, "test": 500},
        users=12_345,
        items=678,
        first_event_unix_s={"train": 1_650_816_000, "eval": 1_651_680_000, "test": 1_651_766_400},
        last_event_unix_s={"train": 1_651_679_999, "eval": 1_651_766_399, "test": 1_652_025_599},
        train_end_unix_s=1_651_680_000,
        label_means={"click": 0.4421},
        warnings=("interactions: dropped 5,460 exact duplicate rows of 228,329",),
    )
    tables = tmp_path / "tables"
    write_json(tables / "summary.json", dataclasses.asdict(summary))
    titles = {"i1": EVIL, "i2": "Second film", "i3": "Third film"}
    pl.DataFrame({"item_id": list(titles), "title": list(titles.values())}).write_parquet(
        tables / "items.parquet"
    )
    for split in ("test", "train", "eval"):
        write_statistics(tmp_path / "statistics", split, 50)
        write_anomalies(tmp_path / "anomalies", split, "device" if split == "test" else None)
    baselines = {
        "retrieval": {
            "popularity": {
                "retrieval/recall_at_10": 0.037,
                "retrieval/recall_at_100": 0.2190,
                "retrieval/distinct_items_at_10": 45.0,
                "retrieval/cold_item_recall_at_100": 0.0,
            },
            "recent_popularity": {"retrieval/recall_at_10": 0.047, "retrieval/recall_at_100": 0.2510},
        },
        "retrieval_cold_users": {"popularity": {"retrieval/recall_at_100": 0.15}},
        "ranking": {
            "click": {"global_mean": {"ranking/click/auc": 0.5}, "item_mean": {"ranking/click/auc": 0.667}},
            "watch_time": {
                "item_mean": {"ranking/watch_time/mae": 19.81, "ranking/watch_time/xauc": float("nan")}
            },
        },
    }
    epochs = range(1, 4)
    recall = (0.1, 0.3, 0.2)
    retrieval_log = [
        {
            "epoch": e,
            "loss": 7 - e,
            "retrieval/recall_at_100": recall[e - 1],
            "retrieval/ndcg_at_100": 0.1,
            "train_s": 2.5,
        }
        for e in epochs
    ]
    ranking_log = [
        {
            "epoch": e,
            "seconds": 3.0,
            "train_loss": 1 / e,
            "eval_loss": 1.0,
            "ranking/click/auc": None if e == 2 else 0.7,
        }
        for e in epochs
    ]
    item = {"item_id": "i1", "rank": 1, "score": 0.91, "retrieval_score": 3.2, "reason_item_id": "i2"}
    answers = [
        {"user_id": "u1", "user_is_known": True, "history": ["i3", "i2"]},
        {"user_id": "stranger", "user_is_known": False, "history": []},
    ]
    for answer in answers:
        reason = "i2" if answer["history"] else ""
        answer["items"] = [
            item | {"reason_item_id": reason, "predictions": {"click": 0.33, "watch_time": 29.0}}
        ]
    index = {
        "num_items": 678,
        "vector_width": 65,
        "settings": {"num_leaves": 26},
        "k": 500,
        "recall": 0.9731,
        "build_s": 1.5,
        "efforts": [
            {"k": k, "num_leaves_to_search": k // 5, "num_reordering_candidates": 2 * k, "recall": recall}
            for k, recall in ((50, 0.98), (500, 0.9731))
        ],
        "recall_by_slice": {"head": 1.0, "new": None},
        "num_sample_queries": 256,
    }
    write_json(tmp_path / "model" / "Format-Serving" / "assets.extra" / "index.json", index)
    write_json(tmp_path / "retrieval_run" / "training_log.json", retrieval_log)
    write_json(tmp_path / "ranking_run" / "training_log.json", ranking_log)
    return ReportSources(
        tables_dir=tables,
        statistics_uri=str(tmp_path / "statistics"),
        anomalies_uri=str(tmp_path / "anomalies"),
        retrieval_blessed=True,
        ranking_blessed=False,
        infra_blessed=True,
        infra_reason="",
        pushed={"retrieval": "1700000000", "ranking": None},
        baselines_path=write_json(tmp_path / "baselines.json", baselines),
        retrieval_run_uri=tmp_path / "retrieval_run",
        ranking_run_uri=tmp_path / "ranking_run",
        retrieval_model_uri=tmp_path / "model",
        recommendations_path=write_json(tmp_path / "recommendations.json", answers),
        config_json=json.dumps(CONFIG),
        funnel_version="9.8.7",
        code_version="9.8.7+abc",
    )


TIMINGS = (
    ComponentTiming("Transform", wall_s=30.0, cpu_s=45.5, peak_memory_bytes=2 * 2**30, cached=False),
    ComponentTiming("Trainer.ranking", wall_s=0.1, cpu_s=0.0, peak_memory_bytes=2**30, cached=True),
)
SCORES = (
    TaskScores(
        "click",
        bins=(ReliabilityBin(0.1, 0.2, 500), ReliabilityBin(0.7, 0.6, 501)),
        edges=(0.0, 0.5, 1.0),
        histogram={"happened": (100, 301), "did not": (400, 200)},
        undefined=7,
    ),
)


def with_everything(facts):
    """The facts with what other components or the end of the run add."""
    return dataclasses.replace(facts, timings=TIMINGS, machine={"Cores": "2"}, scores=SCORES)


def evaluations(model):
    return EVALUATIONS[model]


def no_evaluations(model):
    raise DataError(f"no metrics of the {model} model")
