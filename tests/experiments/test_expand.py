"""Experiments: the runs that a file describes, and the shipped experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.cli.main import main
from distft.config.recipe import load_recipe
from distft.errors import ExperimentError
from distft.experiments.expand import load_experiment
from distft.experiments.schema import list_experiments
from distft.paths import packaged

from .loading import CHECKS, faults, load, value, write

SHIPPED = sorted(path.stem for path in packaged("recipes/experiments").glob("*.yaml"))


# ---- the shipped experiments -----------------------------------------------------------------------------------------


def test_the_promised_experiments_are_shipped() -> None:
    assert set(SHIPPED) == {
        "align",
        "tiny",
        "ddp_vs_fsdp",
        "ddp_vs_fsdp_published",
        "strategies",
        "quality",
        "rank",
        "imdb_bits",
        "duel",
        "curriculum",
        "curriculum_imdb",
        "memory_grid",
        "ablation",
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_every_run_of_a_shipped_experiment_is_a_valid_recipe(name: str, tmp_path: Path) -> None:
    experiment = load(tmp_path, name=name)
    assert experiment.description.endswith((".", ":"))
    assert len({run.name for run in experiment.runs}) == len(experiment.runs)
    planned = {run.folder: run.recipe for run in experiment.runs}
    for run in experiment.runs:
        recipe = load_recipe(run.arguments, checks=CHECKS, folder=tmp_path, planned=planned)
        assert recipe == run.recipe
        assert (recipe.run.name, recipe.tracking.group) == (run.name, name)


def test_the_memory_grid_has_every_combination(tmp_path: Path) -> None:
    keys = ("batching.micro_batch_tokens", "lora.r", "training.gradient_checkpointing")
    points = {
        (run.recipe.bits, *(value(run.recipe, key) for key in keys)) for run in load(tmp_path, name="memory_grid").runs
    }
    lengths, ranks, checkpointing = (1024, 4096, 16384), (1, 4, 8), (True, False)
    assert points == {(b, n, r, c) for b in (4, 8, 16) for n in lengths for r in ranks for c in checkpointing}


def test_strategies_has_every_strategy_with_and_without_quantisation(tmp_path: Path) -> None:
    found = {(run.recipe.strategy, run.recipe.bits) for run in load(tmp_path, name="strategies").runs}
    assert found == {(name, bits) for name in ("single", "ddp", "fsdp", "zero2", "zero3") for bits in (4, 16)}


SEEDED = "base: tiny\nvariants: {a: {}, b: {data.order: length}}\n"


def test_each_repeat_has_its_seed(tmp_path: Path) -> None:
    write(tmp_path, SEEDED + "seeds: [7, 3]\ntarget_loss: worst\n")
    experiment = load(tmp_path)
    assert [(run.name, run.recipe.run.seed) for run in experiment.runs] == [
        ("mine-a", 7),
        ("mine-b", 7),
        ("mine-a-r2", 3),
        ("mine-b-r2", 3),
    ]
    assert (experiment.seeds, experiment.target_loss) == (True, "worst")
    assert len(load_experiment(["experiment=mine"], folder=tmp_path, repeats=1).runs) == 2
    with pytest.raises(ExperimentError, match="3 repeats need as many seeds, and the experiment has 2"):
        load_experiment(["experiment=mine"], folder=tmp_path, repeats=3)


@pytest.mark.parametrize(
    ("text", "word", "problem"),
    [
        ("seeds: [1, 2]\nrepeats: 2\n", "", "and repeats both say how often each variant runs"),
        ("seeds: [1, 1]\n", "", "has 1 twice, which would be the same run"),
        ("seeds: [1, 2]\n", "run.seed=5", "cannot be set here: each repeat has a seed of its own"),
        ("seeds: [1, 2]\noverrides: {run.seed: 5}\n", "", "cannot be set here"),
    ],
)
def test_seeds_that_contradict_something_are_refused(tmp_path: Path, text: str, word: str, problem: str) -> None:
    assert {fault.problem for fault in faults(tmp_path, SEEDED + text, *filter(None, [word]))} == {problem}


# ---- from a file to runs ---------------------------------------------------------------------------------------------


def test_runs_are_the_arguments_of_train_with_the_repeats_interleaved(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
# What rank does.
base: tiny
overrides: {lora.lora_dropout: 0.0}
variants:
  narrow: {lora: {r: 4, lora_alpha: 8}}
  wide: {lora.r: 64, model.revision: "null", lora.target_modules: [q_proj, v_proj]}
  sharded: {recipe: fsdp_bf16}
repeats: 2
budget: {steps: 5}
equal: [samples, loss]
""",
    )
    experiment = load(tmp_path, "tracking.report_to=[]")
    assert [run.name for run in experiment.runs] == [
        "mine-narrow",
        "mine-wide",
        "mine-sharded",
        "mine-narrow-r2",
        "mine-wide-r2",
        "mine-sharded-r2",
    ]
    assert experiment.runs[0].arguments == (
        "recipe=tiny",
        "lora.lora_dropout=0.0",
        "lora.r=4",
        "lora.lora_alpha=8",
        "training.max_steps=5",
        "tracking.report_to=[]",
        "run.name=mine-narrow",
        "tracking.group=mine",
    )
    wide = experiment.runs[4]
    assert (wide.variant, wide.repeat) == ("wide", 2)
    assert 'model.revision="null"' in wide.arguments
    assert 'lora.target_modules=["q_proj", "v_proj"]' in wide.arguments
    assert wide.recipe.model.revision == "null"
    assert experiment.runs[2].recipe.strategy == "fsdp"
    assert (experiment.variants, experiment.equal) == (("narrow", "wide", "sharded"), ("samples", "loss"))
    assert experiment.description == "What rank does."


