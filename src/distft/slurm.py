"""SLURM: the batch script of a run as a pure function, its submission, and what became of it.

distft submit recipe=fsdp_bf16 slurm.nodes=2 slurm.gpus_per_node=8 slurm.time=04:00:00

SLURM is the engine: it queues, starts, preempts and requeues. The script is `slurm/train.sbatch`, filled in; what runs on each node
is `distft train`, and torchrun's rendezvous brings the nodes together.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from distft.errors import Fault, LaunchError
from distft.packaged import packaged
from distft.recipe import Recipe
from distft.run import RunFolder, write_atomically
from distft.sections import Slurm

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_HERE = "# distft submit puts the recipe's modules, set-up lines, variables and arguments here"
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def faults(recipe: Recipe) -> list[Fault]:
    """What no cluster could make work, and what must not stand in a recipe."""
    found: list[Fault] = []
    section = recipe.slurm

    def fault(key: str, problem: str, hint: str = "") -> None:
        found.append(Fault(recipe.source.of(f"slurm.{key}"), f"slurm.{key}", problem, hint))

    if section.gpus_per_node is not None and section.gres is not None and section.gres.startswith("gpu"):
        fault("gres", "GPUs are asked for twice", "give gpus_per_node or gres")
    for name in section.environment:
        if _SECRET.search(name):
            fault(f"environment.{name}", "looks like a secret, and a recipe is copied into every run folder",
                  "export it before you submit; sbatch passes it on")  # fmt: skip
    limit = seconds(section.time)
    if limit is not None and limit <= section.grace_s:
        fault(
            "time",
            f"is not longer than slurm.grace_s ({section.grace_s} s)",
            "the run would be stopped before it begins",
        )
    return found


def seconds(time: str | None) -> float | None:
    """A time limit as sbatch reads it (`M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`) in seconds; None for no limit."""
    if time is None or time == "UNLIMITED":
        return None
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, rest = [*parts, 0, 0][:3] if dash or len(parts) == 3 else [0, *parts, 0][:3]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest)


@dataclass(frozen=True)
class Job:
    """One job, or an array of them where `runs` has several: the arguments of `distft train` of each."""

    name: str
    runs: tuple[tuple[str, ...], ...]
    is_array: bool = False


def options(slurm: Slurm, job: Job, output: Path) -> list[str]:
    """sbatch's options, in the order in which they stand in the script."""
    given = {
        "job-name": job.name, "output": str(output / ("%x-%A_%a.out" if job.is_array else "%x-%j.out")),
        "account": slurm.account, "partition": slurm.partition, "qos": slurm.qos, "reservation": slurm.reservation,
        "nodes": slurm.nodes, "ntasks-per-node": 1, "gpus-per-node": slurm.gpus_per_node, "gres": slurm.gres,
        "cpus-per-task": slurm.cpus_per_task, "mem": slurm.mem, "time": slurm.time, "constraint": slurm.constraint,
        "exclude": slurm.exclude, "dependency": slurm.dependency,
        "array": (slurm.array or f"0-{len(job.runs) - 1}") if job.is_array else None,
        "signal": f"B:USR1@{slurm.grace_s}",
    }  # fmt: skip
    return [
        *(f"--{key}={value}" for key, value in given.items() if value is not None),
        "--requeue",
        "--open-mode=append",
    ]


def script(slurm: Slurm, job: Job, output: Path, distft: Sequence[str], template: str) -> str:
    """`template` (slurm/train.sbatch) with everything that the job needs in it. `distft` is the command that starts distft on
    a node, `output` the folder of the jobs' own output."""
    srun = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if slurm.container is not None:
        srun.append(f"--container-image={slurm.container}")
    train = ["train"] if slurm.processes_per_node is None else ["train", "--nproc", str(slurm.processes_per_node)]
    here = [f"distft=({shlex.join(distft)})", f"srun=({shlex.join(srun)})", f"train=({shlex.join(train)})"]
    if slurm.container is not None:
        mounts = shlex.quote(",".join(slurm.container_mounts)) if slurm.container_mounts else ""
        here.append(
            f'srun+=(--container-mounts="$PWD:$PWD"{"," + mounts if mounts else ""} --container-workdir="$PWD")'
        )
    here.append(f"max_requeues={slurm.max_requeues}")
    if slurm.modules:
        here.append("module load " + shlex.join(slurm.modules))
    here += slurm.setup
    here += [f"export {key}={shlex.quote(value)}" for key, value in {**_OFFLINE, **slurm.environment}.items()]
    if job.is_array:
        cases = [f"  {number}) set -- {shlex.join(arguments)} ;;" for number, arguments in enumerate(job.runs)]
        here += ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    else:
        here.append(f"set -- {shlex.join(job.runs[0])}")
    lines = template.splitlines()
    body = lines[lines.index(_HERE) + 1 :]
    return "\n".join([lines[0], *(f"#SBATCH {option}" for option in options(slurm, job, output)), *here, *body]) + "\n"


