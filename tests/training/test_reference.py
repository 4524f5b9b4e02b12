"""On top of a trained adapter, the reference is that adapter: as with TRL's `DPOTrainer`, which keeps a second one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from distft.models.tiny import tiny_model
from distft.training.preference import FIGURES, PreferenceTrainer
from distft.training.reference import FrozenAdapter

from .test_preference import PACKED, PADDED, learned, require_close, trainer_of, trl_rows

WAYS = {
    "padded": PADDED,
    "packed": PACKED,
    "plain": (*PACKED, "model.kernels=plain"),
    "dora": (*PACKED, "lora.use_dora=true"),
    "embedding": (*PACKED, "lora.modules_to_save=[embed_tokens]"),
}


@pytest.fixture(scope="module", params=WAYS)
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    trainer = trainer_of(tmp_path_factory.mktemp("ours"), *WAYS[request.param], "lora.lora_dropout=0")
    trainer._reference = FrozenAdapter(trainer.model)
    return trainer


def move(model: torch.nn.Module) -> None:
    """Train the adapter, in a way: each parameter a little, the same whenever this is called."""
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)


def test_the_start_has_rewards_of_exactly_zero(ours: PreferenceTrainer) -> None:
    batch = ours._collate([ours.train_dataset[index] for index in range(4)])
    parameters = {name: id(parameter) for name, parameter in ours.model.named_parameters()}
    ours.model.train()
    pairs, *_ = ours._compare(ours.model, batch)
    assert pairs.chosen.requires_grad and not pairs.reference_chosen.requires_grad
    assert pairs.chosen_ratio.abs().max() == 0 == pairs.rejected_ratio.abs().max()
    assert {name: id(parameter) for name, parameter in ours.model.named_parameters()} == parameters


def test_loss_gradients_and_metrics_are_those_over_trl_s_second_adapter(
    ours: PreferenceTrainer, tmp_path: Path
) -> None:
    pairs = [ours.train_dataset[index] for index in ours._plan.samples(0).tolist()]
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model()), dtype=torch.float32)
    trained = get_peft_model(base, LoraConfig(**ours.model.peft_config["default"].to_dict()))
    start = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
    assert not trained.load_state_dict(start, strict=False).unexpected_keys
    theirs = DPOTrainer(
        trained,
        args=DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=ours.processing_class,
    )
    for model in (ours.model, theirs.model):
        move(model)
        model.train()
    expected = learned(theirs.model, theirs.compute_loss(theirs.model, theirs.data_collator(trl_rows(pairs))))
    ours._pair_sums.zero_()
    batch = ours._collate(pairs)
    found = learned(ours.model, ours.compute_loss(ours.model, batch, num_items_in_batch=ours.step_sizes([batch])))
    require_close(found, expected)
    logs = {"loss": 0.0}
    ours.log(logs)
    for figure in FIGURES:
        (value,) = theirs._metrics["train"][figure]
        assert logs[figure] == pytest.approx(value, rel=1e-4, abs=1e-5), figure
    assert logs["rewards/margins"] != 0
    with torch.no_grad():  # for the next test
        for name, parameter in ours.model.named_parameters():
            parameter.copy_(start[name])
