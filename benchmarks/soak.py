"""Inject random faults into real runs for a given time: do runs survive, at what cost, and with the same result?

    python benchmarks/soak.py --minutes 45 --output benchmarks/results/soak_cpu.json

Each run trains the embedded model on two processes and is interrupted again and again: one rank killed, all ranks
killed during a save, one rank suspended, a signal followed by the same command, the newest checkpoint damaged before
a kill. After the last fault the run finishes, and its losses and adapter are compared bit by bit with those of an
undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from provenance import provenance

from distft.files import to_json, write_atomically
from distft.runs import manifest
from distft.runs.folder import RunFolder
from distft.training.checkpoints import read_tensors

STRATEGIES = {"ddp": (), "fsdp": ("strategy=fsdp", "quantization.bnb_4bit_quant_storage=float32")}
SAVE_STEPS = 5
LIMIT_S = 180  # of every wait


def overrides(strategy: str, steps: int) -> list[str]:
    return [
        "recipe=tiny",
        f"training.max_steps={steps}",
        "training.logging_steps=1",
        "training.eval_strategy=no",
        "training.save_strategy=steps",
        f"training.save_steps={SAVE_STEPS}",
        "training.save_total_limit=3",
        "tracking.report_to=[]",
        "evaluation.max_samples=8",
        "run.hang_timeout_s=4",
        "run.max_restarts=100000",
        *STRATEGIES[strategy],
    ]


class Job:
    """One run, restarted by the same command as often as necessary."""

    def __init__(self, where: Path, strategy: str, steps: int) -> None:
        where.mkdir(parents=True)
        self.where, self.strategy, self.steps = where, strategy, steps
        self.restarts = 0  # the number that the summary must reach
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "distft.cli", "train", *overrides(self.strategy, self.steps), "--nproc", "2"]
        with (self.where / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.where, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def folder(self) -> RunFolder:
        (path,) = (self.where / "runs").iterdir()
        return RunFolder(path)

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "distft.train" in child.cmdline() and "accelerate.commands.launch" not in child.cmdline():
                    found[int(child.environ()["RANK"])] = child
            except (psutil.Error, KeyError):
                continue
        return found

    def step(self) -> int:
        """The last logged step."""
        records = [record for record in self.folder.read_metrics() if "loss" in record]
        return int(records[-1]["step"]) if records else 0

    def resumed_at(self) -> int:
        """The step that the current processes resumed from."""
        notes = " ".join(self.folder.read_summary()["changed_for_you"])
        return int((re.findall(r"resuming \S+ after step (\d+)", notes) or [0])[-1])

    def ended(self) -> bool:
        return self.process.poll() is not None


def until(condition: Callable[[], bool], what: str, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {LIMIT_S} s")
        time.sleep(every_s)


# Faults. Each returns once it has struck. The launcher recovers from all but `signal_and_rerun`.


def kill_a_rank(job: Job) -> None:
    random.choice(list(job.ranks().values())).kill()


def stop_a_rank_for_ever(job: Job) -> None:
    random.choice(list(job.ranks().values())).suspend()


def kill_during_a_save(job: Job) -> None:
    workers = list(job.ranks().values())

    def half() -> bool:
        return any(
            not (path / manifest.NAME).exists() for path in job.folder.checkpoints.glob("checkpoint-*") if path.is_dir()
        )

    def stopped_within() -> bool:
        if not half():
            return job.ended()
        for worker in workers:
            worker.suspend()
        if half():
            return True
        for worker in workers:
            worker.resume()
        return False

    until(stopped_within, "a save", every_s=0.0005)
    for worker in workers:
        worker.kill()


def damage_the_newest_checkpoint(job: Job) -> None:
    workers = list(job.ranks().values())
    for worker in workers:
        worker.suspend()
    newest, _ = manifest.newest(job.folder.checkpoints)
    if newest is not None:
        file = random.choice([path for path in newest.rglob("*") if path.is_file()])
        how = random.choice(["flip", "truncate", "remove"])
        if how == "flip":
            content = bytearray(file.read_bytes())
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
            file.write_bytes(content)
        elif how == "truncate":
            os.truncate(file, random.randrange(file.stat().st_size))
        else:
            file.unlink()
    for worker in workers:
        worker.kill()


def signal_and_rerun(job: Job) -> None:
    target = random.choice([psutil.Process(job.process.pid), *job.ranks().values()])
    target.send_signal(random.choice([signal.SIGTERM, signal.SIGUSR1]))
    until(job.ended, "the end after a signal")
    if job.process.returncode != 75:
        raise RuntimeError(f"exit code {job.process.returncode} after a signal; 75 was expected")
    job.start()


FAULTS: list[tuple[Callable[[Job], None], int]] = [
    (kill_a_rank, 4),
    (kill_during_a_save, 2),
    (damage_the_newest_checkpoint, 2),
    (signal_and_rerun, 2),
    (stop_a_rank_for_ever, 1),
]


def strike(job: Job) -> dict[str, Any] | None:
    """Inject one fault and record how the run recovered; None if the run ended first."""
    until(lambda: job.ended() or job.step() > job.resumed_at(), "a first step")
    time.sleep(random.uniform(0.0, 1.5))
    if job.ended() or job.step() > job.steps - 15:
        return None
    (fault,) = random.choices([fault for fault, _ in FAULTS], [weight for _, weight in FAULTS])
    begun = time.monotonic()
    fault(job)
    if job.ended() and fault is not signal_and_rerun:
        return None
    struck_at = job.step()
    job.restarts += 1
    until(lambda: (job.folder.read_summary()["restarts"] or 0) >= job.restarts, f"the restart after {fault.__name__}")
    job.restarts = job.folder.read_summary()["restarts"]
    resumed = job.resumed_at()
    until(lambda: job.step() > resumed or job.ended(), f"a step after {fault.__name__}")
    return {
        "fault": fault.__name__,
        "strategy": job.strategy,
        "step": struck_at,
        "resumed_after_step": resumed,
        "steps_lost": max(struck_at - resumed, 0),
        "until_next_step_s": round(time.monotonic() - begun, 1),
    }


def same(job: RunFolder, whole: RunFolder) -> bool:
    """Whether losses, gradient norms and the final adapter are bit-identical."""
    curves = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in run.read_metrics() if "loss" in r] for run in (job, whole)
    ]
    ours, theirs = read_tensors(job.adapter), read_tensors(whole.adapter)
    tensors = set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return curves[0] == curves[1] and tensors


def left_over(where: Path) -> list[int]:
    """Processes whose working directory is still in `where`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(f"{where}/") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Number, lost steps and seconds until the next step, by kind of fault."""
    found = {}
    for name in sorted({record["fault"] for record in records}):
        of = [record for record in records if record["fault"] == name]
        lost, seconds = [r["steps_lost"] for r in of], [r["until_next_step_s"] for r in of]
        found[name] = {
            "count": len(of),
            "steps_lost_mean": sum(lost) / len(lost),
            "steps_lost_max": max(lost),
            "until_next_step_s_mean": sum(seconds) / len(seconds),
            "until_next_step_s_max": max(seconds),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="how long to inject faults")
    parser.add_argument("--steps", type=int, default=600, help="steps of a run")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/soak_cpu.json"))
    options = parser.parse_args()
    random.seed(options.seed)
    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    work = Path(tempfile.mkdtemp(prefix="distft-soak-")).resolve()
    result: dict[str, Any] = {
        **provenance(__file__),
        "minutes": options.minutes,
        "seed": options.seed,
        "steps_of_a_run": options.steps,
        "save_steps": SAVE_STEPS,
        "overrides": overrides("ddp", options.steps),
    }

    whole: dict[str, RunFolder] = {}
    for strategy in options.strategies:
        print(f"{strategy}: the undisturbed run", flush=True)
        reference = Job(work / f"whole-{strategy}", strategy, options.steps)
        if reference.process.wait() != 0:
            raise RuntimeError(f"it failed: see {reference.where / 'log'}")
        whole[strategy] = reference.folder

    records: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * options.minutes
    while time.monotonic() < deadline:
        strategy = options.strategies[len(runs) % len(options.strategies)]
        job = Job(work / f"run-{len(runs)}", strategy, options.steps)
        error = None
        try:
            until(lambda: bool(list(job.where.glob("runs/*/summary.json"))), "the run folder")  # noqa: B023
            while time.monotonic() < deadline and (record := strike(job)) is not None:
                records.append(record)
                print(json.dumps(record), flush=True)
            if job.process.wait(timeout=3600) != 0:
                error = f"exit code {job.process.returncode}"
        except (TimeoutError, RuntimeError, subprocess.TimeoutExpired) as caught:
            error = str(caught)
            os.killpg(job.process.pid, signal.SIGKILL)
        runs.append(
            {
                "strategy": strategy,
                "restarts": job.folder.read_summary()["restarts"],
                "error": error,
                "bit_equal": error is None and same(job.folder, whole[strategy]),
                "processes_left": len(left_over(work)),
            }
        )
        print(json.dumps(runs[-1]), flush=True)
        result |= {
            "faults_survived": len(records),
            "by_fault": summarize(records),
            "runs": runs,
            "all_bit_equal": all(run["bit_equal"] for run in runs),
            "faults": records,
        }
        write_atomically(options.output, to_json(result) + "\n")
        if error is not None:
            print(f"failed: {error}; see {job.where / 'log'}", flush=True)
            return 1
    print(f"{len(records)} faults survived, results bit-equal: {result['all_bit_equal']}", flush=True)
    return 0 if result["all_bit_equal"] and not any(run["processes_left"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
