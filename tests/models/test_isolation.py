"""The check of samples in one micro-batch finds what is silently wrong, passes what is right, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distft.data.loader import Collator
from distft.models.fused_lora import FusedLinear
from distft.models.isolation import IsolationCheck, set_attention

from .families import adapted, small_model

PACKS, PADDED = Collator(0, packed=True), Collator(0, packed=False)


@pytest.mark.parametrize("collate", [PACKS, PADDED], ids=["packs", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "mixtral"])
def test_what_is_right_passes(family: str, collate: Collator) -> None:
    found = IsolationCheck(adapted(small_model(family))).findings(collate, "sdpa")
    assert found.fault is None
    assert max(found.errors.values()) < 1e-5


WRONG = {
    "bloom": "eager",  # ALiBi counts from the start of the row
    "falcon_alibi": "sdpa",
    "gpt_oss": "eager",  # its mask is built without the samples' boundaries
    "jamba": "sdpa",  # the state runs on from sample to sample
    "minimax": "sdpa",
    "opt": "sdpa",  # positions are counted from the start of the row
    "recurrent_gemma": "sdpa",
}


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", WRONG)
def test_samples_that_see_each_other_in_packs_are_found(family: str, precision: torch.dtype | None) -> None:
    model = small_model(family)
    if precision is not None:
        model = model.to(precision)
    excluded = ["router"] if family == "gpt_oss" else None
    check = IsolationCheck(adapted(model, exclude_modules=excluded), precision=precision)
    fault = check.findings(PACKS, WRONG[family]).fault
    assert fault is not None and "logits" in fault
    assert check.findings(PADDED, WRONG[family]).fault is None


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_attention_that_omits_a_feature_is_found(precision: torch.dtype | None) -> None:
    """In 16 bits too, where a router sends single tokens elsewhere by rounding."""

    def without_sinks(*args: Any, s_aux: Any = None, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("without_sinks", without_sinks)
    model = small_model("gpt_oss").to(precision or torch.float32)
    check = IsolationCheck(adapted(model, exclude_modules=["router"]), precision=precision)
    assert check.findings(PADDED, "eager").fault is None
    fault = check.findings(PADDED, "without_sinks").fault
    assert fault is not None and "differ by" in fault and "from those of each alone" in fault


def test_what_rounding_hides_in_the_logits_shows_in_a_part_of_the_gradient() -> None:
    def scaled(*args: Any, scaling: float, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, scaling=1.1 * scaling, **kwargs)

    AttentionInterface.register("scaled", scaled)
    AttentionMaskInterface.register("scaled", sdpa_mask)
    check = IsolationCheck(adapted(small_model("mistral").bfloat16()), precision=torch.bfloat16)
    assert check.findings(PACKS, "sdpa").fault is None
    fault = check.findings(PACKS, "scaled").fault
    assert fault is not None and "gradient" in fault and "_proj" in fault


def windowed(width: int | None) -> Any:
    """Mistral, whose window is too wide for short samples, and whose masks forget it (None) or miscount it."""
    model = adapted(small_model("mistral"))
    model.config.sliding_window = 4096
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 4096

    def masked(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        tokens = args[1].shape[2]
        back = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        seen = tokens if width is None or sliding_window is None else sliding_window + width
        mask = (back >= 0) & (back < seen)
        return sdpa_attention_forward(*args[:4], mask[None, None], **kwargs)

    AttentionInterface.register("masked", masked)
    return model


@pytest.mark.parametrize(("width", "right"), [(0, True), (1, False), (-1, False), (None, False)])
def test_a_window_is_crossed_whatever_its_width(width: int | None, right: bool) -> None:
    model = windowed(width)
    check = IsolationCheck(model)

    fault = check.findings(PADDED, "masked").fault
    assert (fault is None) == right and (right or "logits" in str(fault))
    assert model.config.sliding_window == 4096


def test_a_kernel_that_fails_in_training_mode_alone_is_found() -> None:
    def lacking(*args: Any, dropout: float = 0.0, **kwargs: Any) -> Any:
        if dropout:
            raise ValueError("no dropout")
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("lacking", lacking)
    AttentionMaskInterface.register("lacking", sdpa_mask)
    model = small_model("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    check = IsolationCheck(adapted(model))
    assert check.findings(PACKS, "lacking").fault == "ValueError: no dropout"
    assert check.findings(PACKS, "sdpa").fault is None


def test_a_fused_node_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    check = IsolationCheck(adapted(small_model("llama")))
    original = FusedLinear.forward
    monkeypatch.setattr(FusedLinear, "forward", lambda self, x: original(self, x) * (1.0 if self.plain else 1.01))
    assert check.findings(PACKS, "sdpa").fault is not None
    assert check.findings(PACKS, "sdpa", plain=True).fault is None


def test_a_wrong_gradient_is_found_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are right, so the logits are."""

    def doubled(self: FusedLinear, x: torch.Tensor) -> torch.Tensor:
        out = original(self, x)
        return out if self.plain else 2 * out - out.detach()

    check, original = IsolationCheck(adapted(small_model("llama"))), FusedLinear.forward
    monkeypatch.setattr(FusedLinear, "forward", doubled)
    assert "gradient" in str(check.findings(PACKS, "sdpa").fault)


def test_what_cannot_be_computed_is_a_finding() -> None:
    check = IsolationCheck(adapted(small_model("lfm2")))
    assert "causal_conv1d" in str(check.findings(PACKS, "sdpa").fault)
    assert check.findings(PADDED, "sdpa").fault is None


def test_a_model_with_attention_of_its_own_keeps_it() -> None:
    model = adapted(small_model("falcon"))
    assert not set_attention(model, "eager") and set_attention(model, "sdpa")
    assert IsolationCheck(model).findings(PADDED, "eager").fault == "the model has no eager attention"


def test_without_gradients_the_logits_decide() -> None:
    check = IsolationCheck(adapted(small_model("bloom")), gradients=False)
    found = check.findings(PACKS, "eager")
    assert found.fault is not None and "gradient" not in found.errors
    assert check.findings(PADDED, "eager").fault is None


@pytest.mark.parametrize(("family", "expected"), [("llama", []), ("jamba", ["dt_proj"]), ("qwen2_moe", [])])
def test_adapters_that_no_gradient_reaches_are_named(family: str, expected: list[str]) -> None:
    """Mamba reads the weight of its dt_proj without calling it. An expert that no token chooses is not meant."""
    check = IsolationCheck(adapted(small_model(family)))
    assert check.findings(PADDED, "sdpa").fault is None
    assert check.unreached() == expected


def test_the_check_leaves_no_trace() -> None:
    model = adapted(small_model("llama"), lora_dropout=0.5).train()
    model.get_base_model().lm_head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert IsolationCheck(model).findings(PACKS, "sdpa").fault is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())
