"""The loss and the gradient of an adapter on a batch, and how far two of them are apart."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from distft.data.tokenize import IGNORED

from .matrix import Outcome


def learn(model: Any, batch: dict[str, Any], precision: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The mean loss of all next tokens, and the gradient of the adapter as one vector; under autocast to
    `precision`."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.autocast(device.type, precision) if precision else nullcontext():
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    gradients = torch.autograd.grad(loss, _trained(model), allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach(), "gradient": torch.cat([part.float().flatten() for part in gradients])}


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the loss, the gradient and the norm of the gradient are from the expected ones, relative to them."""
    for name, value in expected.items():
        assert value.norm() > 0, f"the {name} is zero, which tests nothing"
    off = {name: ((found[name] - value).norm() / value.norm()).item() for name, value in expected.items()}
    norms = [each["gradient"].norm().item() for each in (found, expected)]
    return {**off, "gradient norm": abs(norms[0] / norms[1] - 1)}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    off = errors(found, expected)
    assert max(off.values()) <= 1e-5, off


def trained(outcome: Outcome) -> Any:
    """The model with an adapter that has learned something: B is not zero."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in outcome.model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            drawn = torch.empty(parameter.shape).normal_(0, 0.05, generator=generator)
            parameter.data.copy_(drawn)
    return outcome.model


def adapter_after_a_resume(model: Any, batch: dict[str, Any], folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The adapter after two steps of AdamW as one vector: in one go, and with a checkpoint in `folder` after the first
    step that another copy of the model goes on from."""
    whole, resumed = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = _optimizer(whole)
    _step(whole, batch, optimizer)
    whole.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    _step(whole, batch, optimizer)

    for parameter in _trained(resumed):
        parameter.data.fill_(0.5)
    resumed.load_adapter(folder, "default", is_trainable=True)  # as transformers' trainer does
    optimizer = _optimizer(resumed)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    _step(resumed, batch, optimizer)
    in_one_go, after = (torch.cat([part.detach().flatten() for part in _trained(each)]) for each in (whole, resumed))
    return in_one_go, after


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=1e-2)


def _step(model: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    parameters = _trained(model)
    gradient = learn(model, batch)["gradient"].split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, gradient, strict=True):
        parameter.grad = part.view_as(parameter)
    optimizer.step()
