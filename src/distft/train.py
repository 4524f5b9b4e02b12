"""accelerate launch -m distft.train recipe=ddp_qlora: train as one of the processes that a launcher starts."""

from __future__ import annotations

import sys

from distft.distributed.process import debug_flag, guarded


def main() -> int:
    """Entry point of `python -m distft.train`."""
    from distft.training.run import train

    arguments = debug_flag(sys.argv[1:])
    return guarded(lambda: train(arguments))


if __name__ == "__main__":
    sys.exit(main())
