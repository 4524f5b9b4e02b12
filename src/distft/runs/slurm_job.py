"""The batch job that this process works in, where `slurm/train.sbatch` has said that it does."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

JOB = "DISTFT_JOB"
"""Environment variable: SLURM's number of the job whose one run this is, the same over its requeues. Unset in an interactive
allocation, in which many runs may follow each other."""
LIMIT_S = 30
"""How long SLURM may take to answer a question."""


def batch_job(environment: Mapping[str, str]) -> str | None:
    return environment.get(JOB)


def requeues(environment: Mapping[str, str]) -> int | None:
    """How many times that job has gone back into the queue; None without one."""
    return int(environment.get("SLURM_RESTART_COUNT", "0")) if JOB in environment else None


def is_queued(job: str) -> bool:
    """Whether SLURM still has `job` to do: it runs, or waits in the queue, perhaps to be started again."""
    if shutil.which("squeue") is None:
        return False
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return True  # its run is left alone, rather than taken from it
    return answer.returncode == 0 and bool(answer.stdout.strip())
