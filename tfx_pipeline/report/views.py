"""What the page shows, made from the facts: tables of formatted cells, and facts in words."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence

from schema.contract import TaskKind, TaskSpec
from schema.tables import TablesSummary
from tfx_pipeline.config import MODELS, RANKING, RETRIEVAL
from tfx_pipeline.drift_facts import DriftFacts, FeatureDrift
from tfx_pipeline.gates import Verdict
from tfx_pipeline.leakage.findings import LeakageReport
from tfx_pipeline.report import formatting, metric_keys
from tfx_pipeline.report.charts import best_epoch, log_label
from tfx_pipeline.report.facts import (
    COLD_USERS,
    Against,
    Differences,
    ExampleAnswer,
    Figure,
    LoadFacts,
    LoadTest,
    RunFacts,
    Setting,
    TaskScores,
)
from tfx_pipeline.report.verdicts import best_baseline, headline_key
from trainer.comparison import LAST_BLESSED
from trainer.index_facts import IndexFacts, SearchPoint
from trainer.off_policy import IPS, PolicyFacts
from trainer.score import formula
from trainer.waterfall import SHOWN, Waterfall

_SLICES_SHOWN = 200
_MOVERS_SHOWN = 6
_NOT_MEASURED = "–"
_ROW_WORDS = {RETRIEVAL: "lists", RANKING: "impressions"}
_DRIFT_COMPARISONS = {"train_to_eval": "from train to eval", "last_run": "from the last run’s train split"}


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
    note: str = ""


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
    """All gates of both models with their verdict and reason; the failed ones first."""
    tones = {Verdict.PASSED: "better", Verdict.FAILED: "worse", Verdict.NOT_APPLIED: ""}
    order = [Verdict.FAILED, Verdict.PASSED, Verdict.NOT_APPLIED]
    rows = []
    for name in MODELS:
        for gate in facts.models[name].gates:
            cells = (
                Cell(gate.verdict.value, tones[gate.verdict]),
                Cell(formatting.typeset(gate.reason)),
                Cell(name),
            )
            rows.append((order.index(gate.verdict), Row(formatting.typeset(gate.name), gate.kind, cells)))
    rows.sort(key=lambda row: row[0])
    columns = ("Gate", "Verdict", "Reason", "Model")
    return Table(
        "Conditions for a blessing", columns, tuple(row for _, row in rows), text_columns=4, name="all-gates"
    )


def metrics_table(name: str, facts: RunFacts) -> Table:
    """Metrics of the whole test split beside those of the last blessed model and of the baselines."""
    model = facts.models[name]
    keys = [key for key in model.overall if not metric_keys.is_cold(key)]
    return _comparison(f"{name.capitalize()}, whole test split", keys, name, "", facts)


def cold_tables(facts: RunFacts) -> list[Table]:
    """Retrieval for users without a history, and of items that nobody met in training, beside baselines.

    A table without anything to judge is left out.
    """
    model, tables = facts.models[RETRIEVAL], []
    if values := model.on(COLD_USERS):
        keys = [key for key in values if metric_keys.base(key) in {"recall", "ndcg"}]
        caption = "Cold users: no history at the end of training"
        tables.append(_comparison(caption, keys, RETRIEVAL, COLD_USERS, facts))
    keys = [key for key, value in model.overall.items() if metric_keys.is_cold(key) and value is not None]
    if keys:
        caption = "Cold items: nobody met them before the end of training"
        table = _comparison(caption, keys, RETRIEVAL, "", facts)
        note = (
            "Nobody chose these items yet: both popularities place them behind every item that was chosen, "
            "in the order of the catalogue. Random is one draw of an order for each user, newest goes by "
            "upload time."
        )
        tables.append(dataclasses.replace(table, note=note))
    return tables


def _comparison(caption: str, keys: Iterable[str], name: str, slice_name: str, facts: RunFacts) -> Table:
    """A model beside its rivals on a slice: one row per key, in the order of tasks or cut-offs."""
    model = facts.models[name]
    figures = {figure.key: figure for figure in model.figures if figure.slice == slice_name}
    against = {(a.key, a.rival): a for a in model.against if a.slice == slice_name}
    rows = []
    for key in sorted(metric_keys.in_task_order(keys, facts.tasks), key=metric_keys.cutoff):
        figure = figures[key]
        others = [against.get((key, rival)) for rival in model.rivals]
        values = [figure.value, *(other.value for other in others if other is not None)]
        best = min((metric_keys.badness(key, v) for v in values if v is not None), default=None)
        cells = [
            Cell(formatting.number(figure.count), value=figure.count),
            Cell(
                formatting.decimal(figure.value),
                _best(key, figure.value, best),
                figure.note,
                value=figure.value,
                interval=interval(figure),
            ),
        ]
        for other in others:
            if other is None:
                cells.append(Cell(_NOT_MEASURED))
                continue
            text, tone = change(key, figure.value, other.value)
            cells.append(
                Cell(
                    formatting.decimal(other.value),
                    _best(key, other.value, best),
                    text,
                    tone if other.is_clear else "",
                    other.value,
                )
            )
        rows.append(Row(metric_keys.label(key), key, tuple(cells)))
    judged = next((part for part in model.slices if part.name == slice_name), None)
    if judged is not None:
        caption += f": {judged.num_users:,} users, {judged.num_rows:,} {_ROW_WORDS[name]}"
    return Table(caption, ("Metric", "over", "this model", *map(formatting.rival, model.rivals)), tuple(rows))


def _best(key: str, value: float | None, best: float | None) -> str:
    return "best" if value is not None and metric_keys.badness(key, value) == best else ""


def paired_table(name: str, facts: RunFacts) -> Table | None:
    """Differences on the whole test split with interval and p-value, at the k of the headline metric.

    None without rivals.
    """
    rows = []
    cutoff = metric_keys.cutoff(headline_key(name, facts) or "")
    for a in facts.models[name].against:
        if a.slice or a.low is None or a.high is None or metric_keys.cutoff(a.key) != cutoff:
            continue
        low, high = (formatting.difference(bound) for bound in (a.low, a.high))
        text, tone = change(a.key, a.difference, 0.0)
        cells = (
            Cell(formatting.rival(a.rival)),
            Cell(text, tone if a.is_clear else "", value=a.difference),
            Cell(f"{low} to {high}"),
            Cell(formatting.decimal(a.p_value), value=a.p_value),
        )
        rows.append(Row(metric_keys.label(a.key), a.key, cells))
    if not rows:
        return None
    return Table(
        f"{name.capitalize()}: this model minus the rival, paired over the same users",
        ("Metric", "Rival", "Difference", "Interval", "p"),
        tuple(rows),
        note="p is of a paired test and not corrected for how many there are; metrics.json holds every k.",
        text_columns=2,
        name=f"paired-{name}",
    )


def seeds_table(name: str, facts: RunFacts) -> Table | None:
    """How much the metrics move when the model is trained with other seeds; None where nobody did."""
    rows = []
    for key, values in facts.seeds.get(name, {}).items():
        known = [value for value in values if value is not None]
        if len(known) > 1:
            spread = (statistics.mean(known), statistics.stdev(known), min(known), max(known))
            figures = (facts.models[name].overall.get(key), *spread)
            cells = (Cell(formatting.decimal(figure), value=figure) for figure in figures)
            rows.append(Row(metric_keys.label(key), key, tuple(cells)))
    if not rows:
        return None
    num_seeds = max(map(len, facts.seeds[name].values()))
    return Table(
        f"{name.capitalize()}: trained {num_seeds} times on the same examples, with other seeds",
        ("Metric", "this model", "Mean", "Standard deviation", "Smallest", "Largest"),
        tuple(rows),
        note=(
            "What training alone moves, on the same users. A gate whose max_drop is narrower rejects at "
            "random."
        ),
        name=f"seeds-{name}",
    )


def rival_notes(name: str, facts: RunFacts) -> list[tuple[str, str]]:
    """(rival, how it was made) of those that have something to say."""
    return [(formatting.rival(rival), note) for rival, note in facts.models[name].rivals.items() if note]


def slices_table(name: str, facts: RunFacts) -> Table | None:
    """Metrics by slice, the worst first; None without slices."""
    model, headline = facts.models[name], headline_key(name, facts)
    slices = [part for part in model.slices if part.name]
    if headline is None or not slices:
        return None
    figures = {(figure.slice, figure.key): figure for figure in model.figures}
    against = {(a.slice, a.key, a.rival): a for a in model.against}
    rivals = _slice_rivals(name, facts)
    keys = _slice_metrics(headline, model.overall, facts)
    rows = []
    for part in slices[:_SLICES_SHOWN]:
        cells = [Cell(formatting.number(size), value=size) for size in (part.num_users, part.num_rows)]
        differences = [_difference_cell(against.get((part.name, headline, rival))) for rival in rivals]
        for key in keys:
            figure = figures.get((part.name, key)) or Figure(part.name, key, 0, None, note="not judged")
            # The headline's change has a column of its own.
            other = None if key == headline else against.get((part.name, key, LAST_BLESSED))
            text, tone = change(key, figure.value, other.value) if other else ("", "")
            note = text or ("" if part.note else figure.note)
            cells.append(
                Cell(
                    formatting.decimal(figure.value),
                    "",
                    note,
                    tone if other and other.is_clear else "",
                    figure.value,
                    interval(figure),
                )
            )
            cells += differences if key == headline else []
        group = " × ".join(condition.partition(" = ")[0] for condition in part.name.split(", "))
        rows.append(Row(part.name, part.note, tuple(cells), group, part.num_users, note=part.note))
    hidden = len(slices) - len(rows)
    by = "by the change since the last blessed model" if model.is_compared_with_last_blessed else "by value"
    others = (metric_keys.label(key) for key in keys if key != headline)
    minus = (f"minus {formatting.rival(rival)}" for rival in rivals)
    return Table(
        caption=f"{name.capitalize()} by slice: worst {metric_keys.label(headline)} first, {by}",
        columns=("Slice", "users", _ROW_WORDS[name], metric_keys.label(headline), *minus, *others),
        rows=tuple(rows),
        note=f"{hidden:,} better slices are left out here; metrics.json holds all." if hidden else "",
        name=f"slices-{name}",
        size_words="users",
    )


def _slice_rivals(name: str, facts: RunFacts) -> list[str]:
    """What slices are compared with: the last blessed model and the best baseline, where there are any."""
    rivals = [LAST_BLESSED] if facts.models[name].is_compared_with_last_blessed else []
    best = best_baseline(name, facts)
    return [*rivals, *([best.rival] if best else [])]


def _difference_cell(a: Against | None) -> Cell:
    if a is None or a.difference is None:
        return Cell(_NOT_MEASURED)
    text, tone = change(a.key, a.difference, 0.0)
    return Cell(
        text, tone if a.is_clear else "", value=a.difference, interval=_bounds(a.low, a.high, signed=True)
    )


def interval(figure: Figure) -> str:
    """`(0.5104 to 0.5498)`; empty where none was measured, or where all users have the same value."""
    return _bounds(figure.low, figure.high)


def _bounds(low: float | None, high: float | None, *, signed: bool = False) -> str:
    # Draws of users who are all alike do not differ; that says nothing of others.
    if low is None or high is None or low == high:
        return ""
    texts = [*map(formatting.difference, (low, high))] if signed else formatting.column([low, high])
    return f"({texts[0]} to {texts[1]})"


def waterfall_sentence(waterfall: Waterfall) -> str:
    """How many positives were followed, and how many arrived."""
    whole = waterfall.whole
    share = formatting.share(whole.shown / whole.num_positives if whole.num_positives else None)
    sample = (
        "all users"
        if waterfall.num_users == waterfall.num_users_with_positives
        else f"{waterfall.num_users:,} of {waterfall.num_users_with_positives:,} users"
    )
    return (
        f"Of {whole.num_positives:,} items that {sample} with one went on to choose, {whole.shown:,} "
        f"({share}) were among the {waterfall.k} shown; the others were lost where the bars say."
    )


def waterfall_table(waterfall: Waterfall) -> Table:
    """What became of the positives, in all and by slice, in shares."""
    rows = []
    for part in waterfall.slices:
        cells = []
        for end, count in {**part.lost, SHOWN: part.shown}.items():
            share = count / part.num_positives if part.num_positives else None
            cells.append(
                Cell(
                    formatting.share(share),
                    note=formatting.number(count),
                    value=share,
                    interval=_share_bounds(part.bounds.get(end)),
                )
            )
        size = Cell(formatting.number(part.num_positives), value=part.num_positives)
        rows.append(Row(formatting.conditions(part.slice), "", (size, *cells)))
    columns = ("Positives", "how many", *waterfall.whole.lost, SHOWN)
    note = (
        f"Small figures: the {waterfall.confidence:.0%} interval over users, and how many. "
        "Shares of 0 and 100 %, and of fewer than ten users, have none."
    )
    return Table("Where positives were lost, by slice", columns, tuple(rows), note, name="waterfall")


def _share_bounds(bounds: tuple[float, float] | None) -> str:
    """`(12.1 to 13.9 %)`; empty where none was measured."""
    if bounds is None:
        return ""
    low, high = map(formatting.share, bounds)
    return f"({low.removesuffix(f'{formatting.NO_BREAK}%')} to {high})"


def sources_table(waterfall: Waterfall) -> Table:
    """What each source of candidates contributes."""
    rows = []
    for source in waterfall.sources:
        overlap = ", ".join(
            f"{formatting.words(other)} {formatting.share(value)}" for other, value in source.overlap.items()
        )
        cells = (
            Cell(formatting.number(source.depth), value=source.depth),
            Cell(
                formatting.share(source.recall),
                value=source.recall,
                interval=_share_bounds(source.recall_bounds),
            ),
            Cell(
                formatting.share(source.unique_recall),
                value=source.unique_recall,
                interval=_share_bounds(source.unique_bounds),
            ),
            Cell(overlap or "no other source"),
        )
        rows.append(Row(formatting.words(source.name), "", cells))
    columns = ("Source", "Asked for", "Recall", "Found by it alone", "Found by others, too")
    return Table("Sources of candidates", columns, tuple(rows))


def off_policy_sentences(found: PolicyFacts) -> list[str]:
    """What was evaluated on which rows, and how far it can be trusted."""
    if not found.estimates:
        return ["There is no estimate for any of the policies; the logging policy was a random pick."]
    estimates = list(found.estimates.values())
    logged, supports = estimates[0].logged, [estimate.support for estimate in estimates]
    value = " ".join(filter(None, (formatting.decimal(logged.value), _bounds(logged.low, logged.high))))
    randomly = f" and {formatting.share(found.epsilon)} of the picks were random" if found.epsilon else ""
    largest = formatting.number(max(support.max_weight for support in supports))
    return [
        f"The mean {formatting.words(found.reward)} per impression if each policy had picked one item of a "
        f"screen{randomly}, from screens that the log filled at random: {supports[0].num_rows:,} impressions "
        f"of {supports[0].num_users:,} users. A random pick, which is the logging policy, has {value}.",
        f"Intervals are {logged.confidence:.0%} over users. The effective sample size is the number of rows "
        f"of equal weight that would tell as much. The largest weight is {largest}, so that none is clipped. "
        "Every item of a screen was logged once: IPS, SNIPS and doubly robust are the same number here.",
    ]


def off_policy_table(found: PolicyFacts) -> Table | None:
    """What each policy would have earned, against the logging policy; None where all were refused."""
    rows = []
    for name, estimate in found.estimates.items():
        value, gain, support = estimate.values[IPS], estimate.gains[IPS], estimate.support
        is_unclear = gain.low <= 0 <= gain.high
        cells = (
            Cell(formatting.decimal(value.value), value=value.value, interval=_bounds(value.low, value.high)),
            Cell(
                formatting.difference(gain.value),
                "" if is_unclear else "better" if gain.value > 0 else "worse",
                value=gain.value,
                interval=_bounds(gain.low, gain.high, signed=True),
            ),
            Cell(formatting.decimal(gain.p_value), value=gain.p_value),
            Cell(formatting.number(round(support.effective_samples)), value=support.effective_samples),
        )
        rows.append(Row(formatting.words(name), "", cells))
    if not rows:
        return None
    return Table(
        f"What would have come of the first choice: {formatting.words(found.reward)} per impression",
        ("Picked by", "Value", "minus a random pick", "p", "Effective sample size"),
        tuple(rows),
        name="off-policy",
    )


def drift_tables(drift: DriftFacts) -> list[Table]:
    """How far each feature moved, by what was compared; the farthest for its limit first."""
    tables = []
    for name, features in drift.found.items():
        rows = [
            Row(
                found.feature,
                "",
                (
                    Cell(formatting.decimal(found.distance), value=found.distance),
                    Cell(formatting.decimal(found.limit), value=found.limit),
                    Cell(*_drift_verdict(found)),
                ),
            )
            for found in features
        ]
        caption = f"Distance {_DRIFT_COMPARISONS.get(name, formatting.words(name))}"
        columns = ("Feature", "Distance", "Limit", "Verdict")
        tables.append(Table(caption, columns, tuple(rows), name=f"drift-{name}"))
    return tables


def _drift_verdict(found: FeatureDrift) -> tuple[str, str]:
    if found.distance is None:
        return formatting.UNDEFINED, "worse"
    return ("too far", "worse") if found.is_too_far else ("near enough", "better")


def drift_absent(drift: DriftFacts) -> list[str]:
    """What was not compared, and why."""
    return [
        f"Distance {_DRIFT_COMPARISONS.get(name, formatting.words(name))}: not measured, {why}."
        for name, why in drift.absent.items()
    ]


def leakage_sentence(found: LeakageReport) -> str:
    """The verdict of the linter, in words."""
    failed = [check.name for check in found.checks if not check.passed]
    if failed:
        return f"Leaks were found: {', '.join(failed)}. The figures of this page are too good."
    return (
        f"None of {len(found.checks)} checks found anything in the data that nobody could have known at the "
        "moment of the request."
    )


def leakage_table(found: LeakageReport) -> Table:
    """What the linter looked at and found; the failed checks first."""
    rows = [
        Row(
            check.name,
            "",
            (
                Cell(*(("no leak", "better") if check.passed else ("leak", "worse"))),
                Cell(check.detail, note="; ".join(check.findings)),
            ),
        )
        for check in sorted(found.checks, key=lambda check: check.passed)
    ]
    return Table(
        "Checks of the leakage linter", ("Check", "Verdict", "Looked at"), tuple(rows), text_columns=3
    )


def associations_table(found: LeakageReport) -> Table:
    """How well single features order the labels of the eval split, the best first."""
    rows = [
        Row(
            one.feature,
            "",
            (
                Cell(formatting.words(one.task)),
                Cell(formatting.decimal(one.auc), "worse" if one.auc > found.max_auc else "", value=one.auc),
                Cell(formatting.number(one.num_rows), value=one.num_rows),
            ),
        )
        for one in found.associations
    ]
    return Table(
        "How well one feature alone orders a label",
        ("Feature", "Task", "AUC or XAUC", "Rows"),
        tuple(rows),
        note=f"Above {found.max_auc:g} a feature is taken for a leak.",
        text_columns=2,
        name="associations",
    )


def inflation_table(found: LeakageReport) -> Table:
    """What cheap models would seem to be worth under protocols that leak."""
    honest = found.inflation[0].metrics
    rows = [
        Row(
            f"{way.name} (honest)" if way.is_honest else way.name,
            "",
            tuple(
                Cell(
                    formatting.decimal(value),
                    note="" if way.is_honest else formatting.difference(value - honest[name]),
                    value=value,
                )
                for name, value in way.metrics.items()
            ),
        )
        for way in found.inflation
    ]
    columns = ("Protocol", *(formatting.words(name.replace("/", " ")) for name in honest))
    return Table("What cheap models would seem to be worth if the data leaked", columns, tuple(rows))


def load_table(load: LoadFacts) -> Table:
    """How long a request took under load, by stage."""
    rows = []
    for stage, latency in load.latency_ms.items():
        times = (latency.p50, latency.p95, latency.p99, latency.max)
        cells = tuple(
            Cell(text, value=time) for text, time in zip(formatting.column(times), times, strict=True)
        )
        rows.append(Row(formatting.words(stage), "", cells))
    caption = (
        f"Time of a request, ms: {load.num_requests:,} requests at {formatting.number(load.rate_per_s)} per "
        f"second, {formatting.share(load.error_share)} without an answer"
    )
    return Table(caption, ("Stage", "p50", "p95", "p99", "Longest"), tuple(rows), "; ".join(load.warnings))


def load_test_table(test: LoadTest) -> Table:
    """How long requests took at each rate, by stage, and how many failed."""
    rows = []
    for result in test.results:
        for stage, latency in result.latency_ms.items():
            times = (latency.p50, latency.p95, latency.p99, latency.max)
            cells = [Cell(formatting.words(stage)), Cell(formatting.decimal(result.achieved_rate_per_s))]
            failed = Cell(formatting.share(result.error_share), "worse" if result.error_share else "")
            cells = [*cells, *(Cell(formatting.decimal(time), value=time) for time in times), failed]
            rows.append(Row(f"{formatting.number(result.rate_per_s)} per s", "", tuple(cells)))
    columns = ("Asked", "Stage", "Answered per s", "p50 ms", "p95 ms", "p99 ms", "Longest ms", "Failed")
    warnings = dict.fromkeys(warning for result in test.results for warning in result.warnings)
    return Table("Time of a request by rate", columns, tuple(rows), "; ".join(warnings), text_columns=2)


def load_test_sentences(test: LoadTest) -> list[str]:
    """What was asked, and which errors there were."""
    settings = test.settings
    sentences = [
        f"funnel loadtest against {settings['target']}, layout {settings['layout']}: the best "
        f"{settings['k']} of {settings['num_candidates']} candidates for one of "
        f"{settings['num_users']:,} users; times count from when a request should have left."
    ]
    for result in test.results:
        for kind, count in result.errors.items():
            sentences.append(f"At {formatting.number(result.rate_per_s)} per s: {count:,} × {kind}.")
    return sentences


def _slice_metrics(headline: str, keys: Iterable[str], facts: RunFacts) -> list[str]:
    """The metrics to show: the headline, then others at its k."""
    shown = [
        key
        for key in metric_keys.in_task_order(keys, facts.tasks)
        if metric_keys.cutoff(key) == metric_keys.cutoff(headline)
    ]
    return [headline, *(key for key in shown if key != headline)]


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
    numbers: dict[str, float] = {
        "Items indexed": index.num_items,
        "Width of a vector": index.vector_width,
        "Building and tuning, s": index.build_s,
        **index.settings,
    }
    facts = {label: formatting.number(value) for label, value in numbers.items()}
    if index.settings.get("num_leaves") == 0:
        facts["num_leaves"] = "none: every item is scored"
    return list(facts.items())


def chosen_points_table(index: IndexFacts) -> Table:
    """How k items are searched for: what is found, in all and by kind of item, and how long it takes."""
    exact = {point.k: point for point in index.points if point.num_leaves_to_search is None}
    rows = []
    for point in index.points:
        if point.is_chosen:
            exact_ms = exact[point.k].p50_ms
            time_of_exact = Cell(formatting.decimal(exact_ms), value=exact_ms)
            rows.append(
                Row(f"up to {formatting.number(point.k)}", "", (*_search_cells(point), time_of_exact))
            )
    columns = ("Items asked for", *_search_columns(index), "Exact search, p50 ms")
    return Table(
        "The search as it is served: exact results found, and time of a query",
        columns,
        tuple(rows),
        note=(
            f"Measured at export, over {index.num_sample_queries:,} queries of real users. Times are those "
            "of one query in the process that exported, the search alone; a server adds the tower and the "
            "network. Few of the first items are tail or cold: their shares at small k rest on few results."
        ),
    )


def points_table(index: IndexFacts) -> Table:
    """Every setting that was measured, by k."""
    rows = []
    for point in index.points:
        way = "exact search" if point.num_leaves_to_search is None else "ScaNN"
        label = f"{formatting.number(point.k)}, {way}{' (served)' if point.is_chosen else ''}"
        effort = [
            Cell(_NOT_MEASURED if value is None else formatting.number(value), value=value)
            for value in (point.num_leaves_to_search, point.num_reordering_candidates)
        ]
        rows.append(Row(label, "", (*effort, *_search_cells(point))))
    columns = ("Items asked for", "Leaves searched", "Candidates reordered", *_search_columns(index))
    return Table("Every setting that was measured", columns, tuple(rows), name="index-points")


def _search_columns(index: IndexFacts) -> tuple[str, ...]:
    return ("Found", *(f"of {name}" for name in index.points[0].recall_by_slice), "p50 ms", "p95 ms")


def _search_cells(point: SearchPoint) -> tuple[Cell, ...]:
    shares = [point.recall, *point.recall_by_slice.values()]
    times = (point.p50_ms, point.p95_ms)
    return (
        *(Cell(formatting.share(share), value=share) for share in shares),
        *(Cell(formatting.decimal(time), value=time) for time in times),
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
    """The metrics that surely moved, those that moved most first; None without a last blessed model."""
    moved = [
        (abs(a.difference / a.value), a)
        for a in facts.models[name].against
        if a.rival == LAST_BLESSED and not a.slice and a.value and a.difference and a.low is not None
    ]
    if not moved:
        return None
    rows = []
    for _, a in sorted(moved, key=lambda pair: (not pair[1].is_clear, -pair[0]))[:_MOVERS_SHOWN]:
        text, tone = change(a.key, a.difference, 0.0)
        low, high = (formatting.difference(bound) for bound in (a.low, a.high))
        cells = (
            Cell(formatting.decimal(a.value)),
            Cell(text, tone if a.is_clear else ""),
            Cell(f"{low} to {high}"),
            Cell(_signed_share(a.difference / a.value) if a.difference and a.value else _NOT_MEASURED),
        )
        rows.append(Row(metric_keys.label(a.key), a.key, cells))
    return Table(
        f"{name.capitalize()}: what moved most, both models on this run’s test split",
        ("Metric", "last blessed", "Change", "Interval", "Relative"),
        tuple(rows),
        note="Grey: the interval holds zero, so that the change may be chance.",
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
                Cell(formatting.decimal(group.happened), interval=_bounds(group.low, group.high)),
                Cell(formatting.difference(group.predicted - group.happened)),
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
    for spec in map(TaskSpec.model_validate, facts.tasks):
        if spec.kind is TaskKind.WATCH_TIME and spec.served != "mean":
            sentences.append(
                f"{formatting.words(spec.name)}: the model serves the {formatting.words(spec.served)}, "
                "which is below the mean where a few values are large; the distance from the line is meant."
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
