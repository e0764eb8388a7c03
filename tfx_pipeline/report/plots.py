"""Plots as inline SVG, drawn by Matplotlib, coloured by the page; the same input gives the same bytes."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from tfx_pipeline.report import formatting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that Matplotlib writes and the page replaces, so that one plot is right in light and in dark.
_INK = "#010101"
_GRID = "#020202"
_PAPER = "#020203"
_SERIES = ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306", "#030307", "#030308")
_VARIABLES = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    _PAPER: "var(--card)",
    **{color: f"var(--series-{i})" for i, color in enumerate(_SERIES, 1)},
}
# Series differ in more than colour.
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)), (0, (3, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---")
_WIDTH_INCHES = 9.2
_PANEL_HEIGHT_INCHES = 3.1
_ROW_HEIGHT_INCHES = 0.35
_MOST_TICKS = 10
_MOST_COLUMNS = 3
# Of a legend that all panels share.
_LEGEND_COLUMNS = 7

_STYLE = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes with lines.

    Attributes:
      title: what is drawn.
      xlabel: what runs along the horizontal axis.
      x: positions, shared by all lines.
      lines: label -> values; None leaves a gap.
      marks: words -> a position on the horizontal axis, marked by a line.
      bands: label of a line -> lower and upper bounds, drawn as a band around it.
      x_labels: what stands at the positions; the numbers themselves when empty.
      diagonal: draws where y equals x, for plots of predictions against outcomes.
      is_logarithmic: of the horizontal axis.
      is_histogram: draws steps instead of dots joined by lines.
      is_scattered: draws dots that no line joins.
      y_limits: ends of the vertical axis; the values decide when None.
    """

    title: str
    xlabel: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bands: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]] = dataclasses.field(
        default_factory=dict
    )
    x_labels: Sequence[str] = ()
    diagonal: bool = False
    is_logarithmic: bool = False
    is_histogram: bool = False
    is_scattered: bool = False
    y_limits: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class _Reading:
    """The values at one place of a plot, for who points at it; coordinates of the viewBox.

    Attributes:
      x, y: where the values are shown.
      ends: x1, y1, x2, y2 of the line that marks the place; x1 <= x2, y1 <= y2.
      title: the name of the place.
      values: (series, value as text).
    """

    x: float
    y: float
    ends: tuple[float, float, float, float]
    title: str
    values: tuple[tuple[str, str], ...]


