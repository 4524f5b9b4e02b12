"""`distft merge`: merge a run's adapter into its base model."""

from __future__ import annotations

import argparse
from pathlib import Path

from distft.api.recipe import load
from distft.cli.arguments import Commands
from distft.errors import RunFolderError


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "merge", help="merge a run's adapter into its dequantized base, for plain transformers"
    )
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/merged)")
    parser.set_defaults(run=merge)


def merge(options: argparse.Namespace) -> None:
    from distft.data.named_templates import words_of_run
    from distft.hardware import visible_devices
    from distft.models.export import merge
    from distft.runs.card import write_card
    from distft.runs.folder import RunFolder

    folder = RunFolder(options.folder)
    if not folder.adapter.is_dir():
        raise RunFolderError(f"{folder.path} has no adapter to merge ({folder.adapter} is missing)")
    target = options.output or folder.merged
    if target.exists():
        raise RunFolderError(f"{target} already exists and will not be overwritten; give another --output")
    recipe = load(words_of_run(folder.recipe, folder.adapter))
    merge(recipe, folder.adapter, target, {"": 0} if visible_devices() else None)
    write_card(folder, target)
    print(f"merged model: {target}")
