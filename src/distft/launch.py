"""The command that starts the workers as a pure function, and starting them, again where one was lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import psutil

from distft.errors import Interrupted
from distft.outcome import told
from distft.run import RunFolder
from distft.world import ATTEMPT, NPROC, OUTCOME, launcher_name, say


def worker_command(arguments: Sequence[str], processes: int, restarts: int) -> list[str]:
    """Command that starts `processes` workers of `distft.train` on this machine; the launcher of several starts them again
    up to `restarts` times.

    `--multi_gpu` is what makes accelerate start more than one process, on CPU as well. Its default rendezvous hangs when a
    worker is killed, so c10d it is. Sharding and precision stay out of it: the recipe brings them.
    """
    worker = ["-m", "distft.train", *arguments]
    if processes == 1:
        return [sys.executable, *worker]
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
        "--rdzv_backend", "c10d", "--main_process_ip", "127.0.0.1", "--main_process_port", "0",
        # Every second is soon enough, and leaves the neighbours of a killed worker time to see how it ended.
        "--max_restarts", str(restarts), "--monitor_interval", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", *worker,
    ]  # fmt: skip


def worker_environment(environment: Mapping[str, str], processes: int, outcome: Path) -> dict[str, str]:
    """The environment of the launcher: ours, the size that was asked for, and where workers leave their exit code."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))  # torchrun would set 1 and warn
    # A store that lives in the launcher keeps the keys of the group that died, and the next one hangs on them.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # By default all launchers of a machine meet at one port under one name, and would take part in each other's runs.
    own = {"PET_RDZV_ENDPOINT": "127.0.0.1:0", "PET_RDZV_ID": uuid.uuid4().hex}
    return {"OMP_NUM_THREADS": threads, **environment, **store, **own, NPROC: str(processes), OUTCOME: str(outcome)}


def run(arguments: Sequence[str], processes: int, restarts: int) -> int:
    """Start the workers, wait for them, and return the exit code of the run: 0, 75, 2 or 1.

    Workers that were killed, failed or hung are started again up to `restarts` times: several by their launcher, a single
    one here. Whatever is left of what was started is ended with the run, so that no rank stays behind with a GPU.
    """
    with tempfile.TemporaryDirectory(prefix="distft-") as name:
        outcome = Path(name)
        environment = worker_environment(os.environ, processes, outcome)
        for attempt in range(restarts + 1 if processes == 1 else 1):
            if processes == 1:
                environment[ATTEMPT] = str(attempt)
            code, stopped = _start(worker_command(arguments, processes, restarts), environment, outcome)
            if code == 0 or stopped:
                break
            if code < 0:
                rank, who = (0, "rank 0") if processes == 1 else (None, "the launcher")
                _record_kill(rank, f"{who} was killed by {signal.Signals(-code).name}", attempt, outcome)
        exit_code = told("exit-code", outcome)
        if code == 0 and exit_code is not None:
            return int(exit_code)
        return Interrupted.exit_code if stopped else min(abs(code), 1)


def _start(command: Sequence[str], environment: Mapping[str, str], outcome: Path) -> tuple[int, bool]:
    """The exit code of `command`, and whether a signal asked this process to stop it."""
    child = subprocess.Popen(command, start_new_session=True, env=environment)

    def pass_on(signum: int, frame: FrameType | None) -> None:
        """To the workers, which save and stop together; torchrun would end them. Ctrl-C a second time ends them."""
        again = signum == signal.SIGINT and signum in passed
        passed.append(signum)
        (outcome / "stop").touch()
        workers = _workers(child.pid)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(signum)
        if not workers:
            _end_all(outcome)
        elif again:
            signal.alarm(5)

    passed: list[int] = []
    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), pass_on)
    handlers[signal.SIGALRM] = lambda *_: _end_all(outcome)
    previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        return child.wait(), bool(passed)
    finally:
        signal.alarm(0)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        _end_all(outcome)


def _record_kill(rank: int | None, cause: str, attempt: int, outcome: Path) -> None:
    """Say that the process that was started was killed, and write into the run folder what it had no time to write."""
    say(cause)
    path = told("folder", outcome)
    if path is None:
        return
    folder = RunFolder(Path(path))
    summary, metrics = folder.read_summary(), folder.read_metrics()
    if summary["status"] != "running":
        return
    folder.append_fault({
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "rank": rank, "step": metrics[-1]["step"] if metrics else 0,
        "cause": cause, "launch": launcher_name(psutil.Process()), "attempt": attempt,
    })  # fmt: skip
    folder.write_summary(summary | {"status": "failed", "cause": cause})


def _workers(started: int) -> list[psutil.Process]:
    """The ranks that are alive: what was started, or its children where that is a launcher."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(started)
        if "accelerate.commands.launch" not in process.cmdline():
            return [process]
        return [child for child in process.children() if "distft.train" in child.cmdline()]
    return []


def _end_all(outcome: Path) -> None:
    """End every process that works for this run. torchrun gives each worker a session of its own, and those of a launcher
    that was killed have another parent, so they are known by their environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(OUTCOME) == str(outcome):
                process.kill()
