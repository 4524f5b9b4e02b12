"""A model with a vision tower, which no text reaches, trains on text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distft.distributed.strategies.fsdp2 import FSDP2
from distft.distributed.world import World
from distft.models.tiny import tiny_model

from .conftest import Train

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3(vocabulary: int) -> Any:
    config = AutoConfig.for_model(
        "gemma3", text_config=TEXT | {"vocab_size": vocabulary}, vision_config=VISION, mm_tokens_per_image=4
    )
    return AutoModelForCausalLM.from_config(config)


def test_fsdp2_shards_the_layers_that_there_are() -> None:
    """accelerate refuses a model that names layers which it lacks."""
    with torch.device("meta"):
        model = gemma3(128)
    there = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) - there, "this tests nothing"
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    FSDP2(World(), False, "fsdp").choose_layers(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
    assert "Gemma3DecoderLayer" in plugin.transformer_cls_names_to_wrap
    assert set(plugin.transformer_cls_names_to_wrap) <= there


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_parameters_train_and_are_saved(strategy: str, train: Train, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    model = gemma3(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["training.max_steps=3", "training.eval_strategy=no", "training.save_strategy=no", "lora=null"]
    words += ["quantization=null", "evaluation.before_and_after=false", "batching.micro_batch_tokens=512"]
    ended = train("recipe=tiny", *words, f"model.name={tmp_path}", f"strategy={strategy}", nproc=2)
    assert ended.code == 0, ended.stderr[-3000:]
    saved = AutoModelForCausalLM.from_pretrained(ended.folder.model)
    before, after = model.state_dict(), saved.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
