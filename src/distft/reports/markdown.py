"""A report as Markdown, aligned so that it reads in a terminal as well."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distft.evaluation import summary as details
from distft.reports.bottleneck import PARTS
from distft.reports.comparison import ROUNDING, Comparison, bounds
from distft.reports.history import FINAL, History
from distft.reports.report import Report, Spread
from distft.reports.results import FIGURES, TIMES, Figure, Run
from distft.stats import CONFIDENCE
from distft.text import count, shorten

UNKNOWN = "–"
_NAMES_IN_A_ROW = 6
_CELL = 64
"""Characters of a cell that says how a run ended; the whole stands below the table."""
NO_ENERGY = "Energy is what NVIDIA GPUs count; nothing is estimated where there is none."
_RANGES = (
    "The median of the finished runs, and from the least to the greatest where they differ. Repeats share the seed: their range is what the "
    "machine makes of one training, not what another seed would give."
)
_FIRST = ("samples_per_second", "tokens_per_second", "mfu", "peak_memory_gib", "joules_per_sample", "train_time_s")
"""What a comparison is made for stands first in the tables of variants; the other figures follow in their own order."""


def markdown(report: Report) -> str:
    """The whole report, ending in a newline."""
    count = count_of_runs(report)
    answer = [f"**{report.verdict}**"] if report.verdict else []
    missing = [f"Not there: {_names(report.missing)}."] if report.missing else []
    parts = [
        [f"# {report.title}", *answer, count, *missing],
        _runs(report),
        _unfinished(report),
        _evaluations(report),
        _variants(report),
        _time(report),
        _comparisons(report),
        _equality(report),
        _differences(report),
    ]
    return "\n\n".join(block for part in parts for block in part) + "\n"


def count_of_runs(report: Report) -> str:
    """How many runs of how many variants there are, and how many of them finished or did not fit."""
    ended = [run.outcome for run in report.runs]
    unfit = f", {ended.count('out of memory')} out of memory" if "out of memory" in ended else ""
    return f"{count(len(ended), 'run')} of {count(len(report.variants), 'variant')}, {ended.count('finished')} finished{unfit}."


def run_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of runs, without figures that no run has."""
    known = [figure for figure in FIGURES if any(run.figures[figure.key] is not None for run in report.runs)]
    head = ["run", "status", "strategy", "processes", *(figure.title for figure in known)]
    rows = [
        [run.name, how_it_ended(run), run.strategy or UNKNOWN, str(run.world_size or UNKNOWN),
         *(_number(run.figures[figure.key], figure) for figure in known)]
        for run in report.runs
    ]  # fmt: skip
    rows += [
        [name, _short(f"not there: {why}" if why else "not there"), *[UNKNOWN] * (len(head) - 2)]
        for name, why in report.missing.items()
    ]
    return head, rows


def how_it_ended(run: Run) -> str:
    """`finished`, or what stopped it and the cause, on one short line."""
    return _short(f"{run.outcome}: {_cause(run)}" if run.cause else run.outcome)


def _cause(run: Run) -> str:
    """The cause on one line, without what the outcome says already."""
    cause = " ".join((run.cause or "").split())
    return (
        cause.removeprefix("OutOfMemory: ").removeprefix("out of memory ") if run.outcome == "out of memory" else cause
    )


def _short(text: str) -> str:
    return text if len(text) <= _CELL else f"{text[: _CELL - 1].rstrip()}…"


