"""Signals that stop a run: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal was closed) and SIGUSR1 (a scheduler's
warning before its time limit).

SIGHUP is left alone where it is ignored already, as under nohup."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from distft.console import say
from distft.distributed.supervisor import IN_PROCESS, OUTCOME
from distft.errors import Interrupted

Handler = Callable[[int, FrameType | None], None]
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_ENDING_SESSION = frozenset({signal.SIGTERM, signal.SIGHUP})
"""Signals of which a system sends both when a user's session ends, so that the second is no further request."""
HANDLER_TIMEOUT_S = 10.0
"""How long the main thread may take to run its signal handler before the process is ended. Not applied in training."""


@dataclass
class StopRequest:
    """A signal to this process.

    While `deferred`, the first signal is kept in `signum` until all ranks can stop together: between two parts of the
    work or, while `training`, after a step. A second Ctrl-C, or a different signal, ends the process at once.
    """

    deferred: bool = False
    training: bool = False
    signum: int | None = None


STOP = StopRequest()  # one per process, like signal handlers


def announce(signum: int) -> None:
    """Say at once what a signal does, because a step may take minutes. On rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        again = "; press Ctrl-C again to abort" if signum == signal.SIGINT else ""
        with suppress(RuntimeError):  # the signal came in the middle of a write to the same stream
            say(f"{signal.Signals(signum).name}: stopping after this step{again}")


def _handler(handled: threading.Event) -> Handler:
    def handle(signum: int, frame: FrameType | None) -> None:
        handled.set()
        if STOP.deferred and STOP.signum is None:
            STOP.signum = signum
            if OUTCOME not in os.environ or IN_PROCESS in os.environ:  # otherwise `distft train` has said so
                announce(signum)
            return
        alike = _ENDING_SESSION if signum in _ENDING_SESSION else {signum}
        if STOP.signum in alike and signum != signal.SIGINT:
            return  # launchers repeat their signals; a user who wants to stop at once presses Ctrl-C again
        for each in alike:
            signal.signal(each, signal.SIG_IGN)  # raise once; the run then writes its summary undisturbed
        raise Interrupted(signal.Signals(STOP.signum or signum).name)

    return handle


@contextmanager
def handling(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Handle signals for the duration of a block. Only the main thread can; in another one this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.signal(signum, handlers[signum]) for signum in _not_ignored(handlers)}
    try:
        yield
    finally:
        for signum, before in previous.items():
            if before is not None:  # None: a handler that Python did not install and cannot restore
                signal.signal(signum, before)


def _not_ignored(signums: Iterable[int]) -> list[int]:
    return [each for each in signums if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]


def raising_on_signals() -> AbstractContextManager[None]:
    """Do what `raise_on_signals` does for the duration of a block, without ever ending the process."""
    return handling(dict.fromkeys(STOPPING, _handler(threading.Event())))


def raise_on_signals(exit_code: Callable[[int], int]) -> None:
    """Raise Interrupted in the main thread on a signal, or note it in `STOP` if that is deferred.

    `exit_code` maps Interrupted's exit code to the one for this process's launcher; it is called if the main thread
    does not respond and the process has to be ended from another thread.
    """
    handled = threading.Event()
    handler = _handler(handled)

    def watch() -> None:
        """End the process if its main thread does not run the handler.

        Python runs handlers between two bytecodes of the main thread, which may be stuck in torch, waiting for ranks
        that never arrive. The wake-up file descriptor reports the signal nevertheless.
        """
        while number := os.read(reading, 1):
            if number[0] in STOPPING and not STOP.training and not handled.wait(HANDLER_TIMEOUT_S):
                if STOP.training:
                    continue
                error = Interrupted(signal.Signals(number[0]).name)
                say(str(error))
                os._exit(exit_code(error.exit_code))

    for signum in _not_ignored(STOPPING):
        signal.signal(signum, handler)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) and None)  # a child's signals are its own
    threading.Thread(target=watch, name="distft-signals", daemon=True).start()
