"""Groups runs into variants: runs of one recipe on the same processes and machine are repeats of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distft.reports.bottleneck import Bound, Facts, Split, bound, whole_run
from distft.reports.comparability import sameness
from distft.reports.results import SHOWN, TIMES, WEIGHTS, Run, Spread


@dataclass(frozen=True)
class Variant:
    """Runs of one recipe on the same number of processes and the same machine.

    `spreads` has the keys of SHOWN and TIMES. `split` is the mean over its finished runs, `bound` what follows from it,
    and `time` how a whole run spends its time, in seconds ({} if unknown).
    """

    name: str
    runs: tuple[str, ...]
    finished: int
    spreads: Mapping[str, Spread | None]
    split: Split | None = None
    bound: Bound | None = None
    time: Mapping[str, float] = field(default_factory=dict)


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each variant by its name. A run that is not `recorded` joins its experiment's variant."""
    asked = {id(run): sameness(run.facts, run.strategy, run.world_size) for run in runs if run.recorded}
    # A run that failed before it loaded its weights does not know their digest: it joins the first variant that does.
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
    return dict(zip(_names([*groups.values()]), groups.values(), strict=True))


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The experiment's name of each variant, else the shortest name of its runs, else, if that is taken, its folder."""
    shortest = [min(group, key=lambda run: len(run.name)) for group in groups]
    variants = [{run.variant for run in group} for group in groups]
    if all(len(names) == 1 and "" not in names for names in variants) and len(set().union(*variants)) == len(groups):
        return [str(*names) for names in variants]
    names = [run.name for run in shortest]
    return [run.name if names.count(run.name) == 1 else run.path for run in shortest]


def summarise(name: str, runs: Sequence[Run]) -> Variant:
    """The variant that consists of `runs`."""
    finished = [run for run in runs if run.finished]
    spreads = {figure.key: Spread.of(run.figures[figure.key] for run in finished) for figure in (*SHOWN, *TIMES)}
    median = {key: None if spread is None else spread.median for key, spread in spreads.items()}
    split = Split.mean([run.split for run in finished if run.split is not None])
    time = whole_run(
        split, median["steps"], median["step_time_s"], median["evaluation_time_s"], median["saving_time_s"]
    )
    found = None if split is None else bound(split, _facts(finished[0], median))
    return Variant(name, tuple(run.name for run in runs), len(finished), spreads, split, found, time)


def _facts(run: Run, median: Mapping[str, float | None]) -> Facts:
    """What the bound of a variant depends on; `run` is one of its finished runs."""
    gpus = run.facts.get("machine.gpus") or [None]
    name = gpus[0].get("name") if isinstance(gpus[0], dict) else gpus[0]
    accumulation = run.facts.get("as run.gradient_accumulation_steps")
    rounds = (median["steps"] or 0) * (run.world_size or 0) * (accumulation or 0)
    tokens = median["tokens"] / rounds if rounds and median["tokens"] else None
    return Facts(name, median["mfu"], median["hfu"], median["step_time_s"], tokens, run.world_size or 1)
