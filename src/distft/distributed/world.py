"""Who am I among the processes: rank and sizes, from torchrun, accelerate's launcher or SLURM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import psutil

from distft.errors import DistftError, Interrupted

T = TypeVar("T")

NPROC = "DISTFT_NPROC"
"""Environment variable in which `distft train` passes on the number of processes that was asked for."""
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
"""torchrun's environment variable: how many times the group has been started again."""
OUTCOME = "DISTFT_OUTCOME"
"""Environment variable: folder that `distft train` shares with its workers while they run. They leave their exit code
there, which an elastic launcher would lose; a file `stop` in it tells workers that are started again not to go on."""


@dataclass
class StopRequest:
    """A signal to this process. While `deferred`, the first one is kept in `signum` until all ranks can stop together: between two
    parts of the work, or while `training`, after a step. Only the next one ends the process at once."""

    deferred: bool = False
    training: bool = False
    signum: int | None = None


STOP = StopRequest()  # one a process, as signals are


@dataclass(frozen=True)
class World:
    """This process's place. `rank` counts over all nodes, `local_rank` within this one; sizes are numbers of processes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node: int = 0
    timeout_s: int = 1800
    """How long a collective waits for a rank, in seconds."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> World:
        """torchrun's and accelerate's variables first; then those of an srun step (a batch script's shell has some of
        them without being one of several processes, so `SLURM_STEP_NUM_TASKS` decides); else one process alone."""
        if "RANK" in environment and "WORLD_SIZE" in environment:
            size = int(environment["WORLD_SIZE"])
            local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
            rank = int(environment["RANK"])
            node = int(environment.get("GROUP_RANK", rank // max(local_size, 1)))
            return cls(rank, int(environment.get("LOCAL_RANK", rank)), size, local_size, node)
        if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            node = int(environment.get("SLURM_NODEID", "0"))
            return cls(
                int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"]),
                int(environment["SLURM_STEP_NUM_TASKS"]),
                _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[node], node,
            )  # fmt: skip
        return cls()

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Set the variables that torch reads where srun started the processes without a launcher."""
        if self.world_size == 1 or "RANK" in environment:
            return
        environment["RANK"], environment["LOCAL_RANK"] = str(self.rank), str(self.local_rank)
        environment["WORLD_SIZE"] = str(self.world_size)
        environment["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        if "MASTER_ADDR" not in environment:  # the step's first node, where rank 0 is; srun itself may run on another
            nodes = environment.get("SLURM_STEP_NODELIST")
            if nodes:
                named = subprocess.run(
                    ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
                )
                environment["MASTER_ADDR"] = named.stdout.split()[0]
            else:
                environment["MASTER_ADDR"] = environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 10_000))


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's `4(x2),2` as [4, 4, 2]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


@dataclass(frozen=True)
class Launch:
    """The start of this process: by which launcher (its parent), for the how manieth time, and since when.

    `attempt` counts the restarts of the group by that launcher; `began` is the Unix time of the first start.
    """

    launcher: str
    attempt: int
    began: float

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch:
        parent = psutil.Process(os.getppid())
        attempt = environment.get(ATTEMPT)
        began = psutil.Process().create_time() if attempt is None else parent.create_time()
        return cls(launcher_name(parent), int(attempt or 0), began)


def launcher_name(process: psutil.Process) -> str:
    """A name that no other process on this machine has had."""
    return f"{process.pid}-{process.create_time():.2f}"


def together(world: World, work: Callable[[], T]) -> T:
    """`work()` on every rank; where it raises on any rank, or a signal to any has come, every rank raises, so that none waits for
    one that has left.

    Starts the process group where there is none yet, after `work`, so that slow work meets no timeout.

    Raises:
        DistftError: this rank's own, or that of the first rank that had one.
    """
    error: BaseException | None = None
    result: T | None = None
    try:
        result = work()
    except DistftError as caught:
        error = caught
    if error is None and STOP.deferred and STOP.signum is not None:
        error = Interrupted(signal.Signals(STOP.signum).name)
    if world.world_size > 1:
        import torch
        from accelerate import PartialState
        from torch import distributed

        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=world.timeout_s))
        everywhere: list[BaseException | None] = [None] * world.world_size
        distributed.all_gather_object(everywhere, error)
        error = error or next((other for other in everywhere if other is not None), None)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def gather(numbers: Sequence[float], world: World) -> list[Sequence[float]]:
    """The numbers of each rank, on all ranks. All ranks enter."""
    everywhere: list[Sequence[float]] = [numbers] * world.world_size
    if world.world_size > 1:
        from torch import distributed

        distributed.all_gather_object(everywhere, numbers)
    return everywhere


def reduce(numbers: Sequence[float], how: Literal["max", "sum"], world: World) -> list[float]:
    """Element-wise maximum or sum over all ranks, on all ranks. All ranks enter."""
    columns = zip(*gather(numbers, world), strict=True)
    return [max(column) if how == "max" else sum(column) for column in columns]
