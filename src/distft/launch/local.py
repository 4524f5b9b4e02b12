"""The command that starts the workers as a pure function, and starting them, again where one was lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import psutil

from distft.console import say
from distft.distributed.signals import STOPPING
from distft.distributed.supervisor import ATTEMPT, NPROC, OUTCOME, launcher_name, read_error, read_note
from distft.errors import DistftError, Interrupted, LaunchError, RankLost
from distft.launch import output
from distft.runs.folder import RunFolder

Handler = Callable[[int, FrameType | None], None]
MEETING_S = 900
"""How long the launchers of several nodes wait for each other: one may start late, from a slow disk say."""


@dataclass(frozen=True)
class Node:
    """This machine's place among those of one run. `meeting` is `host:port`, where the launchers of several meet; its host is
    node 0. Each machine has a launcher with as many processes."""

    count: int = 1
    rank: int = 0
    meeting: str = ""

    @classmethod
    def of(cls, count: int, rank: int, meeting: str) -> Node:
        """The place as a user gives it.

        Raises:
            LaunchError: it is none.
        """
        host, _, port = meeting.rpartition(":")
        if count < 1 or not 0 <= rank < count:
            raise LaunchError(
                f"--node-rank {rank} of --nnodes {count}: nodes are counted from 0 to {max(count, 1) - 1}"
            )
        if count > 1 and not (host and port.isdigit() and 0 < int(port) < 2**16):
            raise LaunchError(
                f"--nnodes {count} needs --rdzv HOST:PORT, the same on every node: a name or address of node 0 that all reach, and a "
                f"port that is free there{f'; got {meeting}' if meeting else ''}"
            )
        return cls(count, rank, meeting)

    @property
    def host(self) -> str:
        return self.meeting.rpartition(":")[0]

    @property
    def port(self) -> str:
        return self.meeting.rpartition(":")[2]

    def address(self) -> str:
        """Name or address of this machine by which the others reach it.

        Raises:
            LaunchError: the host of the meeting has no address.
        """
        if self.rank == 0:
            return self.host
        try:
            family, *_, target = socket.getaddrinfo(self.host, int(self.port), type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing; the kernel chooses the interface
                return str(probe.getsockname()[0])
        except OSError as error:
            raise LaunchError(f"--rdzv {self.meeting}: {self.host} cannot be reached from here ({error})") from error


TRAINING, EVALUATION = "distft.train", "distft.evaluation"
"""The modules that are started as workers."""


def worker_command(
    arguments: Sequence[str], processes: int, restarts: int, node: Node, module: str = TRAINING
) -> list[str]:
    """Command that starts `processes` workers of `module` on this machine; the launcher of several starts them again
    up to `restarts` times.

    `--multi_gpu` is what makes accelerate start more than one process, on CPU as well. Its default rendezvous hangs when a
    worker is killed, so c10d it is. Sharding and precision stay out of it: the recipe brings them.
    """
    worker = ["-m", module, *arguments]
    if processes * node.count == 1:
        return [sys.executable, *worker]
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes * node.count),
        "--num_machines", str(node.count), "--machine_rank", str(node.rank), "--rdzv_backend", "c10d",
        "--main_process_ip", node.host or "127.0.0.1", "--main_process_port", node.port or "0",
        *(["--rdzv_conf", f"is_host={int(node.rank == 0)},read_timeout={MEETING_S},join_timeout={MEETING_S}"] if node.count > 1 else []),
        # Every second is soon enough, and leaves the neighbours of a killed worker time to see how it ended.
        "--max_restarts", str(restarts), "--monitor_interval", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", *worker,
    ]  # fmt: skip


def worker_environment(environment: Mapping[str, str], processes: int, outcome: Path, node: Node) -> dict[str, str]:
    """The environment of the launcher: ours, the size that was asked for, and where workers leave their exit code."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))  # torchrun would set 1 and warn
    # GNU's OpenMP has threads wait for each other in a loop that holds a core for 300,000 turns: beside other work on the
    # machine a step then takes several times as long. A thousand turns are as fast where there is none.
    openmp = {"OMP_NUM_THREADS": threads, "GOMP_SPINCOUNT": "1000"}
    # A store that lives in the launcher keeps the keys of the group that died, and the next one hangs on them.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if node.count == 1:
        # By default all launchers of a machine meet at one port under one name, and would take part in each other's runs.
        own = {"PET_RDZV_ENDPOINT": "127.0.0.1:0", "PET_RDZV_ID": uuid.uuid4().hex}
    else:
        # torch's and gloo's own guess, the address of the machine's name, is loopback or nothing on many machines.
        address = node.address()
        own = {"PET_RDZV_ID": node.meeting, "PET_LOCAL_ADDR": address}
        interface = _interface(address)
        if interface is not None:
            environment = {"GLOO_SOCKET_IFNAME": interface, **environment}
    size = {NPROC: str(processes * node.count), OUTCOME: str(outcome)}
    return {**openmp, **environment, **store, **own, **size}


