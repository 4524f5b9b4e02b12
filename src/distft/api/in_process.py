"""Training in the caller's process, which goes on afterwards: everything global that a run changes is put back."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distft.console import say
from distft.distributed.leftovers import remove_launch
from distft.distributed.signals import STOP, StopRequest, raising_on_signals
from distft.distributed.supervisor import ATTEMPT, IN_PROCESS, NPROC, OUTCOME, PROGRESS, Progress, read_note
from distft.errors import AlreadyFinished, DistftError
from distft.startup import SAFE_PATH


def train_here(words: Sequence[str], restarts: int) -> Path:
    """Train what the command line's `words` ask for, as the only process, and return the run folder.

    As on the command line, the run is started again up to `restarts` times after a failure that a restart may cure:
    with a smaller micro-batch after running out of memory.

    Raises:
        DistftError: the run failed or was stopped.
    """
    with tempfile.TemporaryDirectory(prefix="distft-") as notes, _state_restored(words, Path(notes)):
        for attempt in range(restarts + 1):
            os.environ[ATTEMPT] = str(attempt)
            failure = _attempt(words)
            if failure is None:
                break
            if not failure.restart or attempt == restarts:
                raise failure
            say(str(failure))
            # The frames of its traceback would keep the model in memory.
            failure.__cause__ = failure.__context__ = failure.__traceback__ = None
            _free_memory()
        folder = read_note("folder")
        assert folder is not None
        return Path(folder)


def _attempt(words: Sequence[str]) -> DistftError | None:
    """Train once, and return the error that ended it, if any."""
    from distft.training.run import train

    try:
        train(words)
    except AlreadyFinished as error:
        say(str(error))
    except DistftError as error:
        return error
    return None


@contextmanager
def _state_restored(words: Sequence[str], notes: Path) -> Iterator[None]:
    """Run a block as the only process of a launch that began now, and leave the process as it was."""
    from transformers.utils import logging as transformers_logging

    from distft.upstream_api import own_accelerate_state

    arguments, environment = sys.argv, dict(os.environ)
    progress_bars = transformers_logging.is_progress_bar_enabled()
    remove_launch(os.environ)  # another launcher's, left over
    os.environ |= {SAFE_PATH: "1", OUTCOME: str(notes), NPROC: "1", IN_PROCESS: f"{os.getpid()}-{time.time():.2f}"}
    sys.argv = ["distft.train", *words]  # environment.json records it as the command
    _reset()
    try:
        with own_accelerate_state(), raising_on_signals():
            yield
    finally:
        _reset()
        gc.unfreeze()
        _free_memory()
        sys.argv = arguments
        if progress_bars:
            transformers_logging.enable_progress_bar()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment


def _reset() -> None:
    vars(STOP).update(vars(StopRequest()))
    vars(PROGRESS).update(vars(Progress()))


def _free_memory() -> None:
    """Give back the memory of a model that nobody refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
