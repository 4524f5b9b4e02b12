"""`distft experiments`: list experiments, and show the runs that one of them makes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from distft.api.recipe import load_experiment
from distft.cli.arguments import Commands, print_files


def add_to(commands: Commands) -> None:
    actions = commands.add_parser("experiments", help="list or show experiments").add_subparsers(
        required=True, metavar="ACTION"
    )
    actions.add_parser("list", help="list every experiment with its description").set_defaults(run=list_)
    showing = actions.add_parser("show", help="print the distft train command of each run of an experiment")
    showing.add_argument("name")
    showing.add_argument("overrides", nargs="*", help="key.path=value overrides that apply to every run")
    showing.set_defaults(run=show)


def list_(options: argparse.Namespace) -> None:
    from distft.experiments.schema import list_experiments

    print_files(list_experiments(Path.cwd()))


def show(options: argparse.Namespace) -> None:
    experiment = load_experiment([f"experiment={options.name}", *options.overrides])
    count = f"{len(experiment.runs)} runs of {len(experiment.variants)} variants"
    print(f"# {experiment.name}: {experiment.description}\n# {experiment.path}: {count}")
    print(f"# must be equal: {', '.join(experiment.equal) or 'nothing declared'}")
    for run in experiment.runs:
        print(f"distft train {shlex.join(run.arguments)}")
