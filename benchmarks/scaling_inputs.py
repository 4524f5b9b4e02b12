"""Inputs of the scaling model: measurements of one GPU, shapes of published models, and distft's plan and estimate."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from cluster import Compute, Hardware, Load, Scheme

from distft.config.recipe import Recipe, load_recipe
from distft.data.batch_plan import Plan
from distft.distributed.strategies import strategy_for
from distft.distributed.world import World
from distft.training.memory_estimate import Shape, device_bytes

RESULTS = Path(__file__).parent / "results"
GPUS = (1, 2, 8, 64, 1024)
DDP, FSDP = Scheme("DDP", "ddp_bf16", "nothing"), Scheme("FSDP2", "fsdp_bf16", "world")
HSDP = Scheme("HSDP", "fsdp_bf16", "node")
ZERO2 = Scheme("ZeRO-2", "zero2_bf16", "optimizer")
DOLLY = 15_011  # rows of databricks-dolly-15k
SAMPLES, BUDGET = 32, 9_216  # samples per GPU and step, one pack; batching.micro_batch_tokens of the recipes
CRITICAL = 256  # samples; an assumption, see the document

# The published config.json of each.
_LLAMA_3: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": synthetic.LLAMA_2_7B,
    "Llama-3.1-8B": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3.1-70B": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LLAMA = "Llama-2-7B"


def result(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


@functools.cache
def hardware() -> Hardware:
    return Hardware(nvlink=result("references_h200.json")["links"]["nccl_all_reduce_2_gpus_1_gib_bytes_per_second"])


@functools.cache
def compute() -> Compute:
    """Time of Llama-2-7B on one H200, from runs with the same tokens in one pack per step and in two.

    The second ran with dropout, and both with a 4-bit base, so the time per pack is somewhat overestimated.
    """
    record = result("throughput_h200.json")
    runs = [next(run for run in record["runs"] if run["name"] == name) for name in ("single_13312", "single_6656")]
    assert runs[0]["tokens"] == runs[1]["tokens"]
    one, two = (record["summary"][run["name"]]["seconds"]["median"] / record["steps"] for run in runs)
    pack_s = two - one
    return Compute(pack_s, (one - pack_s) / (runs[0]["tokens"] / record["steps"]))


@functools.cache
def model(name: str) -> tuple[Shape, dict[str, Recipe]]:
    """The shape of a model, and the recipes that train it."""
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**MODELS[name]).save_pretrained(folder)
        names = ("ddp_qlora", "ddp_bf16", "fsdp_bf16", "full_fsdp", "zero2_bf16", "zero3_bf16", "fsdp_qlora")
        recipes = {recipe: load_recipe([f"recipe={recipe}", f"model.name={folder}"]) for recipe in names}
        return Shape.of(recipes["ddp_bf16"]), recipes


def adapter(name: str) -> int:
    """Number of parameters of the recipes' adapter on a model."""
    shape, recipes = model(name)
    return shape.adapter(recipes["ddp_bf16"].lora or {})


@functools.cache
def load(gpus: int, batch: int) -> Load:
    """What distft's plan gives to the ranks, averaged over an epoch of Dolly-15k's lengths (at least four steps)."""
    count = max(DOLLY, 4 * batch)
    lengths = synthetic.sample_lengths(synthetic.SHAPES["llama-2-7b"], count, np.random.default_rng(0))
    recipe = model(LLAMA)[1]["ddp_bf16"]
    batching = recipe.batching.model_copy(update={"global_batch_size": batch, "micro_batch_tokens": BUDGET})
    plan = Plan(lengths, batching, recipe.run.seed)
    steps = [
        [[int(lengths[pack].sum()) for pack in ranks] for ranks in plan.micro_batches(number, gpus)]
        for number in range(max(4, DOLLY // batch))
    ]
    packs = [size for rounds in steps for sizes in rounds for size in sizes]
    return Load(
        sum(map(len, steps)) / len(steps),
        sum(max(sizes) for rounds in steps for sizes in rounds) / len(steps),
        packs.count(0) / len(packs),
        batch,
    )


def memory(name: str, recipe: str, gpus: int, tokens: int = BUDGET, micro_batch: int = 1) -> float:
    """Bytes per device with all layers checkpointed, as distft estimates them; `gpus` share a copy of the base."""
    shape, recipes = model(name)
    chosen = recipes[recipe]
    strategy = strategy_for(chosen, World(world_size=gpus), on_gpu=True)
    return device_bytes(chosen, shape, strategy, micro_batch, tokens)
