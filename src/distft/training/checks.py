"""What is wrong with a recipe's training settings, found before any weight is loaded.

The configurations, the optimizer and the schedule are built as the trainer will build them, and what their libraries
raise becomes a fault: transformers would raise most of it only after the weights are loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, patch_environment
from transformers import Trainer
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from distft.config.recipe import Recipe
from distft.config.validation import nearest
from distft.distributed.strategies import Strategy
from distft.distributed.strategies.selection import strategy_for
from distft.distributed.world import World
from distft.errors import Fault
from distft.hardware import visible_devices
from distft.models.loading import quantization_config
from distft.text import first_line
from distft.training.arguments import build_arguments
from distft.training.samples import samples_faults
from distft.training.schedule import schedule_faults
from distft.training.selection import selection_faults

_IN_BACKWARD = ("lomo", "adalomo")
"""Optimizers that update the weights during the backward pass, besides those whose names end in `_layerwise`."""
_NEEDS_MODEL = ("galore", "apollo")
"""Optimizers that choose among the model's modules, by the beginning of their names."""
_LOSSES = ("nll", "dft", "chunked_nll")


class _Unplaced(SFTConfig):  # type: ignore[misc]
    """SFTConfig that does not set up the device: that starts the process group, and must not happen in a check."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def training_faults(recipe: Recipe, world_size: int = 1, *, on_gpu: bool | None = None) -> list[Fault]:
    """Find what cannot work in `training` and `quantization`, and a schedule that trains nothing.

    `on_gpu` says whether the run will have GPUs (None: if this machine has). What depends on the kind of GPU is only
    checked if this machine has one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run repeats them
        return _training_faults(recipe, world_size, on_gpu)


def expected_strategy(recipe: Recipe, world_size: int, on_gpu: bool | None) -> Strategy:
    """The strategy that `world_size` processes will use (`on_gpu` None: on GPUs if this machine has any)."""
    return strategy_for(recipe, World(world_size=world_size), visible_devices() > 0 if on_gpu is None else on_gpu)


def _training_faults(recipe: Recipe, world_size: int, on_gpu: bool | None) -> list[Fault]:
    here, strategy = visible_devices() > 0, expected_strategy(recipe, world_size, on_gpu)
    found = [*_refused(recipe), *_strategy_faults(recipe, strategy), *_quantization_faults(recipe)]
    found += [*selection_faults(recipe, strategy), *samples_faults(recipe)]
    known = {fault.key for fault in found}
    changes: dict[str, Any] = {} if here or not strategy.on_gpu else {"use_cpu": True, "tf32": None}
    arguments, faults = _built(recipe, strategy, changes)
    found += [fault for fault in faults if fault.key not in known]
    if arguments is None:
        return found
    if "training.optim" not in known:
        found += _optimizer_faults(recipe, arguments, try_step=not strategy.on_gpu)
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    return found + schedule_faults(recipe, arguments, steps)


def _refused(recipe: Recipe) -> Iterator[Fault]:
    """Settings that the libraries accept and that do not do here what they say."""
    training = recipe.training

    def fault(key: str, problem: str, hint: str) -> Fault:
        return Fault(recipe.source.of(f"training.{key}"), f"training.{key}", problem, hint)

    optimizer, loss = training.get("optim") or "", training.get("loss_type") or "nll"
    if optimizer.startswith("schedule_free"):
        problem = f"{optimizer} evaluates and saves other weights than it trains, and distft does not switch them"
        yield fault("optim", problem, "adamw_torch")
    if optimizer in _IN_BACKWARD or optimizer.endswith("_layerwise"):
        problem = f"{optimizer} updates the weights during the backward pass, before distft has checked the gradients"
        yield fault("optim", problem, optimizer.removesuffix("_layerwise") if "_" in optimizer else "adamw_torch")
    if loss not in _LOSSES:
        yield fault("loss_type", f"expected {' or '.join(map(repr, _LOSSES[:2]))}, got {loss!r}", "")
    if loss == "dft" and training.get("label_smoothing_factor"):
        yield fault("label_smoothing_factor", "has no effect with training.loss_type=dft", "set it to 0")
    if training.get("save_strategy") == "best":
        problem = "'best' would leave a run that does not improve with nothing recent to resume from"
        hint = "use 'steps' or 'epoch': with training.load_best_model_at_end, every new best is saved as well"
        yield fault("save_strategy", problem, hint)
    if training.get("ignore_data_skip"):
        problem = "would train a resumed run on samples that it has seen, and leave out others"
        yield fault("ignore_data_skip", problem, "leave it out: distft skips what was trained without reading it")
    if training.get("enable_jit_checkpoint"):
        problem = "would end a run that was stopped by a signal as if it had finished"
        yield fault("enable_jit_checkpoint", problem, "leave it out: distft saves and stops on a signal by itself")
    if training.get("save_on_each_node"):
        problem = "would write each checkpoint once per node, all to the same run folder"
        yield fault("save_on_each_node", problem, "leave it out")
    if training.get("optim_target_modules") and not optimizer.startswith(_NEEDS_MODEL):
        yield fault("optim_target_modules", "has no effect with this optimizer", "it is for GaLore and APOLLO")
    if (backend := training.get("torch_compile_backend")) is not None and backend.upper() not in DynamoBackend.list():
        names = [name.lower() for name in DynamoBackend.list()]
        yield fault("torch_compile_backend", f"there is no {backend!r}", nearest(backend, names) or ", ".join(names))


