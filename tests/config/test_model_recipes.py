"""The recipes of today's chat models: each with its model's real configuration, which needs no network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from shapes import SHAPES, config_of
from transformers import AutoModelForCausalLM

from distft.api.check import check_words
from distft.models.tiny import tiny_model

from .loading import RECIPES, load

QLORA = "quantization.load_in_4bit=true"
SHARDED_QLORA = "quantization={load_in_4bit: true, bnb_4bit_quant_storage: bfloat16}"
FULL = "lora=null"
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


def folder_of(recipe: str, folder: Path) -> Path:
    """A folder with the configuration of the recipe's model and the tokenizer of the tiny one, with a template."""
    config_of(recipe).save_pretrained(folder)
    for file in Path(tiny_model()).glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.mark.parametrize("recipe", SHAPES)
def test_the_check_finds_nothing_wrong(recipe: str, tmp_path: Path) -> None:
    words = [f"recipe={recipe}", f"model.name={folder_of(recipe, tmp_path)}", f"run.dir={tmp_path}"]
    found = check_words([*words, "training.save_strategy=no"], processes=2)
    assert "model, tokenizer and adapter" in found.checked, found
    assert any("trains " in line for line in found.run), found.run


@pytest.mark.parametrize("recipe", SHAPES)
def test_the_shape_has_as_many_parameters_as_published(recipe: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(recipe))
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(SHAPES[recipe][1] * 1e9, rel=5e-3)


@pytest.mark.parametrize("recipe", SHAPES)
def test_one_override_makes_another_method_of_it(recipe: str) -> None:
    lora, qlora, full = (load(f"recipe={recipe}", *words) for words in ([], [QLORA], [FULL]))
    assert (lora.bits, qlora.bits, full.bits) == (16, 4, 16)
    assert qlora.quantization is not None and qlora.quantization.bnb_4bit_quant_type == "nf4"
    assert lora.lora is not None and full.lora is None
    for words in ([], [SHARDED_QLORA], [FULL]):
        assert load(f"recipe={recipe}", "strategy=fsdp", *words).strategy == "fsdp"


@pytest.mark.parametrize("recipe", [name for name in SHAPES if name != "qwen3_8b"])
def test_they_say_only_how_they_differ(recipe: str) -> None:
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert "extends: qwen3_8b" in text and len(text.splitlines()) <= 15


def test_without_the_hub_the_check_says_what_it_could_not_look_at() -> None:
    found = check_words(["recipe=mistral_7b", "training.save_strategy=no"], processes=1)
    assert any("mistralai/Mistral-7B-Instruct-v0.3, which is not in the cache" in line for line in found.skipped)
