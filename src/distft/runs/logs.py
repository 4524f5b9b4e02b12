"""One log per rank in the run folder. Rank 0's output also goes to the console, the other ranks' only to their logs.

Messages of distft itself (`console.say`) reach the console from every rank. A log that cannot be written is abandoned;
it never stops a run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from distft.console import say
from distft.distributed.supervisor import Launch
from distft.distributed.world import World
from distft.runs.folder import RunFolder


@contextmanager
def rank_log(folder: RunFolder, world: World) -> Iterator[None]:
    """Send this rank's output to its log for the duration of a block. A single process has only the console.

    Rank 0's streams are duplicated, so its progress bar still finds a terminal. The other ranks are redirected at their
    file descriptors, which includes native libraries and child processes.
    """
    if world.world_size == 1:
        yield
        return
    try:
        folder.logs.mkdir(exist_ok=True)
        log = _Log(os.open(folder.log(world.rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
    except OSError as error:
        say(f"warning: rank {world.rank} has no log: {folder.log(world.rank)} cannot be written ({error.strerror})")
        yield
        return
    attempt = Launch.of(os.environ).attempt
    log.write(
        f"── {time.strftime('%Y-%m-%d %H:%M:%S%z')}, {socket.gethostname()}, pid {os.getpid()}, attempt {attempt} ──\n"
    )
    streams = sys.stdout, sys.stderr
    kept = [] if world.is_main else _redirect(log.descriptor)
    console = os.fdopen(os.dup(kept[1]), "w", encoding="utf-8", errors="replace") if kept else None
    sys.stdout, sys.stderr = (cast(TextIO, _Stream(stream, log, console, world.is_main)) for stream in streams)
    try:
        yield
    except BaseException:
        log.write(traceback.format_exc())  # the console gets only the message
        raise
    finally:
        sys.stdout, sys.stderr = streams
        _restore(kept)
        if console is not None:
            console.close()
        log.close()


def _redirect(descriptor: int) -> list[int]:
    """Point stdout and stderr at `descriptor`. Returns copies of the previous descriptors."""
    _flush()
    kept = [os.dup(1), os.dup(2)]
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    return kept


def _restore(kept: list[int]) -> None:
    if kept:
        _flush()
    for target, copy in enumerate(kept, start=1):
        os.dup2(copy, target)
        os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the disk of the log is full
            stream.flush()


class _Log:
    """An unbuffered file, so that a kill loses nothing. It is abandoned at the first failed write."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.closed, self._failed = descriptor, False, False

    def write(self, text: str) -> None:
        if self.closed or self._failed:
            return
        try:
            os.write(self.descriptor, text.encode(errors="replace"))
        except OSError as error:
            self._failed = True  # set first: the warning is written here too
            say(f"warning: a rank's log cannot be written ({error.strerror}) and ends here")

    def close(self) -> None:
        self.closed = True
        os.close(self.descriptor)


class _Stream:
    """stdout or stderr of a rank that has a log. Otherwise it behaves like `original`, also after the log is closed,
    because loggers keep a reference.

    `original` is the stream that it replaces, which does not write to the log. `console` is where `console.say` prints
    as well; None if the stream is the console.
    """

    def __init__(self, original: TextIO, log: _Log, console: TextIO | None, doubled: bool) -> None:
        self.original, self._log, self.console, self._doubled = original, log, console, doubled

    def write(self, text: str) -> int:
        if not text.startswith("\r"):  # a progress bar that redraws itself
            self._log.write(text)
        return self.original.write(text) if self._doubled or self._log.closed else len(text)

    def flush(self) -> None:
        if self._doubled or self._log.closed:
            self.original.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)
