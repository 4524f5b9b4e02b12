"""Choosing the strategy of this process, and checking that processes and devices fit the recipe."""

from __future__ import annotations

from collections.abc import Mapping

from distft.config.recipe import Recipe
from distft.config.schema import StrategyName
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies.base import Strategy
from distft.distributed.strategies.ddp import DDP
from distft.distributed.strategies.deepspeed import ZeRO2, ZeRO3
from distft.distributed.strategies.fsdp2 import FSDP2
from distft.distributed.strategies.single import Single
from distft.distributed.world import World
from distft.errors import Fault, LaunchError
from distft.hardware import visible_devices
from distft.text import count

STRATEGIES: Mapping[StrategyName, type[Strategy]] = {kind.name: kind for kind in (Single, DDP, FSDP2, ZeRO2, ZeRO3)}


def strategy_faults(recipe: Recipe) -> list[Fault]:
    """Settings in `recipe` that fail under its strategy, or that leave nothing sharded."""
    return STRATEGIES[recipe.strategy].faults(recipe)


def strategy_for(recipe: Recipe, world: World, on_gpu: bool) -> Strategy:
    """The strategy that the processes of `world` would use for `recipe`, without checking that it can run here."""
    return _kind(recipe, world)(world, on_gpu, recipe.strategy)


def choose(recipe: Recipe, world: World, environment: Mapping[str, str], launcher: Launcher) -> Strategy:
    """Choose the strategy for this process.

    Raises:
        LaunchError: the launcher, the processes or the devices do not fit the recipe. The message has a command that
            works.
    """
    devices, name = visible_devices(), recipe.source.name
    command = f"accelerate launch -m distft.train recipe={name}"
    precision = next((kind for kind in ("bf16", "fp16") if recipe.training.get(kind)), "no")
    launcher.check_size(world, environment, name)
    launcher.check_agrees(world, environment, name, recipe.strategy, precision, command)
    if world.world_size == 1 and devices > 1 and recipe.strategy != Single.name:
        raise LaunchError(
            f"one process sees {devices} GPUs but would use only one of them; use them all:\n  {command}\n"
            f"or use one on purpose:\n  python -m distft.train recipe={name} strategy=single"
        )
    if devices and world.local_world_size > devices:
        raise LaunchError(
            f"{world.local_world_size} processes on this machine, which has {count(devices, 'visible GPU')}; "
            f"start at most {devices} (--num_processes {devices})"
        )
    if recipe.strategy == Single.name and world.world_size > 1:
        raise LaunchError(
            f"the recipe has strategy single, but {world.world_size} processes were started; start one:\n"
            f"  python -m distft.train recipe={name}\nor distribute the work: strategy=ddp"
        )
    return _kind(recipe, world).create(world, devices > 0, recipe.strategy, environment)


def _kind(recipe: Recipe, world: World) -> type[Strategy]:
    """A single process has nothing to distribute, whatever the recipe says."""
    return Single if world.world_size == 1 else STRATEGIES[recipe.strategy]
