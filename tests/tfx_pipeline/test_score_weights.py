"""Re-ranking of logged impressions against hand calculations and a slow oracle; the command that shows it."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from schema.contract import DatasetSpec
from schema.errors import ConfigError, DataError
from tfx_pipeline import score_weights as module
from tfx_pipeline.cli import main
from tfx_pipeline.score_weights import (
    GIVEN,
    PRESENT,
    SAMPLED,
    Impressions,
    Objective,
    list_means,
    non_dominated,
    read_impressions,
    sample_weights,
    trade_off,
    trade_off_table,
    write_json,
    write_plot,
)

NAN = math.nan
CLICK = Objective("click", "label_click", True)
WATCH = Objective("watch_time_s", "watch_time_s", True)


def dataset(tasks: list[dict[str, Any]], utc_offset_hours: float = 0.0) -> DatasetSpec:
    return DatasetSpec.model_validate(
        {
            "name": "tiny",
            "utc_offset_hours": utc_offset_hours,
            "interactions": {
                "files": ["i.csv"],
                "columns": {
                    name: name for name in ("user_id", "item_id", "event_time_unix_s", "watch_time_s")
                },
                "labels": {"click": "click", "hide": "hide"},
            },
            "users": {"files": ["u.csv"], "columns": {"user_id": "user_id"}},
            "items": {"files": ["v.csv"], "columns": {"item_id": "item_id"}},
            "positive": "click",
            "tasks": tasks,
            "split": {"fractions": [0.8, 0.1, 0.1]},
        }
    )


TASKS = [
    {"name": "click", "label": "click", "kind": "binary", "score_weight": 1.0},
    {"name": "watch_time", "label": "watch_time_s", "kind": "watch_time", "score_weight": 0.02},
]
HIDE = {"name": "hide", "label": "hide", "kind": "binary", "score_weight": -3.0}
SPEC = dataset(TASKS)


def impressions(
    predictions: list[list[float]], labels: list[list[float]], lists: list[int] | None = None
) -> Impressions:
    codes = lists if lists is not None else [0] * len(predictions)
    return Impressions(np.array(predictions, float), np.array(labels, float), np.array(codes), 0)


def logged(num_users: int = 400, seed: int = 0) -> pl.DataFrame:
    """Two tasks that want opposite orders: predictions are the expected labels of the rows."""
    rng = np.random.default_rng(seed)
    num = 10 * num_users
    click = rng.uniform(0.1, 0.9, num)
    watch = 100 * (1 - click) + rng.uniform(0, 40, num)
    return pl.DataFrame(
        {
            "user_id": [f"u{row % num_users}" for row in range(num)],
            "item_id": [f"i{row}" for row in range(num)],
            "event_time_unix_s": rng.integers(1_700_000_000, 1_700_600_000, num),
            "click": click,
            "watch_time": watch,
            "score": click + 0.02 * watch,
            "label_click": (rng.random(num) < click).astype(np.float32),
            "watch_time_s": rng.exponential(watch),
        }
    )


@pytest.fixture
def predictions_file(tmp_path: Path) -> Path:
    path = tmp_path / "preds.parquet"
    logged().write_parquet(path)
    return path


def test_mean_label_is_weighted_by_the_discount_of_the_new_rank() -> None:
    rows = impressions([[0.2], [0.9], [0.5]], [[6.0], [1.0], [3.0]])
    second = 1 / math.log2(3)
    for top, expected in (
        (3, (1 + second * 3 + 0.5 * 6) / (1 + second + 0.5)),
        (2, (1 + second * 3) / (1 + second)),
        (1, 1.0),
    ):
        assert list_means(rows, np.array([1.0]), top)[0, 0] == pytest.approx(expected)
    # The other way round.
    assert list_means(rows, np.array([-2.0]), 1)[0, 0] == 6.0


def test_rows_without_a_label_hold_their_rank_but_do_not_count() -> None:
    rows = impressions([[0.9], [0.5], [0.2]], [[NAN], [3.0], [6.0]])
    second = 1 / math.log2(3)
    expected = (second * 3 + 0.5 * 6) / (second + 0.5)
    assert list_means(rows, np.array([1.0]), 3)[0, 0] == pytest.approx(expected)
    assert math.isnan(list_means(rows, np.array([1.0]), 1)[0, 0])


def test_order_of_the_file_plays_no_part_where_scores_are_equal() -> None:
    labels = [[1.0], [0.0], [0.0], [0.0]]
    for shift in range(4):
        rows = impressions([[0.5]] * 4, labels[shift:] + labels[:shift])
        assert list_means(rows, np.array([1.0]), 2)[0, 0] == pytest.approx(0.25)


def slow_list_means(rows: Impressions, weights: np.ndarray, top: int) -> list[list[float]]:
    """By loops: a row's discount is the mean over the ranks that its score can have."""
    result = []
    for name in range(int(rows.lists.max()) + 1):
        mine = [i for i, other in enumerate(rows.lists) if other == name]
        scores = {i: float(sum(rows.predictions[i] * weights)) for i in mine}
        means = []
        for column in range(rows.labels.shape[1]):
            total = mass = 0.0
            for i in mine:
                above = sum(scores[j] > scores[i] for j in mine)
                same = sum(scores[j] == scores[i] for j in mine)
                ranks = range(above + 1, above + same + 1)
                discount = sum(1 / math.log2(r + 1) for r in ranks if r <= top) / same
                if not math.isnan(rows.labels[i, column]):
                    total, mass = total + discount * rows.labels[i, column], mass + discount
            means.append(total / mass if mass else NAN)
        result.append(means)
    return result


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.0, 1.0, 5.0, NAN]), st.integers(0, 2)
        ),
        min_size=1,
        max_size=25,
    ),
    weights=st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.0, 1.0, -1.0])),
    top=st.integers(1, 6),
)
def test_list_means_equal_the_oracle(rows: Any, weights: Any, top: int) -> None:
    rows = sorted(rows, key=lambda row: row[3])
    codes = np.unique([row[3] for row in rows], return_inverse=True)[1]
    table = impressions([[a, b] for a, b, _, _ in rows], [[y, 1.0] for _, _, y, _ in rows], codes.tolist())
    expected = slow_list_means(table, np.array(weights), top)
    np.testing.assert_allclose(list_means(table, np.array(weights), top), expected, rtol=1e-9)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_non_dominated_points_equal_the_definition(points: list[tuple[int, int, int]]) -> None:
    expected = [
        not any(all(a >= b for a, b in zip(other, point, strict=True)) and other != point for other in points)
        for point in points
    ]
    assert non_dominated(np.array(points, float)).tolist() == expected