def line_plot(name: str, alt: str, panels: Sequence[Panel]) -> Markup:
    """Panels side by side.

    Args:
      name: unique in the page; becomes part of the ids inside the SVG.
      alt: what a reader who cannot see the plot should know.
      panels: at least one.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _subplots(len(panels), _PANEL_HEIGHT_INCHES)
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel)
        if len(panels) > 1 and len({frozenset((*panel.lines, *panel.marks)) for panel in panels}) == 1:
            figure.legend(
                *axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=_LEGEND_COLUMNS
            )
        else:
            for axis in axes:
                _legend_below(figure, axis, columns=2 if len(panels) > 1 else 4)
        _lay_out(figure)
        readings = [
            reading
            for axis, panel in zip(axes, panels, strict=True)
            for reading in _panel_readings(figure, axis, panel)
        ]
        return _svg(figure, name, alt, readings)


def _draw_panel(axis: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    for place, (label, values) in enumerate(panel.lines.items()):
        style = _line_style(place)
        if panel.is_histogram:
            style |= {"drawstyle": "steps-mid", "marker": ""}
        if panel.is_scattered:
            style |= {"linestyle": "none", "markersize": 6}
        if label in panel.bands:
            low, high = map(_with_gaps, panel.bands[label])
            axis.fill_between(panel.x, low, high, color=style["color"], alpha=0.16, linewidth=0)
        axis.plot(panel.x, _with_gaps(values), label=label, **style)
    axis.set(title=panel.title, xlabel=panel.xlabel)
    if panel.is_logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
    if panel.x_labels or panel.is_logarithmic:
        shown = range(0, len(panel.x), max(1, math.ceil(len(panel.x) / _MOST_TICKS)))
        axis.xaxis.set_major_locator(FixedLocator([panel.x[i] for i in shown]))
        labels = panel.x_labels or [formatting.number(x) for x in panel.x]
        axis.set_xticklabels([labels[i] for i in shown])
    elif all(float(x).is_integer() for x in panel.x):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(y=0.12)
    if panel.y_limits is not None:
        axis.set_ylim(panel.y_limits)
    if panel.diagonal:
        axis.axline((0, 0), slope=1, color=_INK, linewidth=0.9, linestyle=(0, (2, 2)), label="perfect")
    for (text, x), dashes in zip(panel.marks.items(), ((2, 2), (6, 2)), strict=False):
        axis.axvline(x, color=_INK, linewidth=0.9, linestyle=(0, dashes), label=text)


def _panel_readings(figure: Figure, axis: Axes, panel: Panel) -> list[_Reading]:
    box = axis.get_window_extent()
    top, bottom = figure.bbox.height - box.y1, figure.bbox.height - box.y0
    readings = []
    for place, x in enumerate(panel.x):
        values = []
        for label, line in panel.lines.items():
            text = formatting.decimal(line[place])
            if label in panel.bands and panel.bands[label][0][place] is not None:
                low, high = (formatting.decimal(bound[place]) for bound in panel.bands[label])
                text += f" ({low} to {high})"
            values.append((label, text))
        at = float(axis.transData.transform((x, 0))[0])
        name = panel.x_labels[place] if panel.x_labels else formatting.number(x)
        title = f"{panel.title}, {panel.xlabel} {name}" if panel.xlabel else f"{panel.title}, {name}"
        readings.append(_Reading(at, top, (at, top, at, bottom), title, tuple(values)))
    return readings


def dot_plot(
    name: str,
    alt: str,
    title: str,
    rows: Mapping[str, Mapping[str, float | None]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Markup:
    """Values as dots on one line per row, to compare models at a glance.

    Args:
      name, alt: as for `line_plot`.
      title: what is drawn.
      rows: label -> series -> value.
      intervals: label -> series -> lower and upper bound, drawn as a whisker through the dot.
    """
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, (axis,) = _subplots(1, 1.1 + _ROW_HEIGHT_INCHES * len(rows))
        series = list(dict.fromkeys(key for values in rows.values() for key in values))
        for place, key in enumerate(series):
            x = _with_gaps([values.get(key) for values in rows.values()])
            style = _line_style(place) | {"linestyle": "none", "markersize": 7 if place == 0 else 5.5}
            axis.plot(x, range(len(rows)), label=key, **style)
            for row, label in enumerate(rows):
                if (bounds := (intervals or {}).get(label, {}).get(key)) is not None:
                    axis.plot(bounds, (row, row), color=style["color"], linewidth=1.6, solid_capstyle="butt")
        axis.set(title=title, yticks=range(len(rows)), yticklabels=list(rows))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.spines.left.set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.05)
        _legend_below(figure, axis, columns=min(len(series), 5))
        _lay_out(figure)
        return _svg(figure, name, alt, _row_readings(figure, axis, rows, intervals or {}))


def _row_readings(
    figure: Figure,
    axis: Axes,
    rows: Mapping[str, Mapping[str, float | None]] | Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
) -> list[_Reading]:
    box = axis.get_window_extent()
    readings = []
    for place, (label, values) in enumerate(rows.items()):
        y = float(figure.bbox.height - axis.transData.transform((0, place))[1])
        texts = []
        for key, value in values.items():
            text = formatting.decimal(value)
            if (bounds := intervals.get(label, {}).get(key)) is not None:
                text += f" ({formatting.decimal(bounds[0])} to {formatting.decimal(bounds[1])})"
            texts.append((key, text))
        readings.append(_Reading(box.x0, y + 6, (box.x0, y, box.x1, y), label, tuple(texts)))
    return readings


def bar_plot(name: str, alt: str, title: str, rows: Mapping[str, Mapping[str, float]]) -> Markup:
    """Stacked bars, one per row.

    Args:
      name, alt: as for `line_plot`.
      title: what is drawn.
      rows: label -> series -> length of its part of the bar.
    """
    import matplotlib

    style = {**_STYLE, "axes.grid.axis": "x", "hatch.linewidth": 0.8}
    with matplotlib.rc_context(style):
        figure, (axis,) = _subplots(1, 1.3 + _ROW_HEIGHT_INCHES * len(rows))
        series = list(dict.fromkeys(key for values in rows.values() for key in values))
        starts = [0.0] * len(rows)
        for place, key in enumerate(series):
            lengths = [values.get(key, 0.0) for values in rows.values()]
            color, hatch = _SERIES[place % len(_SERIES)], _HATCHES[place % len(_HATCHES)]
            axis.barh(
                range(len(rows)),
                lengths,
                left=starts,
                height=0.62,
                label=key,
                facecolor=color,
                edgecolor=_PAPER,
                hatch=hatch,
                linewidth=0.8,
            )
            starts = [start + length for start, length in zip(starts, lengths, strict=True)]
        axis.set(title=title, yticks=range(len(rows)), yticklabels=list(rows), xlim=(0, max(starts)))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_axisbelow(True)
        axis.spines.left.set_visible(False)
        axis.tick_params(axis="y", length=0)
        _legend_below(figure, axis, columns=3)
        _lay_out(figure)
        return _svg(figure, name, alt, _row_readings(figure, axis, rows, {}))


def bars(values: Sequence[float], alt: str) -> Markup:
    """A histogram as small as a word."""
    if not values or not max(values) > 0:
        return Markup("")
    width, height, gap = 6, 22, 1
    shapes = []
    for place, value in enumerate(values):
        # A bar that is not empty can always be seen.
        tall = round(max(1.0, height * value / max(values)), 1) if value > 0 else 0
        shapes.append(
            f'<rect x="{place * (width + gap)}" y="{height - tall:g}" width="{width}" height="{tall:g}"/>'
        )
    total = len(values) * (width + gap) - gap
    return Markup(
        f'<svg class="bars" role="img" aria-label="{escape(alt)}" viewBox="0 0 {total} {height}" '
        f'width="{total}" height="{height}">{"".join(shapes)}</svg>'
    )


def _legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """Below the axes and their labels, where it covers nothing."""
    from matplotlib.transforms import offset_copy

    points = -34 if axis.get_xlabel() else -20
    below = offset_copy(axis.transAxes, fig=figure, y=points, units="points")
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0, ncols=columns)


def _subplots(count: int, height_inches: float) -> tuple[Figure, Sequence[Axes]]:
    """Up to three axes beside each other, further ones below; the height is that of one row."""
    # The object interface: no pyplot, so no backend is chosen and no figure is kept alive.
    from matplotlib.figure import Figure

    columns = min(count, _MOST_COLUMNS)
    rows = math.ceil(count / columns)
    # 72 dots per inch are the points of the SVG: what is measured here are coordinates there.
    size = (_WIDTH_INCHES, rows * height_inches)
    figure = Figure(figsize=size, layout="constrained", dpi=72)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _lay_out(figure: Figure) -> None:
    """Places everything, once: the readings are measured now, and drawing must not move it again."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _line_style(place: int) -> dict[str, Any]:
    place %= len(_SERIES)
    return {"color": _SERIES[place], "linestyle": _DASHES[place], "marker": _MARKERS[place]}


