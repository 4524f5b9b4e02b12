"""`distft submit` and `distft jobs`: SLURM jobs from a recipe or an experiment, and what became of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from distft.api.submit import submission_of, warn
from distft.cli.arguments import RECIPE, Commands


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
    submission = submission_of(options.overrides)
    if not options.dry_run:
        print("\n".join(submission.submit()))
        return
    print(submission.script.rstrip(), flush=True)
    warn(submission)
    submission.check()


def jobs(options: argparse.Namespace) -> None:
    from distft.launch.jobs import Jobs

    print("\n".join(Jobs.of(options.dir).table()))
