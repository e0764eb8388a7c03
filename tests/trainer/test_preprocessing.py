"""The Transform graph run for real over a small table, and the same rows through the serving side of it."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam
from tensorflow_transform.tf_metadata import dataset_metadata, metadata_io

from schema.contract import DatasetSpec
from trainer import features, raw_inputs
from trainer.config import RetrievalConfig
from trainer.input_pipeline import load_catalogue, windows
from trainer.preprocessing import preprocessing_fn, vocabulary_sizes
from trainer.retrieval import unread_features
from trainer.tfx_schema import interactions_schema

ROWS = 400
TRAIN_END = 1_704_067_200 + 30 * 86_400
UTC_OFFSET_HOURS = -3.5
Row = dict[str, Any]

SPEC = DatasetSpec.model_validate(
    {
        "name": "transformed",
        "utc_offset_hours": UTC_OFFSET_HOURS,
        "interactions": {
            "files": ["log.csv"],
            "columns": {
                name: name
                for name in (
                    "user_id",
                    "item_id",
                    "event_time_unix_s",
                    "surface",
                    "watch_time_s",
                    "search_tokens",
                )
            },
            "labels": {"click": "click"},
        },
        "users": {
            "files": ["users.csv"],
            "columns": {"user_id": "user_id"},
            "features": [
                {"name": "age", "kind": "continuous"},
                {"name": "constant", "kind": "continuous"},
                {"name": "two_values", "kind": "continuous"},
                {"name": "never", "kind": "continuous"},
                {"name": "no_word", "kind": "categorical"},
                {"name": "clubs", "kind": "multi_categorical", "separator": "|"},
            ],
        },
        "items": {
            "files": ["items.csv"],
            "columns": {"item_id": "item_id", "creator_id": "creator", "upload_time_unix_s": "upload"},
            "features": [{"name": "words", "kind": "text"}, {"name": "length", "kind": "continuous"}],
        },
        "positive": "click",
        "tasks": [
            {"name": "click", "label": "click", "kind": "binary"},
            {"name": "watch", "label": "watch_time_s", "kind": "watch_time"},
        ],
        "split": {"fractions": [0.8, 0.1, 0.1]},
        "session_gap_hours": 24,
        "counters": {"keys": ["item_id", "creator_id"], "windows_days": [1], "smoothing": 4},
    }
)
RANKING_ONLY = (*features.impression_names(SPEC), *features.COUNTER_NAMES)
CUSTOM_CONFIG = {"dataset": SPEC.model_dump_json(), "train_end_unix_s": TRAIN_END}
IMPRESSIONS = features.raw_impression_inputs(SPEC)
RAW = (*features.raw_query_inputs(SPEC), *IMPRESSIONS, *features.raw_candidate_inputs(SPEC))
LABELS = ("click", "watch_time_s", "retrieval_weight")
DTYPES = {
    **{r.name: r.dtype for r in RAW},
    **dict.fromkeys(LABELS, "float32"),
    "item_counts": "float32",
    "prior_sessions_item_ids": "string",
}
TITLES = ["The Cat, the DOG", "cat & mouse!", "Ünder ÉTÉ", "", "2001: a mouse"]


def make_counts(rng: np.random.Generator, row: int) -> list[float]:
    """The log, then item and creator within a day and in all; impressions, clicks and seconds watched each.

    Every fourth item is new: it has no impressions.
    """
    counts = [500.0 + row, 200.0 + row // 2, 3_000.0 + 7 * row]
    for number in rng.geometric(0.05, 4) - 1:
        shown = int(number) if row % 4 else 0
        clicks = int(rng.binomial(shown, 0.4))
        counts += [float(shown), float(clicks), float(np.float32(clicks * rng.exponential(5)))]
    return counts


def make_rows() -> list[Row]:
    """Raw rows: every feature a list of values, empty where missing."""
    rng = np.random.default_rng(0)
    rows = []
    for row in range(ROWS):
        # Item i0 is shown most, then i1, and so on; u-ids are skewed alike.
        item, user = (min(int(x), 9) for x in rng.geometric(0.3, 2) - 1)
        event = TRAIN_END - 86_400 + int(rng.integers(-29 * 86_400, 2 * 86_400))
        num = row % 5  # impressions
        rows.append(
            {
                "user_id": [f"u{user}"],
                "item_id": [f"i{item}"],
                "event_time_unix_s": [event],
                "surface": [["home"], ["watch"], []][rng.choice(3, p=[0.6, 0.3, 0.1])],
                "search_tokens": [["jazz", "piano"], [], ["jazz"]][row % 3],
                "history_item_ids": [["i0", "never shown", "i1"], [], ["i2"]][row % 3],
                "prior_sessions_item_ids": [["i1", "never shown"], [], ["i0"], []][row % 4],
                "age": [float(np.float32(rng.lognormal(3, 1)))] if row % 10 else [],
                "constant": [7.5],
                "two_values": [float(row % 2)],
                "never": [],
                "no_word": [],
                "clubs": [["a", "b"], [], ["b"]][row % 3],
                "words": [TITLES[row % 5]] if row % 5 != 3 else [],
                "length": [float(np.float32(rng.uniform(-50, 50)))],
                "creator_id": [f"c{item // 3}"] if item else [],
                "upload_time_unix_s": [TRAIN_END - 86_400 * (item + 1)] if item != 2 else [],
                "click": [float(row % 2)],
                "watch_time_s": [2.5] if row % 4 else [],
                "retrieval_weight": [float(row % 2)],
                "item_counts": make_counts(rng, row),
                "impression_item_ids": ["i0", "never shown", "i1", "i2"][:num],
                "impression_event_time_unix_s": [event - 86_400 * (4 - n) - row for n in range(num)],
                "impression_surfaces": ["", "home", "nowhere", "watch"][:num],
                "impression_click": [1.0, math.nan, 0.0, 1.0][:num],
                "impression_watch_time_s": [2.5, 0.0, math.nan, float(row)][:num],
            }
        )
    return rows


@dataclasses.dataclass
class Transformed:
    """Raw rows, what Beam made of them, and the saved Transform output."""

    rows: list[Row]
    columns: dict[str, np.ndarray]
    output: tft.TFTransformOutput


def _dense(column: Any) -> np.ndarray:
    """An Arrow column of lists as [B] when every list has one value, else [B, L] padded with 0."""
    values = column.to_pylist()
    if all(v is not None and len(v) == 1 for v in values):
        return np.array([v[0] for v in values])
    width = max((len(v) for v in values if v), default=0)
    return np.array([[*(v or []), *[0] * (width - len(v or []))] for v in values]).reshape(len(values), width)


@pytest.fixture(scope="module")
def transformed(tmp_path_factory: pytest.TempPathFactory) -> Transformed:
    folder = tmp_path_factory.mktemp("transform")
    metadata = dataset_metadata.DatasetMetadata(interactions_schema(SPEC))
    rows = make_rows()
    with tft_beam.Context(temp_dir=str(folder / "tmp"), desired_batch_size=ROWS):
        (data, _), transform_fn = (rows, metadata) | tft_beam.AnalyzeAndTransformDataset(
            lambda inputs: preprocessing_fn(inputs, CUSTOM_CONFIG), output_record_batches=True
        )
        _ = transform_fn | tft_beam.WriteTransformFn(str(folder / "out"))
    metadata_io.write_metadata(metadata, str(folder / "out" / tft.TFTransformOutput.RAW_METADATA_DIR))
    (batch,) = [batch for batch, _ in data]
    columns = {name: _dense(batch.column(batch.schema.get_field_index(name))) for name in batch.schema.names}
    return Transformed(rows, columns, tft.TFTransformOutput(str(folder / "out")))


def values(table: Transformed, name: str) -> list[Any]:
    """One value per row, None where missing."""
    return [row[name][0] if row[name] else None for row in table.rows]


def lists(table: Transformed, name: str) -> list[list[int]]:
    """Ids of each row without the padding."""
    return [[int(i) for i in row if i] for row in np.atleast_2d(table.columns[name])]


def test_the_output_is_what_the_feature_space_names(transformed: Transformed) -> None:
    space = features.feature_space(SPEC)
    names = [n for f in space.all for n in f.transformed_names]
    training_only = ["days_to_train_end", "prior_sessions_item_ids_ids"]
    assert sorted(transformed.columns) == sorted([*names, *LABELS, *training_only, *RANKING_ONLY])


@pytest.mark.parametrize("name", ["user_id", "item_id", "surface", "creator_id"])
def test_ids_are_by_frequency_from_2_and_a_missing_value_is_0(transformed: Transformed, name: str) -> None:
    raw, ids = values(transformed, name), transformed.columns[f"{name}_id"]
    id_of = dict(zip(raw, ids, strict=True))
    assert [id_of[value] for value in raw] == list(ids)
    assert id_of.pop(None, 0) == 0
    assert sorted(id_of.values()) == list(range(2, len(id_of) + 2))
    counts = Counter(value for value in raw if value is not None)
    ranked = sorted(counts, key=lambda value: id_of[value])
    assert [counts[value] for value in ranked] == sorted(counts.values(), reverse=True)
    assert vocabulary_sizes(transformed.output, SPEC)[name] == len(counts) + 2


@pytest.mark.parametrize("name", ["history_item_ids", "prior_sessions_item_ids"])
def test_histories_are_in_the_id_space_of_the_candidates(transformed: Transformed, name: str) -> None:
    id_of = dict(zip(values(transformed, "item_id"), transformed.columns["item_id_id"], strict=True))
    expected = [[id_of.get(item, 1) for item in row[name]] for row in transformed.rows]
    assert lists(transformed, f"{name}_ids") == expected
    assert 1 in expected[0]


def test_text_becomes_the_ids_of_its_lower_case_words(transformed: Transformed) -> None:
    ids = lists(transformed, "words_ids")
    id_of: dict[str, int] = {}
    for row, found in zip(transformed.rows, ids, strict=True):
        words = re.findall(r"[^\W_]+", (row["words"] or [""])[0].lower())
        assert len(words) == len(found)
        for word, number in zip(words, found, strict=True):
            assert id_of.setdefault(word, number) == number
    assert set(id_of) == {"the", "cat", "dog", "mouse", "ünder", "été", "2001", "a"}
    assert sorted(id_of.values()) == list(range(2, 10))


@pytest.mark.parametrize("name", ["age", "length"])
def test_the_cdf_is_the_share_of_training_values_below(transformed: Transformed, name: str) -> None:
    raw = values(transformed, name)
    known = np.array([value is not None for value in raw])
    x = np.array([value for value in raw if value is not None])
    cdf, bucket = (transformed.columns[f"{name}_{suffix}"] for suffix in ("cdf", "bucket"))
    assert np.all(cdf[~known] == 0) and np.all(bucket[~known] == 0)
    order = np.argsort(x)
    assert np.all(np.diff(cdf[known][order]) >= 0)
    assert np.all(np.diff(bucket[known][order]) >= 0)
    # Linear inside each of 32 buckets, so at most about one bucket away from the rank.
    rank = np.argsort(order) / (len(x) - 1)
    np.testing.assert_allclose(cdf[known], rank, atol=1.5 / 32)
    assert (cdf.min(), cdf.max()) == (0, 1)
    assert set(bucket[known]) == set(range(1, 33))
    sizes = np.bincount(bucket[known])[1:]
    assert sizes.min() >= len(x) / 32 - 4 and sizes.max() <= len(x) / 32 + 4


@pytest.mark.parametrize("name", ["constant", "two_values", "never", "age", "length"])
def test_no_continuous_feature_gives_nan_or_leaves_its_range(transformed: Transformed, name: str) -> None:
    cdf, bucket = (transformed.columns[f"{name}_{suffix}"] for suffix in ("cdf", "bucket"))
    assert np.all((cdf >= 0) & (cdf <= 1))  # false for NaN
    assert np.all((bucket >= 0) & (bucket <= features.NUM_BUCKETS))
    missing = np.array([value is None for value in values(transformed, name)])
    np.testing.assert_array_equal(bucket == 0, missing)


def test_few_values_get_the_share_of_training_values_at_or_below(transformed: Transformed) -> None:
    raw = np.array(values(transformed, "two_values"))
    bucket, cdf = transformed.columns["two_values_bucket"], transformed.columns["two_values_cdf"]
    (low,), (high,) = set(bucket[raw == 0]), set(bucket[raw == 1])
    assert low < high
    np.testing.assert_allclose(cdf, np.where(raw == 0, 0.5, 1.0), atol=1.5 / 32)
    assert len(set(transformed.columns["constant_bucket"])) == 1
    np.testing.assert_allclose(transformed.columns["constant_cdf"], 1.0, atol=1.5 / 32)


@pytest.mark.parametrize("value", [-1e30, -1.0, 0.0, 0.5, 7.5, 1e30, float("inf")])
def test_a_value_that_training_never_saw_stays_in_range(transformed: Transformed, value: float) -> None:
    names = ("never", "constant", "two_values", "age")
    request = {**_request(TRAIN_END), **{name: tf.constant([value]) for name in names}}
    query = raw_inputs.transform_query(transformed.output.transform_features_layer(), request, SPEC)
    for name in names:
        assert 0 <= query[f"{name}_cdf"].numpy()[0] <= 1
        assert 0 <= query[f"{name}_bucket"].numpy()[0] <= features.NUM_BUCKETS


def test_a_categorical_feature_without_any_value_is_always_missing(transformed: Transformed) -> None:
    assert set(transformed.columns["no_word_id"]) == {0}


def test_clock_features_are_in_the_local_time_of_the_users(transformed: Transformed) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=UTC_OFFSET_HOURS))
    moments = [datetime.datetime.fromtimestamp(t, zone) for t in values(transformed, "event_time_unix_s")]
    assert transformed.columns["hour_of_day_id"].tolist() == [m.hour + 2 for m in moments]
    assert transformed.columns["day_of_week_id"].tolist() == [m.weekday() + 2 for m in moments]
    sizes = vocabulary_sizes(transformed.output, SPEC)
    assert (sizes["hour_of_day"], sizes["day_of_week"]) == (26, 9)


def test_example_age_falls_to_its_least_at_the_end_of_training(transformed: Transformed) -> None:
    times = np.array(values(transformed, "event_time_unix_s"))
    cdf = transformed.columns["example_age_days_cdf"]
    after = times >= TRAIN_END
    assert 0 < after.sum() < ROWS
    assert set(cdf[after]) == {cdf.min()}
    order = np.argsort(times[~after])
    assert np.all(np.diff(cdf[~after][order]) <= 0)
    later = raw_inputs.transform_query(
        transformed.output.transform_features_layer(), _request(TRAIN_END + 10**8), SPEC
    )
    assert later["example_age_days_cdf"].numpy()[0] == cdf.min()


def test_days_to_the_end_of_training_are_rounded_up(transformed: Transformed) -> None:
    times = values(transformed, "event_time_unix_s")
    expected = [max(0, math.ceil((TRAIN_END - time) / 86_400)) for time in times]
    assert transformed.columns["days_to_train_end"].tolist() == expected
    assert 0 in expected and max(expected) == 30


def test_item_age_needs_an_upload_time_and_grows(transformed: Transformed) -> None:
    times = np.array(values(transformed, "event_time_unix_s"))
    uploads = values(transformed, "upload_time_unix_s")
    bucket = transformed.columns["item_age_days_bucket"]
    missing = np.array([upload is None for upload in uploads])
    assert missing.any()
    np.testing.assert_array_equal(bucket == 0, missing)
    age = np.array([max(t - u, 0) for t, u in zip(times, uploads, strict=True) if u is not None])
    assert np.all(np.diff(transformed.columns["item_age_days_cdf"][~missing][np.argsort(age)]) >= 0)


@pytest.mark.parametrize("name", LABELS)
def test_labels_pass_through_with_nan_where_absent(transformed: Transformed, name: str) -> None:
    raw = [np.nan if value is None else value for value in values(transformed, name)]
    np.testing.assert_array_equal(transformed.columns[name], np.array(raw, np.float32))


def counted(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Label means of the log, [2]; impressions and two rates of two keys in two windows each, [12]."""
    counts = np.array(row["item_counts"]).reshape(5, 3)
    means = counts[0, 1:] / counts[0, 0]
    columns: list[float] = []
    for shown, *sums in counts[1:]:
        rates = [(total + 4 * mean) / (shown + 4) for total, mean in zip(sums, means, strict=True)]
        columns += [shown, *rates]
    return means, np.array(columns)


