"""What distft prints for the person who watches."""

from __future__ import annotations

import logging
import os
import sys
import warnings

DEBUG = "DISTFT_DEBUG"
"""Environment variable: if set, show every traceback and every warning."""


def say(message: str) -> None:
    """Print one line on stderr; where `distft.runs.logs` redirects stderr to a file, on the console as well."""
    for stream in (sys.stderr, getattr(sys.stderr, "console", None)):
        if stream is not None:
            print(f"distft: {message}", file=stream, flush=True)


def quiet_libraries() -> None:
    """Hide notices of the installed libraries that a user can do nothing about, unless DISTFT_DEBUG is set.

    Call it before importing torch, TRL or DeepSpeed: some notices are printed during those imports.
    """
    if os.environ.get(DEBUG):
        return
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel is not installed
    for message in (
        r".*gradient_checkpointing. is deprecated",  # TRL still sets the old name
        r".*`torch.distributed..*_tensor. is deprecated",  # DeepSpeed still calls the old name
    ):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, in a notebook without ipywidgets
