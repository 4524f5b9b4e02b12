"""accelerate's command line as a pure function, and starting it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from distft.outcome import OUTCOME
from distft.world import NPROC


def accelerate_command(arguments: Sequence[str], processes: int, port: int) -> list[str]:
    """Command that starts `processes` workers of `distft.train` on this machine.

    `--multi_gpu` is what makes accelerate start more than one process, on CPU as well; without it, and with `--cpu`, it
    starts one and says nothing. Sharding and precision stay out of it: the recipe brings them.
    """
    several = ["--multi_gpu", "--main_process_port", str(port)] if processes > 1 else []
    return [
        sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "distft.train", *arguments,
    ]  # fmt: skip


def worker_environment(environment: Mapping[str, str], processes: int, outcome: Path) -> dict[str, str]:
    """The environment of the launcher: ours, the size that was asked for, and where workers leave their exit code."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))  # torchrun would set 1 and warn
    return {"OMP_NUM_THREADS": threads, **environment, NPROC: str(processes), OUTCOME: str(outcome)}


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(arguments: Sequence[str], processes: int) -> int:
    """Start the workers, wait for them, and return the exit code of the run: 0, 75, 2 or 1.

    The launcher gets a process group of its own, which is ended with the run, so that no rank stays behind with a GPU.
    """
    with tempfile.TemporaryDirectory(prefix="distft-") as folder:
        outcome = Path(folder) / "exit-code"
        child = subprocess.Popen(
            accelerate_command(arguments, processes, free_port()), start_new_session=True,
            env=worker_environment(os.environ, processes, outcome),
        )  # fmt: skip

        def pass_on(signum: int, frame: FrameType | None) -> None:
            """To the workers, which save and stop together; torchrun would end them. Ctrl-C a second time ends them."""
            workers = _workers(child.pid)
            if not workers or (signum == signal.SIGINT and signum in passed):
                _end_group(child.pid)
            passed.append(signum)
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(signum)

        passed: list[int] = []
        previous = {
            signum: signal.signal(signum, pass_on) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }
        try:
            code = child.wait()
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
            _end_group(child.pid)
        told = outcome.read_text(encoding="utf-8") if outcome.exists() else ""
        return int(told) if told else min(abs(code), 1)


def _workers(launcher: int) -> list[psutil.Process]:
    """The ranks that `launcher` has started and that are alive."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "distft.train" in process.cmdline() and "accelerate.commands.launch" not in process.cmdline():
                    found.append(process)
    return found


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
