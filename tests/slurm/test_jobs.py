"""Real jobs on a real cluster, disturbed in every way a cluster can: each ends with the adapter of an undisturbed
run.

To start a job's processes takes far longer than to train a few steps, so two jobs go through all disturbances, one
after the other. Each is a fixture that leaves the job's ranks stopped (SIGSTOP) in the middle of the run; a test alone
runs those before it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGTERM, SIGUSR1

import psutil
import pytest
import torch

from distft.paths import packaged
from distft.runs.folder import RunFolder
from distft.training.checkpoints import read_tensors

from ..distributed.conftest import environment
from ..faults.conftest import is_pending, losses, until
from .cluster import ENDED, Cluster
from .jobs import LIMIT_S, STEPS, TINY, Job, distft, find_run, last_step, printed, ranks, restarts, submit

pytestmark = pytest.mark.timeout(3_000)  # a test alone runs what its fixtures need, on a machine that may be busy

RANKS = """\
base: tiny
variants:
  r16: {}
  r4: {lora.r: 4}
  broken: {data.path: blank.jsonl}
"""


def assert_same(folder: RunFolder, whole: RunFolder, requeues: int | None = None) -> None:
    """Finished, with the losses and the adapter of `whole` to the bit."""
    summary = folder.read_summary()
    assert (summary["status"], summary["world_size"]) == ("finished", 2)
    assert requeues is None or summary["requeues"] == requeues
    assert losses(folder) == losses(whole)
    ours, theirs = read_tensors(folder.adapter), read_tensors(whole.adapter)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which the two jobs are submitted."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The folder of a run of two local processes that nothing happens to."""
    at = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "distft.cli", "train", *TINY, "--nproc", "2"]
    subprocess.run(command, cwd=at, env=environment(OMP_NUM_THREADS="1"), capture_output=True, check=True)
    return RunFolder(at / "runs" / "tiny")


@pytest.fixture(scope="module")
def pair(cluster: Cluster, where: Path) -> tuple[Job, Job]:
    """Two jobs that train at the same time."""
    jobs: dict[str, Job | None] = {submit(cluster, where, "slurm.partition=low"): None for _ in range(2)}

    def both_train() -> bool:
        for number in [number for number, job in jobs.items() if job is None]:
            assert cluster.state(number) not in ENDED, printed(where)
            folder = find_run(where, number)
            if folder is not None and last_step(folder) >= 3:
                jobs[number] = Job(number, folder)
                Job(number, folder).stop()
        return None not in jobs.values()

    until(both_train, LIMIT_S)
    first, second = jobs.values()
    assert first is not None and second is not None
    return first, second


@pytest.fixture(scope="module")
def cancelled(cluster: Cluster, pair: tuple[Job, Job]) -> Job:
    """The second job, after `scancel` and with its processes gone."""
    job = pair[1]
    cluster.call("scancel", job.number)
    job.go_on()
    until(
        lambda: (
            cluster.state(job.number) in ENDED
            and not cluster.call("squeue", "-h", "--states=completing", f"--jobs={job.number}")
            and not ranks(job.number)
        ),
        LIMIT_S,
        0.2,
    )
    return job


@pytest.fixture(scope="module")
def requeued(cluster: Cluster, pair: tuple[Job, Job]) -> Job:
    """The first job, after `scontrol requeue`."""
    with pair[0].starting_again(cluster):
        cluster.call("scontrol", "requeue", pair[0].number)
    return pair[0]


@pytest.fixture(scope="module")
def preempted(cluster: Cluster, requeued: Job, cancelled: Job) -> tuple[Job, str]:
    """The first job, after a job of higher priority has taken its nodes; the state in which that one ended."""
    with requeued.starting_again(cluster):
        high = cluster.script("sleep 2\n", "--partition=high", "--nodes=4", "--exclusive", name="high")
        until(lambda: cluster.show(requeued.number).get("PreemptTime", "None") != "None", LIMIT_S, 0.2)
        requeued.go_on()
        ended = cluster.wait(high, limit_s=LIMIT_S)
    return requeued, ended


