"""The charts of a report: curves of what runs logged, where their time went, and memory against speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from distft.reports.bottleneck import Split
from distft.reports.drawing import COLOURS, INK, Chart, draw_svg
from distft.reports.history import History, other_metrics
from distft.reports.tables import Cell, Column, Table, written
from distft.text import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAPTIONED = 4
"""How many curves, bars or points a caption names; the table under the chart has all."""
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
_MARKERS = "os^vDPX"
_ROWS = 40
"""Rows of the table under a chart; longer curves are thinned out in it."""
_LEGEND = 14
"""How many points a legend names. If there are more, those on the front are highlighted and labelled in place."""
_SIDES = ((0, 1), (0, -1), (8, 1), (-8, 1), (8, -1), (-8, -1), (9, 0), (-9, 0), (17, 0), (-17, 0), (26, 0), (-26, 0))
"""Where a label may go, the preferred place first: points above its mark, and to the right (1), left (-1) or centred
(0)."""


@dataclass(frozen=True)
class _Curves:
    """A chart of one logged value over another."""

    key: str
    title: str
    x: str
    x_title: str
    y: str
    y_title: str
    by_rank: str = ""
    """The key of a list with one value per rank; `y` is drawn for runs that lack it."""


_NATS = "loss, nats/token"
_STEP = ("step", "step")
_TIME = ("time_s", "training time, s")
_CURVES = (
    _Curves("loss_step", "Training loss by step", *_STEP, "loss", _NATS),
    _Curves("loss_time", "Training loss by time", *_TIME, "loss", _NATS),
    _Curves("eval_loss", "Evaluation loss", *_STEP, "eval_loss", _NATS),
    _Curves("eval_perplexity", "Evaluation perplexity", *_STEP, "eval_perplexity", "perplexity"),
    _Curves("test_perplexity", "Held-out perplexity before and after", *_STEP, "test_perplexity", "perplexity"),
    _Curves(
        "reward_margin", "Reward margin of chosen over rejected answers", *_STEP, "rewards/margins", "reward margin"
    ),
    _Curves("reward_accuracy", "Reward accuracy", *_STEP, "rewards/accuracies", "share of pairs"),
    _Curves("eval_reward_margin", "Evaluation: reward margin", *_STEP, "eval_rewards/margins", "reward margin"),
    _Curves("eval_reward_accuracy", "Evaluation: reward accuracy", *_STEP, "eval_rewards/accuracies", "share of pairs"),
    _Curves("kl", "KL to the reference on the data's tokens", *_STEP, "kl_per_token", "KL, nats/token"),
    _Curves("learning_rate", "Learning rate", *_STEP, "learning_rate", "learning rate"),
    _Curves("speed", "Speed", *_TIME, "samples_per_second", "samples/s"),
    _Curves("memory", "Peak memory so far, by rank", *_TIME, "peak_memory_gib", "GiB", "peak_memory_by_rank_gib"),
    _Curves("host_memory", "Host memory, by rank", *_TIME, "host_rss_gib", "GiB", "host_rss_by_rank_gib"),
)


def charts(
    histories: Sequence[History],
    speeds: Mapping[str, tuple[float, float]] | None = None,
    times: Mapping[str, Mapping[str, float]] | None = None,
    memory_title: str = "peak memory, GiB",
) -> list[Chart]:
    """Every chart that there is data for.

    `speeds` maps each variant to its memory (GiB, described by `memory_title`) and its speed (samples/s), `times` each
    variant to how a whole run spends its time, in seconds.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    curves: list[_Curves] = [*_CURVES, *_metrics(histories)]
    if any("rewards/margins" in record for history in histories for record in history.records):  # not of tokens
        curves = [replace(chart, y_title="loss") if chart.y_title == _NATS else chart for chart in curves]
    found = [_curves(chart, histories) for chart in curves]
    splits = {
        variant: [Split.of_profile(each.profile) for each in histories if each.variant == variant and each.profile]
        for variant in dict.fromkeys(each.variant for each in histories)
    }
    steps = {variant: mean.seconds() for variant, of in splits.items() if (mean := Split.mean(of)) is not None}
    found += [_step_split(steps), _run_split(times or {}), _pareto(speeds or {}, memory_title)]
    return [chart for chart in found if chart is not None]


