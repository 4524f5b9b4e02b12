"""Run recipes on GPUs: a few steps on real rows, on a model with the shape of Llama-2-7B and random weights.

    python benchmarks/main_job.py --rows dolly.jsonl --recipes ddp_qlora fsdp_bf16 --steps 20 --output result.json

Every run is started as a user starts it (`accelerate launch -m distft.train recipe=…`), one after the other; figures
come from its run folder. This shows that the recipes run and what they need, not which is faster, which would take
interleaved repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from synthetic import LLAMA_2_7B, trained_tokenizer

from distft.files import to_json, write_atomically
from distft.runs.folder import RunFolder


def build(folder: Path, rows: Path, layers: int) -> None:
    """Save a model with random bf16 weights and a tokenizer trained on the rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    trained_tokenizer(folder, rows, 16_000)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**{**LLAMA_2_7B, "num_hidden_layers": layers}), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)


def run(recipe: str, arguments: list[str], work: Path, limit_s: int) -> dict[str, Any]:
    """Run one recipe; returns its command, exit code, wall-clock time in seconds and summary."""
    arguments = ["-m", "distft.train", f"recipe={recipe}", *arguments]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    runs = work / "runs" / f"{recipe}-{time.time_ns()}"
    log = runs.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            [*command, f"run.dir={runs}"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = -1
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    result: dict[str, Any] = {
        "recipe": recipe,
        "command": " ".join(["accelerate launch", *arguments]),
        "exit_code": code,
        "wall_s": time.perf_counter() - start,
    }
    folders = sorted(runs.iterdir()) if runs.is_dir() else []
    if folders:
        result["summary"] = RunFolder(folders[0]).read_summary()
        result["metrics"] = RunFolder(folders[0]).read_metrics()
    if code != 0:
        result["log_end"] = log.read_text(encoding="utf-8", errors="replace")[-2500:]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="rows in Dolly's schema, a .jsonl file")
    parser.add_argument("--recipes", nargs="+", default=["ddp_qlora", "fsdp_bf16"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--layers", type=int, default=LLAMA_2_7B["num_hidden_layers"], help="number of layers; fewer for a quick trial"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/distft-main-job"))
    parser.add_argument("--limit", type=int, default=240, help="time limit of one run, in seconds")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    shape = options.work / f"llama-2-7b-shape-{options.layers}"
    if not shape.exists():
        aside = shape.with_suffix(".building")
        build(aside, options.rows, options.layers)
        aside.rename(shape)
    arguments = [
        f"model.name={shape}",
        f"data.path={options.rows.resolve()}",
        f"training.max_steps={options.steps}",
        "training.logging_steps=1",
        "training.save_strategy=no",
        "training.eval_strategy=no",
        "tracking.report_to=[]",
        *options.set,
    ]
    record: dict[str, Any] = {**provenance(__file__, options.commit), "runs": []}
    for recipe in options.recipes:
        result = run(recipe, arguments, options.work, options.limit)
        record["runs"].append(result)
        write_atomically(options.output, to_json(record) + "\n")
        summary = result.get("summary", {})
        keys = (
            "status",
            "strategy",
            "world_size",
            "train_loss",
            "samples_per_second",
            "tokens_per_second",
            "mfu",
            "peak_memory_gib",
            "energy_j",
        )
        print(
            recipe,
            result["exit_code"],
            f"{result['wall_s']:.0f} s",
            json.dumps({key: summary.get(key) for key in keys}),
            flush=True,
        )
        if result["exit_code"] != 0:
            print(result["log_end"], flush=True)
    return 0 if all(result["exit_code"] == 0 for result in record["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
