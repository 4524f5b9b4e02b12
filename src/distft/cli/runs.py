"""`distft runs`: list the run folders here, show one, or remove some."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.cli.arguments import Commands
from distft.console import say
from distft.errors import LaunchError, RunFolderError

if TYPE_CHECKING:
    from distft.runs.folder import RunFolder

_SHOWN = (
    *("status", "cause", "recipe", "strategy", "world_size", "steps", "train_loss", "samples_per_second"),
    *("tokens_per_second", "peak_memory_gib", "train_time_s", "energy_j", "restarts"),
)


def add_to(commands: Commands) -> None:
    actions = commands.add_parser("runs", help="list, show or remove runs").add_subparsers(
        required=True, metavar="ACTION"
    )
    parser = actions.add_parser(
        "list",
        help="list the runs in a folder, the newest first",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  distft runs list\n  distft runs list /data/runs --json",
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=list_)
    parser = actions.add_parser(
        "show",
        help="print how a run ended, and its figures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  distft runs show runs/tiny",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--json", action="store_true", help="print its whole summary.json")
    parser.set_defaults(run=show)
    parser = actions.add_parser(
        "rm",
        help="remove run folders with everything in them, but none that a process writes to",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  distft runs rm runs/tiny-2 runs/tiny-3 --yes",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=remove)


def list_(options: argparse.Namespace) -> None:
    from distft.runs.folder import RunFolder

    parent: Path = options.folder
    if not parent.is_dir():
        raise RunFolderError(f"there is no folder {parent}; name the folder of your runs (run.dir in a recipe)")
    found = [path for path in parent.iterdir() if RunFolder(path).summary.is_file()]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    rows = [_row(RunFolder(path)) for path in found]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        say(f"{parent} has no runs")
        return
    heads = list(rows[0])
    cells = [[_text(row[head]) for head in heads] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in (heads, *cells):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _row(folder: RunFolder) -> dict[str, Any]:
    summary = folder.read_summary()
    after = summary.get("eval_after") or {}
    return {
        "run": str(folder.path),
        "status": summary.get("status"),
        "strategy": summary.get("strategy"),
        "steps": summary.get("steps"),
        "train loss": summary.get("train_loss"),
        "held-out loss": after.get("loss"),
        "samples/s": summary.get("samples_per_second"),
    }


def show(options: argparse.Namespace) -> None:
    from distft.runs.folder import RunFolder

    folder = RunFolder(options.folder)
    summary = folder.read_summary()
    if options.json:
        print(json.dumps(summary, indent=2))
        return
    rows = {key: summary.get(key) for key in _SHOWN}
    for key, name in (("eval_before", "held-out loss before"), ("eval_after", "held-out loss after")):
        rows[name] = (summary.get(key) or {}).get("loss")
    for name, value in rows.items():
        if value is not None:
            print(f"{name:<22}{_text(value)}")


def remove(options: argparse.Namespace) -> None:
    from distft.runs.folder import RunFolder

    for folder in map(RunFolder, options.folders):
        if not folder.summary.is_file():
            raise RunFolderError(f"{folder.path} is not a run folder (it has no {folder.summary.name})")
        if folder.lock.is_file() and folder.is_held():
            raise RunFolderError(f"a process writes to {folder.path}; stop that run first")
    if not options.yes:
        if not sys.stdin.isatty():
            raise LaunchError("nothing was removed; --yes removes without asking")
        names = ", ".join(map(str, options.folders))
        if input(f"remove {names} with everything in it? [y/N] ").strip().lower() not in ("y", "yes"):
            say("nothing was removed")
            return
    for path in options.folders:
        shutil.rmtree(path)
        say(f"removed {path}")


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
