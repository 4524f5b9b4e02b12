"""Compare DDP with FSDP2 on real rows: `distft compare` with our settings and with those of the public report.

    python benchmarks/ddp_vs_fsdp.py --rows dolly.jsonl --output result.json
    python benchmarks/ddp_vs_fsdp.py --rows dolly.jsonl --output result.json --shape tiny --repeats 2 \\
        --experiments ddp_vs_fsdp  # no GPU

The model has the shape of Llama-2-7B and random weights; the tokenizer is trained on the rows, which are repeated as
often as a run needs. The result holds the report of each experiment. Runs stay in `--work`: repeating the command
with more `--repeats` makes only the missing ones, and experiments that are not named stay in the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import synthetic
import torch
from provenance import provenance

from distft.files import to_json, write_atomically

STEPS = {"ddp_vs_fsdp": 30, "ddp_vs_fsdp_published": 6}
RESHARD = {"FSDP_RESHARD_AFTER_FORWARD": "true"}
"""For the published settings: gather every layer for the forward pass and again for the backward pass."""


def inputs(work: Path, shape: synthetic.Shape, rows: Path, steps: int) -> list[str]:
    """Create model, tokenizer and data for a run of `steps` in `work`; returns the overrides that name them.

    `rows` are repeated until there are enough.
    """
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = synthetic.trained_tokenizer(work / "tokenizer", rows, min(16_000, shape.config["vocab_size"]))
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    count = -(-steps * 64 * 10 // 8)  # a tenth is held out; 64 per step
    path = work / f"rows-{steps}-steps.jsonl"
    path.write_text("".join(lines * -(-count // len(lines))), encoding="utf-8")
    model = synthetic.model(work, shape)
    return [f"model.name={model}", f"model.tokenizer={tokenizer}", f"data.path={path}", f"training.max_steps={steps}"]


def write(record: Mapping[str, Any], work: Path, output: Path) -> None:
    """Write `record` to `output`, with paths relative to `work`."""
    write_atomically(output, to_json(record).replace(f"{work}/", "") + "\n")


def run_command(command: list[str], environment: Mapping[str, str], limit_s: float, log: IO[str] | None = None) -> int:
    """Run `command` and return its exit code. At the limit it is terminated gracefully, so that it can still report."""
    child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(limit_s)
    child.terminate()
    return child.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="rows in Dolly's schema, a .jsonl file")
    parser.add_argument("--experiments", nargs="+", default=[*STEPS], choices=STEPS)
    parser.add_argument("--steps", type=int, help="steps of every run, instead of 30 and 6")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default="llama-2-7b", choices=synthetic.SHAPES)
    parser.add_argument("--work", type=Path, default=Path("/tmp/distft-ddp-vs-fsdp"))
    parser.add_argument("--limit", type=int, default=3600, help="time limit of one experiment, in seconds")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    shape = synthetic.SHAPES[options.shape]
    before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {"experiments": {}}
    record: dict[str, Any] = {
        **provenance(__file__, options.commit),
        "shape": shape.name,
        "rows_repeated": True,
        "experiments": before["experiments"],
    }
    worst = 0
    for name in options.experiments:
        steps = options.steps or STEPS[name]
        folder = options.work / f"runs-{name}"
        arguments = [
            f"experiment={name}",
            *inputs(options.work, shape, options.rows, steps),
            "training.logging_steps=5",
            "evaluation.max_samples=32",
            f"run.dir={folder}",
            "tracking.report_to=[]",
            *options.set,
        ]
        words = ["compare", *arguments, "--repeats", str(options.repeats), "--resume"]
        if not torch.cuda.is_available():
            words += ["--nproc", "2"]
        environment = RESHARD if name == "ddp_vs_fsdp_published" else {}
        code = run_command([sys.executable, "-m", "distft.cli", *words], environment, options.limit)
        worst = worst or code
        report = folder / f"{name}.json"
        record["experiments"][name] = {
            "command": " ".join([*(f"{key}={value}" for key, value in environment.items()), "distft", *words]),
            "exit_code": code,
            "steps": steps,
            "report": json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None,
        }
        write(record, options.work, options.output)
    return worst


if __name__ == "__main__":
    sys.exit(main())
