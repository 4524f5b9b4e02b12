"""How a process ends: one message, an exit code, and what the program that started it is told.

0 finished; 75 interrupted; 2 the user's mistake; 1 the rest.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import psutil

from distft.console import say
from distft.distributed.world import OUTCOME, STOP, Launch, World
from distft.errors import DistftError, Interrupted

DEBUG = "DISTFT_DEBUG"


def guarded(work: Callable[[], None]) -> int:
    """Run `work`; what it raises becomes a message on stderr (once a node, not once a rank) and an exit code."""
    world = World.from_environment(os.environ)
    _raise_on_signals()
    restart = False
    try:
        if told("stop") is not None:
            raise Interrupted("a signal", "before it was started again")
        work()
        _leave_group()
        return _leave(0)
    except BrokenPipeError:  # `distft recipes show … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except DistftError as error:
        code, message, restart = error.exit_code, str(error), error.restart
        if os.environ.get(DEBUG):
            traceback.print_exc()
    except Exception as error:  # not foreseen: the traceback is what helps
        traceback.print_exc()
        code, message, restart = 1, f"rank {world.rank} failed: {type(error).__name__}: {error}", True
    say_once(message, world, os.environ)
    return _leave(code, restart=restart)


def say_once(message: str, world: World, environment: Mapping[str, str]) -> None:
    """The same message from several processes of one node stands on stderr once.

    The processes of one launch on a node share their parent; the first to make the file speaks. Where the
    world is one process it always speaks. The files go with the folder of `distft train`; those of other launchers are
    removed once the launcher is gone.
    """
    if world.world_size == 1:
        say(message)
        return
    launch = Launch.of(environment)
    digest = hashlib.sha256(message.encode()).hexdigest()[:8]
    folder = Path(environment.get(OUTCOME) or tempfile.gettempdir())
    for other in folder.glob(f"distft-{os.getuid()}-*.said"):
        launcher = int(other.name.split("-")[2])
        if launcher != os.getppid() and not psutil.pid_exists(launcher):
            other.unlink(missing_ok=True)
    key = f"distft-{os.getuid()}-{launch.launcher}-{launch.attempt}-{digest}.said"
    try:
        os.close(os.open(folder / key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return
    say(message)


def _leave_group() -> None:
    """Close the process group, which NCCL wants; only after success, since others may be gone after a failure."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def tell(what: str, text: str) -> None:
    """Leave `text` under the name `what` for `distft train`, where it started this process."""
    if OUTCOME in os.environ:
        (Path(os.environ[OUTCOME]) / what).write_text(text, encoding="utf-8")


def told(what: str, folder: Path | None = None) -> str | None:
    """What stands under the name `what` in the folder that `distft train` shares with its workers; None for nothing."""
    place = folder or Path(os.environ.get(OUTCOME, os.devnull))
    return (place / what).read_text(encoding="utf-8") if (place / what).is_file() else None


def _leave(code: int, *, restart: bool = False) -> int:
    """The exit code to use under the launcher that there is. `restart`: starting the processes again may help.

    `distft train` is told the code, and a worker that ends with 0 is not started again. Under a bare elastic launcher an
    interrupted run ends with 0 for the same reason; a mistake or a broken invariant would only come again, so the launcher
    is told to stop.
    """
    tell("exit-code", str(code))
    if OUTCOME in os.environ:
        return code if restart else 0
    if code == Interrupted.exit_code and "TORCHELASTIC_RUN_ID" in os.environ:
        return 0
    if code and not restart and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        time.sleep(1)  # the other ranks are about to come to the same end, and to say the same
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(5)  # end by the launcher's own signal, not as one more failed worker
    return code


HEARD_S = 10.0
"""How long a process that does not train yet may take to hear a signal before it is ended without its say."""


def _raise_on_signals() -> None:
    heard = threading.Event()

    def handler(signum: int, frame: FrameType | None) -> None:
        heard.set()
        if STOP.deferred and STOP.signum is None:
            STOP.signum = signum
            return
        if STOP.signum == signum != signal.SIGINT:
            return  # launchers repeat themselves; a person who means it presses Ctrl-C again
        signal.signal(signum, signal.SIG_IGN)  # once; what ends the run writes its summary undisturbed
        raise Interrupted(signal.Signals(STOP.signum or signum).name)

    def hear() -> None:
        """Python runs a handler between two steps of the main thread, which may be stuck in torch, waiting for ranks that never
        come; the kernel's signal is seen here all the same."""
        while number := os.read(reading, 1):
            if number[0] in signums and not STOP.training and not heard.wait(HEARD_S) and not STOP.training:
                error = Interrupted(signal.Signals(number[0]).name)
                say(str(error))
                os._exit(_leave(error.exit_code))

    signums = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    for signum in signums:
        signal.signal(signum, handler)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) and None)  # a child's signals are its own
    threading.Thread(target=hear, name="distft-signals", daemon=True).start()


def end_with_parent() -> None:
    """End this process with the one that started it and holds the other end of its standard input, however that ends."""

    def wait() -> None:
        # Not sys.stdin.read(): a thread that holds its lock while the interpreter shuts down aborts the process.
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def debug_flag(arguments: list[str]) -> list[str]:
    """`arguments` without `--debug`, which is remembered for this process and those it starts."""
    if "--debug" in arguments:
        os.environ[DEBUG] = "1"
    return [argument for argument in arguments if argument != "--debug"]
