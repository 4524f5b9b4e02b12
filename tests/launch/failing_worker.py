"""A worker that fails on rank 0, while the other ranks wait for it: python -m tests.launch.failing_worker HOW.

The ranks of several nodes meet first, as in training.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from distft.distributed.collectives import together
from distft.distributed.process import guarded
from distft.distributed.supervisor import ATTEMPT, PROGRESS, check_not_refused
from distft.distributed.world import World
from distft.errors import DataError


def work() -> None:
    how, attempt = sys.argv[1], os.environ[ATTEMPT]
    world = World.from_environment(os.environ)
    if world.local_world_size < world.world_size:
        together(world, check_not_refused)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(120)
    with Path("attempts").open("a") as file:
        file.write(attempt)
    if how == "mistake":
        raise DataError("no such column")
    PROGRESS.step = 7 if how == "same" else int(attempt)
    raise KeyError("lm_head")


if __name__ == "__main__":
    sys.exit(guarded(work, of_launcher=True))
