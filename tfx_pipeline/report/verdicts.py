"""What became of each model and why, in words."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

from tfx_pipeline.config import RANKING, RETRIEVAL
from tfx_pipeline.gates import Verdict, why_held_back
from tfx_pipeline.report import formatting, metric_keys
from tfx_pipeline.report.facts import Against, ModelFacts, RunFacts
from trainer.comparison import LAST_BLESSED

_COUNTED = {RETRIEVAL: "users", RANKING: "impressions of test users"}


@dataclasses.dataclass(frozen=True)
class ModelVerdict:
    """What became of one model: `released`, `held` (blessed, not pushed) or `rejected`, and why.

    `answers` holds questions with their answers: is it better, for whom, how sure is that.
    """

    model: str
    state: str
    sentence: str
    reasons: tuple[str, ...]
    answers: tuple[tuple[str, str], ...]


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
    idle = len(gates) - len(applied)
    rest = f" {idle} had nothing to judge." if idle else ""
    return f"All {len(applied)} gates that applied were passed.{rest}"


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
    return ModelVerdict(name, state, sentence, tuple(reasons), tuple(_answers(name, facts)))


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


def best_baseline(name: str, facts: RunFacts) -> Against | None:
    """The baseline that does best by the headline on the whole test split; None without one."""
    key = headline_key(name, facts)
    baselines = [
        a
        for a in facts.models[name].against
        if not a.slice and a.key == key and a.rival != LAST_BLESSED and a.difference is not None
    ]
    return min(baselines, key=lambda a: metric_keys.badness(a.key, a.value or 0.0), default=None)


def _answers(name: str, facts: RunFacts) -> Iterator[tuple[str, str]]:
    model, key = facts.models[name], headline_key(name, facts)
    if key is None:
        return
    figure = next(f for f in model.figures if not f.slice and f.key == key)
    yield metric_keys.label(key), f"{formatting.decimal(figure.value)}{_bounds(figure.low, figure.high)}"
    whole = [a for a in model.against if not a.slice and a.key == key and a.difference is not None]
    best = best_baseline(name, facts)
    told = [_compared(a, "the last blessed model") for a in whole if a.rival == LAST_BLESSED]
    if best is not None:
        told.append(_compared(best, f"{formatting.rival(best.rival)}, the best baseline"))
    if told:
        yield "Better?", ". ".join(text[0].upper() + text[1:] for text in told)
    if slices := _for_whom(model, key, best):
        yield "For whom?", slices
    if model.confidence is not None:
        sure = f"{model.confidence:.0%} intervals over {figure.count:,} {_COUNTED[name]}"
        yield "How sure?", sure + _of_seeds(facts.seeds.get(name, {}).get(key, ()))


def _of_seeds(values: Sequence[float | None]) -> str:
    """How much other seeds move the headline; "" where nobody trained with others."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return ""
    spread = formatting.decimal(statistics.stdev(known))
    return f"; other seeds move it by {spread} (standard deviation of {len(known)})"


def _compared(a: Against, rival: str) -> str:
    """`surely worse than iALS, the best baseline: −0.0384 (−0.0509 to −0.0259)`."""
    worsening = metric_keys.badness(a.key, a.difference or 0.0) - metric_keys.badness(a.key, 0.0)
    if a.low is None or a.high is None:
        words = "worse than" if worsening > 0 else "better than" if worsening < 0 else "equal to"
    elif not a.is_clear:
        words = "no clear difference from"
    else:
        words = "surely worse than" if worsening > 0 else "surely better than"
    bounds = _bounds(a.low, a.high, formatting.difference)
    return f"{words} {rival}: {formatting.difference(a.difference)}{bounds}"


def _bounds(low: float | None, high: float | None, text: Callable[[float], str] = formatting.decimal) -> str:
    return "" if low is None or high is None else f" ({text(low)} to {text(high)})"


def _for_whom(model: ModelFacts, key: str, best: Against | None) -> str:
    """Slices on which it is surely better or worse: than the last blessed model, and than the best baseline.

    Without a last blessed model the weakest slice is named, too.
    """
    trusted = [part.name for part in model.slices if part.name and not part.note]
    told = [_by_slice(model, key, trusted, LAST_BLESSED, "than the last blessed model")]
    if best is not None:
        told.append(_by_slice(model, key, trusted, best.rival, f"than {formatting.rival(best.rival)}"))
    values = [
        (metric_keys.badness(key, value), part, value)
        for part in trusted
        if (value := model.on(part).get(key)) is not None
    ]
    if values and not model.is_compared_with_last_blessed:
        _, part, value = max(values)
        told.append(
            f"Weakest of {len(values)} slices: {formatting.words(part)} ({formatting.decimal(value)})"
        )
    return ". ".join(filter(None, told))


def _by_slice(model: ModelFacts, key: str, trusted: Sequence[str], rival: str, than: str) -> str:
    """`Surely better than iALS on 9 of 37 slices, most surface = home (+0.05); surely worse on none`."""
    moved = [
        (metric_keys.badness(key, a.difference) - metric_keys.badness(key, 0.0), a)
        for a in model.against
        if a.rival == rival and a.key == key and a.slice in trusted and a.difference is not None
    ]
    if not moved:
        return ""
    clear = sorted(
        (pair for pair in moved if pair[1].is_clear),
        key=lambda pair: pair[0],
    )
    better = [a for worsening, a in clear if worsening < 0]
    worse = [a for worsening, a in reversed(clear) if worsening > 0]
    return (
        f"Surely better {than} on {_counted(better)} of {len(moved)} slices{_most(better)}; "
        f"surely worse on {_counted(worse)}{_most(worse)}"
    )


def _counted(found: Sequence[Against]) -> str:
    return str(len(found)) if found else "none"


def _most(found: Sequence[Against]) -> str:
    """The first of them, which moved most."""
    if not found:
        return ""
    return f", most on {formatting.words(found[0].slice)} ({formatting.difference(found[0].difference)})"
