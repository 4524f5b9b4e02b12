"""`distft submit`: jobs from a recipe or an experiment, after every check that can be made before they queue."""

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
from distft.launch.jobs import Jobs
from distft.launch.slurm import Job, report_script, script, template

DISTFT = (sys.executable, "-m", "distft.cli")


@dataclass(frozen=True)
class Submission:
    """What is handed to SLURM: a job, or an array of jobs with a job for their report.

    `strategies` are those of its runs; `report` has the arguments of `distft report`.
    """

    job: Job
    slurm: Slurm
    jobs: Jobs
    strategies: frozenset[str]
    report: tuple[str, ...] | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe, arguments: Sequence[str]) -> Submission:
        """One job that runs `distft train` with `arguments`, which `recipe` was loaded from.

        Raises:
            RecipeError: slurm.array is set, or the global batch does not divide among the job's processes.
            LaunchError: a file that the job needs is missing.
        """
        if recipe.slurm.array is not None:
            where = recipe.source.of("slurm.array")
            raise RecipeError(
                [Fault(where, "slurm.array", "only an experiment can be submitted as an array", "experiment=NAME")]
            )
        _check([recipe])
        job, jobs = Job(recipe.run.name, (tuple(arguments),)), Jobs.of(_runs(recipe))
        return cls(job, recipe.slurm, jobs, frozenset({recipe.strategy}))

    @classmethod
    def of_experiment(cls, experiment: Experiment, arguments: Sequence[str]) -> Submission:
        """An array job with one member per run, and a job that reports on them.

        `arguments` are those that `experiment` was loaded from.

        Raises:
            RecipeError: as for one recipe.
            LaunchError: as for one recipe; or the runs ask for different resources.
        """
        recipes = [run.recipe for run in experiment.runs]
        first = recipes[0]
        if any(recipe.slurm != first.slurm or recipe.run.dir != first.run.dir for recipe in recipes):
            raise LaunchError(
                f"the runs of {experiment.name} differ in their slurm section or run.dir, but all jobs in an array "
                "share these settings; set slurm.…=… once, on the command line"
            )
        _check(recipes)
        job = Job(experiment.name, tuple(run.arguments for run in experiment.runs), is_array=True)
        report = (*arguments, "--output", str(_runs(first) / f"{experiment.name}.md"))
        strategies = frozenset(recipe.strategy for recipe in recipes)
        return cls(job, first.slurm, Jobs.of(_runs(first)), strategies, report)

    @property
    def script(self) -> str:
        return script(self.slurm, self.job, self.jobs.path, DISTFT, template())

    def submit(self) -> list[str]:
        """Submit the jobs and return lines that describe them.

        Raises:
            LaunchError: SLURM is not installed here, or it rejects a job.
        """
        name, output = self.job.name, self.jobs.path
        number = self.jobs.submit(name, self.script)
        if self.report is None:
            file = output / f"{name}-{number}.out"
            return [*self.notes, f"job {number}: {name}; output: {file}; distft jobs shows its progress"]
        report = report_script(self.slurm, name, number, self.report, output, DISTFT)
        after = self.jobs.submit(f"{name}-report", report)
        files = output / f"{name}-{number}_*.out"
        return [
            *self.notes,
            f"job {number}: {self._which()} of {name}; output: {files}",
            f"job {after}: the report, once they have ended: {self.report[-1]}; distft jobs shows their progress",
        ]

    @property
    def notes(self) -> list[str]:
        """What is allowed but may not be intended."""
        processes, lines = _processes_per_node(self.slurm), []
        distributed = self.strategies - {"single"}
        if distributed and processes * self.slurm.nodes == 1:
            lines.append(
                f"one process: {' and '.join(sorted(distributed))} will fall back to single; set slurm.gpus_per_node "
                "or slurm.processes_per_node for more"
            )
        if self.slurm.cpus_per_task is None and processes > 1:
            lines.append(
                f"slurm.cpus_per_task is null: many clusters then give one core to all {processes} processes of a node"
            )
        return lines

    def _which(self) -> str:
        chosen = self.slurm.array
        return f"the {len(self.job.runs)} runs" if chosen is None else f"runs {chosen} of the {len(self.job.runs)}"


def _runs(recipe: Recipe) -> Path:
    return Path(recipe.run.dir).expanduser()


def _check(recipes: Sequence[Recipe]) -> None:
    """Check for what would make the jobs fail as soon as they leave the queue.

    Raises:
        RecipeError: a global batch does not divide among the processes.
        LaunchError: a file that a job needs is missing.
    """
    from distft.hub import missing  # the import takes a while

    for recipe in recipes:
        recipe.check_division(recipe.slurm.nodes * _processes_per_node(recipe.slurm))
    # Jobs run with the hub offline. The files inside a container cannot be seen from here.
    offline = recipes[0].slurm.environment.get("HF_HUB_OFFLINE", "1") != "0" and recipes[0].slurm.container is None
    if offline and (lacking := list(dict.fromkeys(line for recipe in recipes for line in missing(recipe)))):
        lines = ["the job would run with the hub offline, and these are missing:", *(f"  {line}" for line in lacking)]
        if any("distft fetch" in line for line in lacking):  # not just a folder or file of the user's
            lines.append("or set slurm.environment.HF_HUB_OFFLINE=\"'0'\" if the nodes have a connection")
        raise LaunchError("\n".join(lines))


def _processes_per_node(slurm: Slurm) -> int:
    """Number of processes on a node, as `distft train` will count them there."""
    gpus = re.search(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", slurm.gres or "")
    return slurm.processes_per_node or slurm.gpus_per_node or (int(gpus[1]) if gpus else 1)