@pytest.fixture(scope="module")
def moved(cluster: Cluster, preempted: tuple[Job, str]) -> Job:
    """The first job, after one of its nodes went down."""
    job, _ = preempted
    last = cluster.call("scontrol", "show", "hostnames", cluster.show(job.number)["NodeList"]).split()[-1]
    try:
        with job.starting_again(cluster):
            cluster.set_node(last, "down")
    finally:
        if cluster.node_states()[last].startswith("down"):  # its daemon may have reported itself by now
            cluster.set_node(last, "resume")
    return job


@pytest.fixture(scope="module")
def finished(cluster: Cluster, where: Path, moved: Job) -> Job:
    """The first job at its end."""
    moved.go_on()
    assert cluster.wait(moved.number, limit_s=LIMIT_S) == "COMPLETED", printed(where)
    return moved


def test_two_jobs_at_once_on_the_same_two_nodes(cluster: Cluster, where: Path, pair: tuple[Job, Job]) -> None:
    """No clash of ports or folders."""
    first, second = pair
    assert cluster.show(first.number)["NodeList"] == cluster.show(second.number)["NodeList"]
    assert first.folder.path != second.folder.path
    listed = distft(cluster, where, "jobs")
    for job in pair:
        assert {path.name for path in (job.folder.path / "logs").iterdir()} == {"rank0.log", "rank1.log"}
        (line,) = [line for line in listed.splitlines() if line.split()[0] == job.number]
        assert "RUNNING" in line and int(line.split()[3]) >= 3
        assert str(job.folder.path.relative_to(where)) in line


def test_a_job_that_is_cancelled_stays_so(cluster: Cluster, cancelled: Job) -> None:
    assert cluster.state(cancelled.number) == "CANCELLED" and ranks(cancelled.number) == []
    assert cancelled.folder.read_summary()["status"] != "finished"


def test_a_requeue_goes_on_in_the_same_folder(where: Path, pair: tuple[Job, Job], requeued: Job) -> None:
    assert requeued.requeues == 1
    folders = {path.name for path in (where / "runs").iterdir() if path.name != "jobs"}
    assert folders == {job.folder.path.name for job in pair}


def test_a_job_of_higher_priority_sends_a_job_back(preempted: tuple[Job, str]) -> None:
    job, high = preempted
    assert high == "COMPLETED"
    assert job.requeues == 2


def test_a_node_that_goes_down_sends_a_job_back(cluster: Cluster, moved: Job) -> None:
    states = cluster.call("sacct", "--duplicates", "--noheader", "--format=State", f"--jobs={moved.number}")
    assert "NODE_FAIL" in states
    assert moved.requeues == 3


def test_the_time_limit_sends_a_job_back_until_the_work_is_done(
    cluster: Cluster, where: Path, cancelled: Job, moved: Job, whole: RunFolder
) -> None:
    """The run that was cancelled, submitted again: it goes on there, though another of its name is not finished."""
    step = last_step(cancelled.folder)
    # SLURM looks every 30 s, so that the signal comes 60 to 90 s after the start
    number = submit(cluster, where, "slurm.time=00:03:00", "slurm.grace_s=120")
    job: Job | None = None
    stopped: list[psutil.Process] = []
    deadline = time.monotonic() + LIMIT_S
    while restarts(cluster, number) == 0:
        assert time.monotonic() < deadline and cluster.state(number) not in ENDED, printed(where)
        folder = find_run(where, number)
        if job is None and folder is not None and last_step(folder) > step:
            job = Job(number, folder)
            stopped = job.stop()
        if job is not None and any(is_pending(signum, rank) for rank in stopped for signum in (SIGUSR1, SIGTERM)):
            job.go_on()
            stopped = []
        time.sleep(0.2)
    # A slow machine would take many more turns, none of them different.
    cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=01:00:00")
    assert cluster.wait(number, limit_s=LIMIT_S) == "COMPLETED", printed(where)
    folder = find_run(where, number)
    assert folder is not None and folder.path == cancelled.folder.path
    assert folder.read_summary()["requeues"] >= 1
    assert "requeued, 1 of 20" in printed(where)
    assert_same(folder, whole)


def test_all_this_costs_no_work(cluster: Cluster, where: Path, finished: Job, whole: RunFolder) -> None:
    assert_same(finished.folder, whole, requeues=3)
    (line,) = [line for line in distft(cluster, where, "jobs").splitlines() if line.split()[0] == finished.number]
    assert "COMPLETED" in line and f" {STEPS}/{STEPS} " in line


