"""Ranks that make no progress: found within the stated time, their stacks written, ended, and brought back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distft.runs import manifest
from distft.runs.folder import RunFolder

from ..distributed.conftest import finish
from ..distributed.test_guards import wait_for_step
from .conftest import KINDS, assert_gone, assert_same_run, begin, family, go, ranks, until

Whole = Callable[[str], RunFolder]

# Python runs this before the worker's own code: a real-time signal puts its main thread to sleep, wherever it is.
NAP = """
import signal, time
def sleep_for_ever(signum, frame):
    while True:
        time.sleep(1000)
signal.signal(signal.SIGRTMIN, sleep_for_ever)
"""


def with_nap(where: Path) -> str:
    folder = where / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NAP)
    return f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


@pytest.mark.parametrize(("kind", "rank"), [("ddp", 1), ("fsdp", 0)])
def test_a_stopped_process_is_found_and_brought_back(
    kind: str, rank: int, uninterrupted: Whole, tmp_path: Path
) -> None:
    """The very process does not run, so that only its neighbours can tell."""
    whole = uninterrupted(kind)
    process = begin(tmp_path, kind, "run.hang_timeout_s=6")
    folder = wait_for_step(tmp_path, 5)
    everyone = family(process)
    ranks(process)[rank].suspend()
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    (fault,) = folder.read_faults()
    assert fault["rank"] == rank and "no progress for" in fault["cause"]
    assert f"rank {rank} did not answer" in fault["cause"] and f"rank {rank} did not answer" in ended.stderr
    for number in (0, 1):
        assert "File " in (folder.stacks / f"rank{number}.txt").read_text()
    assert folder.read_summary()["restarts"] == 1
    assert_same_run(folder, whole)
    assert_gone(everyone)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_stopped_during_a_save_is_found_and_brought_back(
    kind: str, uninterrupted: Whole, tmp_path: Path
) -> None:
    whole = uninterrupted(kind)
    process = begin(tmp_path, kind, "run.hang_timeout_s=6")
    folder = wait_for_step(tmp_path, 1)
    everyone = family(process)
    rank = ranks(process)[1]

    def in_a_save() -> bool:
        return any(not (path / manifest.NAME).exists() for path in folder.checkpoints.glob("checkpoint-*"))

    def stopped() -> bool:
        if in_a_save():
            rank.suspend()
            if in_a_save():
                return True
            rank.resume()
        return False

    until(stopped, every_s=0.0005)
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    (fault,) = folder.read_faults()
    assert fault["rank"] == 1 and "rank 1 did not answer" in fault["cause"]
    assert_same_run(folder, whole)
    assert_gone(everyone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_sleeps_for_ever_is_found_and_brought_back(kind: str, uninterrupted: Whole, tmp_path: Path) -> None:
    whole = uninterrupted(kind)
    process = begin(tmp_path, kind, "run.hang_timeout_s=6", PYTHONPATH=with_nap(tmp_path))
    folder = wait_for_step(tmp_path, 5)
    everyone = family(process)
    workers = ranks(process)
    workers[max(workers)].send_signal(signal.SIGRTMIN)
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    (fault,) = folder.read_faults()
    assert "no progress for" in fault["cause"]
    assert "sleep_for_ever" in (folder.stacks / f"rank{max(workers)}.txt").read_text()
    assert_same_run(folder, whole)
    assert_gone(everyone)


def test_a_long_evaluation_is_no_hang(tmp_path: Path) -> None:
    ended = go(
        tmp_path,
        "ddp",
        "run.hang_timeout_s=1.2",
        "training.max_steps=4",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
        "evaluation.max_samples=null",
        "data.max_samples=null",
        "data.validation_fraction=0.8",
        "training.per_device_eval_batch_size=1",
    )
    assert ended.code == 0, ended.stderr[-3000:]
    metrics = ended.folder.read_metrics()
    assert max(record["eval_runtime"] for record in metrics if "eval_runtime" in record) > 1.2, "it was no long one"
    assert ended.folder.read_faults() == []
    assert not ended.folder.stacks.exists()


def test_a_collective_waits_as_long_as_the_recipe_says(uninterrupted: Whole, tmp_path: Path) -> None:
    process = begin(tmp_path, "ddp", "training.ddp_timeout=15")
    folder = wait_for_step(tmp_path, 5)
    everyone = family(process)
    ranks(process)[1].suspend()
    until(folder.read_faults)  # torch's own 1,800 s and the watchdog's 900 s are far beyond its limit
    ended = finish(process, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    assert_same_run(folder, uninterrupted("ddp"))
    assert_gone(everyone)
