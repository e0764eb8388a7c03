"""What is read off the training labels, and which labels are refused."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from schema.contract import TaskKind, TaskSpec
from schema.errors import DataError
from trainer.label_statistics import (
    NUM_DURATION_GROUPS,
    LabelStatistics,
    duration_contexts,
    label_statistics,
    threshold_levels,
)

NAN = math.nan
CLICK = TaskSpec(name="click", label="y", kind=TaskKind.BINARY)
WATCH = TaskSpec(name="watch", label="y", kind=TaskKind.WATCH_TIME)
STARS = TaskSpec(name="stars", label="y", kind=TaskKind.REGRESSION)
SHARE = TaskSpec(name="share", label="y", kind=TaskKind.COMPLETION)


def watch(**fields: Any) -> TaskSpec:
    return TaskSpec(name="watch", label="y", kind=TaskKind.WATCH_TIME, **fields)


COVINGTON = watch(method="covington_logistic", click_label="click")
QUANTILES = watch(method="duration_quantiles", duration_feature="duration_s")
ORDINAL = watch(method="ordinal", num_thresholds=3)


def statistics_of(task: TaskSpec, *windows: list[float], **columns: list[float]) -> LabelStatistics:
    """Statistics of one task; `columns` are further ones of a single window."""
    pieces = [{"y": np.array(w, np.float32)} for w in windows]
    for name, values in columns.items():
        pieces[0][name] = np.array(values, np.int32 if name.endswith("_bucket") else np.float32)
    return label_statistics(pieces, [task])[task.name]


def test_statistics_over_windows_equal_those_of_all_labels_together() -> None:
    # A mean a thousand times the spread: a sum of squares in float32 would lose the spread.
    rng = np.random.default_rng(1)
    labels = rng.normal(3000, 3, 1000).astype(np.float32)
    labels[::7] = NAN
    known = labels[~np.isnan(labels)].astype(np.float64)
    found = statistics_of(STARS, labels[:900].tolist(), [NAN], labels[900:].tolist())
    assert found.count == len(known)
    assert (found.mean, found.std) == pytest.approx((known.mean(), known.std()), rel=1e-9)
    assert (found.minimum, found.maximum) == (known.min(), known.max())
    assert found.median == np.median(known)


def test_windows_are_read_once() -> None:
    windows = iter([{"y": np.array([1, 0], np.float32)}, {"y": np.array([0, 0], np.float32)}])
    both = label_statistics(windows, [CLICK, SHARE])
    assert both["click"].mean == both["share"].mean == 0.25


def test_click_statistics_leave_out_rows_without_one_of_the_labels() -> None:
    found = statistics_of(COVINGTON, [10, 20, 6, NAN, 9], click=[1, 1, 0, 1, NAN])
    assert found.count == 3
    assert found.click_rate == pytest.approx(2 / 3)
    assert found.clicked_mean == pytest.approx(30 / 3)


def test_quantiles_are_those_of_the_row_s_duration_group_and_of_all_rows_where_it_is_small() -> None:
    short, long = np.arange(101.0), 10 * np.arange(101.0)
    labels, buckets = [*short, *long, 7.0], [3] * 101 + [4] * 101 + [0]
    found = statistics_of(QUANTILES, labels, duration_s_bucket=buckets)
    assert len(found.quantiles) == NUM_DURATION_GROUPS == 33
    np.testing.assert_allclose(found.quantiles[3], short)
    np.testing.assert_allclose(found.quantiles[4], long)
    everything = np.quantile(labels, np.linspace(0, 1, 101))
    # The one row of unknown duration, and buckets that nothing is in.
    for group in (0, 1, 2, 32):
        np.testing.assert_allclose(found.quantiles[group], everything)


def test_levels_of_thresholds_crowd_towards_the_long_watches() -> None:
    levels = threshold_levels(9)
    steps = np.diff([0.0, *levels, 1.0])
    assert np.all(np.diff(steps) < 0)
    # (1 - e^-z') / (1 - e^-2) at z' = 2 * 5 / 10
    assert levels[4] == pytest.approx((1 - math.exp(-1)) / (1 - math.exp(-2)))


def test_thresholds_cut_the_labels_into_bins_with_their_means() -> None:
    labels = np.random.default_rng(2).gamma(1.0, 20.0, 500).astype(np.float32).astype(np.float64)
    found = statistics_of(ORDINAL, labels.tolist())
    (thresholds,), (means,) = found.thresholds, found.bin_means
    assert thresholds == tuple(np.sort(labels)[np.ceil(500 * threshold_levels(3)).astype(int) - 1])
    edges = [-1.0, *thresholds, np.inf]
    for k in range(4):
        inside = labels[(labels > edges[k]) & (labels <= edges[k + 1])]
        assert means[k] == pytest.approx(inside.mean())
    assert found.exceedance == pytest.approx([np.mean(labels > t) for t in thresholds])


def test_thresholds_that_tell_nothing_apart_are_dropped() -> None:
    # Most rows are 0 s or the whole 30 s: one threshold at 0 is left of three.
    found = statistics_of(ORDINAL, [0] * 6 + [30] * 4)
    assert found.thresholds == ((0.0,),)
    assert found.bin_means == ((0.0, 30.0),)
    assert found.exceedance == (0.4,)
    # All levels fall on the longest watch: the shortest tells the rest apart.
    assert statistics_of(ORDINAL, [1] + [9] * 99).thresholds == ((1.0,),)


def test_duration_groups_get_thresholds_of_their_own_that_share_their_base_rates() -> None:
    short, long = np.arange(1.0, 201), 10 * np.arange(1.0, 201)
    task = watch(method="ordinal", num_thresholds=3, duration_feature="duration_s")
    found = statistics_of(task, [*short, *long], duration_s_bucket=[3] * 200 + [4] * 200)
    assert len(found.thresholds) == len(found.bin_means) == NUM_DURATION_GROUPS
    np.testing.assert_allclose(found.thresholds[4], 10 * np.array(found.thresholds[3]))
    np.testing.assert_allclose(found.bin_means[4], 10 * np.array(found.bin_means[3]))
    above = [np.mean(np.array(short) > t) for t in found.thresholds[3]]
    assert found.exceedance == pytest.approx(above)


def test_bin_without_rows_gets_the_threshold_below_it_so_that_means_ascend() -> None:
    # In group 3 two thresholds are the same 5 s, and nothing is above the last one.
    task = watch(method="ordinal", num_thresholds=3, duration_feature="duration_s")
    found = statistics_of(task, [1] * 10 + [5] * 90 + [9] * 100, duration_s_bucket=[3] * 100 + [4] * 100)
    assert found.thresholds[3] == (5.0, 5.0, 5.0)
    assert found.bin_means[3] == pytest.approx((4.6, 5.0, 5.0, 5.0))


@pytest.mark.parametrize("task", [CLICK, COVINGTON, QUANTILES, ORDINAL])
def test_statistics_survive_json(task: TaskSpec) -> None:
    found = statistics_of(task, [0, 1, 1, 0], click=[1, 0, 1, 1], duration_s_bucket=[0, 1, 2, 3])
    text = json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert LabelStatistics(**json.loads(text)) == found


@pytest.mark.parametrize(
    ("task", "windows", "message"),
    [
        pytest.param(CLICK, [[NAN], [NAN]], "missing in every training row", id="all-missing"),
        pytest.param(CLICK, [], "missing in every training row", id="no-rows"),
        pytest.param(CLICK, [[1, 1], [1, NAN]], "is 1 in all 3 training rows", id="one-class"),
        pytest.param(CLICK, [[0, 1], [2, 1]], "must be 0 or 1.*found 2 ", id="not-binary"),
        pytest.param(WATCH, [[0, 0]], "is 0 s in all 2", id="never-watched"),
        pytest.param(ORDINAL, [[0, 0]], "is 0 s in all 2", id="never-watched-ordinal"),
        pytest.param(WATCH, [[3, -1]], "must be seconds >= 0, finite; found -1", id="negative-seconds"),
        pytest.param(WATCH, [[math.inf]], "must be seconds >= 0, finite; found inf", id="endless"),
        pytest.param(ORDINAL, [[4, 4], [4]], "is 4 in all 3", id="nothing-above-a-threshold"),
        pytest.param(watch(method="regression"), [[4, 4]], "is 4 in all 2", id="no-spread"),
        pytest.param(STARS, [[3.3, 3.3], [3.3]], "is 3.3 in all 3", id="constant"),
        pytest.param(STARS, [[1, -math.inf]], "must be finite", id="infinite"),
        pytest.param(SHARE, [[0.5, 1.5]], "must be a share from 0 to 1; found 1.5", id="more-than-all"),
        pytest.param(SHARE, [[1, 1]], "is 1 in all 2", id="always-to-the-end"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(task: TaskSpec, windows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"task '{task.name}'.*'y'.*{message}"):
        statistics_of(task, *windows)


def test_watch_time_that_never_changes_is_learnt_by_its_mean() -> None:
    assert statistics_of(WATCH, [4, 4]).mean == 4


@pytest.mark.parametrize(
    ("clicks", "message"),
    [
        pytest.param([0, 0, 0], "'click' is 0 in all 3 training rows", id="no-click"),
        pytest.param([1, 1, 1], "'click' is 1 in all 3 training rows", id="all-clicked"),
        pytest.param([0, 1, 2], "'click' must be 0 or 1.*found 2", id="not-binary"),
        pytest.param([1, 0, 0], "'y' is 0 s in all 1 training rows with 'click' 1", id="clicks-unwatched"),
        pytest.param([NAN, NAN, NAN], "missing in every training row", id="clicks-missing"),
    ],
)
def test_clicks_that_cannot_be_learnt_are_refused(clicks: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        statistics_of(COVINGTON, [0, 3, 5], click=clicks)


def test_excess_of_a_context_is_drawn_to_that_of_its_surface_where_rows_are_few() -> None:
    task = watch(method="ordinal", num_thresholds=3, duration_feature="duration_s")
    window = {
        # Missing labels count as 0: the mean of all rows is 6.
        "y": np.array([10.0, 14.0] * 10 + [NAN] * 20, np.float32),
        "surface_id": np.array([2] * 20 + [3] * 20),
        # Buckets 1 to 4 are group 2, bucket 5 is in group 3.
        "duration_s_bucket": np.array([4] * 20 + [5] * 20),
    }
    excess = label_statistics([window], [task], num_surfaces=4, surface="surface_id")["watch"].context_excess
    assert np.shape(excess) == (4, 10)
    # Surface 2: 20 rows, on average 6 above the mean, beside 20 that are not: 3; then 20 more rows at 3.
    assert excess[2][2] == pytest.approx((20 * 6 + 20 * 3) / 40)
    assert excess[2][3] == pytest.approx(3)
    assert excess[3][3] == pytest.approx(-(20 * 6 + 20 * 3) / 40)
    assert set(excess[0]) == set(excess[1]) == {0.0}


def test_without_surfaces_and_durations_there_is_one_context() -> None:
    assert statistics_of(CLICK, [1, 0, 0, 1]).context_excess == ((0.0,),)


def test_groups_of_durations_keep_unknown_ones_apart() -> None:
    assert duration_contexts(np.array([0, 1, 4, 5, 32])).tolist() == [1, 2, 2, 3, 9]
