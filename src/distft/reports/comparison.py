"""Compares the runs of two variants, figure by figure: by how much they differ, and whether the repeats can tell.

This module computes; `verdict` puts the results into words.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distft.evaluation import summary
from distft.reports import verdict as wording
from distft.reports.comparability import EQUAL, MARGIN, ROUNDING, differences, equality, facts_of
from distft.reports.results import HELD_OUT, SHOWN, Run, known
from distft.runs.figures import Figure
from distft.stats import Estimate, Interval, difference, ratio, repeats_to_find


@dataclass(frozen=True)
class Comparison:
    """One figure of a variant compared with the first variant's.

    `ratio` is the ratio of the geometric means, `low` and `high` its confidence interval; each is None where unknown.
    `verdict` is:

    - `different`: the interval excludes 1. (Figures that are 0 or negative have no ratio; then the interval of the
      difference excludes 0.)
    - `no difference`: the interval contains 1 and lies within MARGIN
    - `inconclusive`: the interval contains 1 and is wider than that
    - `equal`: all values agree up to ROUNDING
    - `no spread`: one run on a side, or a loss: repeats share the seed that determines it
    - `withheld`: a speed, where losses that were declared equal diverge
    - `not compared`: see `why`

    `repeats` is how many runs of each side would detect a ratio of MARGIN, for an inconclusive speed; `runs` how many
    this variant and the first one have.
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
    runs: tuple[int, int] = (0, 0)


def judge(one: Sequence[float], other: Sequence[float], together: int = 1) -> tuple[Interval | None, str]:
    """The ratio of `other` to `one` (None if a value is 0 or negative) and the verdict; `together` as in
    `stats.difference`."""
    values = [*one, *other]
    found = ratio(one, other, together) if min(values) > 0 else None
    if max(values) - min(values) <= ROUNDING * max(map(abs, values)):
        return found, "equal"
    if min(len(one), len(other)) < 2:
        return found, "no spread"
    if found is None:
        return None, "different" if difference(one, other, together).excludes(0) else "inconclusive"
    if found.excludes(1):
        return found, "different"
    assert found.low is not None
    assert found.high is not None
    return found, "no difference" if found.low >= 1 / MARGIN and found.high <= MARGIN else "inconclusive"


def judge_items(
    one: Sequence[Mapping[str, float | None]], other: Sequence[Mapping[str, float | None]], form: str
) -> tuple[str, str]:
    """The verdict on a task's figure, and the numbers behind it as text.

    Each side has one estimate (`value`, `low`, `high`) per run. Their intervals are over the task's items: repeats
    share the seed, so how little they differ says nothing about how well they would do on other items. Both sides
    answered the same items, but the pairing is not used, which makes the interval of the difference conservative
    (Newcombe 1998, method 10, without the correlation of the pairs).
    """

    def mean(runs: Sequence[Mapping[str, float | None]], key: str) -> float:
        return statistics.fmean(math.nan if (value := each[key]) is None else value for each in runs)

    base, adapter = (Estimate(mean(runs, "value"), mean(runs, "low"), mean(runs, "high")) for runs in (one, other))
    apart = Estimate.share_difference(base, adapter, correlation=0.0)
    text = wording.items(base.value, adapter.value, apart.low, apart.high, form)
    if not (math.isfinite(apart.low) and math.isfinite(apart.high)):
        return "no spread", text
    return "inconclusive" if apart.low <= 0 <= apart.high else "different", text


