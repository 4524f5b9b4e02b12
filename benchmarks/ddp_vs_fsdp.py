"""DDP against FSDP2 as a user compares them: `distft compare` with our settings and with those of the public report, on real rows.

    python benchmarks/ddp_vs_fsdp.py --rows dolly.jsonl --output result.json
    python benchmarks/ddp_vs_fsdp.py --rows dolly.jsonl --shape tiny --experiments ddp_vs_fsdp --repeats 1 --output result.json  # no GPU

The model has Llama-2-7B's shape and random weights, the tokenizer is trained on the rows. The rows are repeated until a run has as many
as it takes. What stands in the result is each experiment's own report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import synthetic
import torch

from distft.machine import describe
from distft.run import to_json, write_atomically

STEPS = {"ddp_vs_fsdp": 50, "ddp_vs_fsdp_published": 20}


def repeated(rows: Path, count: int, work: Path) -> Path:
    """A file of at least `count` rows: those of `rows`, over and over."""
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    path = work / "rows.jsonl"
    path.write_text("".join(lines * -(-count // len(lines))), encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="rows in Dolly's schema, a .jsonl file")
    parser.add_argument("--experiments", nargs="+", default=[*STEPS], choices=STEPS)
    parser.add_argument("--steps", type=int, help="of every run, in place of 50 and 20")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default="llama-2-7b", choices=synthetic.SHAPES)
    parser.add_argument("--work", type=Path, default=Path("/tmp/distft-ddp-vs-fsdp"))
    parser.add_argument("--limit", type=int, default=3600, help="seconds for one experiment")
    parser.add_argument("--commit", default="", help="the commit measured, where there is no git")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    shape = synthetic.SHAPES[options.shape]
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = synthetic.trained_tokenizer(
        options.work / "tokenizer", options.rows, min(16_000, shape.config["vocab_size"])
    )
    model = synthetic.model(options.work, shape)
    commit = (
        options.commit or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    )
    record = {
        "program": "benchmarks/ddp_vs_fsdp.py", "commit": commit, "shape": shape.name, "experiments": {},
        "environment": {key: value for key, value in describe().items() if key not in ("command", "working_folder")},
    }  # fmt: skip
    worst = 0
    for name in options.experiments:
        steps = options.steps or STEPS[name]
        # A tenth of the rows is held out; a step has 64.
        rows = repeated(options.rows, -(-steps * 64 * 10 // 8), options.work)
        folder = options.work / f"runs-{time.time_ns()}"
        arguments = [
            f"experiment={name}", f"model.name={model}", f"model.tokenizer={tokenizer}", f"data.path={rows}", f"training.max_steps={steps}",
            "training.logging_steps=5", f"run.dir={folder}", "tracking.report_to=[]", *options.set,
        ]  # fmt: skip
        command = [sys.executable, "-m", "distft.cli", "compare", *arguments, "--repeats", str(options.repeats)]
        if not torch.cuda.is_available():
            command += ["--nproc", "2"]
        start = time.perf_counter()
        code = subprocess.run(command, timeout=options.limit).returncode
        worst = worst or code
        report = folder / f"{name}.json"
        record["experiments"][name] = {
            "command": " ".join(["distft compare", *arguments, "--repeats", str(options.repeats)]), "exit_code": code,
            "wall_s": time.perf_counter() - start, "steps": steps, "rows_repeated": True,
            "report": json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None,
        }  # fmt: skip
        write_atomically(options.output, to_json(record) + "\n")
    return worst


if __name__ == "__main__":
    sys.exit(main())
