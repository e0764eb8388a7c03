"""What the page shows, made from the facts: tables of formatted cells, and facts in words."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from schema.contract import TaskSpec
from schema.tables import TablesSummary
from tfx_pipeline.config import MODELS, RANKING, RETRIEVAL
from tfx_pipeline.report import formatting, metric_keys
from tfx_pipeline.report.charts import best_epoch, log_label
from tfx_pipeline.report.facts import (
    COLD_USERS,
    Differences,
    ExampleAnswer,
    Figure,
    IndexFacts,
    ModelFacts,
    RunFacts,
    Setting,
    TaskScores,
)
from tfx_pipeline.report.verdicts import headline_key
from trainer.score import formula

_SLICES_SHOWN = 200
_MOVERS_SHOWN = 6
_NOT_MEASURED = "–"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell: text and small lines below it; verdicts are `better`, `worse`, `best` or empty.

    `value` is what the cell sorts by; None where it is undefined, or text. `interval` stands above `note`.
    """

    text: str
    verdict: str = ""
    note: str = ""
    note_verdict: str = ""
    value: float | None = None
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A table row: what it is about, and its cells; `group` and `size` are what it can be
    filtered by."""

    label: str
    title: str
    cells: tuple[Cell, ...]
    group: str = ""
    size: float = 0.0
    link: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first `text_columns` hold text, the others numbers. `note` says what was left out.

    Attributes:
      name: unique in the page; empty unless the table can be sorted.
      sorted_by: the column by which the rows stand already, and `ascending` or `descending`.
      size_words: what the sizes of rows count, where rows can be filtered.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    text_columns: int = 1
    name: str = ""
    sorted_by: tuple[int, str] | None = None
    size_words: str = ""

    @property
    def sorted_column(self) -> int:
        """The column by which the rows stand already; the first without one."""
        return self.sorted_by[0] if self.sorted_by else 0

    @property
    def groups(self) -> list[str]:
        """The groups of the rows, in order of their names."""
        return sorted({row.group for row in self.rows} - {""})


def gates_table(facts: RunFacts) -> Table:
    """All gates of both models with their outcome."""
    outcomes = {True: Cell("passed", "better"), False: Cell("failed", "worse"), None: Cell("not applied")}
    rows = []
    for name in MODELS:
        for gate in facts.models[name].gates:
            condition = formatting.typeset(gate.condition)
            value = formatting.decimal(gate.value)
            if gate.is_change:
                condition = f"change against the last blessed model {condition}"
                value = "no blessed model yet" if gate.passed is None else formatting.difference(gate.value)
            cells = (Cell(condition), Cell(value), outcomes[gate.passed])
            rows.append(Row(f"{name}: {metric_keys.label(gate.key)}", gate.key, cells))
    return Table(
        "Conditions for a blessing", ("Gate", "Condition", "Value", "Outcome"), tuple(rows), text_columns=2
    )


def metrics_table(name: str, facts: RunFacts) -> Table:
    """Metrics of the whole test split beside those of the last blessed model and of the baselines."""
    model = facts.models[name]
    keys = [key for key in model.overall if not metric_keys.is_count(key) and not metric_keys.is_cold(key)]
    counts = [key for key in model.overall if metric_keys.is_count(key) and not metric_keys.is_cold(key)]
    caption = f"{name.capitalize()}, whole test split"
    return _comparison(caption, keys, counts, model.overall, model.rivals, _intervals(model), facts)


def cold_tables(facts: RunFacts) -> list[Table]:
    """Retrieval for users without a history, and of items that nobody met in training, beside baselines.

    A table without anything to judge is left out.
    """
    model, tables = facts.models[RETRIEVAL], []
    if model.cold_users:
        values = model.cold_users
        keys = [key for key in values if metric_keys.base(key) in {"recall", "ndcg"}]
        counts = [key for key in values if metric_keys.is_sample_size(key)]
        caption = "Cold users: no history at the end of training"
        tables.append(
            _comparison(
                caption, keys, counts, values, model.cold_user_rivals, _intervals(model, COLD_USERS), facts
            )
        )
    keys = [key for key, value in model.overall.items() if metric_keys.is_cold(key) and value is not None]
    if any(not metric_keys.is_count(key) for key in keys):
        table = _comparison(
            "Cold items: nobody met them before the end of training",
            [key for key in keys if not metric_keys.is_count(key)],
            [key for key in keys if metric_keys.is_count(key)],
            model.overall,
            model.rivals,
            _intervals(model),
            facts,
        )
        note = (
            "Both popularities find none by construction: nobody chose these items yet. Random is the mean "
        )
        note += "of all random orders, newest goes by upload time."
        tables.append(dataclasses.replace(table, note=note))
    return tables


def _intervals(model: ModelFacts, slice_name: str = "") -> dict[str, str]:
    return {figure.key: interval(figure) for figure in model.figures if figure.slice == slice_name}


def _comparison(
    caption: str,
    keys: Iterable[str],
    counts: Iterable[str],
    values: Mapping[str, float | None],
    rivals: Mapping[str, Mapping[str, float | None]],
    intervals: Mapping[str, str],
    facts: RunFacts,
) -> Table:
    """A model beside what it is compared with: one row per key, in the order of tasks or cut-offs."""
    rows = []
    for key in sorted(metric_keys.in_task_order(keys, facts.tasks), key=metric_keys.cutoff):
        value = values[key]
        others = [rival.get(key) for rival in rivals.values()]
        best = min((metric_keys.badness(key, v) for v in (value, *others) if v is not None), default=None)

        def cell(
            shown: float | None,
            note: str = "",
            tone: str = "",
            key: str = key,
            best: float | None = best,
        ) -> Cell:
            is_best = shown is not None and metric_keys.badness(key, shown) == best
            return Cell(formatting.decimal(shown), "best" if is_best else "", note, tone, value=shown)

        cells = [dataclasses.replace(cell(value), interval=intervals.get(key, ""))]
        cells += [Cell(_NOT_MEASURED) if v is None else cell(v, *change(key, value, v)) for v in others]
        rows.append(Row(metric_keys.label(key), key, tuple(cells)))
    judged = "; ".join(f"{formatting.number(values[key])} {metric_keys.count_words(key)}" for key in counts)
    return Table(
        f"{caption}: {judged}" if judged else caption,
        ("Metric", "this model", *map(formatting.words, rivals)),
        tuple(rows),
    )


def slices_table(name: str, facts: RunFacts) -> Table | None:
    """Metrics by slice, worst first by the headline metric; None without slices."""
    model, headline = facts.models[name], headline_key(name, facts)
    slices = sorted({figure.slice for figure in model.figures if figure.slice})
    if headline is None or not slices:
        return None
    figures = {(figure.slice, figure.key): figure for figure in model.figures}
    previous_of = {(figure.slice, figure.key): figure.value for figure in model.last_blessed}
    counts, keys = _slice_columns(headline, model.overall, facts)

    def value_of(slice_name: str, key: str) -> float | None:
        return figures[slice_name, key].value if (slice_name, key) in figures else None

    def best_last(slice_name: str) -> tuple[bool, float]:
        value = value_of(slice_name, headline)
        return (True, 0.0) if value is None else (False, -metric_keys.badness(headline, value))

    rows = []
    for slice_name in sorted(slices, key=best_last)[:_SLICES_SHOWN]:
        sizes = [value_of(slice_name, key) for key in counts]
        cells = [Cell(formatting.number(size), value=size) for size in sizes]
        for key in keys:
            value = value_of(slice_name, key)
            moved = change(key, value, previous_of.get((slice_name, key)))
            bounds = interval(figures[slice_name, key]) if (slice_name, key) in figures else ""
            cells.append(Cell(formatting.decimal(value), "", *moved, value=value, interval=bounds))
        group = " × ".join(part.partition(" = ")[0] for part in slice_name.split(", "))
        rows.append(Row(slice_name, slice_name, tuple(cells), group, next(iter(sizes), None) or 0.0))
    hidden = len(slices) - len(rows)
    lower_is_better = metric_keys.badness(headline, 1.0) > 0
    return Table(
        caption=f"{name.capitalize()} by slice, worst first by {metric_keys.label(headline)}",
        columns=("Slice", *map(metric_keys.count_words, counts), *map(metric_keys.label, keys)),
        rows=tuple(rows),
        note=f"{hidden:,} better or undefined slices are left out here; metrics.json holds all."
        if hidden
        else "",
        name=f"slices-{name}",
        sorted_by=(1 + len(counts), "descending" if lower_is_better else "ascending"),
        size_words=metric_keys.count_words(counts[0]) if counts else "",
    )


def interval(figure: Figure) -> str:
    """`(0.5104 to 0.5498)`; empty where none was measured."""
    if figure.low is None or figure.high is None:
        return ""
    low, high = formatting.column([figure.low, figure.high])
    return f"({low} to {high})"


def _slice_columns(headline: str, keys: Iterable[str], facts: RunFacts) -> tuple[list[str], list[str]]:
    """What counts the examples behind the headline metric; and the metrics to show: it, others at its k."""
    keys = metric_keys.in_task_order(keys, facts.tasks)
    count = [
        k for k in keys if metric_keys.is_sample_size(k) and metric_keys.task(k) == metric_keys.task(headline)
    ]
    shown = [
        k
        for k in keys
        if not metric_keys.is_count(k) and metric_keys.cutoff(k) == metric_keys.cutoff(headline)
    ]
    return count, [headline, *(k for k in shown if k != headline)]


def training_table(name: str, facts: RunFacts) -> Table:
    """The training log as a table."""
    log = facts.models[name].training_log
    keys = [key for key in dict.fromkeys(key for record in log for key in record) if key != "epoch"]
    kept = best_epoch(name, log)
    columns = [formatting.column([record.get(key) for record in log]) for key in keys]
    rows = []
    for place, record in enumerate(log):
        epoch = formatting.number(record.get("epoch") or place + 1)
        label = f"{epoch} (kept)" if place == kept else epoch
        rows.append(Row(label, "", tuple(Cell(column[place]) for column in columns)))
    return Table(f"Training of the {name} model", ("Epoch", *map(log_label, keys)), tuple(rows))


def splits_table(facts: RunFacts, summary: TablesSummary) -> Table:
    """Rows, positives and time span of each split."""
    rows = []
    for split, count in summary.rows.items():
        positives = summary.positives[split]
        texts = [
            formatting.number(count),
            formatting.number(positives),
            formatting.share(positives / count if count else None),
            formatting.moment(summary.first_event_unix_s[split], utc_offset_hours(facts)),
            formatting.moment(summary.last_event_unix_s[split], utc_offset_hours(facts)),
        ]
        rows.append(Row(split, "", tuple(map(Cell, texts))))
    zone = time_zone(facts)
    columns = ("Split", "Rows", "Positives", "Positive rate", f"First event ({zone})", f"Last event ({zone})")
    return Table("Interactions by split", columns, tuple(rows))


def score_formula(facts: RunFacts) -> str:
    """How the final score is made of the task outputs; empty when the configuration is unknown."""
    tasks = [TaskSpec.model_validate(task) for task in facts.tasks]
    return formula(tasks) if tasks else ""


def recommendations_table(answer: ExampleAnswer, facts: RunFacts) -> Table:
    """What one user was recommended, and why."""
    names = list(dict.fromkeys(name for item in answer.items for name in item.predictions))
    values: list[Sequence[float | None]] = [
        [item.predictions.get(name) for item in answer.items] for name in names
    ]
    values += [[item.retrieval_score for item in answer.items], [item.score for item in answer.items]]
    columns = [formatting.column(column) for column in values]
    rows = []
    for place, item in enumerate(answer.items):
        reason = f"near to {title_of(item.reason_item_id, facts)}" if item.reason_item_id else "popular"
        numbers = [Cell(column[place]) for column in columns]
        rows.append(
            Row(f"{item.rank}. {title_of(item.item_id, facts)}", item.item_id, (Cell(reason), *numbers))
        )
    in_seconds = {task["name"] for task in facts.tasks if task["kind"] == "watch_time"}
    outputs = [formatting.words(name) + (", s" if name in in_seconds else "") for name in names]
    header = ("Item", "Why it was retrieved", *outputs, "Retrieval score", "Final score")
    return Table(f"Recommended to user {answer.user_id}", header, tuple(rows), text_columns=2)


def title_of(item_id: str, facts: RunFacts) -> str:
    """The title of an item, else its id."""
    return facts.titles.get(item_id, item_id)


def index_sentence(index: IndexFacts, facts: RunFacts) -> str:
    """How good approximate search is, in words."""
    text = (
        f"ScaNN finds {formatting.share(index.recall)} of the {index.k:,} items that exact search puts first"
    )
    required = facts.config.get("retrieval", {}).get("index", {}).get("min_recall")
    return (
        f"{text}; at least {formatting.share(required)} was required." if required is not None else f"{text}."
    )


def index_facts(index: IndexFacts) -> list[tuple[str, str]]:
    """Label and value of every other fact of the index; ScaNN's settings keep the library's names."""
    rows: list[tuple[str, float]] = [
        ("Items indexed", index.num_items),
        ("Width of a vector", index.vector_width),
    ]
    rows += [("Building and tuning, s", index.build_s), *index.settings.items()]
    return [(label, formatting.number(value)) for label, value in rows]


def efforts_table(index: IndexFacts) -> Table:
    """How hard ScaNN looks, by how many items are asked for."""
    rows = [
        Row(
            f"up to {formatting.number(effort.k)}",
            "",
            (
                Cell(formatting.number(effort.num_leaves_to_search)),
                Cell(formatting.number(effort.num_reordering_candidates)),
                Cell(formatting.share(effort.recall)),
            ),
        )
        for effort in index.efforts
    ]
    columns = ("Items asked for", "Leaves searched", "Candidates reordered", "Exact results found")
    return Table("Effort of the search by k", columns, tuple(rows))


def index_slices_table(index: IndexFacts) -> Table:
    """Recall of the index against exact search by kind of item."""
    rows = [Row(name, "", (Cell(formatting.share(value)),)) for name, value in index.recall_by_slice.items()]
    return Table(
        f"Exact results found among the first {formatting.number(index.k)}, by kind of item",
        ("Items", "Found"),
        tuple(rows),
    )


def settings_table(caption: str, settings: Sequence[Setting], before: str, after: str) -> Table:
    """What differs between two runs; the columns are named `before` and `after`."""
    rows = [
        Row(setting.name, "", tuple(Cell(value if value is not None else "absent") for value in values))
        for setting in settings
        for values in [(setting.before, setting.after)]
    ]
    return Table(caption, ("", before, after), tuple(rows), text_columns=3)


def differences_tables(found: Differences, before: str, after: str) -> list[Table]:
    """Tables of what differs in data, configuration and versions; none of a piece that is equal."""
    pieces = (("Data", found.data), ("Configuration", found.config), ("Versions", found.versions))
    return [settings_table(caption, settings, before, after) for caption, settings in pieces if settings]


def differences_sentences(found: Differences) -> list[str]:
    """Of each of data, configuration and versions: equal, different, or unknown."""
    sentences = []
    for piece, settings, words in (
        ("data", found.data, "data"),
        ("config", found.config, "configuration"),
        ("versions", found.versions, "versions"),
    ):
        if piece in found.unknown:
            sentences.append(f"Whether the {words} are the same is unknown: one run does not tell.")
        elif settings:
            count = f"{len(settings)} value{'s' if len(settings) > 1 else ''}"
            sentences.append(f"Different {words}: {count} differ{'' if len(settings) > 1 else 's'}.")
        else:
            sentences.append(f"The same {words}.")
    return sentences


def movers_table(name: str, facts: RunFacts) -> Table | None:
    """The metrics that moved most against the last blessed model; None without one."""
    model = facts.models[name]
    moved = []
    for key, before in model.overall_last_blessed.items():
        value = model.overall.get(key)
        if before and value is not None and value != before and not metric_keys.is_count(key):
            moved.append((abs(value / before - 1), key, before, value))
    if not moved:
        return None
    rows = []
    for _, key, before, value in sorted(moved, reverse=True)[:_MOVERS_SHOWN]:
        moved_by, verdict = change(key, value, before)
        relative = _signed_share(value / before - 1)
        cells = (
            Cell(formatting.decimal(before)),
            Cell(formatting.decimal(value)),
            Cell(moved_by, verdict),
            Cell(relative),
        )
        rows.append(Row(metric_keys.label(key), key, cells))
    return Table(
        f"{name.capitalize()}: what moved most, both models on this run's test split",
        ("Metric", "last blessed", "this model", "Change", "Relative"),
        tuple(rows),
    )


def _signed_share(value: float) -> str:
    """A signed share: `+12.3 %`."""
    text = formatting.share(value)
    return text if text.startswith("−") else f"+{text}"


def reliability_table(scores: TaskScores) -> Table:
    """What was predicted and what happened, by group of like predictions."""
    rows = [
        Row(
            f"{place} of {len(scores.bins)}",
            "",
            (
                Cell(formatting.number(group.count)),
                Cell(formatting.decimal(group.predicted)),
                Cell(formatting.decimal(group.observed)),
                Cell(formatting.difference(group.predicted - group.observed)),
            ),
        )
        for place, group in enumerate(scores.bins, 1)
    ]
    columns = ("Group", "Examples", "Mean prediction", "What happened", "Too high by")
    return Table(f"Reliability of {formatting.words(scores.task)}", columns, tuple(rows))


def scores_table(scores: TaskScores) -> Table:
    """The histogram of the predictions, in numbers."""
    rows = [
        Row(
            f"{formatting.decimal(low)} to {formatting.decimal(high)}",
            "",
            tuple(Cell(formatting.number(counts[place])) for counts in scores.histogram.values()),
        )
        for place, (low, high) in enumerate(itertools.pairwise(scores.edges))
    ]
    note = (
        f"{scores.undefined:,} examples whose prediction or label is not a number are left out."
        if scores.undefined
        else ""
    )
    caption = f"Examples by predicted {formatting.words(scores.task)}"
    return Table(caption, ("Value", *scores.histogram), tuple(rows), note)


def calibration_sentences(facts: RunFacts) -> list[str]:
    """The calibration errors of the ranking model, in words."""
    sentences = []
    for key, value in facts.models[RANKING].overall.items():
        if metric_keys.base(key) == "ece":
            task = formatting.words(metric_keys.task(key))
            sentences.append(
                f"{task}: predicted and observed rates are {formatting.decimal(value)} apart (ECE)."
                if value is not None
                else f"{task}: the calibration error (ECE) is undefined on this test split."
            )
    return sentences


def cost_table(facts: RunFacts) -> Table:
    """What each component took, in the order in which they ran."""
    rows = [
        Row(
            timing.component,
            "",
            (
                Cell(formatting.decimal(timing.wall_s), value=timing.wall_s),
                Cell(formatting.decimal(timing.cpu_s), value=timing.cpu_s),
                Cell(formatting.mebibytes(timing.peak_memory_bytes), value=timing.peak_memory_bytes),
                Cell("reused" if timing.cached else "ran"),
            ),
        )
        for timing in facts.timings
    ]
    columns = ("Component", "Elapsed, s", "Processor, s", "Peak memory, MiB", "What happened")
    return Table("Cost of each component", columns, tuple(rows), name="cost")


def cost_sentence(facts: RunFacts) -> str:
    """The cost of the whole run, in words."""
    timings = facts.timings
    peak = max(timing.peak_memory_bytes for timing in timings)
    reused = sum(timing.cached for timing in timings)
    return (
        f"{formatting.decimal(sum(timing.cpu_s for timing in timings))} processor seconds in "
        f"{formatting.decimal(sum(timing.wall_s for timing in timings))} s, "
        f"at most {formatting.mebibytes(peak)} MiB of memory; "
        f"{reused} of {len(timings)} components were reused from the cache."
    )


def metric_legend(facts: RunFacts) -> list[tuple[str, str]]:
    """(name, meaning) of every metric that the page shows."""
    bases = dict.fromkeys(metric_keys.base(key) for name in MODELS for key in facts.models[name].overall)
    return [
        (metric_keys.label(base), metric_keys.MEANINGS[base])
        for base in bases
        if base in metric_keys.MEANINGS
    ]


def dataset_name(facts: RunFacts) -> str:
    """The name of the dataset, wherever it can be read."""
    if facts.summary is not None:
        return facts.summary.dataset
    return str(facts.config.get("dataset", {}).get("name", "unknown dataset"))


def time_zone(facts: RunFacts) -> str:
    """The name of the users' time zone."""
    return formatting.utc_offset(utc_offset_hours(facts))


def utc_offset_hours(facts: RunFacts) -> float:
    """Local time of the users; UTC when the configuration is unknown."""
    return float(facts.config.get("dataset", {}).get("utc_offset_hours", 0.0))


def change(key: str, value: float | None, reference: float | None) -> tuple[str, str]:
    """Value minus reference, and whether that is for the better; nothing where one is undefined."""
    if value is None or reference is None:
        return "", ""
    worsening = metric_keys.badness(key, value) - metric_keys.badness(key, reference)
    return formatting.difference(
        value - reference
    ), "worse" if worsening > 0 else "better" if worsening < 0 else ""
