"""Find the largest micro-batch that fits, before the run, in processes of `distft.training.batch_size_worker`.

Each rank starts one process, and they form a process group of their own. This works under every launcher, running out
of memory breaks nothing but the probe, and the GPU memory is released with the process.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft import upstream_api
from distft.distributed.collectives import broadcast, gather
from distft.distributed.supervisor import OUTCOME
from distft.distributed.world import World
from distft.errors import DistftError
from distft.hardware import GIB


@dataclass(frozen=True)
class Trial:
    """One micro-batch: its peak memory on the rank with the least room, and the limit there, in bytes."""

    micro_batch: int
    peak_bytes: float
    limit_bytes: float

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.limit_bytes

    def __str__(self) -> str:
        return f"{self.micro_batch} takes {self.peak_bytes / GIB:,.2f} of {self.limit_bytes / GIB:,.2f} GiB"


@dataclass(frozen=True)
class Probe:
    """The result: the micro-batches that were tried, smallest first, and the error of a failed allocation, if any."""

    trials: tuple[Trial, ...]
    failed: str | None = None

    @property
    def largest(self) -> int | None:
        return max((trial.micro_batch for trial in self.trials if trial.fits), default=None)

    def __str__(self) -> str:
        text = "; ".join(str(trial) for trial in self.trials[-2:])
        return text + (f"; the next ran out of memory: {self.failed}" if self.failed else "")


def probe(recipe: Path, world: World, environment: Mapping[str, str]) -> Probe:
    """Measure the micro-batches of the recipe in the file `recipe`. All ranks enter, and get the same result.

    Raises:
        DistftError: the probe failed for a reason other than memory.
    """
    port = broadcast(free_port(), world)
    with tempfile.TemporaryDirectory(prefix="distft-probe-") as name:
        results = Path(name) / "results.jsonl"
        with (Path(name) / "log").open("w+", encoding="utf-8", errors="replace") as log:
            command = [sys.executable, "-m", "distft.training.batch_size_worker", str(results), f"recipe={recipe}"]
            code = _run(command, _environment(environment, port), log, world, f"distft/probe/{port}")
            log.seek(0)
            ended = log.read()[-2000:] if code > 0 else None
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    mine = (lines, ended)
    everywhere = gather(mine, world)
    trials = tuple(Trial(**line) for line in everywhere[0][0] if "peak_bytes" in line)
    failed = next((line["failed"] for found, _ in everywhere for line in found if "failed" in line), None)
    crashed = next((text for found, text in everywhere if text is not None), None)
    if crashed is not None and failed is None:
        raise DistftError(
            f"batching.micro_batch=auto: the search for the largest micro-batch failed; set a number instead. It "
            f"ended with:\n{crashed}"
        )
    return Probe(trials, failed)


def free_port() -> int:
    """Return a TCP port that is free on this machine at the moment."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _environment(environment: Mapping[str, str], port: int) -> dict[str, str]:
    """This process's environment for a second group: another port, and nothing by which the launcher monitors it."""
    kept = {key: value for key, value in environment.items() if not key.startswith("TORCHELASTIC_") and key != OUTCOME}
    return {**kept, "MASTER_PORT": str(port)}


def _run(command: list[str], environment: Mapping[str, str], log: Any, world: World, key: str) -> int:
    """Run this rank's process. Return its exit code, or -1 as soon as another rank's has failed."""
    store = upstream_api.default_store() if world.world_size > 1 else None
    # The process ends when its standard input is closed, and so with this one, however this one ends.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=dict(environment))
    try:
        while child.poll() is None:
            if store is not None and store.check([key]):
                return -1
            time.sleep(0.1)
        if child.returncode and store is not None:
            store.set(key, "failed")
        return child.returncode
    finally:
        child.kill()
        child.wait()
        with contextlib.suppress(BrokenPipeError):
            assert child.stdin is not None
            child.stdin.close()
