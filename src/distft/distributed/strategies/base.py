"""Everything in which single, DDP, FSDP2 and DeepSpeed differ. Nothing outside this module branches on them.

How a strategy shards stands in `accelerate_configs/<strategy>.yaml`. `Strategy.configure` puts the process into the
state that `accelerate launch --config_file` would have put it into, so that no such flag is needed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distft import upstream_api
from distft.config.files import read_yaml
from distft.config.recipe import Recipe
from distft.config.schema import StrategyName
from distft.distributed.collectives import reduce
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies.fsdp2 import keep_layers, keep_outputs, make_real_on_cpu, prefetch
from distft.distributed.tensors import checksum, is_sharded, local_part, whole_numel, whole_tensors
from distft.distributed.world import World
from distft.errors import Fault, InvariantError, LaunchError
from distft.paths import packaged
from distft.text import count

_BITSANDBYTES_OPTIMIZERS = ("paged_", "adamw_bnb", "lion_8bit", "lion_32bit", "adamw_8bit", "rmsprop_bnb", "ademamix")


def faults(recipe: Recipe) -> list[Fault]:
    """Pairs that the recipe's strategy refuses, because they fail or shard nothing."""
    found: list[Fault] = []

    def fault(key: str, problem: str, hint: str) -> None:
        found.append(Fault(recipe.source.of(key), key, problem, hint))

    quantization, optimizer = recipe.quantization, str(recipe.training.get("optim", ""))
    sharder = {"fsdp": "FSDP2", "zero3": "ZeRO-3"}.get(recipe.strategy)
    if sharder and quantization and quantization.load_in_4bit and quantization.dequantize_at_load:
        fault(
            "quantization.dequantize_at_load",
            f"{sharder} would unpack the whole model on every device before it shards it",
            "strategy=ddp, or leave the weights in 4 bits",
        )
    if sharder and recipe.bits == 8:
        fault("quantization.load_in_8bit", f"8-bit weights cannot be sharded by {sharder}", "strategy=ddp, or 4-bit")
    if sharder and recipe.bits == 4 and quantization and quantization.bnb_4bit_quant_storage != recipe.model.dtype:
        fault(
            "quantization.bnb_4bit_quant_storage",
            f"4-bit weights stored as {quantization.bnb_4bit_quant_storage} in a {recipe.model.dtype} model are not sharded by {sharder}",
            f"set it to {recipe.model.dtype}",
        )
    if recipe.strategy == "fsdp" and optimizer.startswith(_BITSANDBYTES_OPTIMIZERS):
        fault(
            "training.optim", f"{optimizer} has no way to update parameters that FSDP2 has sharded", "adamw_torch_fused"
        )
    dtype = recipe.model.dtype
    if recipe.strategy == "zero3" and recipe.bits == 16 and dtype != "float32" and recipe.mixed_precision == "no":
        fault(
            "training.bf16",
            f"without mixed precision ZeRO-3 holds weights in float32, and model.dtype is {dtype}",
            f"training.{'fp16' if dtype == 'float16' else 'bf16'}=true, or model.dtype=float32",
        )
    if recipe.strategy in ("zero2", "zero3") and recipe.run.on_bad_numbers == "skip":
        fault(
            "run.on_bad_numbers", "DeepSpeed updates inside the backward pass, so that no step can be left out", "stop"
        )
    return found


def visible_devices() -> int:
    """Number of CUDA devices that this process could use, found without touching CUDA."""
    return torch.cuda.device_count()


