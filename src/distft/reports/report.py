"""Run folders to one report: what each run gave, what was equal, and which differences stand out of the spread.

report([RunFolder(Path("runs/a")), RunFolder(Path("runs/b"))]).to_json(); markdown.py writes it as Markdown.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distft.errors import RunFolderError
from distft.evaluation import summary as details
from distft.files import to_json
from distft.reports.bottleneck import Bound, Facts, Split, bound, whole_run
from distft.reports.comparability import BY_DEFAULT, EQUAL, WEIGHTS, differences, sameness
from distft.reports.comparison import CLOSE, Comparison, judge, judge_items, sentence
from distft.reports.results import FIGURES, TIMES, Run, read_run
from distft.runs.folder import RunFolder
from distft.stats import CONFIDENCE, Interval, repeats_to_find
from distft.text import count

LOSS_TOLERANCE = 0.01
"""Losses of two variants that are further apart than this share of the first one's are not equal, where an experiment says nothing else."""


NOT_THERE = "not there"
"""The status of a run that should be there, and of which nobody knows how it ended."""
DAMAGED = "damaged"
"""The status of a run whose folder cannot be read."""


@dataclass(frozen=True)
class Spread:
    """A figure of a variant over its finished runs: median, least and greatest, and of how many."""

    median: float
    least: float
    greatest: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        known = _known(values)
        return cls(statistics.median(known), min(known), max(known), len(known)) if known else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


@dataclass(frozen=True)
class Variant:
    """Runs of one recipe on the same number of processes and the same machine; `spreads` by the keys of FIGURES and TIMES. `split` is the mean
    of its finished runs, `bound` what follows from it, `time` the seconds of a whole run by their use ({} where not known)."""

    name: str
    runs: tuple[str, ...]
    finished: int
    spreads: Mapping[str, Spread | None]
    split: Split | None = None
    bound: Bound | None = None
    time: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Equality:
    """Whether `what` was equal in all finished runs, None where fewer than two variants have one; `unequal` has the facts that
    were not, each with its value in every variant."""

    what: str
    declared: bool
    equal: bool | None
    unequal: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Report:
    """What `report` found. `differences` has every fact in which variants differ, with its value in each; `missing` the runs that
    should be there, each with why it is not (empty where nobody knows). `together` is how many variants are compared with the first:
    so many intervals of a figure are read at once."""

    title: str
    runs: tuple[Run, ...]
    variants: tuple[Variant, ...]
    equality: tuple[Equality, ...]
    comparisons: tuple[Comparison, ...]
    differences: Mapping[str, Mapping[str, Any]]
    missing: Mapping[str, str]
    loss_tolerance: float
    together: int

    @property
    def verdict(self) -> str:
        """The answer in one sentence: how the variants compare, or of a single one what its fine-tune changed."""
        if len(self.variants) == 1:
            return self._changed
        outcomes = {run.name: run.outcome for run in self.runs} | dict.fromkeys(self.missing, NOT_THERE)
        ended = {
            variant.name: ", ".join(dict.fromkeys(outcomes[run] for run in variant.runs))
            for variant in self.variants
            if not variant.finished
        }
        if self.variants[0].name in ended and self.comparisons:
            ended[self.variants[0].name] += f", so that the others are compared with {self.comparisons[0].against}"
        return sentence(self.comparisons, {figure.key: figure.title for figure in FIGURES if figure.quality}, ended)

    @property
    def _changed(self) -> str:
        """Of one variant: what its evaluation found, else what training measured before and after, else how it ended."""
        (variant,) = self.variants
        told = {run: details.headline(found) for run, found in self.evaluations.items()}
        if any(told.values()):
            return " ".join(f"{run}: {text}" if len(self.runs) > 1 else text for run, text in told.items() if text)
        if self.evaluations and not variant.finished:
            return "The base alone was evaluated, so that nothing says what a fine-tune changes."
        if not variant.finished:
            return f"{variant.name} has no finished run ({', '.join(dict.fromkeys(run.outcome for run in self.runs))})."
        before, after = (variant.spreads[f"perplexity_{when}"] for when in ("before", "after"))
        if before is None or after is None:
            return ""
        return (
            f"Held-out perplexity {before.median:,.2f} before training and {after.median:,.2f} after it, without an interval; "
            "distft evaluate says what the fine-tune changed."
        )

    @property
    def warnings(self) -> list[str]:
        """What makes figures of evaluations mean nothing, a line each."""
        return [
            line
            for run in self.runs
            for task, result in run.evaluation.items()
            for line in details.warnings(task, result, f"{run.path}/evaluation/{task}")
        ]

    @property
    def evaluations(self) -> dict[str, Mapping[str, Any]]:
        """Of each run that was evaluated, what its tasks found."""
        return {run.name: run.evaluation for run in self.runs if run.evaluation}

    def to_json(self) -> str:
        """The report as a JSON object; a run's facts stand in its folder."""
        document = {"verdict": self.verdict, "confidence": CONFIDENCE, **dataclasses.asdict(self)}
        for run, record in zip(self.runs, document["runs"], strict=True):
            del record["facts"]
            record["outcome"] = run.outcome
        return to_json(document) + "\n"


