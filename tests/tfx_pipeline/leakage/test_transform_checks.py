"""A Transform graph that learnt from train passes; one that saw anything else is found."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pytest
import tensorflow as tf

from tests.tfx_pipeline.leakage.leaky_world import SPEC, World
from tfx_pipeline.leakage.lint import train_rows
from tfx_pipeline.leakage.transform_checks import (
    TrainRows,
    check_quantiles,
    check_vocabularies,
    rank_error,
    words,
)
from trainer import features as ft

DAY_S = 86_400
TITLE_WORDS = {"déjà", "vu", "part"}


class Graph:
    """Stands for the Transform graph: vocabularies and quantiles of the rows that it is given."""

    def __init__(self, rows: pl.DataFrame, train_end_unix_s: int) -> None:
        """Learns."""
        self.rows, self.train_end = rows, train_end_unix_s
        self.vocabularies: dict[str, set[str]] = {
            name: set(rows[name].drop_nulls())
            for name in ("user_id", "item_id", "surface", "country", "creator_id")
        }
        self.vocabularies["tags"] = {tag for tags in rows["tags"].drop_nulls() for tag in tags}
        numbers = {f"{n}" for n in range(100)}
        self.vocabularies["title_words"] = TITLE_WORDS | {
            word for title in rows["title_words"] for word in title.split() if word in numbers
        }
        self.vocabularies["search_tokens"] = {"jazz", "piano"}
        learnt = {
            name: self.values(name, rows) for name in ("activity", "length", ft.EXAMPLE_AGE, ft.ITEM_AGE)
        }
        self.boundaries = {name: self.quantiles(values) for name, values in learnt.items()}
        self.counters = [self.quantiles(column) for column in self.rates(np.stack(rows[ft.ITEM_COUNTS])).T]

    @staticmethod
    def quantiles(values: np.ndarray) -> np.ndarray:
        known = values[np.isfinite(values)].astype(np.float32)
        return np.quantile(known, np.arange(1, 32) / 32, method="inverted_cdf")

    def values(self, name: str, rows: pl.DataFrame) -> np.ndarray:
        times = rows[ft.EVENT_TIME].to_numpy()
        if name == ft.EXAMPLE_AGE:
            seconds = np.maximum(self.train_end - times, 0)
        elif name == ft.ITEM_AGE:
            seconds = times - rows[ft.UPLOAD_TIME].to_numpy()
        else:
            return rows[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        return (seconds.astype(np.float32) / np.float32(DAY_S)).astype(np.float64)

    @staticmethod
    def rates(counts: np.ndarray) -> np.ndarray:
        """As the ranker's input is defined: impressions and smoothed means of ten groups of three."""
        rows = []
        for count in counts.reshape(len(counts), 10, 3).astype(np.float32):
            means = count[0, 1:] / max(count[0, 0], np.float32(1))
            rows.append(
                [
                    v
                    for n, *sums in count[1:]
                    for v in (n, *((np.float32(20) * means + sums) / (n + np.float32(20))))
                ]
            )
        return np.array(rows)

    def vocabulary_by_name(self, name: str) -> list[bytes]:
        return [value.encode() for value in sorted(self.vocabularies[name])]

    def transform_features_layer(self) -> Any:
        def layer(raw: Mapping[str, tf.SparseTensor]) -> dict[str, tf.Tensor]:
            if ft.ITEM_COUNTS in raw:
                return {ft.COUNTERS: tf.constant(self.cdf(tf.sparse.to_dense(raw[ft.ITEM_COUNTS]).numpy()))}
            dense = {n: tf.sparse.to_dense(s, default_value=0)[:, 0].numpy() for n, s in raw.items()}
            if ft.UPLOAD_TIME in raw:
                table, name = pl.DataFrame(dense), ft.ITEM_AGE
            elif ft.EVENT_TIME in raw:
                table, name = pl.DataFrame(dense), ft.EXAMPLE_AGE
            else:
                ((name, values),) = dense.items()
                table = pl.DataFrame({name: values, ft.EVENT_TIME: np.zeros(len(values), np.int64)})
            values = self.values(name, table)
            below = np.searchsorted(self.boundaries[name], values.astype(np.float32), side="right")
            return {f"{name}_bucket": tf.constant(below + 1)}

        return layer

    def cdf(self, counts: np.ndarray) -> np.ndarray:
        """Shares by linear interpolation between boundaries, one value at a time."""
        out = np.zeros((len(counts), len(self.counters)), np.float32)
        for column, (bounds, values) in enumerate(zip(self.counters, self.rates(counts).T, strict=True)):
            for row, value in enumerate(values):
                above = int((bounds <= value).sum())
                if above in (0, len(bounds)):
                    out[row, column] = float(above > 0)
                else:
                    low, high = bounds[above - 1], bounds[above]
                    out[row, column] = (above - 1 + (value - low) / (high - low)) / (len(bounds) - 1)
        return out


