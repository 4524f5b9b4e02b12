"""A mixture of experts in 4 bits, with adapters on its experts, takes the same steps under every strategy: so does the
auxiliary loss of its routers, and so do steps whose layers are recomputed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distft.training.checkpoints import read_tensors

from ..models.families import saved
from .conftest import Ended, Train

RECIPE = (
    "recipe=tiny",
    "quantization.load_in_4bit=true",
    "quantization.bnb_4bit_compute_dtype=float32",
    "quantization.bnb_4bit_quant_storage=float32",
    "lora.lora_dropout=0",
    "lora.target_modules=all-linear",
    "lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]",
    "batching.global_batch_size=8",
    "batching.micro_batch=2",
    "data.max_samples=40",
    "training.router_aux_loss_coef=0.5",
    "training.optim=sgd",
    "training.learning_rate=0.3",
    "training.lr_scheduler_type=constant",
    "training.warmup_steps=0",
    "training.max_steps=2",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.save_strategy=no",
    "evaluation.before_and_after=false",
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*RECIPE, f"model.name={saved('olmoe', tmp_path_factory.mktemp('model') / 'olmoe')}")


@pytest.fixture(scope="module")
def single(words: tuple[str, ...], train: Train) -> Ended:
    return train(*words, nproc=1)


@pytest.mark.parametrize(("strategy", "recomputes"), [("ddp", False), ("fsdp", True)])
def test_strategies_take_the_same_steps(
    strategy: str, recomputes: bool, single: Ended, words: tuple[str, ...], train: Train
) -> None:
    more = (f"strategy={strategy}", f"training.gradient_checkpointing={str(recomputes).lower()}")
    ended = train(*words, *more, nproc=2)
    assert (single.code, ended.code) == (0, 0), single.stderr[-3000:] + ended.stderr[-3000:]
    summary = ended.folder.read_summary()
    assert (summary["strategy"], summary["world_size"]) == (strategy, 2) and 0.95 < summary["quantized_share"] < 1
    assert "of the linear weights in 4 bits; mlp.gate.weight in float32" in ended.stdout + ended.stderr
    records = [[record for record in run.folder.read_metrics() if "loss" in record] for run in (single, ended)]
    for key in ("loss", "grad_norm", "aux_loss"):
        theirs, ours = ([record[key] for record in run] for run in records)
        assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-5), key
    theirs_, ours_ = (read_tensors(Path(run.folder.adapter)) for run in (single, ended))
    assert sum(".experts." in name for name in ours_) == 8 and set(ours_) == set(theirs_)
    for name, tensor in theirs_.items():
        assert torch.allclose(ours_[name], tensor, rtol=1e-4, atol=1e-6), name