def unfinished_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of runs without figures: how each ended, and the whole cause."""
    rows = [[run.name, run.outcome, _cause(run) or UNKNOWN] for run in report.runs if not run.finished]
    return ["run", "outcome", "cause"], rows + [
        [name, "not there", why or UNKNOWN] for name, why in report.missing.items()
    ]


def _runs(report: Report) -> list[str]:
    return ["## Runs", _table(*run_rows(report)), *unknown_lines(report)]


def unknown_lines(report: Report) -> list[str]:
    """Which figures no run has, so that nobody looks for them."""
    known = {figure.key for figure in FIGURES if any(run.figures[figure.key] is not None for run in report.runs)}
    unknown = [figure.title.split(",")[0] for figure in FIGURES if figure.key not in known and not figure.quality]
    return [
        *([f"Not known of any run: {', '.join(unknown)}."] if unknown else []),
        *([NO_ENERGY] if "energy" in unknown else []),
    ]


def _unfinished(report: Report) -> list[str]:
    _, rows = unfinished_rows(report)
    lines = [
        f"- {_names([name])}: {outcome}" + (f": {cause}" if cause != UNKNOWN else "") for name, outcome, cause in rows
    ]
    return ["## Not finished", "\n".join(lines)] if lines else []


def _evaluations(report: Report) -> list[str]:
    if not report.evaluations:
        return []
    found = report.evaluations
    warnings = "\n".join(f"- Warning: {line}." for line in report.warnings)
    return [
        "## What the fine-tune changed",
        _table(details.head(found), details.rows(found)),
        details.NOTE,
        *([warnings] if warnings else []),
        *(
            block
            for detail in details.tables(found)
            for block in (f"### {detail.title}", _table(detail.head, detail.rows))
        ),
    ]


def variant_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of variants: medians, and ranges where runs differ, what matters first; behind the samples/s their ratio
    to the first variant's."""
    known = _ordered(f for f in FIGURES if f.compared and any(variant.spreads[f.key] for variant in report.variants))
    ended = {run.name: how_it_ended(run) for run in report.runs if not run.finished}
    speeds = {item.variant: item for item in report.comparisons if item.figure == "samples_per_second"}
    against = next((item.against for item in speeds.values()), None)
    head, rows = ["variant", "finished"], []
    for figure in known:
        head += [figure.title, *(["speed-up"] if against and figure.key == "samples_per_second" else [])]
    for variant in report.variants:
        stopped = (ended[run] for run in variant.runs if run in ended)
        row = [variant.name, "; ".join(dict.fromkeys([f"{variant.finished} of {len(variant.runs)}", *stopped]))]
        for figure in known:
            row.append(_range(variant.spreads[figure.key], figure))
            if against and figure.key == "samples_per_second":
                row.append("the first" if variant.name == against else _verdict(speeds.get(variant.name)))
        rows.append(row)
    return head, rows


def _ordered(figures: Iterable[Figure]) -> list[Figure]:
    return sorted(figures, key=lambda figure: _FIRST.index(figure.key) if figure.key in _FIRST else len(_FIRST))


def range_lines(report: Report) -> list[str]:
    """What the figures of the table of variants are."""
    speeds = [item for item in report.comparisons if item.figure == "samples_per_second"]
    told = [f"The speed-up is the ratio of samples/s to those of {_names([speeds[0].against])}."] if speeds else []
    repeated = any(variant.finished > 1 for variant in report.variants)
    return [*([_RANGES] if repeated else []), *told]


def _variants(report: Report) -> list[str]:
    if max((variant.finished for variant in report.variants), default=0) < 2:
        return []
    return ["## Variants", " ".join(range_lines(report)), _table(*variant_rows(report))]


