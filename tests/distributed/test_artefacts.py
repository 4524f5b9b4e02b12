"""What a finished run leaves behind, read by others: plain peft, plain transformers, W&B's own reader."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from distft.config.recipe import load_recipe
from distft.errors import InvariantError
from distft.runs.figures import SUMMARY_KEYS
from distft.runs.wandb import logged_records
from distft.training.checkpoints import compare, read_tensors

from .conftest import Ended, Train


def test_the_summary_has_every_figure(finished: Ended) -> None:
    summary = finished.folder.read_summary()
    assert tuple(summary) == SUMMARY_KEYS
    assert (summary["status"], summary["cause"], summary["world_size"], summary["steps"]) == ("finished", None, 2, 12)
    assert summary["samples"] == 12 * 16
    for key in ("train_loss", "train_time_s", "samples_per_second", "tokens_per_second", "host_rss_gib"):
        assert summary[key] > 0, key
    before, after = summary["eval_before"], summary["eval_after"]
    assert after["perplexity"] < before["perplexity"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))


def test_the_message_before_and_after(finished: Ended) -> None:
    summary = finished.folder.read_summary()
    before, after = summary["eval_before"]["perplexity"], summary["eval_after"]["perplexity"]
    assert f"held-out perplexity: {before:,.2f} before, {after:,.2f} after" in finished.stderr
    assert finished.stderr.count("run folder: ") == 1, "rank 0 alone speaks"


def test_metrics_have_a_record_for_every_step(finished: Ended) -> None:
    records = [record for record in finished.folder.read_metrics() if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 13))
    for record in records:
        for key in (
            "learning_rate",
            "grad_norm",
            "samples_per_second",
            "tokens_per_second",
            "tokens_per_second_per_gpu",
            "mfu",
            "peak_memory_gib",
            "peak_reserved_gib",
            "host_rss_gib",
            "energy_j",
        ):
            assert key in record
        assert record["tokens_per_second_per_gpu"] == pytest.approx(record["tokens_per_second"] / 2)
    assert any("eval_perplexity" in record for record in finished.folder.read_metrics())


def test_each_rank_has_its_log(finished: Ended) -> None:
    first, second = (path.read_text() for path in sorted(finished.folder.logs.glob("rank*.log")))
    assert first.count("── ") == second.count("── ") == 1, "one start"
    assert "distft: run folder: " in first and "distft: saved and read back: " in first
    assert "distft: run folder: " not in second
    assert "step/s" in finished.stderr and "step/s" not in first, "the progress bar is the console's"


def test_the_resolved_recipe_runs_again(finished: Ended) -> None:
    again = load_recipe([f"recipe={finished.folder.recipe}"])
    assert again.training["max_steps"] == 12
    assert again.run.name == "tiny"


def test_the_adapter_loads_with_plain_peft(finished: Ended) -> None:
    base_folder = json.loads((finished.folder.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    tokens = torch.arange(3, 40)[None]
    plain = base(input_ids=tokens).logits.detach().clone()
    adapted = PeftModel.from_pretrained(base, str(finished.folder.adapter))(input_ids=tokens).logits
    assert (adapted - plain).abs().max() > 0.1, "the adapter changes what the model says"


def test_the_saved_tensors_are_safetensors_with_every_lora_pair(finished: Ended) -> None:
    with safe_open(finished.folder.adapter / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert len(names) == 2 * 7 * 4  # A and B of seven linears in four layers
    assert not list(finished.folder.adapter.glob("*.bin"))


def test_the_adapter_and_the_optimizer_s_states_are_fp32(finished: Ended) -> None:
    """TRL casts the adapter of a 4-bit base to bfloat16, which rounds away small updates."""
    adapter = read_tensors(finished.folder.adapter)
    assert len(adapter) == 56 and {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    (checkpoint,) = finished.folder.checkpoints.iterdir()
    assert {tensor.dtype for tensor in read_tensors(checkpoint).values()} == {torch.float32}
    states = torch.load(checkpoint / "optimizer.pt")["state"]
    moments = [state[name] for state in states.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * 56 and {tensor.dtype for tensor in moments} == {torch.float32}


def test_what_is_read_back_must_be_what_was_trained(finished: Ended) -> None:
    saved = read_tensors(finished.folder.adapter)
    compare(saved, saved)
    name = next(iter(saved))
    with pytest.raises(InvariantError, match="not in the saved file"):
        compare(saved, {key: tensor for key, tensor in saved.items() if key != name})
    with pytest.raises(InvariantError, match="is not the one that was trained"):
        compare(saved, saved | {name: saved[name] + 1e-3})


def test_merge_gives_the_trained_model_to_plain_transformers(finished: Ended, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    command = [sys.executable, "-m", "distft.cli", "merge", str(finished.folder.path), "--output", str(target)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    base_folder = json.loads((finished.folder.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=quantised, dtype=torch.float32)
    trained = PeftModel.from_pretrained(
        base, str(finished.folder.adapter)
    ).train()  # eval would repack the weights on some CPUs
    for module in trained.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    merged = AutoModelForCausalLM.from_pretrained(target)
    assert AutoTokenizer.from_pretrained(target).eos_token == "</s>"
    tokens = torch.arange(3, 40)[None]
    expected, found = trained(input_ids=tokens).logits, merged(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=1e-3), (found - expected).abs().max()


def wandb_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind in the only offline run of a W&B folder."""
    (file,) = folder.glob("offline-run-*/run-*.wandb")
    return [record[kind] for record in logged_records(file) if record["type"] == kind]


def test_wandb_offline_has_loss_and_speed_at_every_step_and_the_recipe(finished: Ended) -> None:
    history = [record["item"] for record in wandb_records(finished.folder.path / "wandb", "history")]
    steps = {row["train/global_step"]: row for row in history if "train/loss" in row}
    assert sorted(steps) == list(range(1, 13))
    ours = {record["step"]: record for record in finished.folder.read_metrics() if "loss" in record}
    for step, row in steps.items():
        assert row["train/loss"] == pytest.approx(ours[step]["loss"])
        assert row["train/samples_per_second"] == pytest.approx(ours[step]["samples_per_second"])
    config = wandb_records(finished.folder.path / "wandb", "run")[0]["config"]["update"]
    assert config["lora"]["r"] == 16 and config["strategy"] == "ddp"
    assert "sync later with: wandb sync" in finished.stderr
    assert len(list((finished.folder.path / "wandb").glob("offline-run-*"))) == 1, "no second run from another rank"


def test_a_tracker_that_fails_costs_a_warning(train: Train) -> None:
    """trackio is not installed, and W&B refuses a key that is none."""
    key = "not-a-key-of-wandb"
    ended = train(
        "recipe=tiny",
        "training.max_steps=2",
        "evaluation.before_and_after=false",
        trackers="[trackio,wandb]",
        WANDB_MODE="online",
        WANDB_API_KEY=key,
    )
    assert ended.code == 0, ended.stderr[-3000:]
    assert "warning: trackio cannot be used" in ended.stderr
    assert "warning: wandb cannot be used" in ended.stderr
    assert ended.folder.read_summary()["status"] == "finished"
    assert key not in ended.stderr + ended.folder.environment.read_text(), "no secret is written"


def test_tensorboard_files_stand_in_the_run_folder(train: Train) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    ended = train("recipe=tiny", "training.max_steps=2", "evaluation.before_and_after=false", trackers="[tensorboard]")
    assert ended.code == 0, ended.stderr[-3000:]
    assert list(ended.folder.path.rglob("events.out.tfevents.*"))
