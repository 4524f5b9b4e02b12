"""What stands behind the figures of evaluations, for the console and for reports: confusion matrices, categories, outcomes, the judge; and
what they come to, in a sentence.

From the result of a task, or from what summaries keep of it (PARTS), to tables, and to warnings of figures that say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.evaluation.columns import figures, shown
from distft.text import shorten

PARTS = (
    "figures", "categories", "confusion", "unparsed", "outcomes", "position", "judge", "judged", "reasons",
)  # fmt: skip
"""What of a task's result a summary keeps, and a report reads."""
MODES = {"absolute": "graded one by one", "pairwise": "asked which is better, in both orders"}
_METHODS = {"logprob": "by likelihood", "generation": "by generation"}
_SIDES = ("base", "adapter")
_ANSWER = 60
"""Characters of an answer that are shown."""
_HEADLINE = {
    "perplexity": ("perplexity",), "imdb": ("accuracy", "generation_accuracy"), "mt_bench": ("score",),
    "alpaca": ("win_rate", "preferred_rate"),
}  # fmt: skip
"""The figures of a task that a headline names; of others all."""
_NAMED = 6


@dataclass(frozen=True)
class Detail:
    """A table under the figures; its first column says what a row is of."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Detail]:
    """The tables of the evaluations of runs by their names; rows of several runs stand in one table, each with its run."""
    found: dict[tuple[str, tuple[str, ...]], list[tuple[str, ...]]] = {}
    for run, evaluation in evaluations.items():
        for task, result in evaluation.items():
            for detail in of_task(task, result):
                if len(evaluations) > 1:
                    rows: Sequence[tuple[str, ...]] = [(run, *row) for row in detail.rows]
                    found.setdefault((detail.title, ("run", *detail.head)), []).extend(rows)
                else:
                    found.setdefault((detail.title, detail.head), []).extend(detail.rows)
    return [Detail(title, head, tuple(rows)) for (title, head), rows in found.items()]


def of_task(task: str, result: Mapping[str, Any]) -> Iterator[Detail]:
    """The tables of one task's result."""
    confusion = result.get("confusion") or {}
    for method, words in _METHODS.items():
        if method in confusion:
            # The likeliest of the label words is always one of them.
            said = [f"said {word}" for word in confusion["rows"]] + (
                ["no label word"] if method == "generation" else []
            )
            yield Detail(
                f"{task}: confusion matrix {words}", ("side", "class", *said),
                tuple((side, word, *(f"{count:,}" for count in counts[: len(said)]))
                      for side, matrix in confusion[method].items() for word, counts in zip(confusion["rows"], matrix, strict=True)),
            )  # fmt: skip
    if unparsed := [(side, found) for side, found in (result.get("unparsed") or {}).items() if found["count"]]:
        rows = [(side, f"{found['count']:,}", _quoted(found["first"])) for side, found in unparsed]
        yield Detail(f"{task}: answers without a label word", ("side", "answers", "the first"), tuple(rows))
    if categories := result.get("categories"):
        sides = [side for side in _SIDES if any(side in of for of in categories.values())]
        yield Detail(
            f"{task}: score out of 10 by category", ("category", "questions", *sides),
            tuple((name, str(of["count"]), *(shown(of.get(side), ".2f") for side in sides)) for name, of in categories.items()),
        )  # fmt: skip
    if outcomes := result.get("outcomes"):
        mode = (result.get("judge") or {}).get("mode", "")
        position = {side: found for side, found in (result.get("position") or {}).items() if found}
        head = (
            "side",
            "wins",
            "ties",
            "losses",
            "not read",
            *(("preferred the first", "orders disagree") if position else ()),
        )
        rows = []
        for side, counts in outcomes.items():
            at = position.get(side)
            place = () if not position else ("–", "–") if at is None else (
                f"{at['first_preferred']:.1%}", f"{at['inconsistent']} of {at['pairs']} pairs")  # fmt: skip
            rows.append((side, *(f"{counts[one]:,}" for one in ("win", "tie", "loss", "unparsed")), *place))
        yield Detail(f"{task}: outcomes, {MODES.get(mode, mode)}", head, tuple(rows))


