"""How a process ends: one message, an exit code, and what the program that started it is told.

0 finished; 75 interrupted; 2 the user's mistake; 1 the rest.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from distft.errors import DistftError, Interrupted, UserError
from distft.world import World, say_once

OUTCOME = "DISTFT_OUTCOME"
"""Environment variable: file in which a worker leaves its exit code for `distft train`, which an elastic launcher would lose."""
DEBUG = "DISTFT_DEBUG"


@dataclass
class StopRequest:
    """A signal to this process. While `deferred` (training does it), the first one is kept in `signum` for the end of a
    step, and only the next one ends the process at once."""

    deferred: bool = False
    signum: int | None = None


STOP = StopRequest()  # one a process, as signals are


def guarded(work: Callable[[], None]) -> int:
    """Run `work`; what it raises becomes a message on stderr (once a node, not once a rank) and an exit code."""
    world = World.from_environment(os.environ)
    _raise_on_signals()
    try:
        work()
        _leave_group()
        return 0
    except BrokenPipeError:  # `distft recipes show … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except DistftError as error:
        code, message = error.exit_code, str(error)
        if os.environ.get(DEBUG):
            traceback.print_exc()
    except Exception as error:  # not foreseen: the traceback is what helps
        traceback.print_exc()
        code, message = 1, f"rank {world.rank} failed: {type(error).__name__}: {error}"
    say_once(message, world, os.environ)
    return _leave(code)


def _leave_group() -> None:
    """Close the process group, which NCCL wants; only after success, since others may be gone after a failure."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _leave(code: int) -> int:
    """The exit code to use under the launcher that there is.

    `distft train` reads the code from a file, and a worker that ends with 0 is not started again. A bare elastic launcher
    with restarts would run into the user's mistake again, so it is told to stop.
    """
    if OUTCOME in os.environ:
        Path(os.environ[OUTCOME]).write_text(str(code), encoding="utf-8")
        return 0 if code in (UserError.exit_code, Interrupted.exit_code) else code
    if code == UserError.exit_code and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(5)  # end by the launcher's own signal, not as one more failed worker
    return code


def _raise_on_signals() -> None:
    def handler(signum: int, frame: FrameType | None) -> None:
        if STOP.deferred and STOP.signum is None:
            STOP.signum = signum
            return
        if STOP.signum == signum != signal.SIGINT:
            return  # launchers repeat themselves; a person who means it presses Ctrl-C again
        signal.signal(signum, signal.SIG_IGN)  # once; what ends the run writes its summary undisturbed
        raise Interrupted(signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, handler)


def debug_flag(arguments: list[str]) -> list[str]:
    """`arguments` without `--debug`, which is remembered for this process and those it starts."""
    if "--debug" in arguments:
        os.environ[DEBUG] = "1"
    return [argument for argument in arguments if argument != "--debug"]
