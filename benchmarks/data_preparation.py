"""Measure how fast rows become tokens, and the memory that it takes, against an older checkout.

    python benchmarks/data_preparation.py --baseline ../before --output benchmarks/results/data_preparation_cpu.json

Each measurement is a new process that prepares a file of instructions with an empty cache; `--baseline` names a
checkout whose code does the same on the same file, in turn. Memory is the largest sum, over the process and all its
children, of their resident pages without those that they share (PSS, /proc/PID/smaps_rollup), read ten times a second:
imports and tokenizer included. `anonymous` leaves out pages of memory-mapped files, which the kernel can drop.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from provenance import provenance

from distft.files import to_json, write_atomically

_PROGRAM = """
import json, sys, time
from distft.config.recipe import load_recipe
from distft.data.prepare import prepare_data
from distft.models.loading import load_tokenizer
recipe = load_recipe(sys.argv[1:])
tokenizer = load_tokenizer(recipe)
start = time.perf_counter()
report = prepare_data(recipe, tokenizer).report
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "tokens": sum(report.tokens.values()), "digest": report.digest}))
"""


def write_rows(file: Path, megabytes: int) -> None:
    """Instructions whose answers have 10 to 250 words of the embedded corpus."""
    assets = Path(__file__).parents[1] / "src/distft/assets"
    words = (assets / "tiny_corpus.txt").read_text(encoding="utf-8").split()
    numbers, written = random.Random(0), 0
    with file.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1_000_000:
            start, length = numbers.randrange(len(words) - 250), numbers.randrange(10, 250)
            row = {"instruction": " ".join(words[start : start + 12]), "context": "", "response": ""}
            row["response"] = " ".join(words[start : start + length])
            written += stream.write(json.dumps(row) + "\n")


class Memory(threading.Thread):
    """Follows the memory of a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self.peak_gib, self.anonymous_gib, self.ended = pid, 0.0, 0.0, False

    def run(self) -> None:
        while not self.ended:
            try:
                process = psutil.Process(self._pid)
                found = [self._of(each.pid) for each in [process, *process.children(recursive=True)]]
            except psutil.Error:
                found = []
            if found:
                self.peak_gib = max(self.peak_gib, sum(total for total, _ in found) / 2**20)
                self.anonymous_gib = max(self.anonymous_gib, sum(own for _, own in found) / 2**20)
            time.sleep(0.1)

    @staticmethod
    def _of(pid: int) -> tuple[int, int]:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            return 0, 0
        total, own = (re.search(rf"^{name}: +(\d+) kB", text, re.MULTILINE) for name in ("Pss", "Pss_Anon"))
        return (int(total[1]), int(own[1])) if total and own else (0, 0)


def measure(checkout: Path, file: Path, folder: Path, model: Path) -> dict[str, Any]:
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    path = os.pathsep.join(filter(None, (str(checkout / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "DISTFT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    words = [f"data.path={file}", f"model.name={model}", "training.max_length=1024"]
    before = os.times()
    load = os.getloadavg()[0]
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    memory = Memory(process.pid)
    memory.start()
    output, _ = process.communicate()
    memory.ended = True
    memory.join()
    if process.returncode:
        raise SystemExit(f"{checkout} failed")
    after = os.times()
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    shutil.rmtree(cache)
    return {
        "checkout": checkout.name,
        "megabytes": round(file.stat().st_size / 1e6),
        **found,
        "tokens_per_second": found["tokens"] / found["seconds"],
        "cpu_seconds_with_imports": after[2] + after[3] - before[2] - before[3],
        "peak_gib": memory.peak_gib,
        "peak_anonymous_gib": memory.anonymous_gib,
        "load_before": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="a checkout of an older version")
    parser.add_argument("--megabytes", type=int, default=20, help="size of the file that both prepare")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="megabytes of more files for memory alone")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--baseline-commit", default="", help="that of the older version, likewise")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    checkouts = [here, *([options.baseline.resolve()] if options.baseline else [])]
    from distft.models.tiny import tiny_model

    runs = []
    with tempfile.TemporaryDirectory(prefix="distft-data-", dir=options.output.parent) as name:
        folder = Path(name)
        file = folder / "rows.jsonl"
        plan = [(options.megabytes, checkout) for _ in range(options.repeats) for checkout in checkouts]
        written = 0
        for megabytes, checkout in [*plan, *((size, here) for size in options.sizes)]:
            if megabytes != written:
                write_rows(file, megabytes)
                written = megabytes
            runs.append(measure(checkout, file, folder, tiny_model()))
            print(json.dumps(runs[-1]), flush=True)

    def middle(checkout: Path, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[: len(plan)] if run["checkout"] == checkout.name)

    record = {**provenance(__file__, options.commit), "processes": len(os.sched_getaffinity(0)), "runs": runs}
    if options.baseline:
        git = ["git", "-C", str(options.baseline), "rev-parse", "HEAD"]
        found = options.baseline_commit or subprocess.run(git, capture_output=True, text=True).stdout.strip()
        record["baseline_commit"] = found
        for figure in ("tokens_per_second", "cpu_seconds_with_imports"):
            record[f"ratio_of_median_{figure}"] = middle(here, figure) / middle(options.baseline.resolve(), figure)
    write_atomically(options.output, to_json(record) + "\n")


if __name__ == "__main__":
    main()
