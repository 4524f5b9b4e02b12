"""What reports and the console show of an evaluation: figures, tables of details, warnings, and a one-sentence
headline.

The input is what tasks return, as `evaluation.json` holds it, or the part that `summary.json` keeps (`PARTS`).
Importing this module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.evaluation.sets import split_key
from distft.runs.figures import FIGURES
from distft.text import shorten, with_interval

PARTS = (
    "figures",
    "categories",
    "confusion",
    "unparsed",
    "outcomes",
    "position",
    "judge",
    "judged",
    "reasons",
    "template",
    "items_digest",
    "asked",
    "overlap",
)
"""The parts of a task's result that `summary.json` keeps and reports read. A task may return any of them."""
NOTE = (
    "Base and adapter are measured on the same items. Intervals are 95%: Wilson's for shares, Student's for means, the "
    "bootstrap's for F1 and perplexity. The verdict is “gain” or “loss” if the interval of the difference excludes 0, "
    "“inconclusive” if it contains 0, so that the difference may be chance, “no difference” if both sides agree on "
    "every item, and “too few items” below 10 pairs."
)
TEMPLATES = {
    "chat": "in the tokenizer's chat template",
    "instruction": "in Dolly's instruction template",
    "review": "in IMDB's template",
    "plain": "without a template",
}
"""How prompts are written, by the name of the template in a result."""
MODES = {"absolute": "graded individually", "pairwise": "compared in both orders"}
"""How the judge compares two answers, by `evaluation.judge.mode`."""

Estimate = Mapping[str, float | None]
"""A figure's `value` and the bounds of its interval, `low` and `high`; None where unknown."""


@dataclass(frozen=True)
class _Presentation:
    """How the headline shows a task. The default suits a new task: every figure is in the headline."""

    headline: tuple[str, ...] | None = None
    """The figures that the headline names; None for all."""
    prefix: bool = False
    """Put the task's name before the title in the headline."""


_PRESENTATION: Mapping[str, _Presentation] = {
    "perplexity": _Presentation(headline=("perplexity",)),
    "imdb": _Presentation(headline=("accuracy", "generation_accuracy"), prefix=True),
    "classification": _Presentation(headline=("accuracy", "generation_accuracy"), prefix=True),
    "generation": _Presentation(headline=("exact_match", "rougeL", "chrf", "bleu", "score"), prefix=True),
    "mt_bench": _Presentation(headline=("score",)),
    "alpaca": _Presentation(headline=("win_rate", "preferred_rate")),
}
_COLUMNS = {figure.key: figure.task for figure in FIGURES if figure.task is not None}
_METHODS = {"logprob": "by likelihood", "generation": "by generation"}
_SIDES = ("base", "adapter")
_UNKNOWN = "–"
_EXAMPLE_CHARACTERS = 60
_LISTED = 6


@dataclass(frozen=True)
class Detail:
    """A table of details. Its first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def columns(evaluation: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The adapter's figures (the base's if there is no adapter) for the comparison of runs, by column; None if
    unknown."""
    return {column: estimate(evaluation, column).get("value") for column in _COLUMNS}


def estimate(evaluation: Mapping[str, Any] | None, column: str) -> Estimate:
    """The estimate shown in `column`, {} if unknown."""
    task, name = _COLUMNS[column]
    figure = ((evaluation or {}).get(task) or {}).get("figures", {}).get(name) or {}
    found: Estimate = figure.get("adapter") or figure.get("base") or {}
    return found


