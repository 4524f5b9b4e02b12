"""`distft doctor`: check whether this machine can train."""

from __future__ import annotations

import argparse

from distft.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    parser = commands.add_parser("doctor", help="describe this machine, say whether it can train, and suggest fixes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--no-bandwidth",
        action="store_true",
        help="do not start processes to measure all-reduce and all-gather bandwidth",
    )
    parser.set_defaults(run=doctor)


def doctor(options: argparse.Namespace) -> int:
    from distft.doctor.report import doctor

    return doctor(bandwidth=not options.no_bandwidth, as_json=options.json)
