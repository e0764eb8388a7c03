"""What other score weights would do to the order of logged impressions: the trade-off between objectives.

Every list of impressions is re-ranked by Σ weight × prediction, and the labels that were logged are averaged
by their new ranks. Nothing is trained, and nothing is claimed about what users would have done: labels stay
those of the position and the company in which an item was shown.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from rich.table import Table

from schema.contract import DatasetSpec, TaskSpec
from schema.errors import ConfigError, DataError
from trainer.score import declared_weights, is_negative_feedback

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

CAVEAT = (
    "A re-ranking of logged impressions, not a counterfactual estimate: labels are those of the positions in "
    "which the items were shown, and items that were not shown are not there."
)
PRESENT = "present"
GIVEN = "given"
SAMPLED = "sampled"
LABEL_PREFIX = "label_"
PLOT_SUFFIXES = (".svg", ".png")

_USER = "user_id"
_EVENT_TIME = "event_time_unix_s"
_NOT_LABELS = frozenset({_USER, "item_id", _EVENT_TIME, "score"})
_DAY_S = 86_400
# 97.5 % of a normal distribution lie below it.
_NORMAL_QUANTILE = 1.96
_STEP_UP = 2.0
# Deviations smaller than this share of the largest prediction are rounding.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Objective:
    """A label to be served.

    Attributes:
      name: as it was asked for.
      column: where the predictions file has it.
      is_maximised: False for the label of negative feedback, of which less is better.
    """

    name: str
    column: str
    is_maximised: bool


@dataclasses.dataclass(frozen=True)
class Impressions:
    """Logged impressions in lists that can be re-ranked; rows of a list are neighbours.

    Attributes:
      predictions: float64 [n, T], one column per task in the order of the declaration.
      labels: float64 [n, O], one column per objective; NaN where missing.
      lists: int64 [n], 0 to L − 1, ascending.
      num_single: lists of one impression, which are left out: they have one order only.
    """

    predictions: FloatArray
    labels: FloatArray
    lists: npt.NDArray[np.int64]
    num_single: int

    @property
    def num_lists(self) -> int:
        """L."""
        return int(self.lists[-1]) + 1


@dataclasses.dataclass(frozen=True)
class Point:
    """What one choice of weights gives.

    Attributes:
      kind: PRESENT, GIVEN or SAMPLED.
      weights: by task.
      values: by objective: the mean over lists of the position-weighted mean label.
      differences: values less those of the present weights, over the lists that have both.
      intervals: half widths of the 95 % confidence intervals of the differences.
      is_dominated: whether another point is at least as good in every objective and better in one.
    """

    kind: str
    weights: dict[str, float]
    values: dict[str, float]
    differences: dict[str, float]
    intervals: dict[str, float]
    is_dominated: bool


@dataclasses.dataclass(frozen=True)
class TradeOff:
    """All points, the present weights first."""

    objectives: tuple[Objective, ...]
    points: tuple[Point, ...]
    num_impressions: int
    num_lists: int
    num_single: int
    top: int


def read_impressions(
    path: Path, spec: DatasetSpec, objectives: Sequence[str], list_by: str
) -> tuple[Impressions, list[Objective]]:
    """Reads the predictions of logged impressions.

    Args:
      path: Parquet, one row per impression; see docs/score.md for its columns.
      spec: tells the tasks, and the local time of the users.
      objectives: names of labels, stored as `label_<name>`, or as <name> unless a task has that name.
      list_by: what is ranked together: "user", "user-day" (local days), or a column's name.

    Raises:
      ConfigError: fewer than two objectives, or one twice.
      DataError: the file or a column is missing or has the wrong type, a prediction or a key is missing, or
        no list has two impressions.
    """
    if len(set(objectives)) < max(len(objectives), 2):
        raise ConfigError(
            f"objectives {', '.join(objectives) or 'none'}: give at least two different ones; "
            "a trade-off needs something to get and something to give for it"
        )
    try:
        schema = pl.read_parquet_schema(path)
    except FileNotFoundError as error:
        raise DataError(f"no predictions file {path}; 'funnel batch-score' writes one") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    tasks = [task.name for task in spec.tasks]
    keys = {"user": [_USER], "user-day": [_USER, _EVENT_TIME]}.get(list_by, [list_by])
    missing = [name for name in (*keys, *tasks) if name not in schema]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; expected {', '.join(keys)} and the predictions of "
            f"every task of {spec.name} ({', '.join(tasks)}), as 'funnel batch-score' writes them; "
            f"it has: {', '.join(schema)}"
        )
    found = [_objective(name, list(schema), spec, path) for name in objectives]
    table = pl.read_parquet(path, columns=list(dict.fromkeys((*keys, *tasks, *(o.column for o in found)))))
    if table.is_empty():
        raise DataError(f"{path} has no rows")
    for key in keys:
        if table[key].null_count():
            raise DataError(
                f"{path}: {key} is missing in {table[key].null_count():,} rows; fill or drop them"
            )
    predictions = _numbers(table, tasks, path)
    wrong = ~np.isfinite(predictions)
    if wrong.any():
        raise DataError(
            f"{path}: {np.count_nonzero(wrong):,} predictions are missing or not finite, the first of task "
            f"{tasks[int(np.argwhere(wrong)[0][1])]}; score the rows again or drop them"
        )
    codes = table[keys[0]].rank("dense").to_numpy().astype(np.int64)
    if list_by == "user-day":
        local_s = _numbers(table, [_EVENT_TIME], path)[:, 0] + 3600 * spec.utc_offset_hours
        days = np.floor(local_s / _DAY_S).astype(np.int64)
        codes = codes * (days.max() - days.min() + 1) + days - days.min()
    labels = _numbers(table, [o.column for o in found], path)
    if np.isinf(labels).any():
        raise DataError(
            f"{path}: {np.count_nonzero(np.isinf(labels)):,} labels are infinite; drop these rows"
        )
    return _in_lists(predictions, labels, codes, path, list_by), found


def _objective(name: str, columns: Sequence[str], spec: DatasetSpec, path: Path) -> Objective:
    taken = {task.name for task in spec.tasks} | _NOT_LABELS
    column = f"{LABEL_PREFIX}{name}" if f"{LABEL_PREFIX}{name}" in columns else name
    if column not in columns or column in taken:
        labels = [c.removeprefix(LABEL_PREFIX) for c in columns if c not in taken]
        expected = f"{LABEL_PREFIX}{name}" + (f" ({name} is no label)" if name in taken else f" or {name}")
        raise DataError(
            f"{path} has no label column for objective {name!r}: expected {expected}; its labels: "
            f"{', '.join(labels) or 'none'}"
        )
    weights = [task.score_weight for task in spec.tasks if task.label == name]
    return Objective(name, column, is_maximised=not weights or max(weights) >= 0)


def _numbers(table: pl.DataFrame, columns: Sequence[str], path: Path) -> FloatArray:
    """float64 [n, columns]; null becomes NaN."""
    for name in columns:
        if not (table[name].dtype.is_numeric() or table[name].dtype == pl.Boolean):
            raise DataError(f"{path}: column {name} is {table[name].dtype}; numbers were expected")
    return table.select(pl.col(name).cast(pl.Float64) for name in columns).to_numpy()


def _in_lists(
    predictions: FloatArray, labels: FloatArray, codes: npt.NDArray[np.int64], path: Path, list_by: str
) -> Impressions:
    _, place, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(sizes[place] > 1)
    if not len(kept):
        raise DataError(
            f"{path}: none of {len(sizes):,} lists by {list_by} has two impressions, so that no weights "
            "change an order; choose another --list-by"
        )
    order = kept[np.argsort(place[kept], kind="stable")]
    lists = np.unique(place[order], return_inverse=True)[1]
    num_single = int(np.count_nonzero(sizes == 1))
    return Impressions(predictions[order], labels[order], lists.astype(np.int64), num_single)


def sample_weights(
    tasks: Sequence[TaskSpec], impressions: Impressions, num_points: int
) -> list[dict[str, float]]:
    """Weights to try: those near the present ones, then all mixtures of an even lattice.

    Near: one task's weight halved or doubled. Lattice: shares i / m of each task, i whole, Σ = 1 (simplex
    lattice; Scheffé, JRSS B 1958, 20(2), 344-360), with the largest m for which all fit into
    `num_points`. A share is of what orders a list: weight = share / (standard deviation of the task's
    predictions within lists), times what makes the total that of the present weights. Negative feedback keeps
    its sign.

    Args:
      tasks: declared, at least two.
      impressions: whose predictions are to be weighted.
      num_points: at most so many; at least T.

    Returns:
      Weights by task; deterministic.

    Raises:
      ConfigError: fewer than two tasks, or fewer points than tasks.
      DataError: the predictions of a task are the same throughout every list.
    """
    if len(tasks) < 2:
        raise ConfigError(f"the dataset declares one task, {tasks[0].name}; a trade-off needs two or more")
    if num_points < len(tasks):
        raise ConfigError(f"{num_points} points for {len(tasks)} tasks; give at least one per task")
    spread = _spread_within_lists(impressions)
    for task, deviation, size in zip(tasks, spread, np.abs(impressions.predictions).max(axis=0), strict=True):
        if deviation <= _ROUNDING * size:
            raise DataError(
                f"the predictions of task {task.name} are the same throughout every list, so that it cannot "
                "rank; check the model, or choose another --list-by"
            )
    present = np.array([task.score_weight for task in tasks])
    near = []
    for place in np.flatnonzero(present):
        for factor in (1 / _STEP_UP, _STEP_UP):
            near.append(present * np.where(np.arange(len(tasks)) == place, factor, 1.0))
    # The lattice has the corners, which show what is possible at all; they come before the neighbours.
    near = near[: max(num_points - len(tasks), 0)]
    room, steps = num_points - len(near), 1
    while math.comb(steps + len(tasks), len(tasks) - 1) <= room:
        steps += 1
    signs = np.array([-1.0 if is_negative_feedback(task) else 1.0 for task in tasks])
    total = float(np.abs(present) @ spread) or 1.0
    lattice = [total * signs * shares / spread for shares in _lattice(len(tasks), steps)]
    names = [task.name for task in tasks]
    return [dict(zip(names, weights.tolist(), strict=True)) for weights in (*near, *lattice)]


def _spread_within_lists(impressions: Impressions) -> FloatArray:
    """Standard deviation of the predictions from the mean of their list, [T]."""
    starts = np.flatnonzero(np.diff(impressions.lists, prepend=-1))
    sizes = np.diff(starts, append=len(impressions.lists))[:, np.newaxis]
    means = np.add.reduceat(impressions.predictions, starts, axis=0) / sizes
    return np.asarray((impressions.predictions - means[impressions.lists]).std(axis=0))


def _lattice(size: int, steps: int) -> list[FloatArray]:
    """All [size] of whole multiples of 1 / steps that sum to 1."""
    # Stars and bars: places of the bars among steps + size - 1 symbols.
    points = []
    for bars in itertools.combinations(range(steps + size - 1), size - 1):
        points.append(np.diff([-1, *bars, steps + size - 1]) - 1)
    return [point / steps for point in points]


def list_means(impressions: Impressions, weights: FloatArray, top: int) -> FloatArray:
    """Position-weighted mean label of each list, re-ranked by the score.

    Formula: Σ_r d_r y_r / Σ_r d_r over the rows with a label, d_r = 1 / log2(r + 1) for ranks r <= top, else
    0: the discounted cumulative gain of Järvelin and Kekäläinen (TOIS 2002, doi:10.1145/582415.582418), as a
    mean in the unit of the label. Rows of equal score share the mean of their discounts, so that the order of
    the file, which may be that of the log, plays no part.

    Args:
      impressions: n rows in L lists.
      weights: float64 [T].
      top: ranks that count.

    Returns:
      float64 [L, O]; NaN where no row that counts has a label.
    """
    score = impressions.predictions @ weights
    order = np.lexsort((-score, impressions.lists))
    score, lists = score[order], impressions.lists
    new_list = np.diff(lists, prepend=-1) != 0
    starts = np.flatnonzero(new_list)
    rank = np.arange(len(lists)) - starts[lists] + 1
    discount = np.where(rank <= top, 1.0 / np.log2(rank + 1), 0.0)

    new_tie = new_list | (np.diff(score, prepend=np.nan) != 0)
    tie_starts = np.flatnonzero(new_tie)
    tie_means = np.add.reduceat(discount, tie_starts) / np.diff(tie_starts, append=len(score))
    discount = tie_means[np.cumsum(new_tie) - 1][:, np.newaxis]

    labels = impressions.labels[order]
    known = ~np.isnan(labels)
    total = np.add.reduceat(np.where(known, discount * np.nan_to_num(labels), 0.0), starts, axis=0)
    mass = np.add.reduceat(np.where(known, discount, 0.0), starts, axis=0)
    means = np.full(total.shape, np.nan)
    np.divide(total, mass, out=means, where=mass > 0)
    return means


def non_dominated(values: FloatArray) -> BoolArray:
    """Points that no other is at least as good as in every column and better in one.

    Args:
      values: float64 [P, O], more is better.

    Returns:
      bool [P]; equal points stand or fall together.
    """
    at_least = (values[:, np.newaxis] >= values).all(axis=-1)
    better = (values[:, np.newaxis] > values).any(axis=-1)
    return np.asarray(~(at_least & better).any(axis=0))


def trade_off(
    impressions: Impressions,
    objectives: Sequence[Objective],
    tasks: Sequence[TaskSpec],
    candidates: Sequence[tuple[str, Mapping[str, float]]],
    top: int,
) -> TradeOff:
    """Measures the present weights and others.

    Args:
      impressions: what is re-ranked.
      objectives: one per column of the labels.
      tasks: declared; their weights are the present ones.
      candidates: (GIVEN or SAMPLED, weights by task).
      top: ranks that count.

    Raises:
      DataError: an objective has no label among the ranks that count.
    """
    choices = [(PRESENT, declared_weights(tasks)), *candidates]
    means = [
        list_means(impressions, np.array([weights[task.name] for task in tasks]), top)
        for _, weights in choices
    ]
    for place, objective in enumerate(objectives):
        if any(np.isnan(point[:, place]).all() for point in means):
            raise DataError(
                f"objective {objective.name}: column {objective.column} has no value in the first {top} "
                "ranks of any list; check the labels, or raise --top"
            )
    values = np.array([np.nanmean(point, axis=0) for point in means])
    signs = np.array([1.0 if objective.is_maximised else -1.0 for objective in objectives])
    kept = non_dominated(values * signs)
    names = [objective.name for objective in objectives]
    points = []
    for (kind, weights), point, value, is_kept in zip(choices, means, values, kept, strict=True):
        difference, interval = _paired(point - means[0])
        points.append(
            Point(
                kind,
                dict(weights),
                dict(zip(names, value.tolist(), strict=True)),
                dict(zip(names, difference.tolist(), strict=True)),
                dict(zip(names, interval.tolist(), strict=True)),
                not is_kept,
            )
        )
    return TradeOff(
        tuple(objectives),
        tuple(points),
        len(impressions.lists),
        impressions.num_lists,
        impressions.num_single,
        top,
    )


def _paired(changes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and half width of its 95 % confidence interval, [O] each, over the lists without NaN; [L, O]."""
    counts = np.count_nonzero(~np.isnan(changes), axis=0)
    means = np.nansum(changes, axis=0) / np.where(counts, counts, np.nan)
    squares = np.nansum((changes - means) ** 2, axis=0)
    # One list says nothing about the spread over lists.
    variances = squares / np.where(counts > 1, counts - 1, np.nan)
    return means, _NORMAL_QUANTILE * np.sqrt(variances / np.where(counts, counts, np.nan))


