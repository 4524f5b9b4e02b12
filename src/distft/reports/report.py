"""From run folders to a report: what each run gave, what was equal, and how the variants compare.

report([RunFolder(Path("runs/a")), RunFolder(Path("runs/b"))]).to_json()

`sections` lays a report out as tables and text, which `markdown` and `html` render.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distft.errors import RunFolderError
from distft.evaluation import summary as details
from distft.files import to_json
from distft.reports import verdict as wording
from distft.reports.comparability import BY_DEFAULT, EQUAL, LOSS_TOLERANCE, Equality, all_differences, equality
from distft.reports.comparison import Comparer, Comparison
from distft.reports.repeats import pair_by_seed, target_of, with_target
from distft.reports.results import NOT_THERE, Run, read_run
from distft.reports.variants import Variant, group, summarise
from distft.runs.folder import RunFolder
from distft.stats import CONFIDENCE
from distft.text import count


@dataclass(frozen=True)
class Report:
    """What is known about a set of runs.

    `differences` has every fact in which variants differ, with its value in each. `missing` maps runs that should exist
    to why they do not (empty if unknown). `together` is how many variants are compared with the first, so how many
    intervals of a figure are read at once.
    """

    title: str
    runs: tuple[Run, ...]
    variants: tuple[Variant, ...]
    equality: tuple[Equality, ...]
    comparisons: tuple[Comparison, ...]
    differences: Mapping[str, Mapping[str, Any]]
    missing: Mapping[str, str]
    loss_tolerance: float
    together: int
    seeds: bool = False
    """Whether repeats have seeds of their own."""
    target_loss: float | None = None
    """The evaluation loss, in nats, whose first reaching `steps_to_loss` and `time_to_loss_s` measure."""

    @property
    def verdict(self) -> str:
        """The answer: how the variants compare or, for a single variant, what its fine-tune changed."""
        if len(self.variants) == 1:
            return self._changed
        outcomes = {run.name: run.outcome for run in self.runs} | dict.fromkeys(self.missing, NOT_THERE)
        ended = {
            variant.name: ", ".join(dict.fromkeys(outcomes[run] for run in variant.runs))
            for variant in self.variants
            if not variant.finished
        }
        return wording.answer(self.comparisons, ended, self.variants[0].name)

    @property
    def _changed(self) -> str:
        """For a single variant: what its evaluation found, else what training measured before and after, else how it
        ended."""
        (variant,) = self.variants
        found = {run: details.headline(evaluation) for run, evaluation in self.evaluations.items()}
        if any(found.values()):
            return " ".join(f"{run}: {text}" if len(self.runs) > 1 else text for run, text in found.items() if text)
        if self.evaluations and not variant.finished:
            return wording.BASE_ONLY
        if not variant.finished:
            return wording.no_finished_run(variant.name, [run.outcome for run in self.runs])
        before, after = (variant.spreads[f"perplexity_{when}"] for when in ("before", "after"))
        return "" if before is None or after is None else wording.perplexity(before.median, after.median)

    @property
    def warnings(self) -> list[str]:
        """Why figures of evaluations are meaningless, one line each, with the run's name if there are several."""
        found = [
            (run.name, line)
            for run in self.runs
            for task, result in run.evaluation.items()
            for line in details.warnings(task, result, f"{run.path}/evaluation/{task}")
        ]
        return [f"{name}: {line}" if len(self.evaluations) > 1 else line for name, line in found]

    @property
    def evaluations(self) -> dict[str, Mapping[str, Any]]:
        """The evaluation results of each run that was evaluated."""
        return {run.name: run.evaluation for run in self.runs if run.evaluation}

    def to_json(self) -> str:
        """The report as a JSON object, without the facts of each run, which are in its folder."""
        document = {"verdict": self.verdict, "confidence": CONFIDENCE, **dataclasses.asdict(self)}
        for run, record in zip(self.runs, document["runs"], strict=True):
            del record["facts"], record["evaluated"]
            record["outcome"] = run.outcome
            record["figures"] = spell(record["figures"])
        for variant in document["variants"]:
            variant["spreads"] = {key: spread and spell(spread) for key, spread in variant["spreads"].items()}
        return to_json(document) + "\n"


def spell(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures for JSON, which has no NaN: "NaN", "Infinity" and "-Infinity" as text, because null is unknown."""
    names = {math.inf: "Infinity", -math.inf: "-Infinity"}
    return {
        key: names.get(value, "NaN") if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in figures.items()
    }


def report(
    folders: Sequence[RunFolder],
    *,
    title: str = "",
    equal: Sequence[str] = (),
    loss_tolerance: float = LOSS_TOLERANCE,
) -> Report:
    """Report on the runs in `folders` (see `report_on_runs`).

    Raises:
        RunFolderError: `folders` is empty, or one of them is not a run folder or is damaged.
    """
    if not folders:
        raise RunFolderError(f"{title or 'nothing to report on'}: give the folders of runs, or experiment=NAME")
    found = [*map(read_run, {folder.path.resolve(): folder for folder in folders}.values())]
    return report_on_runs(found, title=title, equal=equal, loss_tolerance=loss_tolerance)


def report_on_runs(
    wanted: Sequence[Run],
    *,
    title: str = "",
    equal: Sequence[str] = (),
    loss_tolerance: float = LOSS_TOLERANCE,
    seeds: bool = False,
    target_loss: float | Literal["worst"] | None = None,
) -> Report:
    """Report on the runs `wanted`. The others are compared with the variant of the first one.

    Runs with the status NOT_THERE become the report's `missing`. `equal` (keys of EQUAL) is what must be equal for
    speeds to be compared; losses count as equal within the share `loss_tolerance`. With `seeds`, runs that differ only
    in their seeds are repeats. `target_loss` is that of `repeats.target_of`.

    Raises:
        RunFolderError: none of the runs exists.
    """
    wanted = pair_by_seed(wanted) if seeds else wanted
    target = target_of(wanted, target_loss)
    wanted = with_target(wanted, target)
    runs = tuple(run for run in wanted if run.status != NOT_THERE)
    if not runs:
        raise RunFolderError(f"{title}: none of its {count(len(wanted), 'run')} exists")
    named = group(wanted)
    finished = {name: done for name, members in named.items() if (done := [run for run in members if run.finished])}
    comparer = Comparer(finished, tuple(equal) or BY_DEFAULT, loss_tolerance, seeds)
    first, *others = finished or [""]
    return Report(
        title=title or count(len(runs), "run"),
        runs=runs,
        variants=tuple(summarise(name, members) for name, members in named.items()),
        equality=tuple(equality(what, what in equal, finished, loss_tolerance) for what in EQUAL),
        comparisons=tuple(item for name in others for item in comparer.compare(first, name)),
        differences=all_differences(named),
        missing={run.name: run.cause or "" for run in wanted if run.status == NOT_THERE},
        loss_tolerance=loss_tolerance,
        together=comparer.together,
        seeds=seeds,
        target_loss=target,
    )