def test_label_means_are_those_of_the_log_so_far(transformed: Transformed) -> None:
    expected = np.array([counted(row)[0] for row in transformed.rows])
    np.testing.assert_allclose(transformed.columns["label_means_so_far"], expected, rtol=1e-6)


def test_counters_are_shares_of_the_training_rows_with_as_much_or_less(transformed: Transformed) -> None:
    values = np.array([counted(row)[1] for row in transformed.rows])
    shares = transformed.columns["item_counters"]
    assert shares.shape == values.shape == (ROWS, 12)
    for column, found in zip(values.T, shares.T, strict=True):
        at_or_below = np.array([np.mean(column <= x) for x in column])
        # Linear inside each of 32 buckets, so at most about one bucket away.
        np.testing.assert_allclose(found, at_or_below, atol=1.5 / 32)
        # Rates that float32 can hardly tell apart may come in either order.
        order = np.argsort(np.round(column, 6), kind="stable")
        assert np.all(np.diff(found[order]) >= -1e-5)
        assert found.min() >= 0 and found.max() == 1
        assert len(set(found)) > 30


def test_an_item_that_nobody_was_shown_has_the_usual_rates(transformed: Transformed) -> None:
    layer = transformed.output.transform_features_layer()
    log = [100.0, 40.0, 600.0]
    unshown = log + [0.0] * 12
    # Shown a million times with the rates of the log: smoothing does not move them.
    usual = log + [1e6, 0.4e6, 6e6] * 4
    better = log + [1e6, 0.9e6, 20e6] * 4
    rows = np.array([unshown, usual, better], np.float32)
    shares = raw_inputs.transform_counts(layer, tf.constant(rows))["item_counters"].numpy().reshape(3, 4, 3)
    np.testing.assert_allclose(shares[0, :, 1:], shares[1, :, 1:], atol=1e-5)
    assert np.all(shares[0, :, 1:] < shares[2, :, 1:])
    # A quarter of the training rows had no impressions; nobody had a million.
    np.testing.assert_allclose(shares[0, :, 0], 0.25, atol=0.1)
    assert np.all(shares[1:, :, 0] == 1)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_counts_that_training_never_saw_stay_in_range(transformed: Transformed, value: float) -> None:
    layer = transformed.output.transform_features_layer()
    counters = raw_inputs.transform_counts(layer, tf.fill([2, 15], value))
    assert np.all((counters["item_counters"] >= 0) & (counters["item_counters"] <= 1))
    assert np.all(np.isfinite(counters["label_means_so_far"]))


