"""Lays out a report: which sections it has, and what their tables and lines say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from distft.evaluation import summary as details
from distft.reports import verdict as wording
from distft.reports.bottleneck import PARTS
from distft.reports.facts import fact_lines, names
from distft.reports.history import History, final_figures
from distft.reports.repeats import TO_LOSS
from distft.reports.report import Report
from distft.reports.results import NOT_THERE, SHOWN, TIMES, Run, Spread
from distft.reports.tables import UNKNOWN, Cell, Code, Column, Document, Estimate, Line, Phrase, Range, Section, Table
from distft.runs.figures import Figure
from distft.text import count

_CELL = 64
"""Characters of a cell that says how a run ended; the section on unfinished runs has the full cause."""
_FIRST = ("samples_per_second", "tokens_per_second", "mfu", "peak_memory_gib", "joules_per_sample", "train_time_s")
"""The figures that a comparison is made for come first in the tables of variants, the others in their own order."""
_NO_ENERGY = "Energy is measured on NVIDIA GPUs only; distft does not estimate it elsewhere."
_NO_PROFILE = "No run was profiled. Set tracking.profile_steps=3 to see what limits the speed of a step."
_RANGES = (
    "Each figure is the median over the finished runs, with the smallest and largest value in brackets where they "
    "differ. "
)
_ONE_SEED = "Repeats share the seed: the range shows how much the machine varies, not what another seed would give."
_OWN_SEEDS = "Repeats have seeds of their own, for the order, the splits and the adapter's initial weights."


def document(report: Report | None, logs: Sequence[History] = (), title: str = "") -> Document:
    """The layout of a report on runs, on the logs of other programs, or on both."""
    sections = [*(_sections(report) if report else ()), *([_logs(logs)] if logs else ())]
    notes = _notes(report) if report else []
    return Document(title or (report.title if report else ""), report.verdict if report else "", notes, sections)


def _sections(report: Report) -> Iterator[Section]:
    single = len(report.variants) == 1
    if single:
        yield from _evaluations(report)
        yield from _samples(report)
    if not single or len(report.runs) > 1:
        yield _variants(report)
    if any(variant.finished for variant in report.variants):
        yield _time(report)
    if report.comparisons:
        yield _comparisons(report)
    if not single:
        yield from _evaluations(report)
        yield _equality(report)
    if report.differences:
        items = fact_lines(report.differences, [variant.name for variant in report.variants])
        yield Section("differs", ("What differs",), items=items)
    yield _runs(report)
    if rows := _unfinished_rows(report):
        columns = (Column("run", "name"), Column("outcome", "text"), Column("cause", "prose"))
        yield Section("unfinished", ("Not finished",), Table(columns, tuple(rows)))


def _notes(report: Report) -> list[Line]:
    ended = [run.outcome for run in report.runs]
    unfit = f", {ended.count('out of memory')} out of memory" if "out of memory" in ended else ""
    variants = count(len(report.variants), "variant")
    lines: list[Line] = [(f"{count(len(ended), 'run')} of {variants}, {ended.count('finished')} finished{unfit}.",)]
    return [*lines, ("Missing: ", *names(report.missing), ".")] if report.missing else lines


# Runs -----------------------------------------------------------------------------------------------------------------


def _runs(report: Report) -> Section:
    columns = (
        Column("run", "name"),
        Column("status", "text"),
        Column("strategy", "text"),
        Column("processes"),
        *map(Column.of, SHOWN),
    )
    rows: list[tuple[Cell, ...]] = [
        (run.name, how_it_ended(run), run.strategy, run.world_size, *(_figure(run, figure.key) for figure in SHOWN))
        for run in report.runs
    ]
    for name, why in report.missing.items():
        status = _shorten(f"{NOT_THERE}: {why}" if why else NOT_THERE)
        rows.append((name, status, *[None] * (len(columns) - 2)))
    table = Table(columns, tuple(rows)).without_unknown()
    unknown = [
        figure.label
        for figure in SHOWN
        if not (figure.quality or figure.key in TO_LOSS) and all(run.figures[figure.key] is None for run in report.runs)
    ]
    notes: list[Line] = [(f"Not measured in any run: {', '.join(unknown)}.",)] if unknown else []
    notes += [(_NO_ENERGY,)] if "energy" in unknown else []
    notes += [(Code(run.name), f": {line}.") for run in report.runs for line in run.selection]
    warnings = [f"{run.name}: {wording.overlap(run.overlap)}" for run in report.runs if any(run.overlap.values())]
    return Section("runs", ("Runs",), table, notes, warnings=warnings)


def _figure(run: Run, key: str) -> Cell:
    """A figure of a run; that over its held-out pairs with its interval."""
    share = run.reward_accuracy if key == "reward_accuracy" else None
    return run.figures[key] if share is None or not run.pairs else Range(share.value, share.low, share.high)


def _unfinished_rows(report: Report) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = [
        (run.name, run.outcome, _cause(run) or None) for run in report.runs if not run.finished
    ]
    return rows + [(name, NOT_THERE, why or None) for name, why in report.missing.items()]


def how_it_ended(run: Run) -> Phrase:
    """`finished`, or what stopped the run and the cause, on one short line."""
    if run.finished or not run.cause:
        return Phrase(run.outcome)
    return Phrase(_shorten(f"{run.outcome}: {_cause(run)}"), full=" ".join(run.cause.split()))


def _cause(run: Run) -> str:
    """The cause on one line, without what the outcome says already."""
    cause = " ".join((run.cause or "").split())
    if run.outcome == "out of memory":
        return cause.removeprefix("OutOfMemory: ").removeprefix("out of memory ")
    return cause


def _shorten(text: str) -> str:
    return text if len(text) <= _CELL else f"{text[: _CELL - 1].rstrip()}…"


# Variants -------------------------------------------------------------------------------------------------------------


def _variants(report: Report) -> Section:
    """Medians and ranges, the figures of a comparison first; next to samples/s its ratio to the first variant's."""
    ended = {run.name: str(how_it_ended(run)) for run in report.runs if not run.finished}
    speeds = {item.variant: item for item in report.comparisons if item.figure == "samples_per_second"}
    against = next((item.against for item in speeds.values()), None)
    figures = _ordered(figure for figure in SHOWN if figure.compared)
    columns = [Column("variant", "name"), Column("finished", "text")]
    for figure in figures:
        columns += [Column.of(figure), *([Column("speed-up")] if figure.key == "samples_per_second" else [])]
    rows = []
    for variant in report.variants:
        stopped = (ended[run] for run in variant.runs if run in ended)
        finished = "; ".join(dict.fromkeys([f"{variant.finished} of {len(variant.runs)}", *stopped]))
        row: list[Cell] = [variant.name, finished]
        for figure in figures:
            row.append(_range(variant.spreads[figure.key]))
            if figure.key == "samples_per_second":
                first = variant.name == against
                row.append(Phrase("baseline") if first else _verdict(*wording.cell(speeds.get(variant.name))))
        rows.append(tuple(row))
    notes: list[Line] = []
    if any(variant.finished > 1 for variant in report.variants):
        notes.append((_RANGES + (_OWN_SEEDS if report.seeds else _ONE_SEED),))
    if report.target_loss is not None:
        reached = f"the first evaluation with a loss of at most {report.target_loss:,.4f} nats"
        notes.append((f"Steps and time to loss: to {reached}; the time is that of training, evaluations included.",))
    if against is not None:
        notes.append(("Speed-up: samples/s relative to ", Code(against), "."))
    return Section("variants", ("Variants",), Table(tuple(columns), tuple(rows)).without_unknown(), notes)


