"""What distft prints for the person who watches."""

from __future__ import annotations

import contextlib
import errno
import importlib.abc
import importlib.machinery
import io
import logging
import os
import sys
import warnings
from typing import Any, TextIO

DEBUG = "DISTFT_DEBUG"
"""Environment variable: if set, show every traceback and every warning."""


def say(message: str) -> None:
    """Print one line on stderr; where `distft.runs.logs` redirects stderr to a file, on the console as well."""
    for stream in (sys.stderr, getattr(sys.stderr, "console", None)):
        if stream is not None:
            print(f"distft: {message}", file=stream, flush=True)


def set_up_streams() -> None:
    """Make stdout and stderr such that printing never ends this process. Call it once, in a process of distft's own.

    A character that the terminal's encoding lacks is printed as an escape, and what is printed to a terminal that has
    been closed is lost.
    """
    sys.stdout, sys.stderr = _lenient(sys.stdout, 1), _lenient(sys.stderr, 2)


def _lenient(stream: TextIO, descriptor: int) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if not stream.isatty():
        stream.reconfigure(errors="backslashreplace")
        return stream
    stream.flush()
    raw: Any = io.BufferedWriter(_Terminal(descriptor, "w", closefd=False))
    return io.TextIOWrapper(
        raw, stream.encoding, "backslashreplace", line_buffering=True, write_through=stream.write_through
    )


class _Terminal(io.FileIO):
    """A terminal that swallows what is written to it after it has been closed, as by a dropped ssh connection."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


def quiet_libraries() -> None:
    """Hide notices of the installed libraries that a user can do nothing about, unless DISTFT_DEBUG is set.

    Call it before importing torch, TRL or DeepSpeed: some notices are printed during those imports.
    """
    if os.environ.get(DEBUG):
        return
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel is not installed
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each 8-bit product
    for message in (
        r".*gradient_checkpointing. is deprecated",  # TRL still sets the old name
        r".*`torch.distributed..*_tensor. is deprecated",  # DeepSpeed still calls the old name
    ):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, in a notebook without ipywidgets
    for name, level in (("DeepSpeed", logging.WARNING), ("liger_kernel", logging.ERROR)):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _AtLeast) for each in logger.filters):  # they set their own level when imported
            logger.addFilter(_AtLeast(level))
    if not any(isinstance(finder, _Hushed) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hushed())


class _AtLeast(logging.Filter):
    """Lets records of this level and above pass."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level


class _Hushed(importlib.abc.MetaPathFinder):
    """Keeps `transformers.integrations` from printing that W&B is offline, whether or not a run uses it.

    distft says where a run's metrics go. The module prints while it is imported, and asks nobody.
    """

    _module = "transformers.integrations.integration_utils"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                with contextlib.redirect_stdout(io.StringIO()):
                    run(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
