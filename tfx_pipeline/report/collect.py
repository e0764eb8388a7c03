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

import numpy as np
import polars as pl
import pydantic
from google.protobuf.message import DecodeError

from schema.errors import DataError, FunnelError
from schema.tables import ITEMS, read_summary
from tfx_pipeline.config import MODELS, RANKING, RETRIEVAL
from tfx_pipeline.drift_facts import DriftFacts
from tfx_pipeline.gates import Validation, read_validation
from tfx_pipeline.leakage.findings import read_report
from tfx_pipeline.report.data_facts import read_anomalies, read_statistics
from tfx_pipeline.report.facts import (
    COLD_USERS,
    Against,
    ExampleAnswer,
    Figure,
    LikePredictions,
    LoadFacts,
    LoadTest,
    ModelFacts,
    RunFacts,
    SliceFacts,
    TaskScores,
    first_line,
)
from trainer.comparison import CANDIDATE, LAST_BLESSED, PREDICTIONS_FILE, Comparison, read_comparison
from trainer.index_facts import IndexFacts
from trainer.metrics import reliability_table
from trainer.off_policy import PolicyFacts, read_policies
from trainer.waterfall import read_waterfall

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


_NUM_BARS = 30
# The rarest share of large values, which would squeeze all others into the first bars.
_BEYOND = 0.005

_T = TypeVar("_T")
_PathLike = str | Path


@dataclasses.dataclass(frozen=True)
class ModelSources:
    """Where the facts of one model lie.

    Attributes:
      comparison_uri: of ModelComparison.
      blessing_uri: of ModelValidator, with gates.json.
      run_uri: folder with training_log.json.
      model_uri: the Trainer's model artifact.
      blessed: the verdict.
      pushed_version: None when it was not pushed.
    """

    comparison_uri: _PathLike
    blessing_uri: _PathLike
    run_uri: _PathLike
    model_uri: _PathLike
    blessed: bool
    pushed_version: str | None


@dataclasses.dataclass(frozen=True)
class ReportSources:
    """Where the facts of a run lie; a file that is absent or broken costs its section of the report only.

    Attributes:
      tables_dir: contract tables with summary.json.
      statistics_uri, anomalies_uri: artifacts with one folder per split.
      drift_path: JSON of DriftValidator.
      leakage_path: JSON of LeakageLinter; absent where it is switched off.
      waterfall_uri: of FunnelWaterfall.
      off_policy_uri: of OffPolicy.
      infra_blessed, infra_reason: the verdict of infra validation, and why when it is negative.
      recommendations_path: JSON list of example answers, see `ExampleAnswer`; item ids instead of titles.
      load_path: JSON of the load during infra validation; there is none without an objective (`slo`).
      models: by model name.
      config_json: the resolved RunConfig.
      funnel_version, code_version: of the code that ran; the second holds a hash of the sources, too.
    """

    tables_dir: _PathLike
    statistics_uri: _PathLike
    anomalies_uri: _PathLike
    drift_path: _PathLike
    leakage_path: _PathLike
    waterfall_uri: _PathLike
    off_policy_uri: _PathLike
    infra_blessed: bool
    infra_reason: str
    recommendations_path: _PathLike
    load_path: _PathLike
    models: Mapping[str, ModelSources]
    config_json: str
    funnel_version: str
    code_version: str


def collect(sources: ReportSources) -> RunFacts:
    """Reads all sources; what could not be read is told in `missing`."""
    reader = _Reader()
    tables_dir = Path(sources.tables_dir)
    parse_config = partial(_parse, dict[str, Any], sources.config_json, "the configuration")
    config = reader.read("config", parse_config, {})
    examples = reader.read("examples", partial(_read_examples, Path(sources.recommendations_path)), ())
    ranking = sources.models[RANKING]
    tasks = [task["name"] for task in config.get("dataset", {}).get("tasks", ())]
    read_scores = partial(_read_scores, Path(ranking.comparison_uri) / PREDICTIONS_FILE, tasks)
    index_file = Path(sources.models[RETRIEVAL].model_uri) / _INDEX_FACTS
    return RunFacts(
        created_unix_s=int(time.time()),
        funnel_version=sources.funnel_version,
        versions=_versions(),
        config=config,
        infra_blessed=sources.infra_blessed,
        infra_reason=sources.infra_reason.strip(),
        models={name: _read_model(name, sources.models[name], reader) for name in MODELS},
        summary=reader.read("summary", partial(read_summary, tables_dir), None),
        statistics=reader.read("statistics", partial(read_statistics, Path(sources.statistics_uri)), ()),
        anomalies=reader.read("anomalies", partial(read_anomalies, Path(sources.anomalies_uri)), ()),
        index=reader.read("index", partial(_parse_file, IndexFacts, index_file), None),
        examples=examples,
        titles=reader.read("titles", partial(_read_titles, tables_dir / ITEMS, examples), {}),
        missing=reader.missing,
        code_version=sources.code_version,
        data_fingerprint=tables_dir.name,
        scores=reader.read("scores", read_scores, ()),
        drift=reader.read("drift", partial(_parse_file, DriftFacts, Path(sources.drift_path)), None),
        leakage=reader.read("leakage", partial(read_report, Path(sources.leakage_path)), None),
        waterfall=reader.read("waterfall", partial(read_waterfall, Path(sources.waterfall_uri)), None),
        off_policy=reader.read("off_policy", partial(_read_policies, Path(sources.off_policy_uri)), None),
        load=reader.read("load", partial(_read_load, Path(sources.load_path), config), None),
    )