def trade_off_table(result: TradeOff) -> Table:
    """The points that are not dominated, the present weights and those given, best first objective first.

    A cell of an objective holds its value, and the change against the present weights with its 95 %
    confidence interval.
    """
    first = result.objectives[0]
    shown = [p for p in result.points if not p.is_dominated or p.kind != SAMPLED]
    shown.sort(key=lambda p: p.values[first.name], reverse=first.is_maximised)
    tasks = list(result.points[0].weights)
    table = Table(title="weights and what they give", title_justify="left")
    table.add_column("", no_wrap=True)
    for task in tasks:
        table.add_column(task, justify="right", no_wrap=True)
    for objective in result.objectives:
        table.add_column(f"{objective.name} {'↑' if objective.is_maximised else '↓'}", no_wrap=True)
    for point in shown:
        name = {PRESENT: "now", GIVEN: "given"}.get(point.kind, "")
        cells = [f"{name}, dominated" if point.is_dominated else name]
        cells += [f"{point.weights[task]:.3g}" for task in tasks]
        for objective in result.objectives:
            cell = f"{point.values[objective.name]:.4g}"
            if point.kind != PRESENT:
                cell += f"  {_change(point.differences[objective.name], point.intervals[objective.name])}"
            cells.append(cell)
        table.add_row(*cells, style="bold" if point.kind == PRESENT else None)
    return table


