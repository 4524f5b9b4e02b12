"""DeepSpeed: ZeRO-2 shards gradients and optimizer states, ZeRO-3 the weights as well."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Self

from distft.config.recipe import Recipe
from distft.config.schema import StrategyName
from distft.distributed.strategies.base import Strategy, as_variable, fault
from distft.distributed.tensors import is_partitioned
from distft.distributed.world import World
from distft.errors import Fault, LaunchError

if TYPE_CHECKING:
    import torch
    from torch import nn

_VARIABLES = {
    "deepspeed_config_file": "CONFIG_FILE",
    "zero3_init_flag": "ZERO3_INIT",
    "zero3_save_16bit_model": "ZERO3_SAVE_16BIT_MODEL",
}
"""Keys of a config file whose variable has another name."""


class DeepSpeed(Strategy):
    """What ZeRO-2 and ZeRO-3 have in common."""

    updates_copies = True
    casts_weights = True
    skips_empty_rounds = False  # DeepSpeed counts the rounds itself
    meets_after_failed_write = False  # its ranks wait for each other between writes

    @classmethod
    def create(cls, world: World, on_gpu: bool, requested: StrategyName, environment: Mapping[str, str]) -> Self:
        if not on_gpu and not (shutil.which("c++") or shutil.which("g++")):
            raise LaunchError(
                "DeepSpeed compiles an extension on first use and found no C++ compiler; install g++ (build-essential)"
            )
        return super().create(world, on_gpu, requested, environment)

    @classmethod
    def faults(cls, recipe: Recipe) -> list[Fault]:
        found = super().faults(recipe)
        if not importlib.util.find_spec("deepspeed"):
            found.append(fault(recipe, "strategy", "needs deepspeed: pip install 'distft[deepspeed]'", "fsdp"))
        if recipe.run.on_bad_numbers == "skip":
            problem = "DeepSpeed updates the weights inside the backward pass, so a step cannot be skipped"
            found.append(fault(recipe, "run.on_bad_numbers", problem, "stop"))
        return found

    @classmethod
    def accelerate_environment(cls, config: Mapping[str, Any]) -> dict[str, str]:
        variables = {
            f"ACCELERATE_DEEPSPEED_{_VARIABLES.get(key, key.upper())}": as_variable(value)
            for key, value in config["deepspeed_config"].items()
        }
        return {"ACCELERATE_USE_DEEPSPEED": "true", **variables}

    def accumulate(self, environment: MutableMapping[str, str], steps: int) -> None:
        # It is part of DeepSpeed's configuration, where accelerate would put 1 before the trainer sets it.
        environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(steps)

    @property
    def checkpoint_format(self) -> str:
        return f"{self.name} on {self.world.world_size} processes"  # it needs as many ranks as there are shards

    def cast_dtypes(self, recipe: Recipe) -> frozenset[torch.dtype]:
        """The dtype of mixed precision, which DeepSpeed casts the whole model to."""
        import torch

        types = {"no": (), "bf16": (torch.bfloat16,), "fp16": (torch.float16,)}
        return frozenset(types[recipe.mixed_precision])

    def offloads_parameters(self, environment: Mapping[str, str]) -> bool:
        return environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none"


class ZeRO2(DeepSpeed):
    name = "zero2"
    title = "ZeRO-2"
    shards = frozenset({"optimizer"})


class ZeRO3(DeepSpeed):
    name = "zero3"
    title = "ZeRO-3"
    shards = frozenset({"weights", "optimizer"})
    buffer_bytes = 11 * 2**30  # 7B model on two H200, benchmarks/results/main_job_2xh200.json
    gathers_in_submodules = True

    @classmethod
    def faults(cls, recipe: Recipe) -> list[Fault]:
        found, dtype = super().faults(recipe), recipe.model.dtype
        if recipe.prefers:
            problem = "ZeRO-3 fetches weights in the order of the last pass, and dpo has a second one for the reference"
            found.append(fault(recipe, "objective", problem, "strategy=fsdp"))
        if recipe.bits == 16 and dtype != "float32" and recipe.mixed_precision == "no":
            problem = f"without mixed precision ZeRO-3 holds weights in float32, and model.dtype is {dtype}"
            hint = f"training.{'fp16' if dtype == 'float16' else 'bf16'}=true, or model.dtype=float32"
            found.append(fault(recipe, "training.bf16", problem, hint))
        return found

    def device_map(self, recipe: Recipe) -> dict[str, int] | None:
        return None  # weights are partitioned while they are loaded

    @contextmanager
    def whole_modules(self, model: nn.Module) -> Iterator[None]:
        import deepspeed

        gathered: list[Any] = []

        def gather(module: nn.Module, _: Any) -> None:
            mine = [parameter for parameter in module.parameters(recurse=False) if is_partitioned(parameter)]
            gathered.append(deepspeed.zero.GatheredParameters(mine) if mine else nullcontext())
            gathered[-1].__enter__()

        def release(*_: Any) -> None:
            gathered.pop().__exit__(None, None, None)

        hooks = [module.register_forward_pre_hook(gather) for module in model.modules()]
        hooks += [module.register_forward_hook(release, always_call=True) for module in model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def checkpoints_by_layer(self, recipe: Recipe) -> bool:
        return False  # ZeRO-3 needs the reentrant kind, which the trainer applies

    def keeps_adapter_in_base_dtype(self, recipe: Recipe) -> bool:
        return recipe.bits == 16  # ZeRO-3 gathers parameters of one dtype only
