"""Signals to some or all ranks, Ctrl-C twice, the deadline: all ranks stop at the same step, save, and exit with 75."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from distft.runs import manifest
from distft.runs.folder import RunFolder
from distft.training.beside import free_port

from ..distributed.conftest import LIMIT_S, finish, start
from ..distributed.test_guards import wait_for_step
from .conftest import RUN, assert_gone, assert_same_run, begin, family, go, is_pending, ranks, stop, until

Whole = Callable[[str], RunFolder]
LONG = ("training.num_train_epochs=200", "training.save_strategy=no", "evaluation.before_and_after=false")


@pytest.mark.parametrize(("kind", "rank", "signum"), [("ddp", 1, signal.SIGTERM), ("fsdp", 0, signal.SIGUSR1)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    kind: str, rank: int, signum: signal.Signals, uninterrupted: Whole, tmp_path: Path
) -> None:
    whole = uninterrupted(kind)
    process = begin(tmp_path, kind)
    folder = wait_for_step(tmp_path, 5)
    everyone = family(process)
    ranks(process)[rank].send_signal(signum)
    ended = finish(process, tmp_path)
    assert ended.code == 75, ended.stderr[-3000:]
    summary = folder.read_summary()
    assert summary["status"] == "interrupted" and f"stopped by {signum.name}" in summary["cause"]
    assert folder.read_faults() == [], "nothing broke down"
    checkpoint, skipped = manifest.newest(folder.checkpoints)
    assert checkpoint is not None and not skipped
    assert f"after step {manifest.step_of(checkpoint)};" in summary["cause"]
    assert_gone(everyone)
    assert go(tmp_path, kind).code == 0
    assert_same_run(folder, whole)


def test_a_closed_terminal_stops_a_run_and_leaves_no_process(tmp_path: Path) -> None:
    """The parent gets SIGHUP, and nobody can print any more."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        pytest.skip("SIGHUP is ignored, as under nohup, and so is it by what is started here")
    terminal, theirs = pty.openpty()
    process = begin(tmp_path, "ddp", *LONG, terminal=theirs)
    os.close(theirs)
    folder = wait_for_step(tmp_path, 3)
    everyone = family(process)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(LIMIT_S) == 75
    assert_gone(everyone)
    summary = folder.read_summary()
    assert summary["status"] == "interrupted" and "stopped by SIGHUP after step" in summary["cause"]
    checkpoint, skipped = manifest.newest(folder.checkpoints)
    assert checkpoint is not None and not skipped
    assert folder.read_faults() == []


@pytest.mark.parametrize("kind", ["single", "ddp"])
def test_ctrl_c_twice_stops_now(kind: str, tmp_path: Path) -> None:
    process = begin(tmp_path, kind, *LONG)
    folder = wait_for_step(tmp_path, 3)
    everyone = family(process)
    workers = ranks(process).values()
    stop(workers)  # so that no rank comes to the end of its step between the two
    for passed_on in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(signal.SIGINT)
        for worker in workers:
            until(partial(is_pending, passed_on, worker))
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()
    ended = finish(process, tmp_path)
    assert ended.code == 75, ended.stderr[-3000:]
    assert not list(folder.checkpoints.glob("checkpoint-*/manifest.json")), "it did not wait for a save"
    assert_gone(everyone)


@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_a_run_saves_and_stops_before_its_time_is_over(kind: str, tmp_path: Path) -> None:
    process = begin(tmp_path, kind, *LONG, "run.max_time=00:01:30")
    ended = finish(process, tmp_path)
    assert ended.code == 75, ended.stderr[-3000:]
    checkpoint, skipped = manifest.newest(ended.folder.checkpoints)
    assert checkpoint is not None and not skipped
    assert f"after step {manifest.step_of(checkpoint)};" in ended.folder.read_summary()["cause"]
    assert "stopped by run.max_time after step" in ended.folder.read_summary()["cause"]


@pytest.mark.parametrize("kind", ["single", "ddp"])
def test_a_run_that_has_trained_long_enough_ends_with_its_result(kind: str, tmp_path: Path) -> None:
    """As after its last step, on all ranks after the same one, and not as one that was stopped."""
    ended = go(tmp_path, kind, *LONG, "run.train_time=00:00:06")
    assert ended.code == 0, ended.stderr[-3000:]
    summary = ended.folder.read_summary()
    assert summary["status"] == "finished" and summary["train_time_s"] >= 6
    last = ended.folder.read_metrics()[-1]["step"]
    assert 3 < summary["steps"] == last and summary["samples"] == summary["steps"] * 4
    assert list(ended.folder.adapter.glob("*.safetensors")) and summary["train_loss"] > 0


def test_a_time_in_another_spelling_is_a_fault(tmp_path: Path) -> None:
    ended = go(tmp_path, "single", "run.max_time=90m")
    assert ended.code == 2
    assert "run.max_time" in ended.stderr


def test_a_signal_while_the_group_is_started_again_ends_the_run(tmp_path: Path) -> None:
    """Nobody catches it in that moment, and a restart would go on against the user's will."""
    process = begin(tmp_path, "ddp", *LONG)
    wait_for_step(tmp_path, 3)
    everyone = family(process)
    first = ranks(process)
    first[1].kill()
    psutil.wait_procs(list(first.values()), timeout=60)
    process.send_signal(signal.SIGTERM)
    ended = finish(process, tmp_path)
    assert ended.code == 75, ended.stderr[-3000:]
    assert_gone(everyone)
    (path,) = (tmp_path / "runs").iterdir()
    assert json.loads((path / "summary.json").read_text())["status"] != "running"


def test_a_signal_is_heard_while_a_rank_waits_for_others_that_never_come(tmp_path: Path) -> None:
    """torch's C++ holds the main thread for 1,800 s, so that Python's own handlers never run."""
    port = free_port()
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    process = start([sys.executable, "-m", "distft.train", *RUN], tmp_path, MASTER_PORT=str(port), **alone)
    sockets = psutil.Process(process.pid).net_connections
    until(lambda: any(socket.laddr.port == port for socket in sockets()))
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    ended = finish(process, tmp_path)
    assert ended.code == 75, ended.stderr[-3000:]
    assert "stopped by SIGTERM" in ended.stderr


@pytest.mark.parametrize("rank", [None, 1])
def test_a_signal_before_the_first_step_ends_all_ranks_together(rank: int | None, tmp_path: Path) -> None:
    process = begin(tmp_path, "ddp")
    until(lambda: list(tmp_path.glob("runs/*/recipe.yaml")))
    everyone = family(process)
    (process if rank is None else ranks(process)[rank]).send_signal(signal.SIGTERM)
    ended = finish(process, tmp_path)
    assert ended.code == 75, ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    assert ended.folder.read_summary()["status"] == "interrupted"
    assert ended.folder.read_faults() == []
    assert_gone(everyone)
