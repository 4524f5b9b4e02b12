"""Parse a judge's verdict from what it wrote: `[RESULT] 4`, or `[RESULT] A` if two answers were compared.

The verdict must follow the marker and be alone on its line. Other digits and letters in the text are never considered:
anything else is unparsed, with a reason, and the judge is asked again. Of a model that reasons before it answers, only
what follows the end of its reasoning (`</think>`) counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["grade", "preference"]

_OPEN, _CLOSE = r"\[({<【", r"\])}>】"
_MARKER = re.compile(rf"(?:[{_OPEN}]|\*\*|__)[\s*_`\\]*RESULT(?![A-Za-z0-9])", re.IGNORECASE)
_TORN = re.compile(rf"(?:[{_OPEN}]|\*\*|__)[\s*_`\\]*(?:R|RE|RES|RESU|RESUL)\Z", re.IGNORECASE)
_LEAD = rf"[\s*_`\\:=\"'“”{_OPEN}{_CLOSE}]*"
_TRAIL = rf"[ \t*_`\\\"'“”{_CLOSE}]*"
_TAG = r"(?:</?\w+>|<\|\w+\|>)?[ \t]*"  # </result>, or an end-of-turn token that a server did not remove
_LINE_ENDS = r"[.!]?" + _TRAIL + _TAG + r"(?P<end>[\r\n]|\Z)"
_VERDICT: dict[Kind, re.Pattern[str]] = {
    "grade": re.compile(rf"{_LEAD}(?P<value>[1-5]){_TRAIL}(?:/{_TRAIL}5{_TRAIL})?{_LINE_ENDS}", re.ASCII),
    "preference": re.compile(rf"{_LEAD}(?P<value>[AB]){_TRAIL}{_LINE_ENDS}", re.ASCII),
}
_ASKED: dict[Kind, str] = {"grade": "an integer from 1 to 5", "preference": "A or B"}
_REASONING = r"(?:seed:)?(?:think|thinking|thought|thoughts|reasoning|reflection)"
_OPEN_TAG = rf"(<{_REASONING}>|\[THINK\]|◁think▷)"
_OPENS = re.compile(rf"^[ \t]*{_OPEN_TAG}", re.IGNORECASE | re.MULTILINE)
_OPENED = re.compile(rf"{_OPEN_TAG}\s*\Z", re.IGNORECASE)
_CLOSES = re.compile(rf"</{_REASONING}>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>", re.IGNORECASE)
_NUMBER = re.compile(rf"{_LEAD}(?P<number>[-+~]?[0-9][^\s{_CLOSE}*]*)")


@dataclass(frozen=True)
class Verdict:
    """`value` is 1 to 5, or A or B. If it is None, `reason` says why the text has no verdict."""

    value: int | str | None
    reason: str | None = None


def opens_reasoning(prompt: str) -> bool:
    """Whether the prompt ends by opening the judge's reasoning, as some chat templates do: the text then begins within
    it."""
    return _OPENED.search(prompt) is not None


def reasons_from_the_start(text: str) -> bool:
    """Whether the text ends reasoning that only its prompt can have opened."""
    close = _CLOSES.search(text)
    return close is not None and _OPENS.search(text, 0, close.start()) is None


def parse_verdict(text: str, kind: Kind, *, finished: bool = True, reasoning: bool = False) -> Verdict:
    """The verdict of the last marker in `text`, or in what follows its reasoning.

    `finished` is False if the judge ran into its token limit. A verdict at the very end of the text may then be the
    beginning of another (`4` of `4.5`), so it counts only if its line has ended. `reasoning` is True if the text begins
    within reasoning that the prompt has opened.
    """
    if not text.strip():
        return Verdict(None, "the judge wrote nothing")
    closes = [*_CLOSES.finditer(text)]
    if closes:
        text = text[closes[-1].end() :]
    opened = _OPENS.search(text)
    if opened is not None or (reasoning and not closes):
        tag = "<think>" if opened is None else opened[1]
        return Verdict(None, f"its reasoning has no end ({tag})" if finished else f"cut off in its reasoning ({tag})")
    if closes and not text.strip():
        return Verdict(None, f"nothing after {closes[-1][0]}" if finished else f"cut off after {closes[-1][0]}")
    markers = list(_MARKER.finditer(text))
    if not markers:
        if _TORN.search(text.rstrip()):
            return Verdict(None, "cut off inside [RESULT]")
        return Verdict(None, "no [RESULT]" if finished else "cut off before [RESULT]")
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    tails = [text[marker.end() : end] for marker, end in zip(markers, ends, strict=True)]
    found = [_VERDICT[kind].match(tail) for tail in tails]
    last = found[-1]
    if last is None:
        return Verdict(None, _reason(tails[-1], kind))
    if not finished and not last["end"]:
        return Verdict(None, "cut off at the verdict")
    earlier = [_said(match, tail) for match, tail in zip(found[:-1], tails[:-1], strict=True)]
    if differing := [said for said in earlier if said is not None and said != last["value"]]:
        return Verdict(None, f"conflicting results: {', '.join([*differing, last['value']])}")
    return Verdict(int(last["value"]) if kind == "grade" else last["value"])


def _said(match: re.Match[str] | None, tail: str) -> str | None:
    """What an earlier marker says: its verdict, or a number that is not a verdict. None if it only quotes the
    format."""
    if match is not None:
        return str(match["value"])
    number = _NUMBER.match(tail)
    return number["number"] if number else None


def _reason(tail: str, kind: Kind) -> str:
    shown = " ".join(re.sub(rf"^{_LEAD}", "", tail).split())[:40]
    if not shown:
        return "cut off after [RESULT]"
    return f"{shown!r} after [RESULT] is not {_ASKED[kind]} alone on its line"
