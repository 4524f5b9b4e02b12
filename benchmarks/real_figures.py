"""The sections of the benchmarks page on preferences, real weights and recipes, from their records.

    python benchmarks/real_figures.py --update docs/benchmarks.md

A test compares the page with the records.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import preference_figures

RESULTS = Path(__file__).parent / "results"
Row = list[str]


def record(name: str) -> dict[str, Any]:
    """The record of this name; empty if there is none."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def runs_of(experiment: str) -> dict[str, list[dict[str, Any]]]:
    """The finished runs of each variant."""
    report = record("pretrained_h200")["experiments"][experiment]["report"]
    runs = [run for run in report["runs"] if run["status"] == "finished"]
    return {name: [run for run in runs if run["variant"] == name] for name in report["variants"]}


def spread(runs: list[dict[str, Any]], figure: str, form: str = ".3f") -> str:
    """The median and the range of a figure."""
    return _spread([run["figures"][figure] for run in runs], form)


def base_accuracy(runs: list[dict[str, Any]]) -> str:
    found = [run["evaluation"].get("imdb") for run in runs]
    return _spread([each and each["figures"]["accuracy"]["base"]["value"] for each in found], ".3f")


def _spread(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    several = f" ({min(known):{form}}–{max(known):{form}})" if len(known) > 1 else ""
    return f"{median(known):{form}}{several}"


def losses(experiment: str) -> list[Row]:
    figures = ("final_loss", "eval_loss_before", "eval_loss_after")
    return [
        [f"`{name}`", str(len(runs)), *(spread(runs, figure) for figure in figures)]
        for name, runs in runs_of(experiment).items()
        if runs
    ]


def accuracies(experiment: str) -> list[Row]:
    return [
        [
            f"`{name}`",
            str(len(runs)),
            base_accuracy(runs),
            spread(runs, "imdb_accuracy"),
            spread(runs, "eval_loss_after"),
            spread(runs, "peak_memory_gib", ".2f"),
        ]
        for name, runs in runs_of(experiment).items()
        if runs
    ]


def peaks() -> list[Row]:
    """Peak memory at rank 8: a row for each pack length and activation checkpointing, a column for each of the bits."""
    peak = {
        name: f"{runs[0]['figures']['peak_memory_gib']:.2f}" for name, runs in runs_of("memory_grid").items() if runs
    }
    return [
        [f"{length:,}", "yes" if name == "gradient_checkpointing" else "no"]
        + [peak.get(f"length{length}-r8-bits{bits}-{name}", "–") for bits in (4, 8, 16)]
        for length in (1024, 4096, 16384)
        for name in ("gradient_checkpointing", "no-gradient_checkpointing")
    ]


def again(found: dict[str, Any]) -> str:
    """A sentence on FSDP2's run that was made once more."""
    runs = found.get("fsdp_qlora_again", {}).get("runs")
    if not runs:
        return ""
    ours, theirs = (
        f"{runs[name]['perplexity_before']} to {runs[name]['perplexity_after']}" for name in ("fsdp_qlora", "ddp_qlora")
    )
    return f" Once more with seed 1,\nits held-out perplexity went from {ours}, and that of `ddp_qlora` from {theirs}."


def recipes() -> list[Row]:
    runs = {run["recipe"]: run for run in record("recipes_h200")["runs"]}
    return [
        [
            f"`{name}`",
            f"{run['layers']}" + ("" if run["whole"] else " (fewer)"),
            run["attn_implementation"],
            f"{run['fused_linears']} of {run['adapted_linears']}",
            f"{run['peak_memory_gib']:.1f}",
        ]
        for name, run in sorted(runs.items())
        if run["exit_code"] == 0
    ]


_LOSSES = ("`variant`", "runs", "last training loss", "held-out loss before", "after")
_ACCURACIES = ("`variant`", "runs", "accuracy before", "after", "held-out loss after", "peak GiB")
_REAL = {
    "quality": "*4 bits under DDP, bf16 under FSDP2* (`quality`): 60 steps of 32 instructions, rank 32, two GPUs.\n"
    "`fsdp_qlora` shows the fault that these runs found: PyTorch changed packed weights that FSDP2 gathered on a GPU.\n"
    "They were made before distft gathered such weights as bytes.{again}",
    "rank": "*Rank 8 against 32* (`rank`): 60 steps of 32 instructions, 4 bits, alpha twice the rank.",
    "imdb_bits": "*IMDB in 4, 8 and 16 bits* (`imdb_bits`): 100 steps of 16 reviews; accuracy on up to 400 others.",
    "ablation": "*Memory techniques* (`ablation`): 50 steps of 16 reviews; `none` trains all parameters.",
    "duel": "*A duel* (`duel`): `llama2` is SmolLM2 here, and `deepseek` its shape with random weights.",
}


def sections() -> str:
    """The sections of those records that there are."""
    found = []
    if preferences := record("preferences_h200"):
        found.append(preference_figures.section(preferences, _table))
    if experiments := record("pretrained_h200").get("experiments"):
        found.append(
            "## Real weights\n\n"
            "SmolLM2-135M-Instruct on real rows: 999 instructions of Alpaca as chats, and 1,997 reviews of IMDB.\n"
            "These are the shipped experiments with another model and other rows, on shared GPUs: losses,\n"
            "accuracies and peak memory count, and speeds do not. Three runs are three seeds. A dash, or a\n"
            "missing row: the time on the GPUs ended before that run.\n"
        )
        for name, what in _REAL.items():
            if name in experiments:
                of_losses = name in ("quality", "rank")
                rows = losses(name) if of_losses else accuracies(name)
                what = what.format(again=again(record("pretrained_h200")))
                found.append(f"{what}\n\n{_table(_LOSSES if of_losses else _ACCURACIES, rows)}")
        if "memory_grid" in experiments:
            head = ("tokens of a pack", "checkpointed", "4 bits", "8 bits", "16 bits")
            found.append(f"*Peak GiB* (`memory_grid`), at rank 8:\n\n{_table(head, peaks())}")
        found.append("Record: `pretrained_h200.json`, made by `benchmarks/pretrained.py`.\n")
    if record("recipes_h200"):
        head = ("`recipe`", "layers", "attention", "fused linears", "peak GiB")
        found.append(
            "## Recipes at their real shapes\n\n"
            "Each recipe for a chat model trained three steps of 64 samples on one H200, at its model's real shape,\n"
            "with random weights. It shows that they run, with which attention and how many fused linears, and in how\n"
            "much memory. Of some models, only a few layers ran.\n\n"
            f"{_table(head, recipes())}\nRecord: `recipes_h200.json`, made by `benchmarks/recipes.py`.\n"
        )
    return "\n".join(found)


def _table(head: tuple[str, ...], rows: list[Row]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, required=True, help="the page")
    page = parser.parse_args().update
    text = page.read_text(encoding="utf-8")
    names = "Preferences|Real weights|Recipes at their real shapes"
    text = re.sub(rf"## ({names})\n.*?(?=^## )", "", text, flags=re.DOTALL | re.MULTILINE)
    page.write_text(text.replace("## Precision\n", f"{sections()}\n## Precision\n", 1), encoding="utf-8")


if __name__ == "__main__":
    main()
