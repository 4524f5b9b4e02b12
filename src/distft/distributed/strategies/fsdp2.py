"""FSDP2: weights, gradients and optimizer states sharded layer by layer.

accelerate sets it up. distft corrects four things: it shards on CPU too, outputs keep their dtype, packed weights keep
their bits, and all-gathers are issued early.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.config.schema import StrategyName
from distft.distributed.collectives import reduce
from distft.distributed.strategies.base import Strategy, as_variable, fault
from distft.distributed.tensors import is_packed, is_sharded
from distft.distributed.world import World
from distft.errors import Fault, LaunchError

if TYPE_CHECKING:
    from torch import nn

PREFETCHED_LAYERS = 2
"""Number of layers that are gathered ahead of the one that is running."""
KEPT_FRACTION = 1 / 8
"""Largest fraction of a device's memory that layers may take by staying gathered from forward to backward."""

_UNSHARDABLE_OPTIMIZERS = ("paged_", "adamw_bnb", "lion_8bit", "lion_32bit", "adamw_8bit", "rmsprop_bnb", "ademamix")
"""bitsandbytes' optimizers, by the beginning of their names: they cannot update a DTensor."""
_VARIABLES = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
"""Keys of a config file whose variable has another name."""


@dataclass(frozen=True)
class FSDP2(Strategy):
    may_keep_layers: bool = True
    """Whether distft may decide when a layer is resharded, because the user has not."""

    name = "fsdp"
    title = "FSDP2"
    shards = frozenset({"weights", "optimizer"})
    ties_weights_again = True  # accelerate's fsdp2_prepare_model
    updates_copies = True
    casts_weights = True

    @classmethod
    def create(cls, world: World, on_gpu: bool, requested: StrategyName, environment: Mapping[str, str]) -> Self:
        return cls(world, on_gpu, requested, "FSDP_RESHARD_AFTER_FORWARD" not in environment)

    @classmethod
    def faults(cls, recipe: Recipe) -> list[Fault]:
        found, optimizer = super().faults(recipe), str(recipe.training.get("optim", ""))
        if optimizer.startswith(_UNSHARDABLE_OPTIMIZERS):
            problem = f"{optimizer} cannot update parameters that FSDP2 has sharded"
            found.append(fault(recipe, "training.optim", problem, "adamw_torch_fused"))
        return found

    @property
    def notes(self) -> list[str]:
        if self.on_gpu:
            return []
        return [
            "FSDP2 on CPU: accelerate would silently run DDP; distft corrects its state so that parameters are sharded"
        ]

    def configure(self, environment: MutableMapping[str, str]) -> None:
        super().configure(environment)
        if not self.on_gpu:
            shard_on_cpu()

    @classmethod
    def accelerate_environment(cls, config: Mapping[str, Any]) -> dict[str, str]:
        variables = {
            _VARIABLES.get(key, key.upper()): as_variable(value) for key, value in config["fsdp_config"].items()
        }
        return {"ACCELERATE_USE_FSDP": "true", **variables}

    def device_map(self, recipe: Recipe) -> dict[str, int] | None:
        return None if recipe.bits == 16 else super().device_map(recipe)

    def loads_on_main(self, recipe: Recipe) -> bool:
        return recipe.bits == 16 and self.world.world_size > 1  # fsdp_cpu_ram_efficient_loading

    def before_preparing(self, accelerator: Any, model: nn.Module) -> None:
        self.preserve_output_dtype(accelerator)
        self.choose_layers(accelerator, model)
        if any(map(is_packed, model.parameters())):
            upstream_api.gather_bytes()

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        module.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            module.reshard()  # type: ignore[operator]

    def preserve_output_dtype(self, accelerator: Any) -> None:
        """Leave the model's outputs in their own dtype.

        accelerate asks for the dtype of mixed precision. In bf16 that rounds the log-probability of every token, and
        with it the loss, to 8 bits: a loss of 7.93 became 7.9375, and so did the scale of its gradient.
        """
        # Without a plugin nothing is sharded, which the invariants report.
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and hasattr(plugin.mixed_precision_policy, "output_dtype"):  # FSDP1's policy has none
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    def choose_layers(self, accelerator: Any, model: nn.Module) -> None:
        """Shard the layers that transformers would not split, as accelerate does; but models with a vision tower name
        some that they lack, which accelerate refuses."""
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            there = {type(module).__name__ for module in model.modules()}
            named = upstream_api.layers_not_to_split(model)
            if named - there:
                plugin.transformer_cls_names_to_wrap = sorted(named & there)

    def prefetch(self, model: nn.Module, memory_limit_gib: float | None) -> str | None:
        import torch

        prefetch(model)
        if not self.on_gpu or not self.may_keep_layers:
            return None
        memory = min(torch.cuda.mem_get_info()[1], (memory_limit_gib or math.inf) * 2**30)
        (negative,) = reduce([-memory], "max", self.world)  # all ranks must decide the same
        kept = keep_layers(model, -negative)
        if kept is None:
            return None
        return (
            f"FSDP2: layers stay gathered from the forward to the backward pass, {kept / 2**30:.1f} GiB per GPU "
            "(a --config_file with fsdp_reshard_after_forward: true gathers them twice)"
        )

    @contextmanager
    def generating(self, model: nn.Module) -> Iterator[None]:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "generate")  # under PEFT, it does not call the outermost module
        try:
            yield
        finally:
            vars(model).pop("generate", None)

    @property
    def checkpoint_format(self) -> str:
        return "sharded by fsdp"

    def parameter_fault(self, name: str, parameter: nn.Parameter) -> str | None:
        if is_sharded(parameter):
            return None
        return f"FSDP was requested, but parameter {name} is not sharded (a {type(parameter).__name__}, not a DTensor)"

    def offloads_parameters(self, environment: Mapping[str, str]) -> bool:
        return environment.get("FSDP_OFFLOAD_PARAMS") == "true"


