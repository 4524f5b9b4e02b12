"""The options of the launcher that started this process, and whether they agree with the recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import yaml

from distft.distributed.leftovers import remove_settings
from distft.distributed.supervisor import NPROC, OUTCOME
from distft.distributed.world import World
from distft.errors import LaunchError

_DISTRIBUTED_TYPES = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "FSDP": "fsdp"}
"""accelerate's `distributed_type` in a config file, and the strategy that it means."""


@dataclass(frozen=True)
class Launcher:
    """The `--config_file` and `--num_processes` of the launcher that started this process; None if not given."""

    config_file: Path | None = None
    processes: int | None = None

    @classmethod
    def of_parent(cls) -> Launcher:
        """Read the parent's command line. Both options are None if the parent is not a launcher, or was started by
        `distft train`, which follows the recipe."""
        words = _parent_words()
        if OUTCOME in os.environ or not _is_launcher(words):
            return cls()
        options: dict[str, str] = {}
        for word, following in pairwise([*words, ""]):
            name, equals, value = word.partition("=")
            options.setdefault(name.lstrip("-").replace("-", "_"), value if equals else following)
        processes = options.get("num_processes", "")
        file = options.get("config_file")
        return cls(Path(file) if file else None, int(processes) if processes.isdigit() else None)

    def check_size(self, world: World, environment: Mapping[str, str], recipe: str) -> None:
        """Check that as many processes are running as the user asked for.

        Raises:
            LaunchError: there are more or fewer.
        """
        requested = int(environment.get(NPROC, "0")) or self.processes
        if requested and requested != world.world_size:
            raise LaunchError(
                f"{requested} processes were requested, but this run has {world.world_size}: accelerate starts only "
                "one with --cpu, or if it finds no GPU\n  start them with: "
                f"distft train recipe={recipe} --nproc {requested}\n  or: accelerate launch --multi_gpu "
                f"--num_processes {requested} -m distft.train recipe={recipe}"
            )

    def check_agrees(
        self, world: World, environment: Mapping[str, str], recipe: str, strategy: str, precision: str, command: str
    ) -> None:
        """Check that the launcher's options do not contradict the recipe, which is the only source of truth.

        `recipe` is the recipe's name, `strategy` and `precision` are what it sets, and `command` runs it.

        Raises:
            LaunchError: the launcher's options say something else.
        """
        launched = self._launched_strategy(environment)
        source = self._source()
        if launched is not None and launched != strategy and not (world.world_size == 1 and launched == "single"):
            raise LaunchError(
                f"{source} says {launched}, the recipe {recipe} says {strategy}; the recipe decides, so leave out the "
                f"config file:\n  {command}\nor change the recipe: {command} strategy=…\nor let distft start the "
                f"processes, whatever accelerate is configured to do: distft train recipe={recipe}"
            )
        mixed_precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
        if mixed_precision not in ("no", precision):
            raise LaunchError(
                f"{source} says mixed precision {mixed_precision}, the recipe {recipe} says {precision}; the recipe "
                f"decides:\n  {command} training.{mixed_precision}=true\nor leave out --mixed_precision"
            )
        dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if dynamo.lower() not in ("", "no"):
            raise LaunchError(
                f"{source} says dynamo backend {dynamo}, which would compile the model without the recipe {recipe} "
                "saying so; leave it out"
            )

    def _source(self) -> str:
        """Where the launcher's settings come from."""
        if self.config_file is not None:
            return f"--config_file {self.config_file}"
        from accelerate.commands.config.config_args import default_config_file

        return f"the launcher (or {default_config_file})" if Path(default_config_file).is_file() else "the launcher"

    def _launched_strategy(self, environment: Mapping[str, str]) -> str | None:
        """The strategy that the launcher's environment or config file asks for; None if neither says."""
        if environment.get("ACCELERATE_USE_FSDP") == "true":
            return "fsdp" if environment.get("FSDP_VERSION") == "2" else "FSDP version 1"
        if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
            return f"zero{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '?')}"
        if self.config_file is None:
            return None
        try:
            content = yaml.safe_load(self.config_file.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError):
            content = {}
        return _DISTRIBUTED_TYPES.get(str(content.get("distributed_type", "NO")))


def parent_is_launcher() -> bool:
    return _is_launcher(_parent_words())


def left_over_settings(environment: MutableMapping[str, str]) -> list[str]:
    """Remove accelerate's variables, and return those that were set, unless accelerate's launcher is our parent."""
    return [] if _is_accelerate(_parent_words()) else remove_settings(environment)


def _parent_words() -> list[str]:
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _is_launcher(words: Sequence[str]) -> bool:
    torchrun = any(Path(word).name == "torchrun" or word == "torch.distributed.run" for word in words[:4])
    return torchrun or _is_accelerate(words)


def _is_accelerate(words: Sequence[str]) -> bool:
    return any(
        Path(word).name in ("accelerate", "accelerate-launch") or "accelerate.commands" in word for word in words[:4]
    )
