"""Packing changes only speed: loss and gradients equal those of padded rows, and no sample sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distft.config.recipe import load_recipe
from distft.data.batch_plan import Plan
from distft.data.checks import data_faults
from distft.data.loader import Collator
from distft.data.prepare import prepare_data
from distft.data.splits import lengths_of
from distft.data.tokenize import IGNORED
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.world import World
from distft.models import attention
from distft.models.loading import load_model, load_tokenizer
from distft.runs.folder import RunFolder
from distft.training.arguments import training_arguments
from distft.training.nonfinite import BadNumbers
from distft.training.trainer import Trainer, build_trainer

# The loss on the responses alone, so that the samples' trained lengths differ (1 to 60 tokens).
RECIPE = (
    *("recipe=tiny", "strategy=single", "quantization=null", "lora.lora_dropout=0"),
    *("training.completion_only_loss=true", "data.max_samples=40", "batching.global_batch_size=32"),
)
PADDED, PACKED = ("batching.micro_batch=4",), ("batching.micro_batch_tokens=300",)


def trainer_of(tmp_path: Path, *overrides: str) -> Trainer:
    """The trainer of a run, over an adapter that has learned something: B is not zero."""
    recipe = load_recipe([*RECIPE, *overrides], checks=(data_faults,))
    strategy = choose(recipe, World(), {}, Launcher())
    tokenizer = load_tokenizer(recipe)
    splits = prepare_data(recipe, tokenizer)
    plan = Plan(lengths_of(splits.train), recipe.batching, recipe.run.seed)
    model = load_model(recipe, strategy)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    arguments = training_arguments(recipe, strategy, RunFolder(tmp_path), plan.accumulation(1, 1))
    return build_trainer(
        recipe,
        strategy,
        model,
        arguments,
        plan,
        tokenizer,
        splits,
        callbacks=[],
        changed=lambda line: None,
        numbers=BadNumbers(recipe, RunFolder(tmp_path), World(), plan),
    )


def first_step(trainer: Trainer) -> tuple[float, dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Loss and gradients of the first optimizer step, and its micro-batches."""
    batches = list(trainer.get_train_dataloader())[: trainer.args.gradient_accumulation_steps]
    trained = sum((batch["labels"] != IGNORED).sum() for batch in batches)
    trainer.model.train()
    loss = 0.0
    for batch in batches:
        with trainer.compute_loss_context_manager():
            part = trainer.compute_loss(trainer.model, batch, num_items_in_batch=trained)
        part.backward()
        loss += part.item()
    return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}, batches


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative error of all gradients together, by norm."""
    assert set(found) == set(expected) and expected
    differences, norms = zip(
        *(((found[name] - tensor).norm(), tensor.norm()) for name, tensor in expected.items()), strict=True
    )
    return float(torch.stack(differences).norm() / torch.stack(norms).norm())


def on(device: str, samples: list[dict[str, list[int]]]) -> dict[str, Any]:
    batch = Collator(0, packed=True)(samples)
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


# ---- loss and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_packed_and_padded_steps_have_the_same_loss_and_gradients(kernels: str, tmp_path: Path) -> None:
    padded, packed = (
        first_step(trainer_of(tmp_path, f"model.kernels={kernels}", "model.attn_implementation=sdpa", *way))
        for way in (PADDED, PACKED)
    )
    assert sum((batch["attention_mask"] == 0).sum() for batch in padded[2]) > 0, "the padded rows have padding"
    assert all(batch["input_ids"].shape[0] == 1 for batch in packed[2])
    assert len(packed[2]) < len(padded[2])
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    assert error(packed[1], padded[1]) < 1e-5
    for name, tensor in padded[1].items():
        assert error({name: packed[1][name]}, {name: tensor}) < 1e-4, name


def test_an_empty_pack_contributes_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, *PACKED)
    _, gradients, batches = first_step(trainer)
    before = {name: tensor.clone() for name, tensor in gradients.items()}
    empty = trainer._prepare_inputs(Collator(0, packed=True)([]))
    trained = sum((batch["labels"] != IGNORED).sum() for batch in batches)
    loss = trainer.compute_loss(trainer.model, empty, num_items_in_batch=trained)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(gradients[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("way", [PADDED, (*PACKED, "training.pad_to_multiple_of=16")], ids=["padded", "packed"])
def test_the_head_computes_only_trained_tokens_with_the_same_loss(way: tuple[str, ...], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, *way)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    everything = {key: value for key, value in batch.items() if key not in ("scored", "targets")}
    losses, gradients = [], []
    for inputs in (everything, batch):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(100))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert error(gradients[1], gradients[0]) < 1e-5
    trained = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert 0 < trained <= batch["targets"].shape[1] < batch["labels"].numel(), "the prompts are excluded"
    assert int((batch["targets"] != IGNORED).sum()) == trained


def test_packs_evaluate_to_the_same_loss_as_padded_rows(tmp_path: Path) -> None:
    losses = [
        trainer_of(tmp_path, "data.validation_fraction=0.4", *way).evaluate()["eval_loss"] for way in (PADDED, PACKED)
    ]
    assert losses[0] > 0.1
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_batches_are_padded_to_the_recipe_s_multiple(tmp_path: Path) -> None:
    *_, batches = first_step(trainer_of(tmp_path, "training.pad_to_multiple_of=16", *PADDED))
    assert {batch["input_ids"].shape[1] % 16 for batch in batches} == {0}


# ---- samples do not see each other -----------------------------------------------------------------------------------


@pytest.fixture
def samples(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[int]]]:
    """A few real samples of several lengths."""
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    rows = list(prepare_data(load_recipe(RECIPE), tokenizer).train.select(range(5)))
    assert len({len(row["input_ids"]) for row in rows}) >= 4
    return rows


def changed(samples: list[dict[str, list[int]]], number: int) -> list[dict[str, list[int]]]:
    """`samples`, with every token but the first of one of them replaced."""
    ids = samples[number]["input_ids"]
    other = {**samples[number], "input_ids": [ids[0], *((token + 97) % 2_000 + 3 for token in ids[1:])]}
    return [*samples[:number], other, *samples[number + 1 :]]


def logits_of_samples(model: Any, samples: list[dict[str, list[int]]], device: str = "cpu") -> list[torch.Tensor]:
    batch = on(device, samples)
    del batch["labels"]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0]
    return list(torch.split(logits, [len(sample["input_ids"]) for sample in samples]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("number", [0, 2, 4])
def test_changing_a_sample_changes_no_other_sample_s_logits(
    implementation: str, number: int, tiny: Path, samples: list[dict[str, list[int]]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=implementation)
    before, after = (logits_of_samples(model, rows) for rows in (samples, changed(samples, number)))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != number for i in range(5)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_sample_has_the_same_logits_in_a_pack_as_alone(
    implementation: str, tiny: Path, samples: list[dict[str, list[int]]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=implementation)
    for sample, found in zip(samples, logits_of_samples(model, samples), strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


# ---- on a GPU, in bf16 with the variable-length kernel ---------------------------------------------------------------

GPU = (
    "model.attn_implementation=varlen",
    "model.dtype=bfloat16",
    "training.bf16=true",
    "training.dataloader_num_workers=0",
)


@pytest.mark.gpu
def test_packs_in_bf16_are_as_close_to_fp32_as_padded_rows(tmp_path: Path) -> None:
    exact, padded, packed = (
        first_step(trainer_of(tmp_path, *overrides))
        for overrides in (
            ("model.attn_implementation=sdpa", *PADDED),
            (*GPU, "model.attn_implementation=sdpa", *PADDED),
            (*GPU, *PACKED),
        )
    )
    assert error(packed[1], exact[1]) < 1.5 * error(padded[1], exact[1]) < 0.1
    assert packed[0] == pytest.approx(exact[0], rel=max(2 * abs(padded[0] / exact[0] - 1), 1e-3))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_forward_and_backward_never_wait_for_the_device(kernels: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, *GPU, *PACKED, f"model.kernels={kernels}")
    batches = iter(trainer.get_train_dataloader())
    trained = torch.tensor(100, device="cuda")
    trainer.training_step(trainer.model, next(batches), trained)  # kernels are compiled here
    inputs = next(batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(trainer.model, inputs, trained)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, 2, 4])
def test_with_the_kernel_changing_a_sample_changes_no_other_sample_s_logits(
    number: int, tiny: Path, samples: list[dict[str, list[int]]]
) -> None:
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="varlen", dtype=torch.bfloat16).to("cuda")
    before, after = (logits_of_samples(model, rows, "cuda") for rows in (samples, changed(samples, number)))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != number for i in range(5)]
