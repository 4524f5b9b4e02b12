"""Run a program beside this run, in one process per rank, which form a process group of their own.

This works under every launcher. A failure there, such as running out of memory, breaks nothing here, and the memory of
the GPUs is released with the processes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft import upstream_api
from distft.distributed.collectives import broadcast, gather, together
from distft.distributed.signals import STOP
from distft.distributed.supervisor import OUTCOME
from distft.distributed.world import World

_TAIL = 2_000
"""Characters of the output that are kept."""


@dataclass(frozen=True)
class Ended:
    """How the process of a rank ended, and the end of what it printed. `code` is None if it was ended from here,
    because that of another rank had failed or a signal came."""

    code: int | None
    output: str


def run_beside(
    module: str, words: Sequence[str], world: World, while_waiting: Callable[[], None] = lambda: None
) -> list[Ended]:
    """Run `python -m module words` beside every rank, and return how each ended. All ranks enter.

    `while_waiting` is called a few times per second.

    Raises:
        Interrupted: a signal has asked the run to stop; the processes are ended.
    """
    port = broadcast(free_port(), world)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        command = [sys.executable, "-m", module, *words]
        code = _run(command, _environment(os.environ, port), log, world, f"distft/beside/{port}", while_waiting)
        log.seek(0)
        ended = Ended(code, log.read()[-_TAIL:])
    everywhere = gather(ended, world)
    together(world, lambda: None)
    return everywhere


def free_port() -> int:
    """Return a TCP port that is free on this machine at the moment."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _environment(environment: Mapping[str, str], port: int) -> dict[str, str]:
    """This process's environment for a second group: another port, and nothing by which the launcher monitors it."""
    kept = {key: value for key, value in environment.items() if not key.startswith("TORCHELASTIC_") and key != OUTCOME}
    return {**kept, "MASTER_PORT": str(port)}


def _run(
    command: list[str],
    environment: Mapping[str, str],
    log: Any,
    world: World,
    key: str,
    while_waiting: Callable[[], None],
) -> int | None:
    """Run this rank's process. Return its exit code, or None as soon as another rank's has failed or a signal came."""
    store = upstream_api.default_store() if world.world_size > 1 else None
    # The process ends when its standard input is closed, and so with this one, however this one ends.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=dict(environment))
    try:
        while child.poll() is None:
            if store is not None and store.check([key]):
                return None
            if STOP.signum is not None:
                break
            while_waiting()
            time.sleep(0.1)
        if child.returncode != 0 and store is not None:
            store.set(key, "failed")
        return child.returncode
    finally:
        child.kill()
        child.wait()
        with contextlib.suppress(BrokenPipeError):
            assert child.stdin is not None
            child.stdin.close()