# Curves ---------------------------------------------------------------------------------------------------------------


def _curves(chart: _Curves, histories: Sequence[History]) -> Chart | None:
    found = [(history, rank, curve) for history in histories for rank, curve in _by_rank(history, chart)]
    known = [(history, rank, points) for history, rank, curve in found if (points := _finite(curve))]
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
                *zip(*points, strict=True),
                label=label,
                color=COLOURS[number % len(COLOURS)],
                linestyle=_DASHES[number % len(_DASHES)],
                marker="o" if len(points) < 3 else None,
                markersize=4,
            )
        if chart.x == "step":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(chart.x_title)
        axes.set_ylabel(chart.y_title)

    curves = [(history.name + rank, curve) for history, rank, curve in found if curve]
    ends = [f"{name} from {written(curve[0][1], '.4g')} to {written(curve[-1][1], '.4g')}" for name, curve in curves]
    columns = (Column("run", "name"), *(Column(title, format=",.6g") for title in (chart.x_title, chart.y_title)))
    rows = tuple((name, x, y) for name, curve in curves for x, y in _thinned(curve))
    description = f"{chart.y_title} over {chart.x_title}: {shorten(ends, CAPTIONED, '; ')}."
    return Chart(chart.key, chart.title, description, draw_svg(chart.key, draw, variants), Table(columns, rows))


def _metrics(histories: Iterable[History]) -> list[_Curves]:
    """A chart for each metric of an evaluation that another program logged."""
    names = {key: key.removeprefix("eval_").replace("_", " ") for key in other_metrics(histories)}
    return [_Curves(key, f"Evaluation: {name}", *_STEP, key, name) for key, name in names.items()]


def _by_rank(history: History, chart: _Curves) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """The curves of a run: a suffix for its name, and the points."""
    records = [record for record in history.records if chart.x in record and record.get(chart.by_rank)]
    if not records:
        yield "", history.points(chart.x, chart.y)
        return
    listed = [(float(record[chart.x]), record[chart.by_rank]) for record in records]
    for rank in range(max(len(values) for _, values in listed)):
        yield f", rank {rank}", [(x, float(values[rank])) for x, values in listed if rank < len(values)]