def test_sampled_weights_hold_every_corner_and_the_neighbours_of_the_present_ones() -> None:
    spec = dataset([*TASKS, HIDE])
    rng = np.random.default_rng(1)
    # Lists differ in level; only the spread within lists, 1, 20 and .1, orders anything.
    lists = np.repeat(np.arange(200), 50)
    noise = rng.normal(size=(10_000, 3)) * [1.0, 20.0, 0.1]
    rows = Impressions(noise + rng.normal(size=(200, 3))[lists] * 1e3, np.zeros((10_000, 1)), lists, 0)
    found = sample_weights(spec.tasks, rows, 30)
    # 6 neighbours; a lattice of 24 or fewer points on 3 tasks has steps of 1/5 and 21 points.
    assert len(found) == 6 + 21
    assert found == sample_weights(spec.tasks, rows, 30)
    assert {"click": 0.5, "watch_time": 0.02, "hide": -3.0} in found
    assert {"click": 1.0, "watch_time": 0.02, "hide": -6.0} in found
    lattice = found[6:]
    assert all(w["click"] >= 0 and w["watch_time"] >= 0 and w["hide"] <= 0 for w in lattice)
    # Each spreads the scores of a list as much as the present weights do: 1 + .02 × 20 + 3 × .1.
    spreads = [w["click"] + 20 * w["watch_time"] - 0.1 * w["hide"] for w in lattice]
    np.testing.assert_allclose(spreads, 1.7, rtol=0.03)
    for task in spec.tasks:
        assert any(all(w[o.name] == 0 for o in spec.tasks if o is not task) for w in lattice), task.name


