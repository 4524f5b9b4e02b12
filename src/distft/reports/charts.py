"""The charts of runs: curves of what they logged, where their time went, and memory against speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from distft.reports.bottleneck import Split
from distft.reports.drawing import COLOURS, INK, NAMED, Chart, drawn
from distft.reports.history import History
from distft.text import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_ROWS = 40
"""Of the table beside a chart; longer curves are thinned out in it."""
_LEGEND = 14
"""Points that a legend names; of more, those on the front stand out and are named in place."""


@dataclass(frozen=True)
class _Curves:
    """A chart of one figure of the records over another."""

    key: str
    title: str
    x: str
    x_title: str
    y: str
    y_title: str
    by_rank: str | None = None
    """Key of a list with the figure of each rank; `y` is drawn of runs that have none."""


_CURVES = (
    _Curves("loss_step", "Training loss by step", "step", "step", "loss", "loss, nats a token"),
    _Curves("loss_time", "Training loss by time", "time_s", "seconds of training", "loss", "loss, nats a token"),
    _Curves("eval_loss", "Evaluation loss", "step", "step", "eval_loss", "loss, nats a token"),
    _Curves("eval_perplexity", "Evaluation perplexity", "step", "step", "eval_perplexity", "perplexity"),
    _Curves("test_perplexity", "Held-out perplexity before and after", "step", "step", "test_perplexity", "perplexity"),
    _Curves("learning_rate", "Learning rate", "step", "step", "learning_rate", "learning rate"),
    _Curves("speed", "Speed", "time_s", "seconds of training", "samples_per_second", "samples/s"),
    _Curves("memory", "Peak memory so far, each rank", "time_s", "seconds of training", "peak_memory_gib", "GiB", "peak_memory_by_rank_gib"),
    _Curves("host_memory", "Host memory, each rank", "time_s", "seconds of training", "host_rss_gib", "GiB", "host_rss_by_rank_gib"),
)  # fmt: skip
_NO_METRIC = ("_runtime", "_per_second", "_num_tokens", "_preparation_time")
"""Endings of what a Trainer logs of an evaluation beside its figures."""
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def charts(
    histories: Sequence[History],
    speeds: Mapping[str, tuple[float, float]] | None = None,
    times: Mapping[str, Mapping[str, float]] | None = None,
    memory: str = "peak memory, GiB",
) -> list[Chart]:
    """Every chart that the histories have figures for; `speeds` gives the memory (GiB, which one says `memory`) and the speed (samples/s) of each variant, `times`
    the seconds of a whole run of it by their use.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    found = [_curves(chart, histories) for chart in (*_CURVES, *_metrics(histories))]
    splits = {
        variant: [Split.of_profile(each.profile) for each in histories if each.variant == variant and each.profile]
        for variant in dict.fromkeys(each.variant for each in histories)
    }
    steps = {variant: mean.seconds() for variant, of in splits.items() if (mean := Split.mean(of)) is not None}
    found += [
        _bars("time_split", "Where the time of a step goes", steps, "milliseconds a step", 1e3,
              "Of the steps under the profiler, on the rank that waits least for the others"),
        _bars("run_split", "Where the time of a run goes", times or {}, "seconds", 1.0,
              "Its steps as the profiled ones are split, at their speed without the profiler, and evaluation and saving"),
        _pareto(speeds or {}, memory),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def _curves(chart: _Curves, histories: Sequence[History]) -> Chart | None:
    known = [
        (history, rank, points)
        for history in histories
        for rank, curve in _by_rank(history, chart)
        if (points := _finite(curve))
    ]
    if not known:
        return None
    variants = list(dict.fromkeys(history.variant for history in histories))

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        named: set[str] = set()
        for history, _, points in known:
            number = variants.index(history.variant)
            label = None if history.variant in named else history.variant
            named.add(history.variant)
            axes.plot(
                *zip(*points, strict=True), label=label, color=COLOURS[number % len(COLOURS)], linestyle=_DASHES[number % len(_DASHES)],
                marker="o" if len(points) < 3 else None, markersize=4,
            )  # fmt: skip
        if chart.x == "step":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(chart.x_title)
        axes.set_ylabel(chart.y_title)

    names = [history.name + rank for history, rank, _ in known]
    ends = [
        f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}"
        for name, (*_, points) in zip(names, known, strict=True)
    ]
    rows = [
        (name, f"{x:,.6g}", f"{y:,.6g}")
        for name, (*_, points) in zip(names, known, strict=True)
        for x, y in _thinned(points)
    ]
    return Chart(
        chart.key, chart.title, f"{chart.y_title} over {chart.x_title}: {shorten(ends, NAMED, '; ')}.", drawn(chart.key, draw, variants),
        ("run", chart.x_title, chart.y_title), tuple(rows),
    )  # fmt: skip


