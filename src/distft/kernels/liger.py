"""liger-kernel's rotary embeddings, and its norms where PyTorch has none that is as exact.

liger replaces a function of transformers' module for the whole process, and sets the forward of norms on the instance.
Both can be undone for a while, so that the check before step 1 compares them with transformers' own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from distft import upstream_api
from distft.kernels.norms import use_torch_norms
from distft.kernels.subclass import FastForward, has_own_forward, subclass_in_place


def use_fast_kernels(model: nn.Module) -> None:
    """Use PyTorch's norms in `model`, and liger's kernels, if liger is installed and supports the architecture."""
    names = {place: vars(place[0])[place[1]] for place in _callables(model)}
    forwards = {module for module in model.modules() if has_own_forward(module)}
    upstream_api.apply_liger_kernels(model)
    for (module, name), before in names.items():
        after = vars(module)[name]
        if after is before:
            continue
        if isinstance(before, type):  # for models that are yet to be built, which will come here as well
            setattr(module, name, before)
        else:
            plain = before.plain if isinstance(before, Switched) else before
            setattr(module, name, Switched(after, plain))
    use_torch_norms(model)
    for each in list(model.modules()):
        if has_own_forward(each) and each not in forwards:
            subclass_in_place(each, FastForward)


def use_plain_kernels(model: nn.Module, plain: bool = True) -> None:
    """Let transformers' own code compute what `use_fast_kernels` has replaced, or the kernels again. A function of
    transformers is the same for all models of an architecture."""
    for module in model.modules():
        if isinstance(module, FastForward):
            module.plain = plain
    for place, name in _callables(model):
        function = vars(place)[name]
        if isinstance(function, Switched):
            function.use_plain = plain


class Switched:
    """A function of transformers that `fast` replaces, unless `use_plain` is set."""

    def __init__(self, fast: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.fast, self.plain, self.use_plain = fast, plain, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.plain if self.use_plain else self.fast)(*args, **kwargs)


def _callables(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """transformers' modules that have the classes in `model`, and the names of the functions and classes in each."""
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    for module in [sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")]:
        yield from ((module, name) for name, value in list(vars(module).items()) if callable(value))