@pytest.mark.parametrize("num_points", range(2, 40))
def test_sample_is_never_larger_than_asked_for_and_always_has_the_corners(num_points: int) -> None:
    rows = impressions([[0.1, 3.0], [0.7, 1.0]], [[0.0], [0.0]])
    found = sample_weights(SPEC.tasks, rows, num_points)
    assert 2 <= len(found) <= num_points
    assert any(w["click"] == 0 for w in found) and any(w["watch_time"] == 0 for w in found)


def test_sample_that_cannot_be_drawn_is_refused() -> None:
    rows = impressions([[0.1, 3.0], [0.7, 1.0]], [[0.0], [0.0]])
    with pytest.raises(ConfigError, match="declares one task, click; a trade-off needs two"):
        sample_weights(SPEC.tasks[:1], rows, 9)
    with pytest.raises(ConfigError, match="1 points for 2 tasks"):
        sample_weights(SPEC.tasks, rows, 1)
    level = impressions([[0.1, 3.0], [0.1, 1.0], [0.2, 1.0], [0.2, 2.0]], [[0.0]] * 4, [0, 0, 1, 1])
    with pytest.raises(DataError, match="task click are the same throughout every list"):
        sample_weights(SPEC.tasks, level, 9)


def test_trade_off_finds_that_each_objective_costs_the_other(predictions_file: Path) -> None:
    rows, objectives = read_impressions(predictions_file, SPEC, ["click", "watch_time_s"], "user")
    assert objectives == [CLICK, WATCH]
    sampled = [(SAMPLED, w) for w in sample_weights(SPEC.tasks, rows, 12)]
    result = trade_off(rows, objectives, SPEC.tasks, sampled, top=3)
    assert (result.num_impressions, result.num_lists, result.num_single) == (4000, 400, 0)
    present, *others = result.points
    assert present.kind == PRESENT and present.weights == {"click": 1.0, "watch_time": 0.02}
    corners = {
        name: next(p for p in others if all(p.weights[o] == 0 for o in present.weights if o != task))
        for name, task in (("click", "click"), ("watch_time_s", "watch_time"))
    }
    for name, other in (("click", "watch_time_s"), ("watch_time_s", "click")):
        point, opposite = corners[name], corners[other]
        assert point.values[name] > opposite.values[name] + 3 * opposite.intervals[name]
        assert point.values[name] - present.values[name] == pytest.approx(point.differences[name])


def test_differences_are_paired_over_the_lists_that_have_both() -> None:
    # Three lists of two; the present weights put the first row on top, the other weights the second.
    rows = impressions(
        [[1.0, 0.0], [0.0, 1.0]] * 3,
        [[1.0, 5.0], [4.0, 5.0], [2.0, 5.0], [9.0, 5.0], [NAN, 5.0], [3.0, 5.0]],
        [0, 0, 1, 1, 2, 2],
    )
    other = {"click": 0.0, "watch_time": 1.0}
    result = trade_off(rows, [CLICK, WATCH], SPEC.tasks, [(GIVEN, other)], top=1)
    present, given_point = result.points
    assert present.values["click"] == pytest.approx(1.5)
    assert given_point.values["click"] == pytest.approx(16 / 3)
    # 3 and 7: mean 5, standard deviation 2 √2, so a standard error of 2.
    assert given_point.differences["click"] == pytest.approx(5.0)
    assert given_point.intervals["click"] == pytest.approx(1.96 * 2)
    assert given_point.differences["watch_time_s"] == given_point.intervals["watch_time_s"] == 0
    assert present.is_dominated and not given_point.is_dominated


def test_negative_feedback_is_an_objective_to_make_small(tmp_path: Path) -> None:
    spec = dataset([*TASKS, HIDE])
    table = logged().with_columns(hide=1 - pl.col("click"), label_hide=1 - pl.col("label_click"))
    table.write_parquet(tmp_path / "p.parquet")
    rows, objectives = read_impressions(tmp_path / "p.parquet", spec, ["click", "hide"], "user")
    assert [o.is_maximised for o in objectives] == [True, False]
    by_click = {"click": 1.0, "watch_time": 0.0, "hide": 0.0}
    by_watch = {"click": 0.0, "watch_time": 1.0, "hide": 0.0}
    result = trade_off(rows, objectives, spec.tasks, [(GIVEN, by_click), (GIVEN, by_watch)], top=3)
    # Clicks are what is not hidden here: their order is best in both, that of watch time worst in both.
    assert [p.is_dominated for p in result.points[1:]] == [False, True]


