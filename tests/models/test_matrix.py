"""Every architecture of the matrix trains as it would padded, with eager attention and PEFT's own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distft.models.activation_checkpointing import checkpoint_layers, layers_of

from .learning import adapter_after_a_resume, assert_alike, learn, trained
from .matrix import FAMILIES, batch_of, outcome_of, reference_of, rows_on

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_as_padded_by_plain_modules(family: str, tmp_path: Path) -> None:
    outcome = outcome_of(family)
    assert outcome.row() in rows_on(PAGE), "run python -m tests.models.matrix --update docs/models.md"
    assert outcome.attention is not None, outcome.why
    model = trained(outcome)
    expected = learn(reference_of(model), batch_of(None))
    batch = batch_of(outcome)
    in_one_go, resumed = adapter_after_a_resume(model, batch, tmp_path)
    assert torch.equal(in_one_go, resumed)
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
