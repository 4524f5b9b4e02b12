"""`distft submit`: what is checked before a job is queued, `--dry-run`, and notes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distft.api.submit import submission_of
from distft.cli.main import main
from distft.config.recipe import load_recipe
from distft.errors import LaunchError, RecipeError
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
        (("recipe=tiny", "lora.rank=8"), "lora.rank: unknown key"),
        (("experiment=tiny", "slurm.array=1-12"), "slurm.array: 1-12: the runs of tiny are 0 to 11"),
    ],
)
def test_a_fault_that_leaves_a_script_is_named_below_it(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    ended = dry_run(tmp_path, *words)
    assert ended.returncode == 2
    assert ended.stdout.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=tiny\n")
    assert message in ended.stderr and "Traceback" not in ended.stderr
    with pytest.raises(RecipeError, match=re.escape(message)):
        submission_of(list(words)).submit()


def test_a_fault_that_leaves_no_script_is_named(tmp_path: Path) -> None:
    ended = dry_run(tmp_path, "experiment=tiny", "run.dir=x", "slurm.nodes=three")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "slurm.nodes" in ended.stderr


def test_a_dry_run_warns_of_what_is_missing_and_submitting_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recipe=tiny", "model.name=nobody/no-such-model", "data.name=rows.jsonl", "data.format.text=t"]
    missing = ["nobody/no-such-model is not in the cache", "there is no data file or folder rows.jsonl"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", *words, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "set -- recipe=tiny model.name=nobody/no-such-model" in shown.out
    for message in (*missing, "there is no sbatch here"):
        assert message in shown.err
    assert shown.err.count("distft: warning: ") == 3
    with pytest.raises(LaunchError) as caught:
        submission_of(words).submit()
    assert all(message in str(caught.value) for message in missing)


@pytest.mark.parametrize("array", ["0", "11", "0-11%2", "3,5-7", "0-11:4"])
def test_an_array_may_name_any_of_the_runs(array: str) -> None:
    assert submission_of(["experiment=tiny", f"slurm.array={array}"]).faults == ()


@pytest.mark.parametrize("array", ["12", "0,12", "11-12", "0-99999999999:4"])
def test_an_array_that_names_a_run_that_is_none_is_rejected(array: str) -> None:
    with pytest.raises(RecipeError, match="the runs of tiny are 0 to 11"):
        submission_of(["experiment=tiny", f"slurm.array={array}"]).submit()


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