def _ordered(figures: Iterable[Figure]) -> list[Figure]:
    return sorted(figures, key=lambda figure: _FIRST.index(figure.key) if figure.key in _FIRST else len(_FIRST))


def _range(spread: Spread | None) -> Range | None:
    return None if spread is None else Range(spread.median, spread.least, spread.greatest)


def _verdict(text: str, interval: str) -> Phrase | None:
    return Phrase(text, interval) if text else None


def comparison_table(report: Report) -> Table:
    """Each variant compared with the first, in every figure that both have."""
    found = {(item.variant, item.figure): item for item in report.comparisons}
    figures = _ordered(figure for figure in SHOWN if any(key == figure.key for _, key in found))
    rows = tuple(
        (name, *(_verdict(*wording.cell(found.get((name, figure.key)))) for figure in figures))
        for name in dict.fromkeys(item.variant for item in report.comparisons)
    )
    return Table((Column("variant", "name"), *(Column(figure.label) for figure in figures)), rows)


def _comparisons(report: Report) -> Section:
    reasons = dict.fromkeys(
        (Code(item.variant), f": {wording.reason(item)}.") for item in report.comparisons if item.why
    )
    title = ("Compared with ", Code(report.comparisons[0].against))
    notes = [(line,) for line in wording.legend(report.comparisons, report.together)]
    return Section("against", title, comparison_table(report), notes, [*reasons])


# Time -----------------------------------------------------------------------------------------------------------------


def time_table(report: Report) -> Table:
    """The parts of a profiled step, and the time of evaluation and saving."""
    columns = (
        Column("variant", "name"),
        Column("bound", "text"),
        *(Column(part, unit="ms/step") for part in PARTS),
        *map(Column.of, TIMES),
    )
    rows = []
    for variant in report.variants:
        parts: list[Cell] = [None] * len(PARTS)
        if variant.split is not None:
            shares = variant.split.shares()
            parts = [Phrase(f"{s * 1e3:,.1f}", f"({shares[part]:.0%})") for part, s in variant.split.seconds().items()]
        bound = variant.bound.kind if variant.bound else None
        rows.append((variant.name, bound, *parts, *(_range(variant.spreads[figure.key]) for figure in TIMES)))
    return Table(columns, tuple(rows)).without_unknown()


