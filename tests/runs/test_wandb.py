"""How far an offline W&B run came, read from its file as far as that is complete."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distft.runs.wandb import last_step, logged_records

LOG = """
import os, sys
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
import wandb
run = wandb.init(dir=sys.argv[1])
for step in range(1, 8):
    run.log({"train/global_step": step, "train/loss": 1 / step, "note": "x" * 40_000})
run.finish()
"""  # each record spans more than one of the file's 32 KiB blocks


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("wandb")
    subprocess.run([sys.executable, "-c", LOG, str(where)], check=True)
    (file,) = where.glob("wandb/offline-run-*/run-*.wandb")
    return file


def test_the_last_step_and_the_records_of_a_complete_file(file: Path) -> None:
    assert last_step(file) == 7
    history = [record["history"]["item"] for record in logged_records(file) if record["type"] == "history"]
    assert [row["train/global_step"] for row in history] == list(range(1, 8))
    assert history[1]["train/loss"] == 0.5


def test_an_incomplete_record_and_all_after_it_are_left_out(file: Path, tmp_path: Path) -> None:
    content, torn = file.read_bytes(), tmp_path / "run-torn.wandb"
    steps = []
    for share in (0.3, 0.6, 0.9):
        torn.write_bytes(content[: int(len(content) * share)])
        steps.append(last_step(torn))
    assert 0 < steps[0] < steps[1] < steps[2] < 7


def test_a_file_without_history(file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "run-empty.wandb"
    empty.write_bytes(file.read_bytes()[:7])
    assert last_step(empty) == -1


def test_what_is_not_a_file_of_wandb_is_an_error(file: Path, tmp_path: Path) -> None:
    other = shutil.copy(__file__, tmp_path / "run-other.wandb")
    with pytest.raises(RuntimeError, match="wandb cannot read"):
        last_step(Path(other))
