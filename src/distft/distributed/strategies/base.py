"""The interface of a strategy, with the behaviour of one that keeps a whole copy of the model on every process.

How a strategy shards is in `accelerate_configs/<name>.yaml`. `Strategy.configure` brings the process into the state
that `accelerate launch --config_file` would have brought it into, so that the flag is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from distft import upstream_api
from distft.config.files import read_yaml
from distft.config.recipe import Recipe
from distft.config.schema import StrategyName
from distft.distributed.collectives import gather
from distft.distributed.tensors import local_part, whole_tensors
from distft.distributed.world import World
from distft.errors import Fault
from distft.paths import packaged

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Strategy:
    """How a run spreads its work over processes. A subclass overrides whatever it does differently.

    `requested` is the strategy that the recipe names. It differs from `name` if a single process runs a recipe that
    was written for several.
    """

    world: World
    on_gpu: bool
    requested: StrategyName

    name: ClassVar[StrategyName]
    title: ClassVar[str]
    """The name in messages."""
    shards: ClassVar[frozenset[str]] = frozenset()
    """What is split among the processes: `weights`, `optimizer` (gradients and states)."""
    buffer_bytes: ClassVar[int] = 0
    """What the sharding library allocates on each device for its own buffers."""
    updates_copies: ClassVar[bool] = False
    """Whether, under mixed precision, the sharding library makes float32 copies of trained weights of 16 bits, and
    updates these."""
    casts_weights: ClassVar[bool] = False
    """Whether, under mixed precision, all numbers among the weights are cast to its dtype."""
    skips_empty_rounds: ClassVar[bool] = True
    """Whether a round of gradient accumulation without a sample may be skipped."""
    gathers_in_submodules: ClassVar[bool] = False
    """Whether a parameter is gathered by a hook of the module that owns it, so that each module must be called."""
    ties_weights_again: ClassVar[bool] = False
    """Whether preparing the model ties the output head to the embedding once more, by names that adapters change."""
    meets_after_failed_write: ClassVar[bool] = True
    """Whether a rank that failed to write its part of a checkpoint can still reach the others' next collective."""

    @classmethod
    def create(cls, world: World, on_gpu: bool, requested: StrategyName, environment: Mapping[str, str]) -> Self:
        """Create the strategy for this process.

        Raises:
            LaunchError: this machine lacks something that the strategy needs.
        """
        return cls(world, on_gpu, requested)

    # Recipe -----------------------------------------------------------------------------------------------------------

    @classmethod
    def faults(cls, recipe: Recipe) -> list[Fault]:
        """Settings in `recipe` that fail under this strategy, or that leave nothing sharded."""
        found = cls._quantization_faults(recipe) if "weights" in cls.shards else []
        return found or cls._cast_faults(recipe)

    @classmethod
    def _quantization_faults(cls, recipe: Recipe) -> list[Fault]:
        found: list[Fault] = []
        quantization, dtype = recipe.quantization, recipe.model.dtype
        if quantization and quantization.load_in_4bit and quantization.dequantize_at_load:
            problem = f"{cls.title} would unpack the whole model on every device before sharding it"
            hint = "strategy=ddp, or leave the weights in 4 bits"
            found.append(fault(recipe, "quantization.dequantize_at_load", problem, hint))
        if recipe.bits == 8:
            problem = f"8-bit weights cannot be sharded by {cls.title}"
            found.append(fault(recipe, "quantization.load_in_8bit", problem, "strategy=ddp, or 4-bit"))
        if recipe.bits == 4 and quantization and (storage := quantization.bnb_4bit_quant_storage) != dtype:
            problem = f"4-bit weights stored as {storage} in a {dtype} model are not sharded by {cls.title}"
            found.append(fault(recipe, "quantization.bnb_4bit_quant_storage", problem, f"set it to {dtype}"))
        return found

    @classmethod
    def _cast_faults(cls, recipe: Recipe) -> list[Fault]:
        """4-bit weights that are stored as numbers of another dtype than they are cast to, which changes their bits."""
        dtype = {"bf16": "bfloat16", "fp16": "float16", "no": None}[recipe.mixed_precision]
        storage = recipe.quantization.bnb_4bit_quant_storage if recipe.quantization and recipe.bits == 4 else "uint8"
        if not cls.casts_weights or dtype is None or storage in ("uint8", dtype):
            return []
        problem = (
            f"with training.{recipe.mixed_precision}=true, {cls.title} casts weights to {dtype}, which changes the "
            f"bits of 4-bit weights that are stored as {storage}"
        )
        hint = f"set it and model.dtype to {dtype}" if "weights" in cls.shards else "set it to uint8"
        return [fault(recipe, "quantization.bnb_4bit_quant_storage", problem, hint)]

    # Set-up -----------------------------------------------------------------------------------------------------------

    @property
    def notes(self) -> list[str]:
        """What differs from what the recipe asks for, one sentence each."""
        return []

    def configure(self, environment: MutableMapping[str, str]) -> None:
        """Configure accelerate for this strategy. Call it before creating TrainingArguments or an Accelerator."""
        self.world.export(environment)
        config = read_yaml(packaged(f"accelerate_configs/{self.name}.yaml"))
        for key, value in self.accelerate_environment(config).items():
            environment.setdefault(key, value)  # the user's own --config_file for this strategy takes precedence
        if self.on_gpu:  # packs differ in length, and fixed segments would fragment
            upstream_api.set_allocator_settings("expandable_segments:True")
        else:  # accelerate imports DeepSpeed if it is installed, which warns if it has to guess the device
            environment.setdefault("DS_ACCELERATOR", "cpu")

    @classmethod
    def accelerate_environment(cls, config: Mapping[str, Any]) -> dict[str, str]:
        """The variables that accelerate's launcher sets for this strategy's config file."""
        return {}

    def accumulate(self, environment: MutableMapping[str, str], steps: int) -> None:
        """Tell accelerate the number of accumulation steps, before creating TrainingArguments or an Accelerator."""

    def training_arguments(self) -> dict[str, Any]:
        """What this strategy adds to SFTConfig."""
        return {"use_cpu": not self.on_gpu}

    def device_map(self, recipe: Recipe) -> dict[str, int] | None:
        """The `device_map` for `from_pretrained`; never "auto"."""
        return {"": self.world.local_rank} if self.on_gpu else None

    def loads_on_main(self, recipe: Recipe) -> bool:
        """Whether only rank 0 has the weights until the model is prepared."""
        return False

    def whole_modules(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let a model that has been loaded, and not prepared yet, be computed: without gradients, if it gathers in
        submodules. All ranks must enter, and compute the same."""
        return nullcontext()

    def checkpoints_by_layer(self, recipe: Recipe) -> bool:
        """Whether distft applies activation checkpointing layer by layer.

        The trainer applies it instead if the recipe sets its gradient_checkpointing_kwargs.
        """
        training = recipe.training
        return bool(training.get("gradient_checkpointing")) and "gradient_checkpointing_kwargs" not in training

    def keeps_adapter_in_base_dtype(self, recipe: Recipe) -> bool:
        """Whether the adapter must have the dtype of the base model."""
        return False

    def before_preparing(self, accelerator: Any, model: nn.Module) -> None:
        """Correct how accelerate will prepare `model`."""

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """Gather the weights of a layer of a prepared model, as its forward pass does. All ranks must enter."""
        return nullcontext()

    def prefetch(self, model: nn.Module, memory_limit_gib: float | None) -> str | None:
        """Gather the layers of a prepared model ahead of time. All ranks must call it.

        Layers stay gathered until the backward pass if memory allows; returns a note for the user in that case.
        """
        return None

    def generating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let a prepared model `generate`. All ranks must enter, and give it the same prompts."""
        return nullcontext()

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @property
    def checkpoint_format(self) -> str:
        """The format of this strategy's checkpoints. A run resumes only from checkpoints of its own format."""
        return "whole"

    def checkpoint_bytes(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Estimate how many bytes a checkpoint's weights and optimizer states take on disk. All ranks must call it."""
        import torch

        tensors = [p for p in model.parameters() if p.requires_grad]
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        local = sum(local_part(tensor).nbytes for tensor in (*tensors, *states))
        return sum(gather(local, self.world)) if self.shards else local

    def gather(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return every trainable tensor, unsharded and on the CPU, on rank 0. All ranks must call it.

        Other ranks get an empty dict.
        """
        return {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in whole_tensors(model) if self.world.is_main
        }

    # Invariants -------------------------------------------------------------------------------------------------------

    def parameter_fault(self, name: str, parameter: nn.Parameter) -> str | None:
        """What is wrong with a parameter of a prepared model under this strategy; None if nothing is."""
        return None

    def cast_dtypes(self, recipe: Recipe) -> frozenset[torch.dtype]:
        """Dtypes, besides the model's own, that this strategy may cast frozen weights to."""
        return frozenset()

    def offloads_parameters(self, environment: Mapping[str, str]) -> bool:
        """Whether parameters are kept on the CPU on purpose."""
        return False


def fault(recipe: Recipe, key: str, problem: str, hint: str) -> Fault:
    """A fault at `key` of `recipe`, with the file or command line that the value comes from."""
    return Fault(recipe.source.of(key), key, problem, hint)


def as_variable(value: Any) -> str:
    """A value of a config file as accelerate's launcher writes it into an environment variable."""
    return str(value).lower() if isinstance(value, bool) else str(value)
