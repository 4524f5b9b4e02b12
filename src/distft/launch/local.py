"""Start the workers of a run on this machine, pass signals on to them, and restart them if one is lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from distft.console import say
from distft.distributed.leftovers import remove_launch
from distft.distributed.signals import STOPPING, Handler, announce, handling
from distft.distributed.supervisor import ATTEMPT, GIVEN_UP, OUTCOME, launcher_name, read_error, read_note
from distft.errors import DistftError, Interrupted, RankLost
from distft.launch import output
from distft.launch.command import EVALUATION, TRAINING, worker_command, worker_environment
from distft.launch.node import Node
from distft.runs.folder import RunFolder


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (0, 75, 2 or 1), its folder if it has one, and the error behind it if known."""

    code: int
    folder: Path | None = None
    error: DistftError | None = None


def run(arguments: Sequence[str], processes: int, restarts: int, node: Node, module: str = TRAINING) -> Ended:
    """Start `processes` workers on this node and wait for them.

    Workers that were killed, failed or hung are restarted up to `restarts` times: several by their launcher, a single
    one here. All processes that the run started are killed when it ends, so that none keeps a GPU.
    """
    with tempfile.TemporaryDirectory(prefix="distft-") as name:
        outcome = Path(name)
        environment = worker_environment(_own_environment(), processes, outcome, node)
        alone = processes * node.count == 1
        killed: RankLost | None = None
        for attempt in range(restarts + 1 if alone else 1):
            if alone:
                environment[ATTEMPT] = str(attempt)
            code, stopped = _start(worker_command(arguments, processes, restarts, node, module), environment, outcome)
            killed, given_up = None, read_note(GIVEN_UP, outcome)
            if code == 0 or stopped or given_up is not None:
                break
            if code < 0:
                rank, who = (0, "rank 0") if alone else (None, "the launcher")
                killed = RankLost(rank, f"{who} was killed by {signal.Signals(-code).name}")
                _record_kill(killed, attempt, outcome)
        exit_code = read_note("exit-code", outcome)
        if given_up is not None and not stopped:
            code = int(given_up)
        elif code == 0 and exit_code is not None:
            code = int(exit_code)
        else:
            code = Interrupted.exit_code if stopped else min(abs(code), 1)
        folder = read_note("folder", outcome)
        error = None if code == 0 else killed or read_error(outcome)
        ended = Ended(code, None if folder is None else Path(folder), error)
    if node.count > 1 and ended.code != 0:
        # srun kills the other nodes when the first one fails. They are about to end by themselves; ignore what it sends
        # here, even while Python shuts down.
        for signum in STOPPING:
            signal.signal(signum, signal.SIG_IGN)
        time.sleep(3)
    return ended


def _own_environment() -> dict[str, str]:
    """Our environment without another launcher's variables. Prints which ones were removed."""
    environment = dict(os.environ)
    if removed := remove_launch(environment):
        say(
            f"ignoring {', '.join(removed)}, left over in the environment: distft starts its processes itself, and the "
            "recipe decides what they do"
        )
    return environment


def _start(command: Sequence[str], environment: Mapping[str, str], outcome: Path) -> tuple[int, bool]:
    """Run `command` to its end. Returns its exit code, and whether a signal asked this process to stop it."""
    pipe = output.pipe()
    child = subprocess.Popen(command, start_new_session=True, env=environment, stdout=pipe, stderr=pipe)

    def pass_on(signum: int, frame: FrameType | None) -> None:
        """Send the signal to the workers, which save and stop together; torchrun would kill them.

        A second Ctrl-C does kill them.
        """
        again = signum == signal.SIGINT and signum in passed
        if again:
            say("stopping now")
        elif signum not in passed:
            announce(signum)
        passed.append(signum)
        (outcome / "stop").touch()
        workers = _workers(child.pid)
        sent = signal.SIGTERM if again else signum  # two pending signals of one kind would be merged into one
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                if _catches(worker.pid, sent):
                    worker.send_signal(sent)
        if not workers:
            _end_all(outcome)
        elif again:
            signal.alarm(5)

    passed: list[int] = []
    handlers: dict[int, Handler] = dict.fromkeys(STOPPING, pass_on)
    handlers[signal.SIGALRM] = lambda *_: _end_all(outcome)
    try:
        with handling(handlers), _own_signals():
            return output.wait(child), bool(passed)
    finally:
        _end_all(outcome)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the signals of a block from the thread that would end this process (`raise_on_signals`)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def _record_kill(killed: RankLost, attempt: int, outcome: Path) -> None:
    """Report that the process we started was killed, and write the records that it could not write itself."""
    cause = str(killed)
    say(cause)
    path = read_note("folder", outcome)
    if path is None:
        return
    folder = RunFolder(Path(path))
    summary, metrics = folder.read_summary(), folder.read_metrics()
    if summary["status"] != "running":
        return
    folder.append_fault(
        cause,
        rank=killed.rank,
        step=metrics[-1]["step"] if metrics else 0,
        launch=launcher_name(psutil.Process()),
        attempt=attempt,
    )
    folder.write_summary(summary | {"status": "failed", "cause": cause})


def _workers(started: int) -> list[psutil.Process]:
    """The ranks that are alive: the process that was started or, if that is a launcher, its children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(started)
        if "accelerate.commands.launch" not in process.cmdline():
            return [process]
        return [child for child in process.children() if {TRAINING, EVALUATION} & set(child.cmdline())]
    return []


def _catches(pid: int, signum: int) -> bool:
    """Whether the process has a handler for the signal.

    A worker that is still importing has none and would die. It looks for the file `stop` once it has installed one.
    """
    with contextlib.suppress(OSError):
        caught = re.search(
            r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(errors="replace"), re.MULTILINE
        )
        return caught is not None and bool(int(caught[1], 16) >> (signum - 1) & 1)
    return False


def _end_all(outcome: Path) -> None:
    """End every process of this run.

    They are found by their environment: torchrun gives each worker a session of its own, and the workers of a launcher
    that was killed have another parent.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(OUTCOME) == str(outcome):
                process.kill()