def _read_policies(folder: Path) -> PolicyFacts:
    found = read_policies(folder)
    if found.absent:
        raise DataError(found.absent)
    return found


class _LoadFile(pydantic.BaseModel):
    result: LoadFacts


def _read_load(path: Path, config: Mapping[str, Any]) -> LoadFacts:
    if config and config.get("slo") is None and not path.exists():
        raise DataError("the configuration sets no objective (slo), so that no load was put on the models")
    file: _LoadFile = _parse_file(_LoadFile, path)
    return file.result


def read_load_test(path: Path) -> LoadTest:
    """Reads loadtest.json of `funnel loadtest`.

    Raises:
      DataError: it has another form.
    """
    found: LoadTest = _parse_file(LoadTest, path)
    return found


def _read_model(name: str, sources: ModelSources, reader: _Reader) -> ModelFacts:
    found: Comparison | None = reader.read(
        f"{name}_comparison", partial(read_comparison, Path(sources.comparison_uri)), None
    )
    validation: Validation | None = reader.read(
        f"{name}_gates", partial(read_validation, Path(sources.blessing_uri)), None
    )
    log_file = Path(sources.run_uri) / _TRAINING_LOG
    return ModelFacts(
        blessed=sources.blessed,
        pushed_version=sources.pushed_version,
        headline=found.headline if found else "",
        confidence=found.confidence if found else None,
        figures=_figures(found) if found else (),
        against=_against(found) if found else (),
        rivals={rival.name: rival.note for rival in found.rivals} if found else {},
        absent=dict(found.absent) if found else {},
        slices=tuple(
            SliceFacts(result.name, result.num_users, result.num_rows, result.note)
            for result in (found.slices if found else ())
        ),
        gates=validation.gates if validation else (),
        training_log=reader.read(f"{name}_training", partial(_read_training_log, log_file), ()),
    )


def _figures(found: Comparison) -> tuple[Figure, ...]:
    return tuple(
        Figure(result.name, metric.key, metric.count, metric.value, metric.low, metric.high, metric.note)
        for result in found.slices
        for metric in result.metrics
    )


def _against(found: Comparison) -> tuple[Against, ...]:
    """Of slices, only what the report shows; comparison.json has the rest."""
    return tuple(
        Against(result.name, metric.key, rival, a.value, a.difference, a.low, a.high, a.p_value)
        for result in found.slices
        for metric in result.metrics
        for rival, a in metric.against.items()
        if rival == LAST_BLESSED or metric.key == found.headline or result.name in {"", COLD_USERS}
    )


class _Reader:
    """Reads pieces; what is absent or broken is written down with the reason, for the report to say so."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}

    def read(self, piece: str, read: Callable[[], _T], otherwise: Any) -> _T:
        try:
            return read()
        except FileNotFoundError as error:
            # Polars tells the file in its text only.
            self.missing[piece] = f"there is no {error.filename}" if error.filename else str(error)
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


def _read_scores(path: Path, tasks: Iterable[str]) -> tuple[TaskScores, ...]:
    """Reliability and distribution of the predictions for each task, from what ModelComparison predicted."""
    table = pl.read_parquet(path)
    return tuple(_scores(task, table[f"{CANDIDATE}/{task}"], table[f"label_{task}"]) for task in tasks)


def _scores(task: str, predictions: pl.Series, labels: pl.Series) -> TaskScores:
    p, y = (column.cast(pl.Float64).fill_null(math.nan).to_numpy() for column in (predictions, labels))
    defined = np.isfinite(p) & np.isfinite(y)
    undefined = int((~defined).sum())
    p, y = p[defined], y[defined]
    if not len(p):
        return TaskScores(task, (), (), {}, undefined)
    is_binary = bool(np.isin(y, (0, 1)).all())
    shown = p if is_binary else np.concatenate([p, y])
    low, high = float(shown.min()), float(np.quantile(shown, 1 - _BEYOND))
    edges = np.linspace(low, high if high > low else low + 1, _NUM_BARS + 1)
    series = {"it happened": p[y == 1], "it did not": p[y == 0]} if is_binary else {"predicted": p, "real": y}
    return TaskScores(
        task,
        tuple(
            LikePredictions(
                group.count,
                group.mean_prediction,
                group.mean_label,
                _defined(group.label_low),
                _defined(group.label_high),
            )
            for group in reliability_table(y, p)
        ),
        tuple(map(float, edges)),
        {
            label: tuple(map(int, np.histogram(np.minimum(values, edges[-1]), edges)[0]))
            for label, values in series.items()
        },
        undefined,
    )


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