def _metrics(histories: Iterable[History]) -> list[_Curves]:
    """A chart of each figure that somebody's own evaluation has logged."""
    known = {chart.y for chart in _CURVES}
    logged = dict.fromkeys(key for each in histories if each.source for record in each.records for key in record)
    keys = [key for key in logged if key.startswith("eval_") and key not in known and not key.endswith(_NO_METRIC)]
    return [
        _Curves(key, "Evaluation: " + (name := key.removeprefix("eval_").replace("_", " ")), "step", "step", key, name)
        for key in keys
    ]


def _by_rank(history: History, chart: _Curves) -> list[tuple[str, list[tuple[float, float]]]]:
    """What to call each curve of a run, behind its name, and its points."""
    key = chart.by_rank or ""
    listed = [
        (float(record[chart.x]), record[key]) for record in history.records if record.get(key) and chart.x in record
    ]
    if not listed:
        return [("", history.points(chart.x, chart.y))]
    ranks = range(max(len(figures) for _, figures in listed))
    return [
        (f", rank {rank}", [(x, float(figures[rank])) for x, figures in listed if rank < len(figures)]) for rank in ranks
    ]  # fmt: skip


def _bars(
    key: str, title: str, times: Mapping[str, Mapping[str, float]], unit: str, scale: float, told: str
) -> Chart | None:
    """Stacked bars, one a variant, of the seconds of each part."""
    if not times:
        return None
    parts = list(dict.fromkeys(part for bar in times.values() for part in bar))

    def draw(axes: Axes) -> None:
        axes.set_axisbelow(True)
        left = [0.0] * len(times)
        for number, part in enumerate(parts):
            values = [bar.get(part, 0.0) * scale for bar in times.values()]
            axes.barh(
                list(times), values, left=left, height=0.6, label=part, color=COLOURS[number % len(COLOURS)], hatch=_HATCHES[number % len(_HATCHES)],
            )  # fmt: skip
            left = [start + value for start, value in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel(unit)

    rows = tuple((name, *(f"{bar.get(part, 0.0) * scale:,.1f}" for part in parts)) for name, bar in times.items())
    largest = [
        f"{name} {part} {bar[part] / sum(bar.values()):.0%}"
        for name, bar in times.items()
        if sum(bar.values()) > 0 and (part := max(bar, key=lambda part: bar[part]))
    ]
    return Chart(key, title, f"{told}. The largest part of each: {shorten(largest, NAMED, '; ')}.", drawn(key, draw, parts, rows=len(times)),
                 ("variant", *(f"{part}, {unit}" for part in parts)), rows)  # fmt: skip


def _pareto(speeds: Mapping[str, tuple[float, float]], memory_title: str) -> Chart | None:
    """Memory against speed; the front are those that no other beats in both."""
    if len(speeds) < 2:
        return None
    front = {
        name: (memory, speed)
        for name, (memory, speed) in speeds.items()
        if not any(m <= memory and s >= speed and (m, s) != (memory, speed) for m, s in speeds.values())
    }
    legend = [*speeds] if len(speeds) <= _LEGEND else [*front, others := f"{len(speeds) - len(front)} others"]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*sorted(front.values()), strict=True), color=INK, linewidth=0.8, zorder=1)
        for place, (name, point) in enumerate(speeds.items()):
            plain = name not in legend
            number = legend.index(others if plain else name)
            axes.plot(
                *([value] for value in point), "." if plain else "os^vDPX"[(number + number // 7) % 7], linestyle="none", zorder=2,
                color=INK if plain else COLOURS[number % len(COLOURS)], markersize=3 if plain else 6, gid=f"point{place}",
                label=others if plain and others not in axes.get_legend_handles_labels()[1] else name if name in legend else None,
            )  # fmt: skip
        axes.set_xlabel(memory_title)
        axes.set_ylabel("samples/s")
        axes.set_ylim(bottom=0, top=1.12 * max(speed for _, speed in speeds.values()))
        axes.set_xlim(left=0, right=1.06 * max(memory for memory, _ in speeds.values()))

    rows = tuple(
        (name, f"{memory:,.2f}", f"{speed:,.2f}", "yes" if name in front else "no")
        for name, (memory, speed) in speeds.items()
    )
    svg = drawn("pareto", draw, legend, lambda axes: _name_points(axes, front, [*speeds.values()]))
    for place, name in enumerate(speeds):  # what a point is, on hovering
        svg = svg.replace(f'<g id="pareto-point{place}">', f"<g><title>{escape(name)}</title>")
    return Chart("pareto", "Memory against speed", f"No variant is both smaller and faster than {shorten(front, NAMED)}.", svg,
                 ("variant", memory_title, "samples/s", "on the front"), rows)  # fmt: skip


def _name_points(axes: Axes, named: Mapping[str, tuple[float, float]], points: Sequence[tuple[float, float]]) -> None:
    """A name beside each point of `named`, without the words that all begin with, where it lies inside the axes and over the fewest points; none
    where it would lie over another name."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(min(named), max(named), strict=False))
    shared = "".join(letter for letter, _ in alike).rfind("-") + 1 if len(named) > 1 else 0
    inside = axes.get_window_extent()
    marks = [tuple(axes.transData.transform(point)) for point in points]
    placed: list[Any] = []
    for name, point in sorted(named.items(), key=lambda item: item[1]):
        text, best = (
            axes.annotate(name[shared:], point, (0, 0), textcoords="offset points", fontsize=7, va="center"),
            None,
        )
        for rise, side in (
            (0, 1),
            (0, -1),
            (8, 1),
            (-8, 1),
            (8, -1),
            (-8, -1),
            (9, 0),
            (-9, 0),
            (17, 0),
            (-17, 0),
            (26, 0),
            (-26, 0),
        ):
            text.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
            text.set_position((7 * side, rise))
            box = text.get_window_extent()
            cut = (
                max(inside.x0 - box.x0, 0)
                + max(box.x1 - inside.x1, 0)
                + max(inside.y0 - box.y0, 0)
                + max(box.y1 - inside.y1, 0)
            )
            over = 99 * sum(box.overlaps(other) for other in placed) + sum(
                bool(box.padded(4).contains(*mark)) for mark in marks
            )
            if best is None or (cut, over) < best[0]:
                best = (cut, over), text.get_position(), text.get_horizontalalignment(), box
        assert best is not None
        if best[0][0] > 0 or best[0][1] >= 99:
            text.remove()
            continue
        text.set_position(best[1])
        text.set_horizontalalignment(best[2])
        placed.append(best[3])


def _finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if all(map(math.isfinite, point))]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, the first and the last among them."""
    if len(points) <= _ROWS:
        return list(points)
    return [points[round(number * (len(points) - 1) / (_ROWS - 1))] for number in range(_ROWS)]
