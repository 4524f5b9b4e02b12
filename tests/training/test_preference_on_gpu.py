"""On a GPU, pairs in packs with fused kernels learn what padded pairs in plain modules do, in bf16 and on 4 bits, with
their prompts in the pack once or twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distft.training.preference import PreferenceTrainer

from .test_preference import PACKED, PADDED, learned, trainer_of

PLAIN = ("model.kernels=plain", "model.attn_implementation=eager", *PADDED)
IN_16 = ("model.dtype=bfloat16", "training.bf16=true")
FOUR = ("quantization.load_in_4bit=true", "quantization.bnb_4bit_compute_dtype=float32")
FOUR_IN_16 = ("quantization.load_in_4bit=true", "quantization.bnb_4bit_compute_dtype=bfloat16")


def gradient(trainer: PreferenceTrainer, adapter: dict[str, torch.Tensor] | None) -> tuple[float, torch.Tensor]:
    """The loss of the first step's pairs, and its gradient with respect to the `adapter`."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if adapter is not None and parameter.requires_grad:
                parameter.copy_(adapter[name])
    trainer.model.train()
    batch = trainer._collate([trainer.train_dataset[index] for index in trainer._plan.samples(0).tolist()])
    batch = {
        key: value.to(trainer.args.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
    }
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=trainer.step_sizes([batch]))
    value, grads = learned(trainer.model, loss)
    return value, torch.cat([grads[name].flatten().float() for name in sorted(grads)])


@pytest.mark.gpu
@pytest.mark.parametrize(("exact", "rounded"), [((), IN_16), (FOUR, (*IN_16, *FOUR_IN_16))], ids=["bf16", "4 bits"])
def test_packs_and_fused_kernels_are_as_exact_as_plain_modules(
    exact: tuple[str, ...], rounded: tuple[str, ...], tmp_path: Path
) -> None:
    first = trainer_of(tmp_path / "exact", *PLAIN, *exact)
    adapter = {name: p.detach().clone() for name, p in first.model.named_parameters() if p.requires_grad}
    loss, expected = gradient(first, None)
    off = {}
    twice, once = (f"batching.share_prompts={shared}" for shared in ("false", "true"))
    for name, way in (("plain", PLAIN), ("fast", (*PACKED, twice)), ("shared", (*PACKED, once))):
        trainer = trainer_of(tmp_path / name, *way, *rounded)
        found, grads = gradient(trainer, adapter)
        assert found == pytest.approx(loss, abs=0.03), name
        off[name] = float((grads - expected).norm() / expected.norm())
        implementation = trainer.model.config._attn_implementation
        assert implementation == ("eager" if name == "plain" else "varlen")
    assert max(off["fast"], off["shared"]) <= min(1.5 * off["plain"] + 0.01, 0.2), off
