"""Measurement of the references, equivalent to distft's metrics: the steps after a warm-up, summed over all ranks.

A reference reads the texts in the given order, trains on them, and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from transformers import TrainerCallback

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
ON_GPU = torch.cuda.is_available()
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments common to all references."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    parser.add_argument("--rows", type=Path, required=True, help='a .jsonl file of {"text": …}')
    parser.add_argument(
        "--order",
        type=Path,
        required=True,
        help="a JSON list with the `samples` of each step and the `packs` they form",
    )
    parser.add_argument("--steps", type=int, required=True, help="number of measured optimizer steps")
    parser.add_argument("--warmup", type=int, required=True, help="number of optimizer steps before those")
    return parser


def texts(options: argparse.Namespace) -> list[str]:
    """The rows' texts."""
    return [json.loads(line)["text"] for line in options.rows.read_text(encoding="utf-8").splitlines()]


def steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The samples and packs of each step.

    Raises:
        ValueError: there are too few.
    """
    order: list[dict[str, Any]] = json.loads(options.order.read_text(encoding="utf-8"))
    total = options.warmup + options.steps
    if len(order) < total:
        raise ValueError(f"{options.order} has {len(order)} steps; {total} are needed")
    return order[:total]


def ordered_texts(options: argparse.Namespace) -> list[str]:
    """The texts of all steps, in order."""
    rows = texts(options)
    return [rows[index] for step in steps(options) for index in step["samples"]]


def refuse(reason: str) -> NoReturn:
    """Exit with a line of JSON that says why the reference cannot run here."""
    if LOCAL_RANK == 0:
        print(json.dumps({"reference": _script(), "refused": reason}), flush=True)
    sys.exit(1)


class Meter(TrainerCallback):  # type: ignore[misc]
    """Measures a trainer. Usage: `Meter(trainer, options)`, train, then `report`."""

    def __init__(self, trainer: Any, options: argparse.Namespace) -> None:
        self._trainer, self._options = trainer, options
        self._batches: list[tuple[int, int]] = []
        self._marks: list[tuple[float, float | None]] = []
        self._counter = _energy_counter()
        collator = trainer.data_collator
        collate = collator.torch_call

        def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = collate(rows)
            self._batches.append(_size(batch))
            return batch

        collator.torch_call = counted
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        if self._options.warmup == 0:
            self._mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (self._options.warmup, self._options.warmup + self._options.steps):
            self._mark()

    def _mark(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        self._marks.append((time.perf_counter(), self._counter()))

    def report(self, **settings: Any) -> None:
        """Print the line of JSON on rank 0; `settings` describe the reference. Collective: call it on all ranks."""
        (start, joules_before), (end, joules_after) = self._marks
        accumulation = self._trainer.args.gradient_accumulation_steps
        total = self._options.warmup + self._options.steps
        batches = self._batches[: accumulation * total]  # the loader may have prefetched more
        mine = {
            "steps": [
                [sum(column) for column in zip(*batches[first : first + accumulation], strict=True)]
                for first in range(0, len(batches), accumulation)
            ],
            "seconds": end - start,
            "joules": None if joules_before is None or joules_after is None else joules_after - joules_before,
            "peak": torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
        }
        ranks = [mine]
        if dist.is_initialized():
            ranks = [{}] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        if LOCAL_RANK:
            return
        done = [
            [sum(column) for column in zip(*counts, strict=True)]
            for counts in zip(*(rank["steps"] for rank in ranks), strict=True)
        ]
        samples, tokens = (sum(column) for column in zip(*done[self._options.warmup :], strict=True))
        seconds = max(rank["seconds"] for rank in ranks)
        record = {
            "reference": _script(),
            "world_size": len(ranks),
            "steps": done,
            "seconds": seconds,
            "samples": samples,
            "tokens": tokens,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": max(rank["peak"] for rank in ranks) if ON_GPU else None,
            "energy_j": sum(rank["joules"] for rank in ranks)
            if all(rank["joules"] is not None for rank in ranks)
            else None,
            "train_loss": next(
                (log["train_loss"] for log in reversed(self._trainer.state.log_history) if "train_loss" in log), None
            ),
            "settings": {
                "micro_batch": self._trainer.args.per_device_train_batch_size,
                "accumulation": accumulation,
                "optim": getattr(self._trainer.args.optim, "value", self._trainer.args.optim),
                **settings,
            },
            "packages": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
        }
        print(json.dumps(record), flush=True)


def _script() -> str:
    import __main__

    return Path(__main__.__file__).name


def _size(batch: dict[str, Any]) -> tuple[int, int]:
    """Samples and non-padding tokens of a micro-batch. In a packed row, each sample starts at position 0."""
    if "attention_mask" in batch:
        return len(batch["attention_mask"]), int(batch["attention_mask"].sum())
    return int((batch["position_ids"] == 0).sum()), batch["input_ids"].numel()


def _energy_counter() -> Any:
    """A function that returns the energy counter of this process's GPU in joules, or None without a GPU."""
    if not ON_GPU:
        return lambda: None
    import pynvml

    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(LOCAL_RANK).uuid}")
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
