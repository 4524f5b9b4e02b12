"""A disk that is full: a small mount, and a limit on file sizes, which the writers meet in the middle of a file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distft.runs import manifest
from distft.runs.folder import RunFolder

from ..distributed.conftest import Ended, finish, start
from .test_resume import KINDS

# The adapter takes 3.3 MiB, a checkpoint 10.
RUN = (
    "recipe=tiny",
    "training.max_steps=6",
    "data.max_samples=120",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.save_strategy=steps",
    "training.save_steps=2",
    "training.save_total_limit=1",
    "tracking.report_to=[]",
    "evaluation.before_and_after=false",
    "run.name=full",
    "lora.r=64",
    "quantization=null",
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own at `tmp_path/runs`."""
    folder = tmp_path / "runs"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        reason = f"no file system can be mounted here: {mounted.stderr.strip()}"
        if os.environ.get("DISTFT_CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, mib: float) -> None:
    subprocess.run(["mount", "-o", f"remount,size={int(mib * 1024)}k", str(disk)], check=True)


def go(where: Path, kind: str, *more: str, limit_kib: int | None = None) -> Ended:
    overrides, processes = KINDS[kind]
    command = [sys.executable, "-m", "distft.cli", "train", *overrides, *RUN, *more, "--nproc", str(processes)]
    if limit_kib is not None:
        command = ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "bash", *command]
    return finish(start(command, where), where)


def go_until_full(disk: Path, mib: float, where: Path, kind: str) -> Ended:
    """A run whose disk becomes too small once it has begun: otherwise the check before it would refuse to start."""
    resize(disk, 64)
    overrides, processes = KINDS[kind]
    process = start([sys.executable, "-m", "distft.cli", "train", *overrides, *RUN, "--nproc", str(processes)], where)
    while process.poll() is None and not (disk / "full" / "environment.json").is_file():
        time.sleep(0.05)
    resize(disk, mib)
    return finish(process, where)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_full_disk_costs_the_new_checkpoint_and_never_the_last_good_one(
    kind: str, disk: Path, tmp_path: Path
) -> None:
    ended = go_until_full(disk, 18, tmp_path, kind)
    assert ended.code == 0, ended.stderr[-3000:]
    folder = ended.folder
    assert folder.read_summary()["status"] == "finished"
    assert [path.name for path in folder.checkpoints.iterdir()] == ["checkpoint-2"]
    assert manifest.fault(folder.checkpoints / "checkpoint-2") is None
    for step in (4, 6):
        assert f"checkpoint-{step} was not saved: No space left on device (rank 0)" in ended.stderr
    assert "MiB too little. The last complete one is checkpoint-2" in ended.stderr


def test_a_result_that_finds_no_room_is_saved_by_the_same_command_later(disk: Path, tmp_path: Path) -> None:
    ended = go_until_full(disk, 12, tmp_path, "ddp")
    assert ended.code == 2, ended.stderr[-3000:]
    assert "training has finished, but its result cannot be saved" in ended.stderr
    folder = ended.folder
    assert not folder.adapter.exists() and manifest.newest(folder.checkpoints)[0] is not None
    resize(disk, 40)
    again = go(tmp_path, "ddp")
    assert again.code == 0, again.stderr[-3000:]
    assert "after step 2" in again.stderr
    assert folder.read_summary()["status"] == "finished" and (folder.adapter / "adapter_model.safetensors").is_file()
    assert [record["step"] for record in folder.read_metrics()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("kind", "limit_kib", "code"), [("ddp", 5_000, 0), ("fsdp", 2_500, 2)])
def test_a_write_that_fails_in_the_middle_leaves_no_half_and_no_rank_waiting(
    kind: str, limit_kib: int, code: int, tmp_path: Path
) -> None:
    """The optimizer states exceed a limit on file sizes: on rank 0 under DDP, on both ranks under FSDP2, where the
    adapter exceeds it too."""
    ended = go(tmp_path, kind, limit_kib=limit_kib)
    assert ended.code == code, ended.stderr[-3000:]
    assert ("training has finished, but its result cannot be saved" in ended.stderr) == (code == 2)
    folder = ended.folder
    assert list(folder.checkpoints.iterdir()) == []
    for step in (2, 4, 6):
        assert f"checkpoint-{step} was not saved: " in ended.stderr
    assert "There is no other checkpoint" in ended.stderr
    assert [record["step"] for record in folder.read_metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_torn_line_of_metrics_is_cut_off_before_the_next(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1}, {"step": 2})
    with folder.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    folder.append_metrics({"step": 3})
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}, {"step": 3}]
    folder.metrics.write_text('{"st')
    folder.append_metrics({"step": 1})
    assert folder.read_metrics() == [{"step": 1}]


def test_records_wait_while_the_disk_is_full(disk: Path) -> None:
    """A mount of a few pages, filled and freed between two records."""
    from distft.config.recipe import load_recipe
    from distft.config.schema import Batching
    from distft.data.batch_plan import Plan
    from distft.distributed.world import World
    from distft.training.metrics import Telemetry
    from distft.training.throughput import Work

    resize(disk, 1)
    folder = RunFolder(disk)
    telemetry = Telemetry(
        folder, load_recipe(["recipe=tiny"]), World(), Plan([1] * 16, Batching(global_batch_size=16)), Work(1.0)
    )
    telemetry._write({"step": 1})
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * 2**21)
    for step in range(2, 60):  # more than what is left of the first page
        telemetry._write({"step": step, "text": "x" * 100})
    assert len(folder.read_metrics()) < 59
    filler.unlink()
    telemetry._write({"step": 60})
    assert [record["step"] for record in folder.read_metrics()] == list(range(1, 61))