def _strategy_faults(recipe: Recipe, strategy: Strategy) -> Iterator[Fault]:
    """Settings that do not work as the processes will train."""
    if recipe.training.get("activation_offloading") and not strategy.on_gpu:
        key = "training.activation_offloading"
        yield Fault(recipe.source.of(key), key, "moves activations from a GPU, and this run has none", "leave it out")
    if recipe.training.get("use_liger_kernel") and not (strategy.on_gpu and is_liger_kernel_available()):
        key = "training.use_liger_kernel"
        absent = "its kernels need a GPU, and this run has none"
        problem = "liger-kernel is not installed" if strategy.on_gpu else absent
        hint = "pip install liger-kernel, or leave it out" if strategy.on_gpu else "leave it out"
        yield Fault(recipe.source.of(key), key, problem, hint)
    if recipe.training.get("use_cpu") and strategy.on_gpu:
        key = "training.use_cpu"
        problem = "would put the batches on the CPU, and the model is on a GPU"
        yield Fault(recipe.source.of(key), key, problem, "leave it out, and set CUDA_VISIBLE_DEVICES='' for the CPU")
    if recipe.model.dtype == "float16" and recipe.updates_16_bits:
        problem = "float16 weights cannot be trained: small gradients and updates become 0, and losses NaN"
        hint = "model.dtype=float32 training.fp16=true computes in float16; or model.dtype=bfloat16"
        yield Fault(recipe.source.of("model.dtype"), "model.dtype", problem, hint)


def weights_notes(recipe: Recipe) -> list[str]:
    """What a user may not expect of the weights that are trained."""
    dtype, precision = recipe.model.dtype, recipe.mixed_precision
    if recipe.lora is not None:
        if recipe.lora.get("init_lora_weights") is not False:
            return []
        return [
            "lora.init_lora_weights=false: the adapter starts with random values, which change what the base computes, "
            "so the loss before training is not the base's"
        ]
    if dtype == "float32":
        return []
    if recipe.updates_16_bits:
        return [
            f"all parameters are updated in {dtype}, which rounds away changes below 1/256 of a weight; "
            "training.bf16=true keeps them, and takes more memory"
        ]
    return [
        f"all parameters train as float32 weights, with products in {precision} (mixed precision), and are saved in "
        f"{dtype}; training.{precision}=false would update them in {dtype}, with less memory"
    ]


def _quantization_faults(recipe: Recipe) -> Iterator[Fault]:
    try:
        quantization_config(recipe)
    except Exception as error:  # the library's own
        yield Fault(recipe.source.of("quantization"), "quantization", _sentence(error))


def _built(recipe: Recipe, strategy: Strategy, changes: dict[str, Any]) -> tuple[SFTConfig | None, list[Fault]]:
    """The trainer's arguments, and what they refuse. Keys at fault are left out, so that others can be checked."""
    found: list[Fault] = []
    while True:
        try:
            # DeepSpeed's plugin would be built with the arguments.
            with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
                return build_arguments(_Unplaced, recipe, strategy, Path("checkpoints"), 1, **changes), found
        except Exception as error:  # transformers raises ValueError, TypeError, ImportError, …
            problem, words = _sentence(error).removeprefix("--"), re.findall(r"\w+", str(error))
            if any(fault.problem == problem for fault in found):  # another key is behind it
                return None, found
            name = next((word for word in words if word in recipe.training), None)
            key = f"training.{name}" if name else "training"
            found.append(Fault(recipe.source.of(key), key, problem))
            if name is None:
                return None, found
            rest = {key: value for key, value in recipe.training.items() if key != name}
            recipe = recipe.model_copy(update={"training": rest})


def _optimizer_faults(recipe: Recipe, arguments: SFTConfig, *, try_step: bool) -> Iterator[Fault]:
    """Build the optimizer for a dummy parameter and, if `try_step`, take a step: where the run is on the CPU."""
    name = arguments.optim.value
    needs_model = name.startswith(_NEEDS_MODEL)
    dummy = torch.nn.Linear(64, 64, bias=False)  # 4,096 values: bitsandbytes does not quantise the state of fewer

    def build() -> None:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, None if needs_model else dummy)
        optimizer = kind(dummy.parameters(), **options)
        if try_step:
            dummy.weight.grad = torch.ones_like(dummy.weight)
            optimizer.step()

    try:
        build()
    except Exception as error:  # each optimizer raises its own
        if needs_model and "need to pass a model" in str(error):
            return
        key = "training.optim"
        if arguments.optim_args:
            given, arguments.optim_args = arguments.optim_args, None
            try:
                build()
                key = "training.optim_args"
            except Exception:  # noqa: S110 - the first one is reported
                pass
            arguments.optim_args = given
        yield Fault(recipe.source.of(key), key, f"{name}: {_sentence(error)}")


def _sentence(error: Exception) -> str:
    return first_line(error).rstrip(".")
