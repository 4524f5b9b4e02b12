"""`distft import`: make a recipe of a configuration of axolotl, LLaMA-Factory, TRL or Unsloth."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from distft.api.recipe import checks, load
from distft.cli.arguments import Commands
from distft.console import say
from distft.errors import LaunchError

_PROGRAMS = ("axolotl", "llamafactory", "trl", "unsloth")


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "import",
        help="make a recipe of another program's configuration, and say what is different",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The file is only read. What has no counterpart is left out of the recipe, and listed.\n"
        "examples:\n"
        "  distft import axolotl.yml\n"
        "  distft import sft.yaml --from trl --nproc 8 --output recipes/sft.yaml\n"
        "  distft import axolotl.yml --explain 1",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="YAML or JSON file of axolotl, LLaMA-Factory, TRL, Unsloth"
    )
    parser.add_argument("--output", type=Path, help="recipe to write (default: recipes/NAME.yaml)")
    parser.add_argument("--from", dest="program", choices=_PROGRAMS, help="whose file it is (default: its keys tell)")
    parser.add_argument(
        "--nproc", type=int, default=1, help="processes that they train with: their batch grows with it (1)"
    )
    parser.add_argument("--json", action="store_true", help="print the recipe and the table as JSON")
    parser.add_argument(
        "--explain",
        type=int,
        metavar="ROW",
        help="write nothing; show this row of the data, from 1, as both train on it",
    )
    parser.set_defaults(run=import_)


def import_(options: argparse.Namespace) -> None:
    from distft.files import write_atomically
    from distft.importing.reading import PROGRAMS, read_foreign
    from distft.importing.writing import as_json, recipe_text, settle, table

    if options.nproc < 1:
        raise LaunchError(f"--nproc is {options.nproc}; expected a number of processes, at least 1")
    target: Path = options.output or Path("recipes") / f"{options.file.stem}.yaml"
    if options.explain is not None:
        _explain(options)
        return
    if target.exists():
        raise LaunchError(f"{target} already exists and will not be overwritten; give another --output")
    program, draft = read_foreign(options.file, options.program, options.nproc)
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(draft, target, checks())
    write_atomically(target, recipe_text(draft, options.file, PROGRAMS[program].title))
    if options.json:
        print(json.dumps(as_json(draft, program), indent=2, default=str))
    else:
        print("\n".join(table(draft.notes, shutil.get_terminal_size((120, 24)).columns)))
    say(f"{target}: {PROGRAMS[program].title}'s {options.file.name} as a recipe; next: distft check {target}")


def _explain(options: argparse.Namespace) -> None:
    from distft.importing.explain import explain
    from distft.importing.reading import read_foreign
    from distft.importing.writing import recipe_text, settle
    from distft.models.loading import load_tokenizer

    program, draft = read_foreign(options.file, options.program, options.nproc)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{options.file.stem}.yaml"
        settle(draft, target, checks())
        target.write_text(recipe_text(draft, options.file, program), encoding="utf-8")
        recipe = load([str(target)])
        print("\n".join(explain(recipe, program, draft.given, options.explain, load_tokenizer(recipe))))
