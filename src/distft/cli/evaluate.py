"""`distft evaluate`: measure a base model and its adapter side by side."""

from __future__ import annotations

import argparse

from distft.api.evaluate import run_evaluation
from distft.cli.arguments import Commands
from distft.config.evaluation import TASKS


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compare the fine-tuned model with its base on held-out tasks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Tasks (evaluation.tasks=[NAME,NAME]; default: those of the recipe):\n"
        + "\n".join(f"  {name:<16}{what}" for name, what in TASKS.items()),
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="RUN",
        help="a run folder, or model=PATH adapter=PATH; then any number of evaluation.key=value overrides",
    )
    parser.add_argument("--nproc", type=int, help="number of processes to share the work (default: one per GPU, or 1)")
    parser.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace) -> int:
    _, ended = run_evaluation(options.overrides, options.nproc)
    return ended.code