def test_impressions_are_ids_ages_and_labels_that_go_together(transformed: Transformed) -> None:
    id_of = {
        name: dict(zip(values(transformed, name), transformed.columns[f"{name}_id"], strict=True))
        for name in ("item_id", "surface")
    }
    columns = [transformed.columns[name] for name in features.impression_names(SPEC)]
    for index, row in enumerate(transformed.rows):
        shown = zip(*(row[raw.name] for raw in IMPRESSIONS), strict=True)
        expected = [
            (
                id_of["item_id"].get(item, 1),
                row["event_time_unix_s"][0] - time,
                id_of["surface"].get(surface, 1) if surface else 0,
                0 if math.isnan(click) else click,
                0 if math.isnan(watched) else watched,
            )
            for item, time, surface, click, watched in shown
        ]
        expected += [(0, 0, 0, 0, 0)] * (4 - len(expected))
        assert list(zip(*(column[index] for column in columns), strict=True)) == expected
    assert {len(row["impression_item_ids"]) for row in transformed.rows} == {0, 1, 2, 3, 4}


def test_an_impression_after_the_request_is_of_age_0(transformed: Transformed) -> None:
    raw = _ranking_request([transformed.rows[1]])
    raw["impression_event_time_unix_s"] = raw["event_time_unix_s"][:, tf.newaxis] + 60
    layer = transformed.output.transform_features_layer()
    assert raw_inputs.transform_request(layer, raw, SPEC)["impression_ages_s"].numpy().tolist() == [[0]]


