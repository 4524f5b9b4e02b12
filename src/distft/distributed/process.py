"""How a process ends: with one message and an exit code that its launcher understands.

0: finished. 75: interrupted. 2: the user's mistake. 1: any other failure.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from distft.console import DEBUG, say
from distft.distributed.launcher_args import left_over_settings, parent_is_launcher
from distft.distributed.leftovers import check_meeting, remove_empty
from distft.distributed.signals import raise_on_signals
from distft.distributed.supervisor import (
    ATTEMPT,
    GIVEN_UP,
    OUTCOME,
    PROGRESS,
    Launch,
    leave_error,
    leave_note,
    read_note,
    refuse_next,
    remove_old_markers,
    repeats,
)
from distft.distributed.world import World
from distft.errors import DistftError, Interrupted, StorageError, UserError, WorkerError
from distft.paths import NO_HOME

OTHERS_S = 10.0
"""How long a rank that has found a mistake waits for the others to find it."""


def guarded(work: Callable[[], None], *, of_launcher: bool = False) -> int:
    """Run `work` and return an exit code. An exception becomes a message on stderr, once per node, not per rank.

    `of_launcher`: this may be one of the processes that a launcher has started. Otherwise a launcher's variables are
    left over in the environment.
    """
    world = World()
    exit_code = _exit_code if of_launcher else _plain_exit_code
    raise_on_signals(exit_code)
    try:
        if of_launcher:
            remove_empty(os.environ)
            world = World.from_environment(os.environ)
            check_meeting(world.world_size, os.environ)
            if removed := left_over_settings(os.environ):
                say_once(f"ignoring {', '.join(removed)}: the recipe decides", world, os.environ)
        if read_note(GIVEN_UP) is not None:
            return 0
        if read_note("stop") is not None:
            raise Interrupted("a signal", "before it was started again")
        work()
        _leave_group()
        return exit_code(0)
    except BrokenPipeError:  # the reader has closed the pipe: `distft recipes show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except DistftError as error:
        failure = error
        if os.environ.get(DEBUG):
            traceback.print_exc()
    except Exception as error:
        found = _mistake(error)
        if found is None or os.environ.get(DEBUG):
            traceback.print_exc()  # which is what helps if it is unexpected
        failure = found or _unexpected(error, world)
    if isinstance(failure, Interrupted) and read_note(GIVEN_UP) is not None:
        return 0  # the launcher ends this process because of another one, which has said why
    leave_error(failure)
    say_once(str(failure), world, os.environ)
    surprising = isinstance(failure, WorkerError)
    ends = not failure.restart and failure.exit_code in (1, UserError.exit_code)
    if ends and OUTCOME in os.environ and _on_one_node(world):
        leave_note(GIVEN_UP, str(failure.exit_code))
        surprising = surprising or not _others_end(world)
    # The launcher ends ranks that wait for this one if it fails. It then starts all again, which end by the note.
    return exit_code(failure.exit_code, restart=failure.restart or (surprising and OUTCOME in os.environ))


def _mistake(error: Exception) -> UserError | None:
    """What the user can do about an exception that may come from anywhere: a folder without permission, or no home."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        cache = "set HF_HOME, DISTFT_CACHE or HOME" if ".cache" in str(error.filename) else "choose another place"
        return StorageError(f"{error.filename}: {error.strerror}; change its permissions, or {cache}")
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):  # of pathlib, for `~`
        return StorageError(NO_HOME)
    return None


def _others_end(world: World) -> bool:
    """Whether the other ranks, too, come to their end; they do if all have found the same mistake."""
    attempt = os.environ.get(ATTEMPT, "0")
    leave_note(f"ended-{attempt}-{world.rank}", "")
    deadline = time.monotonic() + OTHERS_S
    while any(read_note(f"ended-{attempt}-{rank}") is None for rank in range(world.world_size)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _unexpected(error: Exception, world: World) -> WorkerError:
    """The failure of this process by an exception that nobody foresaw."""
    what = f"{type(error).__name__}: {error}"
    failure = WorkerError(f"rank {world.rank} failed: {what}")
    if repeats(what):
        failure = WorkerError(
            f"{failure}\n  the attempt before ended in the same way, after the same step ({PROGRESS.step}), so the run "
            "is not started again"
        )
        if _on_one_node(world):
            failure.restart = False
        else:
            refuse_next(str(failure))
    return failure


def _on_one_node(world: World) -> bool:
    """Whether all processes read the same notes; the launchers of several nodes must do the same."""
    return world.local_world_size == world.world_size


def say_once(message: str, world: World, environment: Mapping[str, str]) -> None:
    """Print a message that is common to several processes of a node once per node and attempt.

    The processes of one launch on a node share their parent; the first of them to create a marker file prints. A
    single process always prints. The marker files are removed with the folder of `distft train`; those of other
    launchers, once the launcher has ended.
    """
    if world.world_size == 1:
        say(message)
        return
    launch = Launch.of(environment)
    digest = hashlib.sha256(message.encode()).hexdigest()[:8]
    folder = Path(environment.get(OUTCOME) or tempfile.gettempdir())
    remove_old_markers(folder)
    key = f"distft-{os.getuid()}-{launch.launcher}-{launch.attempt}-{digest}.said"
    try:
        os.close(os.open(folder / key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return
    say(message)


def _leave_group() -> None:
    """Destroy the process group, as NCCL requires. Only after success: after a failure other ranks may be gone."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _plain_exit_code(code: int, *, restart: bool = False) -> int:
    return code


def _exit_code(code: int, *, restart: bool = False) -> int:
    """Return the exit code to use under the current launcher. `restart`: restarting the processes may help.

    `distft train` reads the code from a note, and does not restart a worker that ends with 0. For the same reason an
    interrupted run ends with 0 under a bare elastic launcher. A user's mistake or a broken invariant would only
    recur, so the launcher is stopped.
    """
    leave_note("exit-code", str(code))
    if OUTCOME in os.environ:
        return code if restart else 0
    if code == Interrupted.exit_code and "TORCHELASTIC_RUN_ID" in os.environ:
        return 0
    if code and not restart and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and parent_is_launcher():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher is about to send it
        time.sleep(1)  # the other ranks are about to fail in the same way and print the same message
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(5)  # so that the launcher's signal ends this process, not its own failure
    return code


def debug_flag(arguments: list[str]) -> list[str]:
    """Return `arguments` without `--debug`, which is set for this process and those it starts."""
    if "--debug" in arguments:
        os.environ[DEBUG] = "1"
    return [argument for argument in arguments if argument != "--debug"]
