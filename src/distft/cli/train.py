"""`distft train`: check the recipe, then start its processes on this machine."""

from __future__ import annotations

import argparse

from distft.cli.arguments import RECIPE, Commands, at_least_one, load
from distft.errors import LaunchError


def add_to(commands: Commands) -> None:
    parser = commands.add_parser("train", help="train a recipe on this machine, on every GPU it has")
    parser.add_argument("overrides", nargs="*", help=RECIPE)
    parser.add_argument("--nproc", type=int, help="number of processes (default: one per GPU, or 1 without a GPU)")
    parser.add_argument("--nnodes", type=int, default=1, help="number of machines; run the same command on each")
    parser.add_argument("--node-rank", type=int, default=0, help="index of this machine, counted from 0")
    parser.add_argument(
        "--rdzv", default="", metavar="HOST:PORT", help="where the machines meet: node 0, and a free port on it"
    )
    parser.set_defaults(run=train)


def train(options: argparse.Namespace) -> int:
    from distft.hardware import visible_devices
    from distft.launch.local import Node, run

    node = Node.of(options.nnodes, options.node_rank, options.rdzv)
    recipe = load(options.overrides)  # find the user's mistakes before starting any process
    devices = visible_devices()
    processes = options.nproc or (1 if recipe.strategy == "single" else max(devices, 1))
    at_least_one(processes, "--nproc")
    if devices and processes > devices:
        raise LaunchError(f"--nproc {processes} exceeds the {devices} GPUs of this machine; use at most {devices}")
    recipe.check_division(processes * node.count)
    return run(options.overrides, processes, recipe.run.max_restarts, node)
