"""SLURM batch scripts: the text of a run's job as a pure function of its recipe.

SLURM queues, starts, preempts and requeues. `script` makes the `#SBATCH` lines; from `slurm/train.sbatch` it keeps only
the shebang and what follows the marker (the `#SBATCH` lines of that file only matter for a bare `sbatch`). The script
runs `distft train` on each node, and torchrun's rendezvous connects the nodes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distft.config.recipe import Recipe
from distft.config.schema import Slurm
from distft.errors import Fault
from distft.paths import packaged
from distft.text import parse_duration

_SECRET = re.compile(r"TOKEN(?!IZ)|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_MARKER = "# distft submit inserts the recipe's values, modules, setup lines, variables and arguments here"
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def slurm_faults(recipe: Recipe) -> list[Fault]:
    """Settings in the `slurm` section that cannot work on any cluster, and secrets that do not belong in a recipe."""
    found: list[Fault] = []
    section = recipe.slurm

    def fault(key: str, problem: str, hint: str = "") -> None:
        found.append(Fault(recipe.source.of(f"slurm.{key}"), f"slurm.{key}", problem, hint))

    if section.gpus_per_node is not None and section.gres is not None and section.gres.startswith("gpu"):
        fault("gres", "GPUs are requested twice", "set gpus_per_node or gres, not both")
    for name in section.environment:
        if _SECRET.search(name):
            problem = "looks like a secret, and a recipe is copied into every run folder"
            fault(f"environment.{name}", problem, "export it before you submit; sbatch passes it on")
    limit = None if section.time in (None, "UNLIMITED") else parse_duration(section.time)
    if limit is not None and limit <= section.grace_s:
        problem = f"is not longer than slurm.grace_s ({section.grace_s} s)"
        fault("time", problem, "the run would be stopped before it begins")
    return found


@dataclass(frozen=True)
class Job:
    """A job, or an array of jobs: `runs` has the arguments of `distft train` for each."""

    name: str
    runs: tuple[tuple[str, ...], ...]
    is_array: bool = False


def script(slurm: Slurm, job: Job, output: Path, distft: Sequence[str], template: str) -> str:
    """The batch script of `job`: its own `#SBATCH` lines and settings, then the part of `template` after the marker.

    `distft` is the command that runs distft on a node; `output` is the folder for the jobs' own output.
    """
    options = {
        "job-name": job.name,
        "output": output / ("%x-%A_%a.out" if job.is_array else "%x-%j.out"),
        **_placement(slurm),
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": slurm.gpus_per_node,
        "gres": slurm.gres,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "time": slurm.time,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "dependency": slurm.dependency,
        "array": (slurm.array or f"0-{len(job.runs) - 1}") if job.is_array else None,
        "signal": f"B:USR1@{slurm.grace_s}",
        "requeue": True,
        "open-mode": "append",
    }
    train = [*distft, "train"]
    if slurm.processes_per_node is not None:
        train += ["--nproc", str(slurm.processes_per_node)]
    inserted = [
        f"grace={slurm.grace_s}",
        f"max_requeues={slurm.max_requeues}",
        *_srun(slurm, "--ntasks-per-node=1", "--kill-on-bad-exit=1"),
        f"train=({shlex.join(train)})",
        *_setup(slurm),
    ]
    if job.is_array:
        cases = [f"  {number}) set -- {shlex.join(arguments)} ;;" for number, arguments in enumerate(job.runs)]
        inserted += ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    else:
        inserted.append(f"set -- {shlex.join(job.runs[0])}")
    lines = template.splitlines()
    body = lines[lines.index(_MARKER) + 1 :]
    return "\n".join([lines[0], *_directives(options), *inserted, *body]) + "\n"


def report_script(
    slurm: Slurm, name: str, after: str, arguments: Sequence[str], output: Path, distft: Sequence[str]
) -> str:
    """The script of the job that writes an experiment's report once the array job `after` has ended in any way."""
    options = {
        "job-name": f"{name}-report",
        "output": output / "%x-%j.out",
        **_placement(slurm),
        "nodes": 1,
        "ntasks": 1,
        "dependency": f"afterany:{after}",
    }
    report = f'"${{srun[@]}}" {shlex.join([*distft, "report", *arguments])}'
    head = ["#!/usr/bin/env bash", *_directives(options), *_srun(slurm, "--ntasks=1"), *_setup(slurm)]
    return "\n".join([*head, report]) + "\n"


def template() -> str:
    """The text of `slurm/train.sbatch`, whose body `script` uses."""
    return packaged("slurm/train.sbatch").read_text(encoding="utf-8")


def _placement(slurm: Slurm) -> dict[str, str | None]:
    """Options that decide where the jobs run and which account pays for them."""
    return {"account": slurm.account, "partition": slurm.partition, "qos": slurm.qos, "reservation": slurm.reservation}


def _directives(options: Mapping[str, object]) -> list[str]:
    """sbatch's options as lines of a script. None is left out, True has no value."""
    return [
        f"#SBATCH --{key}" + ("" if value is True else f"={value}")
        for key, value in options.items()
        if value is not None
    ]


def _srun(slurm: Slurm, *flags: str) -> list[str]:
    """Lines that set `srun` to the command that runs a program on the job's nodes, in the container if there is one."""
    lines = [f"srun=({shlex.join(['srun', *flags])})"]
    if slurm.container is not None:
        mounts = ",".join(["$PWD:$PWD", *slurm.container_mounts])
        lines.append(
            f'srun+=("--container-image={slurm.container}" "--container-mounts={mounts}" "--container-workdir=$PWD")'
        )
    return lines


def _setup(slurm: Slurm) -> list[str]:
    """Lines that load modules, run the setup commands and set variables."""
    modules = ["module load " + shlex.join(slurm.modules)] if slurm.modules else []
    variables = {**_OFFLINE, **slurm.environment}
    return [*modules, *slurm.setup, *(f"export {key}={shlex.quote(value)}" for key, value in variables.items())]
