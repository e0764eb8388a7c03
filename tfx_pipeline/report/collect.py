"""Collects the facts of a run from what its components wrote."""

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
from schema.tables import ITEMS, read_summary
from tfx_pipeline.config import MODELS, RANKING, RETRIEVAL
from tfx_pipeline.report.data_facts import read_anomalies, read_statistics
from tfx_pipeline.report.facts import (
    Evaluation,
    ExampleAnswer,
    GateResult,
    IndexFacts,
    ModelFacts,
    RunFacts,
    first_line,
    overall,
)
from trainer.metrics import LOWER_IS_BETTER

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

_COLD_USER_BASELINES = "retrieval_cold_users"

_BOUNDS = {"min": "at least", "max": "at most"}

_T = TypeVar("_T")
_PathLike = str | Path


@dataclasses.dataclass(frozen=True)
class ReportSources:
    """Where the facts of a run lie; a file that is absent or broken costs its section of the report only.

    Attributes:
      tables_dir: contract tables with summary.json.
      statistics_uri, anomalies_uri: artifacts with one folder per split.
      retrieval_blessed, ranking_blessed: the verdicts of the gates.
      infra_blessed, infra_reason: the verdict of infra validation, and why when it is negative.
      pushed: model -> pushed version, None when it was not pushed.
      baselines_path: JSON, see `tfx_pipeline.report.judgement.write_baselines`.
      retrieval_run_uri, ranking_run_uri: folders with training_log.json.
      retrieval_model_uri: the Trainer's model artifact, which holds the facts of the index.
      recommendations_path: JSON list of example answers, see `ExampleAnswer`; item ids instead of titles.
      config_json: the resolved RunConfig.
      funnel_version, code_version: of the code that ran; the second holds a hash of the sources, too.
    """

    tables_dir: _PathLike
    statistics_uri: _PathLike
    anomalies_uri: _PathLike
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
    code_version: str


def collect(sources: ReportSources, read_evaluation: Callable[[str], Evaluation]) -> RunFacts:
    """Reads all sources.

    Args:
      sources: where they are.
      read_evaluation: reads the evaluation of a model, by its name.

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
    blessed = {RETRIEVAL: sources.retrieval_blessed, RANKING: sources.ranking_blessed}
    models = {}
    for name in MODELS:
        evaluation = reader.read(f"{name}_evaluation", partial(read_evaluation, name), Evaluation())
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
        code_version=sources.code_version,
        data_fingerprint=tables_dir.name,
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
        raise DataError(f"{what} has another form than expected, {first_line(error)}") from error


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


def _gate_results(model: str, config: Mapping[str, Any], evaluation: Evaluation) -> tuple[GateResult, ...]:
    """The outcome of every condition of the configured gates, then failures that none of them explains."""
    values, previous = overall(evaluation.candidate), overall(evaluation.last_blessed)
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
    results += [GateResult(f.key, f.limit, f.value, f.is_change, False) for f in failures.values()]
    return tuple(results)


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