def layers_of(model: nn.Module) -> list[Any]:
    """Return the layers of a prepared model, each of which is sharded separately, in their order."""
    from torch import nn
    from torch.distributed.fsdp import FSDPModule

    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and all(isinstance(x, FSDPModule) for x in m))
    return list(max(stacks, key=len, default=()))


def keep_layers(model: nn.Module, memory: float) -> int | None:
    """Keep the layers gathered from forward to backward, so that they are gathered once per step instead of twice.

    Does nothing if all layers together take more than `KEPT_FRACTION` of `memory` bytes. Returns the bytes they take,
    or None if they are not kept.
    """
    parameters = [parameter for layer in layers_of(model) for parameter in layer.parameters()]
    whole = sum(parameter.to_local().nbytes * parameter.device_mesh.size() for parameter in parameters)
    if not parameters or whole > KEPT_FRACTION * memory:
        return None
    for layer in layers_of(model):
        layer.set_reshard_after_forward(False)
    return int(whole)


def prefetch(model: nn.Module) -> None:
    """Issue the all-gather of each layer while the layer `PREFETCHED_LAYERS` before it runs, forward and backward.

    By default FSDP2 issues it when the host reaches the layer, which is early enough only if the host is ahead of the
    device. With LoRA's many small operations it is not, and every layer waited for its weights: 3 ms per layer of a 7B
    model on two H200. Prefetching costs the memory of that many gathered layers.
    """
    layers = layers_of(model)
    for number, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[number + 1 : number + 1 + PREFETCHED_LAYERS])
        layer.set_modules_to_backward_prefetch(layers[max(number - PREFETCHED_LAYERS, 0) : number][::-1])


def shard_on_cpu() -> None:
    """Make accelerate shard on CPU, where it runs DDP although FSDP is requested (seen in 1.15).

    Its state honours the FSDP plugin on accelerators only; on CPU the type stays MULTI_CPU and nothing is sharded.

    Raises:
        LaunchError: accelerate's state has changed and this correction no longer fits.
    """
    import inspect

    from accelerate import __version__, state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__
    if getattr(original, "corrected", False):
        return
    if "fsdp_plugin" not in inspect.signature(original).parameters or not hasattr(DistributedType, "MULTI_CPU"):
        raise LaunchError(f"FSDP2 on CPU is not possible with accelerate {__version__}; use 1.15, or strategy=ddp")

    @functools.wraps(original)  # keeps the signature
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
