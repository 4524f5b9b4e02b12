"""`distft submit` and `distft jobs`: SLURM jobs from a recipe or an experiment, and what became of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from distft.cli.arguments import RECIPE, Commands, is_experiment, load, load_experiment
from distft.errors import LaunchError


def add_to(commands: Commands) -> None:
    submitting = commands.add_parser(
        "submit", help="submit a SLURM job that survives preemption, or an array of jobs for an experiment"
    )
    submitting.add_argument("overrides", nargs="*", help=f"{RECIPE}; or experiment=NAME and overrides for all its runs")
    submitting.add_argument("--dry-run", action="store_true", help="print the sbatch script without submitting it")
    submitting.set_defaults(run=submit)
    listing = commands.add_parser("jobs", help="list submitted jobs: state, last step, loss, run folder")
    listing.add_argument(
        "--dir", type=Path, default=Path("runs"), help="folder that holds the run folders (default: runs)"
    )
    listing.set_defaults(run=jobs)


def submit(options: argparse.Namespace) -> None:
    from distft.launch.submit import Submission

    words: list[str] = options.overrides
    if is_experiment(words):
        submission = Submission.of_experiment(load_experiment(words), words)
    elif not any(word.startswith("recipe=") for word in words):
        raise LaunchError("nothing to submit: give recipe=NAME or experiment=NAME")
    else:
        submission = Submission.of_recipe(load(words), words)
    print(submission.script.rstrip() if options.dry_run else "\n".join(submission.submit()))


def jobs(options: argparse.Namespace) -> None:
    from distft.launch.slurm import Jobs

    print("\n".join(Jobs.of(options.dir).table()))