def accelerate_environment(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables that accelerate's launcher sets for a config file with these contents."""
    environment: dict[str, str] = {}
    if config["distributed_type"] == "FSDP":
        environment["ACCELERATE_USE_FSDP"] = "true"
        renamed = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
        for key, value in config["fsdp_config"].items():
            environment[renamed.get(key, key.upper())] = _text(value)
    if config["distributed_type"] == "DEEPSPEED":
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        renamed = {
            "deepspeed_config_file": "CONFIG_FILE",
            "zero3_init_flag": "ZERO3_INIT",
            "zero3_save_16bit_model": "ZERO3_SAVE_16BIT_MODEL",
        }
        for key, value in config["deepspeed_config"].items():
            environment[f"ACCELERATE_DEEPSPEED_{renamed.get(key, key.upper())}"] = _text(value)
    return environment


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Strategy:
    """How this run spreads its work. `requested` is the recipe's, `name` what is done (they differ in the fallback)."""

    name: StrategyName
    requested: StrategyName
    world: World
    on_gpu: bool
    may_keep_layers: bool = True
    """Whether nobody has said when FSDP2 is to shard a layer again."""

    @classmethod
    def choose(cls, recipe: Recipe, world: World, environment: Mapping[str, str], launcher: Launcher) -> Strategy:
        """The strategy to use in this process.

        Raises:
            LaunchError: the launcher, the processes and the devices do not fit the recipe; with the command that does.
        """
        devices = visible_devices()
        command = f"accelerate launch -m distft.train recipe={recipe.source.name}"
        precision = next((name for name in ("bf16", "fp16") if recipe.training.get(name)), "no")
        launcher.check_size(world, environment, recipe.source.name)
        launcher.check_agrees(world, environment, recipe.source.name, recipe.strategy, precision, command)
        if world.world_size == 1 and devices > 1 and recipe.strategy != "single":
            raise LaunchError(
                f"one process sees {devices} GPUs and would use one of them; use them all:\n  {command}\n"
                f"or one on purpose:\n  python -m distft.train recipe={recipe.source.name} strategy=single"
            )
        if devices and world.local_world_size > devices:
            raise LaunchError(f"{world.local_world_size} processes on this machine, but it has "
                              f"{count(devices, 'visible GPU')}; start at most {devices} (--num_processes {devices})")  # fmt: skip
        if recipe.strategy == "single" and world.world_size > 1:
            raise LaunchError(
                f"the recipe asks for strategy single, but {world.world_size} processes were started; start one:\n"
                f"  python -m distft.train recipe={recipe.source.name}\nor spread the work: strategy=ddp"
            )
        name: StrategyName = "single" if world.world_size == 1 else recipe.strategy
        if name in ("zero2", "zero3") and not devices and not (shutil.which("c++") or shutil.which("g++")):
            raise LaunchError(
                "DeepSpeed compiles a part of itself at first use and finds no C++ compiler; install g++ (build-essential)"
            )
        return cls(name, recipe.strategy, world, devices > 0, "FSDP_RESHARD_AFTER_FORWARD" not in environment)

    @property
    def notes(self) -> list[str]:
        """What differs from what the recipe asked for, in words."""
        if self.name != self.requested:
            place = "one GPU" if self.on_gpu else "the CPU"
            return [
                f"one process: falling back from {self.requested} to single on {place}; same global batch, same optimisation"
            ]
        if self.name == "fsdp" and not self.on_gpu:
            return [
                "FSDP2 on CPU: accelerate would run DDP here in silence; its state is corrected so that parameters are sharded"
            ]
        return []

    @property
    def checkpoint_format(self) -> str:
        """What kind of checkpoint this strategy writes; it resumes from those of the same kind."""
        if self.name in ("zero2", "zero3"):  # DeepSpeed reads the shards of as many ranks as it has
            return f"{self.name} on {self.world.world_size} processes"
        return "sharded by fsdp" if self.name == "fsdp" else "whole"

    def configure(self, environment: MutableMapping[str, str]) -> None:
        """Bring accelerate to this strategy. Before TrainingArguments or an Accelerator exists."""
        self.world.export(environment)
        if self.name == "single":
            for key in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
                environment.pop(key, None)
        for key, value in accelerate_environment(read_yaml(packaged(f"accelerate_configs/{self.name}.yaml"))).items():
            environment.setdefault(key, value)  # a --config_file of the user's own for this strategy goes first
        if self.name == "fsdp" and not self.on_gpu:
            make_real_on_cpu()
        if self.on_gpu:  # packs differ in length; fixed segments would fragment
            upstream_api.set_allocator_settings("expandable_segments:True")
        else:  # accelerate imports DeepSpeed wherever it is installed, and it warns where it has to guess
            environment.setdefault("DS_ACCELERATOR", "cpu")

    def accumulate(self, environment: MutableMapping[str, str], steps: int) -> None:
        """Tell accelerate the gradient accumulation. Before TrainingArguments or an Accelerator exists."""
        if self.name in ("zero2", "zero3"):
            # DeepSpeed's configuration repeats it, and accelerate would fill in 1 before the trainer comes.
            environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(steps)

    def training_arguments(self) -> dict[str, Any]:
        """What this strategy adds to SFTConfig."""
        arguments: dict[str, Any] = {"use_cpu": not self.on_gpu}
        if self.name == "ddp":
            arguments["ddp_find_unused_parameters"] = False
        return arguments

    def device_map(self, recipe: Recipe) -> dict[str, int] | None:
        """Where `from_pretrained` puts the weights; never "auto"."""
        if not self.on_gpu or self.name == "zero3" or (self.name == "fsdp" and recipe.bits == 16):
            return None
        return {"": self.world.local_rank if self.name != "single" else 0}

    @property
    def skips_spare_rounds(self) -> bool:
        """Whether a round of accumulation without any sample may be left out: DeepSpeed counts them itself."""
        return self.name not in ("zero2", "zero3")

    @property
    def gathers_in_submodules(self) -> bool:
        """ZeRO-3 gathers a parameter in the hook of the module that holds it, so each has to be called by itself."""
        return self.name == "zero3"

    def checkpoints_by_layer(self, recipe: Recipe) -> bool:
        """Whether activation checkpointing is ours (`recompute`) and not the trainer's: ZeRO-3 wants the reentrant kind, and
        gradient_checkpointing_kwargs are the trainer's own."""
        training = recipe.training
        asked = bool(training.get("gradient_checkpointing")) and "gradient_checkpointing_kwargs" not in training
        return asked and self.name != "zero3"

    def like(self, recipe: Recipe) -> Strategy:
        """What these processes would do with another recipe."""
        return replace(
            self, name="single" if self.world.world_size == 1 else recipe.strategy, requested=recipe.strategy
        )

    @property
    def shards(self) -> frozenset[str]:
        """What each process holds a part of only: weights, optimizer (gradients and states); empty where all hold all."""
        parts = {"zero2": ("optimizer",), "zero3": ("weights", "optimizer"), "fsdp": ("weights", "optimizer")}
        return frozenset(parts.get(self.name, ()))

    @property
    def buffer_bytes(self) -> int:
        """What the library that shards holds on each device for itself: DeepSpeed's ZeRO-3, as measured with a 7B model on
        two H200 (`benchmarks/results/main_job_2xh200.json`)."""
        return 11 * 2**30 if self.name == "zero3" else 0

    @property
    def meets_after_failed_write(self) -> bool:
        """Whether a rank that cannot write its part of a checkpoint finds the others when it has given up. Not DeepSpeed:
        its ranks wait for each other between writes."""
        return self.name not in ("zero2", "zero3")

    def checkpoint_bytes(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """About how many bytes the trainable weights and optimizer states of a checkpoint take on disk. All ranks enter."""
        tensors = [p for p in model.parameters() if p.requires_grad]
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        mine = sum(local_part(tensor).nbytes for tensor in (*tensors, *states))
        if not self.shards:
            return mine
        everywhere: list[int] = [0] * self.world.world_size
        dist.all_gather_object(everywhere, mine)
        return sum(everywhere)

    def keeps_adapter_in_base_dtype(self, recipe: Recipe) -> bool:
        """ZeRO-3 gathers parameters of one type only, so an adapter cannot be fp32 beside a bf16 base."""
        return self.name == "zero3" and recipe.bits == 16

    def check_prepared(self, model: nn.Module, recipe: Recipe, trainable: int) -> None:
        """Before step 1: the model is what the recipe asked for. All ranks enter.

        Raises:
            InvariantError: on every rank, with what was found on the first that failed.
        """
        self._all_agree(self._fault_of(model, recipe, trainable))

    def _fault_of(self, model: nn.Module, recipe: Recipe, trainable: int) -> str | None:
        found = 0
        for name, parameter in model.named_parameters():
            found += whole_numel(parameter) if parameter.requires_grad else 0
            partitioned = hasattr(parameter, "ds_id")
            if parameter.is_meta:
                return f"parameter {name} is on the meta device: its weights were never loaded"
            if self.name == "fsdp" and not is_sharded(parameter):
                return f"FSDP was asked for, but parameter {name} is not sharded (a {type(parameter).__name__}, no DTensor)"
            if self.on_gpu and parameter.device.type == "cpu" and not partitioned and not self._offloads():
                return f"parameter {name} is on the CPU, and this run trains on a GPU"
            if (
                not parameter.requires_grad
                and parameter.is_floating_point()
                and type(local_part(parameter)).__name__ != "Params4bit"
            ):
                allowed = {getattr(torch, recipe.model.dtype)} | _mixed_precision(recipe)
                if parameter.dtype not in allowed:
                    return f"parameter {name} is {parameter.dtype}; the recipe's model.dtype is {recipe.model.dtype}"
        if found != trainable:
            return f"{found:,} parameters are trainable; the adapter (or model) has {trainable:,}"
        return None

    def _offloads(self) -> bool:
        return (
            os.environ.get("FSDP_OFFLOAD_PARAMS") == "true"
            or os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none"
        )

    def keep_outputs(self, accelerator: Any) -> None:
        """Have the losses of mixed precision as exact as under DDP. Before the model is prepared."""
        if self.name == "fsdp":
            keep_outputs(accelerator.state)

    def gather_in_time(self, model: nn.Module, memory_limit_gib: float | None) -> str | None:
        """Have the layers of a prepared model whole before they are needed, and where there is memory only once a step; returns
        what to say of it. All ranks enter."""
        kept = None
        if self.name == "fsdp":
            prefetch(model)
            if self.on_gpu and self.may_keep_layers:
                memory = min(torch.cuda.mem_get_info()[1], (memory_limit_gib or math.inf) * 2**30)
                (less,) = reduce([-memory], "max", self.world)  # all must do the same
                kept = keep_layers(model, -less)
        return None if kept is None else (
            f"FSDP2: the layers stay whole from the forward to the backward, {kept / 2**30:.1f} GiB a GPU "
            "(a --config_file with fsdp_reshard_after_forward gathers them twice)"
        )  # fmt: skip

    def fingerprint(self, model: nn.Module) -> dict[str, int]:
        """A checksum of the bits of every trainable tensor, whole (gathered where sharded). All ranks enter."""
        return {name: checksum(tensor) for name, tensor in whole_tensors(model)}

    def check_updated(self, model: nn.Module, before: Mapping[str, int], learning_rate: float) -> None:
        """After the first update with a non-zero learning rate: the adapter has moved, alike on all ranks. All ranks enter.

        Raises:
            InvariantError: on every rank.
        """
        after = self.fingerprint(model)
        watched = [name for name in after if "lora_B" in name] or list(after)
        still = [name for name in watched if before[name] == after[name]]
        fault = None
        if len(still) == len(watched):
            fault = f"no trainable tensor moved in an update with learning rate {learning_rate:g}: no gradient reaches {watched[0]}"
        self._all_agree(fault)
        if self.world.world_size > 1:
            everywhere: list[dict[str, int] | None] = [None] * self.world.world_size
            dist.all_gather_object(everywhere, after)
            for rank, other in enumerate(everywhere):
                differing = [name for name in after if other is None or other[name] != after[name]]
                if differing:
                    fault = f"{differing[0]} differs between rank {self.world.rank} and rank {rank} after one update"
            self._all_agree(fault)

    def _all_agree(self, fault: str | None) -> None:
        """Raise on every rank where any has a fault, so that none waits for one that has left."""
        found: list[str | None] = [fault]
        if self.world.world_size > 1:
            found = [None] * self.world.world_size
            dist.all_gather_object(found, fault)
        for rank, text in enumerate(found):
            if text:
                raise InvariantError(
                    f"{text} (rank {rank}, strategy {self.name}); the run was stopped before it could waste time"
                )

    def gather(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Every trainable tensor, whole, on the CPU of rank 0; an empty dict elsewhere. All ranks enter."""
        return {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in whole_tensors(model) if self.world.is_main
        }


def _mixed_precision(recipe: Recipe) -> set[torch.dtype]:
    """Types that DeepSpeed casts a whole model to under the recipe's mixed precision."""
    if recipe.strategy not in ("zero2", "zero3"):
        return set()
    types = {"no": set[torch.dtype](), "bf16": {torch.bfloat16}, "fp16": {torch.float16}}
    return types[recipe.mixed_precision]
