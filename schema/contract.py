"""The event contract: which tables, columns, features and tasks a dataset has, read from one YAML.

Everything downstream (contract tables, the TFX schema, the Transform graph, model inputs, heads) is derived
from the `DatasetSpec` that `load_dataset_spec` returns. Nothing else names a column or a task.
"""

from __future__ import annotations

import datetime
import difflib
import enum
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml

from schema.errors import ConfigError

BUILT_IN_DATASETS = Path(__file__).parent / "datasets"

# Contract columns of the interactions table; the required ones come first.
REQUIRED_INTERACTION_COLUMNS = ("user_id", "item_id", "event_time_unix_s")
OPTIONAL_INTERACTION_COLUMNS = (
    "surface",
    "position",
    "watch_time_s",
    "item_duration_s",
    "exploration",
    "propensity",
    "search_tokens",
)
ITEM_COLUMNS = ("item_id", "creator_id", "upload_time_unix_s", "valid_from_unix_s")
USER_COLUMNS = ("user_id", "valid_from_unix_s")
WATCH_TIME = "watch_time_s"
ITEM_DURATION = "item_duration_s"
# The label min(1, watch_time_s / item_duration_s), which every dataset with both columns has.
COMPLETION = "completion"

# Feature names that the pipeline itself makes; a declared feature may not take one of them.
RESERVED_NAMES = frozenset(
    {
        *REQUIRED_INTERACTION_COLUMNS,
        *OPTIONAL_INTERACTION_COLUMNS,
        *ITEM_COLUMNS,
        COMPLETION,
        "row_number",
        "split",
        "title",
        "k",
        "num_candidates",
        "score",
        "history_item_ids",
        "impression_item_ids",
        "impression_event_time_unix_s",
        "impression_surfaces",
        "impression_ages_s",
        "item_counts",
        "item_counters",
        "label_means_so_far",
        "prior_sessions_item_ids",
        "days_to_train_end",
        "retrieval_weight",
        "item_is_known",
        "item_age_days",
        "example_age_days",
        "hour_of_day",
        "day_of_week",
        "candidate_item_ids",
        "score_weights",
        "exclude_item_ids",
        "eval_item_ids",
        "test_item_ids",
        "seen_item_ids",
        "cold_test_item_ids",
        "user_type",
    }
)
# Outputs of the exported models, which share a list with those of the tasks.
RESERVED_TASK_NAMES = frozenset(
    {
        "score",
        "item_is_known",
        "item_ids",
        "retrieval_score",
        "reason_item_ids",
        "user_is_known",
        "history_length",
        "exact_fallback",
    }
)

Name = Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class ColumnSpec(_Model):
    """Where one contract column comes from, and how its values are read.

    Exactly one of `column` (a source column) and `value` (a constant, float) is given.
    """

    column: str | None = None
    value: float | None = None
    unit: Literal["s", "ms", "us"] = "s"
    format: str | None = None
    at_least: float | None = None
    separator: str | None = None

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> ColumnSpec:
        if (self.column is None) == (self.value is None):
            raise ValueError("give exactly one of 'column' (a source column) and 'value' (a constant)")
        return self


def _column(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


Column = Annotated[ColumnSpec, pydantic.BeforeValidator(_column)]


class FeatureKind(str, enum.Enum):
    """How a declared feature is read, transformed and embedded."""

    CATEGORICAL = "categorical"
    MULTI_CATEGORICAL = "multi_categorical"
    CONTINUOUS = "continuous"
    TEXT = "text"


class FeatureSpec(_Model):
    """One declared user or item feature.

    `separator` splits a multi-categorical source text; without it the source column must hold lists.
    `unit` converts a continuous duration to seconds. Features that name the same `space` share one vocabulary
    and one embedding table; `item_id` and `creator_id` are those columns' spaces. Default: its own name.
    """

    name: Name
    kind: FeatureKind
    column: str | None = None
    separator: str | None = None
    unit: Literal["s", "ms", "us"] = "s"
    space: Name | None = None

    @property
    def source_column(self) -> str:
        """The column in the source file; the feature's own name when none is declared."""
        return self.column or self.name

    @pydantic.model_validator(mode="after")
    def _separator_fits(self) -> FeatureSpec:
        if self.separator is not None and self.kind is not FeatureKind.MULTI_CATEGORICAL:
            raise ValueError(f"feature {self.name}: only a multi_categorical feature has a separator")
        if self.space is not None and self.kind is FeatureKind.CONTINUOUS:
            raise ValueError(f"feature {self.name}: a continuous feature has no vocabulary space")
        return self


class InteractionsSpec(_Model):
    """The interactions table: files, contract columns, labels, and the first event time that is used."""

    files: tuple[str, ...] = pydantic.Field(min_length=1)
    columns: Mapping[str, Column]
    labels: Mapping[Name, Column] = {}
    start: pydantic.AwareDatetime | None = None

    @pydantic.field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: Mapping[str, ColumnSpec]) -> Mapping[str, ColumnSpec]:
        known = REQUIRED_INTERACTION_COLUMNS + OPTIONAL_INTERACTION_COLUMNS
        return _check_columns(columns, known, REQUIRED_INTERACTION_COLUMNS)


