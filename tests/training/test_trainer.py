"""The loss that a run trains on is TRL's, and its precision the recipe's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from distft.data.tokenize import IGNORED

from .test_packing import PACKED, PADDED, error, trainer_of


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate leaves the precision of the last trainer in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def by_hand(model: Any, batch: dict[str, Any], loss_type: str, count: int) -> torch.Tensor:
    """The loss from whole logits: -Σ log p / count; for DFT (arXiv:2508.05629) -Σ p log p / count, p as a constant."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    log_p = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED]
    return -(log_p.detach().exp() * log_p if loss_type == "dft" else log_p).sum() / count


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("way", [PADDED, PACKED], ids=["padded", "packed"])
def test_the_loss_and_its_gradients_are_trl_s(way: tuple[str, ...], loss_type: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, f"training.loss_type={loss_type}", *way)
    trainer.model.eval()  # without dropout
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    plain = {key: value for key, value in batch.items() if key not in ("scored", "targets")}
    count = torch.tensor(100)

    def learned(loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        trainer.model.zero_grad()
        loss.backward()
        return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}

    ours = learned(trainer.compute_loss(trainer.model, batch, num_items_in_batch=count))
    theirs = learned(SFTTrainer.compute_loss(trainer, trainer.model, plain, num_items_in_batch=count))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and error(ours[1], theirs[1]) < 1e-4
    if way == PADDED:
        formula = learned(by_hand(trainer.model, plain, loss_type, 100))
        assert ours[0] == pytest.approx(formula[0], rel=1e-5) and error(ours[1], formula[1]) < 1e-4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.dtype=bfloat16"], "bf16"),
        (["model.dtype=bfloat16", "training.bf16=false"], "no"),
        (["model.dtype=float32"], "no"),
    ],
    ids=["bf16 model", "bf16 model, bf16 off", "fp32 model"],
)
def test_a_bf16_model_trains_in_bf16_unless_the_recipe_says_no(words: list[str], expected: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, *words, *PADDED)
    assert (trainer.args.bf16, trainer.args.fp16) == (expected == "bf16", False)
    assert trainer.accelerator.mixed_precision == expected
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        one = torch.ones(2, 2, device=trainer.args.device)
        product = one @ one
    assert product.dtype == (torch.bfloat16 if expected == "bf16" else torch.float32)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}, "the adapter"
