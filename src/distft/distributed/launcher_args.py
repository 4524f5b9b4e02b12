"""What the program that started this process was told, and whether that goes with the recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import yaml

from distft.distributed.supervisor import NPROC
from distft.distributed.world import World
from distft.errors import LaunchError

_TYPES = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "FSDP": "fsdp"}


@dataclass(frozen=True)
class Launcher:
    """What the program that started this process was told: its `--config_file` and `--num_processes`."""

    config_file: Path | None = None
    processes: int | None = None

    @classmethod
    def of_parent(cls) -> Launcher:
        """Read from the parent's command line; empty where the parent is no launcher."""
        try:
            words = psutil.Process(os.getppid()).cmdline()
        except psutil.Error:
            return cls()
        if not any(
            Path(word).name in ("accelerate", "accelerate-launch", "torchrun") or "accelerate.commands" in word
            for word in words[:4]
        ):
            return cls()
        options: dict[str, str] = {}
        for word, following in pairwise([*words, ""]):
            name, equals, value = word.partition("=")
            options.setdefault(name.lstrip("-").replace("-", "_"), value if equals else following)
        processes = options.get("num_processes", "")
        file = options.get("config_file")
        return cls(Path(file) if file else None, int(processes) if processes.isdigit() else None)

    def check_size(self, world: World, environment: Mapping[str, str], recipe: str) -> None:
        """As many processes are here as were asked for.

        Raises:
            LaunchError: there are others.
        """
        asked = int(environment.get(NPROC, "0")) or self.processes
        if asked and asked != world.world_size:
            raise LaunchError(
                f"{asked} processes were asked for, but this run has {world.world_size}: accelerate starts one process where it is "
                "told --cpu or finds no GPU\n  start them by: "
                f"distft train recipe={recipe} --nproc {asked}\n  or: accelerate launch --multi_gpu --num_processes {asked} "
                f"-m distft.train recipe={recipe}"
            )

    def check_agrees(
        self, world: World, environment: Mapping[str, str], recipe: str, strategy: str, precision: str, command: str
    ) -> None:
        """The recipe is the one source of truth: `recipe` says `strategy` and `precision`, and `command` runs it.

        Raises:
            LaunchError: the launcher was told something else.
        """
        told: str | None = None
        said = "the launcher"
        if environment.get("ACCELERATE_USE_FSDP") == "true":
            told = "fsdp" if environment.get("FSDP_VERSION") == "2" else "FSDP version 1"
        elif environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
            told = f"zero{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '?')}"
        if self.config_file is not None:
            said = f"--config_file {self.config_file}"
            if told is None:
                try:
                    content = yaml.safe_load(self.config_file.read_text(encoding="utf-8")) or {}
                except (OSError, yaml.YAMLError):
                    content = {}
                told = _TYPES.get(str(content.get("distributed_type", "NO")))
        if told is not None and told != strategy and not (world.world_size == 1 and told == "single"):
            raise LaunchError(
                f"{said} says {told}, the recipe {recipe} says {strategy}; the recipe decides, so leave the config "
                f"file out:\n  {command}\nor change the recipe: {command} strategy=…"
            )
        theirs = environment.get("ACCELERATE_MIXED_PRECISION", "no")
        if theirs not in ("no", precision):
            raise LaunchError(
                f"{said} says mixed precision {theirs}, the recipe {recipe} says {precision}; the recipe decides:\n  "
                f"{command} training.{theirs}=true\nor leave --mixed_precision out"
            )
