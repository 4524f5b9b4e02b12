"""Subclassing one module of a model in place."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import nn

from distft.kernels.subclass import subclass_in_place


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return 2 * super().forward(x)


def test_only_the_given_module_changes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names, x = list(model.state_dict()), torch.ones(2)
    expected = model[0](x)
    subclass_in_place(model[0], Doubled)
    assert torch.equal(model[0](x), 2 * expected)
    assert isinstance(model[0], nn.Linear) and type(model[1]) is nn.Linear and list(model.state_dict()) == names


def test_modules_of_a_class_share_their_subclass() -> None:
    modules = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for module in modules:
        subclass_in_place(module, Doubled)
    assert type(modules[0]) is type(modules[1])


def test_a_forward_set_on_the_instance_stays_in_use_and_is_copied_with_the_module() -> None:
    module: Any = nn.Linear(2, 2)
    module.forward = types.MethodType(lambda self, x: self.weight @ x, module)
    subclass_in_place(module, Doubled)
    x = torch.ones(2)
    other = copy.deepcopy(module)
    module.weight.data.zero_()
    assert torch.equal(module(x), torch.zeros(2))
    assert torch.equal(other(x), 2 * (other.weight @ x))