def comparison_rows(report: Report) -> tuple[list[str], list[list[str]], list[str]]:
    """Head and cells of the table of comparisons, and what its words mean."""
    found = {(item.variant, item.figure): item for item in report.comparisons}
    shown = _ordered(figure for figure in FIGURES if any(key == figure.key for _, key in found))
    names = list(dict.fromkeys(item.variant for item in report.comparisons))
    rows = [[name, *(_verdict(found.get((name, figure.key))) for figure in shown)] for name in names]
    verdicts = {item.verdict for item in report.comparisons}
    legend = {
        "different": "`× 1.23 (1.20 – 1.26)`: the ratio of the geometric means and its interval, which excludes 1.",
        "no difference": "`no difference (0.97 – 1.03)`: the interval of the ratio holds 1, so that this may be chance.",
        "equal": f"`equal`: all runs within {ROUNDING:.2%} of each other.",
        "no spread": "`(× 1.23)`: one run on a side, so that there is no spread to judge by and this may be chance; or a loss, which the seed decides that "
        "all repeats share.",
    }
    if verdicts & {"different", "no difference"}:
        among = (
            ""
            if report.together == 1
            else f", together for the {report.together} variants of a column (Bonferroni), not for several columns"
        )
        legend["interval"] = f"Intervals are Welch's, of the logarithms, at {CONFIDENCE:.0%}{among}."
        verdicts.add("interval")
    reasons = dict.fromkeys(f"{_names([item.variant])}: {_reason(item)}." for item in report.comparisons if item.why)
    notes = [*(text for verdict, text in legend.items() if verdict in verdicts), *reasons]
    return ["variant", *(figure.title.split(",")[0] for figure in shown)], rows, notes


def _reason(item: Comparison) -> str:
    if item.verdict == "withheld":
        return f"the verdict on its speed is withheld: {item.why}"
    if item.why.startswith("not equal"):
        return f"its speed is not compared, for it did other work ({item.why})"
    title = next(figure.title.split(",")[0] for figure in FIGURES if figure.key == item.figure)
    if item.verdict != "not compared":
        return f"{title} from {item.why}: {item.verdict}"
    return f"{title} is not compared: {item.why}"


NOT_PROFILED = "No run was profiled: tracking.profile_steps=3 makes a report say what the steps were bound by."


def time_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of where the time goes: the parts of a step under the profiler, and the run's evaluation and saving."""
    head = ["variant", "bound", *(f"{part}, ms a step" for part in PARTS), *(figure.title for figure in TIMES)]
    rows = []
    for variant in report.variants:
        shares = variant.split.shares() if variant.split else {}
        parts = [
            f"{getattr(variant.split, key) * 1e3:,.1f} ({shares[part]:.0%})" if variant.split else UNKNOWN
            for part, key in PARTS.items()
        ]
        times = [_range(variant.spreads[figure.key], figure) for figure in TIMES]
        rows.append([variant.name, variant.bound.kind if variant.bound else UNKNOWN, *parts, *times])
    known = [0, *(n for n in range(1, len(head)) if any(row[n] != UNKNOWN for row in rows))]
    return [head[n] for n in known], [[row[n] for n in known] for row in rows]


def bound_lines(report: Report) -> list[str]:
    """What bounds each variant that was profiled, why that is said, and what would help."""
    return [
        f"`{variant.name}` is bound by {variant.bound.kind}: {variant.bound.evidence}. What would help: {'; '.join(variant.bound.advice)}."
        for variant in report.variants
        if variant.bound is not None
    ]


def _time(report: Report) -> list[str]:
    if not any(variant.finished for variant in report.variants):
        return []
    lines = [f"- {line}" for line in bound_lines(report)]
    known = lines or any(variant.spreads[figure.key] for variant in report.variants for figure in TIMES)
    table = [_table(*time_rows(report))] if known else []
    return ["## Where the time goes", *table, "\n".join(lines) if lines else NOT_PROFILED]


def _comparisons(report: Report) -> list[str]:
    if not report.comparisons:
        return []
    head, rows, notes = comparison_rows(report)
    return [
        f"## Against {_names([report.comparisons[0].against])}",
        _table(head, rows),
        "\n".join(f"- {note}" for note in notes),
    ]


def _verdict(item: Comparison | None) -> str:
    if item is None or item.verdict == "not compared":
        return UNKNOWN
    ratio = "different" if item.ratio is None else f"× {item.ratio:.3f}{bounds(item)}"
    words = {
        "different": ratio,
        "no spread": UNKNOWN if item.ratio is None else f"({ratio})",
        "no difference": f"no difference{bounds(item)}",
    }
    return words.get(item.verdict, item.verdict)


