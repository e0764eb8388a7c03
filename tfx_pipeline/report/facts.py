"""The facts of a run as plain data: what the page, the model card and metrics.json show, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from schema.errors import DataError
from schema.tables import TablesSummary
from tfx_pipeline.drift_facts import DriftFacts
from tfx_pipeline.gates import GateResult
from tfx_pipeline.leakage.findings import LeakageReport
from tfx_pipeline.report.data_facts import SplitAnomalies, SplitStatistics
from tfx_pipeline.run_result import ComponentTiming
from trainer import features
from trainer.comparison import LAST_BLESSED
from trainer.index_facts import IndexFacts
from trainer.off_policy import PolicyFacts
from trainer.waterfall import Waterfall

COLD_USERS = f"{features.USER_TYPE} = {features.COLD}"
METRICS_FILE = "metrics.json"
# JSON has no NaN: it is written as null, and read as what it was.
Number = Annotated[float, pydantic.BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One value of a metric.

    Attributes:
      slice: "" is the whole test split.
      count: what it is taken over: users with a positive (retrieval), rows with a label (ranking).
      value: None where the data do not define it.
      low, high: bounds of its interval; None where none was measured.
      note: what keeps the value from being defined or trusted; "" when nothing does.
    """

    slice: str
    key: str
    count: int
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Against:
    """How the model does against one rival on the same users; None where the data do not define it.

    Attributes:
      slice, key: as in `Figure`.
      rival: `last_blessed` or a baseline.
      value: of the rival.
      difference: of the model minus the rival.
      low, high: bounds of the interval of the difference; None where none was measured.
      p_value: of the paired test, not corrected for the number of comparisons.
    """

    slice: str
    key: str
    rival: str
    value: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference leaves zero out; without one it may be chance."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclasses.dataclass(frozen=True)
class SliceFacts:
    """What is known of a slice beside its figures.

    Attributes:
      name: as in `Figure`.
      num_users, num_rows: users, and judged users (retrieval) or impressions (ranking).
      note: what to know before its figures are believed; "" when nothing.
    """

    name: str
    num_users: int
    num_rows: int
    note: str


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """Everything known about one of the two models.

    Attributes:
      headline: metric key by which slices are ordered; "" without a comparison.
      confidence: of all intervals; None without a comparison.
      figures: metrics, overall and by slice.
      against: the same against rivals: against all of them on the whole test split and on cold users, and by
        the headline on every slice; by other metrics on a slice against the last blessed model alone.
      rivals: rival -> how it was made, in the order of tables.
      absent: rival that could not be compared -> why.
      slices: the whole test split, then the worst first.
      gates: every gate with its verdict and reason.
      training_log: one record per epoch.
    """

    blessed: bool
    pushed_version: str | None
    headline: str
    confidence: float | None
    figures: tuple[Figure, ...]
    against: tuple[Against, ...]
    rivals: Mapping[str, str]
    absent: Mapping[str, str]
    slices: tuple[SliceFacts, ...]
    gates: tuple[GateResult, ...]
    training_log: tuple[Mapping[str, float | None], ...]

    @property
    def overall(self) -> dict[str, float | None]:
        """Metric key -> value on the whole test split."""
        return self.on("")

    def on(self, slice_name: str) -> dict[str, float | None]:
        """Metric key -> value on a slice; empty when it was not judged."""
        return {figure.key: figure.value for figure in self.figures if figure.slice == slice_name}

    def rival(self, rival: str, slice_name: str = "") -> dict[str, float | None]:
        """The same of a rival."""
        return {a.key: a.value for a in self.against if a.rival == rival and a.slice == slice_name}

    @property
    def is_compared_with_last_blessed(self) -> bool:
        """Whether there was a blessed model to compare with."""
        return LAST_BLESSED in self.rivals


@dataclasses.dataclass(frozen=True)
class AnswerItem:
    """One recommended item; `reason_item_id` is the watched item nearest to it, "" without a history."""

    item_id: str
    rank: int
    score: Number
    retrieval_score: Number
    reason_item_id: str
    predictions: Mapping[str, Number]


@dataclasses.dataclass(frozen=True)
class ExampleAnswer:
    """What one user was recommended; `history` holds item ids, the latest last."""

    user_id: str
    user_is_known: bool
    history: tuple[str, ...]
    items: tuple[AnswerItem, ...]


@dataclasses.dataclass(frozen=True)
class LikePredictions:
    """Examples that were predicted alike.

    Attributes:
      count: examples.
      predicted, happened: means of the prediction and of the label.
      low, high: bounds of the interval of what happened; None where there is none.
    """

    count: int
    predicted: float
    happened: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """What the ranking model predicts on the test split for one task, against what happened.

    Attributes:
      task: its name.
      bins: groups of equal size by prediction, from the lowest to the highest.
      edges: of the histogram, one more than it has bars; the last bar holds what is beyond, too.
      histogram: label -> examples per bar; of a binary task those with label 1 and those with label 0, else
        what was predicted and what happened.
      undefined: examples whose prediction or label is not a number; they are in none of the above.
    """

    task: str
    bins: tuple[LikePredictions, ...]
    edges: tuple[float, ...]
    histogram: Mapping[str, tuple[int, ...]]
    undefined: int


