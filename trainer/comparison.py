"""What a candidate is worth: its metrics with intervals, against rivals, on the whole split and by slice.

The rivals are the last blessed model and the baselines. The facts and their JSON form; how a slice is summed
up. What is measured is the business of `trainer.retrieval_comparison` and `trainer.ranking_comparison`.

Letters: U = users of a slice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.facts_file import read_facts, write_facts
from trainer.uncertainty import MIN_USERS, PairedDifference, UserSums, intervals_and_differences

COMPARISON_FILE = "comparison.json"
PREDICTIONS_FILE = "predictions.parquet"
CANDIDATE = "candidate"
LAST_BLESSED = "last_blessed"
# Why the last blessed model is absent where there is none; any other reason is about one that exists.
NO_BLESSED_MODEL = "no model was blessed before"
# Below this, a slice is told to be small: an interval is wide, and its neighbours are many.
FEW_USERS = 30

# Feature and value of each condition, sorted as declared; () is the whole split.
SliceKey = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Against:
    """How the candidate does against one rival on the same users; None where the data do not define it.

    Attributes:
      value: of the rival.
      difference: candidate − rival.
      low, high: interval of the difference.
      p_value: of the two-sided paired test; not corrected for the number of comparisons.
    """

    value: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None


@dataclasses.dataclass(frozen=True)
class MetricResult:
    """One metric of the candidate on one slice.

    Attributes:
      key: as `trainer.metrics.metric_key`.
      count: what it is taken over: users with a positive (retrieval), rows with a label (ranking).
      value: None where the data do not define it; `note` then says why.
      low, high: interval of the value; None for counts such as the number of distinct items.
      note: what keeps the value from being defined or trusted, in words; "" when nothing does.
      against: rival -> comparison with it.
    """

    key: str
    count: int
    value: float | None
    low: float | None
    high: float | None
    note: str
    against: Mapping[str, Against]


@dataclasses.dataclass(frozen=True)
class SliceResult:
    """Everything about one slice.

    Attributes:
      slice: its conditions; () is the whole split.
      num_users: users with at least one row in it.
      num_rows: judged users (retrieval) or impressions (ranking).
      note: what to know before its figures are believed, for instance that it has few users; "" when nothing.
      metrics: in the order of the whole split.
    """

    slice: SliceKey
    num_users: int
    num_rows: int
    note: str
    metrics: tuple[MetricResult, ...]

    @property
    def name(self) -> str:
        """`surface = home, activity_decile = 10`; "" for the whole split."""
        return slice_name(self.slice)

    def metric(self, key: str) -> MetricResult | None:
        """The result of a metric, None when it was not computed here."""
        return next((metric for metric in self.metrics if metric.key == key), None)


@dataclasses.dataclass(frozen=True)
class Rival:
    """Something that the candidate is compared with.

    Attributes:
      name: key of `MetricResult.against`.
      note: how it was made, for instance on how many rows it was fitted; "" when there is nothing to say.
    """

    name: str
    note: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of one candidate.

    Attributes:
      model: `retrieval` or `ranking`.
      headline: metric key by which slices are ordered.
      confidence: of all intervals, for instance 0.95.
      num_resamples: draws of the bootstrap over users.
      rivals: in the order of tables.
      absent: rival that could not be compared -> why, for instance that no model was blessed yet.
      slices: the whole split first, then the worst first: by the change of the headline against the last
        blessed model, or by its value when there is none; slices of few users come last.
      facts: further figures of the candidate's answers, by name, for instance `click_prediction_std`.
    """

    model: str
    headline: str
    confidence: float
    num_resamples: int
    rivals: tuple[Rival, ...]
    absent: Mapping[str, str]
    slices: tuple[SliceResult, ...]
    facts: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> SliceResult:
        """The whole split."""
        return self.slices[0]


@dataclasses.dataclass(frozen=True)
class BootstrapSettings:
    """How intervals are made.

    Attributes:
      confidence: of two-sided intervals.
      num_resamples: draws of users.
    """

    confidence: float = 0.95
    num_resamples: int = 1_000


