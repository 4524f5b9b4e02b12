"""Check a run's folder before anything else is done for the run, without creating or locking it."""

from __future__ import annotations

import os
from pathlib import Path

from distft.config.recipe import Recipe
from distft.config.validation import COMMAND_LINE
from distft.errors import Fault
from distft.runs.folder import RunFolder


def folder_faults(recipe: Recipe, working_folder: Path) -> list[Fault]:
    """What keeps a run of `recipe` from writing into its folder. Names without a run of their own get a number later.

    `resume.find_place` decides about an existing folder; this finds only what no other name or recipe would cure.
    """
    parent = working_folder / Path(recipe.run.dir).expanduser()
    source, folder = recipe.source, RunFolder(parent / recipe.run.name)
    existing = existing_parent(parent)
    if existing is None:
        problem = f"{parent} is below a link to a folder that does not exist"
        return [Fault(source.of("run.dir"), "run.dir", problem, "create the folder, or set another run.dir")]
    if not existing.is_dir():
        return [Fault(source.of("run.dir"), "run.dir", f"{existing} is not a folder", "set another run.dir")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Fault(source.of("run.dir"), "run.dir", f"{existing} is not writable", "set another run.dir")]
    exact = source.of("run.name") == COMMAND_LINE
    if exact and os.path.lexists(folder.path) and not folder.path.is_dir():
        what = "a link to a folder that does not exist" if folder.path.is_symlink() else "not a folder"
        return [Fault(COMMAND_LINE, "run.name", f"{folder.path} is {what}", "remove it, or choose another run.name")]
    return []


def existing_parent(path: Path) -> Path | None:
    """`path` or the nearest of its parents that exists; None if a link on the way leads nowhere."""
    while not path.exists():
        if path.is_symlink():
            return None
        path = path.parent
    return path
