"""What a process knows about the SLURM job that it runs in."""

from __future__ import annotations

from distft.runs.slurm_job import batch_job, requeues


def test_a_job_counts_how_often_it_was_requeued() -> None:
    assert requeues({"DISTFT_JOB": "4242"}) == 0
    assert requeues({"DISTFT_JOB": "4242", "SLURM_RESTART_COUNT": "3"}) == 3
    assert requeues({"SLURM_JOB_ID": "4242", "SLURM_RESTART_COUNT": "3"}) is None, "an interactive allocation"


def test_a_job_is_known_by_its_own_variable() -> None:
    assert batch_job({"DISTFT_JOB": "4242_1", "SLURM_JOB_ID": "4244"}) == "4242_1"
    assert batch_job({"SLURM_JOB_ID": "4242"}) is None
