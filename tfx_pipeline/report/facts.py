"""The facts of a run as plain data: what the page, the model card and metrics.json show, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic

from schema.errors import DataError
from schema.tables import TablesSummary
from tfx_pipeline.report.data_facts import SplitAnomalies, SplitStatistics
from tfx_pipeline.run_result import ComponentTiming
from trainer import features

COLD_USERS = f"{features.USER_TYPE} = {features.COLD}"
METRICS_FILE = "metrics.json"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One value of a metric, with the bounds of its interval where one was measured.

    Slice "" is the whole test split; None is a value that the data do not define.
    """

    slice: str
    key: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class GateFailure:
    """A gate that was not met; the value is the change against the last blessed model if `is_change`."""

    key: str
    value: float | None
    is_change: bool
    limit: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an Evaluator found for the new model, and for the last blessed one when there is one."""

    candidate: tuple[Figure, ...] = ()
    last_blessed: tuple[Figure, ...] = ()
    failures: tuple[GateFailure, ...] = ()


@dataclasses.dataclass(frozen=True)
class GateResult:
    """One condition of one gate, on the value or on its change against the last blessed model.

    `passed` is None where the condition was not applied: there was no blessed model to compare with.
    """

    key: str
    condition: str
    value: float | None
    is_change: bool
    passed: bool | None


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """Everything known about one of the two models.

    Attributes:
      figures, last_blessed: metrics of the new and of the last blessed model, overall and by slice.
      baselines: baseline -> metric key -> value.
      cold_user_baselines: the same on users without a history; retrieval only.
      training_log: one record per epoch.
    """

    blessed: bool
    pushed_version: str | None
    figures: tuple[Figure, ...]
    last_blessed: tuple[Figure, ...]
    gates: tuple[GateResult, ...]
    baselines: Mapping[str, Mapping[str, float | None]]
    cold_user_baselines: Mapping[str, Mapping[str, float | None]]
    training_log: tuple[Mapping[str, float | None], ...]

    @property
    def overall(self) -> dict[str, float | None]:
        """Metric key -> value on the whole test split."""
        return overall(self.figures)

    @property
    def overall_last_blessed(self) -> dict[str, float | None]:
        """The same of the last blessed model; empty when there is none."""
        return overall(self.last_blessed)

    @property
    def rivals(self) -> dict[str, Mapping[str, float | None]]:
        """What the model is compared with: the last blessed model, when there is one, and the baselines."""
        last_blessed = {"last_blessed": self.overall_last_blessed} if self.last_blessed else {}
        return {**last_blessed, **self.baselines}

    @property
    def cold_users(self) -> dict[str, float | None]:
        """Metric key -> value on users without a history; empty when there is none, and for ranking."""
        return overall(self.figures, COLD_USERS)

    @property
    def cold_user_rivals(self) -> dict[str, Mapping[str, float | None]]:
        """`rivals` on users without a history."""
        previous = overall(self.last_blessed, COLD_USERS)
        return {**({"last_blessed": previous} if previous else {}), **self.cold_user_baselines}


@dataclasses.dataclass(frozen=True)
class AnswerItem:
    """One recommended item; `reason_item_id` is the watched item nearest to it, "" without a history."""

    item_id: str
    rank: int
    score: float
    retrieval_score: float
    reason_item_id: str
    predictions: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ExampleAnswer:
    """What one user was recommended; `history` holds item ids, the latest last."""

    user_id: str
    user_is_known: bool
    history: tuple[str, ...]
    items: tuple[AnswerItem, ...]


@dataclasses.dataclass(frozen=True)
class SearchEffort:
    """How hard ScaNN looks for k items, and which share of the exact results it finds then."""

    k: int
    num_leaves_to_search: int
    num_reordering_candidates: int
    recall: float


@dataclasses.dataclass(frozen=True)
class IndexFacts:
    """The candidate index, as `trainer.index_build` describes it.

    Attributes:
      recall: share of the k exact results that ScaNN finds, at the largest k.
      efforts: from the smallest k to the largest; none of an exact index.
      recall_by_slice: the same for head, tail and new items.
    """

    num_items: int
    vector_width: int
    settings: Mapping[str, float]
    k: int
    recall: float
    build_s: float
    efforts: tuple[SearchEffort, ...] = ()
    recall_by_slice: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    num_sample_queries: int | None = None


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Examples that were predicted alike: the means of what was predicted and of what happened."""

    predicted: float
    observed: float
    count: int


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """What the ranking model predicts on the test split for one task, against what happened.

    Attributes:
      task: its name.
      bins: groups of equal size by prediction, from the lowest to the highest.
      edges: of the histogram, one more than it has bars.
      histogram: label -> examples per bar; of a binary task those with label 1 and those with label 0, else
        what was predicted and what happened.
      undefined: examples whose prediction or label is not a number; they are in none of the above.
    """

    task: str
    bins: tuple[ReliabilityBin, ...]
    edges: tuple[float, ...]
    histogram: Mapping[str, tuple[int, ...]]
    undefined: int


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

    @property
    def run_id(self) -> str:
        """The moment at which the facts were collected, in UTC: `20261128T132901Z`."""
        return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.created_unix_s))

    @property
    def tasks(self) -> list[Mapping[str, Any]]:
        """The declared tasks, in order; none when the configuration is unknown."""
        return list(self.config.get("dataset", {}).get("tasks", ()))


def overall(figures: Iterable[Figure], slice_name: str = "") -> dict[str, float | None]:
    """Metric key -> value of one slice; "" is the whole test split."""
    return {figure.key: figure.value for figure in figures if figure.slice == slice_name}


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
