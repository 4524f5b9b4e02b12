"""The place of this process among all processes: its rank and the sizes, from torchrun, accelerate or SLURM."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from distft.errors import LaunchError


@dataclass(frozen=True)
class World:
    """The place of this process. `rank` counts over all nodes, `local_rank` within one; sizes count processes."""

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
        """Read the variables of torchrun and accelerate, else those of an srun step, else return a single process.

        A batch script's shell has some of SLURM's variables without being one of several processes, so
        `SLURM_STEP_NUM_TASKS` decides. A variable that is empty counts as not set.

        Raises:
            LaunchError: the variables contradict each other.
        """
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if rank is not None and size is not None:
            if not rank < size:
                raise LaunchError(f"the environment has RANK={rank} of WORLD_SIZE={size}; ranks are counted from 0")
            local_size = _number(environment, "LOCAL_WORLD_SIZE") or size
            node, local_rank = _number(environment, "GROUP_RANK"), _number(environment, "LOCAL_RANK")
            return cls(
                rank,
                rank if local_rank is None else local_rank,
                size,
                local_size,
                rank // local_size if node is None else node,
            )
        if rank is not None or (size is not None and size > 1):
            given, missing = ("RANK", "WORLD_SIZE") if size is None else ("WORLD_SIZE", "RANK")
            raise LaunchError(
                f"the environment has {given}={environment[given]}, but no {missing}; a launcher sets both, so it is "
                f"left over from another run: unset {given}"
            )
        if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            node = int(environment.get("SLURM_NODEID", "0"))
            local_sizes = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
            return cls(
                rank=int(environment["SLURM_PROCID"]),
                local_rank=int(environment["SLURM_LOCALID"]),
                world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
                local_world_size=local_sizes[node],
                node=node,
            )
        return cls()

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Set the variables that torch reads, if srun started the processes without a launcher."""
        if self.world_size == 1 or "RANK" in environment:
            return
        environment["RANK"], environment["LOCAL_RANK"] = str(self.rank), str(self.local_rank)
        environment["WORLD_SIZE"] = str(self.world_size)
        environment["LOCAL_WORLD_SIZE"] = str(self.local_world_size)
        if "MASTER_ADDR" not in environment:  # the step's first node, which has rank 0; srun may run on another node
            nodes = environment.get("SLURM_STEP_NODELIST")
            if nodes:
                command = ["scontrol", "show", "hostnames", nodes]
                hosts = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
                environment["MASTER_ADDR"] = hosts.stdout.split()[0]
            else:
                environment["MASTER_ADDR"] = environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 10_000))


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise LaunchError(f"the environment has {name}={text}, which is not a number; unset it, or use a launcher")
    return int(text)


def _tasks_per_node(text: str) -> list[int]:
    """Parse SLURM's notation: `4(x2),2` is [4, 4, 2]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts
