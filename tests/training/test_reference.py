"""On top of a trained adapter, the reference is that adapter: as with TRL's `DPOTrainer`, which keeps a second one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from distft.config.recipe import load_recipe
from distft.models.checks import model_faults
from distft.models.tiny import tiny_model
from distft.training.checkpoints import read_tensors
from distft.training.preference import FIGURES, PreferenceTrainer
from distft.training.reference import FrozenAdapter

from .test_preference import PACKED, PADDED, learned, require_close, trainer_of, trl_rows

WAYS = {
    "padded": PADDED,
    "packed": PACKED,
    "plain": (*PACKED, "model.kernels=plain"),
    "dora": PACKED,
    "embedding": PACKED,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "packed": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"modules_to_save": ["embed_tokens"]},
}


def trained_adapter(folder: Path, **options: Any) -> Path:
    """The folder of an adapter of the tiny model whose B is not zero."""
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model()), dtype=torch.float32)
    config = LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    move(model, 0.05)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module", params=WAYS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An adapter as another tool saves it, and the way to train it."""
    folder = tmp_path_factory.mktemp(request.param)
    return trained_adapter(folder, **ADAPTERS.get(request.param, {})), request.param


@pytest.fixture(scope="module")
def ours(saved: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    folder, way = saved
    trainer = trainer_of(tmp_path_factory.mktemp("ours"), f"adapter={folder}", *WAYS[way], "lora.lora_dropout=0")
    assert isinstance(trainer._reference, FrozenAdapter)
    tensors = read_tensors(folder)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            name = name.replace(".default", "").replace(".modules_to_save", "")
            assert torch.equal(parameter, tensors.pop(name.replace("magnitude_vector.weight", "magnitude_vector")))
    assert not tensors
    return trainer


def move(model: torch.nn.Module, size: float = 0.02) -> None:
    """Train the adapter, in a way: each parameter a little, the same whenever this is called."""
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            parameter += size * parameter.std() * torch.randn_like(parameter)


def test_the_start_has_rewards_of_exactly_zero(ours: PreferenceTrainer) -> None:
    batch = ours._collate([ours.train_dataset[index] for index in range(4)])
    parameters = {name: id(parameter) for name, parameter in ours.model.named_parameters()}
    ours.model.train()
    pairs, *_ = ours._compare(ours.model, batch)
    assert pairs.chosen.requires_grad and not pairs.reference_chosen.requires_grad
    assert pairs.chosen_ratio.abs().max() == 0 == pairs.rejected_ratio.abs().max()
    assert {name: id(parameter) for name, parameter in ours.model.named_parameters()} == parameters


def test_loss_gradients_and_metrics_are_those_over_trl_s_second_adapter(
    saved: tuple[Path, str], ours: PreferenceTrainer, tmp_path: Path
) -> None:
    pairs = [ours.train_dataset[index] for index in ours._plan.samples(0).tolist()]
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model()), dtype=torch.float32)
    start = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
    theirs = DPOTrainer(
        PeftModel.from_pretrained(base, str(saved[0]), is_trainable=True),
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


def test_four_bits_do_not_round_the_start(tmp_path: Path) -> None:
    """TRL casts the adapter on a quantised base to bf16."""
    folder = trained_adapter(tmp_path / "saved")
    trainer = trainer_of(tmp_path, f"adapter={folder}", *PACKED, "quantization={load_in_4bit: true}")
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    tensors = {name.replace(".weight", ".default.weight"): tensor for name, tensor in read_tensors(folder).items()}
    assert trained.keys() == tensors.keys() and all(torch.equal(trained[name], tensors[name]) for name in trained)
    trainer.model.train()
    pairs, *_ = trainer._compare(trainer.model, trainer._collate([trainer.train_dataset[0]]))
    assert pairs.chosen_ratio.abs().max() == 0 == pairs.rejected_ratio.abs().max()


@pytest.mark.parametrize(
    ("word", "key", "problem"),
    [
        ("lora.target_modules=all-linear", "adapter", "32 of 56 adapter tensors are missing"),
        (
            "lora.target_modules=[q_proj]",
            "adapter",
            "0 of 8 adapter tensors are missing, 16 are unknown",
        ),
        (None, "adapter", "has NaN or infinite values in 1 of 24 tensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_found_without_weights(
    word: str | None, key: str, problem: str, tmp_path: Path
) -> None:
    folder = trained_adapter(tmp_path / "saved")
    if word is None:
        tensors = read_tensors(folder)
        next(iter(tensors.values()))[0] = torch.nan
        save_file(tensors, folder / "adapter_model.safetensors")
    recipe = load_recipe(["recipe=dpo", "strategy=single", f"adapter={folder}", *filter(None, [word])])
    (fault,) = model_faults(recipe).faults
    assert fault.key == key and problem in fault.problem


def test_another_base_is_found_by_its_weights(tmp_path: Path) -> None:
    folder = trained_adapter(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model()), dtype=torch.float32)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.01)
    base.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(str(tiny_model())).save_pretrained(tmp_path / "other")
    recipe = load_recipe(["recipe=dpo", "strategy=single", f"adapter={folder}", f"model.name={tmp_path}/other"])
    (fault,) = model_faults(recipe).faults
    assert fault.key == "model.name" and "was trained on other weights" in fault.problem


def test_a_resumed_run_holds_to_where_it_started(tmp_path: Path) -> None:
    """Steps 3 and 4 are those of a run that was not interrupted: their reference is the start, not the checkpoint."""
    folder = trained_adapter(tmp_path / "saved")

    def losses(name: str, checkpoint: str | None = None) -> list[float]:
        words = (f"adapter={folder}", *PACKED, "training.max_steps=4", "training.save_strategy=steps")
        words += ("training.save_steps=2", "training.logging_steps=1", "training.learning_rate=1e-3")
        words += ("training.warmup_steps=0", "training.eval_strategy=no", "training.save_total_limit=null")
        trainer = trainer_of(tmp_path / name, *words)
        trainer.train(resume_from_checkpoint=checkpoint)
        return [each["loss"] for each in trainer.state.log_history if "loss" in each]

    whole = losses("whole")
    assert whole[0] == pytest.approx(0.693147) and min(whole[1:]) < 0.693
    assert losses("again", str(tmp_path / "whole" / "checkpoints" / "checkpoint-2")) == whole
