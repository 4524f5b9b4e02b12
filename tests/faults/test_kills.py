"""Processes that are killed: the launcher brings them back, and the run ends as if nothing had happened."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from distft.runs.folder import RunFolder

from ..distributed.conftest import finish
from ..distributed.test_guards import wait_for_step
from .conftest import KINDS, STEPS, assert_gone, assert_same_run, begin, family, go, ranks, until

Whole = Callable[[str], RunFolder]
SEVERAL = [kind for kind, (_, processes) in KINDS.items() if processes > 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_killed_at_a_random_step_comes_back(kind: str, uninterrupted: Whole, tmp_path: Path) -> None:
    whole = uninterrupted(kind)
    process = begin(tmp_path, kind)
    folder = wait_for_step(tmp_path, random.randint(1, 12))
    workers, everyone = ranks(process), family(process)
    rank = random.choice(sorted(workers))
    workers[rank].send_signal(signal.SIGKILL)
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    assert_same_run(folder, whole)
    summary, (fault,) = folder.read_summary(), folder.read_faults()
    assert (summary["status"], summary["restarts"], summary["steps"]) == ("finished", 1, STEPS)
    assert (fault["rank"], fault["attempt"]) == (rank, 0)
    assert "killed by SIGKILL" in fault["cause"]
    assert "killed by SIGKILL" in ended.stderr and f"resuming {folder.path}" in ended.stderr
    assert ended.folder.path == folder.path, "the same folder, and no other"
    for path in folder.logs.glob("rank*.log"):
        assert path.read_text().count("── ") == 2, "each start has a line"
    assert_gone(everyone)


def test_a_kill_before_the_first_checkpoint_starts_anew_in_the_same_folder(
    uninterrupted: Whole, tmp_path: Path
) -> None:
    whole = uninterrupted("ddp")
    process = begin(tmp_path, "ddp")
    until(lambda: list(tmp_path.glob("runs/*/summary.json")))
    ranks(process)[1].send_signal(signal.SIGKILL)
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    assert "from the start, because it has no checkpoint" in ended.stderr
    assert_same_run(ended.folder, whole)
    assert ended.folder.read_summary()["restarts"] == 1


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_kill_during_a_save_leaves_no_half_checkpoint(kind: str, uninterrupted: Whole, tmp_path: Path) -> None:
    whole = uninterrupted(kind)
    process = begin(tmp_path, kind, "training.save_steps=1")
    wait_for_step(tmp_path, 2)
    workers = ranks(process).values()

    def half_saved() -> bool:
        found = tmp_path.glob("runs/*/checkpoints/checkpoint-*")
        return any(not (path / "manifest.json").exists() and any(path.iterdir()) for path in found)

    def stopped_in_a_save() -> bool:
        if not half_saved():
            return False
        for worker in workers:
            worker.suspend()
        if half_saved():  # still: the save was not over before the processes stood
            return True
        for worker in workers:
            worker.resume()
        return False

    until(stopped_in_a_save, every_s=0.0005)
    for worker in workers:
        worker.kill()
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    assert "saving it did not finish" in ended.stderr
    assert_same_run(ended.folder, whole)


def test_a_run_that_dies_too_often_ends_and_can_be_resumed(tmp_path: Path) -> None:
    process = begin(tmp_path, "ddp", "run.max_restarts=1")
    folder = wait_for_step(tmp_path, 4)
    for restarts in (0, 1):
        until(lambda: ranks(process) and json.loads(folder.summary.read_text())["restarts"] == restarts)  # noqa: B023
        until(lambda: 1 in ranks(process))
        ranks(process)[1].send_signal(signal.SIGKILL)
        until(lambda: len(folder.read_faults()) == restarts + 1)  # noqa: B023
    ended = finish(process, tmp_path)
    assert ended.code == 1
    assert folder.read_summary()["status"] == "failed"
    assert "rank 1 was killed by SIGKILL" in folder.read_summary()["cause"]


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="FlashAttention is installed here")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_is_not_started_again(kind: str, tmp_path: Path) -> None:
    """Found by the workers, with the folder claimed already: neither a restart nor an empty folder comes of it."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    mistake = "model.attn_implementation=flash_attention_2"  # transformers finds it when it builds the model
    ended = finish(begin(tmp_path, kind, mistake, TMPDIR=str(temporary)), tmp_path)
    assert ended.code == 2
    assert (
        ended.stderr.count("distft: transformers refuses what the recipe asks for: ImportError: FlashAttention2") == 1
    )
    assert "Traceback" not in ended.stderr
    assert list((tmp_path / "runs").iterdir()) == []
    assert list(temporary.glob("distft-*")) == []


def test_two_runs_at_once_on_a_machine_stay_apart(tmp_path: Path) -> None:
    """torchrun's c10d rendezvous has one port and one name for all, so that two launchers would form one group."""
    more = ("training.max_steps=4", "evaluation.before_and_after=false")
    processes = [begin(tmp_path / name, "ddp", *more) for name in ("first", "second")]
    for process, name in zip(processes, ("first", "second"), strict=True):
        ended = finish(process, tmp_path / name)
        assert ended.code == 0, ended.stderr[-3000:]
        assert (ended.folder.read_summary()["steps"], ended.folder.read_summary()["world_size"]) == (4, 2)


def test_a_killed_launcher_leaves_no_worker(tmp_path: Path) -> None:
    process = begin(tmp_path, "ddp")
    folder = wait_for_step(tmp_path, 4)
    everyone = family(process)
    (launcher,) = psutil.Process(process.pid).children()
    launcher.kill()
    assert finish(process, tmp_path).code == 1
    assert_gone(everyone)
    assert folder.read_summary()["status"] == "failed"
    assert go(tmp_path, "ddp").code == 0, "the same command goes on"
    assert folder.read_summary()["status"] == "finished"
