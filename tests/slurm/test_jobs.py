"""Real jobs on a real cluster, disturbed in every way a cluster can: each ends with the adapter of an undisturbed
run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from distft.paths import packaged
from distft.runs.folder import RunFolder
from distft.training.checkpoints import read_tensors

from ..distributed.conftest import environment
from ..faults.conftest import losses
from .cluster import ENDED, Cluster

TINY = (
    "recipe=tiny",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.save_strategy=steps",
    "training.save_steps=10",
    "training.save_total_limit=2",
    "tracking.report_to=[]",
    "evaluation.max_samples=8",
)
STEPS = 60
RANKS = """\
base: tiny
variants:
  r16: {}
  r4: {lora.r: 4}
  broken: {data.path: blank.jsonl}
"""
LIMIT_S = 300

Whole = Callable[[int], RunFolder]


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


def submit(cluster: Cluster, where: Path, *overrides: str, steps: int = STEPS) -> str:
    """The number of a job on two nodes."""
    said = distft(cluster, where, "submit", *TINY, f"training.max_steps={steps}", "slurm.nodes=2", *overrides)
    return said.split("job ")[1].split()[0].rstrip(":,")


def blank(where: Path) -> None:
    """Data whose mistake only the job finds: submitting reads the first rows."""
    (where / "blank.jsonl").write_text('{"instruction": "Why?", "response": " "}\n' * 20)


def run_of(where: Path, job: str, limit_s: float = 90) -> RunFolder:
    """The run folder of a job, once it has one."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for path in where.glob("runs/*/summary.json"):
            if RunFolder(path.parent).read_environment().get("job") == job:
                return RunFolder(path.parent)
        time.sleep(0.1)
    raise TimeoutError(f"job {job} has no run folder; {printed(where)}")


def wait_for_step(folder: RunFolder, step: int, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not any(record["step"] >= step for record in folder.read_metrics()):
        assert time.monotonic() < deadline, f"never came to step {step}"
        time.sleep(0.05)


def printed(where: Path) -> str:
    """What the jobs said; a kill may have torn a character of a progress bar."""
    return "\n".join(path.read_text(errors="replace") for path in where.glob("runs/jobs/*.out"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of a run of two local processes that nothing happens to; each length runs once a session."""
    known: dict[int, RunFolder] = {}

    def run(steps: int) -> RunFolder:
        if steps not in known:
            where = tmp_path_factory.mktemp("whole")
            command = [
                sys.executable,
                "-m",
                "distft.cli",
                "train",
                *TINY,
                f"training.max_steps={steps}",
                "--nproc",
                "2",
            ]
            subprocess.run(command, cwd=where, env=environment(OMP_NUM_THREADS="1"), capture_output=True, check=True)
            known[steps] = RunFolder(where / "runs" / "tiny")
        return known[steps]

    return run


def submit_and_watch(cluster: Cluster, where: Path, *overrides: str) -> tuple[str, RunFolder]:
    """A job that has come to its fifteenth step, and its run."""
    job = submit(cluster, where, *overrides)
    folder = run_of(where, job)
    wait_for_step(folder, 15)
    return job, folder


def assert_same(folder: RunFolder, whole: RunFolder, requeues: int | None = None) -> None:
    """Finished, with the losses and the adapter of `whole` to the bit."""
    summary = folder.read_summary()
    assert (summary["status"], summary["world_size"]) == ("finished", 2)
    assert requeues is None or summary["requeues"] == requeues
    assert losses(folder) == losses(whole)
    ours, theirs = read_tensors(folder.adapter), read_tensors(whole.adapter)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def ranks(folder: RunFolder) -> list[psutil.Process]:
    """The workers that are at work in the folder of a job."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                "RANK" in process.environ()
                and process.cwd() == str(folder.path.parent.parent)
                and "distft.train" in process.cmdline()
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_two_jobs_at_once_on_the_same_two_nodes(cluster: Cluster, whole: Whole, tmp_path: Path) -> None:
    """No clash of ports or folders; each is the run of two local processes."""
    first, second = [submit(cluster, tmp_path) for _ in range(2)]
    for job in (first, second):
        assert cluster.wait(job, limit_s=LIMIT_S) == "COMPLETED", printed(tmp_path)
    assert cluster.show(first)["NodeList"] == cluster.show(second)["NodeList"]
    folders = [run_of(tmp_path, job) for job in (first, second)]
    assert folders[0].path != folders[1].path
    for folder in folders:
        assert_same(folder, whole(STEPS), requeues=0)
        assert {path.name for path in (folder.path / "logs").iterdir()} == {"rank0.log", "rank1.log"}
    listed = distft(cluster, tmp_path, "jobs")
    for job, folder in zip((first, second), folders, strict=True):
        (line,) = [line for line in listed.splitlines() if line.split()[0] == job]
        assert "COMPLETED" in line and f"{STEPS}/{STEPS}" in line and str(folder.path.relative_to(tmp_path)) in line


def test_a_requeue_goes_on_in_the_same_folder_and_a_finished_run_is_left_alone(
    cluster: Cluster, whole: Whole, tmp_path: Path
) -> None:
    job, folder = submit_and_watch(cluster, tmp_path)
    cluster.call("scontrol", "requeue", job)
    assert cluster.wait(job, limit_s=LIMIT_S) == "COMPLETED", printed(tmp_path)
    assert_same(folder, whole(STEPS), requeues=1)
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name != "jobs"] == ["tiny"]
    finished = folder.summary.read_text()
    cluster.call("scontrol", "requeue", job)
    cluster.wait(job, {"RUNNING"})
    assert cluster.wait(job, limit_s=LIMIT_S) == "COMPLETED", printed(tmp_path)
    assert "had already finished when it was restarted" in printed(tmp_path)
    assert folder.summary.read_text() == finished


@pytest.mark.timeout(1_200)  # ten minutes for the job, and then the run beside which it is held
def test_the_time_limit_sends_the_job_back_until_the_work_is_done(
    cluster: Cluster, whole: Whole, tmp_path: Path
) -> None:
    steps = 300  # SLURM looks every 30 s, so that the signal comes 30 to 60 s after the start
    job = submit(cluster, tmp_path, "slurm.time=00:02:00", "slurm.grace_s=60", steps=steps)
    deadline = time.monotonic() + LIMIT_S
    while cluster.show(job)["Restarts"] == "0":  # a slow machine would take many more turns, none of them different
        assert time.monotonic() < deadline and cluster.state(job) not in ENDED, printed(tmp_path)
        time.sleep(1)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=00:20:00")
    assert cluster.wait(job, limit_s=2 * LIMIT_S) == "COMPLETED", printed(tmp_path)
    folder = run_of(tmp_path, job)
    assert folder.read_summary()["requeues"] >= 1
    assert "requeued, 1 of 20" in printed(tmp_path)
    assert_same(folder, whole(steps))


def test_a_job_that_is_cancelled_stays_so_until_it_is_submitted_again(
    cluster: Cluster, whole: Whole, tmp_path: Path
) -> None:
    job, folder = submit_and_watch(cluster, tmp_path)
    cluster.call("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED" and ranks(folder) == []
    again = submit(cluster, tmp_path)
    assert cluster.wait(again, limit_s=LIMIT_S) == "COMPLETED", printed(tmp_path)
    assert run_of(tmp_path, again).path == folder.path
    assert_same(folder, whole(STEPS), requeues=0)


def test_a_node_that_goes_down_costs_no_work(cluster: Cluster, whole: Whole, tmp_path: Path) -> None:
    job, folder = submit_and_watch(cluster, tmp_path)
    last = cluster.call("scontrol", "show", "hostnames", cluster.show(job)["NodeList"]).split()[-1]
    cluster.set_node(last, "down")
    try:
        assert cluster.wait(job, limit_s=LIMIT_S) == "COMPLETED", printed(tmp_path)
    finally:
        if cluster.node_states()[last].startswith("down"):  # its daemon may have reported itself by now
            cluster.set_node(last, "resume")
    assert "NODE_FAIL" in cluster.call("sacct", "--duplicates", "--noheader", "--format=State", f"--jobs={job}")
    assert_same(folder, whole(STEPS), requeues=1)


def test_a_killed_rank_of_a_job_submitted_by_hand_comes_back(cluster: Cluster, whole: Whole, tmp_path: Path) -> None:
    """`sbatch slurm/train.sbatch`, with a fake GPU a node; the job itself does not end."""
    flags = ("--nodes=2", f"--export=ALL,OMP_NUM_THREADS=1,PATH={Path(sys.executable).parent}:{os.environ['PATH']}")
    environment_ = {**environment(), **{key: cluster.env[key] for key in ("SLURM_CONF", "PATH")}}
    command = [
        "sbatch",
        "--parsable",
        *flags,
        str(packaged("slurm/train.sbatch")),
        *TINY,
        f"training.max_steps={STEPS}",
    ]
    submitted = subprocess.run(command, cwd=tmp_path, env=environment_, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    folder = run_of(tmp_path, job)
    wait_for_step(folder, 15)
    rank = ranks(folder)[-1]
    killed = int(rank.environ()["RANK"])
    rank.kill()
    assert cluster.wait(job, limit_s=LIMIT_S) == "COMPLETED", (tmp_path / f"slurm-{job}.out").read_text()[-4000:]
    (fault,) = folder.read_faults()
    assert fault["rank"] == 1 - killed or "was killed by SIGKILL" in fault["cause"], (
        "the other rank told, from its own node"
    )
    assert folder.read_summary()["restarts"] == 1
    assert_same(folder, whole(STEPS), requeues=0)


def test_a_job_of_higher_priority_costs_no_work(cluster: Cluster, whole: Whole, tmp_path: Path) -> None:
    job, folder = submit_and_watch(cluster, tmp_path, "slurm.partition=low")
    high = cluster.script("sleep 2\n", "--partition=high", "--nodes=4", "--exclusive", name="high")
    assert cluster.wait(high, limit_s=LIMIT_S) == "COMPLETED"
    assert cluster.wait(job, limit_s=LIMIT_S) == "COMPLETED", printed(tmp_path)
    assert_same(folder, whole(STEPS), requeues=1)


def test_an_experiment_is_an_array_of_jobs_and_a_report_after_them(
    cluster: Cluster, whole: Whole, tmp_path: Path
) -> None:
    file = tmp_path / "recipes" / "experiments" / "ranks.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(RANKS)
    blank(tmp_path)
    settings = [*TINY[1:], f"training.max_steps={STEPS}", "slurm.nodes=2"]
    said = distft(cluster, tmp_path, "submit", "experiment=ranks", *settings)
    array, report = [line.split()[1].rstrip(":") for line in said.splitlines()]
    assert cluster.wait(report, limit_s=LIMIT_S) == "COMPLETED", printed(tmp_path)
    ours = [RunFolder(tmp_path / "runs" / f"ranks-{name}") for name in ("r16", "r4", "broken")]
    assert_same(ours[0], whole(STEPS), requeues=0)
    assert ours[1].read_summary()["trainable_parameters"] < ours[0].read_summary()["trainable_parameters"]
    text = (tmp_path / "runs" / "ranks.md").read_text()
    assert "ranks-r16" in text and "ranks-r4" in text and "finished" in text
    assert "ranks-broken" in text, "what did not run is named as missing"
    states = {line.split()[0]: line.split()[2] for line in distft(cluster, tmp_path, "jobs").splitlines()[1:]}
    assert states == {f"{array}_0": "COMPLETED", f"{array}_1": "COMPLETED", f"{array}_2": "FAILED", report: "COMPLETED"}


def test_a_mistake_ends_the_job_with_two(cluster: Cluster, tmp_path: Path) -> None:
    blank(tmp_path)
    job = submit(cluster, tmp_path, "data.path=blank.jsonl")
    assert cluster.wait(job, limit_s=LIMIT_S) == "FAILED"
    assert cluster.show(job)["ExitCode"].startswith("2:") and cluster.show(job)["Restarts"] == "0"
    assert "no row is left to train on" in printed(tmp_path)


def test_what_slurm_refuses_is_said(cluster: Cluster, tmp_path: Path) -> None:
    said = distft(cluster, tmp_path, "submit", "recipe=tiny", "slurm.partition=nowhere", check=False)
    assert "SLURM rejected the job: sbatch: error: invalid partition specified: nowhere" in said
    assert distft(cluster, tmp_path, "jobs") == "no jobs were submitted from here (runs/jobs)\n"
