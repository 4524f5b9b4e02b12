"""`distft submit`: from a recipe or an experiment to jobs, once everything that can be found wrong before the queue is right."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distft.config.recipe import Recipe
from distft.config.schema import Slurm
from distft.errors import Fault, LaunchError, RecipeError
from distft.experiments.expand import Experiment
from distft.launch.slurm import Job, Jobs, report_script, script, template

DISTFT = (sys.executable, "-m", "distft.cli")


@dataclass(frozen=True)
class Submission:
    """What is handed to SLURM: one job, or an array of jobs and the job of its report. `strategies` are those of its runs."""

    job: Job
    slurm: Slurm
    jobs: Jobs
    strategies: frozenset[str]
    report: tuple[str, ...] | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe, arguments: Sequence[str]) -> Submission:
        """One job that runs `distft train` with `arguments`, which are those of `recipe`.

        Raises:
            RecipeError: slurm.array is set, or the global batch does not divide over the job's processes.
            LaunchError: a file is missing that the job would need.
        """
        if recipe.slurm.array is not None:
            where = recipe.source.of("slurm.array")
            raise RecipeError(
                [Fault(where, "slurm.array", "an array has the runs of an experiment", "experiment=NAME")]
            )
        _check([recipe])
        return cls(
            Job(recipe.run.name, (tuple(arguments),)),
            recipe.slurm,
            Jobs.of(_runs(recipe)),
            frozenset({recipe.strategy}),
        )

    @classmethod
    def of_experiment(cls, experiment: Experiment, arguments: Sequence[str]) -> Submission:
        """One array job with a run of `experiment` each, and a job that reports on them; `arguments` are those of the experiment.

        Raises:
            RecipeError, LaunchError: as for one recipe; or the runs ask for different nodes.
        """
        recipes = [run.recipe for run in experiment.runs]
        first = recipes[0]
        if any(recipe.slurm != first.slurm or recipe.run.dir != first.run.dir for recipe in recipes):
            raise LaunchError(
                f"the runs of {experiment.name} differ in their slurm section or run.dir, and the jobs of an array are alike; give "
                "slurm.…=… for all of them on the command line"
            )
        _check(recipes)
        job = Job(experiment.name, tuple(run.arguments for run in experiment.runs), is_array=True)
        report = (*arguments, "--output", str(_runs(first) / f"{experiment.name}.md"))
        return cls(job, first.slurm, Jobs.of(_runs(first)), frozenset(recipe.strategy for recipe in recipes), report)

    @property
    def script(self) -> str:
        return script(self.slurm, self.job, self.jobs.path, DISTFT, template())

    def submit(self) -> list[str]:
        """Hand the jobs to SLURM; lines that say what was submitted.

        Raises:
            LaunchError: there is no SLURM here, or it refuses a job.
        """
        name, output, lines = self.job.name, self.jobs.path, self.notes
        number = self.jobs.submit(name, self.script)
        if self.report is None:
            file = output / f"{name}-{number}.out"
            return [*lines, f"job {number}: {name}; its output: {file}; distft jobs shows where it is"]
        report = report_script(self.slurm, name, number, self.report, output, DISTFT)
        after = self.jobs.submit(f"{name}-report", report)
        files = output / f"{name}-{number}_*.out"
        return [
            *lines, f"job {number}: {self._which()} of {name}; their output: {files}",
            f"job {after}: the report, once they have ended: {self.report[-1]}; distft jobs shows where they are",
        ]  # fmt: skip

    @property
    def notes(self) -> list[str]:
        """What is no mistake, and perhaps not meant."""
        processes, lines = _processes(self.slurm), []
        falling = self.strategies - {"single"}
        if falling and processes * self.slurm.nodes == 1:
            lines.append(
                f"one process: {' and '.join(sorted(falling))} will fall back to single; slurm.gpus_per_node or slurm.processes_per_node"
                " says how many there are"
            )
        if self.slurm.cpus_per_task is None and processes > 1:
            lines.append(
                f"slurm.cpus_per_task is null: many clusters then give one core to the {processes} processes of a node"
            )
        return lines

    def _which(self) -> str:
        chosen = self.slurm.array
        return f"the {len(self.job.runs)} runs" if chosen is None else f"runs {chosen} of the {len(self.job.runs)}"


def _runs(recipe: Recipe) -> Path:
    return Path(recipe.run.dir).expanduser()


def _check(recipes: Sequence[Recipe]) -> None:
    """Nothing that would end the jobs at their start, after they have waited in the queue."""
    for recipe in recipes:
        recipe.check_division(recipe.slurm.nodes * _processes(recipe.slurm))
    from distft.hub import missing  # imports the hub's client

    # Jobs run with the hub offline. What a container holds cannot be seen from here.
    offline = recipes[0].slurm.environment.get("HF_HUB_OFFLINE", "1") != "0" and recipes[0].slurm.container is None
    if offline and (lacking := list(dict.fromkeys(line for recipe in recipes for line in missing(recipe)))):
        told = ["the job would run with the hub offline, and lack:", *(f"  {line}" for line in lacking)]
        if any("distft fetch" in line for line in lacking):  # not a folder or a file that is named and not there
            told.append("or set slurm.environment.HF_HUB_OFFLINE=\"'0'\" where nodes have a connection")
        raise LaunchError("\n".join(told))


def _processes(slurm: Slurm) -> int:
    """Processes a node, as `distft train` will count them there."""
    gpus = re.search(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", slurm.gres or "")
    return slurm.processes_per_node or slurm.gpus_per_node or (int(gpus[1]) if gpus else 1)
