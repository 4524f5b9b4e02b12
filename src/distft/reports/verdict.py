"""The wording of verdicts in a report: the answer at its top, the cells of its tables, and what they mean.

To change how a report says that one variant is faster, or that it cannot tell, edit this module.
Which verdict applies (`different`, `inconclusive`, …) is decided in `reports/comparison.py`. The verdicts on what a
fine-tune changed in an evaluation task (`gain`, `loss`, …) are decided in `evaluation/metrics.py` and explained in
`evaluation/summary.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distft.reports.comparability import MARGIN, ROUNDING
from distft.reports.results import LABELS, SHOWN
from distft.reports.tables import written
from distft.stats import CONFIDENCE
from distft.text import count

if TYPE_CHECKING:
    from distft.reports.comparison import Comparison

_NAMED = 3
"""How many variants without a finished run the answer names; the table lists all."""


# The answer: one sentence per variant ---------------------------------------------------------------------------------


def answer(comparisons: Iterable[Comparison], ended: Mapping[str, str], first: str) -> str:
    """How fast each variant is compared with the first, or why the report does not say.

    `ended` maps variants without a finished run to how their runs ended. If `first`, the variant to compare with, is
    one of them, the others are compared with the first that finished. Where losses cannot be compared because the
    tokenizers differ, the answer also says how well each variant solves its task.
    """
    found = list(comparisons)
    speeds = [item for item in found if item.figure == "samples_per_second"]
    sentences = [_speed(item) + _quality(item, found) for item in speeds]
    if not speeds:
        sentences = ["Nothing to compare: fewer than two variants have a finished run with a measured speed"]
    for name, how in [*ended.items()][:_NAMED]:
        instead = f"; the others are compared with {speeds[0].against}" if speeds and name == first else ""
        sentences.append(f"{name} has no finished run ({how}){instead}")
    if len(ended) > _NAMED:
        more = len(ended) - _NAMED
        sentences.append(f"{count(more, 'more variant')} {'has' if more == 1 else 'have'} no finished run")
    return ". ".join(sentences) + "."


def _speed(item: Comparison) -> str:
    one, other, margin = item.variant, item.against, f"{MARGIN - 1:.0%}"
    times = f"{item.ratio:.2f}× as fast" if item.ratio else "speeds that have no ratio"
    interval = "" if item.low is None or item.high is None else f"{CONFIDENCE:.0%} CI {item.low:.2f}–{item.high:.2f}"
    match item.verdict:
        case "different":
            return f"{one} is {times} as {other} ({interval})" if item.ratio else f"{one} and {other} differ in speed"
        case "no difference":
            return f"No difference in speed between {one} and {other} ({interval}, within ±{margin})"
        case "inconclusive":
            shown = ", ".join(filter(None, [times, interval]))
            text = f"Inconclusive: {_repeats(item)} cannot separate {one} from {other} ({shown})"
            needed = f"Detecting a difference of {margin} takes about {item.repeats} runs of each"
            return f"{text}. {needed}" if item.repeats else text
        case "no spread":
            return f"Inconclusive: {_repeats(item)} cannot separate {one} from {other} ({times} here)"
        case "withheld":
            return f"No verdict on the speed of {one} compared with {other}: {item.why}"
        case "not compared":
            return f"The speed of {one} is not compared with that of {other} ({item.why})"
        case _:
            return f"{one} is as fast as {other}"


def _repeats(item: Comparison) -> str:
    """`3 repeats`, or `one run of b` where a side has a single one."""
    ours, theirs = item.runs
    if 1 in item.runs:
        return "one run of each" if ours == theirs else f"one run of {item.variant if ours == 1 else item.against}"
    return f"{ours} repeats" if ours == theirs else f"{ours} and {theirs} repeats"


def _quality(speed: Comparison, found: Iterable[Comparison]) -> str:
    """How well the task is solved, where losses are per token of different tokenizers and therefore say nothing."""
    same = [item for item in found if item.variant == speed.variant]
    incomparable = any(item.figure == "train_loss" and item.verdict == "not compared" for item in same)
    if speed.verdict in ("withheld", "not compared") or not incomparable:
        return ""
    quality = {figure.key for figure in SHOWN if figure.quality}
    solved = [
        f"{LABELS[item.figure]} {item.why}: {item.verdict}"
        for item in same
        if item.figure in quality and item.ratio is not None
    ]
    task = f"On the task: {'; '.join(solved)}" if solved else "No run measured how well they solve the task"
    return f". The tokenizers differ, so losses are not compared. {task}"


# One variant: what its fine-tune changed ------------------------------------------------------------------------------

BASE_ONLY = "Only the base model was evaluated, so the report cannot say what a fine-tune changes."


def no_finished_run(variant: str, outcomes: Iterable[str]) -> str:
    return f"{variant} has no finished run ({', '.join(dict.fromkeys(outcomes))})."


def perplexity(before: float, after: float) -> str:
    """What training itself measured, for a run that was not evaluated."""
    return (
        f"Held-out perplexity {written(before, ',.2f')} before training and {written(after, ',.2f')} after, without a "
        "confidence interval; "
        "run distft evaluate to see what the fine-tune changed."
    )


def overlap(samples: Mapping[str, int]) -> str:
    """What training says of held-out samples that it also trained on; follows the run's name."""
    found = " and ".join(f"{number:,} {name} samples" for name, number in samples.items() if number)
    return f"{found} were trained on, so its held-out losses are not those of unseen text"


