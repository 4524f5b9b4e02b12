"""The result of a run is what is on disk: it is read back and compared. Checkpoints are in tests/faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distft.config.recipe import load_recipe
from distft.distributed.strategies.single import Single
from distft.distributed.world import World
from distft.errors import InvariantError
from distft.runs.folder import RunFolder
from distft.training.checkpoints import save_result
from tests.models.families import small_model

SINGLE = Single(World(), False, "single")


def base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return LlamaForCausalLM(config)


CASES = {
    "adapter": ((), lambda: get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"])), "adapter_model", 2),
    "model": (("lora=null",), base, "model", 12),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Callable[[], Path], Path, int]:
    """A model, the saving of it, the file that it is saved to, and the number of tensors in that."""
    words, build, name, count = CASES[request.param]
    recipe = load_recipe(["recipe=tiny", "strategy=single", "quantization=null", *words])
    model = build()
    file = tmp_path / request.param / f"{name}.safetensors"
    return model, lambda: save_result(model, recipe, SINGLE, RunFolder(tmp_path)), file, count


Case = tuple[Any, Callable[[], Path], Path, int]


def spoil(model: Any, how: Callable[[], None]) -> None:
    """Let `how` change the files after the model has written them."""
    original = model.save_pretrained

    def save(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        how()

    model.save_pretrained = save


def test_what_was_trained_is_saved(case: Case) -> None:
    _, save, file, count = case
    assert save() == file.parent
    assert len(load_file(file)) == count


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_whole_mixture_of_experts_is_saved_under_the_names_of_the_hub(family: str, tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=tiny", "strategy=single", "quantization=null", "lora=null", "model.dtype=float32"])
    model = small_model(family)
    saved = save_result(model, recipe, SINGLE, RunFolder(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(saved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_byte_that_differs_on_disk_is_found(case: Case) -> None:
    model, save, file, _ = case

    def flip() -> None:
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)

    spoil(model, flip)
    with pytest.raises(InvariantError, match=r"the saved \S+ is not the one that was trained"):
        save()


def test_a_file_that_was_not_written_is_found(case: Case) -> None:
    model, save, file, count = case
    spoil(model, file.unlink)
    with pytest.raises(InvariantError, match=f"{count} of {count} tensors are not in the saved file"):
        save()


def test_equal_numbers_of_another_type_are_found(case: Case) -> None:
    model, save, file, _ = case
    spoil(model, lambda: save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file))
    with pytest.raises(InvariantError, match=r"the saved \S+ is not the one that was trained"):
        save()


def test_a_trained_tensor_that_would_not_be_saved_is_found(tmp_path: Path) -> None:
    """PEFT picks an adapter's tensors by name, and leaves out a layer of the base that was trained as well."""
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.model.model.norm.weight.requires_grad = True
    recipe = load_recipe(["recipe=tiny", "strategy=single", "quantization=null"])
    with pytest.raises(InvariantError, match="3 tensors were trained, but only 2 would be saved"):
        save_result(model, recipe, SINGLE, RunFolder(tmp_path))
