"""`distft submit`: what is checked before a job is queued, `--dry-run`, and notes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distft.config.recipe import load_recipe
from distft.launch.submit import Submission


def dry_run(where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distft.cli", "submit", *words, "--dry-run"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(where / "nothing")}
    return subprocess.run(command, cwd=where, env=offline, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recipe=tiny", "slurm.array=0-3"), "only an experiment can be submitted as an array"),
        (("recipe=tiny", "slurm.nodes=3"), "does not divide into micro-batches of 4 on 3 processes"),
        (("recipe=ddp_qlora", "data.name=tiny"), "meta-llama/Llama-2-7b-hf is not in the cache"),
        (("experiment=tiny", "run.dir=x", "slurm.nodes=three"), "slurm.nodes"),
    ],
)
def test_what_would_end_a_job_at_its_start_is_found_before_it_is_queued(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    ended = dry_run(tmp_path, *words)
    assert ended.returncode == 2
    assert message in ended.stderr


def test_an_experiment_becomes_an_array(tmp_path: Path) -> None:
    ended = dry_run(tmp_path, "experiment=tiny", "slurm.partition=cpu")
    assert ended.returncode == 0, ended.stderr
    assert "#SBATCH --array=0-11" in ended.stdout
    assert "  11) set -- " in ended.stdout and ended.stdout.count("slurm.partition=cpu") == 12


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distft.cli", "submit", "recipe=tiny", "slurm.nodes=2", "--dry-run"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "#SBATCH --nodes=2" in ended.stdout and "set -- recipe=tiny slurm.nodes=2" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_submitting_without_slurm_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distft.cli", "submit", "recipe=tiny"]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "there is no sbatch here" in ended.stderr


def test_notes_mention_a_fallback_to_one_process_and_a_lack_of_cores() -> None:
    recipe = load_recipe(["recipe=tiny"])
    submission = Submission.of_recipe(recipe, ["recipe=tiny"])
    assert submission.notes == [
        "one process: ddp will fall back to single; set slurm.gpus_per_node or slurm.processes_per_node for more"
    ]
    two = load_recipe(["recipe=tiny", "slurm.nodes=2"])
    assert Submission.of_recipe(two, ["recipe=tiny"]).notes == []
    cores = load_recipe(["recipe=tiny", "slurm.processes_per_node=2"])
    (line,) = Submission.of_recipe(cores, ["recipe=tiny"]).notes
    assert line.startswith("slurm.cpus_per_task is null")


def test_submitting_does_not_import_torch_or_transformers() -> None:
    """They take seconds, and a dry run needs neither."""
    program = (
        "import sys\n"
        "from distft.cli.main import main\n"
        "sys.argv = ['distft', 'submit', 'recipe=tiny', 'slurm.nodes=2', '--dry-run']\n"
        "assert main() == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[-1] == "[]"
