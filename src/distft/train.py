"""accelerate launch -m distft.train recipe=ddp_qlora: train as one of the processes that a launcher starts."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from distft.startup import start_up


def main() -> int:
    """Entry point of `python -m distft.train`."""
    start_up()
    from distft.console import quiet_libraries
    from distft.distributed.process import debug_flag, guarded

    arguments = debug_flag(sys.argv[1:])
    quiet_libraries()
    from distft.training.run import train

    return guarded(lambda: train(arguments), of_launcher=True)


class _Callable(ModuleType):
    """Importing this module sets `distft.train`, which is a function for everyone else: call it as one."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        from distft.api.train import train

        return train(*arguments, **keywords)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
