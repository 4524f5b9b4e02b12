"""`distft …`: train, evaluate, submit, jobs, fetch, recipes, experiments, compare, report, data, merge, doctor."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft import __version__
from distft.errors import Fault, LaunchError, RunFolderError, StorageError, UserError
from distft.outcome import debug_flag, guarded
from distft.recipe import Recipe

if TYPE_CHECKING:
    from distft.experiment import Experiment

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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="start accelerate's launcher with the right flags for this machine")
    train.add_argument("overrides", nargs="*", help=OVERRIDES)
    train.add_argument("--nproc", type=int, help="number of processes; as many as there are GPUs where it is not given")
    train.add_argument("--nnodes", type=int, default=1, help="number of machines; run the same command on each of them")
    train.add_argument("--node-rank", type=int, default=0, help="which of them this is, from 0")
    train.add_argument(
        "--rdzv", default="", metavar="HOST:PORT", help="where they meet: node 0, and a port that is free there"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="base and adapter side by side: what the fine-tune changed")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="RUN",
        help="a run folder, or model=PATH adapter=PATH; and evaluation.key=value …",
    )
    evaluate.add_argument(
        "--nproc", type=int, help="processes that share the work; as many as there are GPUs where it is not given"
    )
    evaluate.set_defaults(run=_evaluate)

    submit = commands.add_parser(
        "submit", help="a SLURM job that survives preemption; of an experiment, an array of jobs"
    )
    submit.add_argument("overrides", nargs="*", help=f"{OVERRIDES}, or experiment=NAME and key.path=value …")
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")
    submit.set_defaults(run=_submit)

    jobs = commands.add_parser("jobs", help="what was submitted from here: state, last step, loss, run folder")
    jobs.add_argument(
        "--dir", type=Path, default=Path("runs"), help="folder of the run folders; runs where it is not given"
    )
    jobs.set_defaults(run=_jobs)

    fetch = commands.add_parser("fetch", help="bring model and data into the cache, for machines without a connection")
    fetch.add_argument("overrides", nargs="*", help=OVERRIDES)
    fetch.add_argument("--check", action="store_true", help="only say what is missing; uses no network")
    fetch.set_defaults(run=_fetch)

    recipes = commands.add_parser("recipes", help="list, show, validate, schema").add_subparsers(
        required=True, metavar="ACTION"
    )
    recipes.add_parser("list", help="every recipe, with its first comment").set_defaults(run=_list)
    show = recipes.add_parser("show", help="the resolved recipe, with where each value came from")
    show.add_argument("name")
    show.add_argument("overrides", nargs="*", help="key.path=value …")
    show.add_argument("--nproc", type=int, default=1, help="derive the accumulation for this number of processes")
    show.set_defaults(run=_show)
    validate = recipes.add_parser("validate", help="all faults at once")
    validate.add_argument("names", nargs="*", help="names or paths; every recipe where none is given")
    validate.set_defaults(run=_validate)
    recipes.add_parser("schema", help="JSON Schema for editors").set_defaults(run=_schema)

    experiments = commands.add_parser("experiments", help="list, show").add_subparsers(required=True, metavar="ACTION")
    experiments.add_parser("list", help="every experiment, with its first comment").set_defaults(run=_list_experiments)
    runs = experiments.add_parser("show", help="the runs of an experiment, each with the arguments of distft train")
    runs.add_argument("name")
    runs.add_argument("overrides", nargs="*", help="key.path=value …, for every run")
    runs.set_defaults(run=_show_experiment)

    compare = commands.add_parser("compare", help="run recipes or an experiment here, one after the other, and report")
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
    compare.set_defaults(run=_compare)

    report = commands.add_parser("report", help="one report over finished and unfinished runs")
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
    report.set_defaults(run=_report)

    data = commands.add_parser("data", help="preview").add_subparsers(required=True, metavar="ACTION")
    preview = data.add_parser("preview", help="samples with trained and masked tokens, lengths, what was dropped")
    preview.add_argument("overrides", nargs="*", help=OVERRIDES)
    preview.add_argument(
        "--samples", type=int, default=3, help="show the first of the train split; 3 where it is not given"
    )
    preview.add_argument(
        "--rows", type=_rows, help="show these instead: numbers of samples of the train split, 17,42 say"
    )
    preview.set_defaults(run=_preview)

    merge = commands.add_parser(
        "merge", help="the adapter of a run merged into its (dequantised) base, for plain transformers"
    )
    merge.add_argument("folder", type=Path, help="run folder")
    merge.add_argument("--output", type=Path, help="folder to write; RUN/merged where it is not given")
    merge.set_defaults(run=_merge)

    doctor = commands.add_parser(
        "doctor", help="what this machine is, whether training can run on it, and what to mend"
    )
    doctor.add_argument("--json", action="store_true", help="the same for programs")
    doctor.add_argument(
        "--no-bandwidth", action="store_true", help="start no processes to measure all-reduce and all-gather"
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _checks() -> tuple[Callable[[Recipe], list[Fault]], ...]:
    from distft import data, slurm, strategy

    return strategy.faults, data.faults, slurm.faults


def _load(arguments: Sequence[str]) -> Recipe:
    from distft.recipe import load_recipe

    return load_recipe(arguments, checks=_checks())


def _load_experiment(arguments: Sequence[str], repeats: int | None = None) -> Experiment:
    from distft.experiment import load_experiment

    return load_experiment(arguments, checks=_checks(), repeats=repeats)


def _is_experiment(words: Sequence[str]) -> bool:
    return any(word.startswith("experiment=") for word in words)


def _train(options: argparse.Namespace) -> int:
    from distft.launch import Node, run
    from distft.strategy import visible_devices

    node = Node.of(options.nnodes, options.node_rank, options.rdzv)
    recipe = _load(options.overrides)  # the user's mistakes are found here, before any process is started
    devices = visible_devices()
    processes = options.nproc or (1 if recipe.strategy == "single" else max(devices, 1))
    if processes < 1:
        raise LaunchError(f"--nproc {processes} starts nothing")
    if devices and processes > devices:
        raise LaunchError(
            f"--nproc {processes} asks for more processes than there are GPUs here ({devices}); ask for {devices} at most"
        )
    recipe.check_division(processes * node.count)
    return run(options.overrides, processes, recipe.run.max_restarts, node)


def _evaluate(options: argparse.Namespace) -> int:
    from distft.evaluation.tasks import Request
    from distft.launch import EVALUATION, Node, run
    from distft.strategy import visible_devices

    request = Request.of(options.overrides)  # the user's mistakes are found here, before any process is started
    processes = options.nproc or max(visible_devices(), 1)
    if processes < 1:
        raise LaunchError(f"--nproc {processes} starts nothing")
    return run(options.overrides, processes, request.recipe.run.max_restarts, Node(), EVALUATION)


def _submit(options: argparse.Namespace) -> None:
    from distft.submission import Submission

    words: list[str] = options.overrides
    if _is_experiment(words):
        submission = Submission.of_experiment(_load_experiment(words), words)
    elif not any(word.startswith("recipe=") for word in words):
        raise LaunchError("say what to submit: recipe=NAME, or experiment=NAME")
    else:
        submission = Submission.of_recipe(_load(words), words)
    print(submission.script.rstrip() if options.dry_run else "\n".join(submission.submit()))


def _jobs(options: argparse.Namespace) -> None:
    from distft.slurm import Jobs

    print("\n".join(Jobs.of(options.dir).table()))


def _fetch(options: argparse.Namespace) -> int:
    from distft.fetch import fetch, missing

    recipe = _load(options.overrides)
    lines = missing(recipe) if options.check else fetch(recipe)
    if recipe.evaluation.tasks:
        from distft.evaluation import fetching

        lines += fetching.missing(recipe) if options.check else fetching.fetch(recipe)
    for line in lines or ["nothing is missing: this recipe runs with the hub offline"]:
        print(line)
    return UserError.exit_code if options.check and lines else 0


def _list(options: argparse.Namespace) -> None:
    from distft.recipe import list_recipes

    _print_list(list_recipes(Path.cwd()))


def _print_list(files: Mapping[str, Path]) -> None:
    from distft.yaml12 import first_comment

    for name, path in files.items():
        print(f"{name:<16} {first_comment(path.read_text(encoding='utf-8'))}".rstrip())


def _show(options: argparse.Namespace) -> None:
    recipe = _load([f"recipe={options.name}", *options.overrides])
    print(f"# {recipe.source.name}: " + " ← ".join(str(path) for path in reversed(recipe.source.files)))
    _print_section(recipe.model_dump(), recipe, "")
    recipe.check_division(options.nproc)
    size, micro = recipe.batching.global_batch_size, recipe.batching.micro_batch
    if size is None or micro == "auto" or recipe.batching.micro_batch_tokens is not None:
        print("# gradient_accumulation_steps: the fewest with which the data's longest step fits")
    else:
        print(f"# gradient_accumulation_steps: {size // (micro * options.nproc)}  (derived: {size} / ({micro} × "
              f"{options.nproc} process{'es' if options.nproc > 1 else ''}))")  # fmt: skip


def _print_section(values: dict[str, object], recipe: Recipe, prefix: str) -> None:
    import yaml

    depth = "  " * prefix.count(".")
    for key, value in values.items():
        if isinstance(value, dict) and value:
            print(f"{depth}{key}:")
            _print_section(value, recipe, f"{prefix}{key}.")
        else:
            text = yaml.safe_dump({key: value}, default_flow_style=None, width=1000, allow_unicode=True).strip()
            text = text[1:-1] if text.startswith("{") else text
            print(f"{depth}{text:<{58 - len(depth)}}  # {recipe.source.of(prefix + key)}")


def _validate(options: argparse.Namespace) -> int:
    from distft.errors import RecipeError
    from distft.recipe import list_recipes

    failed = 0
    for name in options.names or list_recipes(Path.cwd()):
        try:
            _load([f"recipe={name}"])
            print(f"{name}: valid")
        except RecipeError as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    return UserError.exit_code if failed else 0


def _schema(options: argparse.Namespace) -> None:
    from distft.recipe import schema

    print(json.dumps(schema(), indent=2))


def _list_experiments(options: argparse.Namespace) -> None:
    from distft.experiment_file import list_experiments

    _print_list(list_experiments(Path.cwd()))


def _show_experiment(options: argparse.Namespace) -> None:
    experiment = _load_experiment([f"experiment={options.name}", *options.overrides])
    count = f"{len(experiment.runs)} runs of {len(experiment.variants)} variants"
    print(f"# {experiment.name}: {experiment.description}\n# {experiment.path}: {count}")
    print(f"# must be equal: {', '.join(experiment.equal) or 'nothing is declared'}")
    for run in experiment.runs:
        print(f"distft train {shlex.join(run.arguments)}")


def _compare(options: argparse.Namespace) -> int:
    from distft.compare import Comparison
    from distft.markdown import markdown

    for number, what in ((options.nproc, "--nproc"), (options.repeats, "--repeats")):
        if number is not None and number < 1:
            raise LaunchError(f"{what} {number} starts nothing")
    comparison = Comparison(_load_experiment(options.overrides, options.repeats), options.nproc)
    made = comparison.run(resume=options.resume, watch=options.watch)
    print(markdown(made), end="")
    print("\nreport: " + ", ".join(map(str, comparison.files)))
    return 0 if comparison.complete else 1


def _report(options: argparse.Namespace) -> None:
    from distft.compare import report_on, track
    from distft.history import History
    from distft.markdown import markdown
    from distft.page import histories, page
    from distft.report import report
    from distft.run import RunFolder

    words: list[str] = options.overrides
    if words and all(word.endswith(".json") for word in words):  # what anybody's Trainer has logged
        logged = [History.of_log(Path(word)) for word in words]
        _hand_over(
            page(" and ".join(each.name for each in logged), logged),
            options.output or Path(words[0]).with_suffix(".html"),
        )
        return
    experiment = _load_experiment(words) if _is_experiment(words) else None
    made = report_on(experiment) if experiment else report([RunFolder(Path(word)) for word in words])
    kind = ".json" if options.json else "" if options.output is None else options.output.suffix
    if kind == ".html":
        text = page(made.title, histories(made), made)
    else:
        text = made.to_json() if kind == ".json" else markdown(made)
    _hand_over(text, options.output)
    if experiment is not None:
        track(experiment, made)


def _hand_over(text: str, output: Path | None) -> None:
    from distft.run import write_atomically

    if output is None:
        print(text, end="")
        return
    try:
        write_atomically(output, text)
    except OSError as error:
        raise StorageError(f"the report cannot be written to {output}: {error.strerror}") from error
    print(f"report: {output}")


def _preview(options: argparse.Namespace) -> None:
    from distft.data import preview
    from distft.model import load_tokenizer

    recipe = _load(options.overrides)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    rows = options.rows or range(options.samples)
    print(preview(recipe, load_tokenizer(recipe), rows=rows, colour=colour))


def _rows(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _merge(options: argparse.Namespace) -> None:
    from distft.model import merge
    from distft.run import RunFolder
    from distft.strategy import visible_devices

    folder = RunFolder(options.folder)
    if not folder.adapter.is_dir():
        raise RunFolderError(f"{folder.path} holds no adapter to merge ({folder.adapter} is missing)")
    target = options.output or folder.merged
    if target.exists():
        raise RunFolderError(f"{target} exists, and distft never writes over anything; give another --output")
    merge(_load([f"recipe={folder.recipe}"]), folder.adapter, target, {"": 0} if visible_devices() else None)
    print(f"merged model: {target}")


def _doctor(options: argparse.Namespace) -> int:
    from distft.doctor import doctor

    return doctor(bandwidth=not options.no_bandwidth, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
