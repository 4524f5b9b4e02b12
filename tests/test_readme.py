"""What the README says is so: its commands run, its recipes load, its messages and figures are the real ones.

Blocks marked `sh` are commands. One that ends in `# needs a GPU`, `the hub` or `SLURM` is not run; its recipe and
overrides are loaded. Blocks marked `console` are commands with their output, `python` and `yaml` are what they say.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distft.config.evaluation import TaskName
from distft.config.files import list_recipes
from distft.config.recipe import load_recipe
from distft.config.schema import StrategyName
from distft.data.formats import data_faults
from distft.distributed.strategies import base as strategy
from distft.evaluation.columns import TASKS
from distft.experiments.expand import load_experiment
from distft.experiments.schema import list_experiments
from distft.launch import slurm
from distft.stats import ratio

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIMIT_S = 400  # of a command, on a busy machine


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Language and text of every block in one of `languages`, in the order of the page."""
    return re.findall(rf"^```({'|'.join(languages)})\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of an `sh` block, one a line, with their comments."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


ALL = [command for _, text in blocks("sh") for command in commands(text)]
ELSEWHERE = [command for command in ALL if re.search(r"# .*needs (a GPU|the hub|SLURM)", command)]
MAKE = [command for command in ALL if command.startswith("make ")]


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A folder as a reader has it: rows of their own, and the page's own recipes."""
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer"])
        rows.writerows([f"What is {n} and {n}?", f"It is {2 * n}."] for n in range(40))
    for _, text in blocks("yaml"):
        path = tmp_path / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def bash(command: str, where: Path) -> subprocess.CompletedProcess[str]:
    """`command` as typed with the environment of this Python active."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_"))}
    environment |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", "-c", command], cwd=where, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )


def test_the_page_has_every_kind_of_command() -> None:
    assert {"make demo", "make test"} <= {" ".join(shlex.split(command, comments=True)) for command in MAKE}
    assert any("accelerate launch" in command for command in ELSEWHERE)
    assert any("sbatch" in command for command in ELSEWHERE)
    assert len(ALL) - len(ELSEWHERE) - len(MAKE) >= 6


@pytest.mark.timeout(1500)  # all of the page's commands
def test_commands_and_programs_run_in_the_order_of_the_page(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader)
    for language, text in blocks("sh", "python"):
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})
            continue
        for command in commands(text):
            if command not in ELSEWHERE + MAKE:
                ended = bash(command, reader)
                assert ended.returncode == 0, f"{command}\n{ended.stdout[-1000:]}\n{ended.stderr[-3000:]}"
    assert (reader / "runs" / "tiny" / "merged" / "model.safetensors").is_file()
    assert json.loads((reader / "recipe.schema.json").read_text(encoding="utf-8"))["title"] == "distft recipe"


@pytest.mark.parametrize("command", ELSEWHERE)
def test_recipes_of_commands_for_other_machines_load(
    command: str, reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reader)
    words = shlex.split(command, comments=True)
    settings = [word for word in words if re.match(r"[\w.]+=", word)]
    checks = (strategy.faults, data_faults, slurm.faults)
    if "experiment=" in command:
        assert f"experiment={load_experiment(settings, checks=checks).name}" in words
    elif words[:2] == ["distft", "evaluate"]:
        settings = [word for word in settings if not word.startswith(("model=", "adapter="))]
        assert load_recipe(settings, checks=checks).evaluation.tasks
    else:
        assert f"recipe={load_recipe(settings, checks=checks).source.name}" in words


@pytest.mark.parametrize("command", ELSEWHERE)
def test_starters_are_there_and_are_bash(command: str) -> None:
    for word in shlex.split(command, comments=True):
        if word.startswith(("launch/", "slurm/")):
            text = (ROOT / word).read_text(encoding="utf-8")
            assert text.startswith("#!/usr/bin/env bash\n")
            assert subprocess.run(["bash", "-n", str(ROOT / word)]).returncode == 0
            assert os.access(ROOT / word, os.X_OK) or word.endswith(".sbatch")


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_the_targets(command: str) -> None:
    ended = bash(command.replace("make ", "make --dry-run ", 1), ROOT)
    assert ended.returncode == 0, ended.stderr


def test_messages_are_the_real_ones(reader: Path) -> None:
    (block,) = [text for _, text in blocks("console")]
    for part in block.split("$ ")[1:]:
        command, _, shown = part.partition("\n")
        ended = bash(command, reader)
        assert ended.returncode == 2
        assert ended.stderr == shown


def test_the_page_s_experiment_is_one(reader: Path) -> None:
    experiment = load_experiment(["experiment=precision"], checks=(strategy.faults, data_faults), folder=reader)
    assert [run.variant for run in experiment.runs] == ["bits4", "bits32"] * 5


def tables_of(heading: str) -> list[list[list[str]]]:
    """The cells of the tables under `## heading`, without their heads."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]] for table in tables
    ]


