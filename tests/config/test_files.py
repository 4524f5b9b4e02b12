"""Overrides and recipe files: how they are found, read and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.errors import RecipeError
from tests.config.loading import RECIPES, SHIPPED, faults, load, value, write


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("lora.r=8", "lora.r", 8),
        ("training.learning_rate=1e-4", "training.learning_rate", 0.0001),
        ("training.learning_rate=2E-5", "training.learning_rate", 0.00002),
        ("training.learning_rate=.5", "training.learning_rate", 0.5),
        ("training.max_steps=-1", "training.max_steps", -1),
        ("model.trust_remote_code=true", "model.trust_remote_code", True),
        ("tracking.tags=[yes, no, on, off]", "tracking.tags", ["yes", "no", "on", "off"]),
        ("run.name=no", "run.name", "no"),
        ("run.name=v1.2.3", "run.name", "v1.2.3"),
        ("run.name=2025-11-21", "run.name", "2025-11-21"),  # YAML 1.2 has no dates
        ("training.max_steps=010", "training.max_steps", 10),  # … and no octal numbers of this form
        ("model.name=a=b", "model.name", "a=b"),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        ("evaluation={max_samples: 5}", "evaluation.max_samples", 5),
        ("data.test_split=null", "data.test_split", None),
        ("training.max_length=null", "training.max_length", None),
        ("quantization=null", "quantization", None),
        ("quantization=", "quantization", None),
    ],
)
def test_an_override_is_read_as_yaml(override: str, key: str, expected: Any) -> None:
    found = value(load(override), key)
    assert found == expected
    assert type(found) is type(expected)


def test_without_a_recipe_it_is_the_tiny_one() -> None:
    assert load().source.name == "tiny"


def test_the_last_override_of_a_key_holds() -> None:
    assert value(load("lora.r=4", "lora.r=8"), "lora.r") == 8


def test_an_override_leaves_the_other_values_of_its_section() -> None:
    before, after = load("recipe=ddp_qlora"), load("recipe=ddp_qlora", "lora.r=8")
    assert after.lora == {**(before.lora or {}), "r": 8}


def test_null_resets_the_lora_section_and_an_override_after_it_starts_anew() -> None:
    assert load("recipe=fsdp_bf16", "lora=null").lora is None
    assert load("recipe=fsdp_bf16", "lora=null", "lora.r=8").lora == {"r": 8}


@pytest.mark.parametrize("argument", ["lora.r", "=8", "--nproc"])
def test_an_argument_that_is_no_override_is_a_fault(argument: str) -> None:
    assert faults(argument)[argument].problem == "expected key.path=value or the name of a recipe"


def test_a_recipe_may_be_named_without_its_key(tmp_path: Path) -> None:
    write(tmp_path / "recipes/mine.yaml", "extends: ddp_qlora\n")
    for words in (["ddp_qlora"], ["lora.r=4", "ddp_qlora"]):
        assert load(*words).source.name == "ddp_qlora"
    for word in ("mine", "recipes/mine.yaml"):
        assert load(word, folder=tmp_path).source.name == "mine"
    assert faults("ddp_qlor")["ddp_qlor"].hint == "did you mean ddp_qlora?"


@pytest.mark.parametrize("text", ["[1", "{a: 1, a: 2}", "2025-13-45", "0b_"])
def test_a_value_that_is_no_yaml_or_only_looks_like_a_number_is_a_fault_not_a_crash(text: str) -> None:
    assert str(faults(f"training.max_steps={text}")["training.max_steps"]).startswith(
        "command line: training.max_steps: "
    )


def test_a_recipe_changes_the_one_it_extends_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path / "recipes/mine.yaml",
        "extends: ddp_qlora\nlora: {r: 4}\nquantization: null\ntraining: {optim: adamw_torch}\n",
    )
    base, recipe = load("recipe=ddp_qlora", folder=tmp_path), load("recipe=mine", folder=tmp_path)
    assert recipe.lora == {**(base.lora or {}), "r": 4}
    assert recipe.quantization is None
    assert recipe.training == {**base.training, "optim": "adamw_torch"}
    assert (recipe.model, recipe.data, recipe.batching) == (base.model, base.data, base.batching)
    assert recipe.run.name == "mine"


def test_a_list_is_replaced_not_merged(tmp_path: Path) -> None:
    write(tmp_path / "recipes/mine.yaml", "extends: imdb_llama2\nlora: {target_modules: [k_proj]}\n")
    assert value(load("recipe=mine", folder=tmp_path), "lora.target_modules") == ["k_proj"]


def test_each_value_tells_where_it_came_from(tmp_path: Path) -> None:
    mine = write(tmp_path / "recipes/mine.yaml", "extends: ddp_qlora\nlora: {r: 4}\nquantization: null\n")
    source = load("recipe=mine", "training.max_steps=5", "lora.lora_alpha=8", folder=tmp_path).source
    base = RECIPES / "ddp_qlora.yaml"
    assert source.files == (base, mine)
    expected = {
        "lora.r": str(mine),
        "lora.lora_alpha": "command line",
        "lora.lora_dropout": str(base),
        "training.max_steps": "command line",
        "training.learning_rate": str(base),
        "quantization": str(mine),
        "quantization.load_in_4bit": str(mine),
        "run.name": "derived",
        "run.seed": "default",
        "tracking.project": "default",
    }
    assert {key: source.of(key) for key in expected} == expected


def test_a_section_s_origin_is_that_of_its_last_change(tmp_path: Path) -> None:
    mine = write(tmp_path / "recipes/mine.yaml", "extends: ddp_qlora\nlora: {r: 4}\n")
    assert load("recipe=mine", folder=tmp_path).source.of("lora") == str(mine)
    assert load("recipe=mine", "lora.lora_alpha=8", folder=tmp_path).source.of("lora") == "command line"


def test_a_path_is_a_recipe_and_extends_a_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "deep/base.yaml", (RECIPES / "tiny.yaml").read_text(encoding="utf-8"))
    write(tmp_path / "deep/child.yaml", "extends: base.yaml\nlora: {r: 4}\n")
    recipe = load("recipe=deep/child.yaml", folder=tmp_path)
    assert value(recipe, "lora.r") == 4
    assert recipe.source.files == (tmp_path / "deep/base.yaml", tmp_path / "deep/child.yaml")


def test_a_recipe_of_the_working_folder_hides_a_shipped_one(tmp_path: Path) -> None:
    text = (RECIPES / "tiny.yaml").read_text(encoding="utf-8").replace("r: 16", "r: 3")
    write(tmp_path / "recipes/tiny.yaml", text)
    assert value(load("recipe=tiny", folder=tmp_path), "lora.r") == 3


def test_a_recipe_extends_one_other_and_that_one_none(tmp_path: Path) -> None:
    write(tmp_path / "recipes/mine.yaml", "extends: fsdp_bf16\n")
    assert "must not extend another" in faults("recipe=mine", folder=tmp_path)["extends"].problem


def test_what_a_recipe_extends_stands_in_the_file_alone() -> None:
    # The hint must not send people back to the very key that they gave.
    assert "did you mean extends?" not in str(faults("recipe=tiny", "extends=ddp_qlora")["extends"])


@pytest.mark.parametrize("text", ["lora: {r: 4, r: 8}", "strategy: ddp\nmodel: {name: tiny}\nstrategy: fsdp\n"])
def test_a_key_that_stands_twice_is_a_fault_that_names_it(tmp_path: Path, text: str) -> None:
    write(tmp_path / "recipes/mine.yaml", text)
    with pytest.raises(RecipeError, match=r"mine\.yaml: .*the key '(r|strategy)' appears twice"):
        load("recipe=mine", folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a: [", "not valid YAML"), ("- a\n", "got list"), ("", "got NoneType")],
    ids=["broken", "list", "empty"],
)
def test_a_file_that_is_no_mapping_is_a_fault_that_names_it(tmp_path: Path, text: str, problem: str) -> None:
    write(tmp_path / "recipes/mine.yaml", text)
    with pytest.raises(RecipeError, match=rf"mine\.yaml: .*{problem}"):
        load("recipe=mine", folder=tmp_path)


def test_a_recipe_that_is_not_there_names_the_nearest() -> None:
    fault = faults("recipe=ddp_qlra")["recipe"]
    assert (fault.where, fault.hint) == ("command line", "did you mean ddp_qlora?")


def test_a_recipe_like_no_other_names_all_there_are(tmp_path: Path) -> None:
    hint = faults("recipe=xyzzy", folder=tmp_path)["recipe"].hint
    assert all(name in hint for name in SHIPPED)


def test_an_extended_recipe_that_is_not_there_is_a_fault_of_the_file(tmp_path: Path) -> None:
    mine = write(tmp_path / "recipes/mine.yaml", "extends: ddp_qlra\n")
    fault = faults("recipe=mine", folder=tmp_path)["extends"]
    assert (fault.where, fault.hint) == (str(mine), "did you mean ddp_qlora?")


def test_a_file_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    assert faults("recipe=./mine.yaml", folder=tmp_path)["recipe"].problem == "there is no file ./mine.yaml"
