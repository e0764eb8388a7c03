"""What became of each model and why, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tfx_pipeline.report import formatting, metric_keys
from tfx_pipeline.report.facts import GateResult, RunFacts


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one model: `released`, `held` (blessed, not pushed) or `rejected`, and why."""

    model: str
    state: str
    sentence: str
    reasons: tuple[str, ...]
    headline: str


def overall_sentence(verdicts: Sequence[Verdict]) -> str:
    """The page's first sentence."""
    released = [v.model for v in verdicts if v.state == "released"]
    if len(released) == len(verdicts):
        return "Both models were released."
    return f"Only the {released[0]} model was released." if released else "Nothing was released."


def reason_sentence(verdicts: Sequence[Verdict], facts: RunFacts) -> str:
    """Why it went that way, in one line."""
    for state in ("rejected", "held"):
        for found in verdicts:
            if found.state == state and found.reasons:
                more = len(found.reasons) - 1
                return f"{found.model.capitalize()}: {found.reasons[0]}" + (
                    f" And {more} more reason{'s' if more > 1 else ''}." if more else ""
                )
    applied = [gate for model in facts.models.values() for gate in model.gates if gate.passed is not None]
    return (
        f"All {len(applied)} gates that applied were passed, and both models answered like one from a "
        "freshly started server."
    )


def verdict(name: str, facts: RunFacts) -> Verdict:
    """Which way it went for a model, with every reason."""
    model = facts.models[name]
    reasons = [_gate_reason(gate) for gate in model.gates if gate.passed is False]
    if not model.blessed and not reasons:
        absent = facts.missing.get(f"{name}_evaluation")
        reasons = [
            f"The evaluation cannot be read: {absent}"
            if absent
            else "No gate failed, but the Evaluator blessed nothing; a model without gates is never blessed."
        ]
    if not facts.infra_blessed:
        why = facts.infra_reason or "no reason was recorded."
        reasons.append(f"Infra validation, which serves both models and asks them questions, failed: {why}")
    if model.pushed_version:
        state, sentence = "released", f"blessed and pushed as version {model.pushed_version}"
    elif model.blessed:
        state, sentence = "held", "blessed, but not pushed"
        reasons = reasons or ["The Pusher recorded no version; its log says why."]
    else:
        state, sentence = "rejected", "not blessed, so not pushed"
    return Verdict(name, state, sentence, tuple(reasons), _headline(name, facts))


def headline_key(name: str, facts: RunFacts) -> str | None:
    """The metric that stands for a model: of its first gate, else the widest recall, else the first AUC."""
    model = facts.models[name]
    keys = [key for key in model.overall if not metric_keys.is_count(key)]
    gated = [gate.key for gate in model.gates if gate.key in keys]
    recalls = sorted(
        (k for k in keys if metric_keys.base(k) == "recall"), key=metric_keys.cutoff, reverse=True
    )
    aucs = [k for k in metric_keys.in_task_order(keys, facts.tasks) if metric_keys.base(k) in {"auc", "xauc"}]
    return next(iter([*gated, *recalls, *aucs, *keys]), None)


def _headline(name: str, facts: RunFacts) -> str:
    key = headline_key(name, facts)
    if key is None:
        return ""
    model = facts.models[name]
    value = model.overall[key]
    sentence = f"{metric_keys.label(key)} {formatting.decimal(value)}"
    if value is None:
        return sentence
    rivals = {
        rival: score for rival, values in model.rivals.items() if (score := values.get(key)) is not None
    }
    if "last_blessed" in rivals:
        sentence += (
            f", {formatting.difference(value - rivals.pop('last_blessed'))} against the last blessed model"
        )
    if rivals:
        best = min(rivals, key=lambda rival: metric_keys.badness(key, rivals[rival]))
        gain = formatting.difference(value - rivals[best])
        sentence += f", {gain} against the best baseline ({formatting.words(best)})"
    return sentence


def _gate_reason(gate: GateResult) -> str:
    label, condition = metric_keys.label(gate.key), formatting.typeset(gate.condition)
    if gate.is_change:
        change = formatting.difference(gate.value)
        return f"{label} changed by {change} against the last blessed model; the gate asks for {condition}."
    return f"{label} is {formatting.decimal(gate.value)}; the gate asks for {condition}."
