"""Compare `objective: dpo` with TRL's DPOTrainer at Llama-2-7B's shape on pairs of real lengths, and see it learn.

    python benchmarks/preferences.py --rows dpo_sample.jsonl --lengths MODEL --output result.json
    python benchmarks/preferences.py --rows dpo_sample.jsonl --parts learning --model MODEL --output result.json
    python benchmarks/preferences.py --rows dpo_sample.jsonl --lengths MODEL --tiny --output result.json  # no GPU

`speed`: in 4 bits on the first GPU, and in bf16 on the second at the same time (or after it, if there is only one),
distft and TRL in turns, epoch by epoch; and under DDP and FSDP2 on both GPUs, in 4 bits. Every epoch has each pair
once, and the first is a warm-up. TRL runs with each setting of `TRL`; after the first measured epoch only the fastest
goes on. The weights are random, and are drawn on the device; the pairs are random words, with the numbers of tokens
that the rows have under the tokenizer of --lengths.

`learning`: real weights and the rows themselves. Each seed holds other pairs out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import synthetic
import torch
from provenance import provenance
from transformers import AutoConfig, AutoTokenizer
from turns import Side

from distft.files import to_json, write_atomically

SIDES = Path(__file__).with_name("preference_sides.py")
TRL: dict[str, dict[str, Any]] = {"four pairs of similar length": {"pairs": 4, "by_length": True}}
"""Settings of TRL. One pair at a time, in a random order, takes twice the time (the record of commit 952fd83)."""
OURS: dict[str, list[str]] = {
    "": ["preference.precompute_ref_log_probs=true"],
    ", prompts twice": ["preference.precompute_ref_log_probs=false", "batching.share_prompts=false"],
}
BITS = {4: "NF4", 16: "bf16"}
_LONGEST = 2048
_GRACE_S = 20.0
_EPOCHS = 3
_FACTS = (
    "attn_implementation",
    "share_prompts",
    "fused_linears",
    "adapted_linears",
    "isolation_errors",
    "changed_for_you",
)
_ROLES = {"human": "user", "gpt": "assistant"}


# ---- inputs ----------------------------------------------------------------------------------------------------------


def lengths_of(rows: Path, tokenizer: Any) -> np.ndarray[Any, Any]:
    """The tokens of prompt, chosen and rejected answer, [pairs, 3], of the pairs whose sequences are short enough."""
    found = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = [
            {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in row["conversations"]
        ]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        answers = (row[name]["value"] for name in ("chosen", "rejected"))
        found.append(
            [len(tokenizer(prompt)["input_ids"]), *(len(tokenizer(each)["input_ids"]) + 1 for each in answers)]
        )
    every = np.array(found)
    return every[every[:, 0] + every[:, 1:].max(1) <= _LONGEST]


def spread_over(lengths: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """`count` of the pairs, evenly spread over their sizes, in a random order."""
    order = np.argsort(lengths.sum(1), kind="stable")
    chosen = order[((np.arange(count) + 0.5) * len(order) / count).astype(int)]
    return lengths[np.random.default_rng(0).permutation(chosen)]


def inputs(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the configuration, a tokenizer of words and the rows; returns their places, and the lengths."""
    shape = synthetic.SHAPES["tiny" if options.tiny else "llama-2-7b"].with_layers(options.layers)
    lengths = spread_over(lengths_of(options.rows, AutoTokenizer.from_pretrained(options.lengths)), options.pairs)
    lengths = np.maximum(lengths // shape.divisor, 2)
    folder, tokenizer = work / shape.name, synthetic.word_tokenizer(work / "tokenizer", shape.config["vocab_size"])
    AutoConfig.for_model(shape.kind, **shape.config).save_pretrained(folder)
    generator, rows = np.random.default_rng(0), work / "pairs.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for prompt, *answers in sorted(lengths.tolist(), key=lambda each: each[0] + max(each[1:])):
            # The end of a sequence is a token of the answer.
            texts = [synthetic.words(generator, shape, size) for size in (prompt, *(size - 1 for size in answers))]
            row = dict(zip(("prompt", "chosen", "rejected"), (texts[0], f" {texts[1]}", f" {texts[2]}"), strict=True))
            longest = prompt + max(answers)
            file.write(json.dumps(row | {"length": longest}) + "\n")
    return {
        "shape": shape,
        "folder": folder,
        "tokenizer": tokenizer,
        "rows": rows,
        "lengths": lengths,
        "max_length": shape.tokens(_LONGEST),
    }


def words(made: dict[str, Any], options: argparse.Namespace, work: Path, bits: int) -> list[str]:
    """The recipe of distft."""
    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    return [
        "recipe=dpo",
        f"model.name={made['folder']}",
        f"model.tokenizer={made['tokenizer']}",
        f"model.dtype={dtype}",
        *(["quantization.load_in_4bit=true", f"quantization.bnb_4bit_compute_dtype={dtype}"] if bits == 4 else []),
        f"data.name={made['rows']}",
        "data.validation_fraction=0",
        "data.test_fraction=0",
        "evaluation.before_and_after=false",
        f"batching.global_batch_size={options.global_batch}",
        f"batching.micro_batch_tokens={made['shape'].tokens(options.pack)}",
        f"training.max_length={made['max_length']}",
        f"training.num_train_epochs={options.repeats + 1}",
        f"training.bf16={str(on_gpu).lower()}",
        "training.gradient_checkpointing=false",
        "training.optim=adamw_torch_fused",
        "training.logging_steps=1000000",
        "training.eval_strategy=no",
        "training.save_strategy=no",
        "tracking.report_to=[]",
        f"run.dir={work / 'runs'}",
        "run.hang_timeout_s=1700",  # a run that waits for its turn is none that hangs
        *options.set,
    ]


# ---- speed -----------------------------------------------------------------------------------------------------------


class Measured:
    """The turns of the runs, written to the record as they come."""

    def __init__(self, record: dict[str, Any], output: Path, options: argparse.Namespace) -> None:
        self.record, self._output, self._options, self._lock = record, output, options, threading.Lock()
        self.sides: list[Side] = []

    def start(self, name: str, command: Sequence[str], processes: int, work: Path, gpu: int | None) -> Side:
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1"}
        if gpu is not None and torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        port = ["--master-port", str(29_600 + len(self.record["runs"]))]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *port] if processes > 1 else []
        self.record["runs"][name] = {"turns": [], "failed": None}
        self.sides.append(Side(name, [sys.executable, *launcher, str(SIDES), *command], processes, work, environment))
        return self.sides[-1]

    def epoch(self, side: Side) -> float | None:
        """Give `side` turns until it has computed an epoch; returns its seconds, or None if it has failed."""
        while (kind := side.ready(self._options.limit)) is not None:
            found = side.take(self._options.limit)
            if found is None:
                break
            with self._lock:
                self.record["runs"][side.name]["turns"].append(found)
                write_atomically(self._output, to_json(self.record) + "\n")
            print(
                f"{side.name}: {kind} {found['seconds']:.2f} s, {found.get('peak_memory_gib', 0):.1f} GiB", flush=True
            )
            if kind == "epoch":
                return float(found["seconds"])
        with self._lock:
            self.record["runs"][side.name]["failed"] = end = side.end()
        print(f"{side.name} failed:", *end[-8:], sep="\n", flush=True)
        return None

    def in_turns(self, ours: list[Side], theirs: list[Side]) -> None:
        """Warm all runs up, then measure them in turns. Of `theirs`, the fastest in the first epoch stays."""
        sides = [*ours, *theirs]
        for repeat in range(self._options.repeats + 1):
            took = {side: self.epoch(side) for side in sides}
            sides = [side for side, seconds in took.items() if seconds is not None]
            if repeat == 1 and len(rivals := [side for side in sides if side in theirs]) > 1:
                best = min(rivals, key=lambda side: took[side] or 0.0)
                sides = [side for side in sides if side not in theirs or side is best]
        for side in ours:
            side.end(_GRACE_S if side in sides else 0.0)  # its summary says how it computed
        for side in theirs:
            side.end()


