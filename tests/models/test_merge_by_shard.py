"""Merging tensor by tensor gives what PEFT gives with the whole model in memory, within bounded memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distft.config.recipe import load_recipe
from distft.models.export import merge
from distft.models.merge_by_shard import ShardedMerge

from .test_export import trained


@pytest.mark.parametrize(
    ("lora", "words", "tolerance"),
    [
        ({"target_modules": "all-linear", "use_dora": True}, ["quantization=null", "model.dtype=float32"], 1e-6),
        ({"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, ["model.dtype=bfloat16"], 2e-3),
        (
            {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 32}},
            ["quantization=null", "model.dtype=bfloat16"],
            2e-3,
        ),
    ],
    ids=["DoRA", "rsLoRA on 4 bits", "patterns in bf16"],
)
def test_it_is_what_peft_gives(
    lora: dict[str, Any], words: list[str], tolerance: float, tiny: Path, tmp_path: Path
) -> None:
    trained(tiny, tmp_path / "adapter", **lora)
    recipe = load_recipe(["recipe=tiny", f"model.name={tiny}", *words])
    merge(recipe, tmp_path / "adapter", tmp_path / "whole")
    sharded = ShardedMerge(recipe, tmp_path / "adapter")
    assert sharded.obstacle() is None
    (target := tmp_path / "sharded").mkdir()
    sharded.write(target, shard_bytes=1 << 20)
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((target / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] > 1 << 20
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("whole", "sharded"))
    assert one.dtype == other.dtype and one.config.architectures == other.config.architectures
    theirs = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor.float(), theirs[name].float(), atol=tolerance, rtol=4 * tolerance), name
    assert one.generation_config.eos_token_id == other.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("lora", "what"),
    [
        ({"modules_to_save": ["lm_head"]}, "more than LoRA's factors"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "more than LoRA's factors|not linear"),
    ],
)
def test_what_cannot_be_merged_alone_is_named(lora: dict[str, Any], what: str, tiny: Path, tmp_path: Path) -> None:
    trained(tiny, tmp_path / "adapter", **lora)
    recipe = load_recipe(["recipe=tiny", "quantization=null", "model.dtype=float32", f"model.name={tiny}"])
    found = ShardedMerge(recipe, tmp_path / "adapter").obstacle()

    assert found is not None and re.search(what, found)


PEAK = """
import resource, sys
from pathlib import Path
from distft.config.recipe import load_recipe
from distft.models.merge_by_shard import ShardedMerge
base, adapter, target = sys.argv[1:]
recipe = load_recipe(["recipe=tiny", "quantization=null", "model.dtype=bfloat16", f"model.name={base}"])
merge = ShardedMerge(recipe, Path(adapter))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge.write(Path(target), shard_bytes=16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_shards_not_by_the_model(tiny: Path, tmp_path: Path) -> None:
    """A base of 0.5 GB in 16 MB tensors: its merge needs a few shards of memory."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    shutil.copytree(tiny, base := tmp_path / "base")
    config = LlamaConfig.from_pretrained(tiny)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 768, 8192, 12
    config.num_attention_heads = config.num_key_value_heads = 12
    config.head_dim = 64
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    (base / "model.safetensors").unlink()
    parts = [dict(list(shapes.items())[at::12]) for at in range(12)]
    names = [f"model-{at:05}-of-00012.safetensors" for at in range(12)]
    for name, part in zip(names, parts, strict=True):
        save_file({key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in part.items()}, base / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    size = sum(2 * shape.numel() for shape in shapes.values())
    trained(base, tmp_path / "adapter", target_modules=["down_proj"], r=2)
    (tmp_path / "merged").mkdir()
    command = [sys.executable, "-c", PEAK, str(base), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert size > 450 << 20
    assert int(ended.stdout.split()[-1]) * 1024 < size / 2
