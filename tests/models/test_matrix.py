"""Every architecture of the matrix trains as it would padded, with eager attention and PEFT's own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distft.data.tokenize import IGNORED
from distft.models.activation_checkpointing import checkpoint_layers, layers_of

from .matrix import FAMILIES, Outcome, batch_of, outcome_of, reference_of, rows_on

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def learn(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The mean loss of all next tokens, and the gradient of the adapter as one vector."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach(), "gradient": torch.cat([part.flatten() for part in gradients])}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert value.norm() > 0, f"the {name} is zero, which tests nothing"
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def trained(outcome: Outcome) -> Any:
    """The model with an adapter that has learned something: B is not zero."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in outcome.model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            parameter.data.normal_(0, 0.05, generator=generator)
    return outcome.model


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_as_padded_by_plain_modules(family: str) -> None:
    outcome = outcome_of(family)
    assert outcome.row() in rows_on(PAGE), "run python -m tests.models.matrix --update docs/models.md"
    assert outcome.attention is not None, outcome.why
    model = trained(outcome)
    expected = learn(reference_of(model), batch_of(None))
    batch = batch_of(outcome)
    assert_alike(learn(model, batch), expected)

    if layers_of(model):  # activation checkpointing, in training mode, without dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        checkpoint_layers(model, len(layers_of(model)), offload=False)
        recomputed = learn(model, batch)
        model.eval()
        if no_other_randomness(model):
            assert_alike(recomputed, expected)

    with torch.no_grad():
        inputs = {"input_ids": batch_of(None)["input_ids"][1:2]}
        logits = model(**inputs, use_cache=False).logits
        merged = model.merge_and_unload()(**inputs, use_cache=False).logits
    assert (merged - logits).norm() <= 1e-5 * logits.norm()


def no_other_randomness(model: Any) -> bool:
    """Whether training mode draws no random numbers but those of `nn.Dropout`."""
    values = model.config.get_text_config().to_dict()
    return not any(value for name, value in values.items() if "dropout" in name or "pdrop" in name or "jitter" in name)


def test_the_page_has_the_architectures_of_the_matrix() -> None:
    named = [row.split(" | ")[0].removeprefix("| ") for row in rows_on(PAGE)]
    assert named == [family.replace("_alibi", " with ALiBi") for family in FAMILIES] and len(named) >= 45