def equality_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of what was equal."""
    words = {True: "yes", False: "no", None: UNKNOWN}
    rows = [[item.what, "yes" if item.declared else "", words[item.equal]] for item in report.equality]
    return ["what", "declared", "equal"], rows


def equal_losses(report: Report) -> str:
    """When losses are called equal."""
    return f"Losses are equal where the medians are within {report.loss_tolerance:.2%} of the first variant's."


def unequal_lines(report: Report) -> list[str]:
    """The facts that make something unequal."""
    facts = {key: values for item in report.equality for key, values in item.unequal.items()}
    return _facts(facts, [variant.name for variant in report.variants])


def difference_lines(report: Report) -> list[str]:
    """Every fact in which variants differ."""
    return _facts(report.differences, [variant.name for variant in report.variants])


def _equality(report: Report) -> list[str]:
    return ["## What was equal", _table(*equality_rows(report)), equal_losses(report), *_list(unequal_lines(report))]


def _differences(report: Report) -> list[str]:
    lines = difference_lines(report)
    return ["## What differs", *_list(lines)] if lines else []


def _facts(facts: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """A line for each fact, and one for what a section has where others lack the section."""
    lines: list[str] = []
    sections: dict[str, list[str]] = {}
    for key, values in facts.items():
        groups: dict[str, list[str]] = {}
        for name in (name for name in names if name in values):
            groups.setdefault(_value(values[name]), []).append(name)
        section, _, leaf = key.partition(".")
        given = [value for value in groups if value != "null"]
        if len(given) == 1 and "null" in groups and not section.startswith(("as run", "machine")):
            line = f"`{section}`: {{}} (in {_names(groups[given[0]])}), not set (in {_names(groups['null'])})"
            sections.setdefault(line, []).append(f"{leaf} {given[0]}".lstrip())
        else:
            lines.append(f"`{key}`: " + ", ".join(f"{value} (in {_names(group)})" for value, group in groups.items()))
    return lines + [line.format(", ".join(parts)) for line, parts in sections.items()]


def log_rows(logs: Sequence[History]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of logs, without figures that none has."""
    known = [(key, title, form) for key, title, form in FINAL if any(key in log.final for log in logs)]
    rows = [[log.name, *(f"{log.final[key]:{form}}" if key in log.final else UNKNOWN for key, _, form in known)] for log in logs]  # fmt: skip
    return ["log", *(title for _, title, _ in known)], rows


def log_lines(logs: Iterable[History]) -> list[str]:
    """What of the logs was left out."""
    lines = []
    for log in logs:
        if log.infinite:
            lines.append(f"`{log.name}`: {count(log.infinite, 'value')} left out, NaN or infinite.")
        if log.unread:
            lines.append(
                f"`{log.name}`: {count(log.unread, 'record')} left out, without a step that is a whole number."
            )
    return lines


def log_blocks(logs: Sequence[History]) -> str:
    """The part of a report that is about logs, ending in a newline."""
    return "\n\n".join(["## Logs", _table(*log_rows(logs)), *_list(log_lines(logs))]) + "\n"


# Words ------------------------------------------------------------------------------------------------------------------


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _list(lines: Iterable[str]) -> list[str]:
    """A block with an item a line; none where there is no line."""
    return [text] if (text := "\n".join(f"- {line}" for line in lines)) else []


def _names(names: Iterable[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return shorten(quoted, len(quoted) if len(quoted) <= _NAMES_IN_A_ROW else 2)


def _number(value: float | None, figure: Figure) -> str:
    return UNKNOWN if value is None else f"{value:{figure.form}}"


def _range(spread: Spread | None, figure: Figure) -> str:
    if spread is None:
        return UNKNOWN
    median, least, greatest = (f"{value:{figure.form}}" for value in (spread.median, spread.least, spread.greatest))
    return median if least == greatest else f"{median} ({least} – {greatest})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns padded to one width; all but the first stand right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    padded = [
        [cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in cells
    ]  # fmt: skip
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))