def _change(difference: float, half_width: float) -> str:
    """A change to the two digits that its interval leaves."""
    if not half_width > 0:
        return f"{difference:+.2g}"
    decimals = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{difference:+.{decimals}f} ± {half_width:.{decimals}f}"


def write_json(result: TradeOff, path: Path) -> None:
    """All points and what they mean; undefined numbers are null. Written whole or not at all."""
    values = {"caveat": CAVEAT, **dataclasses.asdict(result)}
    text = json.dumps(_without_nan(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _write(path, text.encode())


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_plot_suffix(path: Path) -> None:
    """Raises ConfigError when a plot cannot be written in the format that the name asks for."""
    if path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"plot {path}: the name must end in one of {', '.join(PLOT_SUFFIXES)}")


def write_plot(result: TradeOff, path: Path) -> None:
    """Every point, the first objective against each of the others. Written whole or not at all.

    Args:
      result: what to draw.
      path: with one of `PLOT_SUFFIXES`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    first, *others = result.objectives
    # The object interface: no pyplot, so no backend is chosen and no figure is kept alive.
    figure = Figure(figsize=(1.0 + 4.6 * len(others), 4.8), layout="constrained")
    for axis, other in zip(figure.subplots(1, len(others), squeeze=False)[0], others, strict=True):
        for label, is_drawn, style in _MARKS:
            drawn = [p for p in result.points if is_drawn(p)]
            drawn.sort(key=lambda p: p.values[first.name])
            x, y = ([p.values[o.name] for p in drawn] for o in (first, other))
            # A line through points of more than two dimensions would join what is not next to each other.
            line = ":" if label == _FRONT and len(others) == 1 else ""
            axis.plot(x, y, label=label if drawn else None, linestyle=line, **style)
        axis.set(xlabel=_axis_label(first), ylabel=_axis_label(other))
        axis.grid(linewidth=0.5)
        axis.legend(frameon=False, fontsize=9)
    figure.suptitle(f"Score weights: mean label over the first {result.top} ranks", fontsize=11)
    figure.supxlabel(CAVEAT.replace("estimate: ", "estimate:\n").replace("shown, ", "shown,\n"), fontsize=8)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "score-weights", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata=_NO_DATE[path.suffix])
    _write(path, buffer.getvalue())


_FRONT = "not dominated"
_MARKS: tuple[tuple[str, Callable[[Point], bool], dict[str, Any]], ...] = (
    ("dominated", lambda p: p.is_dominated and p.kind == SAMPLED, {"marker": ".", "color": "0.7"}),
    (_FRONT, lambda p: not p.is_dominated, {"marker": "o", "color": "#1f5fbf"}),
    ("given", lambda p: p.kind == GIVEN, {"marker": "^", "ms": 9, "color": "#14803f"}),
    ("present weights", lambda p: p.kind == PRESENT, {"marker": "*", "ms": 14, "color": "#c05a00"}),
)
# The same points give the same bytes.
_NO_DATE: Mapping[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {}}


def _axis_label(objective: Objective) -> str:
    return objective.name if objective.is_maximised else f"{objective.name} (less is better)"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
