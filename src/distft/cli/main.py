"""Fine-tune language models from one recipe: on one process, DDP, FSDP2 or DeepSpeed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distft import __version__
from distft.cli import (
    chat,
    check,
    compare,
    data,
    doctor,
    evaluate,
    experiments,
    export,
    fetch,
    import_,
    init,
    merge,
    recipes,
    report,
    runs,
    serve,
    submit,
    train,
)
from distft.cli.examples import Parser
from distft.console import quiet_libraries
from distft.distributed.process import debug_flag, guarded
from distft.startup import start_up

_GROUPS = (
    *(train, check, evaluate, chat, serve, submit, fetch, init, import_, recipes, experiments, compare),
    *(runs, report, data, merge, export, doctor),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `distft` and return its exit code: 0 success, 2 the user's mistake, 75 interrupted, 1 any other failure."""
    words = debug_flag(list(sys.argv[1:] if arguments is None else arguments))
    if arguments is None:
        start_up()
    quiet_libraries()
    command_line = parser()
    # argparse rejects key=value words that follow an option, so they are collected here.
    options, rest = command_line.parse_known_args(words)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        command_line.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    code = 0

    def work() -> None:
        nonlocal code
        code = options.run(options) or 0

    return guarded(work) or code


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command's `run` default is the function that runs it."""
    made = Parser(prog="distft", description=__doc__, epilog="--debug anywhere on the command line shows tracebacks.")
    made.add_argument("--version", action="version", version=f"distft {__version__}")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for group in _GROUPS:
        group.add_to(commands)
    return made