def test_lists_are_users_or_their_local_days_or_a_column(tmp_path: Path) -> None:
    midnight = 1_700_006_400  # 2023-11-15 00:00 UTC
    times = [midnight - 3600, midnight + 60, midnight + 120, midnight + 90_000, midnight + 60]
    table = pl.DataFrame(
        {
            "user_id": ["a", "a", "a", "a", "b"],
            "event_time_unix_s": times,
            "request": [7, 8, 7, 8, 9],
            "click": [0.1, 0.2, 0.3, 0.4, 0.5],
            "watch_time": [1.0, 2.0, 3.0, 4.0, 5.0],
            "label_click": [0.0, 1.0, 0.0, 1.0, 0.0],
            "watch_time_s": [1.0, 2.0, 3.0, 4.0, 5.0],
        }
    )
    table.write_parquet(tmp_path / "p.parquet")

    def lists(list_by: str, offset: float = 0.0) -> tuple[list[list[float]], int]:
        spec = dataset(TASKS, offset)
        rows, _ = read_impressions(tmp_path / "p.parquet", spec, ["click", "watch_time_s"], list_by)
        return [
            sorted(rows.predictions[rows.lists == name, 1]) for name in range(rows.num_lists)
        ], rows.num_single

    assert lists("user") == ([[1.0, 2.0, 3.0, 4.0]], 1)
    assert lists("user-day") == ([[2.0, 3.0]], 3)
    # Where it is two hours later, the first event belongs to the same day as the next two.
    assert lists("user-day", 2.0) == ([[1.0, 2.0, 3.0]], 2)
    assert lists("request") == ([[1.0, 3.0], [2.0, 4.0]], 1)


def test_label_is_read_from_its_prefixed_column_before_its_own_name(tmp_path: Path) -> None:
    table = logged().with_columns(watch_time_s=pl.lit(0.0), label_watch_time_s=pl.lit(1.0))
    table.write_parquet(tmp_path / "p.parquet")
    rows, objectives = read_impressions(tmp_path / "p.parquet", SPEC, ["watch_time_s", "click"], "user")
    assert objectives[0].column == "label_watch_time_s"
    assert (rows.labels[:, 0] == 1.0).all()


@pytest.mark.parametrize(
    ("objectives", "error", "message"),
    [
        pytest.param(["click"], ConfigError, "give at least two different ones", id="one"),
        pytest.param([], ConfigError, "objectives none: give at least two", id="none"),
        pytest.param(["click", "click"], ConfigError, "at least two different", id="twice"),
        pytest.param(
            ["click", "share"],
            DataError,
            "objective 'share': expected label_share or share; its labels: click, watch_time_s",
            id="unknown-label",
        ),
        pytest.param(["click", "user_id"], DataError, r"\(user_id is no label\)", id="ids-are-no-labels"),
    ],
)
def test_bad_objectives_are_refused_with_a_reason(
    tmp_path: Path, objectives: list[str], error: Any, message: str
) -> None:
    logged().write_parquet(tmp_path / "p.parquet")
    with pytest.raises(error, match=message):
        read_impressions(tmp_path / "p.parquet", SPEC, objectives, "user")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"label_click": None},
            r"expected label_click \(click is no label\)",
            id="predictions-are-no-labels",
        ),
        pytest.param(
            {"watch_time": None},
            r"no column watch_time; expected user_id and .* of tiny \(click, watch_time\)",
            id="no-predictions",
        ),
        pytest.param({"user_id": None}, "no column user_id", id="no-user"),
        pytest.param(
            {"user_id": pl.lit(None, pl.String)}, "user_id is missing in 4,000 rows", id="user-missing"
        ),
        pytest.param(
            {"click": pl.when(pl.col("click") > 0.5).then(NAN).otherwise(0.1)},
            "predictions are missing or not finite, the first of task click",
            id="nan-prediction",
        ),
        pytest.param({"click": pl.col("item_id")}, "column click is String; numbers", id="text-prediction"),
        pytest.param({"watch_time_s": pl.lit(math.inf)}, "4,000 labels are infinite", id="infinite-label"),
        pytest.param(
            {"user_id": pl.col("item_id")}, "none of 4,000 lists by user has two", id="nothing-to-rank"
        ),
    ],
)
def test_bad_columns_are_refused_with_a_reason(
    tmp_path: Path, change: Mapping[str, Any], message: str
) -> None:
    table = logged()
    for name, values in change.items():
        table = table.drop(name) if values is None else table.with_columns(values.alias(name))
    table.write_parquet(tmp_path / "p.parquet")
    with pytest.raises(DataError, match=message):
        read_impressions(tmp_path / "p.parquet", SPEC, ["click", "watch_time_s"], "user")


