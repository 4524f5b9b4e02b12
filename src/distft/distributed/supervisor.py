"""What `distft train` and the workers it supervises share: environment variables, a folder of notes, and restarts."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from distft.errors import DistftError, RankLost, RepeatedFailure

NPROC = "DISTFT_NPROC"
"""Environment variable: the number of processes the user asked `distft train` for."""
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
"""Environment variable that torchrun sets: how often the group has been restarted."""
OUTCOME = "DISTFT_OUTCOME"
"""Environment variable: a folder that `distft train` shares with its workers while they run. The workers leave their
exit code there, because an elastic launcher would lose it. A file `stop` in it tells restarted workers to end."""
IN_PROCESS = "DISTFT_IN_PROCESS"
"""Environment variable: `pid-time` of a call of `distft.train` that trains in the calling process. Such a run has no
process of its own to end, and began with the call."""


_REFUSED = "refused"
GIVEN_UP = "given-up"
"""Note with the exit code of a run that must not start again, whatever its launcher does."""


@dataclass
class Progress:
    """How far training has come in this process: whether its first step `began`, and the last complete `step`."""

    began: bool = False
    step: int = 0


PROGRESS = Progress()  # one per process


def leave_note(name: str, text: str) -> None:
    """Leave `text` for `distft train` under `name`; do nothing if another launcher started this process."""
    if OUTCOME in os.environ:
        (Path(os.environ[OUTCOME]) / name).write_text(text, encoding="utf-8")


def read_note(name: str, folder: Path | None = None) -> str | None:
    """Return the note `name` from the shared folder (default: this worker's); None if there is none."""
    path = (folder or Path(os.environ.get(OUTCOME, os.devnull))) / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


def leave_error(error: DistftError) -> None:
    """Leave the error that ended this attempt. A consequence does not replace an earlier error: RankLost, or an error
    that a restart may cure after one that it would not."""
    if OUTCOME not in os.environ:
        return
    attempt = int(os.environ.get(ATTEMPT, "0"))
    path = Path(os.environ[OUTCOME]) / f"error-{attempt}"
    earlier = _read(path) if path.is_file() else None
    if earlier is None or not (isinstance(error, RankLost) or (error.restart and not earlier.restart)):
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        aside.write_bytes(pickle.dumps(error))
        aside.replace(path)


def read_error(folder: Path) -> DistftError | None:
    """Return the error that the workers' last attempt left in `folder`."""
    found = [path for path in folder.glob("error-*") if path.name.removeprefix("error-").isdigit()]
    if not found:
        return None
    return _read(max(found, key=lambda path: int(path.name.removeprefix("error-"))))


def _read(path: Path) -> DistftError:
    error = pickle.loads(path.read_bytes())  # noqa: S301 - written by our own workers into a private folder
    assert isinstance(error, DistftError)
    return error


def repeats(failure: str) -> bool:
    """Note that this attempt ended with `failure`, and return whether the one before did, after the same step.

    False without a launcher, which alone would start the run again.
    """
    attempt = int(os.environ.get(ATTEMPT, "0"))
    text = f"after step {PROGRESS.step}: " + re.sub(r"0x[0-9a-f]+", "0x", failure)  # addresses differ each time
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
    now, before = (_file_for_next(f"failure-{number}-{digest}") for number in (attempt, attempt - 1))
    if now is None or before is None:
        return False
    _leave(now, text)
    return before.is_file()


def refuse_next(failure: str) -> None:
    """Let the next attempt end with `failure` as soon as its ranks have met: for processes of several nodes, whose
    launchers cannot be ended from here."""
    file = _file_for_next(_REFUSED)
    if file is not None:
        _leave(file, failure)


def check_not_refused() -> None:
    """Raises:
    RepeatedFailure: the attempt before has called `refuse_next` on this node.
    """
    file = _file_for_next(_REFUSED)
    if file is not None and file.is_file():
        raise RepeatedFailure(file.read_text(encoding="utf-8"))


def _file_for_next(name: str) -> Path | None:
    """A file for later attempts of this launch on this node; None if no launcher would start one."""
    if OUTCOME in os.environ:
        return Path(os.environ[OUTCOME]) / name
    if ATTEMPT not in os.environ:
        return None
    return marker(Launch.of(os.environ), name)


def _leave(file: Path, text: str) -> None:
    """Write `file`, but not through a link: in the folder for temporary files, anybody may have left one.

    Where it cannot be written, the next attempt knows nothing of this one; the failure itself is still reported.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with suppress(OSError), os.fdopen(os.open(file, flags, 0o600), "w", encoding="utf-8", errors="replace") as opened:
        opened.write(text)


def marker(launch: Launch, name: str) -> Path:
    """A file of a launch, which is removed some time after the launcher has ended (`remove_old_markers`)."""
    return Path(tempfile.gettempdir()) / f"distft-{os.getuid()}-{launch.launcher}-{name}.said"


def remove_old_markers(folder: Path) -> None:
    """Remove the markers in `folder` whose launchers have ended."""
    for other in folder.glob(f"distft-{os.getuid()}-*.said"):
        launcher = int(other.name.split("-")[2])
        if launcher != os.getppid() and not psutil.pid_exists(launcher):
            other.unlink(missing_ok=True)


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    `launcher` identifies the parent process, `attempt` counts the restarts of the group by that launcher, and `began`
    is the Unix time of the first start.
    """

    launcher: str
    attempt: int
    began: float

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch:
        if (call := environment.get(IN_PROCESS)) is not None:
            return cls(call, int(environment.get(ATTEMPT, "0")), float(call.rpartition("-")[2]))
        parent = psutil.Process(os.getppid())
        attempt = environment.get(ATTEMPT)
        began = psutil.Process().create_time() if attempt is None else parent.create_time()
        return cls(launcher_name(parent), int(attempt or 0), began)


def launcher_name(process: psutil.Process) -> str:
    """A name that no other process on this machine has had."""
    return f"{process.pid}-{process.create_time():.2f}"


def end_with_parent() -> None:
    """End this process when its parent, which holds the other end of its standard input, ends for whatever reason."""

    def wait() -> None:
        # Not sys.stdin.read(): a thread that holds its lock during interpreter shutdown aborts the process.
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
