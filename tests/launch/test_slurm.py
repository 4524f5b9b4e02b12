"""The batch scripts, whole, against the files in tests/golden; what a `slurm` section may hold; `--dry-run`.

To take a change of the scripts over: DISTFT_GOLDEN=write python -m pytest tests/test_slurm.py, then read the difference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distft.config.recipe import load_recipe
from distft.errors import RecipeError
from distft.launch.slurm import Job, report_script, script, slurm_faults, template
from distft.launch.submit import Submission

GOLDEN = Path(__file__).parent / "golden"
DISTFT = ("python", "-m", "distft.cli")
PLAIN = ("recipe=fsdp_bf16", "slurm.nodes=2", "slurm.gpus_per_node=8", "slurm.time=04:00:00", "slurm.partition=gpu")
WHOLE = (
    "recipe=ddp_qlora", "slurm.account=lab-a", "slurm.partition=long,short", "slurm.qos=high", "slurm.nodes=4",
    "slurm.gres=gpu:h100-47:2", "slurm.processes_per_node=2", "slurm.cpus_per_task=16", "slurm.mem=200G", "slurm.time=2-00",
    "slurm.constraint=ib&h100", "slurm.exclude=n[7-9]", "slurm.reservation=course", "slurm.dependency=afterok:1234",
    "slurm.container=registry.example.org#lab/distft:1.0", "slurm.container_mounts=[/models:/models]",
    "slurm.modules=[cuda/13.0, nccl]", "slurm.setup=['source ~/venvs/distft/bin/activate', 'ulimit -n 65536']",
    "slurm.environment={NCCL_DEBUG: WARN, TMPDIR: /local/a b}", "slurm.grace_s=300", "slurm.max_requeues=5",
    "data.name=rows of ours.jsonl", "data.format.text=it's",
)  # fmt: skip


def scripts() -> dict[str, str]:
    """Every kind of script, by the name of its golden file."""
    output = Path("runs/jobs")
    made = {}
    for name, arguments in (("plain", PLAIN), ("whole", WHOLE)):
        recipe = load_recipe(arguments, checks=(slurm_faults,))
        made[name] = script(recipe.slurm, Job(recipe.run.name, (arguments,)), output, DISTFT, template())
    slurm = load_recipe(["recipe=tiny", "slurm.array=0-1%1", "slurm.modules=[cuda]"]).slurm
    runs = tuple(("recipe=tiny", f"lora.r={rank}", f"run.name=rank-r{rank}") for rank in (8, 32))
    made["array"] = script(slurm, Job("rank", runs, is_array=True), output, DISTFT, template())
    made["report"] = report_script(
        slurm, "rank", "4242", ["experiment=rank", "--output", "runs/rank.md"], output, DISTFT
    )
    return made


@pytest.mark.parametrize("name", scripts())
def test_a_script_is_the_golden_one(name: str) -> None:
    file, text = GOLDEN / f"{name}.sbatch", scripts()[name]
    if os.environ.get("DISTFT_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", scripts())
def test_bash_reads_every_script(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_bash_gives_the_arguments_back_as_they_were() -> None:
    """Blanks, quotes and dollar signs in overrides reach distft unchanged, and nothing of them is run."""
    arguments = ("recipe=tiny", "data.name=a b", "run.dir=$(touch x) `id` 'q' \"d\" \\n", "tracking.tags=[é, '*']")
    text = script(load_recipe(["recipe=tiny"]).slurm, Job("tiny", (arguments,)), Path("runs/jobs"), DISTFT, template())
    (line,) = [line for line in text.splitlines() if line.startswith("set -- ")]
    back = subprocess.run(["bash", "-c", f'{line}; printf "%s\\0" "$@"'], capture_output=True, text=True, check=True)
    assert tuple(back.stdout.split("\0")[:-1]) == arguments


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("slurm.gpus=8", "slurm.gpus: unknown key"),
        ("slurm.partition='gpu --wrap=x'", "slurm.partition"),
        ("slurm.container='$(id)'", "slurm.container"),
        ('slurm.setup=["a\\nb"]', "slurm.setup"),
        ("slurm.time=tomorrow", "slurm.time"),
        ("slurm.nodes=0", "slurm.nodes"),
        ("slurm.time=00:01:00", "is not longer than slurm.grace_s (120 s)"),
        ("slurm.environment={WANDB_API_KEY: abc}", "looks like a secret"),
        ("slurm.environment={'A B': c}", "slurm.environment"),
    ],
)
def test_a_section_that_no_cluster_could_take_is_refused(override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(["recipe=tiny", override], checks=(slurm_faults,))
    assert said in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_variable_with_a_harmless_name_is_no_secret() -> None:
    recipe = load_recipe(["recipe=tiny", "slurm.environment={TOKENIZERS_PARALLELISM: 'false'}"], checks=(slurm_faults,))
    assert recipe.slurm.environment == {"TOKENIZERS_PARALLELISM": "false"}


def test_a_report_runs_in_the_container_as_well() -> None:
    slurm = load_recipe(WHOLE).slurm
    text = report_script(slurm, "rank", "1", ["experiment=rank"], Path("runs/jobs"), DISTFT)
    assert '"--container-image=registry.example.org#lab/distft:1.0"' in text
    assert text.splitlines()[-1] == '"${srun[@]}" python -m distft.cli report experiment=rank'


def test_gpus_are_asked_for_once() -> None:
    with pytest.raises(RecipeError, match="GPUs are asked for twice"):
        load_recipe(["recipe=tiny", "slurm.gpus_per_node=2", "slurm.gres=gpu:2"], checks=(slurm_faults,))


@pytest.mark.parametrize("limit", ["UNLIMITED", "null", "00:02:01"])
def test_a_job_without_a_time_limit_or_with_one_beyond_the_grace_period_is_valid(limit: str) -> None:
    assert load_recipe(["recipe=tiny", f"slurm.time={limit}"], checks=(slurm_faults,)).slurm.grace_s == 120


def dry_run(where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distft.cli", "submit", *words, "--dry-run"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(where / "nothing")}
    return subprocess.run(command, cwd=where, env=offline, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("recipe=tiny", "slurm.array=0-3"), "an array has the runs of an experiment"),
        (("recipe=tiny", "slurm.nodes=3"), "does not divide into micro-batches of 4 on 3 processes"),
        (("recipe=ddp_qlora", "data.name=tiny"), "meta-llama/Llama-2-7b-hf is not in the cache"),
        (("experiment=tiny", "run.dir=x", "slurm.nodes=three"), "slurm.nodes"),
    ],
)
def test_what_would_end_a_job_at_its_start_is_found_before_it_queues(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    ended = dry_run(tmp_path, *words)
    assert ended.returncode == 2
    assert said in ended.stderr


def test_an_experiment_is_one_array(tmp_path: Path) -> None:
    ended = dry_run(tmp_path, "experiment=tiny", "slurm.partition=cpu")
    assert ended.returncode == 0, ended.stderr
    assert "#SBATCH --array=0-11" in ended.stdout
    assert "  11) set -- " in ended.stdout and ended.stdout.count("slurm.partition=cpu") == 12


def test_a_dry_run_prints_the_script_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distft.cli", "submit", "recipe=tiny", "slurm.nodes=2", "--dry-run"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "#SBATCH --nodes=2" in ended.stdout and "set -- recipe=tiny slurm.nodes=2" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_a_submission_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distft.cli", "submit", "recipe=tiny"]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "there is no sbatch here" in ended.stderr


def test_what_one_process_makes_of_a_strategy_is_said(tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=tiny"])
    submission = Submission.of_recipe(recipe, ["recipe=tiny"])
    assert submission.notes == [
        "one process: ddp will fall back to single; slurm.gpus_per_node or slurm.processes_per_node says how many there are"
    ]
    two = load_recipe(["recipe=tiny", "slurm.nodes=2"])
    assert Submission.of_recipe(two, ["recipe=tiny"]).notes == []
    cores = load_recipe(["recipe=tiny", "slurm.processes_per_node=2"])
    (line,) = Submission.of_recipe(cores, ["recipe=tiny"]).notes
    assert line.startswith("slurm.cpus_per_task is null")


def test_a_time_that_slurm_could_not_read_is_told_how_it_is_written() -> None:
    with pytest.raises(
        RecipeError, match=r"slurm.time: '4h' is not written as it has to be \(Time limit .*`hours:minutes:seconds`"
    ):
        load_recipe(["recipe=tiny", "slurm.time=4h"])
