"""Measure what Python's garbage collector costs: runs that freeze existing objects before step 1, and runs that do not.

    python benchmarks/pauses.py --rows dolly.jsonl --recipe fsdp_bf16 --repeats 3 --output result.json
    python benchmarks/pauses.py --rows dolly.jsonl --shape tiny --steps 10 --repeats 1 --output result.json  # no GPU

Every run is `distft train` on random weights; the two sides alternate. The record has the speed of each run and, for
every process, the pauses of at least 20 ms after `gc.freeze`: seconds since the freeze, collected generation,
duration. A pause within the first milliseconds is a collection that the trainer requests before step 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import synthetic
import torch
from ddp_vs_fsdp import inputs, run_command, write
from provenance import provenance

from distft.runs.folder import RunFolder

SIDES = {"frozen": "yes", "not frozen": "no"}
WATCH = Path(__file__).parent / "watch"
KEPT = ("samples_per_second", "step_time_s", "measured_steps", "train_time_s", "train_loss", "eval_after")


def run(side: str, words: list[str], folder: Path, limit_s: float) -> dict[str, Any]:
    """Train once in `folder`; returns the speed and the pauses of each rank."""
    environment = {
        "PAUSES_FREEZE": SIDES[side],
        "PAUSES_FILE": f"{folder}-rank",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(WATCH), os.environ.get("PYTHONPATH")))),
    }
    for left in folder.parent.glob(f"{folder.name}-rank*.jsonl"):  # left by an earlier run of the same name
        left.unlink()
    command = [
        sys.executable,
        "-m",
        "distft.cli",
        "train",
        *words,
        f"run.dir={folder.parent}",
        f"run.name={folder.name}",
    ]
    with Path(f"{folder}.log").open("w", encoding="utf-8") as log:
        code = run_command(command, environment, limit_s, log)
    result: dict[str, Any] = {"side": side, "exit_code": code, "pauses": {}}
    for path in sorted(folder.parent.glob(f"{folder.name}-rank*.jsonl")):
        rank = path.stem.removeprefix(f"{folder.name}-")
        result["pauses"][rank] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if code == 0:
        summary = RunFolder(folder).read_summary()
        result |= {key: summary[key] for key in KEPT}
        result["log"] = [
            {key: row[key] for key in ("step", "time_s", "samples_per_second")}
            for row in RunFolder(folder).read_metrics()
            if "time_s" in row
        ]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="rows in Dolly's schema, a .jsonl file")
    parser.add_argument("--recipe", default="fsdp_bf16")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default="llama-2-7b", choices=synthetic.SHAPES)
    parser.add_argument("--work", type=Path, default=Path("/tmp/distft-pauses"))
    parser.add_argument("--limit", type=int, default=600, help="time limit of one run, in seconds")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    shape = synthetic.SHAPES[options.shape]
    words = [
        f"recipe={options.recipe}",
        *inputs(options.work, shape, options.rows, options.steps),
        "training.logging_steps=5",
        "training.eval_strategy=no",
        "training.save_strategy=no",
        "lora.lora_dropout=0.0",
        "evaluation.max_samples=32",
        "tracking.report_to=[]",
        *options.set,
    ]
    if not torch.cuda.is_available():
        words += ["--nproc", "2"]
    record: dict[str, Any] = {
        **provenance(__file__, options.commit),
        "shape": shape.name,
        "overrides": words,
        "runs": [],
    }
    for turn in range(options.repeats):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            result = run(side, words, options.work / f"{side.replace(' ', '-')}-{turn}", options.limit)
            record["runs"].append(result)
            write(record, options.work, options.output)
            print(side, result["exit_code"], result.get("samples_per_second"), result["pauses"], flush=True)
    return next((result["exit_code"] for result in record["runs"] if result["exit_code"]), 0)


if __name__ == "__main__":
    sys.exit(main())
