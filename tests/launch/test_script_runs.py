"""The batch scripts as bash runs them. Shell functions in place of SLURM's commands show what the script asks of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from distft.config.recipe import load_recipe
from distft.launch.slurm import Job, report_script, script, template

DISTFT = ("python", "-m", "distft.cli")
OUTPUT = Path("runs/jobs")
AWKWARD = ("data.name=a b.jsonl", "run.dir=$(touch x) `id` 'q' \"d\" \\n", "tracking.tags=[é, '*']", "data.name=#;&|")
SLURM = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"}
COMMANDS = """
scontrol() { case $1 in show) echo n1 ;; *) echo "scontrol $*" >&2 ;; esac; }
squeue() { echo RUNNING; }
srun() {
  while [[ $1 == --* ]]; do shift; done
  if [[ $1 == bash ]]; then shift 4; fi # bash -c SCRIPT distft, then the command and its arguments
  printf '%s\\0' "$@"
  return ${CODE:-0}
}
"""


def bash(text: str, where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **SLURM, **variables}
    command = ["bash", "-c", COMMANDS + text]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)


def arguments(ended: subprocess.CompletedProcess[str]) -> tuple[str, ...]:
    """The words of the command that srun was asked to run."""
    return tuple(ended.stdout.split("\0")[:-1])


def array(*runs: tuple[str, ...]) -> str:
    return script(load_recipe(["recipe=tiny"]).slurm, Job("rank", runs, is_array=True), OUTPUT, DISTFT, template())


@pytest.mark.parametrize("index", [0, 1])
def test_each_member_of_an_array_gets_its_own_arguments_unchanged(index: int, tmp_path: Path) -> None:
    runs = (AWKWARD, ("recipe=tiny", "run.name=second"))
    ended = bash(array(*runs), tmp_path, SLURM_ARRAY_TASK_ID=str(index), SLURM_ARRAY_JOB_ID="4242")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert arguments(ended) == (*DISTFT, "train", *runs[index])
    assert not list(tmp_path.iterdir()), "nothing in an argument is executed"


def test_an_index_without_a_run_trains_nothing(tmp_path: Path) -> None:
    ended = bash(array(("recipe=tiny",), ("recipe=tiny",)), tmp_path, SLURM_ARRAY_TASK_ID="2")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "distft: there is no run 2; runs are 0 to 1\n"


def test_the_report_gets_its_arguments_unchanged(tmp_path: Path) -> None:
    text = report_script(load_recipe(["recipe=tiny"]).slurm, "rank", "1", AWKWARD, OUTPUT, DISTFT)
    ended = bash(text, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert arguments(ended) == (*DISTFT, "report", *AWKWARD)


def test_names_of_modules_are_not_executed(tmp_path: Path) -> None:
    modules = ["gcc/12;touch", "cuda&", "*"]
    slurm = load_recipe(["recipe=tiny", f"slurm.modules={modules}"]).slurm
    text = script(slurm, Job("tiny", (("recipe=tiny",),)), OUTPUT, DISTFT, template())
    ended = bash("module() { printf '%s\\0' \"$@\"; }\n" + text, tmp_path)
    assert arguments(ended) == ("load", *modules, *DISTFT, "train", "recipe=tiny")


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [("75", "", True), ("75", "4", True), ("75", "5", False), ("0", "", False), ("2", "", False), ("1", "", False)],
)
def test_an_interrupted_job_is_requeued_until_it_has_been_max_requeues_times(
    code: str, restarts: str, requeued: bool, tmp_path: Path
) -> None:
    slurm = load_recipe(["recipe=tiny", "slurm.max_requeues=5"]).slurm
    text = script(slurm, Job("tiny", (("recipe=tiny",),)), OUTPUT, DISTFT, template())
    ended = bash(text, tmp_path, CODE=code, **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    assert ended.returncode == int(code)
    said = f"distft: requeued, {int(restarts or 0) + 1} of 5\nscontrol requeue 4242\n"
    assert ended.stderr == (said if requeued else "")


def test_a_folder_and_a_name_with_blanks_stay_whole_in_sbatch_s_options(tmp_path: Path) -> None:
    """sbatch reads its lines like a shell: it would end a value at a blank or at a #. It replaces %j in any part."""
    slurm = load_recipe(["recipe=tiny"]).slurm
    text = script(slurm, Job("my ranks", (("recipe=tiny",),)), Path("it's #1/5%j/jobs"), DISTFT, template())
    (name,) = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "--job-name" in line]
    (output,) = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "--output" in line]
    ended = subprocess.run(["bash", "-c", f"printf '%s\\0' {name} {output}"], capture_output=True, text=True)
    assert arguments(ended) == ("--job-name=my ranks", "--output=it's #1/5%%j/jobs/%x-%j.out")
