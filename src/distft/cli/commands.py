"""What each command of `distft` does with its options.

Each imports what it needs when it runs: `distft --help` waits for no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft.config.recipe import Recipe
from distft.errors import Fault, LaunchError, RunFolderError, StorageError, UserError

if TYPE_CHECKING:
    from distft.experiments.expand import Experiment
    from distft.reports.history import History
    from distft.runs.folder import RunFolder


def _checks() -> tuple[Callable[[Recipe], list[Fault]], ...]:
    from distft.data import prepare as data
    from distft.distributed.strategies import base as strategy
    from distft.launch import slurm

    return strategy.faults, data.faults, slurm.faults


def _load(arguments: Sequence[str]) -> Recipe:
    from distft.config.recipe import load_recipe

    return load_recipe(arguments, checks=_checks())


def _load_experiment(arguments: Sequence[str], repeats: int | None = None) -> Experiment:
    from distft.experiments.expand import load_experiment

    return load_experiment(arguments, checks=_checks(), repeats=repeats)


def _is_experiment(words: Sequence[str]) -> bool:
    return any(word.startswith("experiment=") for word in words)


def train(options: argparse.Namespace) -> int:
    from distft.distributed.strategies.base import visible_devices
    from distft.launch.local import Node, run

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


def evaluate(options: argparse.Namespace) -> int:
    from distft.distributed.strategies.base import visible_devices
    from distft.evaluation.run import Request
    from distft.launch.local import EVALUATION, Node, run

    request = Request.of(options.overrides)  # the user's mistakes are found here, before any process is started
    processes = options.nproc or max(visible_devices(), 1)
    if processes < 1:
        raise LaunchError(f"--nproc {processes} starts nothing")
    return run(options.overrides, processes, request.recipe.run.max_restarts, Node(), EVALUATION)


def submit(options: argparse.Namespace) -> None:
    from distft.launch.submit import Submission

    words: list[str] = options.overrides
    if _is_experiment(words):
        submission = Submission.of_experiment(_load_experiment(words), words)
    elif not any(word.startswith("recipe=") for word in words):
        raise LaunchError("say what to submit: recipe=NAME, or experiment=NAME")
    else:
        submission = Submission.of_recipe(_load(words), words)
    print(submission.script.rstrip() if options.dry_run else "\n".join(submission.submit()))


def jobs(options: argparse.Namespace) -> None:
    from distft.launch.slurm import Jobs

    print("\n".join(Jobs.of(options.dir).table()))


def fetch(options: argparse.Namespace) -> int:
    from distft.hub import fetch, missing

    recipe = _load(options.overrides)
    lines = missing(recipe) if options.check else fetch(recipe)
    if recipe.evaluation.tasks:
        from distft.evaluation import fetch as fetching

        lines += fetching.missing(recipe) if options.check else fetching.fetch(recipe)
    for line in lines or ["nothing is missing: this recipe runs with the hub offline"]:
        print(line)
    return UserError.exit_code if options.check and lines else 0


def recipes_list(options: argparse.Namespace) -> None:
    from distft.config.files import list_recipes

    _print_list(list_recipes(Path.cwd()))


def _print_list(files: Mapping[str, Path]) -> None:
    from distft.config.yaml import first_comment

    for name, path in files.items():
        print(f"{name:<16} {first_comment(path.read_text(encoding='utf-8'))}".rstrip())


def recipes_show(options: argparse.Namespace) -> None:
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


def recipes_validate(options: argparse.Namespace) -> int:
    from distft.config.files import list_recipes
    from distft.errors import RecipeError

    names = [word.removeprefix("recipe=") for word in options.words if "=" not in word or word.startswith("recipe=")]
    overrides = [word for word in options.words if "=" in word and not word.startswith("recipe=")]
    failed = 0
    for name in names or list_recipes(Path.cwd()):
        try:
            _load([f"recipe={name}", *overrides])
            print(f"{name}: valid")
        except RecipeError as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    return UserError.exit_code if failed else 0


def recipes_schema(options: argparse.Namespace) -> None:
    from distft.config.recipe import schema

    print(json.dumps(schema(), indent=2))


def experiments_list(options: argparse.Namespace) -> None:
    from distft.experiments.schema import list_experiments

    _print_list(list_experiments(Path.cwd()))


def experiments_show(options: argparse.Namespace) -> None:
    experiment = _load_experiment([f"experiment={options.name}", *options.overrides])
    count = f"{len(experiment.runs)} runs of {len(experiment.variants)} variants"
    print(f"# {experiment.name}: {experiment.description}\n# {experiment.path}: {count}")
    print(f"# must be equal: {', '.join(experiment.equal) or 'nothing is declared'}")
    for run in experiment.runs:
        print(f"distft train {shlex.join(run.arguments)}")


def compare(options: argparse.Namespace) -> int:
    from distft.experiments.compare import Comparison
    from distft.reports.markdown import markdown

    for number, what in ((options.nproc, "--nproc"), (options.repeats, "--repeats")):
        if number is not None and number < 1:
            raise LaunchError(f"{what} {number} starts nothing")
    comparison = Comparison(_load_experiment(options.overrides, options.repeats), options.nproc)
    made = comparison.run(resume=options.resume, watch=options.watch)
    print(markdown(made), end="")
    print("\nreport: " + ", ".join(map(str, comparison.files)))
    return 0 if comparison.complete else 1


def report(options: argparse.Namespace) -> None:
    from distft.experiments.compare import report_on, track
    from distft.files import to_json
    from distft.reports.history import distinct
    from distft.reports.html import histories, page
    from distft.reports.markdown import log_blocks, markdown
    from distft.reports.report import report

    words: list[str] = options.overrides
    experiment = _load_experiment(words) if _is_experiment(words) else None
    folders, logs = ([], []) if experiment else _runs_and_logs(words)
    logs = distinct(logs)
    made = report_on(experiment) if experiment else report(folders) if folders or not logs else None
    output: Path | None = options.output
    if made is None and output is None and not options.json:  # there is no table that would answer as well
        output = logs[0].source.with_suffix(".html") if logs[0].source else None
    names = [log.name for log in logs]
    title = made.title if made else " and ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def as_json() -> str:
        runs = json.loads(made.to_json()) if made else {"title": title}
        found = [
            {"name": log.name, "path": str(log.source), "unread": log.unread, "infinite": log.infinite, "figures": log.final}
            for log in logs
        ]  # fmt: skip
        return to_json({**runs, "logs": found} if logs else runs) + "\n"

    def as_markdown() -> str:
        parts = [markdown(made) if made else f"# {title}\n", *([log_blocks(logs)] if logs else [])]
        return "\n".join(parts)

    kind = ".json" if options.json else "" if output is None else output.suffix
    if kind == ".html" and output is not None:
        texts = {output: page(title, [*(histories(made) if made else []), *logs], made)}
        _hand_over(texts | _beside(output, {".md": as_markdown(), ".json": as_json()}, [log.source for log in logs]))
    else:
        text = as_json() if kind == ".json" else as_markdown()
        print(text, end="") if output is None else _hand_over({output: text})
    if experiment is not None and made is not None:
        track(experiment, made)


def _runs_and_logs(words: Sequence[str]) -> tuple[list[RunFolder], list[History]]:
    """What a report is on. `runs/*` names reports and logs of runs as well, so that what is neither a run nor somebody's log is skipped with a
    line, unless nothing is left."""
    from distft.console import say
    from distft.reports.history import History, find_log
    from distft.runs.folder import RunFolder

    folders, logs, skipped = [], [], []
    for path in map(Path, words):
        folder, log = RunFolder(path), find_log(path)
        try:
            if folder.summary.is_file() or folder.results.is_file():
                folders.append(folder)
            elif log is not None:
                logs.append(History.of_log(log))
            else:
                raise RunFolderError(f"{path} holds no summary.json of a run and no trainer_state.json")
        except RunFolderError as error:
            if not path.exists():
                raise
            skipped.append(error)
    if skipped and not folders and not logs:
        raise skipped[0]
    for why in skipped:
        say(f"skipped: {why}")
    return folders, logs


def _beside(output: Path, texts: Mapping[str, str], read: Sequence[Path | None]) -> dict[Path, str]:
    """The files beside a page with their texts, without those that are there and no reports of distft's: nobody named them. What was `read`
    is one of these, and needs no word."""
    from distft.console import say

    found = {}
    for kind, text in texts.items():
        path = output.with_suffix(kind)
        if not path.exists() or _is_report(path):
            found[path] = text
        elif path not in read:
            say(f"{path} is no report of distft's and is left as it is")
    return found


def _is_report(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError):
        return False
    if path.suffix == ".md":
        return text.startswith("# ") and any(f"\n## {part}\n" in text for part in ("Runs", "Logs"))
    return isinstance(content, dict) and "title" in content and bool({"verdict", "logs"} & content.keys())


def _hand_over(texts: Mapping[Path, str]) -> None:
    from distft.files import write_atomically

    for output, text in texts.items():
        try:
            write_atomically(output, text)
        except OSError as error:
            raise StorageError(f"the report cannot be written to {output}: {error.strerror}") from error
    print("report: " + ", ".join(map(str, texts)))


def data_preview(options: argparse.Namespace) -> None:
    from distft.data.preview import preview
    from distft.models.loading import load_tokenizer

    recipe = _load(options.overrides)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    rows = options.rows or range(options.samples)
    print(preview(recipe, load_tokenizer(recipe), rows=rows, colour=colour))


def merge(options: argparse.Namespace) -> None:
    from distft.distributed.strategies.base import visible_devices
    from distft.models.loading import merge
    from distft.runs.folder import RunFolder

    folder = RunFolder(options.folder)
    if not folder.adapter.is_dir():
        raise RunFolderError(f"{folder.path} holds no adapter to merge ({folder.adapter} is missing)")
    target = options.output or folder.merged
    if target.exists():
        raise RunFolderError(f"{target} exists, and distft never writes over anything; give another --output")
    merge(_load([f"recipe={folder.recipe}"]), folder.adapter, target, {"": 0} if visible_devices() else None)
    print(f"merged model: {target}")


def doctor(options: argparse.Namespace) -> int:
    from distft.doctor.advice import doctor

    return doctor(bandwidth=not options.no_bandwidth, as_json=options.json)