def _time(report: Report) -> Section:
    items: list[Line] = [
        (
            Code(variant.name),
            f" is bound by {variant.bound.kind}: {variant.bound.evidence}. "
            f"What would help: {'; '.join(variant.bound.advice)}.",
        )
        for variant in report.variants
        if variant.bound is not None
    ]
    table = time_table(report)
    known = table if len(table.columns) > 1 else None
    return Section("time", ("Where the time goes",), known, [] if items else [(_NO_PROFILE,)], items)


# Evaluations ----------------------------------------------------------------------------------------------------------


def _evaluations(report: Report) -> Iterator[Section]:
    """What evaluations found, and a subsection for each table of details."""
    found = report.evaluations
    if not found:
        return
    title = ("What the fine-tune changed",)
    about = {
        line: None
        for evaluation in found.values()
        for task, result in evaluation.items()
        for line in (details.template_line(task, result), details.overlap_line(task, result))
        if line
    }
    notes = [(details.NOTE,), *((f"{line}.",) for line in about)]
    yield Section("evaluation", title, evaluation_table(found), notes, warnings=report.warnings)
    for number, detail in enumerate(details.tables(found)):
        columns = tuple(_detail_column(n, head, detail.rows) for n, head in enumerate(detail.head))
        table = Table(columns, detail.rows, compact=True)
        yield Section(f"evaluation-{number}", (detail.title,), table, level=3)


def _detail_column(number: int, head: str, rows: Sequence[Sequence[str]]) -> Column:
    numbers = all(row[number][:1] in "-0123456789" for row in rows if row[number] != UNKNOWN)
    return Column(head, "name" if number == 0 else "number" if numbers else "text")


def evaluation_table(evaluations: Mapping[str, Mapping[str, object]]) -> Table:
    """The figures of the evaluation of each run: both sides, their difference and the verdict."""
    several = len(evaluations) > 1
    sides = ("base", "adapter", "difference")
    columns = (
        *([Column("run", "name")] if several else []),
        Column("task", "name"),
        Column("figure", "text"),
        Column("items", format=","),
        *map(Column, sides),
        Column("verdict", "text"),
    )
    rows = tuple(
        (
            *([run] if several else []),
            task,
            str(figure["title"]),
            figure["count"],
            *(_estimate(figure[side], figure["form"]) for side in sides),
            figure["verdict"],
        )
        for run, evaluation in evaluations.items()
        for task, _, figure in details.figures(evaluation)
    )
    return Table(columns, rows, compact=True)


def _estimate(estimate: Mapping[str, float | None] | None, form: str) -> Estimate:
    value, low, high = ((estimate or {}).get(key) for key in ("value", "low", "high"))
    return Estimate(value, low, high, form)


def _samples(report: Report) -> Iterator[Section]:
    """Of a single run, what it has answered to held-out prompts."""
    found = report.runs[0].samples
    if found is None or len(report.runs) > 1:
        return
    rows = tuple((f"{label} {number}", " ".join(text.split())) for number, label, text in found.rows())
    yield Section(
        "samples", ("Answers to held-out prompts",), Table((Column("", "name"), Column("text", "prose")), rows)
    )


# What was equal, and logs ---------------------------------------------------------------------------------------------


def _equality(report: Report) -> Section:
    words = {True: "yes", False: "no", None: UNKNOWN}
    declared = any(item.declared for item in report.equality)
    columns = [Column("what", "name"), *([Column("declared", "text")] if declared else []), Column("equal", "text")]
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (item.what, *([Phrase("yes" if item.declared else "")] if declared else []), words[item.equal])
        for item in report.equality
    )
    table = Table(tuple(columns), rows)
    tolerance = f"Losses are equal if the medians are within {report.loss_tolerance:.2%} of the first variant's."
    unequal = {key: values for item in report.equality for key, values in item.unequal.items()}
    items = fact_lines(unequal, [variant.name for variant in report.variants])
    return Section("equal", ("What was equal",), table, [(tolerance,)], items)


def _logs(logs: Sequence[History]) -> Section:
    figures = final_figures(logs)
    columns = (Column("log", "name"), *map(Column.of, figures))
    rows = tuple((log.name, *(log.final.get(figure.key) for figure in figures)) for log in logs)
    warnings = [f"{log.name} {wording.divergence(log.diverged, log.not_finite)}" for log in logs if log.not_finite]
    items: list[Line] = []
    for log in logs:
        if log.infinite:
            values = count(log.infinite, "value")
            items.append((Code(log.name), f": charts leave out {values} that are NaN or infinite."))
        if log.unread:
            items.append((Code(log.name), f": left out {count(log.unread, 'record')} without a whole number as step."))
    table = Table(columns, rows).without_unknown()
    return Section("logs", ("Logs",), table, items=items, warnings=warnings)
