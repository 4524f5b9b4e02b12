"""The architectures of the matrix as a run loads them, in bf16 and in 4 bits: on a GPU all of them, on a CPU a few."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distft.config.recipe import load_recipe
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.world import World
from distft.models.loading import load_model
from distft.training.micro_batches import settle

from .learning import assert_alike, errors, learn, trained
from .matrix import FAMILIES, LENGTHS, batch_of, outcome_as_loaded, plain_copy, reference_of

BF16 = ("model.dtype=bfloat16", "training.bf16=true")
FOUR_BITS = ("quantization={load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16}", *BF16)
REFUSED_IN_4_BITS = ("mamba", "rwkv")
"""transformers reads packed weights of these as if they were dense, or rescales them."""
LIMITS = {"loss": 3e-3, "gradient": 0.05, "gradient norm": 1e-2}
"""Errors relative to fp32. A model that bf16 disturbs more may be off by twice what plain modules are off in bf16."""
BATCHES = 5
"""The best of so many batches counts: a fault is in each of them, and a token that rounding sends to other experts is
in some. For plain modules, their median counts."""


@pytest.mark.gpu
@pytest.mark.parametrize("words", [("quantization=null", *BF16), FOUR_BITS], ids=["bf16", "4bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_it_learns_as_padded_in_fp32(family: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """The reference has the same weights, rounded or quantised, and computes in fp32: rounding is all that differs."""
    outcome = outcome_as_loaded(family, tmp_path, *words)
    if words == FOUR_BITS and family in REFUSED_IN_4_BITS:
        assert outcome.attention is None and "quantization=null" in outcome.why
        return
    assert outcome.attention is not None, outcome.why
    model = trained(outcome)
    exact, plain = reference_of(model), plain_copy(model)
    found, usual = [], []
    for variant in range(BATCHES):
        expected = learn(exact, batch_of(None, variant))
        found.append(errors(learn(model, batch_of(outcome, variant), torch.bfloat16), expected))
        usual.append(errors(learn(plain, batch_of(None, variant), torch.bfloat16), expected))
    off = {name: min(each[name] for each in found) for name in LIMITS}
    plain_off = {name: median(each[name] for each in usual) for name in LIMITS}
    wrong = {name: off[name] for name in LIMITS if off[name] > max(LIMITS[name], 2 * plain_off[name])}
    assert not wrong, (outcome.row(), wrong, plain_off)


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral", "opt", "phi3"])
def test_in_4_bits_it_learns_as_padded(family: str, tmp_path: Path) -> None:
    words = ("quantization={load_in_4bit: true, bnb_4bit_compute_dtype: float32}", "model.dtype=float32")
    outcome = outcome_as_loaded(family, tmp_path, *words)
    assert "Linear4bit" in {type(module).__name__ for module in outcome.model.modules()}
    model = trained(outcome)
    assert_alike(learn(model, batch_of(outcome)), learn(reference_of(model), batch_of(None)))


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_by_quantised_linears_is_no_fault(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLM.int8() rounds activations to 8 bits, and 4-bit products may be in bf16, whatever the type of the model."""
    monkeypatch.setattr("distft.distributed.strategies.selection.visible_devices", lambda: 0)
    words = ["strategy=single", "batching.micro_batch_tokens=600", "lora.target_modules=[q_proj,v_proj,o_proj]"]
    quantization = f"quantization={{load_in_{bits}bit: true, bnb_4bit_compute_dtype: bfloat16}}"
    recipe = load_recipe(["recipe=tiny", quantization, *words])
    strategy = choose(recipe, World(), {}, Launcher())
    tokenizer = SimpleNamespace(pad_token_id=0)
    settled = settle(load_model(recipe, strategy), recipe, strategy, tokenizer, np.array(LENGTHS))
    assert settled.recipe.batching.micro_batch_tokens == 600 and not settled.notes
    assert settled.facts["fused_linears"] == settled.facts["adapted_linears"] > 0
