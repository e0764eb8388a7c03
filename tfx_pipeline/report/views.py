"""What the page shows, made from the facts: verdicts in words, tables of formatted cells, plots."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tfx_pipeline.config import MODELS, RANKING, RETRIEVAL
from tfx_pipeline.report import formatting, plots
from tfx_pipeline.report.facts import ExampleAnswer, GateResult, ModelFacts, RunFacts
from trainer.metrics import LOWER_IS_BETTER

_COUNTS = ("num_queries", "num_examples")
_SLICES_SHOWN = 40
_THIS_MODEL = "this model"
_LAST_BLESSED = "last blessed"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell: text, and a small second line; each may be judged `better`, `worse` or (the text) `best`."""

    text: str
    verdict: str = ""
    note: str = ""
    note_verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A table row: what it is about, and its cells."""

    label: str
    title: str
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first `text_columns` hold text, the others numbers. `note` says what was left out."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    text_columns: int = 1


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


def verdict(name: str, facts: RunFacts) -> Verdict:
    """Which way it went for a model, with every reason."""
    model = facts.models[name]
    reasons = [_gate_reason(gate, name) for gate in model.gates if gate.passed is False]
    if not model.blessed and not reasons:
        absent = facts.missing.get(f"{name}_evaluation")
        reasons = [
            f"The evaluation cannot be read: {absent}"
            if absent
            else "No gate failed, but the Evaluator did not bless the model: a model without gates is never blessed."
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
    return Verdict(name, state, sentence, tuple(reasons), _headline_sentence(name, facts))


def _gate_reason(gate: GateResult, model: str) -> str:
    label = formatting.metric_label(gate.key)
    if gate.condition.startswith("change"):
        change = formatting.difference(gate.value)
        return f"{label} changed by {change}; the gate asks for a {gate.condition}."
    return f"{label} is {formatting.decimal(gate.value)}; the gate asks for {gate.condition}."


def headline_key(name: str, facts: RunFacts) -> str | None:
    """The metric that stands for a model: that of its first gate, else recall at the largest k, else the first AUC."""
    keys = [f.key for f in facts.models[name].figures if not f.slice and not _is_count(f.key)]
    gated = [gate.key for gate in facts.models[name].gates if gate.key in keys]
    recalls = sorted((k for k in keys if formatting.metric_base(k) == "recall"), key=_cutoff, reverse=True)
    aucs = [k for k in _in_task_order(keys, facts) if formatting.metric_base(k) in {"auc", "xauc"}]
    return next(iter([*gated, *recalls, *aucs, *keys]), None)


def _headline_sentence(name: str, facts: RunFacts) -> str:
    key = headline_key(name, facts)
    if key is None:
        return ""
    value = _overall(facts.models[name])[key]
    text = f"{formatting.metric_label(key)} {formatting.decimal(value)}"
    rivals = {b: v[key] for b, v in facts.models[name].baselines.items() if v.get(key) is not None}
    if value is None or not rivals:
        return text
    best = min(rivals, key=lambda b: _badness(key, rivals[b]))
    gain = value - (rivals[best] or 0.0)
    return f"{text}, {formatting.difference(gain)} against the best baseline ({formatting.words(best)})"


def gates_table(facts: RunFacts) -> Table:
    """All gates of both models with their outcome."""
    outcome = {True: Cell("passed", verdict="better"), False: Cell("failed", verdict="worse"), None: Cell("not applied")}
    rows = []
    for name in MODELS:
        for gate in facts.models[name].gates:
            is_change = gate.condition.startswith("change")
            if gate.passed is None:
                value = "no blessed model yet"
            else:
                value = formatting.difference(gate.value) if is_change else formatting.decimal(gate.value)
            label = f"{name}: {formatting.metric_label(gate.key)}"
            rows.append(Row(label, gate.key, (Cell(gate.condition), Cell(value), outcome[gate.passed])))
    return Table("Conditions for a blessing", ("Gate", "Condition", "Value", "Outcome"), tuple(rows), text_columns=2)


def metrics_table(name: str, facts: RunFacts) -> Table:
    """Metrics of the whole test split beside those of the last blessed model and of the baselines."""
    model = facts.models[name]
    values = _overall(model)
    rivals: dict[str, Mapping[str, float | None]] = {}
    if model.last_blessed:
        rivals[_LAST_BLESSED] = {f.key: f.value for f in model.last_blessed if not f.slice}
    rivals |= {formatting.words(baseline): metrics for baseline, metrics in model.baselines.items()}
    keys = _in_task_order([k for k in values if not _is_count(k)], facts)
    if name == RETRIEVAL:
        keys = sorted(keys, key=_cutoff)
    rows = []
    for key in keys:
        row = [values[key], *(rival.get(key) for rival in rivals.values())]
        best = min((_badness(key, v) for v in row if v is not None), default=None)
        cells = []
        for place, value in enumerate(row):
            if place and value is None:
                cells.append(Cell("–"))
                continue
            is_best = value is not None and _badness(key, value) == best
            change = _change_note(key, values[key], value) if place else ("", "")
            cells.append(Cell(formatting.decimal(value), "best" if is_best else "", *change))
        rows.append(Row(formatting.metric_label(key), key, tuple(cells)))
    counted = [f"{formatting.number(v)} {_count_words(k)}" for k, v in values.items() if _is_count(k)]
    caption = f"{name.capitalize()}, whole test split" + (f": {'; '.join(counted)}" if counted else "")
    return Table(caption, ("Metric", _THIS_MODEL, *rivals), tuple(rows))


def slices_table(name: str, facts: RunFacts) -> Table | None:
    """Metrics by slice, worst first by the headline metric; None without slices."""
    model, headline = facts.models[name], headline_key(name, facts)
    slices = sorted({f.slice for f in model.figures if f.slice})
    if not slices or headline is None:
        return None
    value_of = {(f.slice, f.key): f.value for f in model.figures}
    previous_of = {(f.slice, f.key): f.value for f in model.last_blessed}
    keys = [k for k in _overall(model) if not _is_count(k) and (name == RANKING or _cutoff(k) == _cutoff(headline))]
    keys = [headline, *(k for k in _in_task_order(keys, facts) if k != headline)]
    count = next((k for k in _overall(model) if _is_count(k) and k.split("/")[:-1] == headline.split("/")[:-1]), None)

    def order(slice_name: str) -> tuple[bool, float]:
        value = value_of.get((slice_name, headline))
        return (True, 0.0) if value is None else (False, -_badness(headline, value))

    rows = []
    for slice_name in sorted(slices, key=order)[:_SLICES_SHOWN]:
        cells = [Cell(formatting.number(value_of.get((slice_name, count))))] if count else []
        for key in keys:
            value = value_of.get((slice_name, key))
            change = _change_note(key, value, previous_of.get((slice_name, key)))
            cells.append(Cell(formatting.decimal(value), "", *change))
        rows.append(Row(slice_name, slice_name, tuple(cells)))
    caption = f"{name.capitalize()} by slice, worst {formatting.metric_label(headline)} first"
    columns = ("Slice", *([_count_words(count).capitalize()] if count else []), *map(formatting.metric_label, keys))
    hidden = len(slices) - len(rows)
    note = f"{hidden:,} better slices are left out here; metrics.json holds all." if hidden else ""
    return Table(caption, columns, tuple(rows), note)


def training_plot(name: str, facts: RunFacts) -> Markup | None:
    """Loss and validation metrics by epoch, with the epoch whose weights were kept; None without a log."""
    log = facts.models[name].training_log
    if not log:
        return None
    epochs = [float(record.get("epoch") or place) for place, record in enumerate(log, 1)]
    kept = (epochs[best_epoch(name, log)], "kept weights")
    panels = []
    for title, keys in (("Loss", _loss_keys(log)), ("Validation metrics", _validation_keys(name, log))):
        if keys:
            lines = {_log_label(key): [record.get(key) for record in log] for key in keys}
            panels.append(plots.Panel(f"{name.capitalize()}: {title.lower()}", "epoch", epochs, lines, kept))
    if not panels:
        return None
    alt = f"Training of the {name} model over {len(log)} epochs; the weights of epoch {kept[0]:g} were kept."
    return plots.line_plot(f"training-{name}", alt, panels)


def training_table(name: str, facts: RunFacts) -> Table | None:
    """The training log as a table."""
    log = facts.models[name].training_log
    if not log:
        return None
    keys = [key for key in dict.fromkeys(k for record in log for k in record) if key != "epoch"]
    best = best_epoch(name, log)
    rows = []
    for place, record in enumerate(log):
        cells = tuple(Cell(formatting.decimal(record.get(key))) for key in keys)
        epoch = formatting.number(record.get("epoch") or place + 1)
        rows.append(Row(f"{epoch} (kept)" if place == best else epoch, "", cells))
    return Table(f"Training of the {name} model", ("Epoch", *map(_log_label, keys)), tuple(rows))


def best_epoch(name: str, log: Sequence[Mapping[str, float | None]]) -> int:
    """Place of the epoch whose weights the trainer kept: highest validation recall, or lowest validation loss."""
    sign, key = (1, next((k for k in log[0] if formatting.metric_base(k) == "recall"), "")) if name == RETRIEVAL else (-1, "eval_loss")
    scores = [sign * value if (value := record.get(key)) is not None else float("-inf") for record in log]
    return scores.index(max(scores))


def comparison_plot(name: str, facts: RunFacts) -> Markup | None:
    """Model, last blessed model and baselines: recall by length of the list, or AUC and XAUC by task."""
    model = facts.models[name]
    series: dict[str, Mapping[str, float | None]] = {_THIS_MODEL: _overall(model)}
    if model.last_blessed:
        series[_LAST_BLESSED] = {f.key: f.value for f in model.last_blessed if not f.slice}
    series |= {formatting.words(baseline): values for baseline, values in model.baselines.items()}
    keys = list(series[_THIS_MODEL])
    if name == RETRIEVAL:
        panels = []
        for base in ("recall", "ndcg"):
            chosen = sorted((k for k in keys if formatting.metric_base(k) == base), key=_cutoff)
            if chosen:
                lines = {label: [values.get(key) for key in chosen] for label, values in series.items()}
                title = formatting.metric_label(f"{RETRIEVAL}/{base}") + "@k"
                panels.append(plots.Panel(title, "k", [float(_cutoff(key)) for key in chosen], lines))
        alt = "Recall and NDCG at each k of the retrieval model and of what it has to beat; the table below has the numbers."
        return plots.line_plot("comparison-retrieval", alt, panels) if panels else None
    chosen = [k for k in _in_task_order(keys, facts) if formatting.metric_base(k) in {"auc", "xauc"}]
    if not chosen:
        return None
    rows = {
        formatting.metric_label(key): {label: values.get(key) for label, values in series.items()} for key in chosen
    }
    alt = "AUC and XAUC by task of the ranking model and of what it has to beat; the table below has the numbers."
    return plots.dot_plot("comparison-ranking", alt, {"Order of pairs: 0.5 is guessing, 1 is perfect": rows})


def splits_table(facts: RunFacts) -> Table | None:
    """Rows, positives and time span of each split."""
    summary = facts.summary
    if summary is None:
        return None
    zone = utc_offset_hours(facts)
    rows = []
    for split, count in summary.rows.items():
        positives = summary.positives[split]
        span = [formatting.moment(times[split], zone) for times in (summary.first_event_unix_s, summary.last_event_unix_s)]
        cells = (Cell(formatting.number(count)), Cell(formatting.number(positives)), Cell(formatting.share(positives / count if count else None)))
        rows.append(Row(split, "", (*cells, *map(Cell, span))))
    zone_name = formatting.utc_offset(zone)
    columns = ("Split", "Rows", "Positives", "Rate", f"First event ({zone_name})", f"Last event ({zone_name})")
    return Table("Interactions by split", columns, tuple(rows))


def score_formula(facts: RunFacts) -> str:
    """How the final score is made of the task outputs; empty when the configuration is unknown."""
    terms = [f"{task['score_weight']:g} × {task['name']}" for task in tasks(facts)]
    return "score = " + " + ".join(terms).replace("+ -", "− ") if terms else ""


def tasks(facts: RunFacts) -> list[Mapping[str, Any]]:
    """The declared tasks, in order; none when the configuration is unknown."""
    return list(facts.config.get("dataset", {}).get("tasks", ()))


def dataset_name(facts: RunFacts) -> str:
    """The name of the dataset, wherever it can be read."""
    if facts.summary is not None:
        return facts.summary.dataset
    return str(facts.config.get("dataset", {}).get("name", "unknown dataset"))


def time_zone(facts: RunFacts) -> str:
    """The name of the users' time zone."""
    return formatting.utc_offset(utc_offset_hours(facts))


