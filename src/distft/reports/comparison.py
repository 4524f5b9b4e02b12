"""What is said of two variants: whether their runs differ in a figure, by how much, and the answer in one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distft.stats import Interval, difference, ratio

CLOSE = 1.05
"""Speeds are called equal where the interval of their ratio lies within this factor either way. A wider one that holds 1 says that the
repeats cannot tell."""

ROUNDING = 1e-4
"""Figures that all lie within this share of each other are equal: strategies round sums in different orders."""


_NAMED = 3
"""Variants without a finished run that the sentence names; the table has all."""


@dataclass(frozen=True)
class Comparison:
    """A variant beside the first, in one figure. `ratio` is of the geometric means, `low` and `high` its interval, each None where there
    is none. `verdict`:

    - `different`: the interval excludes 1 (of figures that are 0 or negative, which have no ratio, that of the difference excludes 0)
    - `no difference`: it does not
    - `equal`: all but for rounding
    - `no spread`: fewer than two runs on a side, or a loss: repeats share the seed that decides it, so that theirs is no spread of it
    - `withheld`: a speed, where losses that were declared equal diverge
    - `not compared`: `why` not

    `repeats` of each side would find a ratio of CLOSE with the spread that these have; None where the verdict is another.
    """

    variant: str
    against: str
    figure: str
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str
    why: str = ""
    repeats: int | None = None


def judge(one: Sequence[float], other: Sequence[float], together: int = 1) -> tuple[Interval | None, str]:
    """The ratio of `other` to `one` (None where a value is 0 or negative) and the verdict; `together` as in `intervals`."""
    values = [*one, *other]
    found = ratio(one, other, together) if min(values) > 0 else None
    if max(values) - min(values) <= ROUNDING * max(map(abs, values)):
        return found, "equal"
    if min(len(one), len(other)) < 2:
        return found, "no spread"
    apart = difference(one, other, together).excludes(0) if found is None else found.excludes(1)
    return found, "different" if apart else "no difference"


def judge_items(
    one: Sequence[Mapping[str, float | None]], other: Sequence[Mapping[str, float | None]], form: str
) -> tuple[str, str]:
    """The verdict on a figure of a task, and why, in words. Each side's estimates (`value`, `low`, `high`) are those of its runs; their
    intervals are over the task's items, for repeats share the seed, and how little they differ says nothing of how well they learned.

    The items of both sides are the same ones, but which of them each solves is not looked at: the interval of the difference is then
    rather too wide (Newcombe 1998, method 10, without the correlation of the pairs)."""
    # Its library takes half a second, for which most reports need not wait.
    from distft.evaluation.metrics import Estimate

    def mean(runs: Sequence[Mapping[str, float | None]], key: str) -> float:
        return statistics.fmean(math.nan if (value := each[key]) is None else value for each in runs)

    base, adapter = (Estimate(mean(runs, "value"), mean(runs, "low"), mean(runs, "high")) for runs in (one, other))
    apart = Estimate.apart(base, adapter, correlation=0.0)
    told = f"{base.value:{form}} to {adapter.value:{form}}"
    if not (math.isfinite(apart.low) and math.isfinite(apart.high)):
        return "no spread", told
    verdict = "no difference" if apart.low <= 0 <= apart.high else "different"
    return verdict, f"{told}, by {apart.low:+{form}} to {apart.high:+{form}} over the items"


def sentence(
    comparisons: Iterable[Comparison], quality: Mapping[str, str] | None = None, ended: Mapping[str, str] | None = None
) -> str:
    """How fast each variant is beside the first, or why that is not said. `quality` has the titles of figures of how well a task is solved, which
    belong to the answer where the variants' losses cannot be compared; `ended` are variants that have no finished run, with how theirs
    ended."""
    found = list(comparisons)
    unfinished = [*(ended or {}).items()]
    named = [f"{name} has no finished run ({how})" for name, how in unfinished[:_NAMED]]
    named += [f"{len(unfinished) - _NAMED} more have none either"] if len(unfinished) > _NAMED else []
    speeds = [item for item in found if item.figure == "samples_per_second"]
    if not speeds:
        nothing = "There is nothing to compare: fewer than two variants have finished runs that say how fast they were"
        return "; ".join([nothing, *named]) + "."
    told = []
    for item in speeds:
        beside = [other for other in found if other.variant == item.variant]
        told.append(_speed(item) + _quality(item, beside, quality or {}))
    text = "; ".join([*told, *named]) + "."
    return text if text.startswith(speeds[0].variant) else text[0].upper() + text[1:]  # a variant is called as it is


def _speed(item: Comparison) -> str:
    one, other = item.variant, item.against
    if item.verdict == "withheld":
        return f"the verdict on the speed of {one} against {other} is withheld: {item.why}"
    if item.verdict == "not compared":
        return f"{one} is not compared with {other} ({item.why})"
    if item.verdict == "no spread":
        seen = f" (here {_times(item)})" if item.ratio else ""
        return f"{one} ran once or {other} did, so that a difference could be chance{seen}"
    if item.verdict == "different" and item.ratio:
        return f"{one} is {_times(item)}"
    if item.low is None or item.high is None:
        return f"{one} is as fast as {other}"
    if item.low >= 1 / CLOSE and item.high <= CLOSE:
        return f"{one} is as fast as {other} ({item.low:.2f}–{item.high:.2f} times)"
    wanted = f"; a difference of {CLOSE - 1:.0%} takes about {item.repeats} of each" if item.repeats else ""
    return f"whether {one} is faster or slower than {other} the repeats cannot tell (here {_times(item)}{wanted})"


def _times(item: Comparison) -> str:
    """`1.29 times as fast as a (1.24–1.34)`; what is slower is said from its own side."""
    assert item.ratio is not None
    slow = item.ratio < 1
    centre, low, high = item.ratio, item.low, item.high
    if slow:  # `low` may be as good as 0, and `high` infinite
        centre, low, high = (
            1 / centre,
            None if high is None else 1 / high,
            None if low is None else 1 / low if low else math.inf,
        )
    bounds = "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"
    return f"{centre:.2f} times as {'slow' if slow else 'fast'} as {item.against}{bounds}"


def _quality(speed: Comparison, beside: Sequence[Comparison], quality: Mapping[str, str]) -> str:
    """Where losses are per token of another tokenizer: that the time is to the same samples, and how well the task is solved."""
    if speed.verdict in ("withheld", "not compared") or not any(
        i.figure == "train_loss" and i.verdict == "not compared" for i in beside
    ):
        return ""
    solved = [item for item in beside if item.figure in quality and item.ratio is not None]
    words = [f"{quality[item.figure]} {item.why or f'× {item.ratio:.3f}'}, {item.verdict}" for item in solved]
    told = ", and on the task: " + "; ".join(words) if words else "; how well they solve the task no run has measured"
    return f", in time to the same samples{told}"


def bounds(item: Comparison) -> str:
    """The interval of a ratio as it stands in a table; empty where there is none."""
    return "" if item.low is None or item.high is None else f" ({item.low:.3f} – {item.high:.3f})"
