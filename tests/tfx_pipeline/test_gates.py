"""Each gate catches what it is there for, and says so in one line."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schema.contract import TaskKind, TaskSpec
from schema.errors import DataError
from serving.slo import Slo
from tfx_pipeline.config import Gate, ValidationConfig
from tfx_pipeline.drift_facts import DriftFacts, FeatureDrift
from tfx_pipeline.gates import (
    GATES_FILE,
    Evidence,
    GateResult,
    Load,
    Verdict,
    judge,
    read_validation,
    validation,
    write_validation,
)
from tfx_pipeline.leakage.findings import Check, LeakageReport
from trainer.comparison import Against, Comparison, MetricResult, Rival, SliceResult
from trainer.metrics import FloatArray, ece


def gate(verdict: Verdict, name: str = "one") -> GateResult:
    return GateResult("value", name, verdict, 0.1, "at least 0.2", f"{name} is 0.1, required at least 0.2")


def test_one_failed_gate_stops_a_model_and_its_reason_is_that_of_the_model() -> None:
    result = validation("ranking", (gate(Verdict.PASSED), gate(Verdict.FAILED, "two")))
    assert not result.blessed
    assert result.reason == "two is 0.1, required at least 0.2"


def test_a_gate_that_was_not_applied_stops_nothing() -> None:
    result = validation("ranking", (gate(Verdict.PASSED), gate(Verdict.NOT_APPLIED, "two")))
    assert (result.blessed, result.reason) == (True, "")


def test_a_model_that_nothing_judged_is_not_blessed() -> None:
    result = validation("ranking", (gate(Verdict.NOT_APPLIED),))
    reason = "no gate on a metric was applied; give one with min, max or beats under 'gates'"
    assert (result.blessed, result.reason) == (False, reason)


def test_a_sound_model_that_nobody_measured_is_not_blessed() -> None:
    """A first model whose only gate is max_drop: everything else that passes says that nothing is broken."""
    first = dataclasses.replace(
        HEALTHY["retrieval"].comparison, absent={"last_blessed": "no model was blessed before"}
    )
    evidence = with_evidence("retrieval", comparison=first)
    gates = (Gate(metric=RECALL, max_drop=0.02),)
    result = judge(evidence, gates, CONFIG, TASKS)
    assert any(gate.verdict is Verdict.PASSED for gate in result.gates)
    assert not result.blessed
    assert result.reason.startswith("no gate on a metric was applied")
    assert judge(evidence, (*gates, Gate(metric=RECALL, min=0.1)), CONFIG, TASKS).blessed


def test_a_validation_survives_its_file(tmp_path: Path) -> None:
    result = validation("ranking", (gate(Verdict.PASSED), gate(Verdict.FAILED, "two")))
    write_validation(result, tmp_path / "new")
    assert read_validation(tmp_path / "new") == result
    assert json.loads((tmp_path / "new" / GATES_FILE).read_text())["gates"][1]["verdict"] == "failed"


def test_a_folder_without_gates_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no {tmp_path}"):
        read_validation(tmp_path)


RECALL, DISTINCT, AUC, ECE = (
    "retrieval/recall_at_100",
    "retrieval/distinct_items_at_10",
    "ranking/click/auc",
    "ranking/click/ece",
)
ITEM_RANK = "retrieval/candidate_effective_rank"
CALIBRATION = "probabilities of click off by at most 0.5 of the mean of the label, but for chance"
TASKS = (TaskSpec(name="click", label="click", kind=TaskKind.BINARY),)
RETRIEVAL_GATES = (
    Gate(metric=RECALL, min=0.2, max_drop=0.02, beats=("popularity",)),
    Gate(metric=DISTINCT, min=30),
)
RANKING_GATES = (
    Gate(metric=AUC, min=0.6, max_drop=0.01, beats=("item_mean",)),
    Gate(metric=ECE, max=0.1),
)


def metric(key: str, value: float | None, **against: Against) -> MetricResult:
    note = "no user with a positive" if value is None else ""
    return MetricResult(key, 500, value, None, None, note, against)


def change(value: float, difference: float, half_width: float = 0.005) -> Against:
    return Against(value, difference, difference - half_width, difference + half_width, 0.5)


def comparison(model: str, metrics: tuple[MetricResult, ...], **changes: Any) -> Comparison:
    whole = SliceResult((), 500, 500, "", metrics)
    baseline = {"retrieval": "popularity", "ranking": "item_mean"}[model]
    rivals = (Rival("last_blessed", ""), Rival(baseline, ""))
    facts = {"click/prediction_std": 0.2, "click/label_std": 0.5}
    facts |= {"click/mean_label": 0.4, "click/mean_prediction": 0.4}
    facts |= {ITEM_RANK: 40.0}
    found = Comparison(model, metrics[0].key, 0.95, 1_000, rivals, {}, (whole,), facts)
    return dataclasses.replace(found, **changes)


def retrieval_metrics(**replaced: MetricResult) -> tuple[MetricResult, ...]:
    metrics = {
        "recall": metric(RECALL, 0.3, last_blessed=change(0.305, -0.005), popularity=change(0.2, 0.1)),
        "distinct": metric(DISTINCT, 200.0, popularity=Against(14.0, 186.0, None, None, None)),
    }
    return tuple((metrics | replaced).values())


def ranking_metrics(**replaced: MetricResult) -> tuple[MetricResult, ...]:
    metrics = {
        "auc": metric(AUC, 0.7, last_blessed=change(0.7, 0.0), item_mean=change(0.6, 0.1)),
        "ece": metric(ECE, 0.02, last_blessed=change(0.02, 0.0)),
    }
    return tuple((metrics | replaced).values())


def drift(**found: list[tuple[str, float | None, float]]) -> DriftFacts:
    return DriftFacts(
        {name: tuple(FeatureDrift(*feature) for feature in part) for name, part in found.items()}, {}
    )


def linted(*checks: Check) -> LeakageReport:
    return LeakageReport("toy", (Check("the past only", True, "50 examples"), *checks), (), 0.9, ())


SLO = Slo(rate_per_s=20, duration_s=20, p99_ms=50, error_budget=0.001)
HEALTHY = {
    "retrieval": Evidence(
        comparison("retrieval", retrieval_metrics()),
        evaluated=[RECALL, DISTINCT],
        evaluator={RECALL: 0.3, DISTINCT: 200.0},
        index_recall={"": 0.99, "head": 1.0, "tail": 0.98, "cold": None},
        serving_reason="",
        slo=SLO,
        load=Load(34.0, []),
        anomalies={"train": [], "eval": []},
        drift=drift(train_to_eval=[("country", 0.03, 0.1)], last_run=[("country", 0.02, 0.1)]),
        leakage=linted(),
    ),
    "ranking": Evidence(
        comparison("ranking", ranking_metrics()),
        evaluated=[AUC, ECE],
        evaluator={AUC: 0.7, ECE: 0.02},
        index_recall=None,
        serving_reason="",
        slo=None,
        load=None,
        anomalies={"train": []},
        drift=DriftFacts(
            drift(train_to_eval=[("country", 0.03, 0.1)]).found,
            {"last_run": "there was no run on other data before"},
        ),
        leakage=linted(),
    ),
}
GATES = (*RETRIEVAL_GATES, *RANKING_GATES)
CONFIG = ValidationConfig()


def judged(evidence: Evidence, config: ValidationConfig | None = None) -> Mapping[str, GateResult]:
    """Results by name."""
    return {result.name: result for result in judge(evidence, GATES, config or CONFIG, TASKS).gates}


@pytest.mark.parametrize("model", ["retrieval", "ranking"])
def test_a_healthy_model_is_blessed_by_gates_of_its_own(model: str) -> None:
    result = judge(HEALTHY[model], GATES, CONFIG, TASKS)
    assert (result.blessed, result.reason) == (True, "")
    assert len({gate.name for gate in result.gates}) == len(result.gates)
    other = "ranking" if model == "retrieval" else "retrieval"
    assert not any(gate.metric.startswith(other) for gate in result.gates)
    kinds = {"value", "no_worse", "must_beat", "agreement", "collapse", "serving", "anomalies", "drift"}
    kinds |= {"leakage", "latency"}
    kinds |= {"index"} if model == "retrieval" else {"calibration"}
    assert {gate.kind for gate in result.gates} == kinds


def with_metrics(model: str, **replaced: MetricResult) -> Evidence:
    """The healthy model with other metrics, of which the Evaluator says the same."""
    metrics = (retrieval_metrics if model == "retrieval" else ranking_metrics)(**replaced)
    evaluator = {found.key: found.value for found in metrics}
    healthy = HEALTHY[model]
    return dataclasses.replace(
        healthy, comparison=comparison(model, metrics, facts=healthy.comparison.facts), evaluator=evaluator
    )


def with_facts(evidence: Evidence = HEALTHY["ranking"], **facts: float | None) -> Evidence:
    named = {name.replace("click_", "click/"): value for name, value in facts.items()}
    changed = dataclasses.replace(evidence.comparison, facts={**evidence.comparison.facts, **named})
    return dataclasses.replace(evidence, comparison=changed)


def with_item_rank(rank: float | None) -> Evidence:
    healthy = HEALTHY["retrieval"]
    return dataclasses.replace(
        healthy, comparison=dataclasses.replace(healthy.comparison, facts={ITEM_RANK: rank})
    )


def with_ece(error: float, mean_label: float, mean_prediction: float, num_rows: int = 500) -> Evidence:
    changed = dataclasses.replace(metric(ECE, error, last_blessed=change(error, 0.0)), count=num_rows)
    return with_facts(
        with_metrics("ranking", ece=changed),
        click_mean_label=mean_label,
        click_mean_prediction=mean_prediction,
    )


def with_evidence(model: str, **changes: Any) -> Evidence:
    return dataclasses.replace(HEALTHY[model], **changes)


SABOTAGES = [
    pytest.param(
        with_metrics(
            "retrieval",
            recall=metric(RECALL, 0.1, last_blessed=change(0.1, 0.0), popularity=change(0.0, 0.1)),
        ),
        "value",
        "retrieval/recall_at_100 0.1000, required: at least 0.2",
        id="weak-model",
    ),
    pytest.param(
        with_metrics("ranking", ece=metric(ECE, 0.15)),
        "value",
        "ranking/click/ece 0.1500, required: at most 0.1",
        id="error-above-its-ceiling",
    ),
    pytest.param(
        with_metrics(
            "retrieval",
            recall=metric(RECALL, None, popularity=Against(None, None, None, None, None)),
        ),
        "value",
        "retrieval/recall_at_100 is undefined: no user with a positive, required: at least 0.2",
        id="metric-that-is-not-a-number",
    ),
    pytest.param(
        # The difference itself is within .02; the end of its interval is not.
        with_metrics(
            "retrieval",
            recall=metric(RECALL, 0.3, last_blessed=change(0.318, -0.018), popularity=change(0.2, 0.1)),
        ),
        "no_worse",
        "retrieval/recall_at_100 changed by -0.0180 (-0.0230 at 97.5 % confidence), "
        "required: no more than 0.02 worse than the last blessed model",
        id="worse-than-blessed",
    ),
    pytest.param(
        # Better, but not surely.
        with_metrics(
            "ranking",
            auc=metric(AUC, 0.7, last_blessed=change(0.7, 0.0), item_mean=change(0.697, 0.003)),
        ),
        "must_beat",
        "ranking/click/auc 0.7000 against 0.6970 of item_mean (+0.0030, -0.0020 to +0.0080), "
        "required: better than item_mean by its interval",
        id="no-better-than-a-baseline",
    ),
    pytest.param(
        with_evidence("ranking", evaluator={AUC: 0.7 + 2e-6, ECE: 0.02}),
        "agreement",
        "the Evaluator and the comparison are 2e-06 apart on ranking/click/auc, "
        "required: at most 1e-06 apart",
        id="evaluations-disagree",
    ),
    pytest.param(
        with_evidence("retrieval", evaluator={RECALL: 0.3 + 0.0021, DISTINCT: 200.0}),
        "agreement",
        "the Evaluator and the comparison are 0.0021 apart on retrieval/recall_at_100, "
        "required: at most 0.002 apart",
        id="evaluations-disagree-by-more-than-a-list",
    ),
    pytest.param(
        with_evidence("ranking", evaluator={AUC: None, ECE: 0.02}),
        "agreement",
        "the Evaluator and the comparison are inf apart on ranking/click/auc, required: at most 1e-06 apart",
        id="evaluator-found-no-value",
    ),
    pytest.param(
        with_evidence("ranking", evaluator={AUC: 0.7}),
        "agreement",
        "the run's evaluation lacks ranking/click/ece: if an older version of Funnel made it, 'funnel run' "
        "with the same settings makes it again",
        id="evaluator-left-a-metric-out",
    ),
    pytest.param(
        with_evidence(
            "ranking",
            evaluated=[AUC, ECE, "ranking/click/gauc"],
            evaluator={AUC: 0.7, ECE: 0.02, "ranking/click/gauc": 0.6},
        ),
        "agreement",
        "the comparison lacks ranking/click/gauc, which the Evaluator is configured to compute",
        id="comparison-left-a-metric-out",
    ),
    pytest.param(
        with_metrics(
            "retrieval", distinct=metric(DISTINCT, 40.0, popularity=Against(40.0, 0.0, None, None, None))
        ),
        "collapse",
        "retrieval/distinct_items_at_10 40, required: more than 40, "
        "one list for everybody less what each has seen",
        id="collapsed-towers",
    ),
    pytest.param(
        # Two lists, one for each end of the line: more items than popularity gives.
        with_item_rank(1.4),
        "collapse",
        "retrieval/candidate_effective_rank 1.40, required: at least 1.5",
        id="item-vectors-on-a-line",
    ),
    pytest.param(
        with_evidence("retrieval", comparison=dataclasses.replace(HEALTHY["retrieval"].comparison, facts={})),
        "collapse",
        "the comparison lacks retrieval/candidate_effective_rank",
        id="item-vectors-not-judged",
    ),
    pytest.param(
        with_facts(click_prediction_std=0.0),
        "collapse",
        "predictions of click have a standard deviation of 0, labels of 0.5, "
        "required: at least 1% of that of the labels",
        id="collapsed-head",
    ),
    pytest.param(
        with_evidence("retrieval", index_recall={"": 0.9, "head": 0.95, "tail": 0.95}),
        "index",
        "index recall 0.9000, required: at least 0.95",
        id="shuffled-index",
    ),
    pytest.param(
        with_evidence("retrieval", index_recall={"": 0.98, "head": 1.0, "cold": 0.4}),
        "index",
        "index recall of cold items 0.4000, required: at least 0.9",
        id="index-that-loses-cold-items",
    ),
    pytest.param(
        with_evidence("retrieval", index_recall=None),
        "index",
        "the export says nothing of its index",
        id="no-index-facts",
    ),
    pytest.param(
        # 50 labels of 500: chance makes √(2 · 20 · .9 / (π · 50)) = .479 of the mean label, and 1 + 1.96 ·
        # √((π / 2 − 1) / 20) = 1.331 times that at 97.5 %.
        with_ece(0.064, mean_label=0.1, mean_prediction=0.1),
        "calibration",
        "ece of click 0.0640 is 0.64 of the mean label 0.1000, required: at most 0.637; its predictions "
        "expect 50.0 positives where there are 50, 0 of these too few, required: at most 0.777",
        id="miscalibrated-head",
    ),
    pytest.param(
        # .5 + 1.96 / √50 = .777
        with_ece(0.06, mean_label=0.1, mean_prediction=0.178),
        "calibration",
        "ece of click 0.0600 is 0.6 of the mean label 0.1000, required: at most 0.637; "
        "its predictions expect 89.0 positives where there are 50, 0.78 of these too many, "
        "required: at most 0.777",
        id="head-that-is-too-high",
    ),
    pytest.param(
        # .5 + 1.96 · √10 / 50 = .624
        with_ece(0.06, mean_label=0.1, mean_prediction=0.02),
        "calibration",
        "ece of click 0.0600 is 0.6 of the mean label 0.1000, required: at most 0.637; "
        "its predictions expect 10.0 positives where there are 50, 0.8 of these too few, "
        "required: at most 0.624",
        id="head-that-is-too-low",
    ),
    pytest.param(
        with_evidence("ranking", serving_reason="a golden request of ranking is answered otherwise"),
        "serving",
        "infra validation: a golden request of ranking is answered otherwise",
        id="training-serving-skew",
    ),
    pytest.param(
        with_evidence("retrieval", load=Load(71.3, ["p99 was 71.3 ms at 20/s, the limit is 50 ms"])),
        "latency",
        "the objective (slo) is missed: p99 was 71.3 ms at 20/s, the limit is 50 ms",
        id="slow-models",
    ),
    pytest.param(
        with_evidence("retrieval", load=Load(None, ["100.00% of 400 requests failed"])),
        "latency",
        "the objective (slo) is missed: 100.00% of 400 requests failed",
        id="no-answer-under-load",
    ),
    pytest.param(
        with_evidence("retrieval", load=None),
        "latency",
        "latency: no load was put on the models",
        id="objective-that-nobody-measured",
    ),
    pytest.param(
        with_evidence("ranking", anomalies={"train": [], "eval": ["device: Column dropped"]}),
        "anomalies",
        "data anomalies: eval: device: Column dropped",
        id="dropped-feature",
    ),
    pytest.param(
        with_evidence("ranking", anomalies={}),
        "anomalies",
        "data anomalies: ExampleValidator examined no split",
        id="no-split-was-examined",
    ),
    pytest.param(
        with_evidence("ranking", drift=drift(train_to_eval=[("country", 0.4, 0.1), ("device", 0.05, 0.1)])),
        "drift",
        "drift from train to eval: country moved by 0.400 of 0.1 allowed",
        id="eval-unlike-train",
    ),
    pytest.param(
        with_evidence("ranking", drift=drift(train_to_eval=[("age", None, 0.2), ("country", 0.05, 0.1)])),
        "drift",
        "drift from train to eval: age moved by an undefined distance of 0.2 allowed",
        id="drift-that-nobody-can-tell",
    ),
    pytest.param(
        with_evidence("ranking", drift=drift(last_run=[("click", 0.3, 0.2)])),
        "drift",
        "drift from the last run's train: click moved by 0.300 of 0.2 allowed",
        id="data-unlike-the-last-run",
    ),
    pytest.param(
        with_evidence("retrieval", leakage=linted(Check("temporal splits", False, "all", ("a, b overlap",)))),
        "leakage",
        "leakage: temporal splits; first: a, b overlap",
        id="leak",
    ),
    pytest.param(
        with_evidence("ranking", leakage=None),
        "leakage",
        "leakage: the linter left no findings",
        id="nobody-looked-for-leaks",
    ),
]


def test_lists_of_the_evaluations_may_differ_by_what_one_of_500_users_is_worth() -> None:
    evidence = with_evidence("retrieval", evaluator={RECALL: 0.3 + 0.0019, DISTINCT: 201.0})
    assert judge(evidence, GATES, CONFIG, TASKS).blessed


@pytest.mark.parametrize(("evidence", "kind", "reason"), SABOTAGES)
def test_each_sabotage_fails_its_own_gate_alone_and_the_reason_is_one_line(
    evidence: Evidence, kind: str, reason: str
) -> None:
    result = judge(evidence, GATES, CONFIG, TASKS)
    failed = [gate for gate in result.gates if gate.verdict is Verdict.FAILED]
    assert not result.blessed
    assert reason in result.reason and "\n" not in result.reason
    assert [gate.kind for gate in failed if gate.reason == reason] == [kind]
    # A metric that is not defined fails whatever is asked of it.
    if "undefined" not in reason:
        assert [gate.kind for gate in failed] == [kind]


def test_predictions_that_are_not_numbers_fail_every_gate_on_them_with_the_reason() -> None:
    note = "3 of 500 predictions of click are NaN or infinite"
    undefined = {
        name: dataclasses.replace(metric(key, None), note=note) for name, key in (("auc", AUC), ("ece", ECE))
    }
    evidence = with_metrics("ranking", **undefined)
    facts = {**evidence.comparison.facts, "click/prediction_std": None}
    evidence = dataclasses.replace(evidence, comparison=dataclasses.replace(evidence.comparison, facts=facts))
    result = judge(evidence, GATES, CONFIG, TASKS)
    failed = [gate.kind for gate in result.gates if gate.verdict is Verdict.FAILED]
    assert failed == ["value", "no_worse", "must_beat", "value", "collapse", "calibration"]
    assert f"ranking/click/auc is undefined: {note}, required: at least 0.6" in result.reason
    assert "predictions of click have no standard deviation: some are NaN or infinite" in result.reason
    assert f"ece of click is undefined: {note}" in result.reason


def test_lower_is_better_for_errors_in_every_comparison() -> None:
    worse = with_metrics("ranking", ece=metric(ECE, 0.02, last_blessed=change(0.008, 0.012)))
    better = with_metrics("ranking", ece=metric(ECE, 0.02, last_blessed=change(0.032, -0.012)))
    gates = (Gate(metric=ECE, max_drop=0.01),)
    for evidence, verdict in ((worse, Verdict.FAILED), (better, Verdict.PASSED)):
        (found,) = (g for g in judge(evidence, gates, CONFIG, TASKS).gates if g.kind == "no_worse")
        assert found.verdict is verdict


def test_models_that_differ_on_a_handful_of_users_are_neither_better_nor_no_worse() -> None:
    same = metric(
        RECALL,
        0.3,
        last_blessed=Against(0.299, 0.001, None, None, None),
        popularity=Against(0.299, 0.001, None, None, None),
    )
    gates = (Gate(metric=RECALL, max_drop=0.01, beats=("popularity",)),)
    result = judge(with_metrics("retrieval", recall=same), gates, CONFIG, TASKS)
    unsure = "how surely is not known: the models differ on fewer than 10 users"
    failed = {gate.kind: gate.reason for gate in result.gates if gate.verdict is Verdict.FAILED}
    assert failed.keys() == {"no_worse", "must_beat"}
    assert f"changed by +0.0010 ({unsure})" in failed["no_worse"]
    assert f"(+0.0010, {unsure})" in failed["must_beat"]


def test_a_change_of_unknown_certainty_fails_and_says_why() -> None:
    unsure = dataclasses.replace(
        metric(RECALL, 0.3, last_blessed=Against(0.3, 0.0, None, None, None)),
        note="8 users, of 10 that an interval takes",
    )
    gates = (Gate(metric=RECALL, max_drop=0.01),)
    result = judge(with_metrics("retrieval", recall=unsure), gates, CONFIG, TASKS)
    (found,) = (gate for gate in result.gates if gate.kind == "no_worse")
    assert found.verdict is Verdict.FAILED
    assert found.reason == (
        "retrieval/recall_at_100 changed by +0.0000 (how surely is not known: 8 users, of 10 that an "
        "interval takes), required: no more than 0.01 worse than the last blessed model"
    )


@pytest.mark.parametrize(("difference", "verdict"), [(-5.0, Verdict.PASSED), (-11.0, Verdict.FAILED)])
def test_one_number_for_all_users_is_compared_by_its_value(difference: float, verdict: Verdict) -> None:
    changed = Against(200.0 - difference, difference, None, None, None)
    popular = Against(14.0, 186.0, None, None, None)
    distinct = metric(DISTINCT, 200.0, last_blessed=changed, popularity=popular)
    gates = (Gate(metric=DISTINCT, max_drop=10),)
    result = judge(with_metrics("retrieval", distinct=distinct), gates, CONFIG, TASKS)
    (found,) = (gate for gate in result.gates if gate.kind == "no_worse")
    assert found.verdict is verdict
    assert f"changed by {difference:+.4f} (one number for all users, without an interval)" in found.reason


def test_by_value_a_baseline_is_beaten_without_certainty() -> None:
    close = with_metrics("ranking", auc=metric(AUC, 0.7, item_mean=change(0.697, 0.003)))
    for by, verdict in (("value", Verdict.PASSED), ("interval", Verdict.FAILED)):
        gates = (Gate.model_validate({"metric": AUC, "beats": ["item_mean"], "by": by}),)
        (found,) = (g for g in judge(close, gates, CONFIG, TASKS).gates if g.kind == "must_beat")
        assert found.verdict is verdict


def test_without_a_blessed_model_or_positives_there_is_nothing_to_apply() -> None:
    first = dataclasses.replace(
        HEALTHY["retrieval"].comparison, absent={"last_blessed": "no model was blessed before"}
    )
    found = judged(with_evidence("retrieval", comparison=first))
    name = "retrieval/recall_at_100 no more than 0.02 worse than the last blessed model"
    assert found[name].verdict is Verdict.NOT_APPLIED
    assert found[name].reason.endswith("is compared with nothing: no model was blessed before")
    assert found["index recall of cold items at least 0.9"].verdict is Verdict.NOT_APPLIED
    few_items = judged(with_item_rank(None))[f"{ITEM_RANK} at least 1.5"]
    assert (few_items.verdict, few_items.reason) == (
        Verdict.NOT_APPLIED,
        "the catalogue has fewer than 10 items",
    )
    no_clicks = judged(with_facts(click_mean_label=0.0, click_label_std=0.0))
    assert no_clicks[CALIBRATION].verdict is Verdict.NOT_APPLIED
    assert no_clicks["spread of click at least 1% of that of the labels"].verdict is Verdict.NOT_APPLIED


def test_of_a_rare_label_the_calibration_error_of_chance_passes_and_no_multiple_of_it() -> None:
    # 10 labels of 500: chance makes √(2 · 20 · .98 / (π · 10)) = 1.117 of the mean label, at 97.5 % 1.487.
    for error, verdict in ((0.0297, Verdict.PASSED), (0.0298, Verdict.FAILED)):
        assert judged(with_ece(error, mean_label=0.02, mean_prediction=0.02))[CALIBRATION].verdict is verdict


def rare_probabilities(num_rows: int, positives: int, rng: np.random.Generator) -> FloatArray:
    """Probabilities that differ and add up to the expected positives."""
    weights = rng.lognormal(sigma=0.5, size=num_rows)
    return positives * weights / weights.sum()


def with_head(labels: FloatArray, predictions: FloatArray) -> Evidence:
    error = ece(labels, predictions)
    return with_ece(error, float(labels.mean()), float(predictions.mean()), len(labels))


@pytest.mark.parametrize(
    ("num_rows", "positives", "factor"),
    [(12_000, 16, 0.0), (12_000, 16, 0.2), (12_000, 16, 2.2), (60_000, 100, 1.8)],
)
def test_a_rare_head_that_is_off_by_a_factor_fails(num_rows: int, positives: int, factor: float) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        truth = rare_probabilities(num_rows, positives, rng)
        labels = np.zeros(num_rows)
        labels[rng.choice(num_rows, positives, replace=False, p=truth / positives)] = 1
        found = judged(with_head(labels, factor * truth))[CALIBRATION]
        assert found.verdict is Verdict.FAILED, found.reason


@pytest.mark.parametrize("positives", [16, 60, 600])
def test_true_probabilities_pass_but_for_the_share_that_the_confidence_leaves(positives: int) -> None:
    passed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = rare_probabilities(12_000, positives, rng)
        labels = (rng.random(12_000) < truth).astype(float)
        passed += judged(with_head(labels, truth))[CALIBRATION].verdict is Verdict.PASSED
    # Each half of the gate stops 1 in 40.
    assert passed >= 38


def test_no_objective_or_a_failure_before_its_load_leaves_latency_to_nobody() -> None:
    """The failure has a gate of its own, and one reason is enough."""
    none = judged(with_evidence("retrieval", slo=None, load=None))["latency objective"]
    assert none.verdict is Verdict.NOT_APPLIED
    assert none.reason == "latency under load is not judged: the configuration sets no objective (slo)"
    broken = judged(with_evidence("retrieval", load=None, serving_reason="it does not start"))
    assert broken["latency objective"].verdict is Verdict.NOT_APPLIED
    assert broken["infra validation"].verdict is Verdict.FAILED


def test_a_blessed_model_that_cannot_be_compared_with_fails_unless_that_is_accepted() -> None:
    why = "it does not answer this run's examples: the feature 'mood' is required"
    absent = dataclasses.replace(HEALTHY["retrieval"].comparison, absent={"last_blessed": why})
    evidence = with_evidence("retrieval", comparison=absent)
    result = judge(evidence, GATES, CONFIG, TASKS)
    assert not result.blessed
    assert result.reason == (
        f"retrieval/recall_at_100 cannot be compared with the last blessed model: {why}; "
        "to accept that once, run with --set validation.accept_incomparable_blessed=true"
    )
    accepted = judge(evidence, GATES, ValidationConfig(accept_incomparable_blessed=True), TASKS)
    assert accepted.blessed
    (found,) = (gate for gate in accepted.gates if gate.kind == "no_worse")
    assert found.verdict is Verdict.NOT_APPLIED
    assert found.reason.endswith(f"{why}; accepted by validation.accept_incomparable_blessed")


def test_conditions_that_are_switched_off_are_not_there() -> None:
    off = ValidationConfig(
        min_index_recall=None, min_index_slice_recall=None, max_relative_ece=None, drift=None, leakage=None
    )
    kinds = {gate.kind for model in HEALTHY for gate in judged(HEALTHY[model], off).values()}
    kept = {"value", "no_worse", "must_beat", "agreement", "collapse", "serving", "latency", "anomalies"}
    assert kinds == kept


@pytest.mark.parametrize(
    ("gate", "kind", "reason"),
    [
        (
            Gate(metric="ranking/click/gauc", min=0.1),
            "value",
            "ranking/click/gauc is not measured: this data does not have what it takes",
        ),
        (
            Gate(metric=AUC, beats=("lightgbm",)),
            "must_beat",
            "ranking/click/auc is to beat lightgbm, which this data does not have; it has: item_mean",
        ),
        (
            Gate(metric=ECE, beats=("item_mean",)),
            "must_beat",
            "ranking/click/ece is to beat item_mean, which this data does not have; it has: none",
        ),
    ],
)
def test_a_gate_on_what_the_data_lack_fails_with_the_reason(gate: Gate, kind: str, reason: str) -> None:
    result = judge(HEALTHY["ranking"], (gate,), CONFIG, TASKS)
    failed = [(gate.kind, gate.reason) for gate in result.gates if gate.verdict is Verdict.FAILED]
    assert failed == [(kind, reason)]
    assert result.reason == reason
