"""What changes at 8, 64 and 1,024 GPUs: the tables of docs/scaling.md, and the model behind them against what was measured.

    python benchmarks/scaling.py                            # the tables, as Markdown
    python benchmarks/scaling.py --update docs/scaling.md   # the same, into the document
    python benchmarks/scaling.py --check                    # predicted beside measured

The model is in `cluster.py`. Speed is calibrated on one GPU alone (`results/throughput_h200.json`); what two GPUs measured is
predicted, so that the check can fail.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from cluster import (
    GB,
    Compute,
    Hardware,
    Load,
    Scheme,
    between_failures_s,
    checkpoint_bytes,
    read_seconds,
    save_interval_s,
    step,
    steps_needed,
    store_connections,
    write_seconds,
)  # fmt: skip

from distft.config.recipe import Recipe, load_recipe
from distft.data.batch_plan import Plan
from distft.distributed.strategies.base import Strategy
from distft.distributed.world import World
from distft.hardware import GIB
from distft.training.memory_estimate import Shape, device_bytes

RESULTS = Path(__file__).parent / "results"
GPUS = (1, 2, 8, 64, 1024)
DDP, FSDP = Scheme("DDP", "ddp_bf16", "nothing"), Scheme("FSDP2", "fsdp_bf16", "world")
HSDP = Scheme("HSDP", "fsdp_bf16", "node")
ZERO2 = Scheme("ZeRO-2", "zero2_bf16", "optimizer")
DOLLY = 15_011  # rows of databricks-dolly-15k
SAMPLES, BUDGET = 32, 9_216  # samples a GPU in a step, one pack; batching.micro_batch_tokens of the recipes
CRITICAL = 256  # samples: an assumption, see the document

# The published config.json of each.
_LLAMA_3: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": synthetic.LLAMA_2_7B,
    "Llama-3.1-8B": _LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3.1-70B": _LLAMA_3 | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
LLAMA = "Llama-2-7B"


# ---- what the model starts from --------------------------------------------------------------------------------------


def result(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


@functools.cache
def hardware() -> Hardware:
    return Hardware(nvlink=result("references_h200.json")["links"]["nccl_all_reduce_2_gpus_1_gib_bytes_per_second"])


@functools.cache
def compute() -> Compute:
    """Of Llama-2-7B on one H200: the same tokens in one pack a step and in two. The second ran with dropout and both with a 4-bit
    base, so that the seconds of a pack are rather too many."""
    record = result("throughput_h200.json")
    runs = [next(run for run in record["runs"] if run["name"] == name) for name in ("single_13312", "single_6656")]
    assert runs[0]["tokens"] == runs[1]["tokens"]
    one, two = (record["summary"][run["name"]]["seconds"]["median"] / record["steps"] for run in runs)
    pack_s = two - one
    return Compute(pack_s, (one - pack_s) / (runs[0]["tokens"] / record["steps"]))


@functools.cache
def model(name: str) -> tuple[Shape, dict[str, Recipe]]:
    """The shape of a model, and recipes that train it."""
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**MODELS[name]).save_pretrained(folder)
        names = ("ddp_qlora", "ddp_bf16", "fsdp_bf16", "full_fsdp", "zero2_bf16", "zero3_bf16", "fsdp_qlora")
        recipes = {recipe: load_recipe([f"recipe={recipe}", f"model.name={folder}"]) for recipe in names}
        return Shape.of(recipes["ddp_bf16"]), recipes


def adapter(name: str) -> int:
    """Parameters of the recipes' adapter on a model."""
    shape, recipes = model(name)
    return shape.adapter(recipes["ddp_bf16"].lora or {})


