"""What a preference loss holds the model to: the base alone, or the adapter that the training starts from.

Either shares the model's weights. Its forward comes before the model's own, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import nn

from distft import upstream_api


class Reference(Protocol):
    """The model that is computed in place of the trained one."""

    def on(self, model: Any, accelerator: Any) -> AbstractContextManager[None]:
        """Let `model`, as `accelerator` has prepared it, compute as the reference within the block."""


class Base:
    """The model with its adapter off."""

    def on(self, model: Any, accelerator: Any) -> AbstractContextManager[None]:
        return upstream_api.adapters_off(model)


class FrozenAdapter:
    """The adapter that `model` has now, kept whole on every rank. Create it before anything is sharded, cast or
    resumed.

    Within the block, frozen copies stand in for the modules that own trained parameters. The parameters themselves do
    not change: what FSDP2 gathers for the reference is right for the model, too, and nothing has to be copied back. A
    second adapter of PEFT's would be sharded, gathered and saved with the first, and keep its linears from being fused.
    """

    def __init__(self, model: nn.Module) -> None:
        owners = {child for child in model.modules() if _owns_trained(child)}
        frozen = {owner: _frozen(owner) for owner in owners}
        self._places = [
            (parent, name, child, frozen[child])
            for parent in model.modules()
            for name, child in upstream_api.children_of(parent).items()
            if child in frozen
        ]
        self._is_placed = False

    @contextmanager
    def on(self, model: Any, accelerator: Any) -> Iterator[None]:
        if not self._is_placed:
            self._place(accelerator)
        for parent, name, _, frozen in self._places:
            upstream_api.children_of(parent)[name] = frozen
        try:
            yield
        finally:
            for parent, name, child, _ in self._places:
                upstream_api.children_of(parent)[name] = child

    def _place(self, accelerator: Any) -> None:
        """Bring the copies to the device, in the types that a forward sees, so that both models round alike."""
        for _, _, child, frozen in self._places:
            for name, value in frozen.named_parameters(recurse=False):
                dtype = upstream_api.type_in_forward(accelerator, getattr(child, name))
                value.data = value.data.to(accelerator.device, dtype)
        self._is_placed = True


def _owns_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _frozen(module: nn.Module) -> nn.Module:
    """A copy of `module` with parameters of its own, on the CPU."""
    copied: nn.Module = upstream_api.with_parameters(
        module, lambda parameter: nn.Parameter(parameter.detach().to("cpu", copy=True), requires_grad=False)
    )
    return copied