def figures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Task, name and figure of each figure, without those marked as details (a benchmark may have dozens of parts)."""
    for task, result in evaluation.items():
        for name, figure in result["figures"].items():
            if not figure.get("detail"):
                yield task, name, {**figure, "verdict": _verdict(figure)}


def _verdict(figure: Mapping[str, Any]) -> str | None:
    """The verdict on a figure; results written before `inconclusive` existed called it `no difference`."""
    verdict: str | None = figure.get("verdict")
    low, high = ((figure.get("difference") or {}).get(bound) for bound in ("low", "high"))
    wide = low is not None and high is not None and low < high
    return "inconclusive" if verdict == "no difference" and wide else verdict


def figure_lines(task: str, result: Mapping[str, Any]) -> list[str]:
    """One line for the console per figure of a task."""
    found = []
    for _, _, figure in figures({task: result}):
        sides = [
            f"{side} {with_interval(figure[side], figure['form'])}" for side in (*_SIDES, "difference") if figure[side]
        ]
        verdict = f" ({figure['verdict']})" if figure["verdict"] else ""
        found.append(f"{task}: {figure['title']}: {', '.join(sides)}{verdict}")
    return found


def detail_lines(task: str, result: Mapping[str, Any]) -> list[str]:
    """The tables of details as lines for the console, one for all rows with the same name."""
    found = []
    for detail in details_of(task, result):
        for name in dict.fromkeys(row[0] for row in detail.rows):
            cells = [zip(detail.head[1:], row[1:], strict=True) for row in detail.rows if row[0] == name]
            text = "; ".join(
                ", ".join(cell if title == "examples" else f"{title} {cell}" for title, cell in row) for row in cells
            )
            found.append(f"{detail.title}: {name}: {text}")
    return found


def template_line(task: str, result: Mapping[str, Any]) -> str:
    """Which template the prompts of a task have, and why; empty if the result does not say."""
    found = result.get("template")
    return f"{task}: prompts {TEMPLATES.get(found['name'], found['name'])} ({found['why']})" if found else ""


def overlap_line(task: str, result: Mapping[str, Any], *, only_if_any: bool = False) -> str:
    """How many of a task's items were trained on; empty if nothing was trained, or the result does not say.

    `only_if_any` leaves it empty unless some were.
    """
    found = result.get("overlap")
    if not found or (only_if_any and not found["count"]):
        return ""
    if found["count"] is None:
        return f"{task}: whether any of the {found['items']:,} items were trained on is not known: {found['why']}"
    return f"{task}: {found['count']:,} of {found['items']:,} items were trained on"


def tables(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Detail]:
    """The tables of details of several runs; equal tables are merged into one with a column for the run."""
    found: dict[tuple[str, tuple[str, ...]], list[tuple[str, ...]]] = {}
    for run, evaluation in evaluations.items():
        for task, result in evaluation.items():
            for detail in details_of(task, result):
                if len(evaluations) > 1:
                    named = [(run, *row) for row in detail.rows]
                    found.setdefault((detail.title, ("run", *detail.head)), []).extend(named)
                else:
                    found.setdefault((detail.title, detail.head), []).extend(detail.rows)
    return [Detail(title, head, tuple(rows)) for (title, head), rows in found.items()]


def details_of(task: str, result: Mapping[str, Any]) -> Iterator[Detail]:
    """The tables of details of one task, one for each of `PARTS` that has one."""
    yield from _confusion(task, result.get("confusion") or {})
    if unparsed := {side: found for side, found in (result.get("unparsed") or {}).items() if found["count"]}:
        rows = [(side, f"{found['count']:,}", _quoted(found["first"])) for side, found in unparsed.items()]
        yield Detail(f"{task}: answers without a label word", ("side", "answers", "examples"), tuple(rows))
    if categories := result.get("categories"):
        sides = [side for side in _SIDES if any(side in scores for scores in categories.values())]
        rows = [
            (name, str(scores["count"]), *(with_interval(scores.get(side), ".2f") for side in sides))
            for name, scores in categories.items()
        ]
        yield Detail(f"{task}: score out of 10 by category", ("category", "questions", *sides), tuple(rows))
    if outcomes := result.get("outcomes"):
        yield _outcomes(task, result, outcomes)


def _confusion(task: str, confusion: Mapping[str, Any]) -> Iterator[Detail]:
    for method, title in _METHODS.items():
        if method not in confusion:
            continue
        words = confusion["rows"]
        # By likelihood the prediction is always one of the label words.
        predicted = [f"predicted {word}" for word in words]
        if method == "generation":
            predicted.append("no label word")
        rows = [
            (side, word, *(f"{count:,}" for count in counts[: len(predicted)]))
            for side, matrix in confusion[method].items()
            for word, counts in zip(words, matrix, strict=True)
        ]
        yield Detail(f"{task}: confusion matrix {title}", ("side", "class", *predicted), tuple(rows))


def _outcomes(task: str, result: Mapping[str, Any], outcomes: Mapping[str, Any]) -> Detail:
    mode = (result.get("judge") or {}).get("mode", "")
    positions = {side: found for side, found in (result.get("position") or {}).items() if found}
    head = ["side", "wins", "ties", "losses", "unparsed"]
    if positions:
        head += ["first answer preferred", "orders disagree"]
    rows = []
    for side, counts in outcomes.items():
        row = [side, *(f"{counts[outcome]:,}" for outcome in ("win", "tie", "loss", "unparsed"))]
        if side in positions:
            found = positions[side]
            row += [f"{found['first_preferred']:.1%}", f"{found['inconsistent']} of {found['pairs']} pairs"]
        elif positions:
            row += [_UNKNOWN, _UNKNOWN]
        rows.append(tuple(row))
    return Detail(f"{task}: outcomes, {MODES.get(mode, mode)}", tuple(head), tuple(rows))


def warnings(task: str, result: Mapping[str, Any], folder: str) -> list[str]:
    """Why the figures of a task mislead, one line per reason; `folder` is the task's.

    Items were trained on; or, of judged figures, more than half of a side's verdicts could not be parsed, or the
    judge's two orders disagree in at least half of the pairs. Coin flips disagree in half of them, and so does a judge
    that prefers one position in three quarters of its verdicts.
    """
    found = []
    if (result.get("overlap") or {}).get("count"):
        found.append(f"{overlap_line(task, result)}, so its figures are not those of unseen text")
    found += _unreliable(task, result, folder)
    return found


def _unreliable(task: str, result: Mapping[str, Any], folder: str) -> list[str]:
    """Why the judged figures of a task say nothing; `folder` is the task's."""
    found = []
    judged: Mapping[str, Any] = result.get("judged") or {}
    if any(2 * counts["unparsed"] > counts["judgements"] for counts in judged.values()):
        unparsed, total = (sum(counts[key] for counts in judged.values()) for key in ("unparsed", "judgements"))
        reason, times = next(iter((result.get("reasons") or {}).items()), ("unknown", unparsed))
        limit = (result.get("judge") or {}).get("max_new_tokens")
        setting = f" (evaluation.judge.max_new_tokens={limit})" if reason.startswith("cut off") and limit else ""
        found.append(
            f"{task}: {unparsed:,} of {total:,} verdicts of the judge could not be parsed, so its figures say little; "
            f"most common reason ({times:,} times): {reason}{setting}. See {folder}/judgements.jsonl"
        )
    biased = {
        side: position
        for side, position in (result.get("position") or {}).items()
        if position and 2 * position["inconsistent"] >= position["pairs"] > 0
    }
    if biased:
        counts = ", ".join(
            f"{side} {position['inconsistent']} of {position['pairs']} pairs, first answer preferred in "
            f"{position['first_preferred']:.0%} of verdicts"
            for side, position in biased.items()
        )
        found.append(
            f"{task}: the judge's two orders disagree in at least half of the pairs, as coin flips would, so the share "
            f"of pairs won says nothing ({counts})"
        )
    return found


