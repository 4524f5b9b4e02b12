"""Measure the overhead per step of the heartbeat, the agreement on stopping, and verified checkpoints.

    python benchmarks/overhead.py --repeats 3 --output benchmarks/results/overhead_cpu.json

Runs of the embedded model on two processes with a checkpoint per epoch. Heartbeat and stop check are left out of
every other step, so one run has steps with and without them; the time inside them is measured as well, because it is
far below the variation between steps. For each save: the time of the trainer's own write, what distft adds while
training waits, and the hashing in the background.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import provenance

from distft.files import to_json, write_atomically
from distft.training.beside import free_port

OVERRIDES = [
    "recipe=tiny",
    "training.num_train_epochs=10",
    "training.eval_strategy=no",
    "training.save_strategy=epoch",
    "training.save_total_limit=1",
    "tracking.report_to=[]",
    "evaluation.before_and_after=false",
]
LEFT_OUT = 5  # steps after the start and after a save that do not count


def work(output: Path) -> None:
    """Run one rank with instrumentation; writes its times, in seconds, to `output`."""
    from transformers import TrainerCallback

    from distft.runs import manifest
    from distft.training import trainer
    from distft.training.checkpoints import Checkpoints
    from distft.training.run import train
    from distft.training.stopping import StopTogether
    from distft.training.watchdog import Watchdog

    times: dict[str, list[float]] = {name: [] for name in ("with", "without", "inside", "save", "waiting", "hashing")}
    now = {"on": True, "inside": 0.0, "began": 0.0, "step": 0, "saved": 0}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measure(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                times[name].append(time.perf_counter() - start)

        return measure

    def switched(cls: type, *events: str) -> None:
        for event in events:
            original = getattr(cls, event)

            def call(*args: Any, original: Callable[..., None] = original, **kwargs: Any) -> None:
                if now["on"]:
                    start = time.perf_counter()
                    original(*args, **kwargs)
                    now["inside"] += time.perf_counter() - start

            setattr(cls, event, call)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now["on"], now["inside"], now["began"] = state.global_step % 2 == 0, 0.0, time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step > now["saved"] + LEFT_OUT:
                times["with" if now["on"] else "without"].append(time.perf_counter() - now["began"])
                if now["on"]:
                    times["inside"].append(now["inside"])

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now["saved"] = state.global_step

    class Trainer(trainer.Trainer):
        def __init__(self, *args: Any, callbacks: list[Any], **kwargs: Any) -> None:
            # The clock starts before all other callbacks and stops after them.
            super().__init__(*args, callbacks=callbacks, **kwargs)
            clock = Clock()
            self.callback_handler.callbacks.insert(0, _Only(clock, "on_step_begin"))
            self.callback_handler.callbacks.append(_Only(clock, "on_step_end", "on_save"))

    class _Only(TrainerCallback):  # type: ignore[misc]
        def __init__(self, inner: Any, *events: str) -> None:
            for event in events:
                setattr(self, event, getattr(inner, event))

    switched(Watchdog, "on_step_begin", "on_step_end")
    switched(StopTogether, "on_step_begin", "on_step_end")
    original_save = Checkpoints.save

    def save(self: Any, state: Any, model: Any, optimizer: Any, write: Callable[[], None]) -> None:
        """Time the whole save; everything but the trainer's own write is distft's overhead."""
        start, written = time.perf_counter(), 0.0

        def timed_write() -> None:
            nonlocal written
            begun = time.perf_counter()
            write()
            written = time.perf_counter() - begun

        original_save(self, state, model, optimizer, timed_write)
        times["save"].append(time.perf_counter() - start)
        times["waiting"].append(times["save"][-1] - written)

    Checkpoints.save = save
    manifest.write = timed("hashing", manifest.write)
    trainer.Trainer = Trainer
    train([*OVERRIDES, f"run.dir={output.parent / 'runs'}"])
    rank = os.environ.get("RANK", "0")
    output.with_suffix(f".{rank}").write_text(json.dumps(times))


def spread(values: list[float], unit: float = 1e3) -> dict[str, float | int]:
    """Median and quartiles of `values` in ms, and their number."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median_ms": middle * unit, "q1_ms": low * unit, "q3_ms": high * unit, "count": len(values)}


def measure(where: Path) -> dict[str, Any]:
    """Measure one run: the spread of each time on rank 0, and the overhead as fractions of a step."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        str(free_port()),
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        str(Path(__file__).resolve()),
        "--worker",
        str(where / "times"),
    ]
    subprocess.run(command, check=True, cwd=where)
    times = json.loads((where / "times.0").read_text())
    step, saves = statistics.median(times["without"]), len(times["save"])
    steps_a_save = 200 / saves
    return {
        "step_with": spread(times["with"]),
        "step_without": spread(times["without"]),
        "inside_callbacks": spread(times["inside"]),
        "save": spread(times["save"]),
        "save_added_wait": spread(times["waiting"]),
        "hashing_beside": spread(times["hashing"]),
        "difference_of_medians_share": statistics.median(times["with"]) / step - 1,
        "inside_callbacks_share": statistics.mean(times["inside"]) / step,
        "save_added_wait_share": statistics.mean(times["waiting"]) / (steps_a_save * step),
        "save_added_wait_of_write": sum(times["waiting"]) / (sum(times["save"]) - sum(times["waiting"])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overhead_cpu.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return 0
    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    runs = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as where:
            runs.append(measure(Path(where)))
        print(json.dumps(runs[-1]), flush=True)
    shares = [key for key in runs[0] if "_share" in key or key == "save_added_wait_of_write"]
    result = {
        **provenance(__file__),
        "overrides": OVERRIDES,
        "processes": 2,
        "of_all_repeats": {key: [run[key] for run in runs] for key in shares},
        "repeats": runs,
    }
    write_atomically(options.output, to_json(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
