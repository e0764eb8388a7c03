"""Small artifacts of one run, for the tests of the report."""

import dataclasses
import json

import numpy as np
import polars as pl
from tensorflow_metadata.proto.v0 import anomalies_pb2, statistics_pb2

from schema.tables import TablesSummary
from tfx_pipeline import gates
from tfx_pipeline.leakage import findings
from tfx_pipeline.report.collect import ModelSources, ReportSources
from tfx_pipeline.report.facts import Latency, LoadFacts, LoadTest
from tfx_pipeline.run_result import ComponentTiming
from trainer import comparison, off_policy, waterfall
from trainer.uncertainty import Interval, PairedDifference

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
}
RANKING_VALUES = {
    "click/auc": 0.7294,
    "click/log_loss": 0.51,
    "watch_time/mae": 18.64,
    "watch_time/xauc": 0.6819,
}


# Rivals of each model on the whole test split: rival -> key -> value.
RETRIEVAL_RIVALS = {
    "popularity": {
        "recall_at_10": 0.037,
        "recall_at_100": 0.2190,
        "distinct_items_at_10": 45.0,
        "cold_item_recall_at_100": 0.0,
    },
    "recent_popularity": {"recall_at_10": 0.047, "recall_at_100": 0.2510},
}
RANKING_RIVALS = {
    "last_blessed": {"click/auc": 0.7794, "watch_time/mae": 18.69},
    "global_mean": {"click/auc": 0.5},
    "item_mean": {"click/auc": 0.667, "watch_time/mae": 19.81},
}
NOTES = {"popularity": "train positives of an item", "item_mean": "smoothed train mean of the item"}


def metric(stage, key, value, rivals=None, change=0.0):
    """A result whose intervals are 0.01 to both sides; `change` is of the candidate alone."""
    # A count of items has no interval.
    has_interval = "distinct" not in key
    against = {}
    for rival, values in (rivals or {}).items():
        if key in values:
            difference = value + change - values[key]
            sure = (difference - 0.01, difference + 0.01, 0.25) if has_interval else (None, None, None)
            against[rival] = comparison.Against(values[key], difference, *sure)
    value = value + change
    low, high = (value - 0.01, value + 0.01) if has_interval else (None, None)
    count = 77 if "cold_item" in key else 1009
    return comparison.MetricResult(f"{stage}/{key}", count, value, low, high, "", against)


def judged(stage, values, rivals, slices, headline, absent):
    """A comparison; `slices` are (conditions, users, note, change of every value), worst first."""
    whole = tuple(metric(stage, key, value, rivals) for key, value in values.items())
    results = [comparison.SliceResult((), 1009, 1009, "", whole)]
    for conditions, users, note, change in slices:
        ours = tuple(metric(stage, key, value, rivals, change) for key, value in values.items())
        results.append(comparison.SliceResult(conditions, users, users, note, ours))
    return comparison.Comparison(
        model=stage,
        headline=headline,
        confidence=0.95,
        num_resamples=1000,
        rivals=tuple(comparison.Rival(name, NOTES.get(name, "")) for name in rivals),
        absent=absent,
        slices=tuple(results),
    )


def retrieval_comparison():
    """No blessed model before; a slice without positives; cold users beside a baseline of their own."""
    found = judged(
        "retrieval",
        RETRIEVAL_VALUES,
        RETRIEVAL_RIVALS,
        (
            ((("surface", "search"),), 300, "", -0.03),
            ((("surface", "home"), ("device", "tv")), 700, "", 0.01),
            ((("surface", "home"),), 709, "", 0.02),
        ),
        "retrieval/recall_at_100",
        {"last_blessed": "no model was blessed before"},
    )
    cold = metric("retrieval", "recall_at_100", 0.125, {"popularity": {"recall_at_100": 0.15}})
    nothing = comparison.MetricResult(
        "retrieval/recall_at_100", 0, None, None, None, "no user has a positive", {}
    )
    few = "12 users are too few to tell"
    return dataclasses.replace(
        found,
        slices=(
            *found.slices,
            comparison.SliceResult((("user_type", "cold"),), 42, 42, "", (cold,)),
            comparison.SliceResult((("surface", "empty"),), 12, 12, few, (nothing,)),
        ),
    )


def ranking_comparison():
    """Worse than the last blessed model, surely."""
    slices = (((("surface", "search"),), 300, "", -0.02), ((("surface", "home"),), 709, "", 0.01))
    return judged("ranking", RANKING_VALUES, RANKING_RIVALS, slices, "ranking/click/auc", {})


