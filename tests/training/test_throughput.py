"""Rates, utilisation and energy of a stretch of training."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from distft.models import fused_lora as fused
from distft.models.activation_checkpointing import checkpoint_layers
from distft.models.parameters import recomputed_parameters
from distft.training.throughput import Window, Work, model_flops_per_token


def test_hfu_counts_the_second_forward_of_checkpointed_layers() -> None:
    """7e9 parameters, 10,000 tokens/s, 790 TFLOP/s: 4·N for LoRA, 6·N for full training, +2·N for recomputation."""
    lora = Work.of(model_flops_per_token(7_000_000_000, frozen_base=True), 7_000_000_000)
    full = Work.of(model_flops_per_token(7_000_000_000, frozen_base=False), 7_000_000_000)
    assert lora.utilisation(1e4, 790e12) == pytest.approx((0.354430, 0.531646), rel=1e-5)
    assert full.utilisation(1e4, 790e12) == pytest.approx((0.531646, 0.708861), rel=1e-5)
    assert Work(4.0).utilisation(1.0, 8.0) == (0.5, 0.5)
    assert model_flops_per_token(7, frozen_base=True, forwards=1) == 6 * 7, "the forward of a reference counts"


def test_rates_and_energy_of_a_window() -> None:
    window = Window(2.0, 4, 20, 1000, 600.0) + Window(2.0, 4, 20, 1000, 200.0)
    rates = window.rates(2, Work(4e9, 2e9), 1e13)
    assert rates == {
        "samples_per_second": 10.0,
        "tokens_per_second": 500.0,
        "tokens_per_second_per_gpu": 250.0,
        "mfu": 0.1,
        "hfu": pytest.approx(0.15),
    }
    assert window.energy(idle_watts=50.0) == {
        "joules_per_sample": 20.0,
        "joules_per_step": 100.0,
        "energy_idle_share": 0.25,
    }
    assert window.energy(None)["energy_idle_share"] is None
    assert set((window + Window(1.0)).energy(50.0)) == set(Window().energy(50.0))
    assert set(Window(1.0, 1, 1, 1).energy(50.0).values()) == {None}, "energy was not measured"
    assert set(Window().rates(1, Work(1.0), 1.0).values()) == {None}


def test_recomputed_parameters_are_those_of_layers_that_run_twice() -> None:
    def model(fuse: bool) -> Any:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        )
        made = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
        if fuse:
            fused.fuse(made)
        return made.train()

    # Per layer: queries and output 64·64, keys and values 64·32, MLP 3·64·128, two norms; LoRA r=4 on each linear.
    attention = 2 * 64 * 64 + 2 * 64 * 32 + 4 * (2 * (64 + 64) + 2 * (64 + 32))
    mlp, down = 3 * 64 * 128 + 4 * 3 * (64 + 128), 64 * 128 + 4 * (64 + 128)
    plain = model(fuse=False)
    assert recomputed_parameters(plain) == 0
    checkpoint_layers(plain, 3, offload=False)
    assert recomputed_parameters(plain) == 3 * (attention + mlp + 128)
    assert recomputed_parameters(plain, by_trainer=True) == 4 * (attention + mlp + 128)
    with_nodes = model(fuse=True)
    checkpoint_layers(with_nodes, 3, offload=False)
    assert recomputed_parameters(with_nodes) == 3 * (attention + mlp - down + 128)
