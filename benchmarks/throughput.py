"""Compare distft with its references: samples/s, tokens/s, MFU, memory and energy, in interleaved runs.

    python benchmarks/throughput.py --cases ddp_qlora fsdp_bf16 --repeats 3 --output result.json --markdown result.md
    python benchmarks/throughput.py --shape tiny --cases ddp_qlora --steps 2 --warmup 1 --repeats 1 \\
        --output result.json   # no GPU

A case is a recipe, started as a user starts it, and the references it is compared with; naming a case runs both,
interleaved as A B C A B C …. All train on the same rows, and the work that each reports is compared step by step.
Figures cover the steps after the warm-up of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import synthetic
import torch
from cases import CASES, REFERENCES, Case, Reference
from comparison import compare, table
from provenance import provenance
from workload import Workload, cumulative

from distft.config.recipe import load_recipe
from distft.files import to_json, write_atomically
from distft.hardware import GIB, device_flops
from distft.runs.folder import RunFolder
from distft.training.beside import free_port

SCRIPTS = Path(__file__).parent / "references"
MARK = "DISTFT_BENCHMARK_RUN"
"""Environment variable set in every process of a run. torchrun starts each worker in its own session, so workers are
not in the launcher's process group and survive a launcher that dies."""


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """Starts the runs of this benchmark, one at a time."""

    options: argparse.Namespace
    workload: Workload
    flops: float | None

    def case(self, name: str, case: Case) -> dict[str, Any]:
        """Run distft; figures come from its run folder."""
        options, total = self.options, self.options.warmup + self.options.steps
        folder = options.work / "runs" / f"{name}-{time.time_ns()}"
        # distft always logs at the end of the warm-up; the next record is that of the last step.
        overrides = [
            *self.workload.overrides(case.batch),
            f"training.max_steps={total}",
            f"training.logging_steps={total}",
            f"tracking.throughput_warmup_steps={options.warmup}",
            *case.overrides,
            *options.set,
        ]
        if not torch.cuda.is_available() and load_recipe([f"recipe={case.recipe}", *case.overrides]).bits == 4:
            overrides.append("quantization.bnb_4bit_compute_dtype=float32")
        arguments = [f"recipe={case.recipe}", *overrides]
        processes = self.processes(case.gpus)
        order = self.workload.order(load_recipe(arguments), processes, total)
        several = ["--multi_gpu", "--main_process_port", str(free_port())] if processes > 1 else []
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *several,
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "-m",
            "distft.train",
            *arguments,
            f"run.dir={folder}",
        ]
        shown = ["accelerate launch", *command[3:]]
        result = self.run(name, command, shown, case.gpus, {})
        if result["exit_code"] == 0:
            (path,) = folder.iterdir()
            result |= self.of_folder(RunFolder(path))
        return self.with_figures(result, order, processes)

    def of_folder(self, folder: RunFolder) -> dict[str, Any]:
        """The work of a distft run in the steps after its warm-up."""
        summary = folder.read_summary()
        records = [record for record in folder.read_metrics() if "samples" in record]
        zero = {"step": 0, "samples": 0, "tokens": 0, "energy_j": records[-1]["energy_j"] and 0.0}
        start = next((record for record in records if record["step"] == self.options.warmup), zero)
        end = records[-1]
        samples, tokens = end["samples"] - start["samples"], end["tokens"] - start["tokens"]
        joules = None if end["energy_j"] is None else end["energy_j"] - start["energy_j"]
        kept = (
            "strategy",
            "attn_implementation",
            "micro_batch_tokens",
            "gradient_accumulation_steps",
            "changed_for_you",
        )
        return {
            "work": {record["step"]: [record["samples"], record["tokens"]] for record in records},
            "samples": samples,
            "tokens": tokens,
            "seconds": samples / summary["samples_per_second"],
            "peak_memory_gib": summary["peak_memory_gib"],
            "energy_j": joules,
            "train_loss": summary["train_loss"],
            "settings": {key: summary[key] for key in kept},
            **({"profile": json.loads(folder.profile.read_text(encoding="utf-8"))} if folder.profile.is_file() else {}),
        }

    def reference(self, name: str, reference: Reference) -> dict[str, Any]:
        """Run a reference; figures come from the line that it prints."""
        options = self.options
        total = options.reference_warmup + options.reference_steps
        processes = self.processes(reference.gpus)
        recipe = load_recipe(
            ["recipe=ddp_qlora", *self.workload.overrides(reference.batch), f"training.max_steps={total}"]
        )
        order = self.workload.order(recipe, processes, total)
        file = options.work / f"order-{name}.json"
        write_atomically(file, json.dumps(order))
        script = str(SCRIPTS / reference.script)
        arguments = [
            *reference.command(self.workload.shape),
            "--model",
            str(self.workload.model),
            "--rows",
            str(self.workload.rows),
            "--order",
            str(file),
            "--steps",
            str(options.reference_steps),
            "--warmup",
            str(options.reference_warmup),
        ]
        environment: dict[str, str] = {}
        if "unsloth" in reference.script:
            launcher, shown = [sys.executable], ["python"]
            environment = _first_on_path(options.unsloth, os.environ) if options.unsloth else {}
        else:
            flags = ["--nproc-per-node", str(processes), "--master-port", str(free_port())]
            launcher, shown = [sys.executable, "-m", "torch.distributed.run", *flags], ["torchrun", *flags[:2]]
        result = self.run(
            name,
            [*launcher, script, *arguments],
            [*shown, f"benchmarks/references/{reference.script}", *arguments],
            reference.gpus,
            environment,
        )
        if result["exit_code"] == 0:
            result |= result.pop("line")
            result["work"] = cumulative(result.pop("steps"))
        return self.with_figures(result, order, processes)

    def processes(self, gpus: int) -> int:
        return min(gpus, torch.cuda.device_count() or self.options.processes)

    def run(
        self, name: str, command: list[str], shown: list[str], gpus: int, environment: Mapping[str, str]
    ) -> dict[str, Any]:
        """Run `command` until it ends or reaches its time limit; leaves no process behind."""
        run = f"{name}-{time.time_ns()}"
        log = self.options.work / "logs" / f"{run}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **environment, MARK: run}
        if gpus == 1 and torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as output:
            child = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
            try:
                code = child.wait(timeout=self.options.limit)
                failure = f"exit code {code}" if code else None
            except subprocess.TimeoutExpired:
                code, failure = -1, f"not done after {self.options.limit} s"
            finally:
                end_all(run)
                child.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
        result: dict[str, Any] = {
            "name": name,
            "command": " ".join(shown),
            "exit_code": code,
            "failure": failure,
            "wall_s": time.perf_counter() - start,
        }
        lines = [line for line in text.splitlines() if line.startswith('{"reference"')]
        if lines:
            result["line"] = json.loads(lines[-1])
        if code:
            result["failure"] = result.pop("line", {}).get("refused", failure)
            if "out of memory" in text.lower():
                result["failure"] = f"out of memory ({failure})"
            result["log_end"] = text[-5000:]  # the launcher's own messages take about 2,000 of these
        return result

    def with_figures(self, result: dict[str, Any], order: list[dict[str, Any]], processes: int) -> dict[str, Any]:
        """Add the rates to `result`, and whether it did the work of `order` (None if it did not finish)."""
        expected = cumulative([[len(step["samples"]), step["tokens"]] for step in order])
        if result["exit_code"]:
            return {**result, "expected": expected, "same_work": None}
        seconds, samples, joules = result["seconds"], result["samples"], result["energy_j"]
        tokens_per_second, peak = result["tokens"] / seconds, result["peak_memory_gib"]
        rates = {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * 4 * self.workload.shape.parameters / (processes * self.flops)
            if self.flops
            else None,
            "peak_memory_gb": None if peak is None else peak * GIB / 1e9,
            "watts": None if joules is None else joules / seconds,
            "joules_per_1000_samples": None if joules is None else joules / samples * 1e3,
        }
        work = result["work"]
        return {
            **result,
            **rates,
            "expected": expected,
            "same_work": bool(work) and all(expected[step] == work[step] for step in work),
        }


