"""Train a mixture of experts of a real shape in 4 bits, with random weights: on one GPU, and under FSDP2 on two.

    python benchmarks/mixture.py --cases single fsdp --repeats 2 --output benchmarks/results/mixture_h200.json
    python benchmarks/mixture.py --tiny --cases single --repeats 1 --output result.json     # no GPU

Each repeat is a run of its own, with its checks, in new processes. Only its weights come from memory instead of a disk:
every process draws them on its device in bf16, and the loader of the run quantises them one by one. So the peak memory
of the training is that of a run, and the time to load is not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import in_memory
import synthetic
import torch
from provenance import provenance
from shapes import config_of
from transformers import AutoConfig

from distft.files import to_json, write_atomically

EXPERTS = ("lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]", "lora.r=4", "lora.lora_alpha=8")
SHARDED = ("strategy=fsdp", "quantization.bnb_4bit_quant_storage=bfloat16")
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ("strategy=single",)),
    "single, experts adapted": (1, ("strategy=single", *EXPERTS)),
    "fsdp": (2, SHARDED),
    "fsdp, experts adapted": (2, (*SHARDED, *EXPERTS)),
}
"""Processes, and what the recipe has besides."""
_TINY = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 8, "vocab_size": 512}
_FIGURES = (
    "samples_per_second",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "mfu",
    "peak_memory_gib",
    "peak_reserved_gib",
    "train_loss",
    "quantized_share",
    "trainable_parameters",
    "parameters",
    "checkpointed_layers",
    "attn_implementation",
    "fused_linears",
    "adapted_linears",
    "isolation_errors",
    "isolation_check_s",
    "changed_for_you",
)


def shape(options: argparse.Namespace) -> synthetic.Shape:
    values = config_of(options.shape, options.layers).to_dict()
    if options.tiny:
        values |= _TINY | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        values.pop("layer_types", None)
    return synthetic.Shape(options.shape, values, 16 if options.tiny else 1, values.pop("model_type"))


def inputs(work: Path, options: argparse.Namespace) -> list[str]:
    """Write the configuration, the tokenizer and the rows; returns the words for the recipe."""
    made = shape(options)
    folder, tokenizer = work / made.name, synthetic.word_tokenizer(work / "tokenizer", made.config["vocab_size"])
    AutoConfig.for_model(made.kind, **made.config).save_pretrained(folder)
    rows, _ = synthetic.rows(work, made, options.samples * (options.warmup + options.steps + 1))
    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    return [
        f"recipe={options.shape}",
        f"model.name={folder}",
        f"model.tokenizer={tokenizer}",
        f"model.dtype={dtype}",
        "quantization.load_in_4bit=true",
        f"quantization.bnb_4bit_compute_dtype={dtype}",
        f"data.name={rows}",
        "data.chat_template=null",
        "data.format.text=text",
        "data.validation_fraction=0",
        "data.test_fraction=0",
        f"batching.global_batch_size={options.samples}",
        f"batching.micro_batch_tokens={made.tokens(options.pack)}",
        f"training.bf16={str(on_gpu).lower()}",
        f"training.max_steps={options.warmup + options.steps}",
        "training.logging_steps=1",
        *(f"training.{name}=no" for name in ("eval_strategy", "save_strategy")),
        "evaluation.before_and_after=false",
        f"tracking.throughput_warmup_steps={options.warmup}",
        "tracking.report_to=[]",
        f"run.dir={work / 'runs'}",
        *options.set,
    ]


def run(case: str, repeat: int, words: list[str], work: Path, limit: float) -> dict[str, Any]:
    """One run in new processes; returns its figures, or why there are none."""
    processes, more = CASES[case]
    name = f"{case.replace(', ', '-').replace(' ', '-')}-{repeat}"
    starter = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *starter, __file__, "--worker", *words, *more, f"run.name={name}"]
    with (work / f"{name}.log").open("w") as log:
        started = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            started.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    summary = work / "runs" / name / "summary.json"
    found = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    if found.get("status") != "finished":
        lines = (work / f"{name}.log").read_text(encoding="utf-8").splitlines()
        return {"failed": found.get("cause"), "log": lines[-25:]}
    return {key: found.get(key) for key in _FIGURES}


def worker(words: list[str]) -> None:
    """A process of a run, whose weights it draws on its device."""
    from distft.training.run import train

    in_memory.for_runs()
    train(words)


def summary_of(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure, and the spread of the rates."""
    good = [repeat for repeat in repeats if "failed" not in repeat]
    found: dict[str, Any] = {"repeats": len(good)}
    for key in _FIGURES[:7]:
        values = [repeat[key] for repeat in good if repeat[key] is not None]
        found[key] = (
            {"median": statistics.median(values), "least": min(values), "greatest": max(values)} if values else None
        )
    return found


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3_30b_a3b", help="a recipe of benchmarks/shapes.py")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3, help="optimizer steps before the measurement")
    parser.add_argument("--steps", type=int, default=8, help="measured optimizer steps")
    parser.add_argument("--samples", type=int, default=128, help="samples of a step")
    parser.add_argument("--pack", type=int, default=14_336, help="tokens of a pack")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a run")
    parser.add_argument("--tiny", action="store_true", help="a narrow model, for a machine without GPU")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run")
    parser.add_argument("--output", type=Path, required=True, help="a .json file, rewritten after every run")
    options = parser.parse_args()
    record: dict[str, Any] = {
        **provenance(__file__, options.commit),
        "shape": options.shape,
        "weights": "random, drawn in bf16 on each device and quantised there one by one; nothing is read from a disk",
        "config": shape(options).config,
        "warmup_steps": options.warmup,
        "steps": options.steps,
        "runs": {case: [] for case in options.cases},
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        record["arguments"] = words = inputs(work, options)
        for repeat in range(options.repeats):
            for case in options.cases:
                found = run(case, repeat, words, work, options.limit)
                record["runs"][case].append(found)
                record["summary"] = {name: summary_of(runs) for name, runs in record["runs"].items()}
                write_atomically(options.output, to_json(record) + "\n")
                print(case, {key: found.get(key) for key in ("failed", *_FIGURES[:6])}, flush=True)
                print("\n".join(found.get("log", ())), flush=True)
    return 1 if any("failed" in each for runs in record["runs"].values() for each in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
