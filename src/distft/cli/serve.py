"""`distft serve`: an OpenAI-compatible server for a model, by vLLM or transformers."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import tempfile
from pathlib import Path

from distft.cli.arguments import Commands
from distft.console import say
from distft.errors import LaunchError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a trained model to OpenAI clients, by vLLM or transformers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  distft serve runs/tiny\n  distft serve runs/tiny --port 9000 --dry-run",
    )
    parser.add_argument("model", metavar="MODEL", help="run folder, folder of an adapter or a model, or hub ID")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of its recipe")
    parser.add_argument("--base", action="store_true", help="serve the base, without what was trained")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen at (8000)")
    parser.add_argument("--engine", choices=("vllm", "transformers"), help="server (vllm if it can be used)")
    parser.add_argument("--dry-run", action="store_true", help="show the server's command, and end")
    parser.set_defaults(run=serve)


def _port(text: str) -> int:
    if not 0 < (number := int(text)) < 65_536:
        raise ValueError
    return number


def serve(options: argparse.Namespace) -> int:
    from distft.evaluation.request import Request
    from distft.evaluation.serve import choose_program, command, path_of, prepare

    request = Request.to_talk_to(options.model, options.overrides)
    program = options.engine or choose_program()
    path_of(program)  # before anything is merged for it
    with tempfile.TemporaryDirectory(prefix="distft-serve-") as folder:
        served = prepare(request, program, Path(folder), base=options.base)
        words = command(program, served, options.host, options.port)
        if options.dry_run:
            print(shlex.join(words))
            return 0
        where = f"http://{options.host}:{options.port}/v1"
        say(f"{program} serves {options.model} at {where} under the name {served.name}; Ctrl-C ends it")
        if options.host not in _LOOPBACK:
            say(f"warning: whoever reaches {options.host} can use it; there is no key")
        try:
            code = subprocess.run(words, check=False, cwd=folder).returncode
        except KeyboardInterrupt:
            return 0
    if code:
        raise LaunchError(f"the server ended with exit code {code}: {shlex.join(words)}")
    return 0