@pytest.mark.parametrize("name", [raw.name for raw in IMPRESSIONS[1:]])
def test_impressions_that_do_not_go_together_are_refused(transformed: Transformed, name: str) -> None:
    raw = _ranking_request(transformed.rows[:4])
    raw[name] = raw[name][:, :-1]
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{name} and impression_item_ids must be lists"):
        raw_inputs.transform_request(transformed.output.transform_features_layer(), raw, SPEC)


def _ranking_request(rows: list[Row]) -> dict[str, tf.Tensor]:
    """Raw rows as the tensors of a request to the ranker."""
    missing = {"string": "", "int64": -1, "float32": math.nan}
    request = {}
    for raw in (*features.raw_query_inputs(SPEC), *IMPRESSIONS):
        if raw.is_list:
            width = max(len(row[raw.name]) for row in rows)
            filled = [[*row[raw.name], *[missing[raw.dtype]] * (width - len(row[raw.name]))] for row in rows]
            request[raw.name] = tf.constant(filled, raw.dtype, [len(rows), width])
        else:
            request[raw.name] = tf.constant(
                [(row[raw.name] or [missing[raw.dtype]])[0] for row in rows], raw.dtype
            )
    return request


@pytest.mark.parametrize("batch", [ROWS, 1, 7])
def test_a_request_to_the_ranker_is_transformed_as_training_was(transformed: Transformed, batch: int) -> None:
    layer = transformed.output.transform_features_layer()
    raw = _ranking_request(transformed.rows[:batch])
    assert sorted(raw) == sorted(raw_inputs.ranking_signature(SPEC))
    served = raw_inputs.transform_request(layer, raw, SPEC)
    query = [name for f in features.feature_space(SPEC).query for name in f.transformed_names]
    assert sorted(served) == sorted([*query, *features.impression_names(SPEC)])
    for name, value in served.items():
        _same(value.numpy(), transformed.columns[name][:batch])