class EntitySpec(_Model):
    """The users or the items table: files, contract columns, features, and a title shown to people."""

    files: tuple[str, ...] = pydantic.Field(min_length=1)
    columns: Mapping[str, Column]
    features: tuple[FeatureSpec, ...] = ()
    title: str | None = None


class TaskKind(str, enum.Enum):
    """What a ranking head predicts."""

    BINARY = "binary"
    WATCH_TIME = "watch_time"
    REGRESSION = "regression"
    COMPLETION = "completion"


class WatchTimeMethod(str, enum.Enum):
    """How a watch_time task is learnt; docs/adr/0004-watch-time-odds.md compares them."""

    WEIGHTED_LOGISTIC = "weighted_logistic"
    COVINGTON_LOGISTIC = "covington_logistic"
    DURATION_QUANTILES = "duration_quantiles"
    ORDINAL = "ordinal"
    REGRESSION = "regression"
    LOG_REGRESSION = "log_regression"


Served = Literal["mean", "median", "trimmed_mean", "mean_rank"]

# What a method can serve of the watch times that it expects; the first is the default.
_SERVED: Mapping[WatchTimeMethod, tuple[Served, ...]] = {
    WatchTimeMethod.WEIGHTED_LOGISTIC: ("mean",),
    WatchTimeMethod.COVINGTON_LOGISTIC: ("mean",),
    WatchTimeMethod.DURATION_QUANTILES: ("mean_rank", "median"),
    WatchTimeMethod.ORDINAL: ("mean", "median", "trimmed_mean"),
    WatchTimeMethod.REGRESSION: ("mean", "median"),
    WatchTimeMethod.LOG_REGRESSION: ("median",),
}
# Further fields of watch_time tasks: the methods that may have one, and those that need it.
_ALLOWED: Mapping[str, tuple[WatchTimeMethod, ...]] = {
    "click_label": (WatchTimeMethod.COVINGTON_LOGISTIC,),
    "duration_feature": (WatchTimeMethod.DURATION_QUANTILES, WatchTimeMethod.ORDINAL),
    "num_thresholds": (WatchTimeMethod.ORDINAL,),
}
_NEEDED: Mapping[WatchTimeMethod, str] = {
    WatchTimeMethod.COVINGTON_LOGISTIC: "click_label",
    WatchTimeMethod.DURATION_QUANTILES: "duration_feature",
}


