"""A parameter as a process holds it: whole, a shard (FSDP2), partitioned (ZeRO-3), or packed in 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: torch.Tensor) -> TypeIs[DTensor]:
    """Whether it is one of FSDP2's shards."""
    # Takes half a second, for which no command waits that starts no training.
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor that lies on this process."""
    return parameter.to_local() if is_sharded(parameter) else parameter


def whole_numel(parameter: torch.Tensor) -> int:
    """Number of elements of the whole tensor, where it is a shard, partitioned, or packed in 4 bits."""
    count = int(getattr(parameter, "ds_numel", parameter.numel()))
    if type(local_part(parameter)).__name__ == "Params4bit":
        count *= 2 * parameter.element_size()
    return count


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every trainable tensor, whole, by its name in the model: one at a time, so that no more than one is whole on a device at once. All ranks
    enter."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("module.")
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data
        elif is_sharded(parameter):
            yield name, parameter.full_tensor()
        else:
            yield name, parameter.data


def checksum(tensor: torch.Tensor) -> int:
    """A sum over the tensor's bits, each element weighted by its place modulo a prime: equal bits, equal sum."""
    bits = (
        tensor.detach()
        .contiguous()
        .flatten()
        .view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    )
    weights = torch.arange(bits.numel(), device=bits.device).remainder_(1_000_003).add_(1)
    return int((bits.to(torch.int64) * weights).sum())
