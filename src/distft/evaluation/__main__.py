"""python -m distft.evaluation RUN key.path=value …: one of the processes that `distft evaluate` starts."""

from __future__ import annotations

import sys

from distft.startup import start_up


def main() -> int:
    """Entry of `python -m distft.evaluation`."""
    start_up()
    from distft.console import quiet_libraries
    from distft.distributed.process import debug_flag, guarded
    from distft.errors import Interrupted

    arguments = debug_flag(sys.argv[1:])
    quiet_libraries()
    from distft.evaluation.run import evaluate

    def work() -> None:
        try:
            evaluate(arguments)
        except Interrupted as error:
            raise Interrupted(error.by, "(finished items are kept; run the same command to continue)") from error

    return guarded(work, of_launcher=True)


if __name__ == "__main__":
    sys.exit(main())