class TaskSpec(_Model):
    """One ranking objective. `score_weight` is its weight in the final score; it may be negative.

    The other fields are for watch_time tasks alone. `method` is weighted_logistic unless given. `serve` is
    the mean or the median of the watch times that the model expects, as far as the method knows it; ordinal
    may also serve the mean of the middle, and duration_quantiles the quantile at the mean rank. `click_label`
    is the 0/1 label that tells covington_logistic its positives. `duration_feature` is a continuous item
    feature whose quantile buckets are the duration groups: duration_quantiles needs it, and ordinal gets
    thresholds of its own in each group. `num_thresholds` is that of ordinal, 32 unless given.
    """

    name: Name
    label: Name
    kind: TaskKind
    loss_weight: float = pydantic.Field(default=1.0, ge=0, allow_inf_nan=False)
    score_weight: float = pydantic.Field(default=0.0, allow_inf_nan=False)
    method: WatchTimeMethod | None = None
    serve: Served | None = None
    click_label: Name | None = None
    duration_feature: Name | None = None
    num_thresholds: int | None = pydantic.Field(default=None, ge=1, le=200)

    @property
    def watch_time_method(self) -> WatchTimeMethod:
        """The method of a watch_time task, given or not."""
        return self.method or WatchTimeMethod.WEIGHTED_LOGISTIC

    @property
    def served(self) -> Served:
        """What a watch_time task serves, given or not."""
        return self.serve or _SERVED[self.watch_time_method][0]

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that training on this task reads."""
        return (self.label,) if self.click_label is None else (self.label, self.click_label)

    @pydantic.model_validator(mode="after")
    def _fields_fit_the_method(self) -> TaskSpec:
        method = self.watch_time_method
        for field in ("method", "serve", *_ALLOWED):
            if self.kind is not TaskKind.WATCH_TIME and getattr(self, field) is not None:
                raise ValueError(f"task {self.name!r}: only a watch_time task has {field!r}; remove it")
        for field, methods in _ALLOWED.items():
            if getattr(self, field) is not None and method not in methods:
                names = " or ".join(m.value for m in methods)
                raise ValueError(
                    f"task {self.name!r}: {field!r} is for method {names}, not for {method.value}; "
                    "remove it, or change the method"
                )
        needed = _NEEDED.get(method)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"task {self.name!r}: method {method.value} needs {needed!r}")
        if self.served not in _SERVED[method]:
            able = ", ".join(m.value for m, served in _SERVED.items() if self.served in served)
            raise ValueError(
                f"task {self.name!r}: method {method.value} cannot serve the {self.served}; these can: {able}"
            )
        return self


class CountersSpec(_Model):
    """Which events of the log the ranker counts: of an item, of what is like it, and of a user with both.

    `keys` are the attributes that events are counted by: item_id, creator_id, or categorical item features.
    `windows_days` are the lengths of the windows before the event; all time is counted besides. A rate starts
    from the training mean with the weight of `smoothing` impressions.
    """

    keys: tuple[Name, ...] = ("item_id",)
    windows_days: tuple[pydantic.PositiveFloat, ...] = (1.0, 7.0)
    smoothing: pydantic.PositiveFloat = 20.0

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> CountersSpec:
        if len(set(self.keys)) < len(self.keys):
            raise ValueError(f"counters.keys {list(self.keys)} name a key twice")
        if sorted(set(self.windows_days)) != list(self.windows_days):
            raise ValueError(f"counters.windows_days {list(self.windows_days)} must grow")
        return self


class SplitSpec(_Model):
    """A temporal split: by two cut times, or by fractions of the rows in (event time, file order)."""

    train_until: pydantic.AwareDatetime | None = None
    eval_until: pydantic.AwareDatetime | None = None
    fractions: tuple[float, float, float] | None = None

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> SplitSpec:
        by_time = self.train_until is not None and self.eval_until is not None
        if by_time == (self.fractions is not None) or (self.train_until is None) != (self.eval_until is None):
            raise ValueError("give either train_until and eval_until, or fractions: [train, eval, test]")
        if by_time and self.train_until >= self.eval_until:  # type: ignore[operator]
            raise ValueError(
                f"train_until {self.train_until} must be earlier than eval_until {self.eval_until}"
            )
        if self.fractions is not None and (min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6):
            raise ValueError(f"fractions {list(self.fractions)} must be positive and sum to 1")
        return self


class DatasetSpec(_Model):
    """A whole dataset declaration; see docs/architecture.md for an example."""

    name: Annotated[str, pydantic.StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    utc_offset_hours: float = pydantic.Field(default=0.0, ge=-14, le=14)
    interactions: InteractionsSpec
    users: EntitySpec
    items: EntitySpec
    positive: Name
    tasks: tuple[TaskSpec, ...] = pydantic.Field(min_length=1)
    split: SplitSpec
    watch_time_cap_durations: float | None = pydantic.Field(default=None, gt=0)
    # A user's latest positives that make up the history.
    max_history: int = pydantic.Field(default=50, ge=1, le=500)
    # A user's latest impressions, of whatever outcome, that the ranker reads.
    max_impressions: int = pydantic.Field(default=50, ge=1, le=500)
    counters: CountersSpec = CountersSpec()
    # A longer pause ends a session. When given, retrieval learns from histories as of the session's start.
    session_gap_hours: float | None = pydantic.Field(default=None, gt=0)

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label a row can have, in a stable order.

        The declared ones, then watch time when it is mapped, then completion when the item's duration is too.
        """
        columns = self.interactions.columns
        watch_time = (WATCH_TIME,) if WATCH_TIME in columns else ()
        completion = (COMPLETION,) if watch_time and ITEM_DURATION in columns else ()
        return (*self.interactions.labels, *watch_time, *completion)

    @property
    def task_labels(self) -> tuple[str, ...]:
        """The labels that tasks predict, each once, in the order of the tasks."""
        return tuple(dict.fromkeys(task.label for task in self.tasks))

    @property
    def surface_is_mapped(self) -> bool:
        """Whether interactions say where in the product they happened."""
        return "surface" in self.interactions.columns

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> DatasetSpec:
        _check_columns(self.users.columns, USER_COLUMNS, ("user_id",))
        _check_columns(self.items.columns, ITEM_COLUMNS, ("item_id",))
        names = [f.name for f in self.users.features + self.items.features]
        of_impressions = [f"impression_{label}" for label in self.task_labels]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"feature {name!r} is declared twice; names are unique over users and items")
            if name in RESERVED_NAMES or name in (*self.labels, *of_impressions):
                raise ValueError(
                    f"feature name {name!r} is taken by the contract; "
                    f"give it another name and 'column: {name}'"
                )
        for label in self.interactions.labels:
            if label in RESERVED_NAMES or f"impression_{label}" in RESERVED_NAMES:
                raise ValueError(f"label name {label!r} is taken by the contract; give it another name")
        countable = ["item_id", *(["creator_id"] if "creator_id" in self.items.columns else [])]
        kinds = (FeatureKind.CATEGORICAL, FeatureKind.MULTI_CATEGORICAL)
        countable += [f.name for f in self.items.features if f.kind in kinds]
        for key in self.counters.keys:
            if key not in countable:
                raise ValueError(
                    f"counters.keys names {key!r}, which is no id or categorical feature of items, "
                    f"{_nearest(key, countable)}"
                )
        tasks = [t.name for t in self.tasks]
        for task in self.tasks:
            for label in task.labels:
                if label not in self.labels:
                    raise ValueError(
                        f"task {task.name!r} uses label {label!r}, {_nearest(label, self.labels)}"
                    )
            durations = [f.name for f in self.items.features if f.kind is FeatureKind.CONTINUOUS]
            if task.duration_feature is not None and task.duration_feature not in durations:
                raise ValueError(
                    f"task {task.name!r}: duration_feature {task.duration_feature!r} is not a continuous "
                    f"item feature, {_nearest(task.duration_feature, durations)}"
                )
            if tasks.count(task.name) > 1 or task.name in RESERVED_TASK_NAMES:
                raise ValueError(f"task name {task.name!r} is taken")
        if self.positive not in self.labels:
            raise ValueError(
                f"positive {self.positive!r} is not a label, {_nearest(self.positive, self.labels)}"
            )
        if self.watch_time_cap_durations is not None and ITEM_DURATION not in self.interactions.columns:
            raise ValueError("watch_time_cap_durations needs interactions.columns.item_duration_s")
        return self


