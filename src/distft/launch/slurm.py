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
from distft.config.slurm import Slurm
from distft.errors import Fault
from distft.paths import packaged

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
    if section.time_s is not None and section.time_s <= section.grace_s:
        problem = (
            f"{section.time} is {section.time_s:.0f} s, which is not longer than slurm.grace_s ({section.grace_s} s)"
        )
        fault("time", problem, "the run would be stopped before it begins")
    for problem in _array_problems(section.array or ""):
        fault("array", problem)
    return found


def _array_problems(array: str) -> list[str]:
    """What is wrong with an array that has the right form: ranges that run backwards, and steps or limits of 0."""
    indices, _, limit = array.partition("%")
    found = [f"%{limit} would let no run start"] if limit and int(limit) == 0 else []
    for part in filter(None, indices.split(",")):
        first, last, step = _range(part)
        if first > last:
            found.append(f"{part} ends before it begins")
        if step == 0:
            found.append(f"{part} has a step of 0")
    return found


def beyond_array(array: str, runs: int) -> list[str]:
    """The parts of an array (`0-7%2`) that name a run that does not exist, if there are `runs` runs."""
    return [part for part in array.partition("%")[0].split(",") if max(_range(part)[:2]) >= runs]


def _range(part: str) -> tuple[int, int, int]:
    """First and last index and the step of `N`, `N-M` or `N-M:STEP`."""
    indices, _, step = part.partition(":")
    first, _, last = indices.partition("-")
    return int(first), int(last or first), int(step or 1)


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
        "output": _output(output, "%x-%A_%a.out" if job.is_array else "%x-%j.out"),
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
        other = (
            f'  *) echo "distft: there is no run $SLURM_ARRAY_TASK_ID; runs are 0 to {len(cases) - 1}" >&2; exit 2 ;;'
        )
        inserted += ['case "$SLURM_ARRAY_TASK_ID" in', *cases, other, "esac"]
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
        "output": _output(output, "%x-%j.out"),
        **_placement(slurm),
        "nodes": 1,
        "ntasks": 1,
        "dependency": f"afterany:{after}",
    }
    report = f'"${{srun[@]}}" {shlex.join([*distft, "report", *arguments])}'
    head = ["#!/usr/bin/env bash", *_directives(options), *_srun(slurm, "--ntasks=1"), *_setup(slurm)]
    return "\n".join([*head, report]) + "\n"


def _output(folder: Path, pattern: str) -> Path:
    """The file for a job's own output. sbatch looks for patterns in the whole path, so the folder's `%` is doubled."""
    return Path(str(folder).replace("%", "%%")) / pattern


def template() -> str:
    """The text of `slurm/train.sbatch`, whose body `script` uses."""
    return packaged("slurm/train.sbatch").read_text(encoding="utf-8")


def _placement(slurm: Slurm) -> dict[str, str | None]:
    """Options that decide where the jobs run and which account pays for them."""
    return {"account": slurm.account, "partition": slurm.partition, "qos": slurm.qos, "reservation": slurm.reservation}


def _directives(options: Mapping[str, object]) -> list[str]:
    """sbatch's options as lines of a script. None is left out, True has no value.

    sbatch reads quotes in these lines as a shell does, and a blank or `#` outside of them as the end of the value.
    """
    lines = []
    for key, value in options.items():
        text = str(value)
        if value is not None:
            quoted = shlex.quote(text) if re.search(r"[\s#'\"]", text) else text
            lines.append(f"#SBATCH --{key}" + ("" if value is True else f"={quoted}"))
    return lines


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
