"""A NaN that real data brings in: one row holds a token whose embedding is NaN in the base model."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from distft.config.recipe import load_recipe
from distft.data.batch_plan import Plan
from distft.data.splits import split_rows
from distft.runs import manifest

from ..distributed.conftest import Ended, finish, start
from .test_resume import KINDS

ROWS, GLOBAL, MICRO = 40, 8, 2
CURSE = "☃"  # its bytes stand in no other row, and each is a token of its own


@pytest.fixture(scope="module")
def cursed_model(tiny: Path, tokenizer: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, in which the tokens of `CURSE` have embeddings of NaN."""
    folder = tmp_path_factory.mktemp("cursed") / "model"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer(CURSE)["input_ids"]] = torch.nan  # type: ignore[operator]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def overrides(model: Path) -> list[str]:
    return [
        "recipe=tiny",
        f"model.name={model}",
        "data.path=rows.jsonl",
        "data.validation_fraction=0",
        "data.test_fraction=0",
        f"batching.global_batch_size={GLOBAL}",
        f"batching.micro_batch={MICRO}",
        "training.max_steps=5",
        "training.warmup_steps=0",
        "training.logging_steps=1",
        "training.eval_strategy=no",
        "training.save_strategy=steps",
        "training.save_steps=1",
        "training.save_total_limit=9",
        "evaluation.before_and_after=false",
        "tracking.report_to=[]",
    ]


def write_data(where: Path, model: Path, cursed: set[tuple[int, int]]) -> list[int]:
    """Write the rows, with a curse in those of `cursed` (step, place in its global batch).

    Returns the row numbers of the cursed rows in the train split.
    """
    recipe = load_recipe(overrides(model))
    rows = split_rows(list(range(ROWS)), recipe.data, recipe.run.seed, with_test=True)["train"]
    plan = Plan([1] * ROWS, recipe.batching, recipe.run.seed)
    numbers = [int(plan.samples(step - 1)[place]) for step, place in sorted(cursed)]
    marked = {rows[number] for number in numbers}
    lines = [
        {
            "instruction": f"Count to {n}.",
            "context": "",
            "response": CURSE if n in marked else f"One, two and so on up to {n}.",
        }
        for n in range(ROWS)
    ]
    (where / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return numbers


def go(where: Path, model: Path, kind: str, *more: str) -> Ended:
    extra, processes = KINDS[kind]
    command = [sys.executable, "-m", "distft.cli", "train", *overrides(model), *extra, *more, "--nproc", str(processes)]
    return finish(start(command, where), where)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_nan_stops_all_ranks_and_names_step_rank_and_samples(kind: str, cursed_model: Path, tmp_path: Path) -> None:
    # Micro-batches of two are dealt out in turn, longest samples first: the shortest of eight is in the second of rank
    # 1.
    (number,) = write_data(tmp_path, cursed_model, {(3, 6)})
    ended = go(tmp_path, cursed_model, kind)
    assert ended.code == 1, ended.stderr[-3000:]
    cause = ended.folder.read_summary()["cause"]
    assert cause.startswith("BadNumbersError: step 3: the loss of micro-batch 2 of 2 on rank 1 is nan. "), cause
    named = re.search(r"Its samples in the train split: ([\d,]+); to see", cause)
    assert named is not None and len(named[1].split(",")) == MICRO and str(number) in named[1].split(",")
    assert "run.on_bad_numbers=skip" in ended.stderr
    assert manifest.newest(ended.folder.checkpoints) == (ended.folder.checkpoints / "checkpoint-2", [])
    assert [record["step"] for record in ended.folder.read_metrics() if "loss" in record] == [1, 2]

    command = re.search(r"`distft (data preview [^`]*)`", cause)
    assert command is not None
    shown = finish(start([sys.executable, "-m", "distft.cli", *command[1].split()], tmp_path), tmp_path)
    assert shown.code == 0 and f"── sample {number}:" in shown.stdout and CURSE in shown.stdout


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_skipped_step_leaves_weights_and_optimizer_to_the_bit(kind: str, cursed_model: Path, tmp_path: Path) -> None:
    """The first step is skipped too: the guard that expects the adapter to move waits for a step that moves it, and
    then compares all ranks."""
    write_data(tmp_path, cursed_model, {(1, 0), (3, 6)})
    ended = go(tmp_path, cursed_model, kind, "run.on_bad_numbers=skip")
    assert ended.code == 0, ended.stderr[-3000:]
    assert ended.stderr.count("The step was skipped") == 2
    folder = ended.folder
    summary = folder.read_summary()
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("finished", 5, 2)
    records = [record for record in folder.read_metrics() if "loss" in record]
    assert [record["step"] for record in records] == [2, 4, 5]
    assert all(isinstance(record["loss"], float) for record in records)

    before, skipped, after = (learned(folder.checkpoints / f"checkpoint-{step}") for step in (2, 3, 4))
    assert len(before) > 100 and set(before) == set(skipped) == set(after)
    for name, tensor in before.items():  # AdamW has momentum and counts its steps: any update would move all of these
        assert torch.equal(tensor, skipped[name]), name
        assert not torch.equal(tensor, after[name]), name


def learned(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The adapter and the optimizer's states of a checkpoint, whole, by name."""
    trees: dict[str, Any] = {}
    if (checkpoint / "optimizer.pt").exists():
        trees = {
            "model": load_file(checkpoint / "adapter_model.safetensors"),
            "optimizer": torch.load(checkpoint / "optimizer.pt"),
        }
    else:
        for name in ("pytorch_model_fsdp_0", "optimizer_0"):
            dcp_to_torch_save(checkpoint / name, checkpoint.with_suffix(".whole"))
            trees[name] = torch.load(checkpoint.with_suffix(".whole"))
    found: dict[str, torch.Tensor] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, torch.Tensor):
            found[path] = node
        for key, below in node.items() if isinstance(node, dict) else []:
            walk(below, f"{path}/{key}")

    walk(trees, "")
    return {name: tensor for name, tensor in found.items() if "lora" in name or name.startswith("/optimizer")}


def test_a_run_that_skips_every_step_is_stopped(cursed_model: Path, tmp_path: Path) -> None:
    write_data(tmp_path, cursed_model, {(step, place) for step in range(1, 6) for place in range(GLOBAL)})
    ended = go(
        tmp_path,
        cursed_model,
        "single",
        "run.on_bad_numbers=skip",
        "training.max_steps=20",
        "training.save_strategy=no",
    )
    assert ended.code == 1
    assert ended.folder.read_summary()["cause"].startswith("BadNumbersError: step 10: ")
    assert "10th consecutive step" in ended.stderr