@dataclasses.dataclass(frozen=True)
class Measured:
    """One metric on one slice, for every model.

    Attributes:
      count: what it is taken over, see `MetricResult.count`.
      candidate: the candidate's, as sums over U users, or as a plain number where users have no share in it.
      rivals: rival -> the same.
      why_undefined: what to say where the candidate's value is NaN.
    """

    count: int
    candidate: UserSums | float
    rivals: Mapping[str, UserSums | float]
    why_undefined: str


def slice_result(
    key: SliceKey,
    num_users: int,
    num_rows: int,
    measured: Mapping[str, Measured],
    settings: BootstrapSettings,
) -> SliceResult:
    """The results of a slice; all models meet the same draws of its users.

    Args:
      key, num_users, num_rows: of the slice.
      measured: metric key -> the metric; all are over the same U users in the same order.
      settings: of the intervals.
    """
    rivals = dict.fromkeys(rival for m in measured.values() for rival in m.rivals)
    own, differences = intervals_and_differences(
        {name: m.candidate for name, m in measured.items() if isinstance(m.candidate, UserSums)},
        {
            rival: {
                name: metric
                for name, m in measured.items()
                if isinstance(metric := m.rivals.get(rival), UserSums)
            }
            for rival in rivals
        },
        confidence=settings.confidence,
        num_resamples=settings.num_resamples,
    )
    results = []
    for name, m in measured.items():
        value, interval = _value(m.candidate), own.get(name)
        low, high = (interval.low, interval.high) if interval else (math.nan, math.nan)
        note = ""
        if math.isnan(value):
            note = m.why_undefined
        elif interval and math.isnan(low):
            note = f"{interval.num_users} users, of {MIN_USERS} that an interval takes"
        against = {
            rival: _against(value, _value(theirs), differences[rival].get(name))
            for rival, theirs in m.rivals.items()
        }
        results.append(
            MetricResult(name, m.count, defined(value), defined(low), defined(high), note, against)
        )
    note = f"{num_users} users are too few to tell" if num_users < FEW_USERS else ""
    return SliceResult(key, num_users, num_rows, note, tuple(results))


def worst_first(slices: Sequence[SliceResult], headline: str) -> list[SliceResult]:
    """The whole split, then the slices from the worst to the best.

    The worst is the one whose headline fell most against the last blessed model; where there is none, the one
    with the smallest headline. Slices of few users, or without a value, come last.

    Args:
      slices: the whole split first.
      headline: key of a metric that is better when higher.
    """

    def order(result: SliceResult) -> tuple[bool, float]:
        metric = result.metric(headline)
        value = None
        if metric is not None:
            change = metric.against.get(LAST_BLESSED)
            value = metric.value if change is None else change.difference
        return bool(result.note) or value is None, math.inf if value is None else value

    return [slices[0], *sorted(slices[1:], key=order)]


def defined(value: float) -> float | None:
    """None for what is not a finite number, as JSON has it."""
    return float(value) if math.isfinite(value) else None


def _against(ours: float, theirs: float, paired: PairedDifference | None) -> Against:
    if paired is None:
        return Against(defined(theirs), defined(ours - theirs), None, None, None)
    found = (paired.value, paired.low, paired.high, paired.p_value)
    return Against(defined(theirs), *map(defined, found))


def _value(metric: UserSums | float) -> float:
    return metric.value if isinstance(metric, UserSums) else metric


def slice_name(key: SliceKey) -> str:
    """`surface = home, activity_decile = 10`; "" for the whole split."""
    return ", ".join(f"{feature} = {value}" for feature, value in key)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes comparison.json; values that are not defined are null."""
    write_facts(comparison, folder / COMPARISON_FILE)


def read_comparison(folder: Path) -> Comparison:
    """Reads comparison.json.

    Raises:
      DataError: there is none, or it has another form.
    """
    return read_facts(Comparison, folder / COMPARISON_FILE)