def _example(row: Row) -> bytes:
    example = tf.train.Example()
    for name, dtype in DTYPES.items():
        feature = example.features.feature[name]
        if dtype == "string":
            feature.bytes_list.value.extend(value.encode() for value in row[name])
        elif dtype == "int64":
            feature.int64_list.value.extend(row[name])
        else:
            feature.float_list.value.extend(row[name])
    return example.SerializeToString()


def _same(left: np.ndarray, right: np.ndarray) -> None:
    """Equal to the bit; lists but for the width of their padding."""
    if left.ndim == 2 or right.ndim == 2:
        width = max(left.shape[1], right.shape[1])
        left, right = (np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (left, right))
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("batch", [ROWS, 1, 7])
def test_serving_transforms_rows_as_training_did(transformed: Transformed, batch: int) -> None:
    layer = transformed.output.transform_features_layer()
    space = features.feature_space(SPEC)
    serialized = tf.constant([_example(row) for row in transformed.rows[:batch]])
    raw = raw_inputs.parse_interaction_examples(serialized, SPEC)
    served = {
        **raw_inputs.transform_request(layer, raw, SPEC),
        **raw_inputs.transform_candidates(layer, raw, SPEC),
        **raw_inputs.transform_cross(layer, raw["event_time_unix_s"], raw["upload_time_unix_s"], SPEC),
        **raw_inputs.transform_counts(layer, raw["item_counts"]),
    }
    names = [n for f in space.all for n in f.transformed_names]
    assert sorted(served) == sorted([*names, *RANKING_ONLY])
    for name, value in served.items():
        _same(value.numpy(), transformed.columns[name][:batch])


