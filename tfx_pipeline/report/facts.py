"""Collects the facts of a run from what its components wrote; the report shows these and nothing else."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import pydantic
from google.protobuf.message import DecodeError

from schema.errors import DataError, FunnelError
from schema.tables import ITEMS, TablesSummary, read_summary
from tfx_pipeline.config import MODELS, RANKING, RETRIEVAL
from tfx_pipeline.report.data_facts import SplitAnomalies, SplitStatistics, read_anomalies, read_statistics
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

_T = TypeVar("_T")
_PathLike = str | Path


@dataclasses.dataclass(frozen=True)
class ReportSources:
    """Where the facts of a run lie. A file that is absent or broken costs its section of the report, not the report.

    Attributes:
      tables_dir: contract tables with summary.json.
      statistics_uri, anomalies_uri: artifacts with one folder per split.
      retrieval_evaluation_uri, ranking_evaluation_uri: what the Evaluators wrote.
      retrieval_blessed, ranking_blessed: the Evaluators' verdicts.
      infra_blessed, infra_reason: the verdict of infra validation, and why when it is negative.
      pushed: model -> pushed version, None when it was not pushed.
      baselines_path: JSON, {"retrieval": {baseline: {key: value}}, "ranking": {task: {baseline: {key: value}}}}.
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
    """One value of a metric. Slice "" is the whole test split; value None means that the data do not define it."""

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
    """One condition of one gate. `passed` is None where it was not applied: there was no blessed model to compare with."""

    key: str
    condition: str
    value: float | None
    passed: bool | None


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """Everything known about one of the two models.

    Attributes:
      figures, last_blessed: metrics of the new and of the last blessed model, overall and by slice.
      baselines: baseline -> metric key -> value.
      training_log: one record per epoch.
    """

    blessed: bool
    pushed_version: str | None
    figures: tuple[Figure, ...]
    last_blessed: tuple[Figure, ...]
    gates: tuple[GateResult, ...]
    baselines: Mapping[str, Mapping[str, float | None]]
    training_log: tuple[Mapping[str, float | None], ...]


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
class RunFacts:
    """All facts of a run, as plain data.

    Attributes:
      created_unix_s: when the facts were collected.
      versions: package -> version.
      config: the resolved run configuration; {} when it cannot be read.
      models: by model name.
      index: facts of the candidate index; {} when absent.
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
    index: Mapping[str, Any]
    examples: tuple[ExampleAnswer, ...]
    titles: Mapping[str, str]
    missing: Mapping[str, str]


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
    config = reader.read("config", lambda: _object(json.loads(sources.config_json)), {})
    summary = reader.read("summary", lambda: read_summary(Path(sources.tables_dir)), None)
    baselines = reader.read("baselines", lambda: _read_baselines(Path(sources.baselines_path)), {})
    runs = {RETRIEVAL: sources.retrieval_run_uri, RANKING: sources.ranking_run_uri}
    evaluations = {RETRIEVAL: sources.retrieval_evaluation_uri, RANKING: sources.ranking_evaluation_uri}
    blessed = {RETRIEVAL: sources.retrieval_blessed, RANKING: sources.ranking_blessed}
    models = {}
    for name in MODELS:
        folder = Path(evaluations[name])
        evaluation = reader.read(
            f"{name}_evaluation",
            lambda name=name, folder=folder: (read_evaluation or _read_evaluation)(name, folder),  # type: ignore[misc]
            Evaluation(),
        )
        log_file = Path(runs[name]) / _TRAINING_LOG
        models[name] = ModelFacts(
            blessed=blessed[name],
            pushed_version=sources.pushed.get(name),
            figures=evaluation.candidate,
            last_blessed=evaluation.last_blessed,
            gates=_gate_results(name, config, evaluation),
            baselines=baselines.get(name, {}),
            training_log=reader.read(f"{name}_training", lambda path=log_file: _read_training_log(path), ()),  # type: ignore[misc]
        )
    examples = reader.read("examples", lambda: _read_examples(Path(sources.recommendations_path)), ())
    return RunFacts(
        created_unix_s=int(time.time()),
        funnel_version=sources.funnel_version,
        versions=_versions(),
        config=config,
        infra_blessed=sources.infra_blessed,
        infra_reason=sources.infra_reason.strip(),
        models=models,
        summary=summary,
        statistics=reader.read("statistics", lambda: read_statistics(Path(sources.statistics_uri)), ()),
        anomalies=reader.read("anomalies", lambda: read_anomalies(Path(sources.anomalies_uri)), ()),
        index=reader.read("index", lambda: _object(_json(Path(sources.retrieval_model_uri) / _INDEX_FACTS)), {}),
        examples=examples,
        titles=reader.read("titles", lambda: _read_titles(Path(sources.tables_dir) / ITEMS, examples), {}),
        missing=reader.missing,
    )


class _Reader:
    """Reads pieces; what is absent or broken is written down with the reason, for the report to say so."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}

    def read(self, piece: str, read: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return read()
        except (OSError, ValueError, FunnelError, DecodeError, pl.exceptions.PolarsError) as error:
            self.missing[piece] = str(error) or type(error).__name__
            return otherwise


def _json(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"a JSON object was expected, got {type(value).__name__}")
    return value


def _parse(type_: Any, path: Path) -> Any:
    value = _json(path)
    try:
        return pydantic.TypeAdapter(type_).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


class _Baselines(pydantic.BaseModel):
    retrieval: dict[str, dict[str, float | None]] = {}
    ranking: dict[str, dict[str, dict[str, float | None]]] = {}


def _read_baselines(path: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """Model -> baseline -> metric key -> value; the tasks of the ranking baselines come together."""
    values: _Baselines = _parse(_Baselines, path)
    ranking: dict[str, dict[str, float | None]] = {}
    for baselines in values.ranking.values():
        for name, metrics in baselines.items():
            ranking.setdefault(name, {}).update(metrics)
    return {
        model: {name: {k: _defined(v) for k, v in metrics.items()} for name, metrics in baselines.items()}
        for model, baselines in ((RETRIEVAL, values.retrieval), (RANKING, ranking))
    }


def _read_training_log(path: Path) -> tuple[Mapping[str, float | None], ...]:
    records = _parse(list[dict[str, float | None]], path)
    if not records:
        raise DataError(f"{path} holds no epoch")
    return tuple({key: _defined(value) for key, value in record.items()} for record in records)


def _read_examples(path: Path) -> tuple[ExampleAnswer, ...]:
    answers: tuple[ExampleAnswer, ...] = _parse(tuple[ExampleAnswer, ...], path)
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

    candidate = figures(read_metrics(str(folder)))
    if not candidate:
        raise DataError(f"no metrics in {folder}")
    return Evaluation(
        candidate,
        figures(read_metrics(str(folder), tfma.BASELINE_KEY)),
        tuple(
            GateFailure(
                metric_key(model, failure.metric, task=failure.output or None),
                _defined(failure.value),
                failure.is_change,
                failure.limit,
            )
            for failure in read_gate_failures(str(folder))
        ),
    )


def _gate_results(model: str, config: Mapping[str, Any], evaluation: Evaluation) -> tuple[GateResult, ...]:
    """Every condition of the configured gates with its outcome, then failures that no configured gate explains."""
    value_of = {figure.key: figure.value for figure in evaluation.candidate if not figure.slice}
    blessed_value_of = {figure.key: figure.value for figure in evaluation.last_blessed if not figure.slice}
    failures = {(failure.key, failure.is_change): failure for failure in evaluation.failures}
    results = []
    for gate in config.get("gates", ()):
        key = gate["metric"]
        if not key.startswith(f"{model}/") or not evaluation.candidate:
            continue
        bounds = [f"{words} {gate[bound]:g}" for bound, words in _BOUNDS.items() if gate.get(bound) is not None]
        if bounds:
            failed = failures.pop((key, False), None) is not None
            results.append(GateResult(key, " and ".join(bounds), value_of.get(key), not failed))
        if gate.get("max_drop") is not None:
            value, previous = value_of.get(key), blessed_value_of.get(key)
            change = None if value is None or previous is None else value - previous
            lower_is_better = key.rpartition("/")[2] in LOWER_IS_BETTER
            limit = f"at most +{gate['max_drop']:g}" if lower_is_better else f"at least -{gate['max_drop']:g}"
            failed = failures.pop((key, True), None) is not None
            passed = not failed if evaluation.last_blessed else None
            results.append(GateResult(key, f"change against the last blessed model {limit}", change, passed))
    results += [GateResult(f.key, f.limit, f.value, False) for f in failures.values()]
    return tuple(results)


_BOUNDS = {"min": "at least", "max": "at most"}


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
