"""The estimate of a recipe's memory, against measurements, and the cheaper recipes it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from distft.config.recipe import Recipe, load_recipe
from distft.distributed.strategies import Strategy, strategy_for
from distft.distributed.world import World
from distft.hardware import GIB
from distft.training.memory_estimate import Shape, cheaper, device_bytes

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "main_job_2xh200.json"
NAMES = ("ddp_bf16", "ddp_qlora", "fsdp_bf16", "fsdp_qlora", "full_fsdp", "single_qlora", "zero2_bf16", "zero3_bf16")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of Llama-2-7B, and no weights."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ).save_pretrained(folder)
    return folder


def recipes(llama: Path) -> dict[str, Recipe]:
    return {name: load_recipe([f"recipe={name}", f"model.name={llama}"]) for name in NAMES}


def on(processes: int, recipe: Recipe) -> Strategy:
    return strategy_for(recipe, World(world_size=processes), on_gpu=True)


def test_the_shape_is_read_without_weights(llama: Path) -> None:
    recipe = recipes(llama)["ddp_qlora"]
    shape = Shape.of(recipe)
    run = json.loads(MEASURED.read_text())["runs"][0]["summary"]
    assert shape.parameters + shape.adapter(recipe.lora or {}) == run["parameters"]
    assert shape.adapter(recipe.lora or {}) == run["trainable_parameters"]


def test_the_estimate_is_within_ten_percent_of_the_measurements(llama: Path) -> None:
    """Measured on two H200, with samples of up to 1,024 tokens."""
    runs = [run["summary"] for run in json.loads(MEASURED.read_text())["runs"] if run["summary"]["peak_memory_gib"]]
    assert {run["recipe"] for run in runs} >= {"ddp_qlora", "fsdp_bf16", "fsdp_qlora", "zero3_bf16"}
    shape = Shape.of(recipes(llama)["ddp_qlora"])
    for run in runs:
        recipe = recipes(llama)[run["recipe"]]
        size = device_bytes(recipe, shape, on(2, recipe), run["micro_batch"], 1024)
        assert size / GIB == pytest.approx(run["peak_memory_gib"], rel=0.1), run["recipe"]


def test_cheaper_recipes_are_those_that_fit_and_take_less(llama: Path) -> None:
    known = recipes(llama)
    shape = Shape.of(known["ddp_bf16"])
    one = cheaper(known["ddp_bf16"], list(known.values()), shape, on(1, known["ddp_bf16"]), 1024, 12 * GIB)
    assert [name for name, _ in one][-1] == "single_qlora", "rank 8 takes least"
    assert {name for name, _ in one} == {"ddp_qlora", "fsdp_qlora", "single_qlora"}, "one process shards nothing"
    two = cheaper(known["ddp_bf16"], list(known.values()), shape, on(2, known["ddp_bf16"]), 1024, 12 * GIB)
    assert {name for name, _ in two} == {"ddp_qlora", "fsdp_qlora", "single_qlora", "fsdp_bf16"}
    assert [size for _, size in two] == sorted((size for _, size in two), reverse=True)
    assert cheaper(known["fsdp_qlora"], list(known.values()), shape, on(2, known["fsdp_qlora"]), 1024, GIB) == []


def test_checkpointing_and_the_optimizer_count(llama: Path) -> None:
    shape = Shape.of(recipes(llama)["ddp_bf16"])

    def size(*overrides: str) -> int:
        recipe = load_recipe(["recipe=ddp_bf16", f"model.name={llama}", *overrides])
        return device_bytes(recipe, shape, on(1, recipe), 4, 1024)

    assert size("training.gradient_checkpointing=false") > 1.5 * size()
    assert size("training.optim=paged_adamw_32bit") < size("training.optim=adamw_8bit") < size()


def test_experts_count_with_their_bits_and_adapters(tmp_path: Path) -> None:
    """30.5 billion parameters, of which experts have 29."""
    Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_experts=128).save_pretrained(
        tmp_path
    )
    words = ["recipe=single_qlora", f"model.name={tmp_path}", "lora.lora_dropout=0", "lora.target_modules=[q_proj]"]
    shape = Shape.of(load_recipe(words))
    of_experts = 48 * 128 * 3 * 2048 * 768
    assert sum(number * i * o for _, number, i, o in shape.experts) == of_experts

    def size(*overrides: str) -> int:
        recipe = load_recipe([*words, *overrides])
        return device_bytes(recipe, shape, on(1, recipe), 1, 1024)

    saved = size("quantization.experts=false") - size()
    assert saved == pytest.approx(of_experts * (2 - 0.516), rel=0.05)
    names = "lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
    trained = 48 * 128 * 8 * (2048 + 1536 + 768 + 2048)
    assert size(names) - size() == pytest.approx(trained * 8, rel=0.01)  # the optimizer is paged