def load_dataset_spec(name_or_path: str | Path) -> DatasetSpec:
    """Loads a dataset declaration.

    Args:
      name_or_path: the name of a built-in dataset (`simulated`), or the path of a YAML file.

    Raises:
      ConfigError: no such dataset or file, bad YAML, an unknown key (with the nearest valid one), or a wrong
        value.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = BUILT_IN_DATASETS / f"{name_or_path}.yaml"
        if not path.is_file():
            known = sorted(p.stem for p in BUILT_IN_DATASETS.glob("*.yaml"))
            raise ConfigError(
                f"unknown dataset {str(name_or_path)!r}; built in: {', '.join(known)}; or give a .yaml file"
            )
    return parse_model(DatasetSpec, read_yaml(path), source=str(path))


def read_yaml(path: Path) -> Any:
    """Reads a YAML file. Raises ConfigError when it is absent or is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


_M = TypeVar("_M", bound=pydantic.BaseModel)


def parse_model(model: type[_M], values: Any, source: str) -> _M:
    """Builds a pydantic model; its errors become one ConfigError: file, field, nearest valid key."""
    try:
        return model.model_validate(values if values is not None else {})
    except pydantic.ValidationError as error:
        problems = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                valid = _valid_keys(model, problem["loc"][:-1])
                problems.append(f"{where}: unknown key, {_nearest(str(problem['loc'][-1]), valid)}")
            elif problem["type"] == "missing":
                problems.append(f"{where}: required, not given")
            else:
                message = problem["msg"].removeprefix("Value error, ")
                problems.append(f"{where}: {message}" if where else message)
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def _valid_keys(model: type[pydantic.BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The field names of the model found at `loc` in `model`; empty where the location leads elsewhere."""
    current: type[pydantic.BaseModel] | None = model
    for part in loc:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        current = next(_models_in(field.annotation), None) if field is not None else current
    return list(current.model_fields) if current is not None else []


def _models_in(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)


def _nearest(name: str, valid: Any) -> str:
    valid = [str(v) for v in valid]
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid) or 'none'}"


def _check_columns(
    columns: Mapping[str, ColumnSpec], known: tuple[str, ...], required: tuple[str, ...]
) -> Mapping[str, ColumnSpec]:
    for name in columns:
        if name not in known:
            raise ValueError(f"unknown contract column {name!r}, {_nearest(name, known)}")
    for name in required:
        if name not in columns:
            raise ValueError(f"contract column {name!r} is required, map it to a source column")
    return columns


def dataset_spec_from_json(text: str) -> DatasetSpec:
    """The inverse of `DatasetSpec.model_dump_json`; a declaration travels as a component property."""
    return DatasetSpec.model_validate_json(text)


def unix_s(moment: datetime.datetime) -> int:
    """Whole unix seconds of an aware datetime."""
    return int(moment.timestamp())
