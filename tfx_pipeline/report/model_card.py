"""The model card: data, intended use, metrics and limits of both models, as Markdown of a page or two."""

from __future__ import annotations

from collections.abc import Mapping

from tfx_pipeline.config import MODELS, RETRIEVAL
from tfx_pipeline.report import formatting, metric_keys, views
from tfx_pipeline.report.facts import COLD_USERS, ModelFacts, RunFacts
from tfx_pipeline.report.templating import render_template
from tfx_pipeline.report.verdicts import headline_key, overall_sentence, reason_sentence, verdict
from trainer.comparison import LAST_BLESSED

_WORST_SLICES = 3


def render_card(facts: RunFacts) -> str:
    """The model card; equal facts give equal text."""
    verdicts = [verdict(name, facts) for name in MODELS]
    return render_template(
        "model_card.md.j2",
        facts,
        facts=facts,
        verdicts=verdicts,
        overall_sentence=overall_sentence(verdicts),
        reason=reason_sentence(verdicts, facts),
        dataset=views.dataset_name(facts),
        metrics={name: _metric_rows(name, facts) for name in MODELS},
        policies=_policy_rows(facts),
        limits=_limits(facts),
    )


def _metric_rows(name: str, facts: RunFacts) -> list[tuple[str, str, str, str]]:
    """Metric, value with its interval, last blessed model, best baseline with its name."""
    model, rows = facts.models[name], []
    for figure in model.figures:
        if figure.slice:
            continue
        value = " ".join(filter(None, (formatting.decimal(figure.value), views.interval(figure))))
        previous = model.rival(LAST_BLESSED).get(figure.key)
        rows.append(
            (
                metric_keys.label(figure.key),
                value,
                formatting.decimal(previous) if model.is_compared_with_last_blessed else "none",
                _best_baseline(figure.key, model),
            )
        )
    return rows


def _policy_rows(facts: RunFacts) -> list[tuple[str, ...]]:
    """The cells of the table of off-policy values; none where there is none."""
    table = views.off_policy_table(facts.off_policy) if facts.off_policy else None
    return [
        (row.label, *(" ".join(filter(None, (cell.text, cell.interval))) for cell in row.cells))
        for row in (table.rows if table else ())
    ]


def _best_baseline(key: str, model: ModelFacts) -> str:
    values: Mapping[str, float] = {
        name: value
        for name in model.rivals
        if name != LAST_BLESSED and (value := model.rival(name).get(key)) is not None
    }
    if not values:
        return "not measured"
    best = min(values, key=lambda name: metric_keys.badness(key, values[name]))
    return f"{formatting.decimal(values[best])} ({formatting.rival(best)})"


def _limits(facts: RunFacts) -> list[str]:
    """What a user of the models should know, from this run's own figures."""
    limits = []
    for name in MODELS:
        model, key = facts.models[name], headline_key(name, facts)
        if key is None:
            continue
        values = [(part.name, model.on(part.name).get(key)) for part in model.slices[1:] if not part.note]
        worst = sorted(
            (
                (metric_keys.badness(key, v), f"{part}: {formatting.decimal(v)}")
                for part, v in values
                if v is not None
            ),
            reverse=True,
        )
        if worst:
            words = "; ".join(text for _, text in worst[:_WORST_SLICES])
            limits.append(f"Weakest slices of the {name} model by {metric_keys.label(key)}: {words}.")
    if not facts.models[RETRIEVAL].on(COLD_USERS):
        limits.append("Users without a history: not measured, there were none among the test users.")
    anomalies = sum(len(split.anomalies) for split in facts.anomalies)
    if anomalies:
        places = f"{anomalies} place{'s' if anomalies > 1 else ''}"
        limits.append(f"The data deviate from the schema in {places}; the report says where.")
    limits += [
        f"Not known ({formatting.words(piece)}): {why.removesuffix('.')}."
        for piece, why in facts.missing.items()
    ]
    return limits
