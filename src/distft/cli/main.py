"""`distft …`: train, evaluate, submit, jobs, fetch, recipes, experiments, compare, report, data, merge, doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distft import __version__
from distft.cli import commands
from distft.distributed.process import debug_flag, guarded
from distft.evaluation.columns import TASKS

OVERRIDES = "recipe=NAME and key.path=value …"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command `distft`; the exit code is 0, or 2 for the user's mistake, 75 interrupted, 1 the rest."""
    words = debug_flag(list(sys.argv[1:] if arguments is None else arguments))
    parser = _parser()
    options, rest = parser.parse_known_args(words)  # argparse takes no key=value behind an option by itself
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognised: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    code = 0

    def work() -> None:
        nonlocal code
        code = options.run(options) or 0

    return guarded(work) or code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distft", description=__doc__, epilog="--debug anywhere shows tracebacks.")
    parser.add_argument("--version", action="version", version=f"distft {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    train = subparsers.add_parser("train", help="start accelerate's launcher with the right flags for this machine")
    train.add_argument("overrides", nargs="*", help=OVERRIDES)
    train.add_argument("--nproc", type=int, help="number of processes; as many as there are GPUs where it is not given")
    train.add_argument("--nnodes", type=int, default=1, help="number of machines; run the same command on each of them")
    train.add_argument("--node-rank", type=int, default=0, help="which of them this is, from 0")
    train.add_argument(
        "--rdzv", default="", metavar="HOST:PORT", help="where they meet: node 0, and a port that is free there"
    )
    train.set_defaults(run=commands.train)

    evaluate = subparsers.add_parser(
        "evaluate",
        help="base and adapter side by side: what the fine-tune changed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="tasks (evaluation.tasks=[NAME,NAME]; the recipe's where it is not given):\n"
        + "\n".join(f"  {name:<12}{what}" for name, what in TASKS.items()),
    )
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="RUN",
        help="a run folder, or model=PATH adapter=PATH; and evaluation.key=value …",
    )
    evaluate.add_argument(
        "--nproc", type=int, help="processes that share the work; as many as there are GPUs where it is not given"
    )
    evaluate.set_defaults(run=commands.evaluate)

    submit = subparsers.add_parser(
        "submit", help="a SLURM job that survives preemption; of an experiment, an array of jobs"
    )
    submit.add_argument("overrides", nargs="*", help=f"{OVERRIDES}, or experiment=NAME and key.path=value …")
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")
    submit.set_defaults(run=commands.submit)

    jobs = subparsers.add_parser("jobs", help="what was submitted from here: state, last step, loss, run folder")
    jobs.add_argument(
        "--dir", type=Path, default=Path("runs"), help="folder of the run folders; runs where it is not given"
    )
    jobs.set_defaults(run=commands.jobs)

    fetch = subparsers.add_parser(
        "fetch", help="bring model and data into the cache, for machines without a connection"
    )
    fetch.add_argument("overrides", nargs="*", help=OVERRIDES)
    fetch.add_argument("--check", action="store_true", help="only say what is missing; uses no network")
    fetch.set_defaults(run=commands.fetch)

    recipes = subparsers.add_parser("recipes", help="list, show, validate, schema").add_subparsers(
        required=True, metavar="ACTION"
    )
    recipes.add_parser("list", help="every recipe, with its first comment").set_defaults(run=commands.recipes_list)
    show = recipes.add_parser("show", help="the resolved recipe, with where each value came from")
    show.add_argument("name")
    show.add_argument("overrides", nargs="*", help="key.path=value …")
    show.add_argument("--nproc", type=int, default=1, help="derive the accumulation for this number of processes")
    show.set_defaults(run=commands.recipes_show)
    validate = recipes.add_parser("validate", help="all faults at once")
    validate.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE",
        help="names or paths, every recipe where none is given; key.path=value … for each of them",
    )
    validate.set_defaults(run=commands.recipes_validate)
    recipes.add_parser("schema", help="JSON Schema for editors").set_defaults(run=commands.recipes_schema)

    experiments = subparsers.add_parser("experiments", help="list, show").add_subparsers(
        required=True, metavar="ACTION"
    )
    experiments.add_parser("list", help="every experiment, with its first comment").set_defaults(
        run=commands.experiments_list
    )
    runs = experiments.add_parser("show", help="the runs of an experiment, each with the arguments of distft train")
    runs.add_argument("name")
    runs.add_argument("overrides", nargs="*", help="key.path=value …, for every run")
    runs.set_defaults(run=commands.experiments_show)

    compare = subparsers.add_parser(
        "compare", help="run recipes or an experiment here, one after the other, and report"
    )
    compare.add_argument(
        "overrides",
        nargs="+",
        metavar="RECIPE",
        help="names of recipes, or experiment=NAME; key.path=value … for all runs",
    )
    compare.add_argument(
        "--nproc", type=int, help="processes of every run that is not single; one a GPU, or two without"
    )
    compare.add_argument("--repeats", type=int, help="how often each variant runs; as the experiment says, or 5")
    compare.add_argument("--resume", action="store_true", help="make only the runs that have no result yet")
    compare.add_argument("--watch", action="store_true", help="follow the runs in a table, where this is a terminal")
    compare.set_defaults(run=commands.compare)

    report = subparsers.add_parser("report", help="one report over finished and unfinished runs")
    report.add_argument(
        "overrides",
        nargs="*",
        metavar="RUN",
        help="run folders; or experiment=NAME and key.path=value …; or trainer_state.json files",
    )
    report.add_argument(
        "--output", type=Path, help="file to write, .md, .json or .html; Markdown on stdout where it is not given"
    )
    report.add_argument("--json", action="store_true", help="JSON in place of Markdown")
    report.set_defaults(run=commands.report)

    data = subparsers.add_parser("data", help="preview").add_subparsers(required=True, metavar="ACTION")
    preview = data.add_parser("preview", help="samples with trained and masked tokens, lengths, what was dropped")
    preview.add_argument("overrides", nargs="*", help=OVERRIDES)
    preview.add_argument(
        "--samples", type=int, default=3, help="show the first of the train split; 3 where it is not given"
    )
    preview.add_argument(
        "--rows", type=_rows, help="show these instead: numbers of samples of the train split, 17,42 say"
    )
    preview.set_defaults(run=commands.data_preview)

    merge = subparsers.add_parser(
        "merge", help="the adapter of a run merged into its (dequantised) base, for plain transformers"
    )
    merge.add_argument("folder", type=Path, help="run folder")
    merge.add_argument("--output", type=Path, help="folder to write; RUN/merged where it is not given")
    merge.set_defaults(run=commands.merge)

    doctor = subparsers.add_parser(
        "doctor", help="what this machine is, whether training can run on it, and what to mend"
    )
    doctor.add_argument("--json", action="store_true", help="the same for programs")
    doctor.add_argument(
        "--no-bandwidth", action="store_true", help="start no processes to measure all-reduce and all-gather"
    )
    doctor.set_defaults(run=commands.doctor)
    return parser


def _rows(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
