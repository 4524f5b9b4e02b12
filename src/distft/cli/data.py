"""`distft data preview`: look at training samples the way the model will see them."""

from __future__ import annotations

import argparse
import os
import sys

from distft.api.recipe import load
from distft.cli.arguments import RECIPE, Commands


def add_to(commands: Commands) -> None:
    actions = commands.add_parser("data", help="preview training data").add_subparsers(required=True, metavar="ACTION")
    parser = actions.add_parser(
        "preview", help="show samples with trained and masked tokens, lengths, and dropped rows"
    )
    parser.add_argument("overrides", nargs="*", help=RECIPE)
    parser.add_argument("--samples", type=int, default=3, help="show this many samples of the train split (default: 3)")
    parser.add_argument("--rows", type=_rows, help="show these samples of the train split instead, for example 17,42")
    parser.set_defaults(run=preview)


def preview(options: argparse.Namespace) -> None:
    from distft.data.checks import require_files

    recipe = load(options.overrides)
    require_files(recipe)
    from distft.data.preview import preview  # takes seconds, which a mistake should not cost
    from distft.models.loading import load_tokenizer

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    rows = options.rows or range(options.samples)
    print(preview(recipe, load_tokenizer(recipe), rows=rows, colour=colour))


def _rows(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
