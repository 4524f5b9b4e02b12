"""`distft check`: find a recipe's mistakes before anything is loaded, and say what its run will be."""

from __future__ import annotations

import argparse

from distft.api.check import check_words
from distft.cli.arguments import RECIPE, Commands


def add_to(commands: Commands) -> None:
    parser = commands.add_parser("check", help="check everything about a run that can be known before it loads weights")
    parser.add_argument("overrides", nargs="*", help=RECIPE)
    parser.add_argument(
        "--deep", action="store_true", help="read and tokenize the data, too, and plan its batches; the run reuses it"
    )
    parser.add_argument("--nproc", type=int, help="check for this number of processes (default: as distft train)")
    parser.set_defaults(run=check)


def check(options: argparse.Namespace) -> None:
    print("\n".join(check_words(options.overrides, processes=options.nproc, deep=options.deep).lines()))
