"""The batch scripts, compared with the files in `golden`, and what a `slurm` section may contain.

To accept a change, run DISTFT_GOLDEN=write python -m pytest tests/launch/test_slurm.py and read the diff.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from distft.config.recipe import load_recipe
from distft.errors import RecipeError
from distft.launch.slurm import Job, report_script, script, slurm_faults, template

GOLDEN = Path(__file__).parent / "golden"
DISTFT = ("python", "-m", "distft.cli")
PLAIN = ("recipe=fsdp_bf16", "slurm.nodes=2", "slurm.gpus_per_node=8", "slurm.time=04:00:00", "slurm.partition=gpu")
WHOLE = (
    "recipe=ddp_qlora",
    "slurm.account=lab-a",
    "slurm.partition=long,short",
    "slurm.qos=high",
    "slurm.nodes=4",
    "slurm.gres=gpu:h100-47:2",
    "slurm.processes_per_node=2",
    "slurm.cpus_per_task=16",
    "slurm.mem=200G",
    "slurm.time=2-00",
    "slurm.constraint=ib&h100",
    "slurm.exclude=n[7-9]",
    "slurm.reservation=course",
    "slurm.dependency=afterok:1234",
    "slurm.container=registry.example.org#lab/distft:1.0",
    "slurm.container_mounts=[/models:/models]",
    "slurm.modules=[cuda/13.0, nccl]",
    "slurm.setup=['source ~/venvs/distft/bin/activate', 'ulimit -n 65536']",
    "slurm.environment={NCCL_DEBUG: WARN, TMPDIR: /local/a b}",
    "slurm.grace_s=300",
    "slurm.max_requeues=5",
    "data.name=rows of ours.jsonl",
    "data.format.text=it's",
)


def scripts() -> dict[str, str]:
    """One script of every kind, by the name of its golden file."""
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
def test_a_script_matches_its_golden_file(name: str) -> None:
    file, text = GOLDEN / f"{name}.sbatch", scripts()[name]
    if os.environ.get("DISTFT_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", scripts())
def test_every_script_is_valid_bash(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_arguments_survive_bash_unchanged() -> None:
    """Spaces, quotes and dollar signs in overrides reach distft unchanged, and nothing in them is executed."""
    arguments = ("recipe=tiny", "data.name=a b", "run.dir=$(touch x) `id` 'q' \"d\" \\n", "tracking.tags=[é, '*']")
    text = script(load_recipe(["recipe=tiny"]).slurm, Job("tiny", (arguments,)), Path("runs/jobs"), DISTFT, template())
    (line,) = [line for line in text.splitlines() if line.startswith("set -- ")]
    back = subprocess.run(["bash", "-c", f'{line}; printf "%s\\0" "$@"'], capture_output=True, text=True, check=True)
    assert tuple(back.stdout.split("\0")[:-1]) == arguments


@pytest.mark.parametrize(
    ("override", "message"),
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
def test_a_section_that_cannot_work_on_any_cluster_is_rejected(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(["recipe=tiny", override], checks=(slurm_faults,))
    assert message in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_variable_with_a_harmless_name_is_not_taken_for_a_secret() -> None:
    recipe = load_recipe(["recipe=tiny", "slurm.environment={TOKENIZERS_PARALLELISM: 'false'}"], checks=(slurm_faults,))
    assert recipe.slurm.environment == {"TOKENIZERS_PARALLELISM": "false"}


def test_the_report_job_uses_the_container_too() -> None:
    slurm = load_recipe(WHOLE).slurm
    text = report_script(slurm, "rank", "1", ["experiment=rank"], Path("runs/jobs"), DISTFT)
    assert '"--container-image=registry.example.org#lab/distft:1.0"' in text
    assert text.splitlines()[-1] == '"${srun[@]}" python -m distft.cli report experiment=rank'


def test_gpus_are_requested_once() -> None:
    with pytest.raises(RecipeError, match="GPUs are requested twice"):
        load_recipe(["recipe=tiny", "slurm.gpus_per_node=2", "slurm.gres=gpu:2"], checks=(slurm_faults,))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:00", 5400),
        ("2:01", 180),  # sbatch rounds up to whole minutes
        ("00:02:01", 180),
        ("1:30:00", 5400),
        ("100:00:00", 360_000),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-12:30:05", 131_460),
        ("null", None),
        ("0", None),  # sbatch: no limit
        ("-1", None),
        ("UNLIMITED", None),
        ("unlimited", None),
        ("INFINITE", None),
    ],
)
def test_each_of_sbatch_s_forms_of_a_time_limit_is_accepted(text: str, seconds: float | None) -> None:
    slurm = load_recipe(["recipe=tiny", f"slurm.time={text}"], checks=(slurm_faults,)).slurm
    assert slurm.time_s == seconds
    made = script(slurm, Job("tiny", (("recipe=tiny",),)), Path("runs/jobs"), DISTFT, template())
    assert f"#SBATCH --time={text}\n" in made or (text == "null" and "--time" not in made)


@pytest.mark.parametrize("text", ["2", "2:00", "119:00", "0-0:02", "00:01:01"])
def test_a_time_limit_within_the_grace_period_is_rejected(text: str) -> None:
    grace = "slurm.grace_s=7140" if text == "119:00" else "slurm.grace_s=120"
    with pytest.raises(RecipeError, match=r"s, which is not longer than slurm.grace_s"):
        load_recipe(["recipe=tiny", f"slurm.time={text}", grace], checks=(slurm_faults,))


@pytest.mark.parametrize("text", ["4h", "1-", ":30", "1:2:3:4", "1-2-3", "-2", "1 2", "''"])
def test_another_form_is_rejected_with_a_list_of_the_forms(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(["recipe=tiny", f"slurm.time={text}"])
    assert "slurm.time" in str(caught.value)
    for form in ("`minutes`", "`minutes:seconds`", "`days-hours:minutes`", "`UNLIMITED`"):
        assert form in str(caught.value)


def test_numbers_that_yaml_reads_as_such_are_sbatch_s_text() -> None:
    slurm = load_recipe(["recipe=tiny", "slurm.mem=0", "slurm.array=3"], checks=(slurm_faults,)).slurm
    assert (slurm.mem, slurm.array) == ("0", "3")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ("0-3%0", "%0 would let no run start"),
        ("3-1", "3-1 ends before it begins"),
        ("0-4:0", "0-4:0 has a step of 0"),
        *((text, "has the wrong format") for text in ("0-", "1,,2", "0-3%", "0-1-2", "0:2", "1%2,3")),
    ],
)
def test_an_array_that_sbatch_would_refuse_or_never_start_is_rejected(array: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(["recipe=tiny", f"slurm.array={array}"], checks=(slurm_faults,))
    assert "slurm.array" in str(caught.value) and message in str(caught.value)
