"""Jobs of the test cluster: submit them, find their runs and ranks, stop them in the middle of a run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from distft.runs.folder import RunFolder

from ..distributed.conftest import environment
from ..faults.conftest import stop, until
from .cluster import ENDED, Cluster

STEPS = 40
TINY = (
    "recipe=tiny",
    "batching.global_batch_size=4",
    "batching.micro_batch=1",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.save_strategy=steps",
    "training.save_steps=2",
    "training.save_total_limit=2",
    f"training.max_steps={STEPS}",
    "run.hang_timeout_s=3600",
    "tracking.report_to=[]",
    "evaluation.max_samples=8",
)
LIMIT_S = 600


def distft(cluster: Cluster, where: Path, *words: str, check: bool = True) -> str:
    """The command `distft` on the machine from which jobs are submitted; its standard output."""
    where.mkdir(exist_ok=True)
    changes = {"OMP_NUM_THREADS": "1", **{key: cluster.env[key] for key in ("SLURM_CONF", "PATH")}}
    ended = subprocess.run(
        [sys.executable, "-m", "distft.cli", *words],
        cwd=where,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert not check or ended.returncode == 0, ended.stderr
    return ended.stdout if check else ended.stderr


def submit(cluster: Cluster, where: Path, *overrides: str) -> str:
    """The number of a job on two nodes."""
    said = distft(cluster, where, "submit", *TINY, "slurm.nodes=2", *overrides)
    return said.split("job ")[1].split()[0].rstrip(":,")


def printed(where: Path) -> str:
    """What the jobs said; a kill may have torn a character of a progress bar."""
    return "\n".join(path.read_text(errors="replace") for path in where.glob("runs/jobs/*.out"))


def last_step(folder: RunFolder) -> int:
    return max((record["step"] for record in folder.read_metrics()), default=0)


def find_run(where: Path, job: str) -> RunFolder | None:
    """The run folder of a job, if it has one already."""
    for path in where.glob("runs/*/summary.json"):
        if RunFolder(path.parent).read_environment().get("job") == job:
            return RunFolder(path.parent)
    return None


def ranks(job: str) -> list[psutil.Process]:
    """The workers of a job that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            variables = process.environ()
            if "RANK" in variables and variables.get("SLURM_JOB_ID") == job and "distft.train" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def restarts(cluster: Cluster, job: str) -> int:
    """How often the job was requeued."""
    return int(cluster.show(job)["Restarts"])


@dataclass(frozen=True)
class Job:
    """A job on two nodes that has begun to train."""

    number: str
    folder: RunFolder

    @classmethod
    def begun(cls, cluster: Cluster, where: Path, number: str) -> Job:
        found: list[RunFolder] = []

        def has_run() -> bool:
            assert cluster.state(number) not in ENDED, printed(where)
            found.extend(filter(None, [find_run(where, number)]))
            return bool(found)

        until(has_run, LIMIT_S, 0.2)
        return cls(number, found[0])

    def stop(self) -> list[psutil.Process]:
        """Stop the job's ranks where they are; they go on at `go_on`, or as SLURM sends SIGCONT."""
        processes = ranks(self.number)
        stop(processes)
        return processes

    def go_on(self) -> None:
        for process in ranks(self.number):
            with contextlib.suppress(psutil.Error):
                process.resume()

    @contextmanager
    def starting_again(self, cluster: Cluster) -> Iterator[None]:
        """What the block does makes SLURM start the job again, which then trains a step that it had not trained."""
        before = self.requeues
        yield
        self.go_on()
        until(lambda: self.requeues > before or cluster.state(self.number) in ENDED, LIMIT_S, 0.2)
        self.train_beyond(last_step(self.folder), cluster)

    @property
    def requeues(self) -> int:
        """Of the start that works in the run folder."""
        return int(self.folder.read_summary()["requeues"])

    def train_beyond(self, step: int, cluster: Cluster) -> None:
        until(lambda: last_step(self.folder) > step or cluster.state(self.number) in ENDED, LIMIT_S)
        self.stop()
        assert cluster.state(self.number) == "RUNNING"
