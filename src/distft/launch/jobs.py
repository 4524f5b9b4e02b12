"""Submitted SLURM jobs: hand a script to sbatch, list the jobs, and show their progress."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from distft.errors import LaunchError
from distft.files import append_lines, read_lines, write_atomically
from distft.runs.folder import RunFolder
from distft.runs.slurm_job import LIMIT_S

NO_SBATCH = "there is no sbatch here: submit from a machine of the cluster; --dry-run works anywhere"


def has_sbatch() -> bool:
    return shutil.which("sbatch") is not None


@dataclass(frozen=True)
class Jobs:
    """The folder with the scripts, the output and the list of all jobs that were submitted for the runs next to it."""

    path: Path

    @classmethod
    def of(cls, runs: Path) -> Jobs:
        return cls(runs / "jobs")

    @property
    def listing(self) -> Path:
        return self.path / "jobs.jsonl"

    def submit(self, name: str, text: str) -> str:
        """Write the script `text`, submit it, add the job to the list, and return its number.

        Raises:
            LaunchError: SLURM is not installed here, or it rejects the job.
        """
        if not has_sbatch():
            raise LaunchError(NO_SBATCH)
        file = self.path / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}.sbatch"
        write_atomically(file, text)
        done = subprocess.run(
            ["sbatch", "--parsable", str(file)], capture_output=True, encoding="utf-8", errors="replace"
        )
        if done.returncode != 0:
            raise LaunchError(f"SLURM rejected the job: {done.stderr.strip()}\n  the script: {file}")
        number = done.stdout.strip().partition(";")[0]
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        append_lines(self.listing, [{"job": number, "name": name, "submitted": now, "script": str(file)}])
        return number

    def submitted(self) -> list[dict[str, Any]]:
        """All jobs that were submitted from here, oldest first."""
        return read_lines(self.listing)

    def progress(self) -> list[dict[str, Any]]:
        """A record for each submitted job, and for each member of an array, oldest first.

        Keys: `job`, `name`, `state` (SLURM's), `status` (the run's), `requeues`, `step`, `steps`, `loss` and `folder`;
        None if unknown.
        """
        submitted = self.submitted()
        known = states([record["job"] for record in submitted])
        folders = {}
        for path in self.path.parent.glob("*/summary.json"):
            folder = RunFolder(path.parent)
            folders[folder.read_environment().get("job")] = folder
        return [
            {"job": member, "name": record["name"], "state": known.get(member), **_run_progress(folders.get(member))}
            for record in submitted
            for member in [key for key in known if key.partition("_")[0] == record["job"]] or [record["job"]]
        ]

    def table(self) -> list[str]:
        """`progress` as aligned lines for a terminal."""
        jobs = self.progress()
        if not jobs:
            return [f"no jobs were submitted from here ({self.path})"]
        rows = [("job", "name", "state", "step", "loss", "requeues", "run folder")]
        for job in jobs:
            step = "" if job["step"] is None else str(job["step"]) + (f"/{job['steps']}" if job["steps"] else "")
            loss = "" if job["loss"] is None else f"{job['loss']:.4f}"
            state = job["state"] or (f"ended ({job['status']})" if job["status"] else "unknown")
            requeues = "" if job["requeues"] is None else str(job["requeues"])
            rows.append((job["job"], job["name"], state, step, loss, requeues, job["folder"] or ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def states(jobs: Sequence[str]) -> dict[str, str]:
    """SLURM's state of each job and each member of an array job (`12_3`). Jobs that SLURM has forgotten are omitted.

    Raises:
        LaunchError: SLURM does not answer in time.
    """
    if not jobs:
        return {}
    found: dict[str, str] = {}
    # squeue forgets a job a few minutes after it ends; the accounting keeps it
    squeue = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T"]
    sacct = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(jobs)}"]
    for command in (squeue, sacct):
        if shutil.which(command[0]) is None:
            continue
        try:
            answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"SLURM did not answer within {LIMIT_S} s ({command[0]})") from error
        for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
            number, _, state = line.partition("|")
            if number.partition("_")[0] in jobs:
                found.setdefault(number, state.split()[0])
    return found


def _run_progress(folder: RunFolder | None) -> dict[str, Any]:
    if folder is None:
        return dict.fromkeys(("status", "requeues", "step", "steps", "loss", "folder"))
    summary, metrics = folder.read_summary(), folder.read_metrics()
    last: Mapping[str, Any] = next((record for record in reversed(metrics) if "loss" in record), {})
    return {
        "status": summary["status"],
        "requeues": summary.get("requeues"),
        "step": last.get("step"),
        "steps": summary.get("steps"),
        "loss": last.get("loss"),
        "folder": str(folder.path),
    }