def headline(evaluation: Mapping[str, Any]) -> str:
    """What the fine-tune changed, in one or two sentences; empty if nothing was measured on both sides."""
    unreliable = [task for task, result in evaluation.items() if _unreliable(task, result, task)]
    changes: list[str] = []
    others: dict[str, list[str]] = {}
    for task, name, figure in figures(evaluation):
        base, data = split_key(task)
        shape = _PRESENTATION.get(base, _Presentation())
        if not figure["verdict"] or task in unreliable or (shape.headline is not None and name not in shape.headline):
            continue
        title = f"{base} {figure['title']}" if shape.prefix else str(figure["title"])
        title += f" on {data}" if data else ""
        if figure["verdict"] in ("gain", "loss"):
            before, after = (_value(figure[side], figure["form"]) for side in _SIDES)
            changes.append(f"{title} {before} → {after} ({figure['verdict']})")
        else:
            others.setdefault(figure["verdict"], []).append(title)
    rest = [f"{verdict} for {shorten(titles, _LISTED)}" for verdict, titles in others.items()]
    if unreliable:
        rest.append(f"the judge's verdicts are unreliable for {', '.join(unreliable)}")
    rest += [line for task, result in evaluation.items() if (line := overlap_line(task, result, only_if_any=True))]
    text = "; ".join(rest)
    if changes:
        return f"The fine-tune changed {shorten(changes, _LISTED, '; ')}." + (
            f" {text[0].upper()}{text[1:]}." if text else ""
        )
    return f"No change could be shown: {text}." if text else ""


def _value(estimate: Estimate | None, form: str) -> str:
    return with_interval({"value": (estimate or {}).get("value")}, form)


def _quoted(texts: Sequence[str]) -> str:
    """Each distinct text, shortened and quoted, on one line."""
    limit = _EXAMPLE_CHARACTERS
    short = [text if len(text) <= limit else f"{text[: limit - 1]}…" for text in texts]
    return " · ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(short))