@functools.cache
def load(gpus: int, batch: int) -> Load:
    """What distft's plan gives to the ranks, in the mean of the steps of an epoch of `batch` samples each, of Dolly-15k's lengths, or of four."""
    count = max(DOLLY, 4 * batch)
    lengths = synthetic.sample_lengths(synthetic.SHAPES["llama-2-7b"], count, np.random.default_rng(0))
    recipe = model(LLAMA)[1]["ddp_bf16"]
    batching = recipe.batching.model_copy(update={"global_batch_size": batch, "micro_batch_tokens": BUDGET})
    plan = Plan(lengths, batching, recipe.run.seed)
    steps = [
        [[int(lengths[pack].sum()) for pack in ranks] for ranks in plan.micro_batches(number, gpus)]
        for number in range(max(4, DOLLY // batch))
    ]
    packs = [size for rounds in steps for sizes in rounds for size in sizes]
    return Load(
        sum(map(len, steps)) / len(steps), sum(max(sizes) for rounds in steps for sizes in rounds) / len(steps),
        packs.count(0) / len(packs), batch,
    )  # fmt: skip


def memory(name: str, recipe: str, gpus: int, tokens: int = BUDGET, micro_batch: int = 1) -> float:
    """Bytes on each device with all layers checkpointed, by the estimate of `distft.training.memory_estimate`; `gpus` share a copy of the base."""
    shape, recipes = model(name)
    chosen = recipes[recipe]
    strategy = Strategy("ddp", "ddp", World(world_size=gpus), True).like(chosen)
    return device_bytes(chosen, shape, strategy, micro_batch, tokens)


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s"


def _rates(
    scheme: Scheme, gpus: int, batch: int, machine: Hardware, name: str = LLAMA, overlap: float = 0.0
) -> tuple[Any, float]:
    """A step and its samples/s."""
    shape, trained = model(name)[0], adapter(name)
    done = step(scheme, shape, trained, compute().of(shape, model(LLAMA)[0]), load(gpus, batch), gpus, machine, overlap)
    return done, batch / done.seconds


def steps() -> str:
    """A full pack a GPU, LoRA on Llama-2-7B."""
    rows = []
    alone = _rates(DDP, 1, SAMPLES, hardware())[1]
    for gpus in GPUS:
        for scheme in (DDP, FSDP, HSDP, ZERO2) if gpus > 8 else (DDP, FSDP, ZERO2) if gpus > 1 else (DDP,):
            done, rate = _rates(scheme, gpus, SAMPLES * gpus, hardware())
            hidden = _rates(scheme, gpus, SAMPLES * gpus, hardware(), overlap=1.0)[1]
            rows.append([
                f"{gpus:,}", scheme.name if gpus > 1 else "single", number(done.traffic.sent / GB), number(done.traffic.leaving / GB),
                number(1e3 * done.compute), number(1e3 * done.traffic.seconds), number(rate),
                f"{rate / gpus / alone:.0%} – {hidden / gpus / alone:.0%}",
            ])  # fmt: skip
    head = (
        "GPUs",
        "strategy",
        "sent, GB",
        "to other nodes, GB",
        "computing, ms",
        "communicating, ms",
        "samples/s",
        "efficiency",
    )
    return table(head, rows)


def networks() -> str:
    """The same efficiency, nothing hidden, where the network is another."""
    kinds = {
        "400 Gb/s a GPU": hardware(),
        "400 Gb/s a node": replace(hardware(), network=0.8 * 400e9 / 8 / 8),
        "100 Gb/s a node": replace(hardware(), network=0.8 * 100e9 / 8 / 8),
        "25 Gb/s a node": replace(hardware(), network=0.8 * 25e9 / 8 / 8),
    }
    rows = []
    for kind, machine in kinds.items():
        alone = _rates(DDP, 1, SAMPLES, machine)[1]
        rates = [_rates(s, n, SAMPLES * n, machine)[1] / n / alone for n in (64, 1024) for s in (DDP, HSDP, FSDP)]
        rows.append([kind, *(f"{rate:.0%}" for rate in rates)])
    return table(("network", *(f"{s.name}, {n:,}" for n in (64, 1024) for s in (DDP, HSDP, FSDP))), rows)


def batches() -> str:
    """The recipes' global batch, kept, and a pack a GPU; DDP."""
    rows = []
    alone = _rates(DDP, 1, 64, hardware())[1]
    for gpus in GPUS:
        kept, (done, rate) = load(gpus, 64), _rates(DDP, gpus, 64, hardware())
        grown = SAMPLES * gpus
        large, large_rate = _rates(DDP, gpus, grown, hardware())
        wanted = steps_needed(grown, CRITICAL, 64) * large.seconds / _rates(DDP, 1, 64, hardware())[0].seconds
        rows.append([
            f"{gpus:,}", number(kept.heaviest), f"{kept.spare:.0%}", number(1e3 * done.seconds), number(rate), f"{rate / alone:.1f} ×",
            f"{grown:,}", number(DOLLY / grown), number(large_rate), f"{1 / wanted:.1f} ×",
        ])  # fmt: skip
    return table(
        ("GPUs", "tokens of the fullest rank", "spare packs", "step, ms", "samples/s", "sooner done",
         "samples a step, 32 a GPU", "steps an epoch of Dolly-15k", "samples/s", "sooner at the same loss"),
        rows,
    )  # fmt: skip


def memories() -> str:
    rows = []
    kinds = (
        ("LoRA, DDP, 4-bit base", "ddp_qlora"),
        ("LoRA, DDP", "ddp_bf16"),
        ("LoRA, FSDP2 or HSDP", "fsdp_bf16"),
        ("all parameters, FSDP2 or HSDP", "full_fsdp"),
    )
    for name in MODELS:
        for kind, recipe in kinds:
            sharded = recipe in ("fsdp_bf16", "full_fsdp")
            sizes = [memory(name, recipe, gpus) / GIB for gpus in (GPUS if sharded else (1,))]
            rows.append([name, kind, *(f"{size:,.0f}" for size in sizes), *["same"] * (len(GPUS) - len(sizes))])
    return table(("model", "what trains", *(f"{gpus:,}" for gpus in GPUS)), rows)


def checkpoints() -> str:
    rows = []
    machine = hardware()
    for name in (LLAMA, "Llama-3.1-70B"):
        for kind, trained in (("LoRA r=32", adapter(name)), ("all parameters", model(name)[0].parameters)):
            size = checkpoint_bytes(trained)
            alone = write_seconds(size, 1, machine)
            for gpus in (8, 64, 1024):
                nodes = machine.nodes(gpus)
                saving, failures = write_seconds(size, nodes, machine), between_failures_s(gpus)
                rows.append([
                    name, kind, f"{size / GB:,.1f}", f"{gpus:,}", duration(alone), duration(saving), duration(size / machine.hashing),
                    duration(failures), duration(save_interval_s(saving, failures)),
                ])  # fmt: skip
    return table(
        ("model", "what trains", "GB", "GPUs", "rank 0 writes", "all nodes write", "rank 0 hashes", "a failure every", "save every"), rows
    )  # fmt: skip


def starts() -> str:
    rows = []
    machine = hardware()
    sizes = {name: 2.0 * model(name)[0].parameters for name in (LLAMA, "Llama-3.1-70B")}
    for gpus in GPUS:
        nodes = machine.nodes(gpus)
        cells = [
            f"{number(nodes * size / GB)} GB, {duration(read_seconds(size, nodes, machine))}" for size in sizes.values()
        ]
        sent = [duration(size / machine.network) if nodes > 1 else "–" for size in sizes.values()]
        rows.append(
            [
                f"{gpus:,}",
                f"{nodes:,}",
                f"{store_connections(gpus):,}",
                f"{nodes:,}",
                *cells,
                " / ".join(dict.fromkeys(sent)),
            ]
        )
    return table(
        ("GPUs", "nodes", "connections to rank 0", "to the rendezvous", *(f"all nodes read {name}" for name in sizes), "or one reads and sends"),
        rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "steps": steps, "networks": networks, "memories": memories, "batches": batches, "checkpoints": checkpoints, "starts": starts,
}  # fmt: skip


def updated(document: str) -> str:
    """`document` with every table between `<!-- table: NAME -->` and `<!-- end -->` as it is now."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", document, flags=re.DOTALL,
    )  # fmt: skip


# ---- against what was measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A figure that the model gives beside the measured one. `tolerance` is what is claimed; None where nothing is."""

    what: str
    predicted: float
    measured: float
    tolerance: float | None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def holds(self) -> bool:
        return self.tolerance is None or abs(self.error) <= self.tolerance


def checks() -> list[Check]:
    """Two GPUs from one (tokens/s), and memory (GiB) on two GPUs and one."""
    runs = {run["name"]: run for run in result("references_h200.json")["runs"]}

    def speed(one: str, two: str, scheme: Scheme, tolerance: float | None, remark: str = "") -> Check:
        tokens = runs[one]["pack_tokens"] or 6_656
        alone = Compute(0.0, 1 / runs[one]["tokens_per_second"])
        done = step(scheme, model(LLAMA)[0], adapter(LLAMA), alone, Load(1, tokens, 0, 0), 2, hardware())
        return Check(
            f"tokens/s, {two}, from {one}{remark}", 2 * tokens / done.seconds, runs[two]["tokens_per_second"], tolerance
        )

    found = [
        speed("trl_packed_1", "trl_packed_ddp_nf4_2", DDP, 0.05),
        speed("trl_packed_1", "trl_packed_fsdp2_bf16_2", FSDP, 0.05),
        speed("r1_1", "r1_ddp_nf4_2", DDP, None, " (it waits for the host, which is not in the model)"),
    ]
    ours, two = (result(f"throughput_h200{name}.json") for name in ("", "_two_gpus"))
    tokens = two["mean_tokens_of_a_sample"] * 32  # of a rank: half of 64 samples
    alone = Compute(0.0, 1 / ours["summary"]["single_6656"]["tokens_per_second"]["median"])
    done = step(DDP, model(LLAMA)[0], adapter(LLAMA), alone, Load(1, tokens, 0, 0), 2, hardware())
    measured = two["summary"]["ddp_qlora"]["tokens_per_second"]["median"]
    found.append(
        Check("tokens/s, distft's ddp_qlora on 2 GPUs, from single_6656", 2 * tokens / done.seconds, measured, 0.1)
    )
    for run in result("main_job_2xh200.json")["runs"]:
        summary = run["summary"]
        if summary["peak_memory_gib"]:
            predicted = memory(LLAMA, summary["recipe"], 2, 1024, summary["micro_batch"]) / GIB
            found.append(Check(f"GiB, {summary['recipe']}, 2 GPUs", predicted, summary["peak_memory_gib"], 0.1))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="predicted beside measured; ends 1 where a claim does not hold"
    )
    parser.add_argument("--update", type=Path, metavar="DOCUMENT", help="put the tables into this document")
    options = parser.parse_args(arguments)
    if options.check:
        found = checks()
        rows = [
            [c.what, f"{c.predicted:,.4g}", f"{c.measured:,.4g}", f"{c.error:+.1%}", "none" if c.tolerance is None else f"± {c.tolerance:.0%}"]
            for c in found
        ]  # fmt: skip
        print(table(("what", "predicted", "measured", "error", "claimed"), rows))
        return 0 if all(check.holds for check in found) else 1
    if options.update:
        options.update.write_text(updated(options.update.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for name, make in TABLES.items():
        print(f"<!-- table: {name} -->\n{make()}\n<!-- end -->\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
