"""The auxiliary loss of experts: micro-batches count by their trained tokens, and empty ones not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from distft.data.tokenize import IGNORED

from ..models.families import saved
from .test_packing import PACKED, PADDED, error, first_step, trainer_of


@pytest.mark.parametrize("batching", [PADDED, PACKED], ids=["padded", "packed"])
def test_micro_batches_count_by_their_trained_tokens(batching: tuple[str, ...], tmp_path: Path) -> None:
    words = (f"model.name={saved('olmoe', tmp_path / 'model')}", "lora.target_modules=all-linear")
    trainer = trainer_of(tmp_path, *batching, *words, "training.router_aux_loss_coef=0.5")
    model, batches = trainer.model.eval(), list(trainer.get_train_dataloader())[:2]
    total = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)

    def loss_of(batch: dict[str, torch.Tensor], weight: float) -> float:
        trainer.router_aux_loss_coef = weight
        with torch.no_grad():
            return float(trainer.compute_loss(model, dict(batch), num_items_in_batch=total))

    shares = []
    for batch in batches:
        ours = ("labels", "scored", "targets")
        inputs = {key: value for key, value in batch.items() if key not in ours}
        with torch.no_grad():
            logits = model.get_base_model().model(**inputs, output_router_logits=True, use_cache=False).router_logits
        expected = load_balancing_loss_func(logits, 4, 2, inputs.get("attention_mask"))
        shares.append(float((batch["labels"][:, 1:] != IGNORED).sum() / total))
        assert loss_of(batch, 0.5) - loss_of(batch, 0.0) == pytest.approx(0.5 * float(expected) * shares[-1], rel=1e-4)
    assert sum(shares) == pytest.approx(1) and shares[0] != pytest.approx(0.5, abs=1e-3)
    assert loss_of(trainer._collate([]), 0.5) == 0


def test_the_log_has_its_mean(tmp_path: Path) -> None:
    words = (f"model.name={saved('olmoe', tmp_path / 'model')}", "lora.target_modules=all-linear")
    trainer = trainer_of(tmp_path, *PADDED, *words)
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    loss = {}
    for trainer.router_aux_loss_coef in (0.0, 1.0):
        with torch.no_grad():
            loss[trainer.router_aux_loss_coef] = float(trainer.compute_loss(model, dict(batch)))
    logs = {"loss": 1.0}
    trainer.log(logs)
    assert logs["aux_loss"] == pytest.approx(loss[1.0] - loss[0.0], rel=1e-4) and logs["aux_loss"] > 0.5


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_without_it_packs_and_padded_rows_are_the_same_step(family: str, tmp_path: Path) -> None:
    """With it they are not: it is a product of means over a micro-batch."""
    words = (f"model.name={saved(family, tmp_path / 'model')}", "lora.target_modules=all-linear")
    off: dict[float, list[float]] = {}
    for weight in (0.0, 0.5):
        more = (*words, f"training.router_aux_loss_coef={weight}")
        padded, packed = (first_step(trainer_of(tmp_path, *more, *way)) for way in (PADDED, PACKED))
        off[weight] = [abs(packed[0] / padded[0] - 1), error(packed[1], padded[1])]
    assert max(off[0.0]) < 1e-6 < 1e-5 < min(off[0.5]), off