def speed(measured: Measured, made: dict[str, Any], options: argparse.Namespace, work: Path) -> None:
    gpus, given = max(torch.cuda.device_count(), 1), work / "trl"
    pairs = []
    for number, bits in enumerate(options.bits):
        gpu = number % gpus
        run = f"distft {BITS[bits]}"
        mine = [*words(made, options, work, bits), "strategy=single"]
        ours = [
            measured.start(name := run + how, ["distft", *mine, *more, f"run.name={_folder(name)}"], 1, work, gpu)
            for how, more in OURS.items()
        ]
        theirs = []
        for name, settings in TRL.items():
            arguments = {
                **{key: str(made[key]) for key in ("tokenizer", "rows")},
                **{"model": str(made["folder"]), "output": str(given), "max_length": made["max_length"]},
                **{"bits": bits, "global_batch": options.global_batch, "epochs": options.repeats + 1, **settings},
            }
            command = ["trl", json.dumps(arguments)]
            theirs.append(measured.start(f"TRL {BITS[bits]}, {name}", command, 1, work, gpu))
        pairs.append((gpu, ours, theirs))
    both = []
    if options.processes > 1:
        for strategy in ("ddp", "fsdp"):
            mine = [*words(made, options, work, 4), f"strategy={strategy}"]
            mine.append(f"quantization.bnb_4bit_quant_storage={'bfloat16' if torch.cuda.is_available() else 'float32'}")
            command = ["distft", *mine, *OURS[""], f"run.name={_folder(name := f'distft NF4 {strategy}')}"]
            both.append(measured.start(name, command, options.processes, work, None))
    for each in [*(side for _, *groups in pairs for group in groups for side in group), *both]:
        each.ready(options.limit)  # nobody loads while another one is measured
    on_gpu = [
        threading.Thread(target=lambda gpu=gpu: [measured.in_turns(*sides) for at, *sides in pairs if at == gpu])
        for gpu in range(gpus)
    ]
    for thread in on_gpu:
        thread.start()
    for thread in on_gpu:
        thread.join()
    measured.in_turns(both, [])
    for name, run in measured.record["runs"].items():
        path = work / "runs" / _folder(name) / "summary.json"
        noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        run["facts"] = {key: noted.get(key) for key in _FACTS} if noted else None