def test_a_section_changes_key_by_key_and_null_takes_it_back(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
base: tiny
overrides: {lora: null, quantization: null}
variants:
  full: {}
  adapter: {lora: {r: 2}}
  both: {training: {max_length: 64}}
""",
    )
    full, adapter, both = (run.recipe for run in load(tmp_path).runs)
    assert (full.lora, adapter.lora, adapter.quantization) == (None, {"r": 2}, None)
    assert both.training == {**full.training, "max_length": 64}


def test_a_grid_is_the_product_named_from_its_values(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
base: tiny
grid:
  lora.r: [1, 8]
  quantization: [null]
  training.gradient_checkpointing: [true, false]
  data.max_samples: [null, 100]
""",
    )
    assert load(tmp_path).variants == (
        "r1-no-quantization-gradient_checkpointing-no-max_samples",
        "r1-no-quantization-gradient_checkpointing-max_samples100",
        "r1-no-quantization-no-gradient_checkpointing-no-max_samples",
        "r1-no-quantization-no-gradient_checkpointing-max_samples100",
        "r8-no-quantization-gradient_checkpointing-no-max_samples",
        "r8-no-quantization-gradient_checkpointing-max_samples100",
        "r8-no-quantization-no-gradient_checkpointing-no-max_samples",
        "r8-no-quantization-no-gradient_checkpointing-max_samples100",
    )


@pytest.mark.parametrize(
    ("budget", "key", "expected"),
    [
        ("steps: 7", "training.max_steps", 7),
        ("samples: 160", "training.max_steps", 10),
        ("tokens: 9999", "training.max_steps", 9),
        ("minutes: 1.5", "run.train_time", "00:01:30"),
        ("minutes: 1501", "run.train_time", "1-01:01:00"),
    ],
)
def test_a_budget_is_the_override_that_it_means(budget: str, key: str, expected: Any, tmp_path: Path) -> None:
    batch = "{global_batch_size: null, global_batch_tokens: 1024}" if "tokens" in budget else "{global_batch_size: 16}"
    write(tmp_path, f"base: tiny\nvariants: {{a: {{batching: {batch}}}}}\nbudget: {{{budget}}}\n")
    (run,) = load(tmp_path).runs
    assert value(run.recipe, key) == expected


