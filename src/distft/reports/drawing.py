"""What all charts share: a drawing by matplotlib as SVG that a page puts in place. Its text is text, its ink the page's own."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = tuple(f"#0a0b{number:02x}" for number in range(7))
"""Stand in the drawing for the page's `--series-0` to `--series-6`, which are others on a dark ground than on a light one. Lines differ in
their dashes as well, points in their marks."""
INK, GRID = "#010203", "#010204"
"""Stand in the drawing for the page's `currentColor` and for its fainter lines."""
NAMED = 4
"""Curves, bars and points that a caption names; the table next to the chart lists all of them."""
LABEL = 22
"""Characters of a line of a bar's label, so that it leaves room for the bar."""
_STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9, "axes.edgecolor": GRID, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.linewidth": 0.5, "lines.linewidth": 1.6, "font.family": "sans-serif", "svg.hashsalt": "distft",
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A drawing, what it shows in words, and its figures as a table."""

    key: str
    title: str
    description: str
    svg: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def drawn(
    key: str, draw: Callable[[Axes], None], legend: Sequence[str], name: Callable[[Axes], None] | None = None, rows: int = 0
) -> str:  # fmt: skip
    """The drawing with a legend of so many entries; `name` writes names into it once all has its place. Its ids begin with `key`, for those of
    several drawings stand in one page. Of more than eight `rows` it is higher."""
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
        if name is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            name(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--faint)")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{number})")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", svg)
