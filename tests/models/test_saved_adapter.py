"""Adapters that do not fit the model they are put on, are damaged, or were trained on another base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distft.config.recipe import Recipe, load_recipe
from distft.distributed.world import World
from distft.errors import ModelError
from distft.evaluation.target import Target
from distft.models.saved_adapter import SavedAdapter

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def recipe(tiny: Path) -> Recipe:
    return load_recipe(["recipe=tiny", "quantization=null", f"model.name={tiny}"])


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on the queries of 4 layers: 8 tensors."""
    return saved(tiny, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj"])


def base_of(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


def saved(tiny: Path, folder: Path, **lora: Any) -> Path:
    """An adapter with random values, saved in `folder`."""
    model = get_peft_model(base_of(tiny), LoraConfig(task_type="CAUSAL_LM", **lora))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def changed(adapter: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of `adapter` in `folder` with changed tensors."""
    shutil.copytree(adapter, folder)
    save_file(change(load_file(adapter / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


def refusal(folder: Path, tiny: Path) -> str:
    with pytest.raises(ModelError) as error:
        SavedAdapter.read(folder).put_on(base_of(tiny), "tiny")
    assert error.value.exit_code == 2
    return str(error.value)


def test_an_adapter_that_fits_computes_what_peft_does(adapter: Path, tiny: Path) -> None:
    from peft import PeftModel

    ids = torch.arange(3, 20)[None]
    model = SavedAdapter.read(adapter).put_on(base_of(tiny), "tiny")
    expected = PeftModel.from_pretrained(base_of(tiny), adapter).eval()
    assert not model.training and torch.equal(model(ids).logits, expected(ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base_of(tiny).eval()(ids).logits)


def test_another_prefix_is_refused(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    other = changed(adapter, tmp_path / "a", lambda t: {f"module.{name}": value for name, value in t.items()})
    text = refusal(other, tiny)
    assert "8 of 8 adapter tensors are missing, 8 are unknown" in text
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A" in text and "module.base_model" in text


def test_missing_layers_are_refused(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    other = changed(adapter, tmp_path / "a", lambda t: {k: v for k, v in t.items() if "layers.3." not in k})
    text = refusal(other, tiny)
    assert "2 of 8 adapter tensors are missing, 0 are unknown" in text and "layers.3.self_attn.q_proj.lora_A" in text


def test_a_missing_saved_module_is_refused(tiny: Path, tmp_path: Path) -> None:
    whole = saved(tiny, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "lm_head.weight" in refusal(
        changed(whole, tmp_path / "a", lambda t: {k: v for k, v in t.items() if "lm_head" not in k}), tiny
    )


def test_another_shape_is_refused(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    other = changed(adapter, tmp_path / "a", lambda t: {k: v[:, :3].contiguous() for k, v in t.items()})
    text = refusal(other, tiny)
    assert "does not fit tiny: size mismatch for" in text and "\n" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(adapter: Path, tiny: Path, tmp_path: Path, value: float) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"][3, 1] = value
        return tensors

    text = refusal(changed(adapter, tmp_path / "a", spoil), tiny)
    assert "NaN or infinite values in 1 of 8 tensors: base_model.model.model.layers.2.self_attn.q_proj.lora_B" in text


def test_other_kinds_of_adapters_and_damaged_ones_are_refused(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    get_peft_model(
        base_of(tiny), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=192)
    ).save_pretrained(prompts)
    assert "of the type PROMPT_TUNING, which adds tokens" in refusal(prompts, tiny)
    bare = Path(shutil.copytree(adapter, tmp_path / "bare"))
    (bare / "adapter_model.safetensors").unlink()
    assert "has no weights: neither adapter_model.safetensors nor adapter_model.bin" in refusal(bare, tiny)
    (bare / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    assert "are damaged" in refusal(bare, tiny)
    (bare / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "no usable adapter_config.json" in refusal(bare, tiny)


def test_another_base_is_said_and_the_same_elsewhere_is_not(
    adapter: Path, recipe: Recipe, tiny: Path, tmp_path: Path
) -> None:
    assert SavedAdapter.read(adapter).base_note(recipe) is None
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(copy)})})
    assert SavedAdapter.read(adapter).base_note(moved) is None, "the content counts, not the name"
    weights = load_file(copy / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, copy / "model.safetensors", metadata={"format": "pt"})
    note = SavedAdapter.read(adapter).base_note(moved)
    assert note is not None and "was trained on other weights" in note and str(copy) in note
    run = tmp_path / "run"
    elsewhere = Path(shutil.copytree(adapter, run / "adapter"))
    config = json.loads((elsewhere / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "someone/base"
    (elsewhere / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    note = SavedAdapter.read(elsewhere).base_note(recipe)
    assert note is not None and note.endswith(f"names someone/base as its base, and is put on {tiny}")
    (run / "summary.json").write_text(json.dumps({"weights_digest": "0" * 16}), encoding="utf-8")
    note = SavedAdapter.read(elsewhere).base_note(recipe)
    assert note is not None and f"(someone/base) than those of {tiny}: digest {'0' * 16}" in note


@pytest.mark.parametrize(
    "lora", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}]
)
def test_the_base_side_of_an_evaluation_is_the_untouched_base(
    lora: dict[str, Any], recipe: Recipe, tiny: Path, tmp_path: Path
) -> None:
    """PEFT's disable_adapter leaves trained biases, and what PiSSA has taken out of the weights of the base."""
    if "bias" in lora:
        biased = base_of(tiny)
        biased.config.mlp_bias = True
        biased.config.save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_config(biased.config)
        model.load_state_dict(biased.state_dict(), strict=False)
        model.save_pretrained(tmp_path / "base")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / file, tmp_path / "base")
        tiny = tmp_path / "base"
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(tiny)})})
        lora = lora | {"target_modules": ["up_proj"]}
    trained = saved(tiny, tmp_path / "adapter", **{"target_modules": ["q_proj"], **lora})
    target = Target.load(recipe, trained, World())
    ids = torch.arange(3, 20)[None]
    with target.side("adapter") as model:
        after = model(ids).logits
    with target.side("base") as model:
        assert torch.equal(model(ids).logits, base_of(tiny).eval()(ids).logits)
    with target.side("adapter") as model:
        assert torch.equal(model(ids).logits, after)
    assert not torch.allclose(after, base_of(tiny).eval()(ids).logits, atol=1e-2)