VALIDATIONS = {
    "retrieval": gates.Validation(
        "retrieval",
        True,
        "",
        (
            gates.GateResult(
                "value",
                "retrieval/recall_at_100 at least 0.1",
                gates.Verdict.PASSED,
                0.2512,
                "at least 0.1",
                "retrieval/recall_at_100 0.2512, required: at least 0.1",
            ),
            gates.GateResult(
                "no_worse",
                "retrieval/recall_at_100 no worse",
                gates.Verdict.NOT_APPLIED,
                None,
                "no worse",
                "compared with nothing: no model was blessed before",
            ),
        ),
    ),
    "ranking": gates.Validation(
        "ranking",
        False,
        "ranking/click/auc changed by -0.0500, required: no more than 0.01 worse",
        (
            gates.GateResult(
                "no_worse",
                "ranking/click/auc no worse",
                gates.Verdict.FAILED,
                -0.05,
                "no more than 0.01 worse",
                "ranking/click/auc changed by -0.0500, required: no more than 0.01 worse",
            ),
        ),
    ),
}
DRIFT = {
    "found": {
        "train_to_eval": [
            {"feature": "device", "distance": 0.31, "limit": 0.15},
            {"feature": "age", "distance": 0.02, "limit": 0.2},
        ]
    },
    "absent": {"last_run": "there was no run on other data before"},
}
LEAKAGE = findings.LeakageReport(
    "toy",
    (
        findings.Check("the past only", True, "150 examples: histories end before the event"),
        findings.Check("temporal splits", False, "all examples", ("train ends at 9, eval starts at 8",)),
    ),
    (findings.Association("click", "age", 0.61, 400),),
    0.9,
    (
        findings.Protocol("temporal split", True, {"lightgbm/auc": 0.7}),
        findings.Protocol("random split", False, {"lightgbm/auc": 0.75}),
    ),
)
LOSSES = ("not in the catalogue", "cut after retrieval at 200", "ranked below 20")


def waterfall_facts():
    """100 positives: 5 outside the catalogue, 20 cut, 45 ranked low, 30 shown; 10 of them of cold users."""
    return waterfall.Waterfall(
        num_users=50,
        num_users_with_positives=80,
        k=20,
        num_candidates=200,
        slices=(
            waterfall.SliceLosses(
                {}, 100, dict(zip(LOSSES, (5, 20, 45), strict=True)), 30, {LOSSES[0]: (0.012, 0.089)}
            ),
            waterfall.SliceLosses({"user_type": "cold"}, 10, dict(zip(LOSSES, (0, 6, 3), strict=True)), 1),
        ),
        sources=(waterfall.SourceFacts("two_tower", 500, 0.8, 0.7, {"popularity": 0.125}, (0.75, 0.85)),),
    )


def off_policy_facts():
    """The ranker's score picks surely better than chance, popularity perhaps; like is refused."""

    def estimate(value, effective_samples):
        gain = value - 0.25
        return off_policy.OffPolicyEstimate(
            values={off_policy.IPS: Interval(value, value - 0.1, value + 0.1, 0.95, 82)},
            gains={off_policy.IPS: PairedDifference(gain, gain - 0.1, gain + 0.1, 0.95, 0.04, 82)},
            logged=Interval(0.25, 0.2, 0.3, 0.95, 82),
            support=off_policy.Support(1535, 82, effective_samples, 0.05, 1.0, 0.02, 12.0, 0),
        )

    estimates = {"score": estimate(0.4, 75.4), "popularity": estimate(0.3125, 61.0)}
    why = "the log cannot tell what the target policy is worth: 1,535 rows weigh as much as 31.0"
    return off_policy.PolicyFacts("click", 0.0, estimates, {"like": why})