def test_lists_by_a_column_that_is_not_there_are_refused(tmp_path: Path) -> None:
    logged().write_parquet(tmp_path / "p.parquet")
    with pytest.raises(DataError, match="no column session"):
        read_impressions(tmp_path / "p.parquet", SPEC, ["click", "watch_time_s"], "session")


def test_unreadable_or_empty_files_are_refused(tmp_path: Path) -> None:
    objectives = ["click", "watch_time_s"]
    with pytest.raises(DataError, match=r"no predictions file .*'funnel batch-score' writes one"):
        read_impressions(tmp_path / "no.parquet", SPEC, objectives, "user")
    (tmp_path / "text.parquet").write_text("user_id,click\n")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_impressions(tmp_path / "text.parquet", SPEC, objectives, "user")
    logged().head(0).write_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="has no rows"):
        read_impressions(tmp_path / "empty.parquet", SPEC, objectives, "user")


def test_objective_without_any_label_is_refused() -> None:
    rows = impressions([[1.0, 0.0], [0.0, 1.0]], [[1.0, NAN], [0.0, NAN]])
    with pytest.raises(DataError, match="objective watch_time_s: column watch_time_s has no value"):
        trade_off(rows, [CLICK, WATCH], SPEC.tasks, [], top=2)


def test_table_shows_the_present_weights_the_given_ones_and_the_front() -> None:
    rows = impressions([[1.0, 0.0], [0.0, 1.0]] * 2, [[1.0, 5.0], [0.0, 9.0]] * 2, [0, 0, 1, 1])
    front = {"click": 0.0, "watch_time": 1.0}
    worse = {"click": 0.0, "watch_time": 0.0}
    candidates = [(SAMPLED, front), (SAMPLED, worse), (GIVEN, {**worse, "click": 2.0})]
    result = trade_off(rows, [CLICK, WATCH], SPEC.tasks, candidates, top=1)
    # The tied order is between the two; nothing is dominated by a point that is better in one alone.
    assert [p.is_dominated for p in result.points] == [False, False, False, False]
    table = trade_off_table(result)
    assert [str(column.header) for column in table.columns] == [
        "",
        "click",
        "watch_time",
        "click ↑",
        "watch_time_s ↑",
    ]
    cells = [list(column.cells) for column in table.columns]
    assert sorted(cells[0]) == ["", "", "given", "now"]
    assert cells[3][cells[0].index("now")] == "1"
    assert cells[4] == ["5", "5  +0", "7  +2", "9  +4"]