def report(
    folders: Sequence[RunFolder],
    *,
    title: str = "",
    equal: Sequence[str] = (),
    loss_tolerance: float = LOSS_TOLERANCE,
) -> Report:
    """The report on the runs in `folders`, as `report_on_runs` makes it.

    Raises:
        RunFolderError: there are no folders, or one is no run folder or is damaged.
    """
    if not folders:
        raise RunFolderError(f"{title or 'nothing to report on'}: give the folders of runs, or experiment=NAME")
    found = [*map(read_run, {folder.path.resolve(): folder for folder in folders}.values())]
    return report_on_runs(found, title=title, equal=equal, loss_tolerance=loss_tolerance)


def report_on_runs(
    wanted: Sequence[Run], *, title: str = "", equal: Sequence[str] = (), loss_tolerance: float = LOSS_TOLERANCE
) -> Report:
    """The report on the runs `wanted`; the first is of the variant that the others are compared with. Those of status NOT_THERE are
    its `missing`.

    `equal` (keys of EQUAL) is what must be equal for speeds to be compared, losses within the share `loss_tolerance`.

    Raises:
        RunFolderError: none of them is there.
    """
    runs = tuple(run for run in wanted if run.status != NOT_THERE)
    if not runs:
        raise RunFolderError(f"{title}: none of its {len(wanted)} runs is there")
    named = _grouped(wanted)
    variants = tuple(_variant(name, members) for name, members in named.items())
    done = {name: finished for name, members in named.items() if (finished := [run for run in members if run.finished])}
    declared = tuple(equal) or BY_DEFAULT
    first = next(iter(done), None)
    tell = _Comparer(done, declared, loss_tolerance)
    return Report(
        title=title or count(len(runs), "run"),
        runs=runs,
        variants=variants,
        equality=tuple(_equality(what, what in equal, done, loss_tolerance) for what in EQUAL),
        comparisons=tuple(
            comparison
            for name in done
            if first is not None and name != first
            for comparison in tell.compare(first, name)
        ),
        differences=_differences(named),
        missing={run.name: run.cause or "" for run in wanted if run.status == NOT_THERE},
        loss_tolerance=loss_tolerance,
        together=tell.together,
    )


# Variants ---------------------------------------------------------------------------------------------------------------


def _grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Variants by name: runs that are repeats of each other. One that is not `recorded` is with those of its experiment's variant."""
    asked = {id(run): sameness(run.facts, run.strategy, run.world_size) for run in runs if run.recorded}
    # One that failed before it had loaded its weights does not say which they were: it is with the first that does.
    loaded = {asked[id(run)]: run.facts[WEIGHTS] for run in reversed(runs) if run.recorded and WEIGHTS in run.facts}
    made = {
        id(run): f"{asked[id(run)]} {run.facts.get(WEIGHTS, loaded.get(asked[id(run)]))}"
        for run in runs
        if run.recorded
    }
    known = {run.variant: made[id(run)] for run in reversed(runs) if run.recorded and run.variant}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(made.get(id(run)) or known.get(run.variant) or sameness(run.facts), []).append(run)
    return dict(zip(_labels([*groups.values()]), groups.values(), strict=True))


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The name of each group's variant, or the shortest of its runs; where another group has that name as well, its folder."""
    shortest = [min(group, key=lambda run: len(run.name)) for group in groups]
    variants = [{run.variant for run in group} for group in groups]
    if all(len(names) == 1 and "" not in names for names in variants) and len(set().union(*variants)) == len(groups):
        return [str(*names) for names in variants]
    names = [run.name for run in shortest]
    return [run.name if names.count(run.name) == 1 else run.path for run in shortest]


def _variant(name: str, members: Sequence[Run]) -> Variant:
    done = [run for run in members if run.finished]
    spreads = {figure.key: Spread.of(run.figures[figure.key] for run in done) for figure in (*FIGURES, *TIMES)}
    median = {key: None if spread is None else spread.median for key, spread in spreads.items()}
    split = Split.mean([run.split for run in done if run.split is not None])
    time = whole_run(
        split, median["steps"], median["step_time_s"], median["evaluation_time_s"], median["saving_time_s"]
    )
    found = None if split is None else bound(split, _bound_facts(done[0], median))
    return Variant(name, tuple(run.name for run in members), len(done), spreads, split, found, time)


def _bound_facts(run: Run, median: Mapping[str, float | None]) -> Facts:
    """Of a variant, for its bound; `run` is one of its finished runs."""
    gpus = run.facts.get("machine.gpus") or [None]
    name = gpus[0].get("name") if isinstance(gpus[0], dict) else gpus[0]
    accumulation = run.facts.get("as run.gradient_accumulation_steps")
    rounds = (median["steps"] or 0) * (run.world_size or 0) * (accumulation or 0)
    tokens = median["tokens"] / rounds if rounds and median["tokens"] else None
    return Facts(name, median["mfu"], median["hfu"], median["step_time_s"], tokens, run.world_size or 1)


