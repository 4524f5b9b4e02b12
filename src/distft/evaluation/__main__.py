"""python -m distft.evaluation RUN key.path=value …: one of the processes that `distft evaluate` starts."""

from __future__ import annotations

import sys

from distft.evaluation.tasks import evaluate
from distft.outcome import debug_flag, guarded


def main() -> int:
    """Entry of `python -m distft.evaluation`."""
    arguments = debug_flag(sys.argv[1:])

    def work() -> None:
        evaluate(arguments)

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
