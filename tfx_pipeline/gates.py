"""Whether a model may be released: every condition, its verdict and its reason, in one place.

`judge` turns what the components found (`Evidence`) into verdicts. A new gate is a function that yields
`GateResult`s, and a line in `judge`; docs/evaluation.md lists them all.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from schema.contract import TaskKind, TaskSpec
from serving.slo import Slo
from tfx_pipeline.config import RANKING, RETRIEVAL, Gate, ValidationConfig
from tfx_pipeline.drift_facts import LAST_RUN, TRAIN_TO_EVAL, DriftFacts, FeatureDrift
from tfx_pipeline.leakage.findings import LeakageReport
from trainer.collapse import CANDIDATE_RANK, MIN_EFFECTIVE_RANK, MIN_VECTORS
from trainer.comparison import LAST_BLESSED, NO_BLESSED_MODEL, Against, Comparison, MetricResult
from trainer.facts_file import read_facts, write_facts
from trainer.metrics import chance_ece, has_interval, lower_is_better, metric_key
from trainer.uncertainty import MIN_USERS, PairedDifference, no_worse

GATES_FILE = "gates.json"
# The Evaluator and the comparison compute the same metrics from the same examples, apart from each other.
AGREEMENT_TOLERANCE = 1e-6
# A head whose predictions vary less than this share of its labels says the same of everybody.
_MIN_STD_SHARE = 0.01
_POPULARITY = "popularity"
# Why a change has no interval where the metric has one.
_TOO_ALIKE = f"the models differ on fewer than {MIN_USERS} users"
# Kinds that say how good the model is; the others say that nothing is broken.
_MEASURED = ("value", "must_beat", "no_worse")


class Verdict(str, enum.Enum):
    """NOT_APPLIED: there was nothing to judge, for instance no model was ever blessed."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLIED = "not applied"


@dataclasses.dataclass(frozen=True)
class GateResult:
    """One gate.

    Attributes:
      kind: what sort of condition, see `docs/evaluation.md`: value, no_worse, must_beat, index, collapse,
        calibration, agreement, serving, latency, anomalies, drift, leakage.
      name: unique among the gates of a model, for instance `retrieval/recall_at_100 at least 0.05`.
      metric: key of the metric that is judged; "" where it is something else.
      verdict: NOT_APPLIED does not stop a model.
      value: what was judged; None where there is no one number, or it is not defined.
      limit: the condition in words, for instance `at least 0.05`.
      reason: one sentence that says what came and what was required.
    """

    kind: str
    name: str
    verdict: Verdict
    value: float | None
    limit: str
    reason: str
    metric: str = ""


@dataclasses.dataclass(frozen=True)
class Validation:
    """The verdict on one model, saved as gates.json beside its blessing.

    Attributes:
      model: `retrieval` or `ranking`.
      blessed: whether no gate failed, and at least one on a metric passed.
      reason: "" for a blessed model; else the reasons of the failed gates in one line.
      gates: every gate, in the order of the documentation.
    """

    model: str
    blessed: bool
    reason: str
    gates: tuple[GateResult, ...]


