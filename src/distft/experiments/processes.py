"""Running `distft train` and `distft evaluate` for an experiment: each in a process of its own, its output in a log."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from distft.distributed.signals import STOPPING, handling

Wait = Callable[["subprocess.Popen[Any]"], int]


@dataclass(frozen=True)
class Ended:
    """The exit code of a process, and the name of the signal that stopped this one meanwhile."""

    code: int
    stopped_by: str | None


def run_command(words: Sequence[str], log: Path, wait: Wait | None = None) -> Ended:
    """Run `distft` with `words` and write what it prints to `log`.

    Signals are passed on to it, because it knows how to stop. `wait` waits for its end; by default nothing is shown.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "distft.cli", *words]
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        with _passed_on(child) as signums:
            code = child.wait() if wait is None else wait(child)
    return Ended(code, signal.Signals(signums[0]).name if signums else None)


@contextlib.contextmanager
def _passed_on(child: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Pass signals on to `child` for the duration of a block, and collect them."""
    received: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signum)

    with handling(dict.fromkeys(STOPPING, pass_on)):
        yield received
