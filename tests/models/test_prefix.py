"""The short copy of a model on which samples are checked where the whole model is not on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distft.data.loader import Collator
from distft.models.isolation import IsolationCheck
from distft.models.prefix import quant_states, shortened

from .families import adapted, small_model


def layers(model: Any) -> nn.ModuleList:
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


@pytest.mark.parametrize(("family", "kept"), [("llama", 1), ("jamba", 2), ("gemma3_text", 1)])
def test_it_has_one_layer_of_each_kind(family: str, kept: int) -> None:
    model = adapted(small_model(family))
    before = list(layers(model))
    short = shortened(model)
    assert len(layers(short)) == kept and list(layers(model)) == before
    theirs = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in theirs for parameter in short.parameters())
    found = IsolationCheck(short).findings(Collator(0, packed=False), "sdpa")
    assert found.fault is None


def test_states_of_packed_weights_are_found() -> None:
    """Those of linears, which a copy has twice, and those of experts."""
    model = adapted(small_model("llama"))
    linear = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    linear.quant_state, linear.states = "of the linear", {"down_proj": "of an expert"}
    assert quant_states(shortened(model)) == ["of the linear", "of an expert"]


def test_it_computes_with_the_weights_of_the_model() -> None:
    model = adapted(small_model("llama"))
    short, ids = shortened(model), torch.arange(5, 15)[None]
    ours, theirs = (each.get_base_model().model.layers[0].self_attn.q_proj for each in (short, model))
    x = torch.randn(1, 3, 32)
    assert torch.equal(ours(x), theirs(x))
    assert short(input_ids=ids).logits.shape == model(input_ids=ids).logits.shape
