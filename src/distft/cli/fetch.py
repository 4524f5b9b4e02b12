"""`distft fetch`: download a recipe's model and data before going offline."""

from __future__ import annotations

import argparse

from distft.api.recipe import load
from distft.cli.arguments import RECIPE, Commands
from distft.errors import UserError


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "fetch", help="download a recipe's model and data, for machines without internet access"
    )
    parser.add_argument("overrides", nargs="*", help=RECIPE)
    parser.add_argument("--check", action="store_true", help="only list what is missing, without using the network")
    parser.set_defaults(run=fetch)


def fetch(options: argparse.Namespace) -> int:
    from distft.hub import fetch, missing

    recipe = load(options.overrides)
    lines = missing(recipe) if options.check else fetch(recipe)
    if recipe.evaluation.tasks:
        from distft.evaluation import fetch as evaluation

        lines += evaluation.missing(recipe) if options.check else evaluation.fetch(recipe)
    for line in lines or ["nothing is missing: this recipe runs offline"]:
        print(line)
    return UserError.exit_code if options.check and lines else 0
