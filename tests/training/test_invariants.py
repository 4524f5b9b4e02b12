"""What every run proves about its model before step 1 and after the first update, against models that are not so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from distft.config.recipe import Recipe, load_recipe
from distft.data.batch_plan import Plan
from distft.distributed.strategies import Strategy
from distft.distributed.strategies.single import Single
from distft.distributed.world import World
from distft.errors import InvariantError
from distft.runs.folder import RunFolder
from distft.training.callbacks import Invariants
from distft.training.invariants import check_prepared, check_updated, fingerprint
from distft.training.nonfinite import BadNumbers

CPU, GPU = (Single(World(), on_gpu, "single") for on_gpu in (False, True))


def recipe_of(*words: str) -> Recipe:
    return load_recipe(["recipe=tiny", "strategy=single", "quantization=null", *words])


def model_of() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


TRAINABLE = 2 * 2 * (16 + 16)
"""A and B of rank 2 on two linears of 16 by 16."""


def check(model: Any, strategy: Strategy = CPU, *words: str) -> None:
    check_prepared(model, recipe_of(*words), strategy, TRAINABLE)


def parameter(model: Any, name: str) -> torch.nn.Parameter:
    (found,) = (value for key, value in model.named_parameters() if name in key)
    return found


def test_a_model_as_asked_for_passes() -> None:
    check(model_of())


def test_a_frozen_part_of_the_adapter_is_found() -> None:
    model = model_of()
    parameter(model, "q_proj.lora_A").requires_grad = False
    with pytest.raises(InvariantError, match=r"96 parameters are trainable; the adapter \(or model\) has 128 "):
        check(model)


def test_a_trainable_part_of_the_base_is_found() -> None:
    model = model_of()
    parameter(model, "o_proj.weight").requires_grad = True
    with pytest.raises(InvariantError, match=r"384 parameters are trainable; the adapter \(or model\) has 128 "):
        check(model)


def test_weights_that_were_never_loaded_are_found() -> None:
    model = model_of()
    model.base_model.model.lm_head.to("meta")
    with pytest.raises(InvariantError, match=r"parameter base_model.model.lm_head.weight is on the meta device"):
        check(model)


def test_a_base_in_another_type_is_found() -> None:
    model = model_of()
    model.base_model.model.lm_head.to(torch.bfloat16)
    with pytest.raises(InvariantError, match=r"lm_head.weight is torch.bfloat16; the recipe's model.dtype is float32"):
        check(model)


def test_weights_left_on_the_cpu_are_found() -> None:
    with pytest.raises(InvariantError, match=r"parameter \S+ is on the CPU, and this run trains on a GPU"):
        check(model_of(), GPU)


def test_weights_that_belong_on_the_cpu_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 leaves an empty tensor there in place of each parameter; offloading leaves the parameter itself."""
    model = model_of()
    for partitioned in model.parameters():
        partitioned.ds_id = 0
    check(model, GPU)
    monkeypatch.setattr(Single, "offloads_parameters", lambda self, environment: True)
    check(model_of(), GPU)


def test_types_that_differ_on_purpose_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP has 4-bit weights stored as bfloat16, and DeepSpeed casts the base."""
    model = model_of()
    head = model.base_model.model.lm_head
    head.weight = Params4bit(head.weight.data.bfloat16(), requires_grad=False)
    check(model)
    model = model_of()
    model.base_model.model.lm_head.to(torch.bfloat16)
    monkeypatch.setattr(Single, "cast_dtypes", lambda self, recipe: {torch.bfloat16})
    check(model)


def test_a_strategy_s_own_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Single, "parameter_fault", lambda self, name, parameter: f"{name} is not sharded")
    with pytest.raises(InvariantError, match=r"is not sharded \(rank 0, strategy single\)"):
        check(model_of())


def test_an_update_that_moves_no_lora_b_is_found() -> None:
    """A moves by weight decay alone; only a gradient moves B, which starts from zero."""
    model = model_of()
    before = fingerprint(model)
    with pytest.raises(
        InvariantError, match=r"no trainable tensor moved in an update with learning rate 0.002: .*lora_B"
    ):
        check_updated(model, CPU, before, 0.002)
    parameter(model, "q_proj.lora_A").data *= 0.99
    with pytest.raises(InvariantError, match="no trainable tensor moved"):
        check_updated(model, CPU, before, 0.002)
    parameter(model, "q_proj.lora_B").data += 1e-3
    check_updated(model, CPU, before, 0.002)


def test_the_callback_checks_before_step_1_and_after_the_first_update_that_counts() -> None:
    model, recipe = model_of(), recipe_of()
    numbers = BadNumbers(recipe, RunFolder(Path("run")), World(), Plan([5] * 32, recipe.batching))
    with pytest.raises(InvariantError, match="128 parameters are trainable"):
        Invariants(CPU, recipe, TRAINABLE + 1, numbers).on_train_begin(None, None, None, model=model)

    callback = Invariants(CPU, recipe, TRAINABLE, numbers)
    callback.on_train_begin(None, None, None, model=model)

    def step(learning_rate: float, *, left_out: bool = False) -> None:
        schedule = SimpleNamespace(get_last_lr=lambda: [learning_rate])
        callback.on_step_begin(None, None, None, lr_scheduler=schedule)
        callback.on_step_end(None, None, None, model=model, optimizer=SimpleNamespace(step_was_skipped=left_out))

    step(0.0)  # the first step of a warm-up moves nothing
    step(0.002, left_out=True)  # nor does one that fp16's loss scaler leaves out
    numbers.in_a_row = 1
    step(0.002)  # nor does one that was skipped
    numbers.in_a_row = 0
    with pytest.raises(InvariantError, match="no trainable tensor moved"):
        step(0.002)
    parameter(model, "v_proj.lora_B").data += 1e-3
    step(0.002)
    step(0.002)  # checked once