def divergence(step: int | None, not_finite: Mapping[str, int]) -> str:
    """What a log says that ends with losses that are not finite; follows its name."""
    losses = ", ".join(f"{key} is not finite from step {first:,} on" for key, first in not_finite.items())
    return losses if step is None else f"diverged from step {step:,}: {losses}"


# The cells of the tables ----------------------------------------------------------------------------------------------


def cell(item: Comparison | None) -> tuple[str, str]:
    """A comparison as it appears in a table: words, and the interval in brackets; both may be empty."""
    if item is None or item.verdict == "not compared":
        return "", ""
    interval = "" if item.low is None or item.high is None else f"({item.low:.3f}–{item.high:.3f})"
    ratio = "different" if item.ratio is None else f"{item.ratio:.3f}×"
    match item.verdict:
        case "different":
            return ratio, interval
        case "no spread":
            return ("", "") if item.ratio is None else (f"({ratio})", "")
        case _:
            return item.verdict, interval if item.verdict in ("no difference", "inconclusive") else ""


def legend(comparisons: Sequence[Comparison], together: int) -> list[str]:
    """What the cells of a table of comparisons mean; only those that occur."""
    meanings = {
        "different": "1.23× (1.20–1.26): the ratio of the geometric means and its interval, which excludes 1.",
        "no difference": f"no difference (0.98–1.02): the interval contains 1 and lies within {MARGIN - 1:.0%} of it.",
        "inconclusive": "inconclusive (0.90–1.20): the interval contains 1 and is wider; more repeats may tell.",
        "equal": f"equal: all runs agree to within {ROUNDING:.2%}.",
        "no spread": (
            "(1.23×): no interval. Either a side has a single run, so the difference may be chance, or the figure is a "
            "loss, which the shared seed makes the same in all repeats."
        ),
    }
    verdicts = {item.verdict for item in comparisons}
    lines = [meaning for verdict, meaning in meanings.items() if verdict in verdicts]
    if any(item.low is not None for item in comparisons):
        jointly = (
            ""
            if together == 1
            else f", jointly for the {together} variants in a column (Bonferroni), not across columns"
        )
        lines.append(f"Intervals: Welch's, on logarithms, at {CONFIDENCE:.0%}{jointly}.")
    return lines


def reason(item: Comparison) -> str:
    """Why a figure has no verdict, or what a verdict on a task rests on; follows the variant's name and a colon."""
    if item.verdict == "withheld":
        return f"no verdict on its speed: {item.why}"
    if item.why.startswith("not equal"):
        return f"its speed is not compared because it did different work ({item.why})"
    if item.verdict != "not compared":
        return f"{LABELS[item.figure]} {item.why}: {item.verdict}"
    return f"{LABELS[item.figure]} is not compared: {item.why}"


def items(base: float, adapter: float, low: float, high: float, form: str) -> str:
    """A task's figure on both sides, and the interval of the difference where there is one."""
    interval = f" (95% CI of the difference {low:+{form}} to {high:+{form}}, over the items)"
    return f"{base:{form}} → {adapter:{form}}" + (interval if math.isfinite(low) and math.isfinite(high) else "")


def diverged(losses: Mapping[str, Mapping[str, Any]], first: str, name: str, tolerance: float) -> str:
    """By how much losses that were declared equal differ. `losses` has the medians of both variants by figure."""
    if not losses:
        return "the losses were declared equal, and no run measured one"
    parts = []
    for key, medians in losses.items():
        ours, theirs = medians[first], medians[name]
        if ours is None or theirs is None:
            parts.append(f"only one of them has a {LABELS[key]}")
        else:
            apart = abs(theirs - ours) / abs(ours or 1)
            by = f", {apart:.2%} apart" if math.isfinite(apart) else ""
            parts.append(f"{LABELS[key]} {written(theirs, '.4f')} vs {written(ours, '.4f')}{by}")
    return f"the losses were declared equal but differ by more than {tolerance:.2%} ({'; '.join(parts)})"
