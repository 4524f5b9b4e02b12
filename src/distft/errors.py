"""Everything distft raises on purpose.

DistftError                 exit code 1: the run failed, and the message says why
├── UserError               exit code 2: something to fix in the command, recipe, data or machine
│   ├── RecipeError         all faults of a recipe and its overrides
│   │   └── ExperimentError all faults of an experiment and of the recipes of its runs
│   ├── DataError           the data does not fit the recipe
│   ├── ModelError          the base model is unavailable, or does not fit the recipe
│   ├── SettingsError       an installed library refuses the recipe's settings
│   ├── JudgeError          the judge of an evaluation is unavailable or does not answer
│   ├── LaunchError         the processes, devices or launcher flags do not fit the recipe
│   ├── RunFolderError      the run folder is in use or unreadable
│   ├── StorageError        a file cannot be written: the disk is full, or there is no permission
│   ├── MissingExtraError   an optional package is not installed
│   └── UpstreamError       an installed library lacks a private name that distft relies on
├── InvariantError          a condition that holds in every correct distributed run is violated
├── BadNumbersError         a loss or a gradient norm is NaN or infinite
├── OutOfMemory             a device has too little memory for the recipe
├── RankLost                a process of the run died or hung; a restart resumes from the last checkpoint
├── WorkerError             any other exception, in a process that reports to the one that started it
├── Interrupted             exit code 75: a signal or run.max_time ended the run
└── AlreadyFinished         exit code 0: the run had finished before it was restarted
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.text import redacted


class DistftError(Exception):
    """Base of all errors raised on purpose.

    `exit_code` is that of the process. `restart` says whether restarting the processes may help. `facts` are recorded
    in faults.jsonl along with the message.
    """

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
    """A mistake that the user can fix; shown as one short message without a traceback."""

    exit_code = 2


_LONGEST = 1_600
"""Characters of a fault in a message: a value may be a whole file by mistake."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a recipe.

    `where` is the file or `command line`, `key` the dotted key, `problem` what is wrong and what was expected, and
    `hint` the nearest valid name or the remedy, if there is one.
    """

    where: str
    key: str
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: {self.key}" if self.key else self.where
        text = redacted(f"{place}: {self.problem}" + (f" ({self.hint})" if self.hint else ""))
        cut = len(text) - _LONGEST
        return text if cut <= 0 else f"{text[: _LONGEST // 2]}… [{cut:,} characters] …{text[-_LONGEST // 2 :]}"


class RecipeError(UserError):
    """All faults of a recipe, collected before anything is loaded."""

    what = "recipe"

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        head = f"the {self.what} has " + ("a fault" if len(faults) == 1 else f"{len(faults)} faults")
        super().__init__(head + ":\n" + "\n".join(f"  {fault}" for fault in faults))


class ExperimentError(RecipeError):
    """All faults of an experiment and of the recipes that its runs resolve to."""

    what = "experiment"


class DataError(UserError):
    """The data is missing or empty, lacks the columns of its format, or has no usable rows."""


class ModelError(UserError):
    """The base model cannot be loaded, or lacks something that the recipe needs."""


class SettingsError(UserError):
    """A library refuses the recipe's settings before the first step, where no check of distft's foresaw it."""


class JudgeError(UserError):
    """The judge model cannot be loaded or reached, refuses the request, or does not follow the API."""


class LaunchError(UserError):
    """The launcher, the number of processes or the devices do not fit the recipe."""


class RunFolderError(UserError):
    """The run folder already exists, is in use, or cannot be read."""


class StorageError(UserError):
    """A required file cannot be written: the disk is full, a quota or file-size limit is reached, or the user has no
    permission or no home folder."""


class MissingExtraError(UserError):
    """A feature needs a package from one of distft's extras."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f"{what} need {package}, which is not installed: pip install 'distft[{extra}]', or {package} itself"
        )


class UpstreamError(UserError):
    """An installed library has lost or changed a private name that distft relies on."""


class InvariantError(DistftError):
    """A condition that holds in every correct distributed run is violated; the message says which, and why."""


class BadNumbersError(DistftError):
    """A loss or a gradient norm is NaN or infinite; the message names the step and the samples."""

    def __init__(self, message: str, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        super().__init__(message)


class OutOfMemory(DistftError):
    """An allocation failed. A restart with smaller micro-batches may help; `restart` is False if all ranks know that
    it will not."""

    def __init__(self, message: str, facts: Mapping[str, Any], *, restart: bool) -> None:
        self.facts, self.restart = facts, restart
        super().__init__(message)


class RankLost(DistftError):
    """A process of the run was killed, failed or stopped making progress, and the others cannot continue without it."""

    restart = True

    def __init__(self, rank: int | None, message: str) -> None:
        self.rank = rank
        super().__init__(message)


class WorkerError(DistftError):
    """A process of the run failed with an exception other than these; its traceback is on stderr."""

    restart = True


class RepeatedFailure(DistftError):
    """Two attempts ended with the same exception after the same step, so the run is not started a third time."""


class Interrupted(DistftError):
    """A signal (SIGTERM, SIGINT, SIGHUP, SIGUSR1) or run.max_time ended the run before it finished."""

    exit_code = 75

    def __init__(self, by: str, how: str = "") -> None:
        self.by = by
        super().__init__(f"stopped by {by} {how}".rstrip())


class AlreadyFinished(DistftError):
    """A launcher restarted the processes of a run that had already written its last file."""

    exit_code = 0
