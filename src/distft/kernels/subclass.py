"""Override methods of one module of a model, not of its whole class."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def subclass_in_place(module: nn.Module, mixin: type) -> None:
    """Make `module` an instance of a subclass of its class in which the methods of `mixin` come first.

    The module keeps its name, parameters, buffers and hooks, so checkpoints, PEFT and the sharding strategies see what
    they saw before (FSDP2's `fully_shard` changes classes in the same way). A `forward` that a library has set on the
    instance would hide the mixin's, and is removed.
    """
    vars(module).pop("forward", None)
    cls: Any = type(module)
    module.__class__ = _subclass(mixin, cls)


@functools.cache
def _subclass(mixin: type, cls: type) -> type:
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {"__module__": mixin.__module__})
