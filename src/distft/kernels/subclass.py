"""Override methods of one module of a model, not of its whole class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def subclass_in_place(module: nn.Module, mixin: type) -> None:
    """Make `module` an instance of a subclass of its class in which the methods of `mixin` come first.

    The module keeps its name, parameters, buffers and hooks, so checkpoints, PEFT and the sharding strategies see what
    they saw before (FSDP2's `fully_shard` changes classes in the same way). If a library has set a `forward` on the
    instance, as liger and accelerate do, that is what the mixin's `super().forward` calls.
    """
    cls: Any = type(module)
    if "forward" in vars(module):
        module._instance_forward = vars(module).pop("forward")
        cls = _subclass(_InstanceForward, cls)
    module.__class__ = _subclass(mixin, cls)


class _InstanceForward(nn.Module):
    """Mixin that calls a `forward` which was set on the instance."""

    _instance_forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._instance_forward(*args, **kwargs)


@functools.cache
def _subclass(mixin: type, cls: type) -> type:
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {"__module__": mixin.__module__})