@dataclasses.dataclass(frozen=True)
class Latency:
    """Percentiles of the time of a request, milliseconds."""

    p50: Number
    p95: Number
    p99: Number
    max: Number


@dataclasses.dataclass(frozen=True)
class LoadFacts:
    """What came of load at one rate, as `serving.loadtest` describes it.

    Attributes:
      rate_per_s: mean of the arrivals.
      num_requests: requests sent.
      error_share: of them, those without an answer.
      latency_ms: by stage; `total` counts from the scheduled time.
      warnings: reasons to doubt the figures.
      achieved_rate_per_s: answers per second.
      errors: requests without an answer by kind of error.
    """

    rate_per_s: Number
    num_requests: int
    error_share: Number
    latency_ms: Mapping[str, Latency]
    warnings: tuple[str, ...]
    achieved_rate_per_s: Number = math.nan
    errors: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LoadTest:
    """What `funnel loadtest` measured on a running server.

    Attributes:
      settings: target, layout, k and so on.
      results: by ascending rate.
    """

    settings: Mapping[str, Any]
    results: tuple[LoadFacts, ...]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Something that differs between two runs, in words; None where a run does not have it."""

    name: str
    before: str | None
    after: str | None


@dataclasses.dataclass(frozen=True)
class Differences:
    """What lies between two runs, apart from their figures.

    Attributes:
      before, after: their run ids.
      data, config, versions: what differs; a version is one of a package or of Funnel's own code.
      unknown: of which of these three one run tells nothing, so that they were not compared.
    """

    before: str
    after: str
    data: tuple[Setting, ...]
    config: tuple[Setting, ...]
    versions: tuple[Setting, ...]
    unknown: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """All facts of a run, as plain data.

    Attributes:
      created_unix_s: when the facts were collected.
      versions: package -> version.
      config: the resolved run configuration; {} when it cannot be read.
      models: by model name.
      titles: item id -> title, of the items that the examples name.
      missing: piece -> why it is not there. A piece that is not named here is there.
      code_version: version and hash of Funnel's sources.
      data_fingerprint: of the contract tables; equal tables have equal ones.
      timings: what each component took; known only after the last of them.
      machine: label -> what the run ran on.
      since: what changed since the run that blessed a model last; None when there was none.
      scores: predictions of the ranking model against what happened, by task.
      drift: how far the data moved.
      leakage: whether the data say what nobody could have known at the time.
      waterfall: where the funnel lost what people went on to choose.
      off_policy: what the ranker's first choice would have earned where the log shows random screens.
      load: what the models held during infra validation.
      load_test: what a running server held, once somebody tested it.
      seeds: model -> metric key -> its value for each of some seeds, once somebody trained with them.
    """

    created_unix_s: int
    funnel_version: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    infra_blessed: bool
    infra_reason: str
    models: Mapping[str, ModelFacts]
    summary: TablesSummary | None
    statistics: tuple[SplitStatistics, ...]
    anomalies: tuple[SplitAnomalies, ...]
    index: IndexFacts | None
    examples: tuple[ExampleAnswer, ...]
    titles: Mapping[str, str]
    missing: Mapping[str, str]
    code_version: str = ""
    data_fingerprint: str = ""
    timings: tuple[ComponentTiming, ...] = ()
    machine: Mapping[str, str] = dataclasses.field(default_factory=dict)
    since: Differences | None = None
    scores: tuple[TaskScores, ...] = ()
    drift: DriftFacts | None = None
    leakage: LeakageReport | None = None
    waterfall: Waterfall | None = None
    off_policy: PolicyFacts | None = None
    load: LoadFacts | None = None
    load_test: LoadTest | None = None
    seeds: Mapping[str, Mapping[str, tuple[float | None, ...]]] = dataclasses.field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """The moment at which the facts were collected, in UTC: `20261128T132901Z`."""
        return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.created_unix_s))

    @property
    def tasks(self) -> list[Mapping[str, Any]]:
        """The declared tasks, in order; none when the configuration is unknown."""
        return list(self.config.get("dataset", {}).get("tasks", ()))


def read_facts(path: Path) -> RunFacts:
    """Reads the facts of a run from its metrics.json.

    Raises:
      DataError: the file is absent, broken, or of another version of Funnel.
    """
    try:
        return pydantic.TypeAdapter(RunFacts).validate_python(json.loads(path.read_text("utf-8"))["facts"])
    except FileNotFoundError as error:
        raise DataError(f"there is no report at {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read by this version of Funnel: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What is wrong, without the rest of a long explanation."""
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}"
    return str(error).partition("\n")[0] or type(error).__name__
