"""PyTorch's variable-length kernel against attention in float64 with a block mask."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distft.data.loader import Collator
from distft.errors import ModelError
from distft.models.activation_checkpointing import checkpoint_layers
from distft.models.varlen import hand_over_boundaries, kernel, varlen_attention

from .families import small_model

LENGTHS = [1, 7, 64, 130, 3]


def heads(
    tokens: int, query: int = 4, key: int = 2, size: int = 32, values: int = 0, rows: int = 1, device: str = "cpu"
) -> list[torch.Tensor]:
    """Queries, keys and values as transformers passes them: [rows, heads, tokens, head size]."""
    torch.manual_seed(0)
    shapes = ((query, size), (key, size), (key, values or size))
    return [torch.randn(rows, count, tokens, each, device=device) for count, each in shapes]


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        (2, {"attention_mask": None}, "single packed row"),
        (1, {"attention_mask": torch.ones(1, 8)}, "single packed row"),
        (1, {"attention_mask": None, "dropout": 0.1}, "supports neither dropout"),
        (1, {"attention_mask": None, "softcap": 30.0}, "nor soft-capping"),
        (1, {"attention_mask": None, "position_bias": torch.ones(1, 4, 8, 8)}, "nor a position bias"),
    ],
    ids=["rows", "mask", "dropout", "soft-capping", "bias"],
)
def test_unsupported_inputs_are_refused(rows: int, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        varlen_attention(torch.nn.Identity(), *heads(8, rows=rows), **options)


def by_mask(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention [rows, tokens, heads, value size] that is causal within each sample and reaches back fewer than
    `window` tokens; the logits of `sinks` are cut off behind the softmax."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    place = torch.arange(len(sample), device=q.device)
    back = place[:, None] - place[None, :]
    mask = (sample[:, None] == sample[None, :]) & (back >= 0) & (back < (window or len(sample)))
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    return (logits.softmax(-1)[..., : len(sample)] @ v).transpose(1, 2)


def test_the_reference_counts_a_window_as_transformers_does() -> None:
    """A token sees itself and window - 1 tokens before it."""
    from transformers import MistralConfig
    from transformers.masking_utils import create_sliding_window_causal_mask

    config, embeds = MistralConfig(sliding_window=3, attn_implementation="eager"), torch.zeros(1, 8, 4)
    mask = create_sliding_window_causal_mask(config, embeds, attention_mask=None, past_key_values=None)
    back = torch.arange(8)[:, None] - torch.arange(8)[None, :]
    assert torch.equal(mask[0, 0] == 0, (back >= 0) & (back < 3))


@pytest.mark.parametrize("family", ["stablelm", "nemotron", "llama"])
def test_attention_receives_the_boundaries_of_its_micro_batch(family: str) -> None:
    """Even if its layer does not pass them on, and when the layer is recomputed in the backward."""
    seen: list[list[int]] = []

    def noting(*args: Any, cu_seq_lens_q: torch.Tensor | None = None, **options: Any) -> Any:
        seen.append([] if cu_seq_lens_q is None else cu_seq_lens_q.tolist())
        return sdpa_attention_forward(*args, **options)

    AttentionInterface.register("noting", noting)
    model = small_model(family, attention="noting")
    for _ in range(2):
        hand_over_boundaries(model)  # the second time, nothing is left to do
    model.train()
    checkpoint_layers(model, 2, offload=False)
    collate, samples = Collator(0, packed=True), [{"input_ids": [5] * size, "labels": [5] * size} for size in (3, 4)]
    batches = [collate(samples), collate(samples[::-1])]
    losses = [model(**batch, use_cache=False).loss for batch in batches]
    for loss in losses:
        loss.backward()
    assert seen == 2 * ([[0, 3, 7]] * 2 + [[0, 4, 7]] * 2)


CASES: dict[str, dict[str, Any]] = {
    "grouped queries": {"size": 64},
    "one key per query": {"key": 4, "size": 64},
    "values of another size (MLA)": {"key": 4, "size": 192, "values": 128},
    "heads of no multiple of 8": {"size": 20},
}


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, [205]], ids=["several samples", "one"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 20, 4096])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_values_and_gradients_are_right(lengths: list[int], case: str, window: int | None, with_sinks: bool) -> None:
    """Within the error of bf16."""
    if window == 20 and "window_size" not in inspect.signature(kernel()).parameters:
        pytest.skip(f"the kernel of PyTorch {torch.__version__} has no sliding window")
    inputs = [tensor.to(torch.bfloat16) for tensor in heads(sum(lengths), device="cuda", **CASES[case])]
    if with_sinks:
        inputs.append(torch.tensor([-1.0, 0.5, 2.0, 3.5], dtype=torch.bfloat16, device="cuda"))
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    for tensor in inputs:
        tensor.requires_grad_()
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    options = {"sliding_window": window, "cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    if with_sinks:
        options["s_aux"] = inputs[3]
    found, _ = varlen_attention(torch.nn.Identity(), *inputs[:3], None, **options)
    expected = by_mask(*exact[:3], lengths, window, *exact[3:])
    assert found.shape == expected.shape
    weights = torch.randn_like(expected)
    found.backward(weights.to(found.dtype))
    expected.backward(weights.to(found.dtype).double())
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for ours, theirs in pairs:
        assert ours is not None and theirs is not None
        assert (ours.double() - theirs).norm() <= 2**-6 * theirs.norm()


@pytest.mark.gpu
def test_fp32_is_cast_under_autocast_alone() -> None:
    """LayerNorm returns fp32 there, and a fused linear what it is given."""
    inputs = heads(50, size=64, device="cuda")
    expected, _ = varlen_attention(torch.nn.Identity(), *(tensor.bfloat16() for tensor in inputs), None)
    with torch.autocast("cuda", torch.bfloat16):
        found, _ = varlen_attention(torch.nn.Identity(), *inputs, None)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    with pytest.raises(RuntimeError):
        varlen_attention(torch.nn.Identity(), *inputs, None)


@pytest.mark.gpu
def test_a_row_without_boundaries_is_one_sample() -> None:
    inputs = [tensor.to(torch.bfloat16) for tensor in heads(50, size=64, device="cuda")]
    bounds = torch.tensor([0, 50], dtype=torch.int32, device="cuda")
    without, _ = varlen_attention(torch.nn.Identity(), *inputs, None)
    with_bounds, _ = varlen_attention(torch.nn.Identity(), *inputs, None, cu_seq_lens_q=bounds, max_length_q=50)
    assert torch.equal(without, with_bounds)