def utc_offset_hours(facts: RunFacts) -> float:
    """Local time of the users."""
    return float(facts.config.get("dataset", {}).get("utc_offset_hours", 0.0))


def index_sentence(facts: RunFacts) -> str:
    """How good approximate search is, in words."""
    index = facts.index
    found = formatting.share(index.get("recall"))
    text = f"ScaNN finds {found} of the {formatting.number(index.get('k'))} items that exact search puts first"
    required = facts.config.get("retrieval", {}).get("index", {}).get("min_recall")
    return f"{text}; at least {formatting.share(required)} was required." if required is not None else f"{text}."


def index_facts(facts: RunFacts) -> list[tuple[str, str]]:
    """Label and value of every other fact of the index."""
    index = facts.index
    labels = {"num_items": "Items indexed", "vector_width": "Width of a vector", "build_s": "Building and tuning, s"}
    rows = [(label, formatting.number(index.get(key))) for key, label in labels.items()]
    return rows + [(formatting.words(name), formatting.number(value)) for name, value in index.get("settings", {}).items()]


def recommendations_table(answer: ExampleAnswer, facts: RunFacts) -> Table:
    """What one user was recommended, and why."""
    names = list(dict.fromkeys(task for item in answer.items for task in item.predictions))
    seconds = {task["name"] for task in tasks(facts) if task["kind"] == "watch_time"}
    rows = []
    for item in answer.items:
        reason = f"near to {title_of(item.reason_item_id, facts)}" if item.reason_item_id else "popular"
        numbers = [item.predictions.get(name) for name in names] + [item.retrieval_score, item.score]
        label = f"{item.rank}. {title_of(item.item_id, facts)}"
        rows.append(Row(label, item.item_id, (Cell(reason), *(Cell(formatting.decimal(n)) for n in numbers))))
    outputs = [f"{formatting.words(name)}, s" if name in seconds else formatting.words(name) for name in names]
    columns = ("Item", "Why it was retrieved", *outputs, "Retrieval score", "Final score")
    return Table(f"Recommended to user {answer.user_id}", columns, tuple(rows), text_columns=2)