def predictions_table():
    """1,000 impressions of a calibrated click model, and one whose watch time is not a number."""
    p = np.linspace(0.05, 0.95, 1000)
    clicked = (np.arange(1000) * 0.618 % 1.0 < p).astype(float)
    watched = np.where(np.arange(1000) == 0, np.nan, 100 * p)
    return pl.DataFrame(
        {
            "label_click": clicked,
            "label_watch_time": watched,
            "candidate/click": p,
            "candidate/watch_time": 90 * p,
        }
    )


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
        "recall_by_slice": {"head": 1.0, "cold": None},
        "num_sample_queries": 256,
        "points": [
            {
                "k": k,
                "num_leaves_to_search": leaves,
                "num_reordering_candidates": candidates,
                "is_chosen": is_chosen,
                "recall": recall,
                "recall_by_slice": {"head": recall, "cold": None},
                "p50_ms": time,
                "p95_ms": 2 * time,
            }
            for k, leaves, candidates, is_chosen, recall, time in (
                (50, 5, 100, False, 0.91, 0.25),
                (50, 10, 100, True, 0.98, 0.5),
                (50, None, None, False, 1.0, 4.0),
                (500, 100, 1000, True, 0.9731, 0.75),
                (500, None, None, False, 1.0, 5.0),
            )
        ],
    }
    write_json(tmp_path / "model" / "Format-Serving" / "assets.extra" / "index.json", index)
    write_json(tmp_path / "retrieval_run" / "training_log.json", retrieval_log)
    write_json(tmp_path / "ranking_run" / "training_log.json", ranking_log)
    write_json(tmp_path / "drift.json", DRIFT)
    latency = {"p50": 4.25, "p95": 9.0, "p99": 12.5, "max": 20.0}
    load = {"rate_per_s": 50, "num_requests": 500, "error_share": 0.002, "latency_ms": {"total": latency}}
    write_json(tmp_path / "load.json", {"slo": {}, "result": load | {"warnings": ["the client was busy"]}})
    findings.write_report(LEAKAGE, tmp_path / "leakage.json")
    waterfall.write_waterfall(waterfall_facts(), tmp_path / "waterfall")
    off_policy.write_policies(off_policy_facts(), tmp_path / "off_policy")
    for name, found in (("retrieval", retrieval_comparison()), ("ranking", ranking_comparison())):
        comparison.write_comparison(found, tmp_path / f"{name}_comparison")
        gates.write_validation(VALIDATIONS[name], tmp_path / f"{name}_blessing")
    predictions_table().write_parquet(tmp_path / "ranking_comparison" / "predictions.parquet")
    return ReportSources(
        tables_dir=tables,
        statistics_uri=str(tmp_path / "statistics"),
        anomalies_uri=str(tmp_path / "anomalies"),
        drift_path=tmp_path / "drift.json",
        leakage_path=tmp_path / "leakage.json",
        waterfall_uri=tmp_path / "waterfall",
        off_policy_uri=tmp_path / "off_policy",
        infra_blessed=True,
        infra_reason="",
        recommendations_path=write_json(tmp_path / "recommendations.json", answers),
        load_path=tmp_path / "load.json",
        models={
            name: ModelSources(
                comparison_uri=tmp_path / f"{name}_comparison",
                blessing_uri=tmp_path / f"{name}_blessing",
                run_uri=tmp_path / f"{name}_run",
                model_uri=tmp_path / "model",
                blessed=version is not None,
                pushed_version=version,
            )
            for name, version in (("retrieval", "1700000000"), ("ranking", None))
        },
        config_json=json.dumps(CONFIG),
        funnel_version="9.8.7",
        code_version="9.8.7+abc",
    )


TIMINGS = (
    ComponentTiming("Transform", wall_s=30.0, cpu_s=45.5, peak_memory_bytes=2 * 2**30, cached=False),
    ComponentTiming("Trainer.ranking", wall_s=0.1, cpu_s=0.0, peak_memory_bytes=2**30, cached=True),
)


def load_facts(rate, time, errors):
    latency = Latency(time, 2 * time, 3 * time, 9 * time)
    return LoadFacts(rate, 1_000, sum(errors.values()) / 1_000, {"total": latency}, (), rate, errors)


LOAD_TEST = LoadTest(
    {"target": "grpc://host:8500", "layout": "auto", "k": 20, "num_candidates": 100, "num_users": 1000},
    (load_facts(50, 4.0, {}), load_facts(100, 8.0, {"DeadlineExceededError": 10})),
)


SEEDS = {"retrieval/recall_at_100": (0.245, 0.265), "retrieval/ndcg_at_100": (0.22, None)}


def with_everything(facts):
    """The facts with what the end of the run adds, and what a load test and other seeds added later."""
    return dataclasses.replace(
        facts, timings=TIMINGS, machine={"Cores": "2"}, load_test=LOAD_TEST, seeds={"retrieval": SEEDS}
    )