def rows_of(heading: str) -> list[list[str]]:
    (table,) = tables_of(heading)
    return table


def test_tables_name_every_shipped_recipe_and_every_strategy(tmp_path: Path) -> None:
    assert {row[0].strip("`") for row in rows_of("Recipes")} == set(list_recipes(tmp_path))
    assert {row[0].strip("`") for row in rows_of("Experiments and reports")} == set(list_experiments(tmp_path))
    assert [row[0].strip("`") for row in rows_of("Strategies")] == list(StrategyName.__args__)


def test_evaluations_are_described_by_tasks_and_keys_that_there_are() -> None:
    section = README.split("\n## Evaluate\n")[1].split("\n## ")[0]
    tasks, files = tables_of("Evaluate")
    assert {row[0].strip("`") for row in tasks} == set(TaskName.__args__) == set(TASKS)
    keys = set(re.findall(r"`(evaluation(?:\.\w+)+)`", section)) | set(re.findall(r"(evaluation(?:\.\w+)+)=", section))
    recipe = load_recipe([])
    for key in keys - {"evaluation.json"}:
        value: Any = recipe
        for part in key.split("."):
            assert hasattr(value, part), key
            value = getattr(value, part)
    assert {row[0].strip("`") for row in files} <= keys
    assert {"evaluation.judge.mode", "evaluation.judge.rubric", "evaluation.generation.max_new_tokens"} <= keys
    judge = recipe.evaluation.judge
    assert f"`evaluation.judge.mode`\nis `{judge.mode}` by default" in section
    assert f"tokens ({recipe.evaluation.generation.max_new_tokens})" in section
    assert f"`evaluation.judge.max_new_tokens` ({judge.max_new_tokens})" in section


def test_the_files_of_evaluations_are_as_the_page_says(tmp_path: Path) -> None:
    """A file of each kind with what its row names, and no more."""
    from distft.evaluation.judge import rubric_of
    from distft.evaluation.tasks.alpaca import read_pairs
    from distft.evaluation.tasks.mt_bench import read_questions
    from distft.evaluation.tasks.reviews import load

    given = {row[0].strip("`"): re.findall(r"`(\w+)`", row[2]) for row in tables_of("Evaluate")[1]}
    columns = {"text": "Good.", "label": 1, "question_id": 1, "category": "math", "turns": ["One?", "Two?"], "reference": ["1", "2"],
               "instruction": "Say one.", "output": "One.", "dataset": "mine"}  # fmt: skip
    files = {}
    for key, names in given.items():
        files[key] = tmp_path / f"{key}.jsonl"
        files[key].write_text(json.dumps({name: columns[name] for name in names if name in columns}) + "\n")
    words = [f"evaluation.imdb.path={files['evaluation.imdb.path']}", "evaluation.imdb.balanced=false"]
    assert [(row.text, row.label) for row in load(load_recipe(words), 2)] == [("Good.", 1)]
    assert read_questions(files["evaluation.mt_bench.questions"])[0].reference == ("1", "2")
    assert read_pairs(files["evaluation.alpaca.path"])[0].dataset == "mine"
    rubric = files["evaluation.judge.rubric"]
    rubric.write_text("Is it polite?\n" + "".join(f"Score {grade}: so\n" for grade in range(1, 6)))
    assert "polite" in rubric_of(load_recipe([f"evaluation.judge.rubric={rubric}"]).evaluation.judge)


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_measured_figures_are_those_of_the_record() -> None:
    one, two, strategies, question, long = tables_of("Measured")
    record = measured("throughput_h200")
    pairs = {pair["case"]: pair for pair in record["comparisons"] if pair["reference"].startswith("unsloth")}
    for name, *cells in one:
        pair = pairs[name.strip("`")]
        ours, theirs = record["summary"][pair["case"]], record["summary"][pair["reference"]]
        assert pair["same_work"]
        assert cells == [
            f"{ours['samples_per_second']['median']:.1f}", f"{theirs['samples_per_second']['median']:.1f}",
            f"× {pair['ratio']['samples_per_second']['of_medians']:.2f}", f"{ours['mfu']['median']:.3f}",
            f"{ours['peak_memory_gb']['median']:.1f}", f"{theirs['peak_memory_gb']['median']:.1f}",
        ]  # fmt: skip

    for row in two:
        record = measured("throughput_h200_" + ("fsdp" if "fsdp" in row[0] else "two_gpus"))
        both = {(pair["case"], pair["reference"]): pair for pair in record["comparisons"]}
        pair = both[row[0].strip("`"), row[2].strip("`")]
        ours, theirs = record["summary"][pair["case"]], record["summary"][pair["reference"]]
        ratios = [pair["ratio"][figure]["of_medians"] for figure in ("samples_per_second", "tokens_per_second")]
        rates = [side["samples_per_second"]["median"] for side in (ours, theirs)]
        peaks = [side["peak_memory_gb"]["median"] for side in (ours, theirs)]
        assert pair["same_work"]
        assert [row[1], row[3]] == [f"{rate:.1f}" for rate in rates]
        assert row[4:] == [*(f"× {ratio:.1f}" for ratio in ratios), *(f"{peak:.1f}" for peak in peaks)]

    summary = measured("throughput_h200_strategies")["summary"]
    forms = {"samples_per_second": ".1f", "tokens_per_second": ",.0f", "mfu": ".3f", "peak_memory_gb": ".1f", "joules_per_1000_samples": ",.0f"}  # fmt: skip
    for name, *cells in strategies:
        found = summary[name.strip("`")]
        assert cells == [format(found[figure]["median"], form) for figure, form in forms.items()]

    experiments = measured("ddp_vs_fsdp_h200")["experiments"]
    for settings, name, runs, rate, kind, compute, host, *rest in question:
        experiment = "ddp_vs_fsdp" if settings == "distft's" else "ddp_vs_fsdp_published"
        (variant,) = (
            each
            for each in experiments[experiment]["report"]["variants"]
            if each["name"].removeprefix(f"{experiment}-") == name.strip("`")
        )
        found, split = variant["spreads"], variant["split"]
        spread = found["samples_per_second"]
        several = f" ({spread['least']:.1f}–{spread['greatest']:.1f})" if variant["finished"] > 1 else ""
        parts = sum(split[key] for key in ("compute_s", "communication_s", "copy_s", "data_wait_s", "host_s"))
        assert [runs, rate] == [str(variant["finished"]), f"{spread['median']:.1f}{several}"]
        assert [kind, compute, host] == [
            variant["bound"]["kind"],
            *(f"{split[key] / parts:.0%}" for key in ("compute_s", "host_s")),
        ]
        forms = {"mfu": ".3f", "peak_memory_gib": ".1f", "joules_per_sample": ".1f"}
        assert rest == [format(found[key]["median"], form) for key, form in forms.items()]

    summary = measured("long_context_h200")["summary"]
    for name, *cells in long:
        sides = [summary[name.strip("`")], summary[name.strip("`") + "_plain"]]
        peaks = [f"{side['peak_memory_gb']['median']:.2f}" for side in sides]
        assert cells == [*peaks, *(f"{side['tokens_per_second']['median']:,.0f}" for side in sides)]