@pytest.fixture(scope="module")
def rows(world: World) -> TrainRows:
    return train_rows(world.interactions, world.users, world.items, world.train_end_unix_s)


def everything(rows: TrainRows) -> pl.DataFrame:
    return pl.concat([rows.train, rows.held_out])


def test_a_graph_of_train_passes(rows: TrainRows) -> None:
    graph: Any = Graph(rows.train, rows.train_end_unix_s)
    for check in (check_vocabularies(graph, rows, SPEC), check_quantiles(graph, rows, SPEC)):
        assert check.passed, check
    # Four declared or clock features, and ten groups of three counts less the log's own.
    assert "boundaries of 31 numbers" in check_quantiles(graph, rows, SPEC).detail


def test_a_value_that_only_eval_has_is_found_in_a_vocabulary(rows: TrainRows) -> None:
    late = rows.held_out.with_columns(pl.lit("u-late").alias("user_id")).head(1)
    changed = TrainRows(rows.train, pl.concat([rows.held_out, late]), rows.train_end_unix_s)
    graph: Any = Graph(everything(changed), rows.train_end_unix_s)
    (finding,) = check_vocabularies(graph, changed, SPEC).findings
    assert "vocabulary user_id has 1 values that train has not, 1 of them only in eval or test" in finding
    assert "'u-late'" in finding


def test_a_vocabulary_of_another_dataset_is_found(rows: TrainRows) -> None:
    graph: Any = Graph(rows.train, rows.train_end_unix_s)
    graph.vocabularies["country"] = {"de", "jp"}
    findings = check_vocabularies(graph, rows, SPEC).findings
    assert any("1 values that train has not, in no split, such as 'jp'" in line for line in findings)
    assert any("vocabulary country lacks" in line for line in findings)


def test_a_vocabulary_without_values_and_values_of_several_lines_are_no_leak(rows: TrainRows) -> None:
    graph: Any = Graph(rows.train, rows.train_end_unix_s)
    nobody = pl.lit(None, pl.String).alias("country")
    empty = TrainRows(
        rows.train.with_columns(nobody), rows.held_out.with_columns(nobody), rows.train_end_unix_s
    )
    graph.vocabularies["country"] = {"49d0cd50-04bb-48c0-bc6f-5b575dce351a"}
    assert check_vocabularies(graph, empty, SPEC).passed
    graph.vocabularies["country"] = {"de"}
    two_lines = pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit("de")).otherwise(pl.lit("f\nr"))
    train = rows.train.with_columns(two_lines.alias("country"))
    assert check_vocabularies(graph, TrainRows(train, rows.held_out, rows.train_end_unix_s), SPEC).passed


def test_quantiles_of_all_splits_are_found(rows: TrainRows) -> None:
    graph: Any = Graph(everything(rows), rows.train_end_unix_s)
    findings = check_quantiles(graph, rows, SPEC).findings
    # Every row after training has the age 0.
    assert any(line.startswith(ft.EXAMPLE_AGE) for line in findings)


def test_quantiles_of_counts_up_to_the_end_of_the_log_are_found(rows: TrainRows) -> None:
    later = rows.train.with_columns(
        pl.col(ft.ITEM_COUNTS).list.eval(pl.element() * 1.3).cast(pl.List(pl.Float32))
    )
    graph: Any = Graph(later, rows.train_end_unix_s)
    findings = check_quantiles(graph, rows, SPEC).findings
    assert any(line.startswith("item_id_1d_impressions") for line in findings)


def test_a_boundary_moved_by_one_percent_of_the_rows_is_found() -> None:
    values = np.arange(1_000.0)
    exact = np.searchsorted(np.quantile(values, np.arange(1, 32) / 32), values, side="right")
    moved = np.searchsorted(np.quantile(values, np.arange(1, 32) / 32) + 10, values, side="right")
    assert rank_error(values, values, exact, 1, 31) <= 0.001
    assert rank_error(values, values, moved, 1, 31) == pytest.approx(0.01, abs=0.001)


def test_ties_leave_room_for_a_boundary() -> None:
    values = np.array([0.0] * 90 + [1.0] * 10)
    # Quartiles are all 0: three boundaries at or below 0.
    assert rank_error(values, values, np.full(100, 3), 1, 3) == 0.0
    # Three boundaries at 1 leave 90 % below, where 25 % were due.
    assert rank_error(values, values, np.where(values == 1, 3, 0), 1, 3) == pytest.approx(0.65)


def test_words_are_letters_and_digits_in_lower_case() -> None:
    assert words("Déjà-vu, PART_2!") == ["déjà", "vu", "part", "2"]
