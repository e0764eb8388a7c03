"""Plots as inline SVG, drawn by Matplotlib, coloured by the page; the same input gives the same bytes."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that Matplotlib writes and the page replaces, so that one plot is right in light and in dark.
_INK = "#010101"
_GRID = "#020202"
_SERIES = ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306")
_VARIABLES = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    **{color: f"var(--series-{i})" for i, color in enumerate(_SERIES, 1)},
}
# Series differ in more than colour.
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_WIDTH_INCHES = 9.2
_PANEL_HEIGHT_INCHES = 3.1
_ROW_HEIGHT_INCHES = 0.35

_STYLE = {
    "svg.fonttype": "none",
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
      marked_x: a position to mark, and the words beside it.
    """

    title: str
    xlabel: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]
    marked_x: tuple[float, str] | None = None


def line_plot(name: str, alt: str, panels: Sequence[Panel]) -> Markup:
    """Panels side by side.

    Args:
      name: unique in the page; becomes part of the ids inside the SVG.
      alt: what a reader who cannot see the plot should know.
      panels: at least one.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_STYLE):
        figure, axes = _subplots(len(panels), _PANEL_HEIGHT_INCHES)
        for axis, panel in zip(axes, panels, strict=True):
            for place, (label, values) in enumerate(panel.lines.items()):
                axis.plot(panel.x, _with_gaps(values), label=label, **_line_style(place))
            axis.set(title=panel.title, xlabel=panel.xlabel)
            if all(float(x).is_integer() for x in panel.x):
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.margins(y=0.12)
            if panel.marked_x is not None:
                x, text = panel.marked_x
                axis.axvline(x, color=_INK, linewidth=0.9, linestyle=(0, (2, 2)), label=text)
            _legend_below(figure, axis, columns=2 if len(panels) > 1 else 4)
        return _svg(figure, name, alt)


def dot_plot(name: str, alt: str, title: str, rows: Mapping[str, Mapping[str, float | None]]) -> Markup:
    """Values as dots on one line per row, to compare models at a glance.

    Args:
      name, alt: as for `line_plot`.
      title: what is drawn.
      rows: label -> series -> value.
    """
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, (axis,) = _subplots(1, 1.1 + _ROW_HEIGHT_INCHES * len(rows))
        series = list(dict.fromkeys(key for values in rows.values() for key in values))
        for place, key in enumerate(series):
            x = _with_gaps([values.get(key) for values in rows.values()])
            style = _line_style(place) | {"linestyle": "none", "markersize": 7 if place == 0 else 5.5}
            axis.plot(x, range(len(rows)), label=key, **style)
        axis.set(title=title, yticks=range(len(rows)), yticklabels=list(rows))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.spines.left.set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.05)
        _legend_below(figure, axis, columns=len(series))
        return _svg(figure, name, alt)


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
    # The object interface: no pyplot, so no backend is chosen and no figure is kept alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _line_style(place: int) -> dict[str, Any]:
    place %= len(_SERIES)
    return {"color": _SERIES[place], "linestyle": _DASHES[place], "marker": _MARKERS[place]}


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
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
    tag = f'<svg class="plot" role="img" aria-label="{escape(alt)}" viewBox="{opening.group(1)}">'
    return Markup(f"{tag}{text}")
