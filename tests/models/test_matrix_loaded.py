"""The architectures of the matrix as a run loads them, in bf16 and in 4 bits: on a GPU all of them, on a CPU a few."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .learning import assert_alike, learn, trained
from .matrix import FAMILIES, batch_of, outcome_as_loaded, reference_of

BF16 = ("model.dtype=bfloat16", "training.bf16=true")
FOUR_BITS = ("quantization={load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16}", *BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("words", [("quantization=null", *BF16), FOUR_BITS], ids=["bf16", "4bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_it_learns_as_padded_in_fp32(family: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """The reference has the same weights, rounded or quantised, and computes in fp32: rounding is all that differs."""
    outcome = outcome_as_loaded(family, tmp_path, *words)
    assert outcome.attention is not None, outcome.why
    model = trained(outcome)
    expected = learn(reference_of(model), batch_of(None))
    found = learn(model, batch_of(outcome), torch.bfloat16)
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=3e-3)
    assert found["gradient"].norm().item() == pytest.approx(expected["gradient"].norm().item(), rel=1e-2)
    assert_alike(found, expected, 0.1)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", "opt", "phi3", "qwen3"])
def test_in_4_bits_it_learns_as_padded(family: str, tmp_path: Path) -> None:
    words = ("quantization={load_in_4bit: true, bnb_4bit_compute_dtype: float32}", "model.dtype=float32")
    outcome = outcome_as_loaded(family, tmp_path, *words)
    assert "Linear4bit" in {type(module).__name__ for module in outcome.model.modules()}
    model = trained(outcome)
    assert_alike(learn(model, batch_of(outcome)), learn(reference_of(model), batch_of(None)))
