"""Measure how much the speed of identical runs varies: the noise that a comparison has to overcome.

    python benchmarks/noise.py --runs 16 --output benchmarks/results/noise_cpu.json

Runs of the embedded model, one process each, one after the other, with the load of the machine; no run is left out.
`tests/test_stats.py` uses the record.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import provenance

from distft.files import to_json, write_atomically
from distft.runs.folder import RunFolder

OVERRIDES = [
    "recipe=tiny",
    "strategy=single",
    "evaluation.before_and_after=false",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.save_strategy=no",
    "tracking.report_to=[]",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    overrides = [*OVERRIDES, f"training.max_steps={options.steps}"]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="distft-noise-") as folder:
        for number in range(options.runs):
            words = [*overrides, f"run.dir={folder}", f"run.name=run{number}"]
            subprocess.run(
                [sys.executable, "-m", "distft.cli", "train", *words],
                check=True,
                capture_output=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            summary = RunFolder(Path(folder) / f"run{number}").read_summary()
            runs.append(
                {
                    "samples_per_second": summary["samples_per_second"],
                    "train_time_s": summary["train_time_s"],
                    "load_of_the_last_minute": os.getloadavg()[0],
                }
            )
            print(runs[-1], flush=True)
    logs = [math.log(run["samples_per_second"]) for run in runs]
    record = {
        **provenance(__file__),
        "overrides": overrides,
        "standard_deviation_of_log_samples_per_second": statistics.stdev(logs),
        "runs": runs,
    }
    write_atomically(options.output, to_json(record) + "\n")


if __name__ == "__main__":
    main()