def title_of(item_id: str, facts: RunFacts) -> str:
    """The title of an item, else its id."""
    return facts.titles.get(item_id, item_id)


def metric_legend(facts: RunFacts) -> list[tuple[str, str]]:
    """(name, meaning) of every metric that the page shows."""
    keys = [f.key for name in MODELS for f in facts.models[name].figures if not f.slice]
    bases = dict.fromkeys(formatting.metric_base(key) for key in keys)
    return [
        (formatting.metric_label(base), formatting.METRIC_MEANINGS[base])
        for base in bases
        if base in formatting.METRIC_MEANINGS
    ]


def _overall(model: ModelFacts) -> dict[str, float | None]:
    return {f.key: f.value for f in model.figures if not f.slice}


def _is_count(key: str) -> bool:
    return key.rpartition("/")[2] in _COUNTS


def _count_words(key: str) -> str:
    _, *task, name = key.split("/")
    return f"{formatting.words(task[0])} examples" if task else "users" if name == "num_queries" else "examples"


def _cutoff(key: str) -> int:
    match = re.search(r"_at_(\d+)$", key)
    return int(match.group(1)) if match else 0


def _change_note(key: str, value: float | None, reference: float | None) -> tuple[str, str]:
    """Value minus reference in words, and whether that is for the better; nothing where one is undefined."""
    if value is None or reference is None:
        return "", ""
    worsening = _badness(key, value) - _badness(key, reference)
    verdict = "worse" if worsening > 0 else "better" if worsening < 0 else ""
    return formatting.difference(value - reference), verdict


def _badness(key: str, value: float | None) -> float:
    """Smaller is better, whatever the metric's direction."""
    number = 0.0 if value is None else value
    return number if formatting.metric_base(key) in LOWER_IS_BETTER else -number


def _in_task_order(keys: Iterable[str], facts: RunFacts) -> list[str]:
    order = {task["name"]: place for place, task in enumerate(tasks(facts))}
    return sorted(keys, key=lambda key: order.get(key.split("/")[1], len(order)))


def _loss_keys(log: Sequence[Mapping[str, float | None]]) -> list[str]:
    return [key for key in log[0] if key == "loss" or (key.endswith("_loss") and "/" not in key)]


def _validation_keys(name: str, log: Sequence[Mapping[str, float | None]]) -> list[str]:
    shown = {"recall", "ndcg", "auc", "xauc"}
    return [key for key in log[0] if key.startswith(f"{name}/") and formatting.metric_base(key) in shown]


def _log_label(key: str) -> str:
    return formatting.metric_label(key) if "/" in key else formatting.words(key)
