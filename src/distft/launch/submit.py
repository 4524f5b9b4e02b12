"""`distft submit`: jobs from a recipe or an experiment, after every check that can be made before they queue."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distft.config.recipe import Recipe
from distft.config.slurm import Slurm
from distft.errors import Fault, LaunchError, RecipeError
from distft.experiments.expand import Experiment
from distft.launch.jobs import NO_SBATCH, Jobs, has_sbatch
from distft.launch.slurm import Job, beyond_array, report_script, script, template

DISTFT = (sys.executable, "-m", "distft.cli")


@dataclass(frozen=True)
class Submission:
    """What is handed to SLURM: a job, or an array of jobs with a job for their report.

    `recipes` are those of its runs, `faults` is what is wrong with them, and `report` has the arguments of
    `distft report`.
    """

    job: Job
    jobs: Jobs
    recipes: tuple[Recipe, ...]
    faults: tuple[Fault, ...] = ()
    report: tuple[str, ...] | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe, arguments: Sequence[str], faults: Sequence[Fault] = ()) -> Submission:
        """One job that runs `distft train` with `arguments`, which `recipe` and its `faults` were read from."""
        found = [*faults, *_division_faults([recipe])]
        if recipe.slurm.array is not None:
            where = recipe.source.of("slurm.array")
            found.append(
                Fault(where, "slurm.array", "only an experiment can be submitted as an array", "experiment=NAME")
            )
        return cls(Job(recipe.run.name, (tuple(arguments),)), Jobs.of(_runs(recipe)), (recipe,), tuple(found))

    @classmethod
    def of_experiment(cls, experiment: Experiment, arguments: Sequence[str]) -> Submission:
        """An array job with one member per run, and a job that reports on them.

        `arguments` are those that `experiment` was loaded from.

        Raises:
            LaunchError: the runs ask for different resources.
        """
        recipes = tuple(run.recipe for run in experiment.runs)
        first = recipes[0]
        if any(recipe.slurm != first.slurm or recipe.run.dir != first.run.dir for recipe in recipes):
            raise LaunchError(
                f"the runs of {experiment.name} differ in their slurm section or run.dir, but all jobs in an array "
                "share these settings; set slurm.…=… once, on the command line"
            )
        faults = _division_faults(recipes)
        if first.slurm.array is not None and (beyond := beyond_array(first.slurm.array, len(recipes))):
            problem = f"{', '.join(beyond)}: the runs of {experiment.name} are 0 to {len(recipes) - 1}"
            hint = "leave slurm.array out to start all of them"
            faults.append(Fault(first.source.of("slurm.array"), "slurm.array", problem, hint))
        job = Job(experiment.name, tuple(run.arguments for run in experiment.runs), is_array=True)
        report = (*arguments, "--output", str(_runs(first) / f"{experiment.name}.md"))
        return cls(job, Jobs.of(_runs(first)), recipes, tuple(faults), report)

    @property
    def slurm(self) -> Slurm:
        return self.recipes[0].slurm

    @property
    def script(self) -> str:
        return script(self.slurm, self.job, self.jobs.path, DISTFT, template())

    def check(self) -> None:
        """Check what would make the jobs fail as soon as they leave the queue.

        Raises:
            RecipeError: the recipes have faults, or a global batch does not divide among the processes.
        """
        if self.faults:
            raise RecipeError(self.faults)

    def check_runs(self) -> None:
        """Do what each run will do before it loads weights. What a container holds cannot be seen.

        Raises:
            RecipeError: the faults of all runs.
        """
        from distft.training.check import Findings, check_files, check_settings  # imports torch

        if self.slurm.container is not None:
            return
        here, processes = Path.cwd(), self.slurm.nodes * _processes_per_node(self.slurm)
        on_gpu = _gpus_per_node(self.slurm) > 0
        found = [
            finding
            for recipe in self.recipes
            for finding in (check_files(recipe, here), check_settings(recipe, processes, here, on_gpu=on_gpu))
        ]
        sum(found, Findings()).require()

    @property
    def missing(self) -> list[str]:
        """Files that the jobs would lack; they run with the hub offline. Files in a container cannot be seen."""
        from distft.hub import missing  # the import takes a while

        if self.slurm.environment.get("HF_HUB_OFFLINE", "1") == "0" or self.slurm.container is not None:
            return []
        lacking = list(dict.fromkeys(line for recipe in self.recipes for line in missing(recipe)))
        if not lacking:
            return []
        lines = ["the job would run with the hub offline, and these are missing:", *(f"  {line}" for line in lacking)]
        if any("distft fetch" in line for line in lacking):  # not just a folder or file of the user's
            lines.append("or set slurm.environment.HF_HUB_OFFLINE=\"'0'\" if the nodes have a connection")
        return lines

    def warnings(self) -> list[str]:
        """What a dry run warns of: everything that `submit` would refuse, except faults of the recipes, and notes."""
        missing = self.missing
        return [*(["\n".join(missing)] if missing else []), *([] if has_sbatch() else [NO_SBATCH]), *self.notes]

    def submit(self) -> list[str]:
        """Submit the jobs and return lines that describe them.

        Raises:
            RecipeError: the recipes have faults.
            LaunchError: a file that the jobs need is missing, SLURM is not installed here, or it rejects a job.
        """
        self.check()
        if missing := self.missing:
            raise LaunchError("\n".join(missing))
        self.check_runs()
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
        distributed = {recipe.strategy for recipe in self.recipes} - {"single"}
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


def _division_faults(recipes: Sequence[Recipe]) -> list[Fault]:
    """Global batches that do not divide among a job's processes."""
    found: dict[Fault, None] = {}
    for recipe in recipes:
        try:
            recipe.check_division(recipe.slurm.nodes * _processes_per_node(recipe.slurm))
        except RecipeError as error:
            found |= dict.fromkeys(error.faults)
    return list(found)


def _processes_per_node(slurm: Slurm) -> int:
    """Number of processes on a node, as `distft train` will count them there."""
    return slurm.processes_per_node or _gpus_per_node(slurm) or 1


def _gpus_per_node(slurm: Slurm) -> int:
    gpus = re.search(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", slurm.gres or "")
    return slurm.gpus_per_node or (int(gpus[1]) if gpus else 0)
