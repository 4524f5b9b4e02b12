"""Measure what lower precision costs in loss: fp32 throughout, distft as is, PEFT's modules, and bf16 master weights.

    python benchmarks/precision.py --steps 200 --seeds 1 2 3 --output result.json

Real text on the embedded model, 4-bit base, one process. Each seed determines adapters, split and order, which are
the same for all variants; a variant is compared with fp32 seed by seed. Reported is the difference of held-out losses
in nats per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from distft.files import to_json, write_atomically
from distft.runs.folder import RunFolder
from distft.train import main as main_of_worker
from distft.training import trainer

BF16 = ["model.dtype=bfloat16", "training.bf16=true", "quantization.bnb_4bit_compute_dtype=bfloat16"]
FP32 = ["model.dtype=float32", "training.bf16=false", "quantization.bnb_4bit_compute_dtype=float32"]
VARIANTS = {
    "fp32": FP32,
    "shipped": BF16,  # bf16 products in fused nodes, fp32 master weights and optimizer states
    "plain": [*BF16, "model.kernels=plain"],  # PEFT's modules under autocast, fp32 master weights
    "bf16_masters": BF16,  # adapter in bf16, which distft does not offer
}


def in_bf16(model: Any, *_: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def run(variant: str, seed: int, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    arguments = [
        "recipe=tiny",
        "strategy=single",
        f"run.seed={seed}",
        f"run.dir={work}",
        f"run.name={variant}-{seed}",
        "tracking.report_to=[]",
        f"training.max_steps={options.steps}",
        "training.eval_strategy=no",
        "training.save_strategy=no",
        "lora.lora_dropout=0.0",
        f"training.learning_rate={options.learning_rate}",
        *VARIANTS[variant],
        *options.set,
    ]
    command = [sys.executable, __file__, "--train", variant, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    if done.returncode:
        raise SystemExit(f"{variant}, seed {seed}: {done.stderr[-3000:]}")
    summary = RunFolder(work / f"{variant}-{seed}").read_summary()
    return {
        "variant": variant,
        "seed": seed,
        "arguments": [word for word in arguments if not word.startswith("run.dir=")],
        "loss_before": summary["eval_before"]["loss"],
        "loss_after": summary["eval_after"]["loss"],
        "train_loss": summary["train_loss"],
    }


def differences(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each variant, the held-out loss after training minus that of fp32 with the same seed."""
    exact = {each["seed"]: each["loss_after"] for each in runs if each["variant"] == "fp32"}
    found = {}
    for variant in dict.fromkeys(each["variant"] for each in runs):
        own = [each["loss_after"] - exact[each["seed"]] for each in runs if each["variant"] == variant]
        learned = [each["loss_before"] - each["loss_after"] for each in runs if each["variant"] == variant]
        found[variant] = {
            "mean": statistics.mean(own),
            "min": min(own),
            "max": max(own),
            "learned": statistics.mean(learned),
            "seeds": len(own),
        }
    return found


def main() -> int:
    if sys.argv[1:2] == ["--train"]:
        variant, sys.argv[1:] = sys.argv[2], sys.argv[3:]
        if variant == "bf16_masters":
            trainer.keep_adapter_in_fp32 = in_bf16
        return main_of_worker()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--learning-rate", default="1e-3")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run")
    parser.add_argument("--limit", type=float, default=600, help="time limit of one run, in seconds")
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(options.jobs) as pool:
        wanted = [(variant, seed) for seed in options.seeds for variant in VARIANTS]
        for done in pool.map(lambda each: run(*each, options, Path(work)), wanted):
            runs.append(done)
            record = {
                **provenance(__file__, options.commit),
                "steps": options.steps,
                "difference_from_fp32": differences(runs),
                "runs": runs,
            }
            write_atomically(options.output, to_json(record) + "\n")
            print(json.dumps(done | {"arguments": None}), flush=True)
    for variant, found in differences(runs).items():
        print(
            f"{variant}: {found['mean']:+.5f} ({found['min']:+.5f} to {found['max']:+.5f}), "
            f"learned {found['learned']:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
