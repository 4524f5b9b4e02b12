"""FSDP2 as accelerate sets it up, mended: real on CPU, its outputs as they are, and its all-gathers issued early."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from distft import upstream_api
from distft.errors import LaunchError

AHEAD = 2
"""Layers that are gathered beyond the one at work."""


KEPT = 1 / 8
"""Of a device's memory, what whole layers may take from the forward to the backward."""


def layers_of(model: nn.Module) -> list[Any]:
    """The layers of a prepared model, each sharded for itself, in their order."""
    # Takes half a second, for which no command waits that starts no training.
    from torch.distributed.fsdp import FSDPModule

    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and all(isinstance(x, FSDPModule) for x in m))
    return list(max(stacks, key=len, default=()))


def keep_layers(model: nn.Module, memory: float) -> int | None:
    """Let the layers stay whole from the forward to the backward, so that they are gathered once a step and not twice, where all of
    them take no more than `KEPT` of `memory` bytes. Returns the bytes that they take, None where they do not stay."""
    parameters = [parameter for layer in layers_of(model) for parameter in layer.parameters()]
    whole = sum(parameter.to_local().nbytes * parameter.device_mesh.size() for parameter in parameters)
    if not parameters or whole > KEPT * memory:
        return None
    for layer in layers_of(model):
        layer.set_reshard_after_forward(False)
    return int(whole)


def prefetch(model: nn.Module) -> None:
    """Issue the all-gather of each layer of `model` while the layer `AHEAD` of it is at work, in the forward and in the backward.

    By itself FSDP2 issues it when the host comes to the layer, which is early enough only where the host is ahead of the device.
    With LoRA's many small operations it is not, and every layer then waited for its weights: 3 ms each of a 7B model on two H200.
    Costs the memory of as many whole layers.
    """
    layers = layers_of(model)
    for number, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[number + 1 : number + 1 + AHEAD])
        layer.set_modules_to_backward_prefetch(layers[max(number - AHEAD, 0) : number][::-1])


def keep_outputs(state: Any) -> None:
    """Have FSDP2 leave the model's outputs as they are, by the plugin in accelerate's `state`. Before the model is prepared.

    accelerate asks for them in the type of the mixed precision, and in bf16 the log-probability of every token, and with it the loss, is
    rounded to 8 bits: a loss of 7.93 became 7.9375, and the scale of its gradient is rounded as well.
    """
    plugin = getattr(state, "fsdp_plugin", None)  # without one nothing is sharded, which is found when it is prepared
    if plugin is not None and hasattr(plugin.mixed_precision_policy, "output_dtype"):  # FSDP1's has none
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def make_real_on_cpu() -> None:
    """Let accelerate shard on CPU, where it would run DDP though FSDP is asked for (seen in 1.15).

    Its state knows the FSDP plugin for CUDA devices alone; on CPU the type stays MULTI_CPU and nothing is sharded.

    Raises:
        LaunchError: accelerate's state has changed and this correction does not fit any more.
    """
    import inspect

    from accelerate import __version__, state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__
    if getattr(original, "corrected", False):
        return
    if "fsdp_plugin" not in inspect.signature(original).parameters or not hasattr(DistributedType, "MULTI_CPU"):
        raise LaunchError(f"FSDP2 on CPU is not possible with accelerate {__version__}; use 1.15, or strategy=ddp")

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            precision = upstream_api.mixed_precision(self)
            if precision != "no":
                plugin.set_mixed_precision(precision)
            self.fsdp_plugin = plugin
            upstream_api.set_distributed_type(self, DistributedType.FSDP)

    init.corrected = True  # type: ignore[attr-defined]
    state.AcceleratorState.__init__ = init