def _folder(name: str) -> str:
    """The name of the folder of the run `name`."""
    return re.sub(r"\W+", "-", name)


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Pairs per second of each run: of the epochs alone, and of one epoch with the reference pass before it."""
    found: dict[str, Any] = {}
    for name, run in record["runs"].items():
        epochs = [turn for turn in run["turns"] if turn["kind"] == "epoch"][1:]
        if not epochs:
            continue
        before = sum(turn["seconds"] for turn in run["turns"] if turn["kind"] == "reference")
        seconds = [turn["seconds"] for turn in epochs]
        rates, whole = ([record["pairs"] / (more + each) for each in seconds] for more in (0.0, before))
        peaks = [turn["peak_memory_gib"] for turn in run["turns"] if "peak_memory_gib" in turn]
        found[name] = {
            "repeats": len(epochs),
            "reference_s": before,
            **{
                key: {"median": median(values), "least": min(values), "greatest": max(values)}
                for key, values in (("pairs_per_second", rates), ("pairs_per_second_of_one_epoch", whole))
            },
            "peak_memory_gib": max(peaks) if peaks else None,
        }
    return found


# ---- learning --------------------------------------------------------------------------------------------------------


def learning(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A run for each seed, side by side: rewards of pairs that it was not trained on, before and after."""
    gpus, started = torch.cuda.device_count(), []
    for seed in range(options.seeds):
        command = [
            *(
                sys.executable,
                "-m",
                "distft.cli",
                "train",
                "recipe=dpo",
                "strategy=single",
                f"run.name=learning-{seed}",
            ),
            *(
                f"run.dir={work / 'runs'}",
                f"run.seed={seed}",
                f"model.name={options.model}",
                f"data.name={options.rows}",
            ),
            *("data.validation_fraction=0", "data.test_fraction=0.34", "training.eval_strategy=no"),
            *("training.save_strategy=no", "tracking.report_to=[]", "batching.global_batch_size=16"),
            *("batching.micro_batch_tokens=8192", "training.max_length=2048", f"training.num_train_epochs={_EPOCHS}"),
            *("training.learning_rate=2e-4", "training.gradient_checkpointing=false", "training.logging_steps=10"),
            *(f"model.dtype={'bfloat16' if gpus else 'float32'}", *options.set),
        ]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(seed % gpus)} if gpus else dict(os.environ)
        log = work / f"learning-{seed}.log"
        with log.open("w") as file:
            started.append((seed, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)))
    found = []
    for seed, run in started:
        try:
            run.wait(options.limit)
        except subprocess.TimeoutExpired:
            run.kill()
        path = work / "runs" / f"learning-{seed}" / "summary.json"
        done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        text = (work / f"learning-{seed}.log").read_text(encoding="utf-8")
        if done.get("status") == "finished":
            kept = (
                "eval_before",
                "eval_after",
                "steps",
                "samples",
                "train_time_s",
                "peak_memory_gib",
                "attn_implementation",
            )
            facts = {"seed": seed, "trained": done["samples"] // _EPOCHS, "held_out": int(done["eval_after"]["pairs"])}
            found.append(facts | {key: done.get(key) for key in kept})
        else:
            found.append({"seed": seed, "failed": done.get("cause"), "log": text.splitlines()[-12:]})
        print({key: value for key, value in found[-1].items() if key != "log"}, *found[-1].get("log", ()), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="a .jsonl file of conversations, chosen, rejected")
    parser.add_argument("--parts", nargs="+", choices=("speed", "learning"), default=["speed"])
    parser.add_argument("--lengths", help="folder of the tokenizer that gives the rows their lengths (speed)")
    parser.add_argument("--model", help="folder of the model that learns (learning)")
    parser.add_argument("--bits", nargs="*", type=int, choices=BITS, default=list(BITS), help="compared with TRL")
    parser.add_argument("--processes", type=int, help="of DDP and FSDP2; 1 leaves them out (default: the GPUs)")
    parser.add_argument("--repeats", type=int, default=2, help="measured epochs")
    parser.add_argument("--pairs", type=int, default=48, help="pairs of an epoch")
    parser.add_argument("--global-batch", type=int, default=24, help="pairs of a step")
    parser.add_argument("--pack", type=int, default=12_288, help="tokens of a pack")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--seeds", type=int, default=2, help="runs of `learning`")
    parser.add_argument("--limit", type=float, default=240, help="seconds of a start, of a turn, and of `learning`")
    parser.add_argument("--tiny", action="store_true", help="a small model and short pairs, for a machine without GPU")
    parser.add_argument("--commit", default="", help="commit that is measured, if git is not available")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides for every run of distft")
    parser.add_argument("--output", type=Path, required=True, help="a .json file, rewritten after every turn")
    options = parser.parse_args()
    options.processes = options.processes or max(torch.cuda.device_count(), 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    record: dict[str, Any] = {**before, **provenance(__file__, options.commit)}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "speed" in options.parts:
            made = inputs(work, options)
            record |= {
                "shape": made["shape"].name,
                "layers": made["shape"].config["num_hidden_layers"],
                "weights": "random, drawn on each device; nothing is read from a disk",
                "pairs": options.pairs,
                "global_batch": options.global_batch,
                "mean_tokens": dict(
                    zip(("prompt", "chosen", "rejected"), made["lengths"].mean(0).tolist(), strict=True)
                ),
                "pack_tokens": made["shape"].tokens(options.pack),
                "arguments": words(made, options, work, 4),
                "trl": TRL,
                "runs": {},
            }
            measured = Measured(record, options.output, options)
            try:
                speed(measured, made, options, work)
            finally:  # also if the time is over
                for side in measured.sides:
                    side.end()
                record["summary"] = summary(record)
                write_atomically(options.output, to_json(record) + "\n")
        if "learning" in options.parts:
            record["learning"] = learning(options, work)
        write_atomically(options.output, to_json(record) + "\n")
    for name, figures in record.get("summary", {}).items():
        print(name, {key: value for key, value in figures.items() if key != "repeats"}, flush=True)
    bad = [run for run in [*record.get("runs", {}).values(), *record.get("learning", ())] if run.get("failed")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
