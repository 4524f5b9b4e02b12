"""The manifest of a checkpoint: what makes it one. A folder without a manifest that verifies does not exist for anyone.

The trainer writes its files first, on all ranks; the manifest comes last, in one move. So a kill at any moment leaves a
checkpoint whole or none.
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
    """The optimizer step in `checkpoint-<step>`; -1 for a folder of another name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def write(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Close `checkpoint` with the size and SHA-256 of every file in it, and `facts` (world size, step, …)."""
    files = {
        str(path.relative_to(checkpoint)): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    write_atomically(checkpoint / NAME, to_json({**facts, "files": files}) + "\n")


def read(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that verifies."""
    content = json.loads((checkpoint / NAME).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def fault(checkpoint: Path) -> str | None:
    """Why `checkpoint` cannot be trusted, or None: every file is there, of its size, with its hash."""
    if not (checkpoint / NAME).is_file():
        return "it has no manifest: it was not finished"
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


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and for each newer one that does not, why."""
    skipped: list[str] = []
    for path in sorted((p for p in checkpoints.glob("checkpoint-*") if step_of(p) >= 0), key=step_of, reverse=True):
        reason = fault(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path.name} is skipped: {reason}")
    return None, skipped


def drop_after(checkpoints: Path, step: int) -> None:
    """Delete every checkpoint after `step`: a run that goes on from there writes them anew."""
    for path in checkpoints.glob("checkpoint-*"):
        if step_of(path) > step:
            _delete(path)


def retire(checkpoints: Path, keep: int | None) -> None:
    """Delete the oldest of the finished checkpoints beyond `keep` (None keeps all); never the newest."""
    if keep is None:
        return
    finished = sorted((p for p in checkpoints.glob("checkpoint-*") if (p / NAME).is_file()), key=step_of)
    for path in finished[: -max(keep, 1)]:
        _delete(path)


def _delete(checkpoint: Path) -> None:
    (checkpoint / NAME).unlink(missing_ok=True)  # first, so that a kill in between leaves no half that looks whole
    shutil.rmtree(checkpoint)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
