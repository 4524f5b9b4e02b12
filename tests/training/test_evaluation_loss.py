"""The evaluation loss is the plain negative log-likelihood per trained token, whatever the training loss is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from distft.evaluation.likelihood import trained_log_likelihoods
from distft.training.trainer import Trainer

from .test_packing import PACKED, PADDED, trainer_of


def likelihood_by_logits(trainer: Trainer) -> float:
    """The mean negative log-likelihood of the validation split, from the model's own logits."""
    samples = trainer.eval_dataset
    rows, labels = list(samples["input_ids"]), list(samples["labels"])
    trainer.model.eval()
    with torch.no_grad():
        found = trained_log_likelihoods(trainer.model, rows, labels, 0, trainer.args.device)
    return -sum(found) / sum(label != -100 for row in labels for label in row[1:])


@pytest.mark.parametrize(
    "words",
    [PADDED, PACKED, ("training.loss_type=dft", *PACKED), ("training.label_smoothing_factor=0.2", *PADDED)],
    ids=["padded", "packed", "dft", "label smoothing"],
)
def test_the_training_loss_does_not_change_the_evaluation_loss(words: tuple[str, ...], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, *words)
    expected = likelihood_by_logits(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_auxiliary_loss_of_experts_does_not_change_the_evaluation_loss(tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = MixtralConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True},
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    words = (f"model.name={tmp_path / 'experts'}", "training.router_aux_loss_coef=10", "lora.target_modules=[q_proj]")
    trainer = trainer_of(tmp_path, *PADDED, *words)
    assert trainer.aux_loss_enabled
    assert trainer.evaluate()["eval_loss"] == pytest.approx(likelihood_by_logits(trainer), rel=1e-5)
