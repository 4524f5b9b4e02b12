"""Draws a chart with matplotlib as inline SVG: its text stays text, and its colours are those of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.errors import MissingExtraError
from distft.reports.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = tuple(f"#0a0b{number:02x}" for number in range(7))
"""Placeholders for the page's `--series-0` to `--series-6`, which depend on the colour scheme. Lines also differ in
their dashes, points in their markers."""
INK, GRID = "#010203", "#010204"
"""Placeholders for the page's `currentColor` and for its fainter lines."""
LABEL = 22
"""Characters in a line of a bar's label, so that it leaves room for the bar."""
_STYLE: Any = {
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "distft",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Chart:
    """A drawing, what it shows in words, and its data as a table."""

    key: str
    title: str
    description: str
    svg: str
    table: Table


def draw_svg(
    key: str,
    draw: Callable[[Axes], None],
    legend: Sequence[str],
    label: Callable[[Axes], None] | None = None,
    rows: int = 0,
) -> str:
    """The drawing as an SVG element whose ids begin with `key`, because a page has several.

    `legend` has the entries of the legend, `label` adds labels once everything has its place, and `rows` is how many
    bars there are: with more than eight, the drawing gets taller.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("the charts of a report", "matplotlib", "report") from error
    columns = 2 if max(map(len, legend), default=0) <= LABEL + 4 else 1
    height = 2.7 + 0.17 * math.ceil(len(legend) / columns) + 0.2 * max(0, rows - 8)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if len(legend) > 1:
            figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
        if label is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            label(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--faint)")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{number})")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", svg)
