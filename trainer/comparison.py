"""What a candidate is worth: its metrics with intervals, against rivals, on the whole split and by slice.

The rivals are the last blessed model and the baselines. This module holds the facts and their JSON form;
`trainer.retrieval_comparison` and `trainer.ranking_comparison` work them out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pydantic

from schema.errors import DataError

COMPARISON_FILE = "comparison.json"
PREDICTIONS_FILE = "predictions.parquet"
CANDIDATE = "candidate"
LAST_BLESSED = "last_blessed"

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


def slice_name(key: SliceKey) -> str:
    """`surface = home, activity_decile = 10`; "" for the whole split."""
    return ", ".join(f"{feature} = {value}" for feature, value in key)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes comparison.json; values that are not defined are null."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(comparison), indent=1, allow_nan=False)
    (folder / COMPARISON_FILE).write_text(text, encoding="utf-8")


def read_comparison(folder: Path) -> Comparison:
    """Reads comparison.json.

    Raises:
      DataError: there is none, or it has another form.
    """
    path = folder / COMPARISON_FILE
    try:
        return pydantic.TypeAdapter(Comparison).validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise DataError(f"{path} has another form than expected, {where}: {first['msg']}") from error
