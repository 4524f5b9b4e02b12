"""`adapter`: what is taken from the run or the adapter that a training starts from, and what contradicts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.config.adapter import adapter_faults
from distft.config.recipe import load_recipe
from distft.errors import RecipeError

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_storage": "uint8"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of DDP QLoRA with rank 32, as far as a recipe is concerned."""
    folder = tmp_path / "runs" / "sft"
    (folder / "adapter").mkdir(parents=True)
    words = ["recipe=tiny", f"model.name={tmp_path}", "model.tokenizer=tiny", "data.chat_template=chatml"]
    lora = "lora={r: 32, lora_alpha: 64, use_rslora: true, lora_dropout: 0.05, target_modules: all-linear}"
    bits = f"quantization={json.dumps(FOUR_BITS)}"
    recipe = load_recipe([*words, lora, bits, "lora.init_lora_weights=gaussian", "run.name=sft"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "summary.json").write_text("{}", encoding="utf-8")
    peft = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "use_rslora": True, "target_modules": ["a", "b"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(peft), encoding="utf-8")
    return folder


def peft_adapter(folder: Path, **config: Any) -> Path:
    """The settings of an adapter that another tool has made."""
    folder.mkdir()
    known = {"peft_type": "LORA", "peft_version": "0.9", "base_model_name_or_path": "org/base", "r": 4}
    known |= {
        "lora_alpha": 12,
        "target_modules": ["v_proj", "q_proj"],
        "loftq_config": {},
        "megatron_core": "megatron.core",
    }
    (folder / "adapter_config.json").write_text(json.dumps(known | config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("place", ["", "adapter"])
def test_the_run_goes_before_a_shipped_recipe(run: Path, tmp_path: Path, place: str) -> None:
    recipe = load_recipe(["recipe=dpo", f"adapter={run / place}"])
    assert recipe.adapter == str(run / place)
    assert (recipe.model.name, recipe.model.tokenizer) == (str(tmp_path), "tiny")
    assert recipe.quantization is not None and recipe.quantization.load_in_4bit
    assert recipe.data.chat_template == "chatml"
    # The recipe's dropout holds; initial weights are of no use any more.
    shared = {"r": 32, "lora_alpha": 64, "use_rslora": True, "target_modules": "all-linear"}
    assert recipe.lora == shared | {"lora_dropout": 0.0}
    assert recipe.source.of("lora.r") == str(run / "recipe.yaml") and not adapter_faults(recipe)
    assert recipe.objective == "dpo" and recipe.data.name == "tiny_preferences"


def test_what_the_user_says_goes_before_the_run(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: dpo\nmodel: {dtype: float32}\nquantization: {bnb_4bit_quant_storage: bfloat16}\n")
    words = [f"recipe={own}", f"adapter={run}", "lora.lora_dropout=0.2", "data.chat_template=null"]
    recipe = load_recipe(words)
    assert recipe.model.dtype == "float32" and recipe.model.name == str(tmp_path)
    assert recipe.quantization is not None
    assert recipe.quantization.load_in_4bit and recipe.quantization.bnb_4bit_quant_storage == "bfloat16"
    assert recipe.lora is not None and recipe.lora["lora_dropout"] == 0.2
    assert recipe.data.chat_template is None
    assert load_recipe([*words, "quantization=null"]).quantization is None


def test_the_recipe_of_such_a_run_is_complete(run: Path, tmp_path: Path) -> None:
    """Read again, also once the adapter has gone or changed, it is the same."""
    recipe = load_recipe(["recipe=dpo", f"adapter={run}"])
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe([f"recipe={written}"]).model_dump() == recipe.model_dump()
    (run / "recipe.yaml").rename(run / "gone")
    assert load_recipe([f"recipe={written}"]).model_dump() == recipe.model_dump()


def test_a_run_may_be_planned(tmp_path: Path) -> None:
    sft = load_recipe(["recipe=tiny", "lora.r=32", "lora.lora_alpha=64"])
    recipe = load_recipe(["recipe=dpo", f"adapter={tmp_path}/sft"], planned={tmp_path / "sft": sft})
    assert recipe.lora is not None and recipe.lora["r"] == 32
    assert recipe.quantization == sft.quantization
    (fault,) = adapter_faults(recipe)
    assert fault.key == "adapter" and fault.problem == f"there is no folder {tmp_path}/sft"


def test_an_adapter_of_another_tool(tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "found", use_dora=True, bias="none", init_lora_weights=True, lora_dropout=0.1)
    recipe = load_recipe(["recipe=tiny", f"adapter={folder}"])
    assert recipe.model.name == "org/base"
    own = {"r": 4, "lora_alpha": 12, "use_dora": True, "target_modules": ["q_proj", "v_proj"]}
    shipped = load_recipe(["recipe=tiny"]).lora
    assert shipped is not None and recipe.lora == own | {"lora_dropout": shipped["lora_dropout"]}
    assert not adapter_faults(recipe)
    assert load_recipe(["recipe=tiny", f"adapter={folder}", "model.name=tiny"]).model.name == "tiny"


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("lora.r=8", "is 8, and the adapter in {} has 32"),
        ("lora.lora_alpha=32", "is 32, and the adapter in {} has 64"),
        ("lora.use_rslora=false", "is False, and the adapter in {} has True"),
        ("lora.use_dora=true", "is True, and the adapter in {} has False"),
        ("lora=null", "is null, and an adapter is to be trained"),
    ],
)
def test_contradictions(run: Path, word: str, problem: str) -> None:
    recipe = load_recipe(["recipe=tiny", f"adapter={run}", "quantization=null", word])
    (fault,) = adapter_faults(recipe)
    assert fault.where == "command line" and fault.key == word.partition("=")[0]
    assert fault.problem == problem.format(run / "adapter")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"peft_type": "LOHA"}, "is of the type LOHA"),
        ({"init_lora_weights": "corda"}, "fits a base that corda has changed, in a way that cannot be repeated"),
    ],
    ids=str,
)
def test_kinds_of_adapters_that_are_refused(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    folder = peft_adapter(tmp_path / "found", **config)
    recipe = load_recipe(["recipe=tiny", f"adapter={folder}", "lora.init_lora_weights=true"])
    (fault,) = adapter_faults(recipe)
    assert fault.key == "adapter" and problem in fault.problem


def test_features_that_are_refused(tmp_path: Path) -> None:
    folder = peft_adapter(tmp_path / "found", layer_replication=[[0, 2]], telepathy=True)
    with pytest.raises(RecipeError) as raised:
        load_recipe(["recipe=tiny", f"adapter={folder}"])
    assert {fault.key for fault in raised.value.faults} == {"lora.layer_replication", "lora.telepathy"}
    assert {fault.where for fault in raised.value.faults} == {str(folder / "adapter_config.json")}


def test_folders_without_an_adapter(run: Path, tmp_path: Path) -> None:
    def problem(place: Path) -> str:
        (fault,) = adapter_faults(load_recipe(["recipe=tiny", "quantization=null", f"adapter={place}"]))
        return f"{fault.problem} ({fault.hint})"

    assert "is the folder of neither a run nor an adapter" in problem(tmp_path)
    (run / "adapter" / "adapter_config.json").unlink()
    assert "has not finished" in problem(run)
    (run / "model").mkdir()
    assert f"has trained a whole model, not an adapter (model.name={run / 'model'}" in problem(run)
