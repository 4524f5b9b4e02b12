"""The file of an offline W&B run, read as far as it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from distft.runs.offline import last_step

BLOCK = 32 * 1024


def record(step: int, size: int = 10) -> bytes:
    made = Record()
    for key, value in (("train/global_step", step), ("note", "x" * size)):
        item = made.history.item.add()
        item.nested_key.append(key)
        item.value_json = json.dumps(value)
    return bytes(made.SerializeToString())


def log(*records: bytes) -> bytes:
    """LevelDB's log: chunks of kind 1 (whole), or 2, 3, 4 (first, middle, last), none across a block of 32 KiB."""
    out = bytearray(b":W&B" + bytes(3))
    for content in records:
        first = True
        while True:
            left = BLOCK - len(out) % BLOCK
            if left < 7:
                out += bytes(left)
                continue
            chunk, content = content[: left - 7], content[left - 7 :]
            kind = (1 if first else 4) if not content else (2 if first else 3)
            out += bytes(4) + len(chunk).to_bytes(2, "little") + bytes([kind]) + chunk
            first = False
            if not content:
                break
    return bytes(out)


@pytest.mark.parametrize("size", [10, BLOCK - 40, 100_000])
def test_the_last_step_of_a_whole_file(size: int, tmp_path: Path) -> None:
    file = tmp_path / "run.wandb"
    file.write_bytes(log(*(record(step, size) for step in range(1, 8))))
    assert last_step(file) == 7


def test_a_torn_record_and_all_after_it_is_left_out(tmp_path: Path) -> None:
    file, whole = tmp_path / "run.wandb", log(record(1), record(2), record(3, 90_000))
    for kept in range(len(log(record(1), record(2))), len(whole), 997):
        file.write_bytes(whole[:kept])
        assert last_step(file) == 2
    file.write_bytes(whole)
    assert last_step(file) == 3


def test_a_file_without_history(tmp_path: Path) -> None:
    file = tmp_path / "run.wandb"
    file.write_bytes(log())
    assert last_step(file) == -1
