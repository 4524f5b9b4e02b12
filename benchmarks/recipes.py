"""Run the recipes of chat models at their models' real shapes, with random weights, for a few steps on one GPU each.

    python benchmarks/recipes.py --output result.json
    python benchmarks/recipes.py --output result.json --recipes smollm2_135m --layers smollm2_135m=2  # no GPU

Rows have the lengths of Dolly-15k; tokenizer and template are stand-ins. The recipes run side by side on the GPUs that
there are, so this shows that they run, how, and in how much memory, and not how fast.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from shapes import SHAPES, config_of
from synthetic import SHAPES as SYNTHETIC
from synthetic import sample_lengths, trained_tokenizer

from distft.files import to_json, write_atomically
from distft.paths import packaged
from distft.runs.folder import RunFolder

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
FIGURES = (
    "status",
    "attn_implementation",
    "fused_linears",
    "adapted_linears",
    "changed_for_you",
    "isolation_errors",
    "isolation_check_s",
    "parameters_trained",
    "peak_memory_gib",
    "samples_per_second",
    "train_loss",
)
_BUILDING = threading.Lock()


def write_rows(path: Path, count: int) -> None:
    """Write `count` instructions whose answers have as many words as samples of Dolly-15k have tokens."""
    words = packaged("assets/tiny_corpus.txt").read_text(encoding="utf-8").split()
    generator = np.random.default_rng(0)
    lengths = sample_lengths(SYNTHETIC["llama-2-7b"], count, generator)
    with path.open("w", encoding="utf-8") as file:
        for length, start in zip(lengths, generator.integers(0, len(words) // 2, count), strict=True):
            text = " ".join(words[start : start + length])
            file.write(json.dumps({"instruction": "Go on.", "context": "", "response": text}) + "\n")


def build(recipe: str, folder: Path, tokenizer: Path, layers: int | None) -> None:
    """Save a model of the recipe's shape with random weights, and the tokenizer with a chat template."""
    from transformers import AutoModelForCausalLM

    with _BUILDING:
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config_of(recipe, layers), dtype=torch.bfloat16)
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        model.to("meta")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    model.save_pretrained(folder, state_dict=weights)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def run(recipe: str, gpu: int, options: argparse.Namespace, layers: int | None) -> dict[str, Any]:
    """Build the model, train it for a few steps as a user would, and return what the run folder says."""
    folder, began = options.work / recipe, time.monotonic()
    try:
        build(recipe, folder, options.work / "tokenizer", layers)
        built = time.monotonic()
        words = [
            f"recipe={recipe}",
            f"model.name={folder}",
            f"data.path={options.work / 'rows.jsonl'}",
            f"training.max_steps={options.steps}",
            "training.logging_steps=1",
            "training.eval_strategy=no",
            "training.save_strategy=no",
            "tracking.throughput_warmup_steps=1",
            "tracking.report_to=[]",
            "evaluation.before_and_after=false",
            f"run.dir={options.work / 'runs'}",
            *options.set,
        ]
        command = [sys.executable, "-m", "distft.cli", "train", "--nproc", "1", *words]
        done = subprocess.run(
            command,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
            capture_output=True,
            text=True,
            timeout=options.limit,
        )
        found = RunFolder(options.work / "runs" / recipe)
        summary = found.read_summary() if found.summary.is_file() else {}
        losses = [record["loss"] for record in found.read_metrics() if "loss" in record] if summary else []
        return {
            "recipe": recipe,
            "layers": layers or config_of(recipe).get_text_config().num_hidden_layers,
            "whole": layers is None,
            "exit_code": done.returncode,
            "message": done.stderr[-1500:] if done.returncode else "",
            "words": [word for word in words if not word.startswith(("model.", "data.", "run."))],
            "built_s": round(built - began, 1),
            "ran_s": round(time.monotonic() - built, 1),
            "losses": losses,
            **{name: summary.get(name) for name in FIGURES},
        }
    except (OSError, subprocess.TimeoutExpired, torch.cuda.OutOfMemoryError) as error:
        return {"recipe": recipe, "exit_code": -1, "message": str(error)[-500:]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[*SHAPES], choices=SHAPES)
    parser.add_argument("--layers", nargs="*", default=[], metavar="RECIPE=N", help="fewer layers than the model has")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time on a GPU")
    parser.add_argument("--work", type=Path, default=Path("/tmp/distft-recipes"))
    parser.add_argument("--limit", type=int, default=600, help="time limit of a run, in seconds")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    layers = {name: int(number) for name, number in (each.split("=") for each in options.layers)}
    options.work.mkdir(parents=True, exist_ok=True)
    write_rows(options.work / "rows.jsonl", 64 * (options.steps + 2) * 2)
    trained_tokenizer(options.work / "tokenizer", options.work / "rows.jsonl", 8_000)
    gpus: queue.Queue[int] = queue.Queue()
    for _ in range(options.at_once):
        for gpu in range(max(torch.cuda.device_count(), 1)):
            gpus.put(gpu)
    record: dict[str, Any] = {**provenance(__file__, options.commit), "runs": []}

    def one(recipe: str) -> int:
        gpu = gpus.get()
        try:
            found = run(recipe, gpu, options, layers.get(recipe))
        finally:
            gpus.put(gpu)
        record["runs"].append(found)
        write_atomically(options.output, to_json(record) + "\n")
        return int(found["exit_code"])

    with ThreadPoolExecutor(gpus.qsize()) as pool:
        return max(abs(code) for code in pool.map(one, options.recipes))


if __name__ == "__main__":
    sys.exit(main())
