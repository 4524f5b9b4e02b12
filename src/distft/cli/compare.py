"""`distft compare`: run recipes or an experiment on this machine and report on them."""

from __future__ import annotations

import argparse

from distft.api.compare import check_counts
from distft.api.recipe import load_experiment
from distft.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    parser = commands.add_parser("compare", help="run recipes or an experiment here, one run at a time, and report")
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="RECIPE",
        help="names of recipes, or experiment=NAME; then key.path=value overrides that apply to every run",
    )
    parser.add_argument(
        "--nproc",
        type=int,
        help="number of processes for each run whose strategy is not single (default: one per GPU, or 2 without a GPU)",
    )
    parser.add_argument("--repeats", type=int, help="repeats of each variant (default: as the experiment says, or 5)")
    parser.add_argument("--resume", action="store_true", help="run only what has no result yet")
    parser.add_argument("--watch", action="store_true", help="follow the runs in a live table, on a terminal")
    parser.set_defaults(run=compare)


def compare(options: argparse.Namespace) -> int:
    from distft.experiments.compare import Comparison
    from distft.reports.markdown import markdown

    check_counts(options.nproc, options.repeats)
    comparison = Comparison(load_experiment(options.overrides, options.repeats), options.nproc)
    made = comparison.run(resume=options.resume, watch=options.watch)
    print(markdown(made), end="")
    print("\nreport: " + ", ".join(map(str, comparison.files)))
    return 0 if comparison.complete else 1