@dataclass(frozen=True)
class Comparer:
    """Compares variants by their finished runs. Speeds are compared only if everything `declared` equal was equal.

    `finished` has the finished runs of each variant; `tolerance` is the relative difference up to which losses are
    equal. With `seeds`, repeats have seeds of their own, so that their losses have a spread.
    """

    finished: Mapping[str, Sequence[Run]]
    declared: Sequence[str]
    tolerance: float
    seeds: bool = False

    @property
    def together(self) -> int:
        """How many variants get an interval against the first: those with at least two runs."""
        return max(1, sum(len(runs) > 1 for runs in [*self.finished.values()][1:]))

    def compare(self, first: str, name: str) -> Iterator[Comparison]:
        """Compare the variant `name` with `first` in every figure that both have."""
        pair = {key: self.finished[key] for key in (first, name)}
        unequal = {
            what: each.unequal for what in EQUAL if not (each := equality(what, True, pair, self.tolerance)).equal
        }
        broken = [what for what in self.declared if what in unequal]
        retokenized = "tokens" in unequal and bool(differences(facts_of(pair), ("model.name", "model.tokenizer")))
        other_rows = bool(differences(facts_of(pair), (HELD_OUT, "evaluation.max_samples")))
        for figure in (figure for figure in SHOWN if figure.compared):
            ours, theirs = (known([run.figures[figure.key] for run in runs]) for runs in pair.values())
            if not ours or not theirs:
                continue
            if all(map(math.isfinite, [*ours, *theirs])):
                found, verdict, why = self._judged(figure, pair, ours, theirs)
            else:
                found, verdict, why = None, "not compared", "it is NaN or infinite in a run"
            if figure.speed and broken == ["loss"]:
                found, verdict, why = None, "withheld", wording.diverged(unequal["loss"], first, name, self.tolerance)
            elif figure.speed and broken:
                found, verdict, why = None, "not compared", f"not equal: {', '.join(broken)}"
            elif figure.per_token and retokenized:
                found, verdict, why = None, "not compared", "it is measured per token, and the tokenizers differ"
            elif figure.path is not None and other_rows:
                found, verdict, why = None, "not compared", "it is measured on held-out rows, which differ"
            ratio = found or Interval(None)
            undecided = verdict == "inconclusive" and ratio.low is not None
            yield Comparison(
                variant=name,
                against=first,
                figure=figure.key,
                ratio=ratio.centre,
                low=ratio.low,
                high=ratio.high,
                verdict=verdict,
                why=why,
                repeats=repeats_to_find(MARGIN, ours, theirs, self.together) if undecided else None,
                runs=(len(theirs), len(ours)),
            )

    def _judged(
        self, figure: Figure, pair: Mapping[str, Sequence[Run]], ours: Sequence[float], theirs: Sequence[float]
    ) -> tuple[Interval | None, str, str]:
        found, verdict = judge(ours, theirs, self.together)
        without_interval = found and Interval(found.centre)
        if figure.quality:
            if different := _measured_differently([run for runs in pair.values() for run in runs], figure):
                return None, "not compared", different
            one, other = (_estimates(runs, figure.key) for runs in pair.values())
            return without_interval, *judge_items(one, other, figure.format)
        by_seed = figure.per_token and not figure.speed  # a loss, which a shared seed determines
        if by_seed and not self.seeds and verdict != "equal":
            return without_interval, "no spread", ""
        return found, verdict, ""


def _measured_differently(runs: Sequence[Run], figure: Figure) -> str:
    """Why a task's figures of the runs cannot be compared: other items, or another judge; empty if they can."""
    task = figure.task[0] if figure.task else ""
    results = [run.evaluation[task] for run in runs if task in run.evaluation]
    for key, what in (("items_digest", "different items"), ("judge", "different judges")):
        if len({json.dumps(result[key], sort_keys=True) for result in results if result.get(key) is not None}) > 1:
            return f"its runs were evaluated with {what}"
    return ""


def _estimates(runs: Sequence[Run], key: str) -> list[Mapping[str, float | None]]:
    if key == "reward_accuracy":
        shares = [share for run in runs if (share := run.reward_accuracy) is not None]
        return [{"value": share.value, "low": share.low, "high": share.high} for share in shares]
    return [found for run in runs if (found := summary.estimate(run.evaluation, key))]
