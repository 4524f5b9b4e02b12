"""A thread in every rank that notices when the run hangs or another rank on the node dies.

Collectives make all ranks wait for the slowest, so if one hangs, all do. Each rank then writes its Python stacks into
the run folder. A rank that does not, or that has made less progress than the others, is the one the others are waiting
for. All processes then exit, and the launcher starts them again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import select
import signal
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from transformers import TrainerCallback

from distft.console import say
from distft.distributed.collectives import gather
from distft.distributed.supervisor import IN_PROCESS, PROGRESS
from distft.distributed.world import World
from distft.errors import DistftError, Interrupted, RankLost, UserError
from distft.runs.record import Record

REPORTED = (0, UserError.exit_code, Interrupted.exit_code)
"""Exit codes of a neighbour that has already reported why it exited."""
GRACE_S = 5.0
"""Seconds that the other ranks have for an orderly exit after one has died or hung."""
_HEAD = "rank {rank} (pid {pid} on {host}): step {step}, batch {micro}"


class Watchdog(TrainerCallback):  # type: ignore[misc]
    """Heartbeat and watchdog thread of one rank. All ranks enter the context together.

    The heartbeat is this rank's progress: complete steps, and what has started since (micro-batches, evaluation
    batches, a save). The thread polls these two numbers, so it costs training nothing and never waits for the device.
    `hang_timeout_s` applies once the first step is complete.

    Leaving the context raises RankLost instead of the error that a neighbour's death has caused here.
    """

    def __init__(self, world: World, record: Record, hang_timeout_s: float) -> None:
        self._world, self._record, self._timeout = world, record, hang_timeout_s
        self._place = (record.step, 0)
        self._armed = False
        self._interval = min(hang_timeout_s / 5, 5.0)
        self._began = time.time()
        self._closed, self._found = threading.Event(), threading.Event()
        self._lost: RankLost | None = None
        self._thread = threading.Thread(target=self._watch, name="distft-watch", daemon=True)

    # Trainer's events -------------------------------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._place, PROGRESS.began = (state.global_step, 1), True
        self._armed = state.global_step > self._record.place.step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._place = (state.global_step, 0)
        self._record.step = PROGRESS.step = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._armed = False

    def _on(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._place = (self._place[0], self._place[1] + 1)

    on_substep_end = on_prediction_step = on_evaluate = on_save = _on

    # Context ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Watchdog:
        here = (socket.gethostname(), os.getpid())
        self._neighbours = {
            rank: pid
            for rank, (host, pid) in enumerate(gather(here, self._world))
            if host == here[0] and pid != here[1]
        }
        self._descriptors = {os.pidfd_open(pid): rank for rank, pid in self._neighbours.items()}
        self._record.folder.stacks.mkdir(exist_ok=True)
        self._stacks: IO[str] = self._file(self._world.rank).open("a", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)  # for a rank that cannot do it itself
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # a neighbour's death may break a collective here before the thread notices it
            foreign = isinstance(error, Exception) and not isinstance(error, DistftError) and self._neighbours
            self._found.wait(1.0 if foreign else 0.0)
        self._closed.set()
        self._thread.join(timeout=2 * self._interval)
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()
        with contextlib.suppress(OSError):  # another rank may have removed it, or the whole folder
            if self._file(self._world.rank).stat().st_size == 0:
                self._file(self._world.rank).unlink()
            self._record.folder.stacks.rmdir()  # fails if it is not empty
        for descriptor in self._descriptors:
            os.close(descriptor)
        if error is not None and self._lost is not None:
            raise self._lost from error

    # The thread -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        poller = select.poll()
        for descriptor in self._descriptors:
            poller.register(descriptor, select.POLLIN)
        seen, idle, now = self._place, 0.0, time.monotonic()
        while not self._closed.is_set():
            for descriptor, _ in poller.poll(1000 * min(self._interval, 0.5)):
                poller.unregister(descriptor)
                self._neighbour_ended(self._descriptors[descriptor])
            before, now = now, time.monotonic()
            if not self._armed or self._place != seen:
                seen, idle = self._place, 0.0
                continue
            idle += min(now - before, 1.0)  # do not count time in which this process itself was stopped
            if idle > self._timeout or (idle > self._timeout / 2 and self._places()):
                self._end_hang(idle)

    def _neighbour_ended(self, rank: int) -> None:
        code = exit_code(self._neighbours[rank])
        if code in REPORTED or self._closed.is_set():
            return
        how = "died" if code is None else f"failed (exit code {code})"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " (the kernel does this when the machine runs out of memory)"
        self._lost = RankLost(rank, f"rank {rank} {how} after step {self._record.step}")
        self._found.set()
        if not self._closed.wait(GRACE_S):  # stuck in a collective that will never complete
            self._end(self._lost, speak=self._world.rank == min(set(range(self._world.world_size)) - {rank}))

    def _end_hang(self, idle: float) -> None:
        step, micro = self._place
        head = _HEAD.format(rank=self._world.rank, pid=os.getpid(), host=socket.gethostname(), step=step, micro=micro)
        self._stacks.write(f"{head}\nno progress for {idle:.0f} s, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        deadline = time.monotonic() + max(GRACE_S, 2 * self._interval)
        while len(self._places()) < self._world.world_size and time.monotonic() < deadline:
            time.sleep(0.1)
        places = self._places()
        silent = sorted(set(range(self._world.world_size)) - set(places))
        behind = sorted(rank for rank, place in places.items() if place < max(places.values()))
        what = f"no progress for {idle:.0f} s after step {step}: "
        if silent:
            what += f"{_named(silent)} did not answer"
        elif behind:
            what += f"{_named(behind)} made less progress than the others"
        else:
            what += f"{_named(sorted(places))} stopped at the same place"
        first = self._world.rank == min(places)
        lost = silent or behind or sorted(places)
        error = RankLost(
            lost[0] if len(lost) == 1 else None,
            f"{what}; the Python stacks of all ranks are in {self._record.folder.stacks}",
        )
        if IN_PROCESS in os.environ:  # this is the caller's own process; the caller can interrupt it
            say(str(error))
            self._armed = False
            return
        self._record.close(error)
        for rank in silent:
            if rank in self._neighbours and first:
                self._wake_and_kill(rank)
        self._end(error, speak=first)

    def _wake_and_kill(self, rank: int) -> None:
        """Make a stopped neighbour write its stacks, then kill it; a launcher's SIGTERM would not reach it."""
        with contextlib.suppress(ProcessLookupError):
            pid = self._neighbours[rank]
            with self._file(rank).open("a", encoding="utf-8") as file:
                file.write(f"rank {rank} (pid {pid} on {socket.gethostname()}): did not answer\n")
            os.kill(pid, signal.SIGUSR2)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)
            os.kill(pid, signal.SIGKILL)

    def _end(self, error: RankLost, *, speak: bool) -> None:
        """End this process, whose main thread is stuck."""
        self._record.close(error)
        if speak:
            say(str(error))
        os._exit(error.exit_code)

    def _file(self, rank: int) -> Path:
        return self._record.folder.stacks / f"rank{rank}.txt"

    def _places(self) -> dict[int, tuple[int, int]]:
        """Return the progress of every rank that has written its stacks since this watchdog started."""
        found = {}
        for rank in range(self._world.world_size):
            with contextlib.suppress(OSError):
                path = self._file(rank)
                if path.stat().st_mtime >= self._began and path.stat().st_size:
                    heads = re.findall(r"^rank .*: step (\d+), batch (\d+)$", path.read_text(), re.MULTILINE)
                    if heads:
                        found[rank] = (int(heads[-1][0]), int(heads[-1][1]))
        return found


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def exit_code(pid: int) -> int | None:
    """Return the exit code of process `pid`, negative for a signal, or None if its parent has already reaped it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(text.rpartition(")")[2].split()[-1]))
