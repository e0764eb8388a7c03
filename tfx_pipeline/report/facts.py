"""Collects the facts of a run from what its components wrote; the report shows these and nothing else."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import pydantic
from google.protobuf.message import DecodeError

from schema.errors import DataError, FunnelError
from schema.tables import ITEMS, TablesSummary, read_summary
from tfx_pipeline.config import MODELS, RANKING, RETRIEVAL
from tfx_pipeline.report.data_facts import SplitAnomalies, SplitStatistics, read_anomalies, read_statistics
from trainer import features
from trainer.metrics import LOWER_IS_BETTER, metric_key

_TRAINING_LOG = "training_log.json"
_INDEX_FACTS = Path("Format-Serving") / "assets.extra" / "index.json"
# What decides whether a model can be trained again to the same figures.
_PACKAGES = (
    "tfx",
    "tensorflow",
    "tf-keras",
    "tensorflow-recommenders",
    "scann",
    "tensorflow-model-analysis",
    "apache-beam",
    "numpy",
)

COLD_USERS = f"{features.USER_TYPE} = {features.COLD}"
_COLD_USER_BASELINES = "retrieval_cold_users"

_BOUNDS = {"min": "at least", "max": "at most"}
# How a limit on the change begins in the words of tfx_pipeline.tfma_metrics.
_CHANGE_LIMIT = "change against the last blessed model "

_T = TypeVar("_T")
_PathLike = str | Path


@dataclasses.dataclass(frozen=True)
class ReportSources:
    """Where the facts of a run lie; a file that is absent or broken costs its section of the report only.

    Attributes:
      tables_dir: contract tables with summary.json.
      statistics_uri, anomalies_uri: artifacts with one folder per split.
      retrieval_evaluation_uri, ranking_evaluation_uri: what the Evaluators wrote.
      retrieval_blessed, ranking_blessed: the Evaluators' verdicts.
      infra_blessed, infra_reason: the verdict of infra validation, and why when it is negative.
      pushed: model -> pushed version, None when it was not pushed.
      baselines_path: JSON, see `tfx_pipeline.components.baseline_evaluator.BaselineMetrics`.
      retrieval_run_uri, ranking_run_uri: folders with training_log.json.
      retrieval_model_uri: the Trainer's model artifact, which holds the facts of the index.
      recommendations_path: JSON list of example answers, see `ExampleAnswer`; item ids instead of titles.
      config_json: the resolved RunConfig.
      funnel_version: of the code that ran.
    """

    tables_dir: _PathLike
    statistics_uri: _PathLike
    anomalies_uri: _PathLike
    retrieval_evaluation_uri: _PathLike
    ranking_evaluation_uri: _PathLike
    retrieval_blessed: bool
    ranking_blessed: bool
    infra_blessed: bool
    infra_reason: str
    pushed: Mapping[str, str | None]
    baselines_path: _PathLike
    retrieval_run_uri: _PathLike
    ranking_run_uri: _PathLike
    retrieval_model_uri: _PathLike
    recommendations_path: _PathLike
    config_json: str
    funnel_version: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """One value of a metric: slice "" is the whole test split, None a value that the data do not define."""

    slice: str
    key: str
    value: float | None


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
        return _overall(self.figures)

    @property
    def overall_last_blessed(self) -> dict[str, float | None]:
        """The same of the last blessed model; empty when there is none."""
        return _overall(self.last_blessed)

    @property
    def rivals(self) -> dict[str, Mapping[str, float | None]]:
        """What the model is compared with: the last blessed model, when there is one, and the baselines."""
        last_blessed = {"last_blessed": self.overall_last_blessed} if self.last_blessed else {}
        return {**last_blessed, **self.baselines}

    @property
    def cold_users(self) -> dict[str, float | None]:
        """Metric key -> value on users without a history; empty when there is none, and for ranking."""
        return _overall(self.figures, COLD_USERS)

    @property
    def cold_user_rivals(self) -> dict[str, Mapping[str, float | None]]:
        """`rivals` on users without a history."""
        previous = _overall(self.last_blessed, COLD_USERS)
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
class IndexFacts:
    """The candidate index, as `trainer.index` describes it."""

    num_items: int
    vector_width: int
    settings: Mapping[str, float]
    k: int
    recall: float
    build_s: float


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

    @property
    def tasks(self) -> list[Mapping[str, Any]]:
        """The declared tasks, in order; none when the configuration is unknown."""
        return list(self.config.get("dataset", {}).get("tasks", ()))


def collect(
    sources: ReportSources, read_evaluation: Callable[[str, Path], Evaluation] | None = None
) -> RunFacts:
    """Reads all sources.

    Args:
      sources: where they are.
      read_evaluation: (model name, folder) -> evaluation; by default what TFMA wrote there is read.

    Returns:
      The facts; what could not be read is told in `missing`.
    """
    reader = _Reader()
    tables_dir = Path(sources.tables_dir)
    config = reader.read(
        "config", partial(_parse, dict[str, Any], sources.config_json, "the configuration"), {}
    )
    baselines = reader.read("baselines", partial(_read_baselines, Path(sources.baselines_path)), {})
    runs = {RETRIEVAL: sources.retrieval_run_uri, RANKING: sources.ranking_run_uri}
    evaluations = {RETRIEVAL: sources.retrieval_evaluation_uri, RANKING: sources.ranking_evaluation_uri}
    blessed = {RETRIEVAL: sources.retrieval_blessed, RANKING: sources.ranking_blessed}
    models = {}
    for name in MODELS:
        read = partial(read_evaluation or _read_evaluation, name, Path(evaluations[name]))
        evaluation = reader.read(f"{name}_evaluation", read, Evaluation())
        log_file = Path(runs[name]) / _TRAINING_LOG
        models[name] = ModelFacts(
            blessed=blessed[name],
            pushed_version=sources.pushed.get(name),
            figures=evaluation.candidate,
            last_blessed=evaluation.last_blessed,
            gates=_gate_results(name, config, evaluation),
            baselines=baselines.get(name, {}),
            cold_user_baselines=baselines.get(_COLD_USER_BASELINES, {}) if name == RETRIEVAL else {},
            training_log=reader.read(f"{name}_training", partial(_read_training_log, log_file), ()),
        )
    examples = reader.read("examples", partial(_read_examples, Path(sources.recommendations_path)), ())
    index_file = Path(sources.retrieval_model_uri) / _INDEX_FACTS
    return RunFacts(
        created_unix_s=int(time.time()),
        funnel_version=sources.funnel_version,
        versions=_versions(),
        config=config,
        infra_blessed=sources.infra_blessed,
        infra_reason=sources.infra_reason.strip(),
        models=models,
        summary=reader.read("summary", partial(read_summary, tables_dir), None),
        statistics=reader.read("statistics", partial(read_statistics, Path(sources.statistics_uri)), ()),
        anomalies=reader.read("anomalies", partial(read_anomalies, Path(sources.anomalies_uri)), ()),
        index=reader.read("index", partial(_parse_file, IndexFacts, index_file), None),
        examples=examples,
        titles=reader.read("titles", partial(_read_titles, tables_dir / ITEMS, examples), {}),
        missing=reader.missing,
    )


class _Reader:
    """Reads pieces; what is absent or broken is written down with the reason, for the report to say so."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}

    def read(self, piece: str, read: Callable[[], _T], otherwise: Any) -> _T:
        try:
            return read()
        except FileNotFoundError as error:
            self.missing[piece] = f"there is no {error.filename}"
            return otherwise
        except (OSError, ValueError, FunnelError, DecodeError, pl.exceptions.PolarsError) as error:
            self.missing[piece] = str(error) or type(error).__name__
            return otherwise


