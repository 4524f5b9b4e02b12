"""SLURM: the batch script of a run as a pure function, its submission, and what became of it.

distft submit recipe=fsdp_bf16 slurm.nodes=2 slurm.gpus_per_node=8 slurm.time=04:00:00

SLURM is the engine: it queues, starts, preempts and requeues. The script is `slurm/train.sbatch`, filled in; what runs on each node
is `distft train`, and torchrun's rendezvous brings the nodes together.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from distft.config.recipe import Recipe
from distft.config.schema import Slurm
from distft.errors import Fault, LaunchError
from distft.files import append_lines, read_lines, write_atomically
from distft.paths import packaged
from distft.runs.folder import RunFolder
from distft.runs.slurm_job import LIMIT_S
from distft.text import parse_duration

_SECRET = re.compile(r"TOKEN(?!IZ)|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_HERE = "# distft submit puts the recipe's values, modules, set-up lines, variables and arguments here"
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def slurm_faults(recipe: Recipe) -> list[Fault]:
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
    limit = None if section.time in (None, "UNLIMITED") else parse_duration(section.time)
    if limit is not None and limit <= section.grace_s:
        fault(
            "time",
            f"is not longer than slurm.grace_s ({section.grace_s} s)",
            "the run would be stopped before it begins",
        )
    return found


@dataclass(frozen=True)
class Job:
    """One job, or an array of them where `runs` has several: the arguments of `distft train` of each."""

    name: str
    runs: tuple[tuple[str, ...], ...]
    is_array: bool = False


def script(slurm: Slurm, job: Job, output: Path, distft: Sequence[str], template: str) -> str:
    """`template` (slurm/train.sbatch) with everything that the job needs in it. `distft` is the command that starts distft on
    a node, `output` the folder of the jobs' own output."""
    given = {
        "job-name": job.name, "output": output / ("%x-%A_%a.out" if job.is_array else "%x-%j.out"), **_place(slurm),
        "nodes": slurm.nodes, "ntasks-per-node": 1, "gpus-per-node": slurm.gpus_per_node, "gres": slurm.gres,
        "cpus-per-task": slurm.cpus_per_task, "mem": slurm.mem, "time": slurm.time, "constraint": slurm.constraint,
        "exclude": slurm.exclude, "dependency": slurm.dependency,
        "array": (slurm.array or f"0-{len(job.runs) - 1}") if job.is_array else None,
        "signal": f"B:USR1@{slurm.grace_s}", "requeue": True, "open-mode": "append",
    }  # fmt: skip
    train = [*distft, "train"]
    if slurm.processes_per_node is not None:
        train += ["--nproc", str(slurm.processes_per_node)]
    here = [
        f"grace={slurm.grace_s}", f"max_requeues={slurm.max_requeues}",
        *_srun(slurm, "--ntasks-per-node=1", "--kill-on-bad-exit=1"), f"train=({shlex.join(train)})", *_set_up(slurm),
    ]  # fmt: skip
    if job.is_array:
        cases = [f"  {number}) set -- {shlex.join(arguments)} ;;" for number, arguments in enumerate(job.runs)]
        here += ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    else:
        here.append(f"set -- {shlex.join(job.runs[0])}")
    lines = template.splitlines()
    body = lines[lines.index(_HERE) + 1 :]
    return "\n".join([lines[0], *_options(given), *here, *body]) + "\n"


def report_script(
    slurm: Slurm, name: str, after: str, arguments: Sequence[str], output: Path, distft: Sequence[str]
) -> str:
    """The job that writes the report of an experiment once the array job `after` has ended, however its runs ended."""
    given = {
        "job-name": f"{name}-report", "output": output / "%x-%j.out", **_place(slurm), "nodes": 1, "ntasks": 1,
        "dependency": f"afterany:{after}",
    }  # fmt: skip
    report = f'"${{srun[@]}}" {shlex.join([*distft, "report", *arguments])}'
    return (
        "\n".join(["#!/usr/bin/env bash", *_options(given), *_srun(slurm, "--ntasks=1"), *_set_up(slurm), report])
        + "\n"
    )


def _place(slurm: Slurm) -> dict[str, str | None]:
    """Where any job of the section goes, and who pays."""
    return {"account": slurm.account, "partition": slurm.partition, "qos": slurm.qos, "reservation": slurm.reservation}