def test_what_is_said_of_idle_time_and_of_precision_is_in_the_record() -> None:
    text = README.split("\n## Measured\n")[1]
    runs = measured("profile_h200")["runs"]
    idle = {name: max(rank["idle_share"] for rank in run["profile"]["ranks"]) for name, run in runs.items()}
    waits = max(rank["communication_exposed_s"] / rank["step_time_s"] for rank in runs["fsdp_bf16"]["profile"]["ranks"])
    assert f"idle for {idle['single']:.1%} of a step" in text
    assert f"under FSDP2 for {idle['fsdp_bf16']:.1%}, with {waits:.1%} waiting" in text
    off = measured("precision_h200")["difference_from_fp32"]
    for variant in ("shipped", "bf16_masters"):
        mean, least, most = (f"{off[variant][which]:.4f}" for which in ("mean", "min", "max"))
        assert f"{mean} ({least} to {most})" in " ".join(text.split()).replace("above that of fp32 throughout ", ""), (
            variant
        )
    assert f"of {off['shipped']['learned']:.2f} learned" in text


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_intervals_of_the_answer_are_those_of_the_records() -> None:
    text = " ".join(README.split())
    speeds: dict[str, dict[str, list[float]]] = {}
    for experiment, each in measured("ddp_vs_fsdp_h200")["experiments"].items():
        for run in each["report"]["runs"]:
            speeds.setdefault(experiment, {}).setdefault(run["variant"], []).append(
                run["figures"]["samples_per_second"]
            )
    published, ours = (
        ratio(speeds[name]["fsdp_bf16"], speeds[name]["ddp_qlora"], together)
        for name, together in (("ddp_vs_fsdp_published", 1), ("ddp_vs_fsdp", 3))
    )
    assert f"is {published.low:.2f} to {published.high:.2f} times as fast as FSDP2 in bf16, with distft's {ours.low:.2f} to {ours.high:.2f} times" in text  # fmt: skip
    pair = ratio(speeds["ddp_vs_fsdp"]["fsdp_bf16"], speeds["ddp_vs_fsdp"]["ddp_bf16"])
    assert f"`ddp_bf16` is {pair.centre:.2f} times as fast as `fsdp_bf16` ({pair.low:.2f} to {pair.high:.2f}," in text
    sides: dict[str, list[float]] = {}
    for run in measured("pauses_h200")["runs"]:
        sides.setdefault(run["side"], []).append(run["samples_per_second"])
    gain = ratio(sides["not frozen"], sides["frozen"])
    assert f"× {gain.centre:.2f} ({gain.low:.2f} to {gain.high:.2f})" in text
