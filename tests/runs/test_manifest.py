"""A checkpoint counts only if every byte of it is what its manifest says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from distft.runs import manifest


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "shards").mkdir(parents=True)
    (made / "weights").write_bytes(bytes([step]) * 100)
    (made / "shards" / "0").write_bytes(b"optimizer")
    manifest.write(made, {"step": step})
    return made


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("a bit", lambda made: flip_a_bit(made / "weights"), "weights is damaged (its SHA-256 differs)"),
    (
        "bytes of the same length",
        lambda made: (made / "shards" / "0").write_bytes(b"another!!"),
        "shards/0 is damaged (its SHA-256 differs)",
    ),
    ("the end", lambda made: (made / "weights").write_bytes(b"\1" * 99), "weights has 99 bytes instead of 100"),
    ("a file", lambda made: (made / "weights").unlink(), "weights is missing"),
    ("a folder", lambda made: shutil.rmtree(made / "shards"), "shards/0 is missing"),
    ("the manifest's end", lambda made: (made / manifest.NAME).write_text('{"step": 1'), "its manifest is damaged"),
    ("the manifest's files", lambda made: (made / manifest.NAME).write_text('{"step": 1}'), "its manifest is damaged"),
    ("the manifest", lambda made: (made / manifest.NAME).unlink(), "it has no manifest, so saving it did not finish"),
]


@pytest.mark.parametrize(("damage", "expected"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_found_and_an_older_checkpoint_taken(
    damage: Callable[[Path], object], expected: str, tmp_path: Path
) -> None:
    older, newer = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert manifest.newest(tmp_path) == (newer, [])
    damage(newer)
    assert manifest.fault(newer) == expected
    assert manifest.newest(tmp_path) == (older, [f"skipping checkpoint-2: {expected}"])


def test_steps_are_numbers_and_later_checkpoints_are_dropped(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-last").mkdir()
    assert manifest.newest(tmp_path) == (tmp_path / "checkpoint-11", [])
    manifest.drop_after(tmp_path, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9", "checkpoint-last"]
    assert manifest.read(tmp_path / "checkpoint-9")["step"] == 9


def test_a_deletion_that_is_cut_short_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint(tmp_path, 3)
    monkeypatch.setattr(manifest, "shutil", SimpleNamespace(rmtree=lambda path: None))
    manifest.drop_after(tmp_path, 2)
    assert manifest.fault(made) == "it has no manifest, so saving it did not finish"


@pytest.mark.parametrize(
    ("best_steps", "keep", "left"),
    [
        ({1: 1, 2: 1, 3: 1, 4: 1}, 1, {1, 4}),
        ({1: 1, 2: 2, 3: 2, 4: 2}, 2, {2, 3, 4}),
        ({1: 1, 2: 1, 3: 1, 4: 4}, 2, {1, 3, 4}),  # a run that resumes from 3 needs 1
        ({1: 1, 2: 1, 3: 1, 4: 4}, 1, {4}),
        ({}, 2, {3, 4}),
    ],
)
def test_the_best_checkpoint_of_each_that_is_kept_is_kept(
    best_steps: dict[int, int], keep: int, left: set[int], tmp_path: Path
) -> None:
    for step in (1, 2, 3, 4):
        made = checkpoint(tmp_path, step)
        manifest.write(made, {"step": step, "best_step": best_steps.get(step)})
    manifest.retire(tmp_path, keep)
    assert {manifest.step_of(path) for path in tmp_path.iterdir()} == left
