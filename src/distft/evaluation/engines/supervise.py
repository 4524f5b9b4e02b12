"""python -m distft.evaluation.engines.supervise COMMAND …: run COMMAND, and end its process group when stdin closes.

The parent holds the other end of standard input, so the server ends with the parent even if the parent is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

_POLL_S = 0.2
GRACE_S = 20.0
"""Seconds that COMMAND has to end after SIGTERM."""


def main() -> int:
    """Entry; the exit code is COMMAND's, or 128 + N if signal N ended it."""
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    while server.poll() is None:
        readable, _, _ = select.select([0], [], [], _POLL_S)
        if readable and not os.read(0, 4096):
            _signal_group(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_S)
            break
    _signal_group(server.pid, signal.SIGKILL)  # processes that the server left behind
    code = server.wait()
    return code if code >= 0 else 128 - code


def _signal_group(leader: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signum)


if __name__ == "__main__":
    sys.exit(main())