def _request(event_time_unix_s: int) -> dict[str, tf.Tensor]:
    """A request of an unknown user of whom nothing is known."""
    empty = {"string": "", "int64": -1, "float32": float("nan")}
    raw = {
        r.name: tf.zeros([1, 0], tf.string) if r.is_list else tf.constant([empty[r.dtype]], r.dtype)
        for r in features.raw_query_inputs(SPEC)
    }
    return {
        **raw,
        "user_id": tf.constant(["nobody"]),
        "event_time_unix_s": tf.constant([event_time_unix_s], tf.int64),
    }


def test_a_request_with_nothing_but_a_new_user_is_understood(transformed: Transformed) -> None:
    layer = transformed.output.transform_features_layer()
    query = raw_inputs.transform_query(layer, _request(TRAIN_END), SPEC)
    assert query["user_id_id"].numpy().tolist() == [1]
    assert query["surface_id"].numpy().tolist() == [0]
    assert query["age_bucket"].numpy().tolist() == [0]
    for name in ("history_item_ids_ids", "clubs_ids", "search_tokens_ids"):
        assert not query[name].numpy().any()


def test_of_lists_longer_than_those_of_training_the_latest_values_count(transformed: Transformed) -> None:
    """Training has 50: two values of the first user are too many; the only one of the second counts."""
    layer = transformed.output.transform_features_layer()
    raw = _ranking_request(transformed.rows[:2])
    long = [["i0", "i0", *["i1"] * 24, "", *["i2"] * 26], ["i0", *[""] * 52]]
    raw["history_item_ids"] = raw["impression_item_ids"] = tf.constant(long)
    for other in IMPRESSIONS[1:]:
        raw[other.name] = tf.constant([[0 if other.dtype != "string" else "home"] * 53] * 2, other.dtype)
    found = raw_inputs.transform_request(layer, raw, SPEC)
    item_id = {
        item: raw_inputs.transform_query(
            layer, {**_request(TRAIN_END), "history_item_ids": tf.constant([[item]])}, SPEC
        )["history_item_ids_ids"].numpy()[0, 0]
        for item in ("i0", "i1", "i2")
    }
    for name in ("history_item_ids_ids", "impression_item_ids_ids"):
        first, second = (ids[ids > 0].tolist() for ids in found[name].numpy())
        assert first == [item_id["i1"]] * 24 + [item_id["i2"]] * 26
        assert second == [item_id["i0"]]


