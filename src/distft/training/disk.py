"""How much disk space the checkpoints of a run take, estimated before the run."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from distft.config.recipe import Recipe
from distft.errors import Fault
from distft.hardware import GIB
from distft.runs.checks import existing_parent
from distft.runs.folder import RunFolder

_STATES = (("adafactor", 0), ("sgd", 0), ("lion", 1), ("rmsprop", 1), ("adagrad", 1))
"""States per trained value, by a part of the optimizer's name; AdamW has two."""


def disk_findings(recipe: Recipe, trainable: int, working_folder: Path) -> tuple[str, list[Fault]]:
    """What the checkpoints of a run that trains `trainable` values take, in words; and a fault if there is no room."""
    each, kept = checkpoint_bytes(recipe, trainable), kept_checkpoints(recipe)
    parent = working_folder / Path(recipe.run.dir).expanduser()
    needed = max(each * kept, trainable * _width(recipe))
    text = f"about {size(each)} a checkpoint, {kept} at a time"
    place = existing_parent(parent)
    try:
        free = shutil.disk_usage(place).free
        needed -= _there_already(recipe, parent)
    except OSError:  # a fault of run.dir, which is reported as such
        return text, []
    text += f"; {size(free)} free in {place}"
    if needed <= free:
        return text, []
    problem = f"the checkpoints need {size(needed)}: {text}"
    hint = "free some space, or set training.save_total_limit or run.dir"
    return text, [Fault(recipe.source.of("run.dir"), "run.dir", problem, hint)]


def checkpoint_bytes(recipe: Recipe, trainable: int) -> int:
    """Bytes of the trained weights and their optimizer states."""
    optimizer = str(recipe.training.get("optim") or "adamw")
    states = next((number for part, number in _STATES if part in optimizer), 2)
    return trainable * (_width(recipe) + states * (1 if "8bit" in optimizer else _width(recipe)))


def kept_checkpoints(recipe: Recipe) -> int:
    """How many checkpoints are on the disk at once, at least: a new one is complete before the oldest is deleted. The
    best one is kept besides."""
    if recipe.training.get("save_strategy", "steps") == "no":
        return 0
    limit = recipe.training.get("save_total_limit")
    best = bool(recipe.training.get("load_best_model_at_end"))
    return 1 if limit is None or limit < 1 else limit + 1 + best


def _there_already(recipe: Recipe, parent: Path) -> int:
    """Bytes of the checkpoints of the run that would be resumed: they are among those that have to fit."""
    unfinished = (run for run in RunFolder.named(parent, recipe.run.name) if run.read_summary()["status"] != "finished")
    newest, found = next(unfinished, None), 0
    for file in newest.checkpoints.rglob("*") if newest is not None else ():
        with suppress(FileNotFoundError):  # a run in another process may delete it at any time
            found += file.stat().st_size if file.is_file() else 0
    return found


def size(number: float) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:,.1f} MiB"


def _width(recipe: Recipe) -> int:
    """Bytes of a trained value: fp32, unless a whole model trains in 16 bits."""
    return 2 if recipe.updates_16_bits else 4