def _parse(type_: Any, text: str, what: str) -> Any:
    try:
        return pydantic.TypeAdapter(type_).validate_python(json.loads(text))
    except json.JSONDecodeError as error:
        raise DataError(f"{what} is not valid JSON: {error}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise DataError(f"{what} has another form than expected, {where}: {first['msg']}") from error


def _parse_file(type_: Any, path: Path) -> Any:
    return _parse(type_, path.read_text(encoding="utf-8"), str(path))


class _Baselines(pydantic.BaseModel):
    retrieval: dict[str, dict[str, float | None]] = {}
    retrieval_cold_users: dict[str, dict[str, float | None]] = {}
    ranking: dict[str, dict[str, dict[str, float | None]]] = {}


def _read_baselines(path: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """Model, or `retrieval_cold_users` -> baseline -> metric key -> value; ranking tasks come together."""
    values: _Baselines = _parse_file(_Baselines, path)
    ranking: dict[str, dict[str, float | None]] = {}
    for baselines in values.ranking.values():
        for name, metrics in baselines.items():
            ranking.setdefault(name, {}).update(metrics)
    return {
        model: {name: {k: _defined(v) for k, v in metrics.items()} for name, metrics in baselines.items()}
        for model, baselines in (
            (RETRIEVAL, values.retrieval),
            (_COLD_USER_BASELINES, values.retrieval_cold_users),
            (RANKING, ranking),
        )
    }


def _read_training_log(path: Path) -> tuple[Mapping[str, float | None], ...]:
    records = _parse_file(list[dict[str, float | None]], path)
    if not records:
        raise DataError(f"{path} holds no epoch")
    return tuple({key: _defined(value) for key, value in record.items()} for record in records)


def _read_examples(path: Path) -> tuple[ExampleAnswer, ...]:
    answers: tuple[ExampleAnswer, ...] = _parse_file(tuple[ExampleAnswer, ...], path)
    if not answers:
        raise DataError("infra validation, which asks the served models for them, got no answers")
    return answers


def _read_titles(path: Path, examples: Iterable[ExampleAnswer]) -> dict[str, str]:
    ids = set()
    for answer in examples:
        ids |= {*answer.history, *(item.item_id for item in answer.items)}
        ids |= {item.reason_item_id for item in answer.items} - {""}
    table = pl.scan_parquet(path).select("item_id", "title").filter(pl.col("item_id").is_in(sorted(ids)))
    return {item_id: title for item_id, title in table.collect().sort("item_id").iter_rows() if title}


def _read_evaluation(model: str, folder: Path) -> Evaluation:
    # Brings TFMA, Beam and TensorFlow: too slow to import before it is needed.
    import tensorflow as tf
    import tensorflow_model_analysis as tfma

    from tfx_pipeline.tfma_metrics import MetricValue, read_gate_failures, read_metrics

    def figures(values: list[MetricValue]) -> tuple[Figure, ...]:
        return tuple(
            Figure(
                slice=", ".join(f"{feature} = {value}" for feature, value in figure.slice),
                key=metric_key(model, figure.metric, task=figure.output or None),
                value=_defined(figure.value),
            )
            for figure in values
        )

    try:
        candidate = figures(read_metrics(str(folder)))
        if not candidate:
            raise DataError(f"no metrics in {folder}")
        last_blessed = figures(read_metrics(str(folder), tfma.BASELINE_KEY))
        failures = read_gate_failures(str(folder))
    except tf.errors.OpError as error:
        raise DataError(f"the evaluation in {folder} is broken: {error.message}") from error
    return Evaluation(
        candidate,
        last_blessed,
        tuple(
            GateFailure(
                metric_key(model, failure.metric, task=failure.output or None),
                _defined(failure.value),
                failure.is_change,
                failure.limit,
            )
            for failure in failures
        ),
    )


def _gate_results(model: str, config: Mapping[str, Any], evaluation: Evaluation) -> tuple[GateResult, ...]:
    """The outcome of every condition of the configured gates, then failures that none of them explains."""
    values, previous = _overall(evaluation.candidate), _overall(evaluation.last_blessed)
    failures = {(failure.key, failure.is_change): failure for failure in evaluation.failures}
    results = []
    for gate in config.get("gates", ()) if evaluation.candidate else ():
        key = gate["metric"]
        if not key.startswith(f"{model}/"):
            continue
        bounds = [
            f"{words} {gate[bound]:g}" for bound, words in _BOUNDS.items() if gate.get(bound) is not None
        ]
        if bounds:
            passed = failures.pop((key, False), None) is None
            results.append(GateResult(key, " and ".join(bounds), values.get(key), False, passed))
        if gate.get("max_drop") is not None:
            lower_is_better = key.rpartition("/")[2] in LOWER_IS_BETTER
            limit = f"at most +{gate['max_drop']:g}" if lower_is_better else f"at least -{gate['max_drop']:g}"
            passed = failures.pop((key, True), None) is None
            results.append(
                GateResult(
                    key,
                    limit,
                    _change(values.get(key), previous.get(key)),
                    True,
                    passed if previous else None,
                )
            )
    results += [
        GateResult(f.key, f.limit.removeprefix(_CHANGE_LIMIT), f.value, f.is_change, False)
        for f in failures.values()
    ]
    return tuple(results)


def _overall(figures: Iterable[Figure], slice_name: str = "") -> dict[str, float | None]:
    return {figure.key: figure.value for figure in figures if figure.slice == slice_name}


def _change(value: float | None, previous: float | None) -> float | None:
    return None if value is None or previous is None else value - previous


def _defined(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
