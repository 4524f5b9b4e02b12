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
    if has_own_forward(module):
        module._instance_forward = vars(module).pop("forward")
        cls = _subclass(_InstanceForward, cls)
    module.__class__ = _subclass(mixin, cls)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a `forward` is set on the instance."""
    return "forward" in vars(module)


class _InstanceForward(nn.Module):
    """Mixin that calls a `forward` which was set on the instance."""

    _instance_forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._instance_forward(*args, **kwargs)


class FastForward(nn.Module):
    """Mixin for modules with a faster forward than that of their class: `fast`, which is the one that was set on the
    instance unless a subclass has another."""

    plain: bool = False
    """Compute by the class's own forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs) if self.plain else self.fast(*args, **kwargs)

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class, without one that was set on the instance."""
        after: Any = _InstanceForward if isinstance(self, _InstanceForward) else FastForward
        return super(after, self).forward(*args, **kwargs)


@functools.cache
def _subclass(mixin: type, cls: type) -> type:
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {"__module__": mixin.__module__})
