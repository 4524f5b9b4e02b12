"""Everything distft raises on purpose.

DistftError                 exit code 1: the run failed, and the message says why
├── UserError               exit code 2: something to mend in the command, recipe, data or machine
│   ├── RecipeError         faults in a recipe or its overrides, all of them at once
│   │   └── ExperimentError in an experiment, or in the recipes of its runs
│   ├── DataError           the data cannot be used as asked
│   ├── ModelError          the base model cannot be had, or does not fit the recipe
│   ├── JudgeError          the judge of an evaluation cannot be had or asked
│   ├── LaunchError         the processes, devices or launcher flags do not fit the recipe
│   ├── RunFolderError      the run folder is in use or unreadable
│   ├── StorageError        the disk is full
│   ├── MissingExtraError   a package is not installed that only a part of distft needs
│   └── UpstreamError       an installed library lacks a private name that distft relies on
├── InvariantError          an assertion about a distributed run did not hold
├── BadNumbersError         a loss or a gradient norm is NaN or infinite
├── OutOfMemory             a device's memory does not hold what the recipe asks of it
├── RankLost                a process of the run died or hangs; a restart goes on from the last checkpoint
├── WorkerError         any other exception, in a process that reports to the one that started it
├── Interrupted             exit code 75: a signal or run.max_time ended the run
└── AlreadyFinished         exit code 0: the run had finished before it was started again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class DistftError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the process ends with, and `restart` says whether the
    same run may go on after its processes were started again; `facts` is what faults.jsonl keeps besides the
    message."""

    exit_code = 1
    restart = False
    facts: Mapping[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the message and the attributes: ranks exchange errors, and constructors take other arguments."""
        return _rebuild, (type(self), self.args, vars(self))


def _rebuild(kind: type[DistftError], args: tuple[Any, ...], attributes: Mapping[str, Any]) -> DistftError:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class UserError(DistftError):
    """A mistake that the user can mend; shown as one short message without a traceback."""

    exit_code = 2


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a recipe.

    `where` is the file or `command line`, `key` the dotted key path, `problem` what is wrong and what was expected,
    `hint` the nearest valid name or the remedy (may be empty).
    """

    where: str
    key: str
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: {self.key}" if self.key else self.where
        return f"{place}: {self.problem}" + (f" ({self.hint})" if self.hint else "")


class RecipeError(UserError):
    """All faults of a recipe, gathered before anything is loaded."""

    what = "recipe"

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        head = f"the {self.what} has " + ("a fault" if len(faults) == 1 else f"{len(faults)} faults")
        super().__init__(head + ":\n" + "\n".join(f"  {fault}" for fault in faults))


class ExperimentError(RecipeError):
    """All faults of an experiment and of the recipes that its runs resolve to."""

    what = "experiment"


class DataError(UserError):
    """The data is missing, empty, has other columns than its format says, or lost all its rows."""


class ModelError(UserError):
    """The base model cannot be loaded here, or lacks what the recipe asks of it."""


class JudgeError(UserError):
    """The model that judges answers cannot be loaded or reached, refuses, or does not answer as a server of its
    kind."""


class LaunchError(UserError):
    """The launcher, the number of processes or the devices do not fit the recipe."""


class RunFolderError(UserError):
    """The run folder exists already, or cannot be read."""


class StorageError(UserError):
    """What must be kept cannot be written: the disk is full, or a quota or a limit on file sizes is reached."""


class MissingExtraError(UserError):
    """Something needs a package that comes with an extra of distft."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f"{what} need {package}, which is not installed: pip install 'distft[{extra}]', or {package} itself"
        )


class UpstreamError(UserError):
    """An installed library has lost or changed a private name that distft relies on."""


class InvariantError(DistftError):
    """Something that must hold in every correct distributed run did not; the message explains what and why."""


class BadNumbersError(DistftError):
    """A loss or a gradient norm is NaN or infinite; the message names the step and the samples."""

    def __init__(self, message: str, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        super().__init__(message)


class OutOfMemory(DistftError):
    """An allocation failed. Smaller micro-batches may mend it, at the next start of the processes; `restart` is false
    where all ranks know that nothing will."""

    def __init__(self, message: str, facts: Mapping[str, Any], *, restart: bool) -> None:
        self.facts, self.restart = facts, restart
        super().__init__(message)


class RankLost(DistftError):
    """A process of the run was killed, failed or makes no progress, so that the others cannot go on without it."""

    restart = True

    def __init__(self, rank: int | None, message: str) -> None:
        self.rank = rank
        super().__init__(message)


class WorkerError(DistftError):
    """A process of the run failed with an exception that is none of these; its traceback is on stderr."""

    restart = True


class Interrupted(DistftError):
    """A signal (SIGTERM, SIGINT, SIGUSR1) or run.max_time ended the run before it had finished."""

    exit_code = 75

    def __init__(self, by: str, how: str = "") -> None:
        self.by = by
        super().__init__(f"stopped by {by} {how}".rstrip())


class AlreadyFinished(DistftError):
    """A launcher started the processes of a run again after its last file was written."""

    exit_code = 0
