"""`distft train`: check the recipe, then start its processes on this machine."""

from __future__ import annotations

import argparse

from distft.api.check import load_to_run
from distft.api.train import processes_for
from distft.cli.arguments import RECIPE, Commands
from distft.errors import UserError


def add_to(commands: Commands) -> None:
    parser = commands.add_parser("train", help="train a recipe on this machine, on every GPU it has")
    parser.add_argument("overrides", nargs="*", help=RECIPE)
    parser.add_argument("--nproc", type=int, help="number of processes (default: one per GPU, or 1 without a GPU)")
    parser.add_argument("--nnodes", type=int, default=1, help="number of machines; run the same command on each")
    parser.add_argument("--node-rank", type=int, default=0, help="index of this machine, counted from 0")
    parser.add_argument(
        "--rdzv", default="", metavar="HOST:PORT", help="where the machines meet: node 0, and a free port on it"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the interrupted run of this name, or fail (run.resume=must)"
    )
    parser.set_defaults(run=train)


def train(options: argparse.Namespace) -> int:
    from distft.launch.local import run
    from distft.launch.node import Node

    if not options.overrides:
        raise UserError(
            "distft train needs a recipe: `distft train tiny` trains the built-in example, `distft recipes list` shows "
            "all recipes, and `distft train llama3_8b data.name=chats.jsonl` trains on your data"
        )
    node = Node.of(options.nnodes, options.node_rank, options.rdzv)
    node.check_rendezvous()
    words = [*options.overrides, *(["run.resume=must"] if options.resume else [])]
    recipe = load_to_run(words)  # find the user's mistakes before starting any process
    processes = processes_for(recipe, options.nproc, node.count)
    return run(words, processes, recipe.run.max_restarts, node).code