def _first_on_path(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that make Python and the dynamic loader search `folder` first."""
    places = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder / "lib")}
    return {key: ":".join(filter(None, (place, environment.get(key)))) for key, place in places.items()}


def end_all(run: str) -> None:
    """Kill every process marked as part of `run`, and wait until they are gone."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == run:
                process.send_signal(signal.SIGKILL)
                found.append(process)
        except psutil.Error:  # another user's, or gone
            continue
    psutil.wait_procs(found, timeout=30)


# ---- the whole -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=["ddp_qlora", "fsdp_bf16", "ddp_bf16"],
        metavar="CASE",
        help=", ".join(CASES),
    )
    parser.add_argument(
        "--without",
        nargs="*",
        choices=REFERENCES,
        default=[],
        metavar="REFERENCE",
        help=f"references to leave out, of {', '.join(REFERENCES)}",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3, help="optimizer steps before the measurement")
    parser.add_argument("--steps", type=int, default=10, help="measured optimizer steps")
    parser.add_argument(
        "--reference-steps", type=int, help="measured steps of references, if they are slow (default: --steps)"
    )
    parser.add_argument("--reference-warmup", type=int, help="warm-up steps of references (default: --warmup)")
    parser.add_argument("--shape", choices=synthetic.SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="number of layers; fewer for a quick trial")
    parser.add_argument("--rows", type=int, default=4096, help="rows of the data; an epoch has rows / 64 steps")
    parser.add_argument("--processes", type=int, default=2, help="maximum number of processes without a GPU")
    parser.add_argument(
        "--unsloth", type=Path, help="folder with Unsloth and its dependencies, shared libraries in lib/"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/distft-throughput"))
    parser.add_argument("--limit", type=int, default=240, help="time limit of one run, in seconds")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run of distft")
    parser.add_argument("--output", type=Path, required=True, help="a .json file, rewritten after every run")
    parser.add_argument("--markdown", type=Path, help="a .md file for the tables")
    options = parser.parse_args()
    options.reference_steps = options.reference_steps or options.steps
    options.reference_warmup = options.warmup if options.reference_warmup is None else options.reference_warmup
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)

    shape = synthetic.SHAPES[options.shape].with_layers(options.layers)
    folder = synthetic.model(options.work, shape)
    workload = Workload(shape, folder, *synthetic.rows(options.work, shape, options.rows))
    runner = Runner(options, workload, device_flops())
    chosen = list(dict.fromkeys(options.cases))
    compared = {name: [other for other in CASES[name].references if other not in options.without] for name in chosen}
    references = list(dict.fromkeys(other for others in compared.values() for other in others))
    # Cases with the same number of GPUs are compared with each other as well.
    pairs = {
        name: [*compared[name], *(other for other in chosen[:number] if CASES[other].gpus == CASES[name].gpus)]
        for number, name in enumerate(chosen)
    }
    record: dict[str, Any] = {
        **provenance(__file__, options.commit),
        "shape": shape.name,
        "layers": shape.config["num_hidden_layers"],
        "parameters_without_embeddings": shape.parameters,
        "device_flops": runner.flops,
        "warmup_steps": options.warmup,
        "steps": options.steps,
        "reference_steps": options.reference_steps,
        "reference_warmup_steps": options.reference_warmup,
        "mean_tokens_of_a_sample": statistics.mean(workload.lengths.tolist()),
        "comparisons": [],
        "summary": {},
        "runs": [],
    }
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        for name in [*chosen, *references]:
            result = runner.case(name, CASES[name]) if name in CASES else runner.reference(name, REFERENCES[name])
            runs.append({"repeat": repeat, **result})
            record["runs"] = [{key: value for key, value in run.items() if key != "expected"} for run in runs]
            record["summary"], record["comparisons"] = compare(runs, pairs)
            write_atomically(options.output, to_json(record) + "\n")
            if options.markdown:
                write_atomically(options.markdown, table(record))
            shown = f"{result['samples_per_second']:.1f} samples/s" if not result["exit_code"] else result["failure"]
            print(f"{repeat + 1}/{options.repeats} {name}: {shown} ({result['wall_s']:.0f} s)", flush=True)
            if result["exit_code"]:
                print(result["log_end"], flush=True)
    print(table(record))
    return 0 if all(run["exit_code"] == 0 for run in record["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
