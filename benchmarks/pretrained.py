"""Shipped experiments on real weights and real rows: a small pretrained model in the place of those of 7B.

    python benchmarks/pretrained.py --model smollm2 --instructions alpaca.jsonl --reviews imdb.jsonl --output out.json
    python benchmarks/pretrained.py … --experiments rank --set training.max_steps=2  # proves a change, without a GPU

Runs that need one GPU share it with others, so losses, accuracies and peak memory count, and speeds do not. At the end
`distft compare --resume` finds every run made, and writes the report that the result holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from provenance import provenance

from distft.api.recipe import load_experiment
from distft.experiments.compare import Comparison
from distft.experiments.expand import Experiment, ExperimentRun
from distft.experiments.results import folder_of, logs_of, tasks_left
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
    "duel": (*REVIEWS, "training.learning_rate=5e-4", "training.max_steps=100"),
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


class Starter:
    """Starts runs, `places` processes at a time; those that need one GPU take turns among the GPUs."""

    def __init__(self, places: int, deadline: float) -> None:
        self.places, self.deadline = places, deadline
        self.gpus = torch.cuda.device_count()
        self._turns: Iterator[int] = itertools.cycle(range(max(self.gpus, 1)))
        self._free = threading.Condition()

    def processes(self, run: ExperimentRun) -> int:
        return 1 if run.recipe.strategy == "single" else 2

    def wait(self, run: ExperimentRun) -> None:
        """Wait until there are places for the run, and take them."""
        number = self.processes(run)
        with self._free:
            self._free.wait_for(lambda: self.places >= number)
            self.places -= number

    def make(self, run: ExperimentRun, logs: Path) -> None:
        """Train the run and evaluate it as its recipe says. What fails is in its log, and in the report."""
        number = self.processes(run)
        environment = {"CUDA_VISIBLE_DEVICES": str(next(self._turns))} if self.gpus and number == 1 else {}
        try:
            words = ["train", "--nproc", str(number), *run.arguments]
            if self._command(words, logs / f"{run.name}.log", environment) == 0 and tasks_left(run):
                folder = folder_of(run)
                assert folder is not None
                changes = [word for word in run.arguments if word.startswith("evaluation.")]
                words = ["evaluate", "--nproc", str(number), str(folder.path), *changes]
                self._command(words, logs / f"{run.name}.evaluation.log", environment)
        finally:
            with self._free:
                self.places += number
                self._free.notify_all()

    def _command(self, words: list[str], log: Path, environment: dict[str, str]) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            return 1
        with log.open("w", encoding="utf-8") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "distft.cli", *words],
                env=os.environ | environment,
                stdout=output,
                stderr=output,
            )
            try:
                return child.wait(left)
            except subprocess.TimeoutExpired:
                child.terminate()
                return child.wait()


def trimmed(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what follows from its runs."""
    kept = ("name", "variant", "status", "cause", "outcome", "world_size", "figures", "evaluation")
    runs = [{key: run.get(key) for key in kept} for run in report["runs"]]
    return {**report, "runs": runs, "variants": [each["name"] for each in report["variants"]]}


def reported(name: str, experiment: Experiment, options: argparse.Namespace) -> dict[str, Any]:
    """What the record has of an experiment, whose runs were made as far as time allowed."""
    words = ["compare", *words_of(name, options), "--resume"]
    if repeats := options.repeats or _REPEATS.get(name):
        words += ["--repeats", str(repeats)]
    if Comparison(experiment).complete:
        done = subprocess.run([sys.executable, "-m", "distft.cli", *words], capture_output=True, text=True)
        code, message = done.returncode, done.stderr[-1000:] if done.returncode else ""
    else:  # comparing would make the missing runs
        code, message = 1, "not all runs have a result"
        Comparison(experiment).write()
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
    parser.add_argument("--places", type=int, default=os.cpu_count() or 2, help="processes at the same time")
    parser.add_argument("--limit", type=int, default=3600, help="seconds after which no run goes on")
    parser.add_argument("--repeats", type=int, help="instead of one for each seed, or one")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    for name in ("model", "instructions", "reviews", "output"):
        setattr(options, name, getattr(options, name).absolute())

    starter = Starter(options.places, time.monotonic() + options.limit)
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
    todo.sort(key=lambda each: -starter.processes(each[0]))
    with ThreadPoolExecutor(len(todo)) as pool:
        for run, logs in todo:
            logs.mkdir(parents=True, exist_ok=True)
            starter.wait(run)
            pool.submit(starter.make, run, logs)
    with ThreadPoolExecutor(len(experiments)) as pool:
        record["experiments"] |= dict(
            zip(
                experiments, pool.map(lambda name: reported(name, experiments[name], options), experiments), strict=True
            )
        )
    text = to_json(record).replace(f"{options.work}/", "").replace(f"{options.model}", options.model.name)
    write_atomically(options.output, text + "\n")
    return max(each["exit_code"] for each in record["experiments"].values())


if __name__ == "__main__":
    sys.exit(main())
