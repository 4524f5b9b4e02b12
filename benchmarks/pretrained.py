"""Shipped experiments on real weights and real rows: a small pretrained model in the place of those of 7B.

    python benchmarks/pretrained.py --model smollm2 --instructions alpaca.jsonl --reviews imdb.jsonl --output out.json
    python benchmarks/pretrained.py … --experiments rank --set training.max_steps=2  # proves a change, without a GPU

Runs on one GPU share it with others, so losses, accuracies and peak memory count, and speeds do not. They take turns in
processes that have imported everything. At the end `distft compare --resume` finds every run made, and writes the
report that the result holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import yaml
from provenance import provenance

from distft.api.recipe import load_experiment
from distft.errors import RunFolderError
from distft.experiments.compare import Comparison
from distft.experiments.expand import Experiment, ExperimentRun
from distft.experiments.results import logs_of, tasks_left
from distft.files import to_json, write_atomically
from distft.paths import packaged

CHATS = ("data.chat_template=tokenizer", "evaluation.max_samples=100")
REVIEWS = (
    "data.test_fraction=0.2",
    "evaluation.max_samples=100",
    "evaluation.imdb.subset=400",
    "evaluation.imdb.methods=[logprob]",
)
UNPROFILED = ("tracking.profile_steps=0", "tracking.report_to=[]", "training.logging_steps=5")
EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "quality": (*CHATS, "batching.global_batch_size=32", "training.learning_rate=5e-4", "training.max_steps=60"),
    "rank": (
        *CHATS,
        "batching.global_batch_size=32",
        "training.learning_rate=5e-4",
        "training.max_steps=60",
        "evaluation.tasks=[]",  # the loss before and after training is that of the held-out rows
    ),
    "imdb_bits": (*REVIEWS, "training.learning_rate=5e-4", "training.max_steps=100"),
    "ablation": (*REVIEWS, "training.learning_rate=2e-4"),
    "duel": (*REVIEWS, "strategy=single", "training.learning_rate=5e-4", "training.max_steps=100"),
    "memory_grid": (*CHATS, "batching.global_batch_tokens=16384", "training.max_steps=2"),
}
"""What is different for a model and data of this size. None of it changes what is compared."""
_ON_REVIEWS = ("imdb_bits", "ablation", "duel")
_REPEATS = {"ablation": 1, "duel": 1, "memory_grid": 1}
"""The others have a seed for each repeat."""


def words_of(name: str, options: argparse.Namespace) -> list[str]:
    """The words of `distft compare` for an experiment, without those for how it runs."""
    rows = ["data.name=imdb", f"data.path={options.reviews}"]
    data = rows if name in _ON_REVIEWS else [f"data.name={options.instructions}"]
    model = [] if name == "duel" else [f"model.name={options.model}"]
    return [f"experiment={name}", *model, *data, *UNPROFILED, *EXPERIMENTS[name], *options.set]


def recipes_of_the_duel(model: Path, work: Path) -> None:
    """Recipes in `work` that hide those of the duel: the model, and one of its shape with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    untrained = work / "untrained"
    if not untrained.exists():
        torch.manual_seed(0)
        fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
        fresh.save_pretrained(untrained)
        for file in (*model.glob("tokenizer*"), *model.glob("*.jinja")):
            shutil.copy(file, untrained)
    (work / "recipes").mkdir(exist_ok=True)
    for name, base in (("imdb_llama2", model), ("imdb_deepseek", untrained)):
        recipe = yaml.safe_load(packaged("recipes/imdb_llama2.yaml").read_text(encoding="utf-8"))
        recipe["model"]["name"] = str(base)
        (work / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def on_gpu(number: int) -> None:
    """Prepare a process that makes runs on one GPU, one after the other."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    multiprocessing.set_start_method("fork", force=True)  # here, it would be "spawn" for the workers that load data


def make_here(run: ExperimentRun, logs: Path) -> None:
    """Train the run in this process, and evaluate it as its recipe says. What it prints goes to its log."""
    from distft.api.in_process import train_here
    from distft.console import quiet_libraries
    from distft.evaluation.run import evaluate

    quiet_libraries()
    with (logs / f"{run.name}.log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            folder = train_here(run.arguments, 0)
            if tasks_left(run):
                evaluate([str(folder), *(word for word in run.arguments if word.startswith("evaluation."))])
        except Exception:
            traceback.print_exc()


def make_in_processes(run: ExperimentRun, logs: Path, limit_s: float) -> None:
    """Train the run on two GPUs, or two processes without any."""
    command = [sys.executable, "-m", "distft.cli", "train", "--nproc", "2", *run.arguments]
    with (logs / f"{run.name}.log").open("w", encoding="utf-8") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdout=log, stderr=log, timeout=max(limit_s, 1))


def make_all(todo: Sequence[tuple[ExperimentRun, Path]], options: argparse.Namespace) -> None:
    """Make the runs, `--at-once` of them on a GPU, as far as the time limit allows."""
    deadline = time.monotonic() + options.limit
    gpus, spawn = torch.cuda.device_count(), multiprocessing.get_context("spawn")
    several = [each for each in todo if each[0].recipe.strategy != "single"]
    single = [each for each in todo if each[0].recipe.strategy == "single"]
    places = options.at_once * max(gpus, 1)
    with ThreadPoolExecutor(options.at_once) as pool:
        for run, logs in several:
            pool.submit(lambda run, logs: make_in_processes(run, logs, deadline - time.monotonic()), run, logs)
        workers = [
            ProcessPoolExecutor(1, spawn, initializer=on_gpu, initargs=(number % max(gpus, 1),))
            for number in range(min(places, len(single)))
        ]
        queue = iter(single)
        waiting = {
            workers[number].submit(make_here, *each): number for number, each in zip(range(places), queue, strict=False)
        }
        while waiting:
            done, _ = wait(waiting, timeout=max(deadline - time.monotonic(), 0), return_when=FIRST_COMPLETED)
            if not done:
                break
            for each in done:
                number = waiting.pop(each)
                if (following := next(queue, None)) is not None:
                    waiting[workers[number].submit(make_here, *following)] = number
        for worker in workers:
            for process in list((worker._processes or {}).values()):
                process.kill()
            worker.shutdown(cancel_futures=True)


def trimmed(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what follows from its runs."""
    kept = ("name", "variant", "status", "cause", "outcome", "world_size", "figures", "evaluation")
    runs = [{key: run.get(key) for key in kept} for run in report["runs"]]
    return {**report, "runs": runs, "variants": [each["name"] for each in report["variants"]]}


def reported(name: str, experiment: Experiment, options: argparse.Namespace) -> dict[str, Any] | None:
    """What the record has of an experiment, whose runs were made as far as time allowed: None if none was begun."""
    words = ["compare", *words_of(name, options), "--resume"]
    if repeats := options.repeats or _REPEATS.get(name):
        words += ["--repeats", str(repeats)]
    if Comparison(experiment).complete:
        done = subprocess.run([sys.executable, "-m", "distft.cli", *words], capture_output=True, text=True)
        code, message = done.returncode, done.stderr[-1000:] if done.returncode else ""
    else:  # comparing would make the missing runs
        code, message = 1, "not all runs have a result"
        try:
            Comparison(experiment).write()
        except RunFolderError:
            return None
    report = json.loads((options.work / "runs" / f"{name}.json").read_text(encoding="utf-8"))
    command = " ".join(["distft", *words])
    return {"command": command, "exit_code": code, "message": message, "report": trimmed(report)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small pretrained chat model")
    parser.add_argument("--instructions", type=Path, required=True, help=".jsonl with instructions and answers")
    parser.add_argument("--reviews", type=Path, required=True, help=".jsonl in IMDB's schema")
    parser.add_argument("--experiments", nargs="+", default=[*EXPERIMENTS], choices=EXPERIMENTS)
    parser.add_argument("--work", type=Path, default=Path("/tmp/distft-pretrained"))
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time on a GPU")
    parser.add_argument("--limit", type=int, default=3600, help="seconds after which no run goes on")
    parser.add_argument("--repeats", type=int, help="instead of one for each seed, or one")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    for name in ("model", "instructions", "reviews", "output"):
        setattr(options, name, getattr(options, name).absolute())

    before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {"experiments": {}}
    record: dict[str, Any] = {**provenance(__file__, options.commit), "experiments": before["experiments"]}
    options.work.mkdir(parents=True, exist_ok=True)
    os.chdir(options.work)
    recipes_of_the_duel(options.model, options.work)
    experiments = {
        name: load_experiment(words_of(name, options), options.repeats or _REPEATS.get(name))
        for name in options.experiments
    }
    todo = [(run, logs_of(experiment)) for experiment in experiments.values() for run in experiment.runs]
    for _, logs in todo:
        logs.mkdir(parents=True, exist_ok=True)
    make_all(todo, options)
    with ThreadPoolExecutor(len(experiments)) as pool:
        made = pool.map(lambda name: (name, reported(name, experiments[name], options)), experiments)
        record["experiments"] |= {name: report for name, report in made if report}
    if missing := [name for name in experiments if name not in record["experiments"]]:
        print(f"no run was begun within {options.limit} s: {', '.join(missing)}", file=sys.stderr)
    text = to_json(record).replace(f"{options.work}/", "").replace(f"{options.model}", options.model.name)
    write_atomically(options.output, text + "\n")
    failed = any(each["exit_code"] for each in record["experiments"].values())
    return int(failed or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
