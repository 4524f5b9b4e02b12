"""Sizes, names and checksums of parameters in the forms that a process may hold them in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distft.distributed.tensors import checksum, is_packed, is_partitioned, is_sharded, whole_numel, whole_tensors


def test_an_ordinary_parameter_is_whole() -> None:
    parameter = nn.Parameter(torch.zeros(3, 4))
    assert not is_sharded(parameter) and not is_partitioned(parameter) and not is_packed(parameter)
    assert whole_numel(parameter) == 12


def test_a_partitioned_parameter_has_the_size_that_deepspeed_records() -> None:
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_id, parameter.ds_numel = 0, 12
    assert is_partitioned(parameter) and whole_numel(parameter) == 12


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_a_packed_parameter_has_two_elements_per_byte(storage: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 32, bias=False, quant_storage=storage).to("cpu")
    assert is_packed(layer.weight) and whole_numel(layer.weight) == 64 * 32


def test_whole_tensors_are_the_trainable_ones_under_the_model_s_own_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel wraps it
    assert [name for name, _ in whole_tensors(wrapped)] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_equal_bits_have_equal_checksums_and_a_swap_or_a_flipped_sign_changes_them(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 7).reshape(2, 3).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.t().contiguous().t())
    assert checksum(tensor) != checksum(tensor.flip(0))
    assert checksum(torch.zeros(2)) != checksum(-torch.zeros(2)), "the sign of zero is a bit as well"
