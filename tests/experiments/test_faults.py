"""How the faults of an experiment are reported: all at once, each with its place and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.errors import ExperimentError

from .loading import faults, load, write


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
