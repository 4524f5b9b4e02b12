"""The SLURM job that this process runs in, if `slurm/train.sbatch` started it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

JOB = "DISTFT_JOB"
"""Environment variable: the number of the SLURM job that runs one run, the same after each requeue.

Unset in an interactive allocation, where many runs may follow each other."""
LIMIT_S = 30
"""Time limit for an answer from SLURM."""


def batch_job(environment: Mapping[str, str]) -> str | None:
    return environment.get(JOB)


def requeues(environment: Mapping[str, str]) -> int | None:
    """How often the job was requeued; None if there is no job."""
    return int(environment.get("SLURM_RESTART_COUNT", "0")) if JOB in environment else None


def is_queued(job: str) -> bool:
    """Whether `job` is running or queued (perhaps to be restarted)."""
    if shutil.which("squeue") is None:
        return False
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return True  # better to leave its run alone than to take it over
    return answer.returncode == 0 and bool(answer.stdout.strip())