def _svg(figure: Figure, name: str, alt: str, readings: Sequence[_Reading] = ()) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        # Not savefig, which draws everything once more before, to lay it out.
        canvas: Any = FigureCanvasSVG(figure)  # Matplotlib's types stop here.
        canvas.print_svg(buffer, metadata=metadata)
    text = buffer.getvalue()
    opening = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', text)
    if opening is None:
        raise ValueError(
            "Matplotlib wrote an SVG without a viewBox; the tested version is in requirements.lock"
        )
    text = text[opening.end() :]
    # The page says what applies here: its own fonts, and no style sheet that reaches beyond the plot.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    # Several plots share a page: ids must not meet.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    data = f' data-readings="{escape(_readings_json(readings))}"' if readings else ""
    tag = f'<svg class="plot" role="img" aria-label="{escape(alt)}" viewBox="{opening.group(1)}"{data}>'
    return Markup(f"{tag}{text}")


def _readings_json(readings: Sequence[_Reading]) -> str:
    rounded = [
        {
            "x": round(reading.x, 1),
            "y": round(reading.y, 1),
            "ends": [round(end, 1) for end in reading.ends],
            "title": reading.title,
            "values": reading.values,
        }
        for reading in readings
    ]
    return json.dumps(rounded, ensure_ascii=False, separators=(",", ":"))
