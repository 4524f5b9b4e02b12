"""The command line and the environment that workers are started with, as pure functions."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from distft.distributed.supervisor import NPROC, OUTCOME
from distft.launch.node import Node, interface_of
from distft.paths import packaged
from distft.startup import SAFE_PATH

TRAINING, EVALUATION = "distft.train", "distft.evaluation"
"""The modules that run as workers."""
RENDEZVOUS_TIMEOUT_S = 900
"""How long the launchers of several nodes wait for each other; one may start late, for example from a slow disk."""


def worker_command(
    arguments: Sequence[str], processes: int, restarts: int, node: Node, module: str = TRAINING
) -> list[str]:
    """Build the command that starts `processes` workers of `module` on this machine.

    A single worker is started directly. Several are started by accelerate's launcher, which restarts them up to
    `restarts` times. Sharding and precision are not among its options, because they come from the recipe.
    """
    worker = ["-m", module, *arguments]
    if processes * node.count == 1:
        return [sys.executable, *worker]
    options = {
        "config_file": packaged("accelerate_configs/launcher.yaml"),  # not the user's default_config.yaml
        "num_processes": processes * node.count,
        "num_machines": node.count,
        "machine_rank": node.rank,
        "rdzv_backend": "c10d",  # the default rendezvous hangs when a worker is killed
        "main_process_ip": node.bracketed_host or "127.0.0.1",
        "main_process_port": node.port or 0,
        "max_restarts": restarts,
        "monitor_interval": 1,  # gives the neighbours of a killed worker time to see how it ended
        "mixed_precision": "no",
        "dynamo_backend": "no",
    }
    if node.count > 1:
        timeouts = f"read_timeout={RENDEZVOUS_TIMEOUT_S},join_timeout={RENDEZVOUS_TIMEOUT_S}"
        options["rdzv_conf"] = f"is_host={int(node.rank == 0)},{timeouts}"
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # --multi_gpu makes accelerate start more than one process, on CPU as well.
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *flags, *worker]


def worker_environment(environment: Mapping[str, str], processes: int, outcome: Path, node: Node) -> dict[str, str]:
    """Build the launcher's environment: ours, the requested size, and the folder `outcome` for the workers' notes."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))  # torchrun would set 1 and warn
    # Threads of GNU's OpenMP wait for each other in a busy loop of 300,000 iterations. On a busy machine, a
    # step then takes several times as long. A thousand iterations are as fast on an idle one.
    openmp = {"OMP_NUM_THREADS": threads, "GOMP_SPINCOUNT": "1000"}
    # A store inside the launcher would keep the keys of a group that died, and the next group would hang on them.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if node.count == 1:
        # By default all launchers on a machine use the same port and run ID, and join each other's runs.
        # torch would take the address of the host name, which many machines cannot resolve, and wait for it.
        own = {"PET_RDZV_ENDPOINT": "127.0.0.1:0", "PET_LOCAL_ADDR": "127.0.0.1"}
        rendezvous = {**own, "PET_RDZV_ID": uuid.uuid4().hex}
    else:
        # torch and gloo would take the address of the host name, which is loopback on many machines.
        address = node.address()
        rendezvous = {"PET_RDZV_ID": node.rendezvous, "PET_LOCAL_ADDR": address}
        interface = interface_of(address)
        if interface is not None:
            environment = {"GLOO_SOCKET_IFNAME": interface, **environment}
    size = {NPROC: str(processes * node.count), OUTCOME: str(outcome)}
    return {**openmp, **environment, **store, **rendezvous, **size, SAFE_PATH: "1"}