def test_a_finished_run_is_left_alone(cluster: Cluster, where: Path, finished: Job) -> None:
    summary = finished.folder.summary.read_text()
    cluster.call("scontrol", "requeue", finished.number)
    until(lambda: restarts(cluster, finished.number) == 4, LIMIT_S, 0.2)
    assert cluster.wait(finished.number, limit_s=LIMIT_S) == "COMPLETED", printed(where)
    assert "had already finished when it was restarted" in printed(where)
    assert finished.folder.summary.read_text() == summary


def test_a_killed_rank_of_a_job_submitted_by_hand_comes_back(
    cluster: Cluster, whole: RunFolder, tmp_path: Path
) -> None:
    """`sbatch slurm/train.sbatch`, with a fake GPU a node; the job itself does not end."""
    flags = ("--nodes=2", f"--export=ALL,OMP_NUM_THREADS=1,PATH={Path(sys.executable).parent}:{os.environ['PATH']}")
    environment_ = {**environment(), **{key: cluster.env[key] for key in ("SLURM_CONF", "PATH")}}
    command = ["sbatch", "--parsable", *flags, str(packaged("slurm/train.sbatch")), *TINY]
    submitted = subprocess.run(command, cwd=tmp_path, env=environment_, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = Job.begun(cluster, tmp_path, submitted.stdout.strip())
    job.train_beyond(5, cluster)
    rank = ranks(job.number)[-1]
    killed = int(rank.environ()["RANK"])
    rank.kill()
    job.go_on()
    ended = cluster.wait(job.number, limit_s=LIMIT_S)
    assert ended == "COMPLETED", (tmp_path / f"slurm-{job.number}.out").read_text(errors="replace")[-4000:]
    (fault,) = job.folder.read_faults()
    assert fault["rank"] == 1 - killed or "was killed by SIGKILL" in fault["cause"], (
        "the other rank told, from its own node"
    )
    assert job.folder.read_summary()["restarts"] == 1
    assert_same(job.folder, whole, requeues=0)


def test_an_experiment_is_an_array_of_jobs_and_a_report_after_them(
    cluster: Cluster, whole: RunFolder, tmp_path: Path
) -> None:
    """A mistake that only the job finds, for submitting reads the first rows, ends it with 2."""
    file = tmp_path / "recipes" / "experiments" / "ranks.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(RANKS)
    (tmp_path / "blank.jsonl").write_text('{"instruction": "Why?", "response": " "}\n' * 20)
    said = distft(cluster, tmp_path, "submit", "experiment=ranks", *TINY[1:], "slurm.nodes=2")
    array, report = [line.split()[1].rstrip(":") for line in said.splitlines()]
    assert cluster.wait(report, limit_s=LIMIT_S) == "COMPLETED", printed(tmp_path)
    ours = [RunFolder(tmp_path / "runs" / f"ranks-{name}") for name in ("r16", "r4", "broken")]
    assert_same(ours[0], whole, requeues=0)
    assert ours[1].read_summary()["trainable_parameters"] < ours[0].read_summary()["trainable_parameters"]
    text = (tmp_path / "runs" / "ranks.md").read_text()
    assert "ranks-r16" in text and "ranks-r4" in text and "finished" in text
    assert "ranks-broken" in text, "what did not run is named as missing"
    states = {line.split()[0]: line.split()[2] for line in distft(cluster, tmp_path, "jobs").splitlines()[1:]}
    assert states == {f"{array}_0": "COMPLETED", f"{array}_1": "COMPLETED", f"{array}_2": "FAILED", report: "COMPLETED"}
    broken = cluster.show(f"{array}_2")
    assert broken["ExitCode"].startswith("2:") and broken["Restarts"] == "0"
    assert "no row is left to train on" in printed(tmp_path)


def test_what_slurm_refuses_is_said(cluster: Cluster, tmp_path: Path) -> None:
    said = distft(cluster, tmp_path, "submit", "recipe=tiny", "slurm.partition=nowhere", check=False)
    assert "SLURM rejected the job: sbatch: error: invalid partition specified: nowhere" in said
    assert distft(cluster, tmp_path, "jobs") == "no jobs were submitted from here (runs/jobs)\n"
