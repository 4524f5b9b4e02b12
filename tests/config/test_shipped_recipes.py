"""What the shipped recipes say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.config.files import read_yaml
from distft.paths import packaged
from tests.config.loading import RECIPES, SHIPPED, load, value

NF4 = {
    "quantization.load_in_4bit": True,
    "quantization.load_in_8bit": False,
    "quantization.bnb_4bit_quant_type": "nf4",
    "quantization.bnb_4bit_use_double_quant": True,
}
BF16 = {"model.dtype": "bfloat16", "training.bf16": True}
DOLLY = {
    "model.name": "meta-llama/Llama-2-7b-hf",
    "data.name": "dolly",
    "training.num_train_epochs": 3,
    "training.learning_rate": 1e-4,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_steps": 0.03,
    "training.max_length": 1024,
    "lora.target_modules": "all-linear",
}
WIDE = {"lora.r": 32, "lora.lora_alpha": 64, "lora.lora_dropout": 0.05, "batching.global_batch_size": 64}
IMDB = {
    **NF4,
    **BF16,
    "quantization.bnb_4bit_compute_dtype": "bfloat16",
    "data.name": "imdb",
    "lora.r": 16,
    "lora.target_modules": ["q_proj", "v_proj", "o_proj"],
    "training.max_length": 512,
    "training.learning_rate": 2e-5,
    "training.max_steps": 200,
    "batching.global_batch_size": 16,
    "run.seed": 42,
    "training.logging_steps": 10,
}

PROMISED: dict[str, dict[str, Any]] = {
    "single_qlora": {
        **DOLLY,
        **NF4,
        **BF16,
        "quantization.bnb_4bit_compute_dtype": "bfloat16",
        "strategy": "single",
        "lora.r": 8,
        "lora.lora_alpha": 16,
        "training.optim": "paged_adamw_32bit",
        "batching.global_batch_size": 32,
    },
    "ddp_qlora": {**DOLLY, **NF4, **BF16, **WIDE, "quantization.bnb_4bit_compute_dtype": "bfloat16", "strategy": "ddp"},
    "fsdp_bf16": {**DOLLY, **BF16, **WIDE, "quantization": None, "strategy": "fsdp"},
    "imdb_llama2": {**IMDB, "model.name": "meta-llama/Llama-2-7b-hf"},
    "imdb_deepseek": {**IMDB, "model.name": "deepseek-ai/deepseek-llm-7b-base"},
    "climate_llama3b": {
        **NF4,
        "model.name": "meta-llama/Llama-3.2-3B",
        "lora.r": 8,
        "lora.lora_alpha": 32,
        "lora.target_modules": ["q_proj", "v_proj"],
        "model.dtype": "float16",
        "training.fp16": True,
        "quantization.bnb_4bit_compute_dtype": "float16",
        "batching.micro_batch": 7,
        "batching.global_batch_size": 14336,
        "training.pad_to_multiple_of": 16,
        "data.test_fraction": 0.1,
        "data.test_split": None,
        "data.test_path": None,
    },
    "r1_qwen_16k": {
        "model.name": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "training.max_length": 16384,
        "lora.r": 8,
        "training.gradient_checkpointing": True,
    },
}


def test_the_promised_recipes_are_shipped() -> None:
    assert set(PROMISED) | {"tiny"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_valid(name: str, tmp_path: Path) -> None:
    recipe = load(f"recipe={name}", folder=tmp_path)
    assert recipe.run.name == name
    assert recipe.source.files[-1] == RECIPES / f"{name}.yaml"


@pytest.mark.parametrize("name", PROMISED)
def test_a_shipped_recipe_says_what_was_promised(name: str, tmp_path: Path) -> None:
    recipe = load(f"recipe={name}", folder=tmp_path)
    assert {key: value(recipe, key) for key in PROMISED[name]} == PROMISED[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_names_the_schema_in_its_first_line(name: str) -> None:
    first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_divides_for_one_process_and_for_two(name: str) -> None:
    recipe = load(f"recipe={name}")
    for processes in (1, 2):
        recipe.check_division(processes)


def test_fsdp_bf16_is_ddp_qlora_but_for_the_base_and_the_sharding() -> None:
    changed = {"run", "strategy", "quantization"}
    ddp, fsdp = load("recipe=ddp_qlora").model_dump(), load("recipe=fsdp_bf16").model_dump()
    assert {key for key in ddp if ddp[key] != fsdp[key]} == changed


def test_fsdp_is_version_2() -> None:
    assert read_yaml(packaged("accelerate_configs/fsdp.yaml"))["fsdp_config"]["fsdp_version"] == 2


def test_the_fp16_override_in_the_comment_of_imdb_llama2_loads() -> None:
    lines = (RECIPES / "imdb_llama2.yaml").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith("# training.bf16=false"))
    recipe = load("recipe=imdb_llama2", *line.removeprefix("# ").split())
    expected = {
        "training.bf16": False,
        "training.fp16": True,
        "model.dtype": "float16",
        "quantization.bnb_4bit_compute_dtype": "float16",
    }
    assert {key: value(recipe, key) for key in expected} == expected
