"""The digest recognises the same weights, and distinguishes different ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from distft.models.digest import INDEX, digest


def test_the_digest_ignores_the_folder_and_the_number_of_files(tiny: Path, tmp_path: Path) -> None:
    moved, divided = tmp_path / "moved", tmp_path / "divided"
    shutil.copytree(tiny, moved)
    AutoModelForCausalLM.from_pretrained(moved).save_pretrained(divided, max_shard_size="3MB")
    assert (divided / INDEX).is_file()
    found = {digest(str(place)) for place in (tiny, moved, divided)}
    assert len(found) == 1 and len(found.pop() or "") == 16


def test_a_merged_adapter_and_another_dtype_change_the_digest(tiny: Path, tmp_path: Path) -> None:
    base = str(tiny)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=1, target_modules=["v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert len({digest(base), digest(str(tmp_path / "merged")), digest(str(tmp_path / "bf16"))}) == 3


@pytest.mark.parametrize("tensor", [torch.tensor(1.5), torch.zeros(0, 4), torch.zeros(3, dtype=torch.float8_e4m3fn)])
def test_tensors_of_any_shape_and_type_are_read(tensor: torch.Tensor, tmp_path: Path) -> None:
    save_file({"weight": tensor}, tmp_path / "model.safetensors")
    assert digest(str(tmp_path)) is not None


def test_without_weights_or_an_index_there_is_no_digest(tmp_path: Path) -> None:
    assert digest(str(tmp_path)) is None
    assert digest("nobody/has-this-in-a-cache") is None
