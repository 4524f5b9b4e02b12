"""The manifest of a checkpoint. A run resumes only from a checkpoint with a valid manifest and the optimizer's state.

All ranks write their files first. The manifest is written last and atomically, so a kill at any moment leaves either a
complete checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distft.files import to_json, write_atomically

NAME = "manifest.json"


def step_of(checkpoint: Path) -> int:
    """The step in the name `checkpoint-<step>`; -1 for any other name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def write(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Complete `checkpoint` with a manifest: the size and SHA-256 of every file, and `facts` (world size, step, …)."""
    files = {
        str(path.relative_to(checkpoint)): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    write_atomically(checkpoint / NAME, to_json({**facts, "files": files}) + "\n")


def read(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a valid checkpoint."""
    content = json.loads((checkpoint / NAME).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def fault(checkpoint: Path) -> str | None:
    """Why `checkpoint` is not valid; None if every file exists with its size and hash."""
    if not (checkpoint / NAME).is_file():
        return "it has no manifest, so saving it did not finish"
    try:
        files = read(checkpoint)["files"]
    except (ValueError, KeyError, AssertionError):
        return "its manifest is damaged"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _digest(path) != expected["sha256"]:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def lacks_optimizer(checkpoint: Path) -> str | None:
    """Why a run cannot resume from a valid `checkpoint`: it has the trainer's state but no optimizer's; else None."""
    try:
        files = read(checkpoint)["files"]
    except (ValueError, KeyError, AssertionError):
        return "its manifest is damaged"
    if "trainer_state.json" in files and not any("optim" in name for name in files):
        return "it has the weights but not the optimizer's state (training.save_only_model)"
    return None


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can resume from, and a line about each newer one that it cannot resume from."""
    skipped: list[str] = []
    for path in sorted((p for p in checkpoints.glob("checkpoint-*") if step_of(p) >= 0), key=step_of, reverse=True):
        reason = fault(path) or lacks_optimizer(path)
        if reason is None:
            return path, skipped
        skipped.append(f"skipping {path.name}: {reason}")
    return None, skipped


def drop_after(checkpoints: Path, step: int) -> None:
    """Delete every checkpoint after `step`: a run that resumes there writes them again."""
    for path in checkpoints.glob("checkpoint-*"):
        if step_of(path) > step:
            _delete(path)


def retire(checkpoints: Path, keep: int | None) -> None:
    """Delete the oldest complete checkpoints, so that `keep` remain; None or a number below 1 keeps all, as upstream.

    The newest that a run can resume from always remains, and so does the best as of each that is kept (its manifest's
    `best_step`): a run that resumes from it needs that one at its end.
    """
    if keep is None or keep < 1:
        return
    finished = sorted((p for p in checkpoints.glob("checkpoint-*") if (p / NAME).is_file()), key=step_of)
    kept = set(finished[-keep:])
    kept.update([path for path in reversed(finished) if lacks_optimizer(path) is None][:1])
    best = {read(path).get("best_step") for path in kept}
    for path in finished:
        if path not in kept and step_of(path) not in best:
            _delete(path)


def _delete(checkpoint: Path) -> None:
    (checkpoint / NAME).unlink(missing_ok=True)  # first, so that a kill leaves nothing that looks complete
    shutil.rmtree(checkpoint)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