def test_impressions_far_apart_are_closed_up_with_what_is_said_of_them(transformed: Transformed) -> None:
    """Else two of them, in lists of 20,000, would be compared in gigabytes of memory."""
    layer = transformed.output.transform_features_layer()
    near = _ranking_request(transformed.rows[:2])
    near["impression_item_ids"] = tf.constant([["i1", "i2", "i1"], ["i2", "", ""]])
    said = {"string": ["home", "search", "home"], "int64": [10, 20, 30], "float32": [1.0, 0.0, math.nan]}
    far = dict(near)
    ids = np.full((2, 20_000), "", object)
    ids[0, [0, 700, 19_999]], ids[1, 5] = ["i1", "i2", "i1"], "i2"
    far["impression_item_ids"] = tf.constant(ids.tolist())
    for other in IMPRESSIONS[1:]:
        near[other.name] = tf.constant([said[other.dtype]] * 2, other.dtype)
        # What stands where no item does is said of nothing.
        values = np.full((2, 20_000), said[other.dtype][1], object)
        values[0, [0, 700, 19_999]], values[1, 5] = said[other.dtype], said[other.dtype][0]
        far[other.name] = tf.constant(values.tolist(), other.dtype)
    found, expected = (raw_inputs.transform_request(layer, raw, SPEC) for raw in (far, near))
    names = features.impression_names(SPEC)
    assert found[names[0]].shape == (2, 3)
    for name in names:
        shown = expected["impression_item_ids_ids"].numpy() > 0
        assert found[name].shape == expected[name].shape == (2, 3), name
        np.testing.assert_array_equal(found[name][shown], expected[name][shown], name)
    assert expected["impression_item_ids_ids"].numpy().any(axis=1).all()


