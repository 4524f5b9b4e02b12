"""Printing a child's output to sys.stdout and sys.stderr, which in a notebook are not the descriptors 1 and 2."""

from __future__ import annotations

import codecs
import os
import selectors
import subprocess
import sys
from typing import Any, TextIO

_CHUNK = 65_536
_POLL_S = 0.2


def pipe() -> int | None:
    """Popen's `stdout` and `stderr`: a pipe if sys.stdout or sys.stderr is not the process's own, else None."""
    own = _descriptor(sys.stdout) == 1 and _descriptor(sys.stderr) == 2
    return None if own else subprocess.PIPE


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):  # a notebook's stream may have none
        return None


def wait(child: subprocess.Popen[Any]) -> int:
    """Return the exit code of `child`. Until it ends, copy its pipes to sys.stdout and sys.stderr, if it has any.

    A grandchild may keep a pipe open, so this does not wait for the end of the pipes.
    """
    with selectors.DefaultSelector() as selector:
        for pipe, stream in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            if pipe is not None:
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                selector.register(pipe, selectors.EVENT_READ, (decoder, stream))
        while selector.get_map():
            ended = child.poll() is not None
            ready = selector.select(0 if ended else _POLL_S)
            if ended and not ready:
                break
            for key, _ in ready:
                chunk = os.read(key.fd, _CHUNK)
                decoder, stream = key.data
                stream.write(decoder.decode(chunk, final=not chunk))
                stream.flush()
                if not chunk:
                    selector.unregister(key.fileobj)
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()
    return child.wait()
