"""What distft prints for the person who watches."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Print one line on stderr; where `distft.runs.logs` redirects stderr to a file, on the console as well."""
    for stream in (sys.stderr, getattr(sys.stderr, "console", None)):
        if stream is not None:
            print(f"distft: {message}", file=stream, flush=True)
