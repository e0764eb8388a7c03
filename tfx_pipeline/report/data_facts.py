"""Feature statistics and anomalies, read from the protos that StatisticsGen and ExampleValidator wrote."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from tensorflow_metadata.proto.v0 import anomalies_pb2, statistics_pb2

from schema.errors import DataError

_SPLIT_PREFIX = "Split-"
_SPLIT_ORDER = ("train", "eval", "test")
_TOP_VALUES = 3
_BARS = 10


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """What one feature looks like in one split; None where it makes no sense for the type.

    Attributes:
      type: `integer`, `float`, `text` or `struct`.
      missing_share: rows without any value over all rows, 0 to 1.
      values_per_row: values over rows that have the feature.
      max_values_per_row: 1 for a single-valued feature.
      distinct: distinct values of a text feature.
      top: most frequent values of a text feature and their counts.
      bars: counts of a histogram of equal widths (numbers) or of the most frequent values (text).
    """

    name: str
    type: str
    missing_share: float
    values_per_row: float
    max_values_per_row: int
    distinct: int | None = None
    top: tuple[tuple[str, int], ...] = ()
    mean: float | None = None
    std_dev: float | None = None
    min: float | None = None
    median: float | None = None
    max: float | None = None
    zeros_share: float | None = None
    bars: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class SplitStatistics:
    """All features of one split, in order of their names."""

    split: str
    num_examples: int
    features: tuple[FeatureStatistics, ...]


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """One deviation from the schema, in the words of TFDV; feature "" stands for the whole split."""

    feature: str
    severity: str
    summary: str
    description: str


@dataclasses.dataclass(frozen=True)
class SplitAnomalies:
    """What is wrong with one split; empty when nothing is."""

    split: str
    anomalies: tuple[Anomaly, ...]


def read_statistics(folder: Path) -> tuple[SplitStatistics, ...]:
    """Reads Split-*/FeatureStats.pb. Raises DataError when there is none, DecodeError when one is broken."""
    return tuple(
        _split_statistics(split, statistics_pb2.DatasetFeatureStatisticsList.FromString(data))
        for split, data in _split_files(folder, "FeatureStats.pb")
    )


def read_anomalies(folder: Path) -> tuple[SplitAnomalies, ...]:
    """Reads Split-*/SchemaDiff.pb. Raises DataError when there is none, DecodeError when one is broken."""
    return tuple(
        SplitAnomalies(split, _anomalies(anomalies_pb2.Anomalies.FromString(data)))
        for split, data in _split_files(folder, "SchemaDiff.pb")
    )


def _split_files(folder: Path, name: str) -> list[tuple[str, bytes]]:
    """(split, content) in the order train, eval, test, then by name."""
    paths = {
        path.parent.name.removeprefix(_SPLIT_PREFIX): path for path in folder.glob(f"{_SPLIT_PREFIX}*/{name}")
    }
    if not paths:
        raise DataError(f"no {_SPLIT_PREFIX}*/{name} in {folder}")
    known = [split for split in _SPLIT_ORDER if split in paths]
    return [(split, paths[split].read_bytes()) for split in [*known, *sorted(paths.keys() - set(known))]]


def _split_statistics(split: str, proto: statistics_pb2.DatasetFeatureStatisticsList) -> SplitStatistics:
    if not proto.datasets:
        raise DataError(f"the statistics of split {split!r} hold no dataset")
    dataset = proto.datasets[0]  # The others, if any, are slices of it.
    features = [_feature_statistics(feature, dataset.num_examples) for feature in dataset.features]
    return SplitStatistics(split, dataset.num_examples, tuple(sorted(features, key=lambda f: f.name)))


def _feature_statistics(
    feature: statistics_pb2.FeatureNameStatistics, num_examples: int
) -> FeatureStatistics:
    kind = feature.WhichOneof("stats")
    statistics = getattr(feature, kind) if kind else statistics_pb2.NumericStatistics()
    common = statistics.common_stats
    with_values = common.num_non_missing
    if common.max_num_values <= 1:
        # A missing value is an empty list, which TFDV counts as present; all other lists have one value.
        with_values = min(with_values, common.tot_num_values)
    result = FeatureStatistics(
        name=feature.name or ".".join(feature.path.step),
        type=_type_name(feature.type),
        missing_share=1 - with_values / num_examples if num_examples else 0.0,
        values_per_row=common.tot_num_values / common.num_non_missing if common.num_non_missing else 0.0,
        max_values_per_row=common.max_num_values,
    )
    if kind == "num_stats":
        return _with_numbers(result, statistics, common.tot_num_values)
    return _with_texts(result, statistics) if kind == "string_stats" else result


def _with_numbers(
    base: FeatureStatistics, numbers: statistics_pb2.NumericStatistics, num_values: int
) -> FeatureStatistics:
    if not num_values:
        return base
    histograms = [h for h in numbers.histograms if h.type == statistics_pb2.Histogram.STANDARD]
    return dataclasses.replace(
        base,
        mean=_finite(numbers.mean),
        std_dev=_finite(numbers.std_dev),
        min=_finite(numbers.min),
        median=_finite(numbers.median),
        max=_finite(numbers.max),
        zeros_share=numbers.num_zeros / num_values,
        bars=tuple(bucket.sample_count for bucket in histograms[0].buckets) if histograms else (),
    )


def _with_texts(base: FeatureStatistics, texts: statistics_pb2.StringStatistics) -> FeatureStatistics:
    return dataclasses.replace(
        base,
        distinct=texts.unique,
        top=tuple((top.value, int(top.frequency)) for top in texts.top_values[:_TOP_VALUES]),
        bars=tuple(bucket.sample_count for bucket in texts.rank_histogram.buckets[:_BARS]),
    )


def _type_name(value: int) -> str:
    types = statistics_pb2.FeatureNameStatistics
    names = {types.INT: "integer", types.FLOAT: "float", types.STRING: "text", types.BYTES: "bytes"}
    return names.get(value, "struct")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _anomalies(proto: anomalies_pb2.Anomalies) -> tuple[Anomaly, ...]:
    found = [_anomaly(feature, info) for feature, info in sorted(proto.anomaly_info.items())]
    if proto.data_missing:
        found.insert(0, Anomaly("", "error", "No data", "The split holds no examples."))
    if proto.HasField("dataset_anomaly_info"):
        found.insert(0, _anomaly("", proto.dataset_anomaly_info))
    return tuple(found)


def _anomaly(feature: str, info: anomalies_pb2.AnomalyInfo) -> Anomaly:
    severity = anomalies_pb2.AnomalyInfo.Severity.Name(info.severity).lower()
    return Anomaly(feature, severity, info.short_description, info.description)
