"""Check where a run will write before anything else is done for it, without creating or locking anything."""

from __future__ import annotations

import os
from pathlib import Path

from distft.config.recipe import Recipe
from distft.config.validation import COMMAND_LINE
from distft.errors import Fault

_LONGEST = 255
"""Bytes that a file system takes for a name (ext4, XFS, Lustre, NFS)."""


def folder_faults(recipe: Recipe, working_folder: Path) -> list[Fault]:
    """What keeps a run of `recipe` from writing into its folder.

    A folder of this name is no fault here: `resume.find_place` decides whether the run resumes it or gets a number.
    """
    for key, text in (("run.dir", recipe.run.dir), ("run.name", recipe.run.name)):
        if any(len(os.fsencode(part)) > _LONGEST for part in Path(text).parts):
            return [_fault(recipe, key, f"{text!r} has a part of more than {_LONGEST} bytes")]
    parent = working_folder / Path(recipe.run.dir).expanduser()
    folder = parent / recipe.run.name
    existing = existing_parent(parent)
    if existing.is_symlink() and not existing.exists():
        return [_fault(recipe, "run.dir", f"{existing} is a link to {existing.readlink()}, which does not exist")]
    if not existing.is_dir():
        return [_fault(recipe, "run.dir", f"{existing} is not a folder")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [_fault(recipe, "run.dir", f"{existing} is not writable")]
    exact = recipe.source.of("run.name") == COMMAND_LINE  # another name gets a number where it is taken
    if exact and os.path.lexists(folder) and not folder.is_dir():
        linked = f"a link to {folder.readlink()}, which does not exist" if folder.is_symlink() else "not a folder"
        return [_fault(recipe, "run.name", f"{folder} is {linked}", "remove it, or choose another name")]
    return []


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest of its parents that is there, if only as a link."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def _fault(recipe: Recipe, key: str, problem: str, hint: str = "set another one") -> Fault:
    return Fault(recipe.source.of(key), key, problem, hint)
