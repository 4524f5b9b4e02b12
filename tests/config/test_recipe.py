"""The global batch, and the resolved recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from distft.cli.main import main
from distft.config.recipe import Recipe, load_recipe
from distft.errors import RecipeError
from tests.config.loading import SHIPPED, faults, load, write

PADDED = "batching.micro_batch_tokens=null"


def test_a_micro_batch_that_does_not_divide_lists_those_that_do() -> None:
    with pytest.raises(RecipeError) as caught:
        load("recipe=ddp_qlora", PADDED, "batching.micro_batch=5").check_division(2)
    (fault,) = caught.value.faults
    assert (fault.where, fault.key) == ("command line", "batching.micro_batch")
    assert fault.problem == "a global batch of 64 samples does not divide into micro-batches of 5 on 2 processes"
    assert fault.hint == "micro-batches that divide: 1, 2, 4, 8, 16, 32"


@pytest.mark.parametrize(("processes", "batches"), [(3, "63 or 66"), (128, "128")])
def test_processes_that_do_not_divide_name_the_nearest_global_batches(processes: int, batches: str) -> None:
    with pytest.raises(RecipeError, match=f"a global batch of {batches}"):
        load("recipe=ddp_qlora", PADDED, "batching.micro_batch=8").check_division(processes)


@pytest.mark.parametrize(
    "overrides",
    [
        ("batching.micro_batch_tokens=4096",),
        (PADDED, "batching.micro_batch=5", "batching.global_batch_size=null", "batching.global_batch_tokens=20000"),
    ],
    ids=["packs", "batch in tokens"],
)
def test_what_is_counted_in_tokens_divides_for_any_number_of_processes(overrides: tuple[str, ...]) -> None:
    load("recipe=ddp_qlora", *overrides).check_division(3)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("batching.global_batch_tokens=20000",), "set either global_batch_size or global_batch_tokens, not both"),
        (("batching.global_batch_size=null",), "set either global_batch_size or global_batch_tokens; neither is set"),
    ],
    ids=["both", "neither"],
)
def test_the_global_batch_is_counted_in_one_way(overrides: tuple[str, ...], problem: str) -> None:
    assert faults("recipe=ddp_qlora", *overrides)["batching.global_batch_size"].problem == problem


def test_a_size_in_samples_beside_one_in_tokens_is_a_fault() -> None:
    fault = faults("recipe=ddp_qlora", "batching.micro_batch=4")["batching.micro_batch"]
    assert "packs the samples" in fault.problem and fault.hint == "batching.micro_batch_tokens=null turns packing off"


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        (("training.num_train_epochs=3",), 7, 3),
        (("training.num_train_epochs=2.5",), 7, 3),
        (("training.max_steps=7",), 7, 1),
        (("training.max_steps=8",), 7, 2),
    ],
)
def test_epochs_are_those_that_training_begins(overrides: tuple[str, ...], steps: int, epochs: int) -> None:
    assert load("recipe=ddp_qlora", *overrides).epochs(steps) == epochs


def again(recipe: Recipe, folder: Path) -> Recipe:
    path = write(folder / "resolved.yaml", recipe.to_yaml())
    return load(f"recipe={path}")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_recipe_loads_again_to_an_equal_one(name: str, tmp_path: Path) -> None:
    recipe = load(f"recipe={name}", "training.learning_rate=1e-5", "run.name=once-more")
    assert again(recipe, tmp_path).model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "null",
        "true",
        "1e4",
        "1e-4",
        "12",
        "010",
        "0x10",
        ".5",
        ".inf",
        "2025-11-21",
        "12:30",
        " a ",
        "a: b",
        "é",
        "a\nb",
        "",
    ],
)
def test_a_text_that_looks_like_something_else_survives(text: str, tmp_path: Path) -> None:
    recipe = load(f"tracking.tags={json.dumps([text])}")
    assert recipe.tracking.tags == [text]
    assert again(recipe, tmp_path).tracking.tags == [text]


def test_a_resolved_recipe_stands_alone() -> None:
    resolved = yaml.safe_load(load("recipe=single_qlora").to_yaml())
    assert "extends" not in resolved
    assert resolved["run"]["name"] == "single_qlora"
    assert resolved["model"]["name"] == "meta-llama/Llama-2-7b-hf"


def test_a_recipe_is_frozen() -> None:
    recipe = load()
    with pytest.raises(ValueError, match="frozen"):
        recipe.strategy = "single"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.dtype=bfloat16"], "bf16"),
        (["model.dtype=bfloat16", "training.bf16=false"], "no"),
        (["model.dtype=bfloat16", "training.fp16=true"], "fp16"),
        (["model.dtype=float16"], "no"),
        (["model.dtype=float32"], "no"),
        (["model.dtype=float32", "training.bf16=true"], "bf16"),
    ],
    ids=" ".join,
)
def test_mixed_precision_follows_the_model_unless_the_recipe_sets_it(words: list[str], expected: str) -> None:
    """tiny sets neither training.bf16 nor training.fp16."""
    assert load(*words).mixed_precision == expected


def test_null_takes_back_what_a_base_recipe_set() -> None:
    recipe = load_recipe(["recipe=ddp_qlora", "training.learning_rate=null", "lora.lora_dropout=null"])
    assert "learning_rate" not in recipe.training
    assert recipe.lora is not None and "lora_dropout" not in recipe.lora


@pytest.mark.parametrize(("text", "seconds"), [("00:01:30", 90.0), ("11:50:00", 42_600.0), ("1-00:00:01", 86_401.0)])
def test_a_time_is_read_as_slurm_writes_it(text: str, seconds: float) -> None:
    assert load_recipe(["recipe=tiny", f"run.max_time={text}"]).run.max_time_s == seconds


def test_validate_takes_recipes_as_train_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "validate", "tiny", "recipe=ddp_qlora", "lora.r=4", "training.max_steps=3"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "tiny: valid"
    assert second.startswith("ddp_qlora: valid (not checked: the data databricks/databricks-dolly-15k, which")
    assert main(["recipes", "validate", "training.max_stepz=3"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and all(f"{name}: " in printed.err for name in SHIPPED)
    assert printed.err.count("max_stepz") == len(SHIPPED)
