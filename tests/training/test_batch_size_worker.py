"""The search for a micro-batch measures the program that the run then is: one trainer, with other batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from distft.config.recipe import Recipe, load_recipe
from distft.data.pairs import sequences_of
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import Strategy
from distft.runs.folder import RunFolder
from distft.training.arguments import PACK_MULTIPLE, pad_multiple
from distft.training.batch_size_worker import PASSES, ProbeTrainer, probe_recipe, setup_probe
from distft.training.callbacks import FSDPPrefetch
from distft.training.preference import PreferenceTrainer
from distft.training.setup import open_run, setup_data, setup_model, setup_strategy, setup_trainer
from distft.training.trainer import Trainer

RECIPE = (
    *("recipe=tiny", "strategy=single", "data.max_samples=40", "batching.global_batch_size=8", "tracking.report_to=[]"),
    *("training.pad_to_multiple_of=48", "training.loss_type=dft", "training.optim=sgd", "lora.r=4"),
)
ITS_OWN = {
    *("output_dir", "max_steps", "do_eval", "eval_strategy", "save_strategy", "logging_strategy"),
    *("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
}
"""The arguments that may differ: where and how much it trains, but not how."""


def trainers(tmp_path: Path, *overrides: str) -> tuple[Trainer, Trainer, list[Any]]:
    """The trainer of the run, that of the search, and the accelerators that the strategy has corrected."""
    preserved: list[Any] = []
    words = [*RECIPE, *overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        recipe = load_recipe(words)
        strategy = setup_strategy(recipe, Launcher())
        data = setup_data(recipe, strategy)
        patch.setattr(
            type(strategy), "before_preparing", lambda self, accelerator, model: preserved.append(accelerator)
        )
        with open_run(recipe, strategy, data) as run:
            training = setup_trainer(run, setup_model(run))
        probe = setup_probe(probe_recipe(words), strategy, data, RunFolder(tmp_path / "probe"), lambda sizes: [])
    return training.trainer, probe, preserved


@pytest.mark.parametrize("batching", ["batching.micro_batch=4", "batching.micro_batch_tokens=300"])
def test_the_trainer_of_the_search_is_that_of_the_run(tmp_path: Path, batching: str) -> None:
    run, probe, preserved = trainers(tmp_path, batching)
    assert preserved == [run.accelerator, probe.accelerator], "the model's outputs have another type"

    ours, theirs = run.args.to_dict(), probe.args.to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= ITS_OWN
    assert probe.args.gradient_accumulation_steps == PASSES

    assert type(run) is Trainer and issubclass(type(probe), Trainer)
    replaced = {name for name in vars(ProbeTrainer) if callable(getattr(ProbeTrainer, name))}
    assert replaced == {"__init__", "get_train_dataloader", "_rounds"}, "loss, step or evaluation differ"

    kinds = [{type(callback) for callback in trainer.callback_handler.callbacks} for trainer in (run, probe)]
    assert FSDPPrefetch in kinds[0] & kinds[1]
    types = [{p.dtype for p in trainer.model.parameters() if p.requires_grad} for trainer in (run, probe)]
    assert types[0] == types[1] == {torch.float32}


@pytest.mark.parametrize("batching", ["batching.micro_batch=4", "batching.micro_batch_tokens=300"])
def test_the_batches_of_the_search_have_the_form_of_the_run_s(tmp_path: Path, batching: str) -> None:
    run, probe, _ = trainers(tmp_path, batching)
    ours, theirs = next(iter(run.get_train_dataloader())), next(iter(probe.get_train_dataloader()))
    assert ours.keys() == theirs.keys() and {"scored", "targets"} <= ours.keys()
    for batch in (ours, theirs):
        assert batch["input_ids"].shape[1] % 48 == 0 and batch["targets"].shape[1] % 48 == 0
    assert {key: value.dtype for key, value in ours.items() if torch.is_tensor(value)} == {
        key: value.dtype for key, value in theirs.items() if torch.is_tensor(value)
    }


def test_the_search_takes_every_size_and_the_loss_of_the_run(tmp_path: Path) -> None:
    run, probe, _ = trainers(tmp_path, "batching.micro_batch=4", "lora.lora_dropout=0")
    batches = list(probe.get_train_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [1, 1, 1, 1, 2, 2, 4, 4, 8, 8]
    count = torch.tensor(100)
    for batch in batches[::2]:
        losses = [
            trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count) for trainer in (run, probe)
        ]
        assert torch.equal(*losses)
    probe.train()
    assert probe.state.global_step == 5


def test_packs_of_every_size_are_padded_to_their_own_multiple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the multiple depends on the size; here it does on a CPU, too."""
    monkeypatch.setattr(
        "distft.training.trainer.pad_multiple", lambda recipe, _: recipe.batching.micro_batch_tokens // 16
    )
    recipe = probe_recipe([*RECIPE, "batching.micro_batch_tokens=auto"])
    strategy = setup_strategy(recipe, Launcher())
    tried: list[int] = []

    def callbacks(sizes: Sequence[int]) -> list[TrainerCallback]:
        tried.extend(sizes)
        return []

    probe = setup_probe(recipe, strategy, setup_data(recipe, strategy), RunFolder(tmp_path), callbacks)
    sizes = [size for size in (tried[0], *tried) for _ in range(PASSES)]
    for size, batch in zip(sizes, probe.get_train_dataloader(), strict=True):
        assert size >= 32 and batch["input_ids"].shape[1] % (size // 16) == 0


def on_gpu(recipe: Recipe) -> Strategy:
    return replace(setup_strategy(recipe, Launcher()), on_gpu=True)


@pytest.mark.parametrize(
    ("budget", "multiple"), [(64, 4), (1_600, 100), (8_192, PACK_MULTIPLE), (65_536, PACK_MULTIPLE)]
)
def test_packs_on_a_gpu_are_padded_to_a_multiple_that_their_size_decides(budget: int, multiple: int) -> None:
    """The search tries sizes of a recipe whose own micro-batch is 1, so the multiple must follow the size it tries."""
    recipe = load_recipe(["recipe=tiny", "strategy=single", "batching.micro_batch_tokens=auto"])
    strategy = on_gpu(recipe)
    assert pad_multiple(recipe.with_micro_batch(budget), strategy) == multiple
    assert pad_multiple(recipe.with_micro_batch(1), strategy) == 1
    given = load_recipe(["recipe=tiny", "strategy=single", "training.pad_to_multiple_of=7"])
    assert pad_multiple(given, strategy) == 7
    assert pad_multiple(load_recipe(["recipe=tiny", "strategy=single"]), strategy) is None


@pytest.mark.parametrize("batching", ["batching.micro_batch=auto", "batching.micro_batch_tokens=auto"])
def test_pairs_are_measured_with_the_loss_of_the_run(tmp_path: Path, batching: str) -> None:
    """Padded, both rows of a pair are as wide as the longer answer, so that its tokens alone do not say how heavy it
    is."""
    words = ["recipe=dpo", "strategy=single", "model.dtype=float32", "data.max_samples=20", "tracking.report_to=[]"]
    packs = ["batching.micro_batch_tokens=null"] * ("tokens" not in batching)
    recipe = probe_recipe([*words, *packs, batching, "batching.global_batch_size=4"])
    strategy = setup_strategy(recipe, Launcher())
    data = setup_data(recipe, strategy)
    probe = setup_probe(recipe, strategy, data, RunFolder(tmp_path), lambda sizes: [])
    assert isinstance(probe, PreferenceTrainer) and isinstance(probe, ProbeTrainer)
    if packs:
        widest = max(len(each["input_ids"]) for each in sequences_of(data.splits.train))
        assert {tuple(batch["input_ids"].shape) for batch in probe.get_train_dataloader()} == {
            (2 * size, widest) for size in (1, 2, 4)
        }
    probe.args.max_steps = 2
    probe.train()
    assert probe.state.global_step == 2
