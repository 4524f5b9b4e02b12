"""Experiments: the runs that a file means, what the shipped ones say, and how faults are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.cli.main import main
from distft.config.recipe import load_recipe
from distft.data.formats import data_faults
from distft.distributed.strategies import strategy_faults
from distft.errors import ExperimentError, Fault
from distft.experiments.expand import Experiment, load_experiment
from distft.experiments.schema import list_experiments
from distft.paths import packaged

SHIPPED = sorted(path.stem for path in packaged("recipes/experiments").glob("*.yaml"))
CHECKS = (strategy_faults, data_faults)


def write(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / "recipes" / "experiments" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, name: str = "mine") -> Experiment:
    return load_experiment([f"experiment={name}", *overrides], checks=CHECKS, folder=folder)


def faults(folder: Path, text: str, *overrides: str) -> list[Fault]:
    """The faults of an experiment with this text, all said of its file unless of the command line."""
    path = write(folder, text)
    with pytest.raises(ExperimentError) as caught:
        load(folder, *overrides)
    assert {fault.where for fault in caught.value.faults} <= {str(path), "command line"}
    return list(caught.value.faults)


def value(recipe: Any, key: str) -> Any:
    found = recipe.model_dump()
    for part in key.split("."):
        found = found[part]
    return found


# ---- the shipped experiments -----------------------------------------------------------------------------------------


def test_the_promised_experiments_are_shipped() -> None:
    assert set(SHIPPED) == {
        "tiny",
        "ddp_vs_fsdp",
        "ddp_vs_fsdp_published",
        "strategies",
        "rank",
        "duel",
        "memory_grid",
        "ablation",
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_every_run_of_a_shipped_experiment_is_a_valid_recipe(name: str, tmp_path: Path) -> None:
    experiment = load(tmp_path, name=name)
    assert experiment.description.endswith((".", ":"))
    assert len({run.name for run in experiment.runs}) == len(experiment.runs)
    for run in experiment.runs:
        recipe = load_recipe(run.arguments, checks=CHECKS, folder=tmp_path)
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


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_all_faults_are_told_at_once_with_their_places(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        """
base: tiny
repeat: 2
lora: {r: 8}
variants:
  a: {lora: {rank: 8}, run.name: x}
  b: {recipe: dpd_qlora}
  c: {strategy: fsdp}
  "4": {}
  d: {training.max_steps: 8}