def test_files_hold_every_point_and_the_same_points_give_the_same_bytes(
    tmp_path: Path, predictions_file: Path
) -> None:
    rows, objectives = read_impressions(predictions_file, SPEC, ["click", "watch_time_s"], "user")
    sampled = [(SAMPLED, w) for w in sample_weights(SPEC.tasks, rows, 6)]
    result = trade_off(rows, objectives, SPEC.tasks, sampled, top=3)
    write_json(result, tmp_path / "deep" / "o.json")
    values = json.loads((tmp_path / "deep" / "o.json").read_text())
    assert values["caveat"] == module.CAVEAT and "not a counterfactual" in module.CAVEAT
    assert len(values["points"]) == len(result.points) == 1 + len(sampled)
    assert values["points"][0]["kind"] == PRESENT
    assert values["points"][2]["values"]["click"] == result.points[2].values["click"]
    for suffix in module.PLOT_SUFFIXES:
        for name in ("one", "two"):
            write_plot(result, tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    text = (tmp_path / "one.svg").read_text()
    assert "not a counterfactual estimate" in text and "present weights" in text
    assert not list(tmp_path.rglob("*.partial"))


def test_a_single_list_has_no_interval_and_json_says_null(tmp_path: Path) -> None:
    rows = impressions([[1.0, 0.0], [0.0, 1.0]], [[1.0, 5.0], [0.0, 9.0]])
    result = trade_off(rows, [CLICK, WATCH], SPEC.tasks, [], top=1)
    write_json(result, tmp_path / "o.json")
    assert json.loads((tmp_path / "o.json").read_text())["points"][0]["intervals"]["click"] is None


def test_a_quarter_of_a_million_rows_are_re_ranked_in_a_fraction_of_a_second() -> None:
    rng = np.random.default_rng(2)
    lists = np.sort(rng.integers(0, 20_000, 250_000))
    lists = np.unique(lists, return_inverse=True)[1]
    rows = Impressions(rng.random((250_000, 4)), rng.random((250_000, 2)), lists, 0)
    started = time.process_time()
    list_means(rows, np.array([1.0, 2.0, 0.5, 0.1]), 10)
    # About .08 s; 50 choices of weights have 20 s.
    assert time.process_time() - started < 0.4


def funnel(*args: str | Path) -> Result:
    result = CliRunner().invoke(main, ["score-weights", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    gates = [
        {"metric": "retrieval/recall_at_100", "min": 0.1},
        {"metric": "ranking/click/auc", "min": 0.5},
    ]
    path.write_text(json.dumps({"dataset": SPEC.model_dump(mode="json"), "gates": gates}))
    return path


def test_command_prints_the_front_marks_the_present_weights_and_says_what_it_is_not(
    predictions_file: Path, run_yaml: Path, tmp_path: Path
) -> None:
    result = funnel(
        *("--predictions", predictions_file, "--dataset", run_yaml, "--points", "8", "--top", "3"),
        *("--objective", "click", "--objective", "watch_time_s", "--weights", "click=3"),
        *("--json", tmp_path / "o.json", "--plot", tmp_path / "o.svg"),
    )
    assert result.exit_code == 0, result.output
    assert "4,000 impressions in 400 lists by user" in result.output
    assert "now: score = 1 × click + 0.02 × watch_time [s]" in result.output
    assert "not a counterfactual estimate" in result.output
    assert "│ now " in result.output and "│ given " in result.output
    values = json.loads((tmp_path / "o.json").read_text())
    assert values["points"][1]["weights"] == {"click": 3.0, "watch_time": 0.02}
    assert f"→ {tmp_path / 'o.svg'}" in result.output
    assert (tmp_path / "o.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        pytest.param(["--objective", "click"], 2, "at least two different ones", id="one-objective"),
        pytest.param(["--weights", "clik=1"], 2, "no task 'clik'", id="unknown-task"),
        pytest.param(["--weights", "click=-1"], 2, "click is -1, expected 0 or more", id="negative"),
        pytest.param(["--weights", "click=nan"], 2, "give a finite number", id="nan"),
        pytest.param(["--plot", "plot.gif"], 2, "must end in one of .svg, .png", id="plot"),
        pytest.param(["--points", "1"], 2, "1 points for 2 tasks", id="points"),
        pytest.param(["--list-by", "session"], 1, "no column session", id="list-by"),
        pytest.param(["--dataset", "netflix"], 2, "unknown dataset 'netflix'", id="dataset"),
    ],
)
def test_wrong_usage_is_told_in_words(
    predictions_file: Path, run_yaml: Path, args: list[str], code: int, message: str
) -> None:
    objectives = [] if "--objective" in args else ["--objective", "click", "--objective", "watch_time_s"]
    result = funnel("--predictions", predictions_file, "--dataset", run_yaml, *objectives, *args)
    assert result.exit_code == code
    assert message in " ".join(result.output.split())
