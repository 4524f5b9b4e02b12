"""`distft recipes`: list, show and validate recipes, and print their JSON Schema."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distft.api.check import check_words
from distft.api.recipe import load
from distft.api.train import check_processes
from distft.cli.arguments import Commands, print_files
from distft.errors import RecipeError, UserError
from distft.text import count

if TYPE_CHECKING:
    from distft.config.recipe import Recipe


def add_to(commands: Commands) -> None:
    actions = commands.add_parser(
        "recipes", help="list, show or validate recipes, or print their schema"
    ).add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", help="list every recipe with its description").set_defaults(run=list_)
    showing = actions.add_parser("show", help="print a resolved recipe and where each value comes from")
    showing.add_argument("name")
    showing.add_argument("overrides", nargs="*", help="any number of key.path=value overrides")
    showing.add_argument(
        "--nproc",
        type=int,
        default=1,
        help="derive the gradient accumulation for this number of processes (default: 1)",
    )
    showing.set_defaults(run=show)
    validating = actions.add_parser("validate", help="report every fault of one or more recipes")
    validating.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE",
        help="names or paths (default: every recipe); then key.path=value overrides that apply to each",
    )
    validating.set_defaults(run=validate)
    actions.add_parser("schema", help="print the JSON Schema, for editors").set_defaults(run=schema)


def list_(options: argparse.Namespace) -> None:
    from distft.config.files import list_recipes

    print_files(list_recipes(Path.cwd()))


def show(options: argparse.Namespace) -> None:
    recipe = load([f"recipe={options.name}", *options.overrides])
    print(f"# {recipe.source.name}: " + " ← ".join(str(path) for path in reversed(recipe.source.files)))
    _print_section(recipe.model_dump(), recipe, "")
    processes = options.nproc
    check_processes(processes)
    recipe.check_division(processes)
    size, micro = recipe.batching.global_batch_size, recipe.batching.micro_batch
    if size is None or micro == "auto" or recipe.batching.micro_batch_tokens is not None:
        print("# gradient_accumulation_steps: the smallest number that fits the longest step of the data")
    else:
        divisor = f"{micro} × {count(processes, 'process')}"
        print(f"# gradient_accumulation_steps: {size // (micro * processes)}  (derived: {size} / ({divisor}))")


def _print_section(values: dict[str, object], recipe: Recipe, prefix: str) -> None:
    import yaml

    depth = "  " * prefix.count(".")
    for key, value in values.items():
        if isinstance(value, dict) and value:
            print(f"{depth}{key}:")
            _print_section(value, recipe, f"{prefix}{key}.")
        else:
            text = yaml.safe_dump({key: value}, default_flow_style=None, width=1000, allow_unicode=True).strip()
            text = text[1:-1] if text.startswith("{") else text
            print(f"{depth}{text:<{58 - len(depth)}}  # {recipe.source.of(prefix + key)}")


def validate(options: argparse.Namespace) -> int:
    from distft.config.files import list_recipes

    names = [word.removeprefix("recipe=") for word in options.words if "=" not in word or word.startswith("recipe=")]
    overrides = [word for word in options.words if "=" in word and not word.startswith("recipe=")]
    failed = 0
    for name in names or list_recipes(Path.cwd()):
        try:
            skipped = check_words([f"recipe={name}", *overrides], processes=1).skipped
            print(f"{name}: valid" + (f" (not checked: {'; '.join(skipped)})" if skipped else ""))
        except RecipeError as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    return UserError.exit_code if failed else 0


def schema(options: argparse.Namespace) -> None:
    from distft.config.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))
