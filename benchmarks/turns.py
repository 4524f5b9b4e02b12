"""Runs that live side by side on one device and compute in turns, so that what is compared is measured A B A B … and
each pays for its start only once.

A run asks for each of its turns with a file in a folder that it shares with the program that started it, waits until
that gives it, and writes down what the turn took. Between its turns, it holds its weights and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

_PAUSE_S = 0.005


class Turns:
    """The turns of one process of a run, in the `folder` of the run."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._rank, self._number = folder, int(os.environ.get("LOCAL_RANK", "0")), 0

    @contextmanager
    def turn(self, kind: str) -> Iterator[dict[str, Any]]:
        """Measure the block, once it is this run's turn; what it writes into the dictionary is recorded as well."""
        number, self._number = self._number, self._number + 1
        found: dict[str, Any] = {"kind": kind}
        _write(self._folder / f"ready-{number}-{self._rank}.json", found)
        while not (self._folder / f"go-{number}").exists():
            time.sleep(_PAUSE_S)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield found
        if on_gpu:
            torch.cuda.synchronize()
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["seconds"] = time.perf_counter() - start
        if on_gpu:
            torch.cuda.empty_cache()  # leave the memory to the others
        _write(self._folder / f"done-{number}-{self._rank}.json", found)


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Every epoch of a trainer is a turn."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._open = turns, None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open = self._turns.turn("epoch")
        self._found, self._from = self._open.__enter__(), state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._found["steps"] = state.global_step - self._from
        self._open.__exit__(None, None, None)


class Side:
    """A run that computes in turns, seen from the program that starts it. `processes` ranks."""

    def __init__(
        self, name: str, command: Sequence[str], processes: int, work: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.name, self._processes, self._number = name, processes, 0
        self._folder, self._log = work / f"turns-{name}", work / f"{name}.log"
        self._folder.mkdir()
        with self._log.open("w") as log:
            self._child = subprocess.Popen(
                [*command, str(self._folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )

    def ready(self, limit_s: float) -> str | None:
        """The kind of its next turn, once it asks for one; None if it has ended, or takes longer."""
        found = self._wait("ready", limit_s)
        return None if found is None else str(found[0]["kind"])

    def take(self, limit_s: float) -> dict[str, Any] | None:
        """Let it compute. Returns what its turn took: of seconds and memory, those of the worst rank."""
        (self._folder / f"go-{self._number}").touch()
        found = self._wait("done", limit_s)
        self._number += 1
        if found is None:
            return None
        worst = {key: max(each[key] for each in found) for key in ("seconds", "peak_memory_gib") if key in found[0]}
        return {**found[0], **worst}

    def end(self, grace_s: float = 0.0) -> list[str]:
        """End its processes, unless they end by themselves, and return what it printed last, and of errors."""
        until = time.monotonic() + grace_s
        while self._child.poll() is None and time.monotonic() < until:
            time.sleep(_PAUSE_S)
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [*(line for line in lines[:-5] if "Error" in line or "distft: " in line), *lines[-5:]][-25:]

    def _wait(self, what: str, limit_s: float) -> list[dict[str, Any]] | None:
        places = [self._folder / f"{what}-{self._number}-{rank}.json" for rank in range(self._processes)]
        until = time.monotonic() + limit_s
        while not all(place.exists() for place in places):
            if self._child.poll() is not None or time.monotonic() > until:
                return None
            time.sleep(_PAUSE_S)
        return [json.loads(place.read_text(encoding="utf-8")) for place in places]


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)