def lines(task: str, result: Mapping[str, Any]) -> list[str]:
    """The tables as lines of a console, one for all rows of a side."""
    found = []
    for detail in of_task(task, result):
        for first in dict.fromkeys(row[0] for row in detail.rows):
            cells = [zip(detail.head[1:], row[1:], strict=True) for row in detail.rows if row[0] == first]
            told = "; ".join(
                ", ".join(cell if name == "the first" else f"{name} {cell}" for name, cell in row) for row in cells
            )
            found.append(f"{detail.title}: {first}: {told}")
    return found


def warnings(task: str, result: Mapping[str, Any], folder: str) -> list[str]:
    """What makes figures of a task mean nothing, a line each; `folder` holds what the task wrote.

    Most verdicts unread: more than half of a side's. A judge that goes by the place: its two orders disagree in half of the pairs or more.
    Verdicts thrown by a coin disagree in half of them, and one place preferred in three quarters of the verdicts makes as many disagree.
    """
    found = []
    judged: Mapping[str, Any] = result.get("judged") or {}
    if any(2 * counts["unparsed"] > counts["judgements"] for counts in judged.values()):
        unread, all_ = (sum(counts[key] for counts in judged.values()) for key in ("unparsed", "judgements"))
        reason, times = next(iter((result.get("reasons") or {}).items()), ("not known", unread))
        limit = (result.get("judge") or {}).get("max_new_tokens")
        at = f" (evaluation.judge.max_new_tokens={limit})" if reason.startswith("cut off") and limit else ""
        found.append(
            f"{task}: {unread:,} of {all_:,} verdicts of the judge could not be read, so that its figures say little; the commonest reason, "
            f"{times:,} times: {reason}{at}. See {folder}/judgements.jsonl"
        )
    doubtful = {
        side: at
        for side, at in (result.get("position") or {}).items()
        if at and 2 * at["inconsistent"] >= at["pairs"] > 0
    }
    if doubtful:
        told = ", ".join(
            f"{side} {at['inconsistent']} of {at['pairs']} pairs, what stood first preferred in {at['first_preferred']:.0%}"
            for side, at in doubtful.items()
        )
        found.append(
            f"{task}: the judge's two orders disagree in half of the pairs or more, as a coin's would, so that the share of pairs won says "
            f"nothing ({told})"
        )
    return found


def headline(evaluation: Mapping[str, Any]) -> str:
    """What one fine-tune changed, in a sentence or two, or that it changed nothing; empty where nothing was measured on both sides."""
    told: dict[str, list[str]] = {}
    doubtful = [task for task, result in evaluation.items() if warnings(task, result, task)]
    for task, name, figure in figures(evaluation):
        if figure["verdict"] and task not in doubtful and name in _HEADLINE.get(task, (name,)):
            changed = figure["verdict"] in ("gain", "loss")
            sides = " → ".join(_value(figure[side], figure["form"]) for side in ("base", "adapter"))
            title = f"{task} {figure['title']}" if task == "imdb" else str(figure["title"])
            words = f"{title} {sides} ({figure['verdict']})" if changed else title
            told.setdefault("changed" if changed else figure["verdict"], []).append(words)
    changes = told.pop("changed", [])
    rest = [f"{verdict} in {shorten(names, _NAMED)}" for verdict, names in told.items()]
    rest += [f"the judge's verdicts mean little in {', '.join(doubtful)}"] if doubtful else []
    if changes:
        more = "; ".join(rest)
        return f"The fine-tune changed {shorten(changes, _NAMED, '; ')}." + (
            f" {more[0].upper()}{more[1:]}." if more else ""
        )
    return f"The fine-tune changed nothing that these items can tell from chance: {'; '.join(rest)}." if rest else ""


def _value(estimate: Mapping[str, float | None] | None, form: str) -> str:
    return shown({"value": (estimate or {}).get("value")}, form)


def _quoted(texts: Sequence[str]) -> str:
    """The texts, each once, on one line."""
    short = [text if len(text) <= _ANSWER else f"{text[: _ANSWER - 1]}…" for text in texts]
    return " · ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(short))
