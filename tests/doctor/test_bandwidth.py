"""The processes that measure collectives: what is reported of one that hangs or is killed."""

from __future__ import annotations

import contextlib
import re
import signal
import threading

import psutil

from distft.doctor.bandwidth import Bandwidth, measure


def measuring() -> list[psutil.Process]:
    """The measuring processes that this one started."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # children of other tests may have ended without being waited for
            if "distft.doctor.bandwidth" in child.cmdline():
                found.append(child)
    return found


def disturb(signum: int, limit_s: float) -> Bandwidth:
    """Measure, and send rank 1 a signal as soon as it exists."""
    results: list[Bandwidth] = []
    thread = threading.Thread(target=lambda: results.append(measure(0, limit_s)))
    thread.start()
    while len(measuring()) < 2 and thread.is_alive():
        thread.join(0.01)
    next(child for child in measuring() if child.cmdline()[-3:-2] == ["2"] and child.cmdline()[-4] == "1").send_signal(
        signum
    )
    thread.join()
    assert measuring() == []
    return results[0]


BEFORE_THE_COLLECTIVES = "start of Python|import of torch|start of the process group"
"""Where a signal can meet a process that has just been started. The machine's load decides which it is."""


def test_a_hang_is_terminated_and_reported() -> None:
    ended = disturb(signal.SIGSTOP, 8.0)
    assert ended.hung
    assert ended.failed is not None
    assert ended.failed.startswith("not finished after 8 s; rank 0 is in: ")
    assert re.search(f"rank 1 is in: ({BEFORE_THE_COLLECTIVES})$", ended.failed)
    assert ended.all_reduce_gb_per_s is None


def test_a_killed_process_is_reported() -> None:
    ended = disturb(signal.SIGKILL, 120.0)
    assert not ended.hung
    assert ended.failed is not None
    assert re.fullmatch(f"rank 1, in: ({BEFORE_THE_COLLECTIVES}): killed by SIGKILL", ended.failed)