@dataclasses.dataclass(frozen=True)
class Load:
    """What the candidate models held under the load of the objective.

    Attributes:
      p99_ms: of answered requests, from their scheduled time; None where none was answered.
      misses: what of the objective is missed, in words.
    """

    p99_ms: float | None
    misses: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of a candidate; None where a component found nothing out.

    Attributes:
      comparison: with the last blessed model and the baselines.
      evaluated: metric keys that the Evaluator is configured to compute, at least one.
      evaluator: metric key -> the Evaluator's value on the whole split.
      index_recall: of the index against exact search, by slice of items, "" being all; retrieval only.
      serving_reason: why infra validation failed before any load; "" when all answers were in order.
      slo: the objective; None where the configuration sets none.
      load: how the models held its load; None where none was put on them.
      anomalies: split -> what ExampleValidator found in it, a sentence each.
      drift: how far the data moved.
      leakage: what the leakage linter found; None where it did not look.
    """

    comparison: Comparison
    evaluated: Sequence[str]
    evaluator: Mapping[str, float | None]
    index_recall: Mapping[str, float | None] | None
    serving_reason: str
    slo: Slo | None
    load: Load | None
    anomalies: Mapping[str, Sequence[str]]
    drift: DriftFacts
    leakage: LeakageReport | None


def judge(
    evidence: Evidence, gates: Iterable[Gate], config: ValidationConfig, tasks: Sequence[TaskSpec]
) -> Validation:
    """Applies every gate to one model.

    Args:
      evidence: what is known of it.
      gates: of the configuration; those of the other model are left out.
      config: the conditions besides.
      tasks: of the ranker.
    """
    model = evidence.comparison.model
    results = [
        result
        for gate in gates
        if gate.metric.startswith(f"{model}/")
        for result in _metric_gates(gate, evidence.comparison, config)
    ]
    results.append(_agreement(evidence))
    results += _collapse(evidence.comparison, tasks)
    if model == RETRIEVAL:
        results += _index(evidence.index_recall, config)
    else:
        results += _calibration(evidence.comparison, config, tasks)
    results.append(_serving(evidence.serving_reason))
    results.append(_latency(evidence))
    results.append(_anomalies(evidence.anomalies))
    if config.drift is not None:
        results += _drift(evidence.drift)
    if config.leakage is not None:
        results.append(_leakage(evidence.leakage))
    return validation(model, tuple(results))


def _metric_gates(gate: Gate, comparison: Comparison, config: ValidationConfig) -> Iterator[GateResult]:
    """The conditions of one gate of the configuration."""
    metric = comparison.whole.metric(gate.metric)
    if metric is None:
        reason = f"{gate.metric} is not measured: this data does not have what it takes"
        yield _result("value", f"{gate.metric} measured", False, None, "measured", reason, gate.metric)
        return
    value = metric.value
    shown = f"{gate.metric} is undefined: {metric.note}" if value is None else f"{gate.metric} {value:.4f}"
    for bound, words, sign in ((gate.min, "at least", 1.0), (gate.max, "at most", -1.0)):
        if bound is not None:
            limit = f"{words} {bound:g}"
            passed = value is not None and sign * value >= sign * bound
            reason = f"{shown}, required: {limit}"
            yield _result("value", f"{gate.metric} {limit}", passed, value, limit, reason, gate.metric)
    if gate.max_drop is not None:
        yield _no_worse(gate.metric, gate.max_drop, metric, comparison, config)
    for baseline in gate.beats:
        yield _beats(gate, baseline, metric, comparison)


def _no_worse(
    key: str, max_drop: float, metric: MetricResult, comparison: Comparison, config: ValidationConfig
) -> GateResult:
    """Non-inferiority: the bad end of the interval of the difference is within max_drop.

    A blessed model that cannot be compared with fails the candidate: whether it is worse is not known.
    """
    side = 1.0 if lower_is_better(key) else -1.0
    limit = f"no more than {max_drop:g} worse than the last blessed model"
    name = f"{key} {limit}"
    if LAST_BLESSED in comparison.absent:
        why = comparison.absent[LAST_BLESSED]
        reason = f"{key} is compared with nothing: {why}"
        if why == NO_BLESSED_MODEL:
            return _not_applied("no_worse", name, limit, reason, key)
        reason = f"{key} cannot be compared with the last blessed model: {why}"
        if config.accept_incomparable_blessed:
            reason += "; accepted by validation.accept_incomparable_blessed"
            return _not_applied("no_worse", name, limit, reason, key)
        reason += "; to accept that once, run with --set validation.accept_incomparable_blessed=true"
        return _result("no_worse", name, False, None, limit, reason, key)
    change = metric.against.get(LAST_BLESSED)
    if change is None or change.difference is None:
        why = metric.note or "that of the last blessed model is undefined"
        reason = f"{key} has no change: {why}"
        return _result("no_worse", name, False, None, limit, reason, key)
    shown = f"{key} changed by {change.difference:+.4f}"
    if not has_interval(key):
        passed = side * change.difference <= max_drop
        reason = f"{shown} (one number for all users, without an interval), required: {limit}"
        return _result("no_worse", name, passed, change.difference, limit, reason, key)
    outcome = no_worse(_paired(change, change.difference, metric, comparison), max_drop, lower_is_better(key))
    if math.isnan(outcome.worst_loss):
        end = (
            f"how surely is not known: {metric.note or f'the models differ on fewer than {MIN_USERS} users'}"
        )
    else:
        end = f"{side * outcome.worst_loss:+.4f} at {100 * outcome.confidence:g} % confidence"
    reason = f"{shown} ({end}), required: {limit}"
    return _result("no_worse", name, outcome.holds, change.difference, limit, reason, key)


def _paired(
    change: Against, difference: float, metric: MetricResult, comparison: Comparison
) -> PairedDifference:
    """A change as `trainer.uncertainty` has it: NaN for what is not defined."""
    low, high, p = (math.nan if v is None else v for v in (change.low, change.high, change.p_value))
    return PairedDifference(difference, low, high, comparison.confidence, p, metric.count)


def _beats(gate: Gate, baseline: str, metric: MetricResult, comparison: Comparison) -> GateResult:
    """The metric is better than that of a baseline, surely or by its value."""
    limit = f"better than {baseline}"
    name = f"{gate.metric} {limit}"
    against = metric.against.get(baseline)
    if against is None:
        rivals = ", ".join(rival for rival in metric.against if rival != LAST_BLESSED) or "none"
        reason = f"{gate.metric} is to beat {baseline}, which this data does not have; it has: {rivals}"
        return _result("must_beat", name, False, None, limit, reason, gate.metric)
    if against.difference is None or against.value is None or metric.value is None:
        reason = f"{gate.metric} is not compared with {baseline}: {metric.note}"
        return _result("must_beat", name, False, None, limit, reason, gate.metric)
    bound: float | None = against.difference
    if gate.by == "interval":
        bound = against.high if lower_is_better(gate.metric) else against.low
    passed = bound is not None and (bound < 0 if lower_is_better(gate.metric) else bound > 0)
    interval = ""
    if against.low is not None:
        interval = f", {against.low:+.4f} to {against.high:+.4f}"
    elif gate.by == "interval":
        interval = f", how surely is not known: {metric.note or _TOO_ALIKE}"
    reason = (
        f"{gate.metric} {metric.value:.4f} against {against.value:.4f} of {baseline} "
        f"({against.difference:+.4f}{interval}), required: {limit} by its {gate.by}"
    )
    return _result("must_beat", name, passed, against.difference, limit, reason, gate.metric)


def _agreement(evidence: Evidence) -> GateResult:
    """TFMA and the comparison, which judge apart from each other, say the same.

    Of retrieval one list may differ: they ask the model in other batches, in which sums of floats differ in
    their last digit, and of two items that score the same to six digits another one may come in last.
    """
    name = f"evaluations at most {AGREEMENT_TOLERANCE:g} apart"
    if evidence.comparison.model == RETRIEVAL:
        name += ", or one list"
    ours = {metric.key: metric for metric in evidence.comparison.whole.metrics}
    missing = [key for key in evidence.evaluated if key not in evidence.evaluator]
    if missing:
        # `funnel evaluate` meets runs of older versions, which measured less.
        reason = (
            f"the run's evaluation lacks {', '.join(missing)}: if an older version of Funnel made it, "
            "'funnel run' with the same settings makes it again"
        )
        return _result("agreement", name, False, None, "no metric missing", reason)
    missing = [key for key in evidence.evaluated if key not in ours]
    if missing:
        reason = f"the comparison lacks {', '.join(missing)}, which the Evaluator is configured to compute"
        return _result("agreement", name, False, None, "no metric missing", reason)
    gaps = {key: _gap(evidence.evaluator[key], ours[key].value) for key in evidence.evaluated}
    allowed = {key: _allowed_gap(evidence.comparison.model, ours[key]) for key in evidence.evaluated}
    worst = max(gaps, key=lambda key: gaps[key] / allowed[key])
    gap, limit = gaps[worst], f"at most {allowed[worst]:.2g} apart"
    reason = f"the Evaluator and the comparison are {gap:.2g} apart on {worst}, required: {limit}"
    return _result(
        "agreement", name, gap <= allowed[worst], gap if math.isfinite(gap) else None, limit, reason
    )


def _allowed_gap(model: str, metric: MetricResult) -> float:
    """How far Evaluator and comparison may be apart; see `_agreement`."""
    if model != RETRIEVAL:
        return AGREEMENT_TOLERANCE
    one_list = 1.0 / max(metric.count, 1) if has_interval(metric.key) else 1.0
    return max(AGREEMENT_TOLERANCE, one_list)


def _gap(first: float | None, second: float | None) -> float:
    """How far two values are apart; infinitely, where one alone is undefined."""
    if first is None or second is None:
        return 0.0 if first is second else math.inf
    return abs(first - second)


def _collapse(comparison: Comparison, tasks: Sequence[TaskSpec]) -> Iterator[GateResult]:
    """The model says different things of different users and items."""
    if comparison.model == RETRIEVAL:
        metric = next(m for m in comparison.whole.metrics if "/distinct_items_at_" in m.key)
        key = metric.key
        one_list = metric.against[_POPULARITY].value or 0.0
        limit = f"more than {one_list:g}, one list for everybody less what each has seen"
        value = metric.value or 0.0
        reason = f"{key} {value:g}, required: {limit}"
        yield _result("collapse", f"{key} against one list", value > one_list, value, limit, reason)
        yield _item_rank(comparison.facts)
        return
    for task in tasks:
        spread = comparison.facts.get(f"{task.name}/prediction_std")
        of_labels = comparison.facts.get(f"{task.name}/label_std")
        limit = f"at least {_MIN_STD_SHARE:.0%} of that of the labels"
        name = f"spread of {task.name} {limit}"
        if not of_labels:
            yield _not_applied("collapse", name, limit, f"the labels of {task.name} do not vary")
            continue
        if spread is None:
            reason = f"predictions of {task.name} have no standard deviation: some are NaN or infinite"
            yield _result("collapse", name, False, None, limit, reason)
            continue
        reason = (
            f"predictions of {task.name} have a standard deviation of {spread:.4g}, labels of "
            f"{of_labels:.4g}, required: {limit}"
        )
        yield _result("collapse", name, spread >= _MIN_STD_SHARE * of_labels, spread, limit, reason)


def _item_rank(facts: Mapping[str, float | None]) -> GateResult:
    """The served item vectors differ in more than one direction: along one, there are two lists for all."""
    limit = f"at least {MIN_EFFECTIVE_RANK:g}"
    name = f"{CANDIDATE_RANK} {limit}"
    if CANDIDATE_RANK not in facts:
        return _result("collapse", name, False, None, limit, f"the comparison lacks {CANDIDATE_RANK}")
    rank = facts[CANDIDATE_RANK]
    if rank is None:
        return _not_applied("collapse", name, limit, f"the catalogue has fewer than {MIN_VECTORS} items")
    reason = f"{CANDIDATE_RANK} {rank:.2f}, required: {limit}"
    return _result("collapse", name, rank >= MIN_EFFECTIVE_RANK, rank, limit, reason)


def _index(recall: Mapping[str, float | None] | None, config: ValidationConfig) -> Iterator[GateResult]:
    """The index finds what exact search finds, in all and among head, torso, tail and cold items."""
    if recall is None:
        if config.min_index_recall is not None:
            reason = "the export says nothing of its index"
            yield _result(
                "index", "index recall", False, None, f"at least {config.min_index_recall:g}", reason
            )
        return
    for part, value in recall.items():
        bound = config.min_index_slice_recall if part else config.min_index_recall
        if bound is None:
            continue
        words, limit = f"index recall of {part} items" if part else "index recall", f"at least {bound:g}"
        name = f"{words} {limit}"
        if value is None:
            yield _not_applied("index", name, limit, f"{words}: too few exact results are among them to tell")
        else:
            yield _result(
                "index", name, value >= bound, value, limit, f"{words} {value:.4f}, required: {limit}"
            )


def _calibration(
    comparison: Comparison, config: ValidationConfig, tasks: Sequence[TaskSpec]
) -> Iterator[GateResult]:
    """Probabilities are what they say: the calibration error, and that of their sum, are small for the label.

    Of a rare label chance alone makes the ECE almost as large as the rate, whatever the model says: there it
    may be what true probabilities have at the confidence of the gates. That is no room for a bias beside it.
    The sum tells of biases: many rows average out, and what chance leaves is the standard deviation of a
    count, its root. It is the root of the smaller of what is predicted and what came: a head that says too
    much, or nothing, gets no room by that.
    """
    if config.max_relative_ece is None:
        return
    deviations = statistics.NormalDist().inv_cdf((1 + config.confidence) / 2)
    for task in tasks:
        if task.kind is not TaskKind.BINARY:
            continue
        limit = f"off by at most {config.max_relative_ece:g} of the mean of the label, but for chance"
        name = f"probabilities of {task.name} {limit}"
        key = metric_key(RANKING, "ece", task=task.name)
        metric = next(m for m in comparison.whole.metrics if m.key == key)
        rate = comparison.facts.get(f"{task.name}/mean_label")
        if not rate:
            yield _not_applied("calibration", name, limit, f"{task.name} has no positive to compare with")
            continue
        predicted_rate = comparison.facts.get(f"{task.name}/mean_prediction")
        if metric.value is None or predicted_rate is None:
            reason = f"ece of {task.name} is undefined: {metric.note}"
            yield _result("calibration", name, False, None, limit, reason)
            continue
        share, by_chance = metric.value / rate, chance_ece(rate, metric.count, deviations=deviations) / rate
        allowed = max(config.max_relative_ece, by_chance)
        positives, predicted = rate * metric.count, predicted_rate * metric.count
        gap = abs(predicted - positives) / positives
        allowed_gap = config.max_relative_ece + deviations * math.sqrt(min(predicted, positives)) / positives
        side = "many" if predicted > positives else "few"
        reason = (
            f"ece of {task.name} {metric.value:.4f} is {share:.3g} of the mean label {rate:.4f}, required: "
            f"at most {allowed:.3g}; its predictions expect {predicted:,.1f} positives where there are "
            f"{positives:,.0f}, {gap:.3g} of these too {side}, required: at most {allowed_gap:.3g}"
        )
        yield _result("calibration", name, share <= allowed and gap <= allowed_gap, share, limit, reason)


def _serving(reason: str) -> GateResult:
    """Golden requests are answered as in training: no skew between training and serving."""
    said = f"infra validation: {reason}" if reason else "a server with both models answers as it should"
    return _result("serving", "infra validation", not reason, None, "passes", said)


def _latency(evidence: Evidence) -> GateResult:
    """The models hold the load of the objective."""
    slo, load, name = evidence.slo, evidence.load, "latency objective"
    if slo is None:
        reason = "latency under load is not judged: the configuration sets no objective (slo)"
        return _not_applied("latency", name, "none", reason)
    limit = f"p99 at most {slo.p99_ms:g} ms at {slo.rate_per_s:g} requests/s"
    if load is None and evidence.serving_reason:
        reason = "latency: infra validation failed before any load was put on the models"
        return _not_applied("latency", name, limit, reason)
    if load is None:
        return _result("latency", name, False, None, limit, "latency: no load was put on the models")
    if load.misses:
        reason = f"the objective (slo) is missed: {'; '.join(load.misses)}"
        return _result("latency", name, False, load.p99_ms, limit, reason)
    reason = f"latency: p99 {load.p99_ms or 0.0:.1f} ms, required: {limit}"
    return _result("latency", name, True, load.p99_ms, limit, reason)


def _anomalies(anomalies: Mapping[str, Sequence[str]]) -> GateResult:
    """Every split meets the schema."""
    if not anomalies:
        reason = "data anomalies: ExampleValidator examined no split"
        return _result("anomalies", "data anomalies", False, None, "none", reason)
    found = [f"{split}: {text}" for split, texts in anomalies.items() for text in texts]
    reason = f"data anomalies: {'; '.join(found)}" if found else "no split has an anomaly"
    return _result("anomalies", "data anomalies", not found, float(len(found)), "none", reason)


def _drift(drift: DriftFacts) -> Iterator[GateResult]:
    """The data stayed near: train to eval, and this run's train to the last run's."""
    words = {TRAIN_TO_EVAL: "from train to eval", LAST_RUN: "from the last run's train"}
    for name, reason in drift.absent.items():
        yield _not_applied("drift", f"drift {words[name]}", "within the limits", reason)
    for name, measured in drift.found.items():
        title = f"drift {words[name]}"
        far = [feature for feature in measured if feature.is_too_far]
        if not measured:
            yield _not_applied("drift", title, "within the limits", "no feature is compared")
            continue
        shown = far or measured[:1]
        moved = "; ".join(map(_moved, shown))
        reason = f"{title}: {moved}" if far else f"{title}: the farthest, {moved}"
        yield _result("drift", title, not far, measured[0].distance, "within the limits", reason)


def _leakage(found: LeakageReport | None) -> GateResult:
    """Nothing in the data says what nobody could have known at the time."""
    name, limit = "no leak in the data", "every check of the linter passes"
    if found is None:
        reason = "leakage: the linter left no findings"
        return _result("leakage", name, False, None, limit, reason)
    failed = [check for check in found.checks if not check.passed]
    reason = f"leakage: none of {len(found.checks)} checks found a leak"
    if failed:
        first = failed[0].findings[0] if failed[0].findings else failed[0].detail
        reason = f"leakage: {', '.join(check.name for check in failed)}; first: {first}"
    return _result("leakage", name, not failed, float(len(failed)), limit, reason)


def _moved(feature: FeatureDrift) -> str:
    distance = "an undefined distance" if feature.distance is None else f"{feature.distance:.3f}"
    return f"{feature.feature} moved by {distance} of {feature.limit:g} allowed"


def _result(
    kind: str, name: str, passed: bool, value: float | None, limit: str, reason: str, metric: str = ""
) -> GateResult:
    verdict = Verdict.PASSED if passed else Verdict.FAILED
    return GateResult(kind, name, verdict, value, limit, reason, metric)


def _not_applied(kind: str, name: str, limit: str, reason: str, metric: str = "") -> GateResult:
    return GateResult(kind, name, Verdict.NOT_APPLIED, None, limit, reason, metric)


def validation(model: str, gates: tuple[GateResult, ...]) -> Validation:
    """Sums up the gates of a model. A model that nobody measured is not blessed, however sound it is."""
    failed = [gate.reason for gate in gates if gate.verdict is Verdict.FAILED]
    measured = any(gate.kind in _MEASURED and gate.verdict is Verdict.PASSED for gate in gates)
    if not failed and not measured:
        failed = ["no gate on a metric was applied; give one with min, max or beats under 'gates'"]
    return Validation(model, not failed, "; ".join(failed), gates)


def why_held_back(model: str, blessed: Mapping[str, bool]) -> str | None:
    """Why a blessed model is not pushed: the other one is not blessed; None when that is not so.

    Args:
      model: `retrieval` or `ranking`.
      blessed: per model, whether it is.

    >>> why_held_back("ranking", {"retrieval": False, "ranking": True})
    'bundles are pushed together, and retrieval is not blessed'
    """
    refused = [other for other, is_blessed in blessed.items() if not is_blessed]
    if not blessed[model] or not refused:
        return None
    return f"bundles are pushed together, and {refused[0]} is not blessed"


def write_validation(result: Validation, folder: Path) -> None:
    """Writes gates.json."""
    write_facts(result, folder / GATES_FILE)


def read_validation(folder: Path) -> Validation:
    """Reads gates.json.

    Raises:
      DataError: there is none, or it has another form.
    """
    return read_facts(Validation, folder / GATES_FILE)