def test_samples_are_steps_of_each_variant_s_own_global_batch(tmp_path: Path) -> None:
    write(tmp_path, "base: tiny\ngrid: {batching.global_batch_size: [16, 32]}\nbudget: {samples: 320}\n")
    assert [value(run.recipe, "training.max_steps") for run in load(tmp_path).runs] == [20, 10]
    assert [value(run.recipe, "training.max_steps") for run in load(tmp_path, "training.max_steps=3").runs] == [3, 3]


def test_the_command_line_comes_last_and_of_one_key_its_last(tmp_path: Path) -> None:
    write(tmp_path, "base: tiny\nvariants: {a: {lora.r: 8}, b: {lora.r: 16}}\nbudget: {steps: 9}\n")
    experiment = load(tmp_path, "lora.r=1", "lora=null", "lora.r=4", "training.max_steps=2", "quantization=null")
    for run in experiment.runs:
        assert run.recipe.lora == {"r": 4}
        assert [word for word in run.arguments if word.startswith("training.max_steps")] == ["training.max_steps=2"]


def test_a_path_is_meant_from_the_file_and_found_from_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("extends: tiny\nlora: {r: 3}\n", encoding="utf-8")
    path = write(tmp_path, "base: ../../own.yaml\nvariants: {a: }\n")
    for wanted in ("mine", str(path), "recipes/experiments/mine.yaml"):
        (run,) = load(tmp_path, name=wanted).runs
        assert run.arguments[0] == "recipe=./own.yaml"
        assert (run.recipe.lora or {})["r"] == 3
    (run,) = load_experiment([f"experiment={path}"], folder=tmp_path / "recipes").runs
    assert run.arguments[0] == f"recipe={tmp_path / 'own.yaml'}"


def test_an_experiment_of_one_s_own_hides_the_shipped_one(tmp_path: Path) -> None:
    path = write(tmp_path, "base: tiny\nvariants: {a: }\n", name="tiny")
    assert list_experiments(tmp_path)["tiny"] == path
    assert load(tmp_path, name="tiny").variants == ("a",)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_lists_and_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "# Mine.\nbase: tiny\nvariants: {a: {data.name: a b}}\n")
    assert main(["experiments", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["mine", *SHIPPED]
    assert lines[0].split(maxsplit=1)[1] == "Mine."
    assert main(["experiments", "show", "mine", "lora.r=2"]) == 2  # `a b` is no data set
    assert "variants.a.data" in capsys.readouterr().err
    assert main(["experiments", "show", "tiny", "lora.r=2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].endswith("12 runs of 4 variants")
    assert shown[3].startswith("distft train recipe=tiny ")
    assert shown[3].endswith(" lora.r=2 run.name=tiny-ddp_4bit tracking.group=tiny")


def test_recipes_by_their_names_make_an_experiment() -> None:
    made = load_experiment(["tiny", "ddp_qlora", "training.max_steps=4"], checks=CHECKS)
    assert (made.name, made.equal) == ("tiny-ddp_qlora", ("samples", "order", "global_batch"))
    assert [run.name for run in made.runs] == [
        f"tiny-ddp_qlora-{name}{repeat}"
        for repeat in ("", "-r2", "-r3", "-r4", "-r5")
        for name in ("tiny", "ddp_qlora")
    ]
    assert {run.recipe.training["max_steps"] for run in made.runs} == {4}
    assert len(load_experiment(["tiny", "ddp_qlora"], repeats=1).runs) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "tiny"], "tiny: is named twice"),
        (["tiny", "experiment=rank"], "experiment: cannot be combined with recipes (tiny)"),
        (["tiny", "ddp_qlorra"], "command line: ddp_qlorra: there is no recipe 'ddp_qlorra' (did you mean ddp_qlora?)"),
        (["tiny", "./own.yaml"], "command line: own: there is no file ./own.yaml"),
    ],
)
def test_recipes_that_make_none_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        load_experiment(words)
    assert said in str(caught.value)
