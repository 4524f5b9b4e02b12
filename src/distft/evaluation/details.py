"""What stands behind the figures of evaluations, for the console and for reports: confusion matrices, categories, outcomes, the judge.

From the result of a task, or from what summaries keep of it (PARTS), to tables, and to warnings of figures that say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.evaluation.columns import shown

PARTS = (
    "figures", "categories", "confusion", "unparsed", "outcomes", "position", "judge", "judged", "reasons",
)  # fmt: skip
"""What of a task's result a summary keeps, and a report reads."""
MODES = {"absolute": "graded one by one", "pairwise": "asked which is better, in both orders"}
_METHODS = {"logprob": "by likelihood", "generation": "by generation"}
_SIDES = ("base", "adapter")
_ANSWER = 60
"""Characters of an answer that are shown."""


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
            said = confusion["columns"] if method == "generation" else confusion["rows"]
            yield Detail(
                f"{task}: confusion matrix {words}", ("side", "class", *(f"said {word}" for word in said)),
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
    """The tables as lines of a console, one a row."""
    return [
        f"{detail.title}: {', '.join(f'{name} {cell}' if name not in _NAMELESS else cell for name, cell in zip(detail.head, row, strict=True))}"
        for detail in of_task(task, result)
        for row in detail.rows
    ]


_NAMELESS = ("side", "category", "the first")


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


def _quoted(texts: Sequence[str]) -> str:
    """The texts, each once, on one line."""
    short = [text if len(text) <= _ANSWER else f"{text[: _ANSWER - 1]}…" for text in texts]
    return " · ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(short))