def test_a_request_without_a_time_has_no_clock(transformed: Transformed) -> None:
    layer = transformed.output.transform_features_layer()
    query = raw_inputs.transform_query(layer, _request(-1), SPEC)
    assert query["hour_of_day_id"].numpy().tolist() == [0]
    assert query["day_of_week_id"].numpy().tolist() == [0]


def _write(path: Path, rows: list[Row]) -> str:
    with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
        for row in rows:
            writer.write(_example(row))
    return str(path)


@pytest.mark.parametrize("chunk", [ROWS, 7])
def test_the_trainers_read_rows_as_beam_transforms_them(
    transformed: Transformed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("trainer.input_pipeline._CHUNK_EXAMPLES", chunk)
    file = _write(tmp_path / "examples.gz", transformed.rows)
    (window,) = list(windows([file], transformed.output))
    assert sorted(window) == sorted(transformed.columns)
    # Retrieval reads nothing that its training has no use for.
    (narrow,) = list(windows([file], transformed.output, unread=unread_features(SPEC, RetrievalConfig())))
    unused = {"item_age_days_cdf", "item_age_days_bucket", "watch_time_s", "history_item_ids_ids"}
    assert set(window) - set(narrow) == {*RANKING_ONLY, *unused}
    for name, column in narrow.items():
        _same(column.numpy(), transformed.columns[name])
    for name, column in window.items():
        assert column.dtype in (tf.int32, tf.float32)
        _same(column.numpy(), transformed.columns[name])


def test_the_catalogue_is_transformed_like_the_candidates(transformed: Transformed, tmp_path: Path) -> None:
    first = {row["item_id"][0]: index for index, row in enumerate(transformed.rows)}
    rows = [transformed.rows[index] for index in first.values()]
    catalogue = load_catalogue([_write(tmp_path / "c.gz", rows)], transformed.output, SPEC)
    assert catalogue.item_ids.tolist() == list(first)
    assert catalogue.upload_time_unix_s is not None
    assert catalogue.upload_time_unix_s.tolist() == [(row["upload_time_unix_s"] or [-1])[0] for row in rows]
    for feature in features.feature_space(SPEC).candidate:
        for name in feature.transformed_names:
            _same(catalogue.transformed[name], transformed.columns[name][list(first.values())])
    for name in features.COUNTER_NAMES:
        _same(catalogue.counters[name][:-1], transformed.columns[name][list(first.values())])


def test_the_last_row_of_the_catalogues_counters_is_of_an_item_without_events(
    transformed: Transformed, tmp_path: Path
) -> None:
    # The counts of one catalogue are all of one moment, and so of one log.
    log = transformed.rows[0]["item_counts"][:3]
    rows = [
        {**transformed.rows[n], "item_id": [f"new{n}"], "item_counts": [*log, *[float(n)] * 12]}
        for n in range(1, 4)
    ]
    catalogue = load_catalogue([_write(tmp_path / "c.gz", rows)], transformed.output, SPEC)
    layer = transformed.output.transform_features_layer()
    expected = raw_inputs.transform_counts(layer, tf.constant([[*log, *[0.0] * 12]], tf.float32))
    for name in features.COUNTER_NAMES:
        assert len(catalogue.counters[name]) == 4
        _same(catalogue.counters[name][-1:], expected[name].numpy())
    assert not np.array_equal(catalogue.counters["item_counters"][-1], catalogue.counters["item_counters"][0])
