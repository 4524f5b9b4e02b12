"""Parameters as a process holds them: whole, a shard (FSDP2), partitioned (ZeRO-3), or packed in 4 bits.

The imports of torch and DeepSpeed take seconds, so they are inside the functions: commands that only check a recipe
import this module too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: torch.Tensor) -> TypeIs[DTensor]:
    """Whether the tensor is sharded by FSDP2."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether the parameter is partitioned by ZeRO-3, which leaves an empty tensor in its place."""
    return hasattr(parameter, "ds_id")


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether the parameter is packed in 4 bits by bitsandbytes, sharded or not."""
    return type(local_part(parameter)).__name__ == "Params4bit"


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """The part of the tensor that is on this process."""
    return parameter.to_local() if is_sharded(parameter) else parameter


def whole_numel(parameter: torch.Tensor) -> int:
    """Number of elements of the whole tensor, even if it is sharded, partitioned or packed in 4 bits."""
    count = int(getattr(parameter, "ds_numel", parameter.numel()))
    return count * 2 * parameter.element_size() if is_packed(parameter) else count


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every trainable tensor, gathered, with its name in the model. All ranks must iterate.

    Only one tensor at a time is gathered on a device.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("module.")
        if is_partitioned(parameter):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data
        elif is_sharded(parameter):
            yield name, parameter.full_tensor()
        else:
            yield name, parameter.data


def checksum(tensor: torch.Tensor) -> int:
    """Sum the tensor's bits, each element weighted by its index modulo a prime. Equal bits have equal sums."""
    import torch

    by_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().flatten().view(by_size[tensor.element_size()])
    weights = torch.arange(bits.numel(), device=bits.device).remainder_(1_000_003).add_(1)
    return int((bits.to(torch.int64) * weights).sum())
