"""Rows of `model.resize_embeddings`: trained, saved, merged, and refused where they cannot be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from distft.config.recipe import Recipe, load_recipe
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.world import World
from distft.errors import ModelError
from distft.models.checks import model_faults
from distft.models.embeddings import add_rows, vocabulary_size
from distft.models.export import merge
from distft.models.loading import load_model
from distft.models.saved_adapter import SavedAdapter, load_trained

IDS = torch.tensor([[5, 2048, 9, 2049, 2048, 7]])


@pytest.fixture(scope="module")
def larger(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer with two more entries, 2048 and 2049."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<|user|>", "<|model|>"])
    tokenizer.save_pretrained(folder)
    return folder


def recipe_for(base: Path, tokenizer: Path, *overrides: str) -> Recipe:
    fixed = ["recipe=tiny", "strategy=single", "quantization=null", "lora.lora_dropout=0.0", "model.dtype=float32"]
    model = [f"model.name={base}", f"model.tokenizer={tokenizer}", "model.resize_embeddings=true"]
    return load_recipe([*fixed, *model, *overrides])


def test_a_new_row_is_the_mean_of_the_others_and_the_old_ones_stay(tiny: Path, larger: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    before = [m.weight.clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert vocabulary_size(AutoTokenizer.from_pretrained(larger)) == 2050
    add_rows(model, 2050)
    for module, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        assert torch.equal(module.weight[:2048], old)
        assert torch.allclose(module.weight[2048:], old.mean(0).expand(2, -1))
    add_rows(model, 100)
    assert model.config.vocab_size == 2050


@pytest.mark.parametrize("is_tied", [False, True])
def test_new_rows_are_trained_by_the_fused_head_saved_loaded_and_merged(
    is_tied: bool, tiny: Path, larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distft.distributed.strategies.selection.visible_devices", lambda: 0)
    base = tiny
    if is_tied:
        model: Any = AutoModelForCausalLM.from_pretrained(tiny)
        model.config.tie_word_embeddings, base = True, tmp_path / "tied"
        model.lm_head.weight = model.model.embed_tokens.weight
        model.save_pretrained(base)
    recipe = recipe_for(base, larger, "lora.target_modules=[q_proj]")
    model = load_model(recipe, choose(recipe, World(), {}, Launcher()))
    rows = {name: p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if is_tied else 2) and all(p.requires_grad and p.shape == (2, 192) for p in rows.values())
    add_fused_lm_head(model.get_base_model())
    logits = model(input_ids=IDS).logits
    fused = -model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs.sum()
    plain = torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:], reduction="sum")
    assert torch.allclose(fused, plain, rtol=1e-5)
    gradients = torch.autograd.grad(plain, list(rows.values()), retain_graph=True)
    assert all(
        torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6) and theirs.abs().sum() > 0
        for ours, theirs in zip(torch.autograd.grad(fused, list(rows.values())), gradients, strict=True)
    )
    for parameter in rows.values():
        parameter.data += 0.5 * torch.randn(2, 192, generator=torch.Generator().manual_seed(0))
    model.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
        assert torch.equal(load_trained(recipe, tmp_path / "adapter")(input_ids=IDS).logits, expected)
    merge(recipe, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 2050 and merged.config.tie_word_embeddings is is_tied
    with torch.inference_mode():
        assert torch.allclose(merged(input_ids=IDS).logits, expected, atol=1e-4)
    with pytest.raises(ModelError, match=r"trained rows of the embedding that tiny, with 2,048, lacks"):
        SavedAdapter.read(tmp_path / "adapter").put_on(AutoModelForCausalLM.from_pretrained(base), "tiny")


def test_new_rows_are_no_fault_except_where_they_cannot_be_trained(tiny: Path, larger: Path) -> None:
    assert model_faults(recipe_for(tiny, larger)).faults == []
    whole = "lora.modules_to_save=[embed_tokens, lm_head]"
    for strategy, more, says in (
        ("ddp", [], None),
        ("fsdp", [whole], None),
        ("fsdp", [], "new rows of an embedding cannot be trained by themselves under FSDP2"),
        ("zero3", [whole], "rows cannot be added to an embedding that ZeRO-3 has split"),
    ):
        faults = model_faults(recipe_for(tiny, larger, f"strategy={strategy}", *more)).faults
        assert [fault.key for fault in faults] == (["model.resize_embeddings"] if says else [])
        assert says is None or says in faults[0].problem
