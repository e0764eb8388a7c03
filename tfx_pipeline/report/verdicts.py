"""What became of each model and why, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tfx_pipeline.gates import Verdict, why_held_back
from tfx_pipeline.report import formatting, metric_keys
from tfx_pipeline.report.facts import Against, RunFacts
from trainer.comparison import LAST_BLESSED


@dataclasses.dataclass(frozen=True)
class ModelVerdict:
    """What became of one model: `released`, `held` (blessed, not pushed) or `rejected`, and why."""

    model: str
    state: str
    sentence: str
    reasons: tuple[str, ...]
    headline: str


def overall_sentence(verdicts: Sequence[ModelVerdict]) -> str:
    """The page's first sentence."""
    released = [v.model for v in verdicts if v.state == "released"]
    if len(released) == len(verdicts):
        return "Both models were released."
    return f"Only the {released[0]} model was released." if released else "Nothing was released."


def reason_sentence(verdicts: Sequence[ModelVerdict], facts: RunFacts) -> str:
    """Why it went that way, in one line."""
    told = []
    for found in verdicts:
        if found.state != "released" and found.reasons:
            more = len(found.reasons) - 1
            rest = f" And {more} more reason{'s' if more > 1 else ''}." if more else ""
            told.append(f"{found.model.capitalize()}: {found.reasons[0]}{rest}")
    if told:
        return " ".join(told)
    gates = [gate for model in facts.models.values() for gate in model.gates]
    applied = [gate for gate in gates if gate.verdict is not Verdict.NOT_APPLIED]
    return f"All {len(applied)} gates that applied were passed."


def verdict(name: str, facts: RunFacts) -> ModelVerdict:
    """Which way it went for a model, with every reason."""
    model = facts.models[name]
    reasons = [
        f"{formatting.typeset(gate.reason)}." for gate in model.gates if gate.verdict is Verdict.FAILED
    ]
    if not model.blessed and not reasons:
        absent = facts.missing.get(f"{name}_gates")
        reasons = [
            f"The verdicts of the gates cannot be read: {absent}."
            if absent
            else "No gate failed, but none on a metric was passed either; such a model is never blessed."
        ]
    if not facts.infra_blessed and not any(gate.kind == "serving" for gate in model.gates):
        why = facts.infra_reason or "no reason was recorded"
        reasons.append(f"Infra validation, which serves both models and asks them questions, failed: {why}.")
    if model.pushed_version:
        state, sentence = "released", f"blessed and pushed as version {model.pushed_version}"
    elif model.blessed:
        state, sentence = "held", "blessed, but not pushed"
        held_back = why_held_back(name, {other: facts.models[other].blessed for other in facts.models})
        if held_back:
            reasons.append(f"{held_back[0].upper()}{held_back[1:]}.")
        reasons = reasons or ["The Pusher recorded no version; its log says why."]
    else:
        state, sentence = "rejected", "not blessed, so not pushed"
    return ModelVerdict(name, state, sentence, tuple(reasons), _headline(name, facts))


def headline_key(name: str, facts: RunFacts) -> str | None:
    """The metric that stands for a model: of its slices, else the widest recall, else the first AUC."""
    model = facts.models[name]
    keys = list(model.overall)
    named = [model.headline] if model.headline in keys else []
    recalls = sorted(
        (k for k in keys if metric_keys.base(k) == "recall"), key=metric_keys.cutoff, reverse=True
    )
    aucs = [k for k in metric_keys.in_task_order(keys, facts.tasks) if metric_keys.base(k) in {"auc", "xauc"}]
    return next(iter([*named, *recalls, *aucs, *keys]), None)


def _headline(name: str, facts: RunFacts) -> str:
    key = headline_key(name, facts)
    if key is None:
        return ""
    figure = next(f for f in facts.models[name].figures if not f.slice and f.key == key)
    sentence = f"{metric_keys.label(key)} {formatting.decimal(figure.value)}"
    against = [
        a for a in facts.models[name].against if not a.slice and a.key == key and a.difference is not None
    ]
    baselines = [a for a in against if a.rival != LAST_BLESSED and a.value is not None]
    for a in against:
        if a.rival == LAST_BLESSED:
            sentence += f", {_difference(a)} against the last blessed model"
    if baselines:
        best = min(baselines, key=lambda a: metric_keys.badness(key, a.value or 0.0))
        sentence += f", {_difference(best)} against the best baseline ({formatting.rival(best.rival)})"
    return sentence


def _difference(a: Against) -> str:
    text = formatting.difference(a.difference)
    if a.low is None or a.high is None:
        return text
    low, high = (formatting.difference(bound) for bound in (a.low, a.high))
    return f"{text} ({low} to {high})"
