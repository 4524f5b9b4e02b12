"""Find the largest micro-batch that fits, before the run, in processes of `distft.training.batch_size_worker`: running
out of memory then breaks nothing but the probe."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from distft.distributed.collectives import gather
from distft.distributed.world import World
from distft.errors import DistftError
from distft.hardware import GIB
from distft.training.beside import run_beside


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


def probe(recipe: Path, world: World) -> Probe:
    """Measure the micro-batches of the recipe in the file `recipe`. All ranks enter, and get the same result.

    Raises:
        DistftError: the probe failed for a reason other than memory.
    """
    with tempfile.TemporaryDirectory(prefix="distft-probe-") as name:
        results = Path(name) / "results.jsonl"
        ended = run_beside("distft.training.batch_size_worker", [str(results), f"recipe={recipe}"], world)
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    everywhere = gather(lines, world)
    trials = tuple(Trial(**line) for line in everywhere[0] if "peak_bytes" in line)
    failed = next((line["failed"] for found in everywhere for line in found if "failed" in line), None)
    crashed = next((each.output for each in ended if each.code is not None and each.code > 0), None)
    if crashed is not None and failed is None:
        raise DistftError(
            f"batching.micro_batch=auto: the search for the largest micro-batch failed; set a number instead. It "
            f"ended with:\n{crashed}"
        )
    return Probe(trials, failed)
