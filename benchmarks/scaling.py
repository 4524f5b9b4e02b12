"""The tables of docs/scaling.md for 8, 64 and 1,024 GPUs, and a check of their model against measurements.

    python benchmarks/scaling.py                            # print the tables as Markdown
    python benchmarks/scaling.py --update docs/scaling.md   # update the document
    python benchmarks/scaling.py --check                    # compare predictions with measurements

The model is in `cluster.py`. Its speed is calibrated on one GPU only (`results/throughput_h200.json`); measurements
on two GPUs are predicted, so the check can fail.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
)
from scaling_inputs import (
    CRITICAL,
    DDP,
    DOLLY,
    FSDP,
    GPUS,
    HSDP,
    LLAMA,
    MODELS,
    SAMPLES,
    ZERO2,
    adapter,
    compute,
    hardware,
    load,
    memory,
    model,
    result,
)

from distft.hardware import GIB

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
    """A step, and its samples/s."""
    shape, trained = model(name)[0], adapter(name)
    done = step(scheme, shape, trained, compute().of(shape, model(LLAMA)[0]), load(gpus, batch), gpus, machine, overlap)
    return done, batch / done.seconds


def steps() -> str:
    """A full pack per GPU, LoRA on Llama-2-7B."""
    rows = []
    alone = _rates(DDP, 1, SAMPLES, hardware())[1]
    for gpus in GPUS:
        for scheme in (DDP, FSDP, HSDP, ZERO2) if gpus > 8 else (DDP, FSDP, ZERO2) if gpus > 1 else (DDP,):
            done, rate = _rates(scheme, gpus, SAMPLES * gpus, hardware())
            hidden = _rates(scheme, gpus, SAMPLES * gpus, hardware(), overlap=1.0)[1]
            rows.append(
                [
                    f"{gpus:,}",
                    scheme.name if gpus > 1 else "single",
                    number(done.traffic.sent / GB),
                    number(done.traffic.leaving / GB),
                    number(1e3 * done.compute),
                    number(1e3 * done.traffic.seconds),
                    number(rate),
                    f"{rate / gpus / alone:.0%} – {hidden / gpus / alone:.0%}",
                ]
            )
    head = (
        "GPUs",
        "strategy",
        "sent, GB",
        "to other nodes, GB",
        "compute, ms",
        "communication, ms",
        "samples/s",
        "efficiency",
    )
    return table(head, rows)


def networks() -> str:
    """Efficiency on slower networks, with all communication exposed."""
    kinds = {
        "400 Gb/s per GPU": hardware(),
        "400 Gb/s per node": replace(hardware(), network=0.8 * 400e9 / 8 / 8),
        "100 Gb/s per node": replace(hardware(), network=0.8 * 100e9 / 8 / 8),
        "25 Gb/s per node": replace(hardware(), network=0.8 * 25e9 / 8 / 8),
    }
    rows = []
    for kind, machine in kinds.items():
        alone = _rates(DDP, 1, SAMPLES, machine)[1]
        rates = [_rates(s, n, SAMPLES * n, machine)[1] / n / alone for n in (64, 1024) for s in (DDP, HSDP, FSDP)]
        rows.append([kind, *(f"{rate:.0%}" for rate in rates)])
    return table(("network", *(f"{s.name}, {n:,}" for n in (64, 1024) for s in (DDP, HSDP, FSDP))), rows)


def batches() -> str:
    """The recipes' global batch, and a pack per GPU; DDP."""
    rows = []
    alone = _rates(DDP, 1, 64, hardware())[1]
    for gpus in GPUS:
        kept, (done, rate) = load(gpus, 64), _rates(DDP, gpus, 64, hardware())
        grown = SAMPLES * gpus
        large, large_rate = _rates(DDP, gpus, grown, hardware())
        wanted = steps_needed(grown, CRITICAL, 64) * large.seconds / _rates(DDP, 1, 64, hardware())[0].seconds
        rows.append(
            [
                f"{gpus:,}",
                number(kept.heaviest),
                f"{kept.spare:.0%}",
                number(1e3 * done.seconds),
                number(rate),
                f"{rate / alone:.1f} ×",
                f"{grown:,}",
                number(DOLLY / grown),
                number(large_rate),
                f"{1 / wanted:.1f} ×",
            ]
        )
    return table(
        (
            "GPUs",
            "tokens on the fullest rank",
            "empty packs",
            "step, ms",
            "samples/s",
            "speed-up",
            "samples per step, 32 per GPU",
            "steps per epoch of Dolly-15k",
            "samples/s",
            "speed-up to the same loss",
        ),
        rows,
    )


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
                rows.append(
                    [
                        name,
                        kind,
                        f"{size / GB:,.1f}",
                        f"{gpus:,}",
                        duration(alone),
                        duration(saving),
                        duration(size / machine.hashing),
                        duration(failures),
                        duration(save_interval_s(saving, failures)),
                    ]
                )
    return table(
        (
            "model",
            "what trains",
            "GB",
            "GPUs",
            "rank 0 writes",
            "all nodes write",
            "rank 0 hashes",
            "time between failures",
            "save every",
        ),
        rows,
    )


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
        (
            "GPUs",
            "nodes",
            "connections to rank 0",
            "connections to the rendezvous",
            *(f"all nodes read {name}" for name in sizes),
            "one reads and broadcasts",
        ),
        rows,
    )


TABLES: dict[str, Callable[[], str]] = {
    "steps": steps,
    "networks": networks,
    "memories": memories,
    "batches": batches,
    "checkpoints": checkpoints,
    "starts": starts,
}


def updated(document: str) -> str:
    """`document` with every table between `<!-- table: NAME -->` and `<!-- end -->` replaced by the current one."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        document,
        flags=re.DOTALL,
    )


# ---- comparison with measurements -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A predicted and a measured figure. `tolerance` is the claimed relative error, or None without a claim."""

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
    """Speed of two GPUs predicted from one (tokens/s), and memory on one and two GPUs (GiB)."""
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
        speed("r1_1", "r1_ddp_nf4_2", DDP, None, " (waits for the host, which the model ignores)"),
    ]
    ours, two = (result(f"throughput_h200{name}.json") for name in ("", "_two_gpus"))
    tokens = two["mean_tokens_of_a_sample"] * 32  # per rank: half of 64 samples
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
        "--check", action="store_true", help="compare predictions with measurements; exit code 1 if a claim fails"
    )
    parser.add_argument("--update", type=Path, metavar="DOCUMENT", help="update the tables in this document")
    options = parser.parse_args(arguments)
    if options.check:
        found = checks()
        rows = [
            [
                c.what,
                f"{c.predicted:,.4g}",
                f"{c.measured:,.4g}",
                f"{c.error:+.1%}",
                "none" if c.tolerance is None else f"± {c.tolerance:.0%}",
            ]
            for c in found
        ]
        print(table(("what", "predicted", "measured", "error", "claim"), rows))
        return 0 if all(check.holds for check in found) else 1
    if options.update:
        options.update.write_text(updated(options.update.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for name, make in TABLES.items():
        print(f"<!-- table: {name} -->\n{make()}\n<!-- end -->\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