def report_script(
    slurm: Slurm, name: str, after: str, arguments: Sequence[str], output: Path, distft: Sequence[str]
) -> str:
    """The job that writes the report of an experiment once the array job `after` has ended, however its runs ended."""
    given = {
        "job-name": f"{name}-report", "output": str(output / "%x-%j.out"), "account": slurm.account,
        "partition": slurm.partition, "qos": slurm.qos, "reservation": slurm.reservation, "nodes": 1, "ntasks": 1,
        "dependency": f"afterany:{after}",
    }  # fmt: skip
    head = [f"#SBATCH --{key}={value}" for key, value in given.items() if value is not None]
    load = ["module load " + shlex.join(slurm.modules)] if slurm.modules else []
    return (
        "\n".join(["#!/usr/bin/env bash", *head, *load, *slurm.setup, shlex.join([*distft, "report", *arguments])])
        + "\n"
    )


# Submission ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jobs:
    """Folder in which everything lies that was submitted for the runs beside it: scripts, the jobs' output, and a list."""

    path: Path

    @classmethod
    def of(cls, runs: Path) -> Jobs:
        return cls(runs / "jobs")

    @property
    def listing(self) -> Path:
        return self.path / "jobs.jsonl"

    def submit(self, name: str, text: str, **facts: Any) -> str:
        """Write the script `text`, hand it to sbatch, note the job, and return its number.

        Raises:
            LaunchError: there is no SLURM here, or it refuses the job.
        """
        if shutil.which("sbatch") is None:
            raise LaunchError(
                "there is no sbatch here: submit from a machine of the cluster; --dry-run prints the script anywhere"
            )
        file = self.path / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}.sbatch"
        write_atomically(file, text)
        done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
        if done.returncode != 0:
            raise LaunchError(f"SLURM refuses the job: {done.stderr.strip()}\n  the script: {file}")
        number = done.stdout.strip().partition(";")[0]
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        with self.listing.open("a", encoding="utf-8") as listing:
            listing.write(
                json.dumps({"job": number, "name": name, "submitted": now, "script": str(file), **facts}) + "\n"
            )
        return number

    def submitted(self) -> list[dict[str, Any]]:
        """What was submitted from here, oldest first."""
        if not self.listing.is_file():
            return []
        return [json.loads(line) for line in self.listing.read_text(encoding="utf-8").splitlines()]


# What became of it --------------------------------------------------------------------------------------------------------


def states(jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Of each job, and of each that belongs to an array job: SLURM's number for it as `12` or `12_3`, to its own number
    (which it finds in SLURM_JOB_ID) and its state. Jobs that SLURM has forgotten are left out."""
    if not jobs:
        return {}
    found: dict[str, tuple[str, str]] = {}
    asked = (
        [
            "squeue",
            "--me",
            "--array",
            "--states=all",
            "--noheader",
            "--format=%i|%A|%T",
        ],  # for some minutes after the end as well
        [
            "sacct",
            "--allocations",
            "--noheader",
            "--parsable2",
            "--format=JobID,JobIDRaw,State",
            f"--jobs={','.join(jobs)}",
        ],
    )
    for command in asked:
        if shutil.which(command[0]) is None:
            continue
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
            number, own, state = line.split("|")
            if number.partition("_")[0] in jobs:
                found.setdefault(number, (own, state.split()[0]))
    return found


def jobs(runs: Path) -> list[dict[str, Any]]:
    """One record for each job that was submitted for the folder `runs` and each member of an array, oldest first: `job`, `name`, `state`,
    `requeues`, `step`, `steps`, `loss`, `folder`; null where unknown."""
    submitted = Jobs.of(runs).submitted()
    known = states([record["job"] for record in submitted])
    folders = {number: folder for folder in _run_folders(runs) if (number := folder.read_environment().get("job"))}
    found = []
    for record in submitted:
        number = record["job"]
        members = [key for key in known if key.partition("_")[0] == number] or [number]
        for member in members:
            own, state = known.get(member, (member, None))
            found.append({"job": member, "name": record["name"], "state": state, **_progress(folders.get(own))})
    return found


def _run_folders(runs: Path) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted(runs.glob("*/summary.json"))]


def _progress(folder: RunFolder | None) -> dict[str, Any]:
    if folder is None:
        return dict.fromkeys(("status", "requeues", "step", "loss", "folder"))
    summary = folder.read_summary()
    logged = [record for record in folder.read_metrics() if "loss" in record]
    last: Mapping[str, Any] = logged[-1] if logged else {}
    return {"status": summary["status"], "requeues": summary.get("requeues"), "step": last.get("step"), "loss": last.get("loss"),
            "folder": str(folder.path)}  # fmt: skip


def template() -> str:
    return packaged("slurm/train.sbatch").read_text(encoding="utf-8")
