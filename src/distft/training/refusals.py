"""Settings that an installed library refuses before the first step, where no check of distft's foresaw it."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distft.distributed.supervisor import PROGRESS
from distft.errors import SettingsError
from distft.paths import PACKAGE

_REFUSALS = (AssertionError, ImportError, NotImplementedError, TypeError, ValueError)
"""What libraries raise about their arguments. Other exceptions may come from the machine, where a restart helps."""
_LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))


@contextmanager
def refusals() -> Iterator[None]:
    """Raise SettingsError instead of a library's refusal. Not once training has begun: then the data may be the cause.

    Raises:
        SettingsError: a library has refused what the recipe asks of it.
    """
    try:
        yield
    except _REFUSALS as error:
        library = None if PROGRESS.began else _raised_by(error)
        if library is None:
            raise
        raise SettingsError(
            f"{library} refuses what the recipe asks for: {type(error).__name__}: {error}\n  --debug shows where"
        ) from error


def _raised_by(error: BaseException) -> str | None:
    """The installed library that raised `error`, itself or through the standard library; None for distft."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            return None
        for folder in _LIBRARIES:
            if path.is_relative_to(folder):
                return path.relative_to(folder).parts[0].removesuffix(".py")
    return None
