"""Merged models compute what base and adapter do, whatever was trained and whether or not embeddings are tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.config.recipe import load_recipe
from distft.errors import InvariantError
from distft.models import export
from distft.models.export import merge

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def tied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its output head tied to its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, **lora: Any) -> torch.Tensor:
    """Save an adapter with random values in `folder`; returns the logits of base and adapter."""
    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **lora})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(IDS).logits
    return logits


@pytest.mark.parametrize(
    ("lora", "stays_tied"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"trainable_token_indices": [5, 2047]}, True),
        ({}, True),
    ],
)
def test_tied_embeddings_part_where_one_of_them_was_trained(
    lora: dict[str, Any], stays_tied: bool, tied: Path, tmp_path: Path
) -> None:
    expected = trained(tied, tmp_path / "adapter", **lora)
    recipe = load_recipe(["recipe=tiny", "quantization=null", "model.dtype=float32", f"model.name={tied}"])
    merge(recipe, tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.tie_word_embeddings is stays_tied
    with torch.inference_mode():
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)


def test_a_merge_that_changes_what_the_model_computes_leaves_nothing_behind(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT's own merge does where the trained embedding is also the output head."""
    trained(tied, tmp_path / "adapter", target_modules=["embed_tokens"])
    monkeypatch.setattr(export, "merge_into_base", lambda model: model.merge_and_unload())
    recipe = load_recipe(["recipe=tiny", "quantization=null", "model.dtype=float32", f"model.name={tied}"])
    with pytest.raises(InvariantError, match="merging has changed what the model computes: its logits differ by"):
        merge(recipe, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_module_that_is_merged_with_twice_its_scale_is_found(
    dtype: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 28 modules; in bf16 it changes the logits less than rounding does."""
    trained(tiny, tmp_path / "adapter", target_modules="all-linear")
    recipe = load_recipe(["recipe=tiny", "quantization=null", f"model.dtype={dtype}", f"model.name={tiny}"])
    merge(recipe, tmp_path / "adapter", tmp_path / "right")
    whole = export.merge_into_base

    def wrong(model: Any) -> Any:
        model.get_submodule("base_model.model.model.layers.2.self_attn.k_proj").scaling["default"] *= 2
        return whole(model)

    monkeypatch.setattr(export, "merge_into_base", wrong)
    with pytest.raises(InvariantError, match=r"changed what model\.layers\.2\.self_attn\.k_proj computes"):
        merge(recipe, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
