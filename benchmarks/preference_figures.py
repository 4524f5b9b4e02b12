"""The section of the benchmarks page on preferences, from its record; benchmarks/real_figures.py writes it."""

from __future__ import annotations

import textwrap
from typing import Any

from distft.stats import Estimate

Row = list[str]
SPEED = ("", "pairs/s", "of one epoch with its reference pass", "peak GiB")
LEARNING = ("seed", "trained pairs", "held-out pairs", "reward accuracy", "95% interval", "margin")


def rates(summary: dict[str, Any]) -> list[Row]:
    return [
        [
            name,
            *(_spread(found[key]) for key in ("pairs_per_second", "pairs_per_second_of_one_epoch")),
            f"{found['peak_memory_gib']:.1f}" if found["peak_memory_gib"] is not None else "–",
        ]
        for name, found in summary.items()
    ]


def _spread(found: dict[str, float]) -> str:
    several = found["least"] != found["greatest"]
    return f"{found['median']:.2f}" + (f" ({found['least']:.2f}–{found['greatest']:.2f})" if several else "")


def best(summary: dict[str, Any], bits: str, figure: str = "pairs_per_second") -> str:
    """The fastest setting of TRL in these bits."""
    rivals = [name for name in summary if name.startswith(f"TRL {bits}")]
    return max(rivals, key=lambda name: float(summary[name][figure]["median"]))


def ratios(summary: dict[str, Any]) -> list[str]:
    """A sentence for each of the comparisons."""
    found = []
    for bits in ("NF4", "bf16"):
        ours = summary.get(f"distft {bits}")
        if ours and any(name.startswith(f"TRL {bits}") for name in summary):
            alone, whole = (
                ours[figure]["median"] / summary[best(summary, bits, figure)][figure]["median"]
                for figure in ("pairs_per_second", "pairs_per_second_of_one_epoch")
            )
            other = summary[best(summary, bits)]["peak_memory_gib"]
            memory = f", with {ours['peak_memory_gib']:.1f} GiB against {other:.1f}" if other else ""
            found.append(
                f"In {bits}, epochs of distft are {alone:.2f} times as fast as those of the faster of TRL's settings, "
                f"and {whole:.2f} times if the reference pass of TRL counts{memory}."
            )
    if (ddp := summary.get("distft NF4 ddp")) and (fsdp := summary.get("distft NF4 fsdp")):
        share = fsdp["pairs_per_second"]["median"] / ddp["pairs_per_second"]["median"]
        found.append(f"On two GPUs in NF4, FSDP2 reaches {share:.2f} of DDP's rate.")
    return found


def learned(runs: list[dict[str, Any]]) -> list[Row]:
    rows, right, pairs = list[Row](), 0.0, 0
    for run in runs:
        if "failed" in run:
            continue
        accuracy, held_out = run["eval_after"]["rewards/accuracies"], run["held_out"]
        right, pairs = right + accuracy * held_out, pairs + held_out
        rows.append([str(run["seed"]), str(run["trained"]), *_accuracy(accuracy, held_out)])
        rows[-1].append(f"{run['eval_after']['rewards/margins']:.3f}")
    if len(rows) > 1:
        rows.append(["all", "", *_accuracy(right / pairs, pairs), ""])
    return rows


def _ways(record: dict[str, Any]) -> list[str]:
    """How distft computes prompts and the reference."""
    if "distft NF4, prompts twice" in record["summary"]:
        return [
            "So does distft, and it computes the prompt of a pair once for both answers; with the prompts twice, it",
            "computes the reference with each micro-batch.",
        ]
    return [
        "distft computes it with each micro-batch: the record is from before `preference.precompute_ref_log_probs` and",
        "`batching.share_prompts`, so that the prompt of a pair was computed for each answer. TRL's pass took one pair",
        "at a time, of shapes that it met for the first time.",
    ]


def _paragraph(*parts: str) -> str:
    return textwrap.fill(" ".join(filter(None, parts)), 120) + "\n\n"


def _accuracy(accuracy: float, pairs: int) -> Row:
    interval = Estimate.proportion(accuracy, pairs)
    return [str(pairs), f"{accuracy:.3f}", f"{interval.low:.3f} – {interval.high:.3f}"]


def section(record: dict[str, Any], table: Any) -> str:
    """`## Preferences` of the benchmarks page."""
    parts = ["## Preferences\n\n"]
    if summary := record.get("summary"):
        tokens = record["mean_tokens"]
        parts.append(
            _paragraph(
                "`objective: dpo` against TRL's `DPOTrainer` at Llama-2-7B's shape, with random weights, LoRA of rank",
                f"16 on all linears, and {record['pairs']} pairs an epoch in steps of {record['global_batch']}.",
                "A pair has",
                f"{tokens['prompt']:.0f} tokens of prompt, {tokens['chosen']:.0f} of the chosen and",
                f"{tokens['rejected']:.0f} of the rejected answer on average, as real ones do. TRL runs without",
                "activation checkpointing, with Liger's kernels and SDPA; its `padding_free` is switched off in the",
                "installed version. Epochs of both were measured in turns, on one GPU unless a strategy is named. TRL",
                "computes the reference before training, in a pass that is measured once.",
                *_ways(record),
                "" if "distft NF4 ddp" in summary else "DDP and FSDP2 have not been compared yet.",
            )
            + f"{table(SPEED, rates(summary))}\n"
            + _paragraph(*ratios(summary))
        )
    if runs := learned(record.get("learning", [])):
        parts.append(
            _paragraph(
                "SmolLM2-135M-Instruct on 300 real pairs (the sample of LLaMA-Factory), three epochs in bf16; each",
                "seed holds other pairs out. The accuracy is the share of held-out pairs whose chosen answer gets the",
                "higher reward.",
            )
            + f"{table(LEARNING, runs)}\n"
        )
    return "".join(parts) + "Record: `preferences_h200.json`, made by `benchmarks/preferences.py`.\n"
