"""python -m distft.data.prefetch: make the windows of a stream ahead of time, in a process of its own.

Standard input has the pickled stream and then the number of a window per line. The process ends when its input does,
and so with the process that started it. It says nothing: a window that it cannot make is made, or refused, by those
that need it.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys

from distft.data.stream import Stream
from distft.data.token_store import end_with_parent
from distft.errors import DistftError


class Prefetch:
    """The process that makes windows of a stream, from the first one that is asked for."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = -1

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_process": None}

    def ask_for(self, number: int) -> None:
        """Have a window made; returns at once. Those before it have been asked for."""
        if number <= self._asked:
            return
        self._asked = number
        with contextlib.suppress(OSError):  # the process has ended: whoever needs the window makes it
            if self._process is None:
                command = [sys.executable, "-m", "distft.data.prefetch"]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
                assert self._process.stdin is not None
                pickle.dump(self._stream, self._process.stdin)
            assert self._process.stdin is not None
            self._process.stdin.write(f"{number}\n".encode())
            self._process.stdin.flush()


def serve() -> None:
    """Do what standard input asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    stream: Stream = pickle.load(sys.stdin.buffer)  # noqa: S301 - of the process that started this one
    for line in sys.stdin.buffer:
        with contextlib.suppress(DistftError, OSError):
            stream.make_ahead(int(line))


if __name__ == "__main__":
    serve()