def _interface(address: str) -> str | None:
    """The network interface of this machine that has `address`; None for loopback, which no other machine reaches."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses) and not address.startswith("127."):
            return name
    return None


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (0, 75, 2 or 1), its folder if it had one, and the error that ended it, if known."""

    code: int
    folder: Path | None = None
    error: DistftError | None = None


def run(arguments: Sequence[str], processes: int, restarts: int, node: Node, module: str = TRAINING) -> Ended:
    """Start `processes` workers on this node and wait for them.

    Workers that were killed, failed or hung are restarted up to `restarts` times: several by their launcher, a single
    one here. All processes that were started are ended with the run, so that none keeps a GPU.
    """
    with tempfile.TemporaryDirectory(prefix="distft-") as name:
        outcome = Path(name)
        environment = worker_environment(os.environ, processes, outcome, node)
        alone = processes * node.count == 1
        killed: RankLost | None = None
        for attempt in range(restarts + 1 if alone else 1):
            if alone:
                environment[ATTEMPT] = str(attempt)
            code, stopped = _start(worker_command(arguments, processes, restarts, node, module), environment, outcome)
            killed = None
            if code == 0 or stopped:
                break
            if code < 0:
                rank, who = (0, "rank 0") if alone else (None, "the launcher")
                killed = RankLost(rank, f"{who} was killed by {signal.Signals(-code).name}")
                _record_kill(killed, attempt, outcome)
        exit_code = read_note("exit-code", outcome)
        if code == 0 and exit_code is not None:
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


def _start(command: Sequence[str], environment: Mapping[str, str], outcome: Path) -> tuple[int, bool]:
    """Run `command` to its end. Returns its exit code, and whether a signal asked this process to stop it."""
    pipe = output.pipe()
    child = subprocess.Popen(command, start_new_session=True, env=environment, stdout=pipe, stderr=pipe)

    def pass_on(signum: int, frame: FrameType | None) -> None:
        """Send the signal to the workers, which save and stop together; torchrun would end them. A second Ctrl-C ends them."""
        again = signum == signal.SIGINT and signum in passed
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
        with _handling(handlers):
            return output.wait(child), bool(passed)
    finally:
        _end_all(outcome)


@contextlib.contextmanager
def _handling(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Handle signals for the duration of a block. Only the main thread can; in another one this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


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
    folder.append_fault({
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "rank": killed.rank, "step": metrics[-1]["step"] if metrics else 0,
        "cause": cause, "launch": launcher_name(psutil.Process()), "attempt": attempt,
    })  # fmt: skip
    folder.write_summary(summary | {"status": "failed", "cause": cause})


def _workers(started: int) -> list[psutil.Process]:
    """The ranks that are alive: what was started, or its children where that is a launcher."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(started)
        if "accelerate.commands.launch" not in process.cmdline():
            return [process]
        return [child for child in process.children() if {TRAINING, EVALUATION} & set(child.cmdline())]
    return []


def _catches(pid: int, signum: int) -> bool:
    """Whether the process has a handler for the signal. A worker that is still at its imports has none and would die of it;
    it looks for the file `stop` once it has."""
    with contextlib.suppress(OSError):
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return caught is not None and bool(int(caught[1], 16) >> (signum - 1) & 1)
    return False


def _end_all(outcome: Path) -> None:
    """End every process that works for this run. torchrun gives each worker a session of its own, and those of a launcher
    that was killed have another parent, so they are known by their environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(OUTCOME) == str(outcome):
                process.kill()
