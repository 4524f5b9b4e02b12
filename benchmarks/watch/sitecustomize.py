"""Records the pauses of the garbage collector in every rank; Python imports this at start-up in runs of `pauses.py`."""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path

FREEZE = os.environ.get("PAUSES_FREEZE")
SHORTEST_S = 0.02


def watch() -> None:
    freeze, frozen_at, began = gc.freeze, 0.0, 0.0
    rank = os.getpid()  # not its data loader workers
    file = Path(f"{os.environ['PAUSES_FILE']}{os.environ['RANK']}.jsonl")

    def noted_freeze() -> None:
        nonlocal frozen_at
        if FREEZE == "yes":
            freeze()
        frozen_at = time.perf_counter()

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        now = time.perf_counter()
        if phase == "start":
            began = now
        elif frozen_at and now - began >= SHORTEST_S and os.getpid() == rank:
            pause = {"after_s": began - frozen_at, "generation": info["generation"], "seconds": now - began}
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(pause) + "\n")

    gc.freeze = noted_freeze
    gc.callbacks.append(note)


if FREEZE and "RANK" in os.environ:
    watch()
