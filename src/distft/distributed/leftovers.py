"""Variables of a launcher that may be left over in a shell, for example after an interactive session of torchrun."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from distft.errors import LaunchError

_PLACE = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What a launcher tells each process of a run about its place."""
_PLACE_PREFIXES = ("TORCHELASTIC_", "PET_")
_SETTINGS_PREFIXES = ("ACCELERATE_", "FSDP_")
"""What accelerate's launcher makes of its options, and what the recipe decides in distft."""
_KEPT = {
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_USE_PARALLELISM_CONFIG",  # docs/scaling.md, "HSDP"
    "FSDP_RESHARD_AFTER_FORWARD",  # memory or time; what is learned stays the same
}


def remove_settings(environment: MutableMapping[str, str]) -> list[str]:
    """Remove variables that would change what the recipe says, and return those that were set, as `NAME=value`."""
    return _remove(environment, [n for n in environment if n.startswith(_SETTINGS_PREFIXES) and n not in _KEPT])


def remove_launch(environment: MutableMapping[str, str]) -> list[str]:
    """Remove all variables of a launcher, and return those that were set, as `NAME=value`."""
    place = [name for name in environment if name in _PLACE or name.startswith(_PLACE_PREFIXES)]
    return _remove(environment, place) + remove_settings(environment)


def remove_empty(environment: MutableMapping[str, str]) -> None:
    """Remove variables of a process's place that are set but empty: libraries would fail to read them."""
    _remove(environment, [name for name in _PLACE if not environment.get(name, "-").strip()])


def check_meeting(world_size: int, environment: Mapping[str, str]) -> None:
    """Check that a process that RANK and WORLD_SIZE call one of several knows where to meet the others.

    Raises:
        LaunchError: it does not, so the variables are left over from another run.
    """
    place = {name: environment[name] for name in ("RANK", "WORLD_SIZE") if name in environment}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if world_size > 1 and place and missing:
        given = " and ".join(f"{name}={value}" for name, value in place.items())
        raise LaunchError(
            f"the environment has {given}, but no {' and no '.join(missing)}: no launcher started this process, and "
            "the variables are left over from another run\n  for one process: unset RANK WORLD_SIZE LOCAL_RANK\n  "
            f"for {world_size}: distft train, with the same arguments and --nproc {world_size}"
        )


def _remove(environment: MutableMapping[str, str], names: list[str]) -> list[str]:
    return [f"{name}={value}" for name in names if (value := environment.pop(name, ""))]