# What was equal, and what not -------------------------------------------------------------------------------------------


def _equality(what: str, declared: bool, done: Mapping[str, Sequence[Run]], tolerance: float) -> Equality:
    if len(done) < 2:
        return Equality(what, declared, None, {})
    unequal = _unequal_losses(done, tolerance) if what == "loss" else differences(_facts(done), EQUAL[what])
    return Equality(what, declared, not unequal, unequal)


def _facts(named: Mapping[str, Sequence[Run]]) -> dict[str, list[Mapping[str, Any]]]:
    return {name: [run.facts for run in members] for name, members in named.items()}


def _differences(named: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """Every fact in which variants differ. What is not `recorded` says of its recipe alone in what it differs."""
    recorded = {name: found for name, members in named.items() if (found := [run for run in members if run.recorded])}
    asked = {name: [run.asked for run in members] for name, members in named.items() if name not in recorded}
    known = {name: [run.asked for run in members] for name, members in recorded.items()}
    return differences(_facts(recorded)) | (differences({**known, **asked}) if asked else {})


def _unequal_losses(done: Mapping[str, Sequence[Run]], tolerance: float) -> dict[str, dict[str, Any]]:
    found = {}
    for key in ("train_loss", "eval_loss_after"):
        spreads = {name: Spread.of(run.figures[key] for run in members) for name, members in done.items()}
        medians = {name: None if spread is None else spread.median for name, spread in spreads.items()}
        known = [median for median in medians.values() if median is not None]
        apart = max((abs(median - known[0]) for median in known), default=0.0)
        if known and (len(known) < len(medians) or apart > tolerance * abs(known[0])):
            found[key] = medians
    return found


@dataclass(frozen=True)
class _Comparer:
    """Compares variants by their finished runs; speeds only where what is `declared` equal was."""

    done: Mapping[str, Sequence[Run]]
    declared: Sequence[str]
    tolerance: float

    @property
    def together(self) -> int:
        """How many variants have an interval beside the first: those with two runs and more."""
        return max(1, sum(len(members) > 1 for members in [*self.done.values()][1:]))

    def _estimates(self, variant: str, key: str) -> list[Mapping[str, float | None]]:
        return [found for run in self.done[variant] if (found := details.estimate(run.evaluation, key))]

    def compare(self, first: str, name: str) -> list[Comparison]:
        """The variant `name` beside `first` in every figure that both have."""
        pair = {key: self.done[key] for key in (first, name)}
        unequal = {
            what: told.unequal for what in EQUAL if not (told := _equality(what, True, pair, self.tolerance)).equal
        }
        broken = [what for what in self.declared if what in unequal]
        reworded = "tokens" in unequal and any(
            differences(_facts(pair), [key]) for key in ("model.name", "model.tokenizer")
        )
        compared = []
        for figure in (figure for figure in FIGURES if figure.compared):
            ours, theirs = (_known(run.figures[figure.key] for run in members) for members in pair.values())
            if not ours or not theirs:
                continue
            found, verdict = judge(ours, theirs, self.together)
            why = ""
            if figure.quality:
                one, other = (self._estimates(key, figure.key) for key in (first, name))
                verdict, why = judge_items(one, other, figure.form)
                found = found and Interval(found.centre)
            elif figure.per_token and not figure.speed and verdict != "equal":
                found, verdict = found and Interval(found.centre), "no spread"
            if figure.speed and broken == ["loss"]:
                found, verdict, why = None, "withheld", _diverged(unequal["loss"], first, name, self.tolerance)
            elif figure.speed and broken:
                found, verdict, why = None, "not compared", f"not equal: {', '.join(broken)}"
            elif figure.per_token and reworded:
                found, verdict, why = None, "not compared", "the tokenizers differ, and it is counted by tokens"
            ratio = found or Interval(None)
            undecided = verdict == "no difference" and ratio.low is not None
            wanted = repeats_to_find(CLOSE, ours, theirs, self.together) if undecided else None
            compared.append(Comparison(name, first, figure.key, ratio.centre, ratio.low, ratio.high, verdict, why, wanted))  # fmt: skip
        return compared


def _diverged(losses: Mapping[str, Mapping[str, Any]], first: str, name: str, tolerance: float) -> str:
    """In words by how much losses that were declared equal are apart."""
    titles = {figure.key: figure.title for figure in FIGURES}
    told = []
    for key, medians in losses.items():
        ours, theirs = medians[first], medians[name]
        if ours is None or theirs is None:
            told.append(f"{titles[key]} is known of one alone")
        else:
            told.append(
                f"{titles[key]} {theirs:.4f} against {ours:.4f}, {abs(theirs - ours) / abs(ours or 1):.2%} apart"
            )
    return f"the losses were declared equal and diverge by more than {tolerance:.2%} ({'; '.join(told)})"