budget: {step: 5}
equal: [sample]
repeats: two
""",
        "evaluation.max_sample=3",
        "run.name=y",
        "budget.steps=3",
        "variants.a.lora.r=3",
    )
    path = tmp_path / "recipes" / "experiments" / "mine.yaml"
    assert {str(fault).removeprefix(f"{path}: ") for fault in found} == {
        "command line: run.name: cannot be set here (each run is named after the experiment and its variant; "
        "run.dir=FOLDER keeps "
        "sets of runs apart)",
        "command line: evaluation.max_sample: unknown key (did you mean max_samples?)",
        "command line: budget.steps: cannot be set here (training.max_steps=N sets a budget for all runs)",
        "command line: variants.a.lora.r: cannot be set here (copy the experiment's file into "
        "recipes/experiments to change it)",
        "repeat: unknown key (did you mean repeats?)",
        "lora: unknown key (recipe values go under overrides, variants or grid)",
        "variants.a.lora.rank: unknown key (it is lora.r)",
        "variants.a.run.name: cannot be set here (each run is named after the experiment and its variant)",
        "variants.b.recipe: there is no recipe 'dpd_qlora' (did you mean ddp_qlora?)",
        "variants.c.quantization.bnb_4bit_quant_storage: 4-bit weights stored as uint8 in a float32 model are "
        "not sharded by FSDP2 "
        "(set it to float32)",
        "variants.4: '4' cannot be part of a run's name (start with a letter; then letters, digits, '.', '_' and '-')",
        "budget.step: unknown key (did you mean steps?)",
        "equal.0: expected 'samples', 'order', 'global_batch', 'tokens', 'base_weights' or 'loss', got 'sample' (str) "
        "(did you mean samples?)",
        "repeats: expected a valid integer, got 'two' (str)",
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: tiny\n", "variants: give variants or grid, one of them"),
        ("base: tiny\nvariants: {a: }\ngrid: {lora.r: [1]}\n", "variants: give variants or grid, not both"),
        ("variants: {a: }\n", "variants.a: names no recipe, and there is no base (add base: RECIPE)"),
        ("grid: {lora.r: [1]}\n", "base: is required with a grid and not set (the recipe to vary)"),
        ("base: tiy\nvariants: {a: }\n", "base: there is no recipe 'tiy' (did you mean tiny?)"),
        ("base: ./no.yaml\nvariants: {a: }\n", "base: there is no file ./recipes/experiments/no.yaml"),
        ("base: tiny\nvariants: {a: 3}\n", "variants.a: expected a valid dictionary, got 3 (int)"),
        (
            "base: tiny\noverrides: {lora.r: x}\nvariants: {a: , b: }\n",
            "overrides.lora.r: expected a valid integer, got 'x' (str)",
        ),
        ("base: tiny\ngrid: {lora.r: [1, x]}\n", "grid.lora.r: expected a valid integer, got 'x' (str)"),
        (
            "base: tiny\ngrid: {lora.r: 1}\n",
            "grid.lora.r: expected a list of values of that key, or a mapping of names to what they change",
        ),
        (
            "base: tiny\ngrid: {lora.r: [1, 2], strategy: [ddp, fsdp]}\n",
            "grid.quantization.bnb_4bit_quant_storage: 4-bit weights stored as uint8 in a float32 model are not "
            "sharded by FSDP2, "
            "with r1-fsdp (set it to float32)",
        ),
        (
            "base: tiny\nvariants: {a: {training.max_steps: 3}}\nbudget: {steps: 3}\n",
            "variants.a.training.max_steps: cannot be set here (budget sets how long every run trains; remove "
            "one of them)",
        ),
        (
            "base: tiny\nvariants: {a: }\nbudget: {steps: 3, samples: 16}\n",
            "budget: expected one of steps, samples, tokens, minutes, got steps and samples",
        ),
        (
            "base: tiny\nvariants: {a: }\nbudget: {samples: 100}\n",
            "budget.samples: 100 samples are not a whole number of global batches of 16 (96 or 112)",
        ),
        (
            "base: tiny\nvariants: {a: {batching: {global_batch_size: null, global_batch_tokens: 900}}}\nbudget: "
            "{samples: 16}\n",
            "budget.samples: a global batch counted in tokens has no fixed number of samples (give steps or tokens)",
        ),
        (
            "base: tiny\nvariants: {a: }\nbudget: {tokens: 1000}\n",
            "budget.tokens: a global batch counted in samples has no fixed number of tokens (give steps or "
            "samples, or count the batch in "
            "batching.global_batch_tokens)",
        ),
        (
            "base: tiny\nvariants: {a: {batching: {global_batch_size: null, global_batch_tokens: 900}}}\nbudget: "
            "{tokens: 800}\n",
            "budget.tokens: 800 tokens are less than a global batch of 900",
        ),
        (
            "base: tiny\nvariants: {a: }\nbudget: {minutes: 0.001}\n",
            "budget.minutes: 0.001 minutes are not a whole number of seconds",
        ),
        (
            "base: tiny\nvariants: {a: {recipe: ddp_qlora}, a-2: }\n",
            "the run mine-a-2 would be mistaken for the next run of mine-a (rename its variant)",
        ),
        (
            "base: tiny\nvariants: {a: , a-r2: }\nrepeats: 2\n",
            "the run mine-a-r2 would be mistaken for another variant's (rename its variant)",
        ),
    ],
)
def test_a_fault_is_told_once_in_words_that_mend_it(text: str, told: str, tmp_path: Path) -> None:
    found = faults(tmp_path, text)
    assert [str(fault).removeprefix(f"{fault.where}: ") for fault in found] == [told]


def test_what_is_wrong_is_told_where_there_are_no_variants_as_well(tmp_path: Path) -> None:
    text = "base: tinyy\nvariant: {a: {}}\noverides: {lora.r: 1}\nbudget: {steps: 3, samples: 16}\n"
    path = write(tmp_path, text)
    assert {str(fault).removeprefix(f"{path}: ") for fault in faults(tmp_path, text)} == {
        "base: there is no recipe 'tinyy' (did you mean tiny?)",
        "variant: unknown key (did you mean variants?)",
        "overides: unknown key (did you mean overrides?)",
        "budget: expected one of steps, samples, tokens, minutes, got steps and samples",
    }


def test_a_fault_of_the_recipe_itself_keeps_its_own_place(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "broken.yaml"
    write(tmp_path, "base: broken\nvariants: {a: {lora.r: 4}, b: }\n")
    recipe.write_text("extends: tiny\nlora: {rank: 4}\n", encoding="utf-8")
    with pytest.raises(ExperimentError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"the experiment has a fault:\n  {recipe}: lora.rank: unknown key (it is lora.r)"


def test_an_unknown_experiment_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"there is no experiment 'rnak' \(did you mean rank\?\)"):
        load(tmp_path, name="rnak")
    with pytest.raises(ExperimentError, match=r"there is no file no\.yaml"):
        load(tmp_path, name="no.yaml")


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