def _finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if all(map(math.isfinite, point))]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _ROWS points, including the first and the last."""
    if len(points) <= _ROWS:
        return list(points)
    return [points[round(number * (len(points) - 1) / (_ROWS - 1))] for number in range(_ROWS)]


# Time -----------------------------------------------------------------------------------------------------------------


def _step_split(times: Mapping[str, Mapping[str, float]]) -> Chart | None:
    ms = {variant: {part: 1e3 * seconds for part, seconds in bar.items()} for variant, bar in times.items()}
    caption = "Steps under the profiler, on the rank that waits least for the others"
    return _bars("time_split", "Where the time of a step goes", ms, "ms/step", caption)


def _run_split(times: Mapping[str, Mapping[str, float]]) -> Chart | None:
    caption = "Steps at their speed without the profiler, split like the profiled ones, plus evaluation and saving"
    return _bars("run_split", "Where the time of a run goes", times, "s", caption)


def _bars(key: str, title: str, times: Mapping[str, Mapping[str, float]], unit: str, caption: str) -> Chart | None:
    """Stacked bars, one for each variant, of its parts."""
    if not times:
        return None
    parts = list(dict.fromkeys(part for bar in times.values() for part in bar))

    def draw(axes: Axes) -> None:
        axes.set_axisbelow(True)
        left = [0.0] * len(times)
        for number, part in enumerate(parts):
            values = [bar.get(part, 0.0) for bar in times.values()]
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "hatch": _HATCHES[number % len(_HATCHES)]}
            axes.barh(list(times), values, left=left, height=0.6, label=part, **style)
            left = [start + value for start, value in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel(unit)

    largest = [
        f"{name} {part} {bar[part] / sum(bar.values()):.0%}"
        for name, bar in times.items()
        if sum(bar.values()) > 0 and (part := max(bar, key=lambda part: bar[part]))
    ]
    columns = (Column("variant", "name"), *(Column(part, unit=unit, format=",.1f") for part in parts))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, *(bar.get(part, 0.0) for part in parts)) for name, bar in times.items()
    )
    description = f"{caption}. Largest part: {shorten(largest, CAPTIONED, '; ')}."
    return Chart(key, title, description, draw_svg(key, draw, parts, rows=len(times)), Table(columns, rows))


# Memory against speed -------------------------------------------------------------------------------------------------


def _pareto(speeds: Mapping[str, tuple[float, float]], memory_title: str) -> Chart | None:
    """Memory against speed; the front are the variants that no other beats in both."""
    if len(speeds) < 2:
        return None
    front = {
        name: (memory, speed)
        for name, (memory, speed) in speeds.items()
        if not any(m <= memory and s >= speed and (m, s) != (memory, speed) for m, s in speeds.values())
    }
    others = f"{len(speeds) - len(front)} others"
    legend = [*speeds] if len(speeds) <= _LEGEND else [*front, others]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*sorted(front.values()), strict=True), color=INK, linewidth=0.8, zorder=1)
        style: dict[str, Any]
        plain = [name for name in speeds if name not in legend]
        for place, (name, (memory, speed)) in enumerate(speeds.items()):
            if name in plain:
                style = {"marker": ".", "color": INK, "markersize": 3, "label": others if name == plain[0] else None}
            else:
                number = legend.index(name)
                marker = _MARKERS[(number + number // len(_MARKERS)) % len(_MARKERS)]
                style = {"marker": marker, "color": COLOURS[number % len(COLOURS)], "markersize": 6, "label": name}
            axes.plot([memory], [speed], linestyle="none", zorder=2, gid=f"point{place}", **style)
        axes.set_xlabel(memory_title)
        axes.set_ylabel("samples/s")
        axes.set_ylim(bottom=0, top=1.12 * max(speed for _, speed in speeds.values()))
        axes.set_xlim(left=0, right=1.06 * max(memory for memory, _ in speeds.values()))

    svg = draw_svg("pareto", draw, legend, lambda axes: _label_points(axes, front, [*speeds.values()]))
    for place, name in enumerate(speeds):  # the name of a point as a tooltip
        svg = svg.replace(f'<g id="pareto-point{place}">', f"<g><title>{escape(name)}</title>")
    columns = (
        Column("variant", "name"),
        Column(memory_title, format=",.2f"),
        Column("samples/s", format=",.2f"),
        Column("on the front", "text"),
    )
    rows = tuple((name, *point, "yes" if name in front else "no") for name, point in speeds.items())
    description = f"No variant is both smaller and faster than {shorten(front, CAPTIONED)}."
    return Chart("pareto", "Memory against speed", description, svg, Table(columns, rows))


def _label_points(axes: Axes, named: Mapping[str, tuple[float, float]], points: Sequence[tuple[float, float]]) -> None:
    """Label the points `named`, without the prefix that all names share.

    A label goes where it stays inside the axes and covers the fewest points; it is left out where it would cover
    another label.
    """
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(min(named), max(named), strict=False))
    shared = "".join(letter for letter, _ in alike).rfind("-") + 1 if len(named) > 1 else 0
    inside = axes.get_window_extent()
    marks = [tuple(axes.transData.transform(point)) for point in points]
    placed: list[Any] = []
    for name, point in sorted(named.items(), key=lambda item: item[1]):
        text = axes.annotate(name[shared:], point, (0, 0), textcoords="offset points", fontsize=7, va="center")

        def put(rise: int, side: int, text: Any = text) -> Any:
            text.set_horizontalalignment({1: "left", -1: "right", 0: "center"}[side])
            text.set_position((7 * side, rise))
            return text.get_window_extent()

        def cost(place: tuple[int, int], put: Any = put) -> tuple[float, int, int]:
            box = put(*place)
            sides = (inside.x0 - box.x0, box.x1 - inside.x1, inside.y0 - box.y0, box.y1 - inside.y1)
            cut = sum(max(side, 0) for side in sides)
            covered = sum(bool(box.padded(4).contains(*mark)) for mark in marks)
            return cut, sum(bool(box.overlaps(other)) for other in placed), covered

        best = min(_SIDES, key=cost)
        cut, over, _ = cost(best)
        if cut > 0 or over:
            text.remove()
        else:
            placed.append(put(*best))
