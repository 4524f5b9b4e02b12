"""A real pretrained model, SmolLM2-135M-Instruct, on real rows: it learns, strategies agree, and 4 bits cost what was
measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from distft.config.recipe import load_recipe
from distft.models.loading import load_base

from ..pretrained import smollm2
from .conftest import Train

SETTINGS = {
    "recipe": "smollm2_135m",
    "model.dtype": "float32",
    "training.bf16": "false",
    "training.optim": "adamw_torch",
    "data.validation_fraction": "0",
    "data.test_fraction": "0.25",
    "batching.global_batch_size": "4",
    "batching.micro_batch_tokens": "256",
    "batching.checkpoint_layers": "null",
    "training.gradient_checkpointing": "false",
    "training.max_length": "128",
    "training.logging_steps": "1",
    "training.eval_strategy": "no",
    "training.save_strategy": "no",
    "training.learning_rate": "1e-3",
    "training.lr_scheduler_type": "constant",
    "training.warmup_steps": "0",
    "tracking.report_to": "[]",
}


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[dict[str, str]]:
    """The 24 shortest instructions without an input whose answers are more than a word."""
    lines = (shared_data / "alpaca_sample.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines) if not row["input"] and len(row["output"]) > 40]
    return sorted(found, key=lambda row: len(row["instruction"] + row["output"]))[:24]


@pytest.fixture(scope="module")
def words(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = [f"{key}={value}" for key, value in SETTINGS.items()]
    return [*given, f"model.name={smollm2()}", f"data.name={path}"]


@pytest.fixture(scope="module")
def alone(words: list[str], train: Train) -> Any:
    ended = train(*words, "strategy=single", "training.max_steps=3")
    assert ended.code == 0, ended.stderr[-3000:]
    return ended.folder


def steps(folder: Any) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in folder.read_metrics() if "loss" in record]


def test_it_learns(alone: Any) -> None:
    """Three steps of four instructions lower the loss on others."""
    summary = alone.read_summary()
    assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"] - 0.02


def test_shards_on_two_processes_take_the_same_steps(alone: Any, words: list[str], train: Train) -> None:
    ended = train(*words, "strategy=fsdp", "training.max_steps=2", "evaluation.before_and_after=false", nproc=2)
    assert ended.code == 0, ended.stderr[-3000:]
    assert ended.folder.read_summary()["world_size"] == 2
    for found, expected in zip(steps(ended.folder), steps(alone)[:2], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_4_bits_cost_what_was_measured(rows: list[dict[str, str]]) -> None:
    """On these answers: 1.371 nats a token in fp32, and 1.499 in NF4 with double quantisation."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())

    def loss(quantization: str) -> float:
        recipe = load_recipe(
            [f"{key}={SETTINGS[key]}" for key in ("recipe", "model.dtype", "training.bf16")]
            + [f"model.name={smollm2()}", f"quantization={quantization}"]
        )
        model = load_base(recipe).eval()
        total, count = 0.0, 0
        for row in rows:
            turn = [{"role": "user", "content": row["instruction"]}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            asked, answer = (tokenizer(text)["input_ids"] for text in (prompt, f"{row['output']}<|im_end|>"))
            with torch.no_grad():
                logits = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            count += len(answer)
        return total / count

    exact = loss("null")
    assert exact == pytest.approx(1.371, abs=0.002)
    assert loss("{load_in_4bit: true, bnb_4bit_compute_dtype: float32}") - exact == pytest.approx(0.128, abs=0.02)