def _options(given: Mapping[str, object]) -> list[str]:
    """sbatch's options as the lines of a script; null ones are left out, True has no value."""
    return [
        f"#SBATCH --{key}" + ("" if value is True else f"={value}") for key, value in given.items() if value is not None
    ]


def _srun(slurm: Slurm, *flags: str) -> list[str]:
    """Lines that set `srun` to the command that runs something on the job's nodes, in the container where there is one."""
    lines = [f"srun=({shlex.join(['srun', *flags])})"]
    if slurm.container is not None:
        mounts = ",".join(["$PWD:$PWD", *slurm.container_mounts])
        lines.append(
            f'srun+=("--container-image={slurm.container}" "--container-mounts={mounts}" "--container-workdir=$PWD")'
        )
    return lines


def _set_up(slurm: Slurm) -> list[str]:
    """Modules, set-up lines and variables."""
    modules = ["module load " + shlex.join(slurm.modules)] if slurm.modules else []
    variables = {**_OFFLINE, **slurm.environment}
    return [*modules, *slurm.setup, *(f"export {key}={shlex.quote(value)}" for key, value in variables.items())]


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

    def submit(self, name: str, text: str) -> str:
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
        append_lines(self.listing, [{"job": number, "name": name, "submitted": now, "script": str(file)}])
        return number

    def submitted(self) -> list[dict[str, Any]]:
        """What was submitted from here, oldest first."""
        return read_lines(self.listing)

    def now(self) -> list[dict[str, Any]]:
        """One record for each job that was submitted from here, and for each member of an array, oldest first: `job`, `name`,
        `state` (SLURM's), `requeues`, `step`, `steps`, `loss`, `folder`; null where unknown."""
        known = states([record["job"] for record in self.submitted()])
        folders = {}
        for path in self.path.parent.glob("*/summary.json"):
            folder = RunFolder(path.parent)
            folders[folder.read_environment().get("job")] = folder
        found = []
        for record in self.submitted():
            number = record["job"]
            for member in [key for key in known if key.partition("_")[0] == number] or [number]:
                found.append(
                    {
                        "job": member,
                        "name": record["name"],
                        "state": known.get(member),
                        **_progress(folders.get(member)),
                    }
                )
        return found

    def table(self) -> list[str]:
        """`now` as aligned lines for a terminal."""
        jobs = self.now()
        if not jobs:
            return [f"nothing was submitted from here ({self.path})"]
        rows = [("job", "name", "state", "step", "loss", "requeues", "run folder")]
        for job in jobs:
            step = "" if job["step"] is None else str(job["step"]) + (f"/{job['steps']}" if job["steps"] else "")
            loss = "" if job["loss"] is None else f"{job['loss']:.4f}"
            state = job["state"] or (f"ended ({job['status']})" if job["status"] else "unknown")
            requeued = "" if job["requeues"] is None else str(job["requeues"])
            rows.append((job["job"], job["name"], state, step, loss, requeued, job["folder"] or ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# What became of it --------------------------------------------------------------------------------------------------------


def states(jobs: Sequence[str]) -> dict[str, str]:
    """SLURM's state of each job, and of each that belongs to an array job (`12_3`). Jobs that SLURM has forgotten are left out."""
    if not jobs:
        return {}
    found: dict[str, str] = {}
    # squeue knows a job for some minutes after its end, the accounting for good
    listed = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T"]
    kept = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State"]
    for command in (listed, [*kept, f"--jobs={','.join(jobs)}"]):
        if shutil.which(command[0]) is None:
            continue
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"SLURM gives no answer within {LIMIT_S} s ({command[0]})") from error
        for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
            number, _, state = line.partition("|")
            if number.partition("_")[0] in jobs:
                found.setdefault(number, state.split()[0])
    return found


def _progress(folder: RunFolder | None) -> dict[str, Any]:
    if folder is None:
        return dict.fromkeys(("status", "requeues", "step", "steps", "loss", "folder"))
    summary, metrics = folder.read_summary(), folder.read_metrics()
    last: Mapping[str, Any] = next((record for record in reversed(metrics) if "loss" in record), {})
    return {
        "status": summary["status"], "requeues": summary.get("requeues"), "step": last.get("step"), "steps": summary.get("steps"),
        "loss": last.get("loss"), "folder": str(folder.path),
    }  # fmt: skip


def template() -> str:
    """`slurm/train.sbatch`, which `script` fills in."""
    return packaged("slurm/train.sbatch").read_text(encoding="utf-8")
